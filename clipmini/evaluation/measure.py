"""Full-split retrieval: every picture and every caption embedded once, ranks taken over all of them."""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from clipmini.data.pairs import CachedPairs
from clipmini.inference.encode import encode_images, encode_texts
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.encoding_clipmini import eval_mode
from modeling_clipmini.modeling_clipmini import normalise

from .intervals import Interval, bootstrap_intervals
from .metrics import QueryScores, chance_metrics, retrieval_scores, summarise_scores

CACHED_CHUNK_SIZE = 8192  # rows of cached features projected at once


def embed_pairs(
    model: ClipMiniModel, processor: ClipMiniProcessor, pairs: Dataset | CachedPairs, batch_size: int = 16
) -> tuple[Tensor, Tensor]:
    """Embed all pictures and all captions of a pair data set.

    Args:
        model: in eval mode.
        processor: the model's processor.
        pairs: one row per image; of cached features the first view is taken.
        batch_size: pictures per forward; captions go eight times as many at once.

    Returns:
        (I, D) image and (T, D) caption embeddings, float32 on the CPU, each of length 1; captions in the order of the
        rows.
    """
    cached = _cached(pairs)
    if cached.image_features is None:
        image_embeds = encode_images(model, processor, cached.rows["image"], batch_size)
    elif cached.front is None:
        image_embeds = _embed_features(model, cached.image_features[:, 0], "pooled_image", CACHED_CHUNK_SIZE)
    else:
        with cached.front.resuming():
            image_embeds = _embed_features(model, cached.image_features[:, 0], "pixel_values", batch_size)
    if cached.text_features is None:
        text_embeds = encode_texts(model, processor, cached.captions, 8 * batch_size)
    else:
        text_embeds = _embed_features(model, cached.text_features, "pooled_text", CACHED_CHUNK_SIZE)
    return image_embeds, text_embeds


def evaluate_retrieval(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    pairs: Dataset | CachedPairs,
    batch_size: int = 16,
    widths: Sequence[int] = (),
) -> dict[str, float]:
    """Measure retrieval on a whole split with all captions of every image; see `retrieval_metrics`.

    Args:
        model: put in eval mode for the time of the measurement.
        processor: the model's processor.
        pairs: one row per image.
        batch_size: pictures per forward.
        widths: measure embeddings cut off at these widths as well.

    Returns:
        `text_to_image_r1`, ..., `mean_recall`, in [0, 1]; and for each width the same with `_at_{width}` behind.
    """
    scored = _score_split(model, processor, pairs, batch_size, widths)
    return {
        f"{name}{suffix}": value
        for suffix, scores in scored.items()
        for name, value in summarise_scores(scores).items()
    }


def evaluate_with_intervals(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    pairs: Dataset | CachedPairs,
    batch_size: int = 16,
    widths: Sequence[int] = (),
) -> dict[str, Interval]:
    """Measure as `evaluate_retrieval` does, and give each metric with its 95 % bootstrap interval over pictures."""
    scored = _score_split(model, processor, pairs, batch_size, widths)
    return {
        f"{name}{suffix}": interval
        for suffix, scores in scored.items()
        for name, interval in bootstrap_intervals(scores).items()
    }


def _score_split(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    pairs: Dataset | CachedPairs,
    batch_size: int,
    widths: Sequence[int],
) -> dict[str, dict[str, QueryScores]]:
    """Score the queries of a split: of whole embeddings under "", of cut-off ones under "_at_{width}"."""
    with eval_mode(model):
        image_embeds, text_embeds = embed_pairs(model, processor, pairs, batch_size)
    ids = _ids(pairs)
    scored = {"": retrieval_scores(image_embeds, text_embeds, *ids)}
    for width in widths:
        image, text = (normalise(embeds[:, :width]) for embeds in (image_embeds, text_embeds))
        scored[f"_at_{width}"] = retrieval_scores(image, text, *ids)
    return scored


def chance_level(pairs: Dataset | CachedPairs) -> dict[str, float]:
    """Give what a random order reaches on the same split, under the same keys."""
    return chance_metrics(*_ids(pairs))


def _ids(pairs: Dataset | CachedPairs) -> tuple[Tensor, Tensor]:
    """Give the image ids of all captions and of all rows; copies of a picture may share theirs."""
    cached = _cached(pairs)
    image_ids = torch.tensor(cached.image_ids)
    return image_ids[cached.image_of_captions()], image_ids


def _cached(pairs: Dataset | CachedPairs) -> CachedPairs:
    return pairs if isinstance(pairs, CachedPairs) else CachedPairs(pairs)


@torch.no_grad()
def _embed_features(model: ClipMiniModel, features: np.ndarray, name: str, batch_size: int) -> Tensor:
    """Pass cached features through what remains of their tower."""
    results = []
    for start in range(0, len(features), batch_size):
        batch = torch.tensor(features[start : start + batch_size], dtype=torch.float32, device=model.device)
        if batch.ndim == 4:
            batch = batch.contiguous(memory_format=torch.channels_last)
        output = model(**{name: batch})
        embeds = output.text_embeds if name == "pooled_text" else output.image_embeds
        results.append(embeds.float().cpu())
    return torch.cat(results)
