"""Zero-shot accuracy for the `evaluate` library: evaluate.load(clipmini.metric("zero_shot_accuracy"))."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import torch

from clipmini.evaluation.classification import classification_metrics
from clipmini.evaluation.intervals import interval_ends

DESCRIPTION = """
Top-1 and top-5 accuracy, accuracy averaged over classes, and expected calibration error of a classifier that scores
every class for every image, as zero-shot classifiers do. Ties count against the classifier.
"""
INPUTS = """
Args:
    predictions: for each image the score of every class, higher being better.
    references: for each image the index of its class, from 0.
    are_probabilities: the predictions of each image sum to 1, so that calibration can be measured.
    intervals: return 95 % bootstrap intervals over images too.
    num_resamples: resamples of the intervals.
    seed: seed of the resamples.

Returns:
    top1, top5 (with more than five classes), mean_per_class, chance, and calibration_error if they are probabilities;
    all in [0, 1]. With intervals, `intervals` holds [low, high] by name.

Example:
    >>> metric = evaluate.load(clipmini.metric("zero_shot_accuracy"))
    >>> metric.compute(predictions=[[0.9, 0.1], [0.6, 0.4]], references=[0, 1])["top1"]
    0.5
"""
CITATION = """
@inproceedings{radford2021learning,
  title={Learning Transferable Visual Models From Natural Language Supervision},
  author={Radford, Alec and others},
  booktitle={ICML},
  year={2021}
}
@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q},
  booktitle={ICML},
  year={2017}
}
"""


class ZeroShotAccuracy(evaluate.Metric):
    """See `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[float]],
        references: Sequence[int],
        are_probabilities: bool = False,
        intervals: bool = False,
        num_resamples: int = 1000,
        seed: int = 0,
    ) -> dict[str, Any]:
        scores = torch.tensor(predictions)
        metrics = classification_metrics(
            scores,
            torch.tensor(references),
            confidence=scores.amax(dim=1) if are_probabilities else None,
            num_resamples=num_resamples,
            seed=seed,
        )
        result: dict[str, Any] = {name: share.value for name, share in metrics.shares.items()}
        result["chance"] = metrics.chance
        if metrics.calibration_error is not None:
            result["calibration_error"] = metrics.calibration_error
        if intervals:
            result["intervals"] = interval_ends(metrics.shares)
        return result
