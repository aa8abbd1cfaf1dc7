"""Retrieval metrics as pure functions of embeddings.

Shape letters: I images, T captions, D the width of the shared space.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
METRIC_NAMES = (
    *(f"{direction}_r{k}" for direction in ("text_to_image", "image_to_text") for k in RECALL_AT),
    "mean_recall",
)
CHUNK_SIZE = 1024  # rows of the similarity matrix alive at once


def retrieval_ranks(image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor) -> tuple[Tensor, Tensor]:
    """Rank the right answer of every query, 0 being first place.

    A caption's right answer is its one image; an image's is the best placed of its captions, and its other captions do
    not stand in the way. Ties count against the model, and so does NaN: neither a collapsed model, which gives every
    pair the same similarity, nor a diverged one must look perfect. The similarity matrix is never built whole.

    Args:
        image_embeds: (I, D), of length 1.
        text_embeds: (T, D), of length 1.
        image_of_text: (T,) integers, the row of each caption's image.

    Returns:
        (T,) ranks of images for each caption; (I,) ranks of captions for each image, -1 for an image without captions.
    """
    text_ranks = torch.empty(len(text_embeds), dtype=torch.long)
    for start in range(0, len(text_embeds), CHUNK_SIZE):
        rows = slice(start, start + CHUNK_SIZE)
        similarity = _similarity(text_embeds[rows], image_embeds)  # (chunk, I)
        right = similarity.gather(1, image_of_text[rows, None])
        text_ranks[rows] = (~(similarity < right)).sum(dim=1) - 1  # the right image ties with itself

    image_ranks = torch.full((len(image_embeds),), -1)
    for start in range(0, len(image_embeds), CHUNK_SIZE):
        rows = slice(start, start + CHUNK_SIZE)
        similarity = _similarity(image_embeds[rows], text_embeds)  # (chunk, T)
        images = torch.arange(start, start + len(similarity))
        is_own = images[:, None] == image_of_text[None, :]
        best_own = similarity.masked_fill(~is_own, -torch.inf).amax(dim=1, keepdim=True)
        ranks = (~(similarity < best_own) & ~is_own).sum(dim=1)
        image_ranks[rows] = ranks.where(is_own.any(dim=1), -1)
    return text_ranks, image_ranks


def _similarity(queries: Tensor, answers: Tensor) -> Tensor:
    """Cosine similarities in float32; rounded to bf16, as under autocast, many would tie."""
    with torch.autocast(queries.device.type, enabled=False):
        return queries.float() @ answers.float().T


def retrieval_metrics(
    image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor, recall_at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """Recall at k in both directions, over the whole set.

    Args:
        image_embeds: (I, D), of length 1.
        text_embeds: (T, D), of length 1.
        image_of_text: (T,) integers, the row of each caption's image.
        recall_at: the values of k.

    Returns:
        `text_to_image_r{k}`, `image_to_text_r{k}`: share of queries, in [0, 1], whose right answer is among the first
        k (an image counts if any of its captions is). `mean_recall`: the mean of them all.
    """
    text_ranks, image_ranks = retrieval_ranks(image_embeds, text_embeds, image_of_text)
    image_ranks = image_ranks[image_ranks >= 0]  # an image without captions is a distractor, not a query
    metrics = {
        f"{direction}_r{k}": (ranks < k).float().mean().item()
        for direction, ranks in (("text_to_image", text_ranks), ("image_to_text", image_ranks))
        for k in recall_at
    }
    return {**metrics, "mean_recall": sum(metrics.values()) / len(metrics)}


def chance_metrics(num_images: int, image_of_text: Tensor, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Give what a random order reaches on the same set, under the same keys as `retrieval_metrics`.

    From text to image it is k / I. An image with c of the T captions misses all of them in k draws without
    replacement with probability C(T - c, k) / C(T, k).

    Args:
        num_images: I.
        image_of_text: (T,) integers, the row of each caption's image.
        recall_at: the values of k.

    Returns:
        The expected recalls, in [0, 1].
    """
    num_texts = len(image_of_text)
    captions_per_image = torch.bincount(image_of_text, minlength=num_images).double()
    captions_per_image = captions_per_image[captions_per_image > 0]
    metrics = {f"text_to_image_r{k}": min(1.0, k / num_images) for k in recall_at}
    for k in recall_at:
        drawn = torch.arange(min(k, num_texts))
        miss = ((num_texts - captions_per_image[:, None] - drawn) / (num_texts - drawn)).clamp(min=0).prod(dim=1)
        metrics[f"image_to_text_r{k}"] = (1 - miss).mean().item()
    return {**metrics, "mean_recall": sum(metrics.values()) / len(metrics)}
