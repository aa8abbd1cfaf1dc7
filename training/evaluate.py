"""Full-split retrieval: every picture and every caption embedded once, ranks taken over all of them."""

import itertools

import torch
from datasets import Dataset
from torch import Tensor

from clipmini.inference.encode import encode_images, encode_texts
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor

from .features import CachedPairs
from .metrics import chance_metrics, retrieval_metrics

CACHED_CHUNK_SIZE = 8192  # rows of cached features projected at once


def embed_pairs(
    model: ClipMiniModel, processor: ClipMiniProcessor, pairs: Dataset | CachedPairs, batch_size: int = 16
) -> tuple[Tensor, Tensor]:
    """Embed all pictures and all captions of a pair data set.

    Args:
        model: in eval mode.
        processor: the model's processor.
        pairs: one row per image; cached features are projected, the rest goes through the towers.
        batch_size: pictures per forward; captions go eight times as many at once.

    Returns:
        (I, D) image and (T, D) caption embeddings, float32 on the CPU, each of length 1; captions in the order of the
        rows.
    """
    cached = pairs if isinstance(pairs, CachedPairs) else CachedPairs(pairs)
    rows, pooled_image, pooled_text = cached.pairs, cached.pooled_image, cached.pooled_text
    if pooled_image is None:
        image_embeds = encode_images(model, processor, rows["image"], batch_size)
    else:
        image_embeds = _project(model, pooled_image, "pooled_image")
    if pooled_text is None:
        captions = list(itertools.chain.from_iterable(rows["captions"]))
        text_embeds = encode_texts(model, processor, captions, 8 * batch_size)
    else:
        text_embeds = _project(model, pooled_text, "pooled_text")
    return image_embeds, text_embeds


def image_of_captions(pairs: Dataset | CachedPairs) -> Tensor:
    """Give the row of each caption's image: (T,) integers."""
    rows = pairs.pairs if isinstance(pairs, CachedPairs) else pairs
    counts = torch.tensor([len(captions) for captions in rows["captions"]])
    return torch.arange(len(counts)).repeat_interleave(counts)


def evaluate_retrieval(
    model: ClipMiniModel, processor: ClipMiniProcessor, pairs: Dataset | CachedPairs, batch_size: int = 16
) -> dict[str, float]:
    """Measure retrieval on a whole split with all captions of every image; see `retrieval_metrics`.

    Args:
        model: put in eval mode for the time of the measurement.
        processor: the model's processor.
        pairs: one row per image.
        batch_size: pictures per forward.

    Returns:
        `text_to_image_r1`, ..., `mean_recall`, in [0, 1].
    """
    was_training = model.training
    model.eval()
    try:
        image_embeds, text_embeds = embed_pairs(model, processor, pairs, batch_size)
    finally:
        model.train(was_training)
    return retrieval_metrics(image_embeds, text_embeds, image_of_captions(pairs))


def chance_level(pairs: Dataset | CachedPairs) -> dict[str, float]:
    """Give what a random order reaches on the same split, under the same keys."""
    return chance_metrics(len(pairs), image_of_captions(pairs))


@torch.no_grad()
def _project(model: ClipMiniModel, pooled: Tensor, name: str) -> Tensor:
    results = []
    for chunk in pooled.split(CACHED_CHUNK_SIZE):
        output = model(**{name: chunk.to(model.device)})
        embeds = output.image_embeds if name == "pooled_image" else output.text_embeds
        results.append(embeds.float().cpu())
    return torch.cat(results)
