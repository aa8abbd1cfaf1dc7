"""Smaller embeddings: cut off, or with fewer bits a number; to see what is lost."""

from torch import Tensor

from modeling_clipmini.modeling_clipmini import normalise

PRECISIONS = {"float32": 32, "int8": 8, "binary": 1}  # bits of a number


def cut_off(embeds: Tensor, width: int) -> Tensor:
    """Keep the first dimensions (Matryoshka embeddings; Kusupati et al., 2022, arXiv:2205.13147).

    Args:
        embeds: (N, D).
        width: how many to keep, at most D.

    Returns:
        (N, width), each of length 1.
    """
    return normalise(embeds[:, :width])


def quantise(embeds: Tensor, precision: str) -> Tensor:
    """Round embeddings as a search index with less memory does, and give what it compares.

    Args:
        embeds: (N, D), of length 1.
        precision: "float32"; "int8", 255 steps of one size for all, so that dot products of whole numbers do; or
            "binary", the sign of each number, so that bits that agree are counted.

    Returns:
        (N, D) float32, to be compared by dot products: unchanged; whole numbers from -127 to 127; or -1 and 1.

    Raises:
        ValueError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not allowed; use one of {', '.join(PRECISIONS)}.")
    if precision == "int8":
        step = embeds.abs().max() / 127
        return (embeds / step).round()
    if precision == "binary":
        return (embeds > 0).float() * 2 - 1
    return embeds
