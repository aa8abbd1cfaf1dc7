"""Image-text retrieval for the `evaluate` library: evaluate.load(clipmini.metric("image_text_retrieval"))."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import torch

from clipmini.evaluation.intervals import bootstrap_intervals, interval_ends
from clipmini.evaluation.retrieval import retrieval_scores, summarize_scores

DESCRIPTION = """
Recall at k, mAP@10, mean and median rank of image-text retrieval, in both directions, over the whole set. Each row is
an image with all of its captions: every caption is a query for its image among all images, every image a query for any
of its captions among all captions. Ties count against the model.
"""
INPUTS = """
Args:
    image_embeds: one vector per image; it is scaled to length 1.
    text_embeds: for each image a list of vectors, one per caption, possibly none; they are scaled to length 1.
    recall_at: the values of k; 1, 5 and 10 by default.
    intervals: return 95 % bootstrap intervals over images too.
    num_resamples: resamples of the intervals.
    seed: seed of the resamples.

Returns:
    text_to_image_r1, ..., image_to_text_r10, mean_recall and both map10 in [0, 1]; mean_rank and median_rank of both
    directions, from 1. With intervals, `intervals` holds [low, high] by name, of all but the median ranks.

Example:
    >>> metric = evaluate.load(clipmini.metric("image_text_retrieval"))
    >>> result = metric.compute(image_embeds=[[1.0, 0.0], [0.0, 1.0]], text_embeds=[[[1.0, 0.1]], [[0.9, 0.2]]])
    >>> result["text_to_image_r1"]
    0.5
"""
CITATION = """
@article{hodosh2013framing,
  title={Framing Image Description as a Ranking Task: Data, Models and Evaluation Metrics},
  author={Hodosh, Micah and Young, Peter and Hockenmaier, Julia},
  journal={Journal of Artificial Intelligence Research},
  volume={47},
  pages={853--899},
  year={2013}
}
@inproceedings{karpathy2015deep,
  title={Deep Visual-Semantic Alignments for Generating Image Descriptions},
  author={Karpathy, Andrej and Fei-Fei, Li},
  booktitle={CVPR},
  year={2015}
}
"""


class ImageTextRetrieval(evaluate.Metric):
    """See `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "image_embeds": datasets.Sequence(datasets.Value("float32")),
                    "text_embeds": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
                }
            ),
        )

    def _compute(
        self,
        image_embeds: Sequence[Sequence[float]],
        text_embeds: Sequence[Sequence[Sequence[float]]],
        recall_at: Sequence[int] = (1, 5, 10),
        intervals: bool = False,
        num_resamples: int = 1000,
        seed: int = 0,
    ) -> dict[str, Any]:
        if not recall_at:
            raise ValueError("recall_at is empty; pass at least one k.")
        images = torch.nn.functional.normalize(torch.tensor(image_embeds), dim=-1)
        texts = torch.tensor([vector for captions in text_embeds for vector in captions])
        texts = torch.nn.functional.normalize(texts.view(-1, images.shape[-1]), dim=-1)
        num_captions = torch.tensor([len(captions) for captions in text_embeds])
        text_image_ids = torch.arange(len(images)).repeat_interleave(num_captions)
        scores = retrieval_scores(images, texts, text_image_ids)
        result: dict[str, Any] = summarize_scores(scores, recall_at)
        if intervals:
            result["intervals"] = interval_ends(bootstrap_intervals(scores, num_resamples, seed, recall_at))
        return result
