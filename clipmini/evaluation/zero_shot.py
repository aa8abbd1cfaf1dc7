"""Zero-shot classification of a split: labels that are only named, never trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor

from clipmini.inference.encoders import DualEncoder, check_widths
from clipmini.inference.zero_shot import embed_labels

from .classification import ClassificationMetrics, classification_metrics


@dataclass(frozen=True)
class ZeroShotResult:
    """A model's zero-shot classification of a split.

    Attributes:
        metrics: how well it did.
        is_right: (N,) which pictures were classified rightly, to be compared with another model's.
    """

    metrics: ClassificationMetrics
    is_right: Tensor


def measure_zero_shot(
    encoder: DualEncoder, pictures: Dataset, names: Sequence[str], templates: Sequence[str], batch_size: int = 16
) -> ZeroShotResult:
    """Classify pictures by the captions made of class names.

    Args:
        encoder: the model.
        pictures: with the columns `image` and `label`, as `load_labelled` gives.
        names: what labels are called.
        templates: captions with `{}` in place of the name, whose embeddings are averaged.
        batch_size: pictures per forward.

    Returns:
        The result.

    Raises:
        ImageError: a picture cannot be read.
        ValueError: a name or a template is not allowed.
    """
    label_embeds = embed_labels(encoder.encode_texts, names, templates)
    image_embeds = encoder.encode_images(pictures["image"], batch_size)
    check_widths(encoder, image_embeds, label_embeds)
    similarity = image_embeds @ label_embeds.T  # (N, C)
    labels = torch.tensor(pictures["label"][:])
    scale = encoder.logit_scale  # without one there are no probabilities
    confidence = None if scale is None else (scale * similarity).softmax(dim=1).amax(dim=1)
    own = similarity.gather(1, labels[:, None])
    is_right = (~(similarity < own)).sum(dim=1) == 1
    return ZeroShotResult(classification_metrics(similarity, labels, confidence=confidence), is_right)
