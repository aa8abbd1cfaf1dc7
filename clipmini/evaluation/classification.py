"""Metrics of classification, as pure functions, and zero-shot classification of a split."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from clipmini.inference.encoders import DualEncoder, check_widths
from clipmini.inference.zero_shot import embed_labels

from .intervals import Interval, percentiles, resample_weights

NUM_BINS = 15  # of the calibration error, as Guo et al. have it
TOP_K = 5


@dataclass(frozen=True)
class ClassificationMetrics:
    """How well images were classified. Shares are in [0, 1], each with its 95 % bootstrap interval over images.

    Attributes:
        num_images: N.
        chance: what guessing reaches of `top1`: 1 / C.
        top1: share of images whose label has the best score.
        top5: share of images whose label is among the five best; None where there are no more than five classes.
        mean_per_class: accuracy averaged over the classes that have images, so that rare ones count as much.
        per_class: (C,) accuracy of each class; NaN of one without images.
        calibration_error: mean distance of confidence from accuracy over 15 equal bins of confidence, each weighed by
            its images (Guo et al., 2017, arXiv:1706.04599); None where confidence is not known.
        confusion: (C, C) images by their label (row) and what they were taken for (column).
    """

    num_images: int
    chance: float
    top1: Interval
    top5: Interval | None
    mean_per_class: Interval
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
        scores: (N, C), more is better.
        labels: (N,) integers from 0 to C - 1.
        confidence: (N,) the probability, in [0, 1], that the classifier gives to what it takes each image for.
        num_resamples: sets of images drawn for the intervals.
        seed: of the draws.

    Returns:
        The metrics.

    Raises:
        ValueError: there are no images, or scores and labels do not go together.
    """
    if scores.ndim != 2 or not len(scores) or len(scores) != len(labels):
        raise ValueError(
            f"Scores of shape {tuple(scores.shape)} and {len(labels)} labels do not go together; give (N, C) and N."
        )
    num_images, num_classes = scores.shape
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"Labels from {labels.min()} to {labels.max()} are not all among {num_classes} classes.")
    scores, labels = scores.float().cpu(), labels.long().cpu()
    own = scores.gather(1, labels[:, None])
    rank = (~(scores < own)).sum(dim=1) - 1  # the label ties with itself
    # What an image was taken for: its label, or the best of the others.
    others = scores.nan_to_num(nan=torch.inf).scatter(1, labels[:, None], -torch.inf)
    predicted = labels.where(rank == 0, others.argmax(dim=1)) if num_classes > 1 else labels
    confusion = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, -1)

    is_right = (rank == 0).numpy()
    is_near = (rank < TOP_K).numpy()
    drawn: dict[str, list[np.ndarray]] = {"top1": [], "top5": [], "mean_per_class": []}
    for weights in resample_weights(num_images, num_resamples, seed):
        drawn["top1"].append(weights @ is_right / num_images)
        drawn["top5"].append(weights @ is_near / num_images)
        drawn["mean_per_class"].append(np.nanmean(_per_class(is_right, labels.numpy(), num_classes, weights), axis=1))
    ends = {name: percentiles(np.concatenate(parts)) for name, parts in drawn.items()}
    (per_class,) = _per_class(is_right, labels.numpy(), num_classes, np.ones((1, num_images)))
    return ClassificationMetrics(
        num_images=num_images,
        chance=1 / num_classes,
        top1=Interval(float(is_right.mean()), *ends["top1"]),
        top5=Interval(float(is_near.mean()), *ends["top5"]) if num_classes > TOP_K else None,
        mean_per_class=Interval(float(np.nanmean(per_class)), *ends["mean_per_class"]),
        per_class=per_class,
        calibration_error=None if confidence is None else _calibration_error(confidence, is_right),
        confusion=confusion.numpy(),
    )


def _per_class(is_right: np.ndarray, labels: np.ndarray, num_classes: int, weights: np.ndarray) -> np.ndarray:
    """Give the accuracy of each class under each row of (R, N) weights: (R, C), NaN where a class has no image."""
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    weights = weights[:, order]
    right, total = (np.add.reduceat(values, starts, axis=1) for values in (weights * is_right[order], weights))
    accuracy = np.full((len(weights), num_classes), np.nan)
    accuracy[:, present] = np.divide(right, total, out=np.full(total.shape, np.nan), where=total > 0)
    return accuracy


def _calibration_error(confidence: Tensor, is_right: np.ndarray) -> float:
    given = confidence.double().cpu().numpy()
    if not np.isfinite(given).all():
        return float("nan")
    bins = np.minimum((given * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins, weights=given - is_right, minlength=NUM_BINS)  # of each bin, times its images
    return float(np.abs(gaps).sum() / len(given))


@dataclass(frozen=True)
class ZeroShotResult:
    """A model's zero-shot classification of a split.

    Attributes:
        metrics: how well it did.
        is_right: (N,) which images were classified rightly, to be compared with another model's.
    """

    metrics: ClassificationMetrics
    is_right: Tensor


def measure_zero_shot(
    encoder: DualEncoder, images: Dataset, names: Sequence[str], templates: Sequence[str], batch_size: int = 16
) -> ZeroShotResult:
    """Classify images by the captions made of class names.

    Args:
        encoder: the model.
        images: with the columns `image` and `label`, as `load_labeled` gives.
        names: what labels are called.
        templates: captions with `{}` in place of the name, whose embeddings are averaged.
        batch_size: images per forward.

    Returns:
        The result.

    Raises:
        ImageError: an image cannot be read.
        ValueError: a name or a template is not allowed.
    """
    label_embeds = embed_labels(encoder.encode_texts, names, templates)
    image_embeds = encoder.encode_images(images["image"], batch_size)
    check_widths(encoder, image_embeds, label_embeds)
    similarity = image_embeds @ label_embeds.T  # (N, C)
    labels = torch.tensor(images["label"][:])
    scale = encoder.logit_scale  # without one there are no probabilities
    confidence = None if scale is None else (scale * similarity).softmax(dim=1).amax(dim=1)
    own = similarity.gather(1, labels[:, None])
    is_right = (~(similarity < own)).sum(dim=1) == 1
    return ZeroShotResult(classification_metrics(similarity, labels, confidence=confidence), is_right)
