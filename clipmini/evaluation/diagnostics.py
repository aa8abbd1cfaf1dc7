"""The shape of the shared space, and smaller embeddings: truncated, or rounded to fewer bits.

Shape letters: I images, T captions, N vectors, G image ids, D the width of the shared space.
"""

import math
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from modeling_clipmini.modeling_clipmini import normalize

PRECISIONS = {"float32": 32, "int8": 8, "binary": 1}  # bits per dimension
MAX_VECTORS = 10_000  # uniformity compares all pairs of vectors; of more vectors, this many are sampled
BLOCK = 1024  # rows of the matrix of all pairs in memory at once
COLLAPSE_COSINE = 0.99  # a mean cosine of different vectors above this is a collapse
COLLAPSE_RANK = 2.0  # and so is an effective rank below this
MIN_VECTORS, MIN_WIDTH = 10, 4  # fewer vectors or dimensions cannot show a collapse
LEVEL = 0.975  # of the one-sided test that captions are closer to their own image than to all images


def truncate(embeds: Tensor, width: int) -> Tensor:
    """Keep the first dimensions (Matryoshka embeddings; Kusupati et al., 2022, arXiv:2205.13147).

    Returns:
        (N, width), each of length 1.
    """
    return normalize(embeds[:, :width])


def quantize(embeds: Tensor, precision: str) -> Tensor:
    """Round embeddings as a compact search index does, to vectors that dot products compare.

    Args:
        embeds: (N, D), of length 1.
        precision: "float32", unchanged; "int8", 255 steps of one size for all embeddings, so that dot products of
            integers suffice; or "binary", the sign of each dimension, so that counting equal bits suffices.

    Returns:
        (N, D) float32: unchanged; integers from -127 to 127; or -1 and 1.

    Raises:
        ValueError: the precision is not in `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not allowed; use one of {', '.join(PRECISIONS)}.")
    if precision == "int8":
        step = embeds.abs().max() / 127
        return (embeds / step).round()
    if precision == "binary":
        return (embeds > 0).float() * 2 - 1
    return embeds


@dataclass(frozen=True)
class Diagnostics:
    """The shape of a shared space. A figure is NaN where there are too few vectors to compute it.

    Attributes:
        modality_gap: distance of the mean image from the mean caption, in [0, 2] (Liang et al., 2022,
            arXiv:2203.02053).
        alignment: mean squared distance of a caption from its image, in [0, 4]; lower is better (Wang and
            Isola, 2020, arXiv:2005.10242).
        image_uniformity: logarithm of the mean of exp(-2 d^2) over pairs of images at distance d, in [-8, 0]; lower
            is more evenly spread (Wang and Isola, 2020).
        text_uniformity: the same for captions.
        image_effective_rank: number of dimensions that images use, from 1 to D: exp of the entropy of the singular
            values around their mean (Roy and Vetterli, 2007, The effective rank).
        text_effective_rank: the same for captions.
        own_similarity: mean cosine of a caption and its own image.
        other_similarity: mean cosine of a caption and another image.
        temperature: divisor of similarities before the softmax; None where the model has none.
        faults: what is wrong with the model, in plain words.
    """

    modality_gap: float
    alignment: float
    image_uniformity: float
    text_uniformity: float
    image_effective_rank: float
    text_effective_rank: float
    own_similarity: float
    other_similarity: float
    temperature: float | None
    faults: tuple[str, ...]


def diagnose(
    image_embeds: Tensor,
    text_embeds: Tensor,
    text_image_ids: Tensor,
    image_ids: Tensor | None = None,
    temperature: float | None = None,
) -> Diagnostics:
    """Measure the shape of a shared space, and detect a collapse.

    Args:
        image_embeds: (I, D), of length 1.
        text_embeds: (T, D), of length 1.
        text_image_ids: (T,) integers, the id of the image that each caption describes.
        image_ids: (I,) integers; by default 0 to I - 1.
        temperature: the model's.
    """
    images, texts = image_embeds.cpu().double(), text_embeds.cpu().double()
    image_ids = torch.arange(len(images)) if image_ids is None else image_ids.cpu()
    matching, other, margins = _closeness(images, texts, image_ids, text_image_ids.cpu())
    ranks = effective_rank(images), effective_rank(texts)
    return Diagnostics(
        modality_gap=(images.mean(dim=0) - texts.mean(dim=0)).norm().item(),
        alignment=2 - 2 * matching,  # of vectors of length 1
        image_uniformity=uniformity(images),
        text_uniformity=uniformity(texts),
        image_effective_rank=ranks[0],
        text_effective_rank=ranks[1],
        own_similarity=matching,
        other_similarity=other,
        temperature=temperature,
        faults=tuple(_faults(images, texts, ranks, margins)),
    )


def uniformity(embeds: Tensor) -> float:
    """Return the logarithm of the mean of exp(-2 d^2) over all pairs of different rows at distance d.

    Args:
        embeds: (N, D), of length 1; of more than `MAX_VECTORS` rows, so many are sampled, always the same.

    Returns:
        In [-8, 0]; NaN for fewer than two rows.
    """
    if len(embeds) > MAX_VECTORS:
        embeds = embeds[torch.randperm(len(embeds), generator=torch.Generator().manual_seed(0))[:MAX_VECTORS]]
    num_rows = len(embeds)
    if num_rows < 2:
        return math.nan
    total = sum(
        (4 * (embeds[start : start + BLOCK] @ embeds.T) - 4).exp().sum().item()  # d^2 = 2 - 2 cos
        for start in range(0, num_rows, BLOCK)
    )
    itself = (4 * embeds.square().sum(dim=1) - 4).exp().sum().item()
    return math.log((total - itself) / (num_rows * (num_rows - 1)))


def effective_rank(embeds: Tensor) -> float:
    """Return exp of the entropy of the singular values around the mean: the number of dimensions in which rows vary.

    Of (N, D) embeddings it is from 1 to D; 1 if all rows are equal, NaN if a value is not finite.
    """
    if not embeds.isfinite().all():
        return math.nan
    centered = embeds.double() - embeds.double().mean(dim=0)
    # The singular values are the roots of this matrix's eigenvalues; it is small however many rows there are.
    singular = torch.linalg.eigvalsh(centered.T @ centered).clamp(min=0).sqrt()
    if singular.max() < 1e-6 * math.sqrt(len(embeds)):
        return 1.0
    shares = singular / singular.sum()
    return torch.special.entr(shares).sum().exp().item()


def _closeness(
    images: Tensor, texts: Tensor, image_ids: Tensor, text_image_ids: Tensor
) -> tuple[float, float, Tensor]:
    """Return the mean cosines of matching and other pairs, and (G,) how much closer captions are to their images."""
    ids, index = torch.cat([image_ids, text_image_ids]).unique(return_inverse=True)
    image_index, text_index = index.split([len(images), len(texts)])
    image_sums, text_sums = (
        torch.zeros(len(ids), images.shape[1], dtype=torch.double).index_add_(0, rows, embeds)
        for rows, embeds in ((image_index, images), (text_index, texts))
    )
    num_images, num_texts = image_index.bincount(minlength=len(ids)), text_index.bincount(minlength=len(ids))
    matching_sums = (image_sums * text_sums).sum(dim=1)  # (G,) over the pairs of an id
    num_matching = num_images * num_texts
    all_sum = (image_sums.sum(dim=0) @ text_sums.sum(dim=0)).item()
    is_pair = num_matching > 0
    matching = matching_sums[is_pair].sum().item() / num_matching.sum().item() if is_pair.any() else math.nan
    num_others = len(images) * len(texts) - num_matching.sum().item()
    other = (all_sum - matching_sums[is_pair].sum().item()) / num_others if num_others else math.nan
    # The captions of an image are not independent, so each id counts once.
    to_all = text_sums @ images.mean(dim=0) / num_texts
    margins = (matching_sums / num_matching - to_all)[is_pair]
    return matching, other, margins


def _faults(images: Tensor, texts: Tensor, ranks: tuple[float, float], margins: Tensor) -> list[str]:
    if not (images.isfinite().all() and texts.isfinite().all()):
        return ["Embeddings hold NaN or infinity: training diverged, or the weights are damaged."]
    faults = []
    for kind, embeds, rank in (("images", images, ranks[0]), ("captions", texts, ranks[1])):
        count = len(embeds)
        if count < MIN_VECTORS:
            continue  # a few vectors may be close together, or on a line, by chance
        cosine = ((embeds.sum(dim=0).square().sum() - embeds.square().sum()) / (count * (count - 1))).item()
        if cosine > COLLAPSE_COSINE:
            faults.append(f"Collapsed: all {kind} have nearly the same embedding (mean cosine {cosine:.3f}).")
        elif rank < COLLAPSE_RANK and embeds.shape[1] >= MIN_WIDTH:
            faults.append(f"Collapsed: {kind} differ in little more than one dimension (effective rank {rank:.1f}).")
    num_ids = len(margins)
    if not faults and num_ids > 1:
        error = margins.std().item() / math.sqrt(num_ids)
        if not margins.mean().item() > stdtrit(num_ids - 1, LEVEL) * error:
            faults.append(
                "Captions are not significantly closer to their own image than to others: the model has not learned, "
                "does not fit this data, or there are too few images to tell."
            )
    return faults
