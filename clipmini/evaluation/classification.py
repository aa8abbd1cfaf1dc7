"""Metrics of classification, as pure functions, and zero-shot classification of a split.

Shape letters: N images, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from scipy.sparse import csr_array
from torch import Tensor

from clipmini.inference.embed import DualEncoder
from clipmini.inference.zero_shot import embed_labels

from .intervals import Interval, percentiles, resample_weights

NUM_BINS = 15  # of the calibration error, as in Guo et al.
TOP_K = 5


@dataclass(frozen=True)
class ClassificationMetrics:
    """Accuracies of a classifier, in [0, 1].

    Attributes:
        shares: accuracies with their 95 % bootstrap intervals over images: `top1`, the share of images whose label has
            the best score; `top5`, where there are more than five classes, the share whose label is among the five
            best; `mean_per_class`, accuracy averaged over the classes that have images, so that rare ones count as
            much.
        chance: `top1` of guessing, 1 / C.
        is_correct: (N,) the images that `top1` counts.
        predicted: (N,) the class that each image was given, from 0 to C - 1.
        per_class: (C,) accuracy of each class; NaN for one without images.
        calibration_error: mean distance of confidence from accuracy over 15 equal bins of confidence, each weighted by
            its images (Guo et al., 2017, arXiv:1706.04599); None where confidence is not known.
        confusion: (C, C) number of images by label (row) and predicted class (column).
    """

    shares: dict[str, Interval]
    chance: float
    is_correct: np.ndarray
    predicted: np.ndarray
    per_class: np.ndarray
    calibration_error: float | None
    confusion: np.ndarray


def classification_metrics(
    scores: Tensor,
    labels: Tensor,
    *,
    confidence: Tensor | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> ClassificationMetrics:
    """Measure a classifier.

    Ties count against it, and so does NaN: a label counts as found only where its score is above all others.

    Args:
        scores: (N, C), higher is better.
        labels: (N,) integers from 0 to C - 1.
        confidence: (N,) the probability, in [0, 1], of the class that the classifier predicts for each image.
        num_resamples: sets of images drawn for the intervals.
        seed: seed of the draws.

    Raises:
        ValueError: there are no images, or scores and labels do not match.
    """
    if scores.ndim != 2 or not len(scores) or len(scores) != len(labels):
        raise ValueError(
            f"Scores of shape {tuple(scores.shape)} and {len(labels)} labels do not match; pass (N, C) scores and N "
            "labels, N at least 1."
        )
    num_images, num_classes = scores.shape
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"Labels from {labels.min()} to {labels.max()} are not all among {num_classes} classes; number them from "
            f"0 to {num_classes - 1}."
        )
    scores, labels = scores.float().cpu(), labels.long().cpu()
    label_scores = scores.gather(1, labels[:, None])
    rank = (~(scores < label_scores)).sum(dim=1) - 1  # the label ties with itself
    # The prediction is the label where it was found, else the best of the others.
    others = scores.nan_to_num(nan=torch.inf).scatter(1, labels[:, None], -torch.inf)
    predicted = labels.where(rank == 0, others.argmax(dim=1)) if num_classes > 1 else labels
    confusion = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, -1)

    is_correct = (rank == 0).numpy()
    is_found = {"top1": is_correct}
    if num_classes > TOP_K:
        is_found["top5"] = (rank < TOP_K).numpy()

    def shares(weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return the (R,) shares under each row of (R, N) weights, which sum to N."""
        by_class = _per_class(is_correct, labels.numpy(), num_classes, weights)
        by_name = {name: weights @ found / num_images for name, found in is_found.items()}
        return {**by_name, "mean_per_class": np.nanmean(by_class, axis=1)}

    once = np.ones((1, num_images))
    resampled = [shares(weights) for weights in resample_weights(num_images, num_resamples, seed)]
    return ClassificationMetrics(
        shares={
            name: Interval(float(value), *percentiles(np.concatenate([part[name] for part in resampled])))
            for name, (value,) in shares(once).items()
        },
        chance=1 / num_classes,
        is_correct=is_correct,
        predicted=predicted.numpy(),
        per_class=_per_class(is_correct, labels.numpy(), num_classes, once)[0],
        calibration_error=None if confidence is None else _calibration_error(confidence, is_correct),
        confusion=confusion.numpy(),
    )


def _per_class(is_correct: np.ndarray, labels: np.ndarray, num_classes: int, weights: np.ndarray) -> np.ndarray:
    """Return the accuracy of each class under each row of (R, N) weights: (R, C), NaN where a class has no image."""
    rows = np.arange(len(labels))
    is_of_class = csr_array((np.ones(len(labels)), (rows, labels)), shape=(len(labels), num_classes))
    with np.errstate(invalid="ignore"):  # no image of no image
        return (weights * is_correct) @ is_of_class / (weights @ is_of_class)


def _calibration_error(confidence: Tensor, is_correct: np.ndarray) -> float:
    values = confidence.double().cpu().numpy()
    if not np.isfinite(values).all():
        return float("nan")
    bins = np.minimum((values * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins, weights=values - is_correct, minlength=NUM_BINS)  # of each bin, times its images
    return float(np.abs(gaps).sum() / len(values))


def measure_zero_shot(
    encoder: DualEncoder, images: Dataset, names: Sequence[str], templates: Sequence[str]
) -> ClassificationMetrics:
    """Classify images by captions made from class names (Radford et al., 2021, arXiv:2103.00020).

    Args:
        encoder: the model.
        images: with the columns `image` and `label`, as `load_labeled` returns them.
        names: the C class names.
        templates: captions with `{}` for the name; the embeddings of a class's captions are averaged.

    Raises:
        ImageError: an image cannot be read.
        ValueError: a name or a template is not allowed.
    """
    label_embeds = embed_labels(encoder, names, templates)
    image_embeds = encoder.encode_images(images["image"])
    similarity = image_embeds @ label_embeds.T  # (N, C)
    scale = encoder.logit_scale  # without one there are no probabilities
    confidence = None if scale is None else (scale * similarity).softmax(dim=1).amax(dim=1)
    return classification_metrics(similarity, torch.tensor(images["label"][:]), confidence=confidence)
