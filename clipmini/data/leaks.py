"""Images and captions of an evaluation split that training has seen.

Exact copies are found by their decoded pixels, and images saved anew, resized or slightly changed by a perceptual
hash (phash: the signs of the lowest frequencies; Zauner, 2010, Implementation and Benchmarking of Perceptual Image
Hash Functions). It errs on both sides: two dark or empty images may share a hash, and a crop has another.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import imagehash
import numpy as np
from datasets import Dataset, Features, Value

from modeling_clipmini.images_clipmini import read_named

from .duplicates import hash_image, normalize_caption

MAX_BITS = 4  # of 64 in which the hashes of alike images may differ
MAX_EXAMPLES = 20  # of images that look like one of training, to be judged by eye
MAX_DIFFERENCES = 20_000_000  # in memory at once


@dataclass(frozen=True)
class LeakReport:
    """What of an evaluation split also stands in training data. All numbers are rows of the evaluation split.

    Attributes:
        num_train_images: training images that were looked at.
        exact: images whose very pixels are among the training images'.
        alike: other images that a perceptual hash tells hardly from a training image; see `MAX_BITS`.
        examples: of the alike ones, which training row each is like, closest first.
        captions: places, among all captions of the split, of those that also describe a training image, in the same
            words.
    """

    num_train_images: int
    exact: list[int]
    alike: list[int]
    examples: list[tuple[int, int]]
    captions: list[int]

    @property
    def rows(self) -> list[int]:
        """Images that training has seen, in either way."""
        return sorted({*self.exact, *self.alike})

    def summary(self) -> str:
        """Say in plain words how many images were found."""
        return (
            f"{len(self.exact):,} of these images are among {self.num_train_images:,} training images, pixel by "
            f"pixel; {len(self.alike):,} more look nearly like one (perceptual hash; some may be chance)."
        )

    def as_dict(self) -> dict[str, Any]:
        """Give counts, rows, and the first few that look like a training image, with the row of that."""
        return {
            "num_train_images": self.num_train_images,
            "exact_images": len(self.exact),
            "alike_images": len(self.alike),
            "captions": len(self.captions),
            "rows": self.rows,
            "alike_examples": self.examples[:MAX_EXAMPLES],
        }


def find_leaks(train: Dataset, held_out: Dataset) -> LeakReport:
    """Compare an evaluation split with the training data; every image is read once.

    Args:
        train: one row per image, as `load_pairs` gives; or images alone, in the column `image`.
        held_out: likewise.

    Returns:
        What stands in both.

    Raises:
        ImageError: an image cannot be read; the message names it.
    """
    seen, looks = _hash(train, "training")
    pixels, own_looks = _hash(held_out, "evaluation")
    seen_pixels = set(seen)
    exact = [row for row, digest in enumerate(pixels) if digest in seen_pixels]
    closest, bits = _closest(own_looks, looks)
    alike = sorted(set(np.flatnonzero(bits <= MAX_BITS).tolist()) - set(exact))
    examples = [(row, int(closest[row])) for row in sorted(alike, key=lambda row: bits[row])]
    known = set(map(normalize_caption, _captions(train))) - {""}
    return LeakReport(
        num_train_images=len(train),
        exact=exact,
        alike=alike,
        examples=examples,
        captions=[place for place, caption in enumerate(_captions(held_out)) if normalize_caption(caption) in known],
    )


def _captions(pairs: Dataset) -> Iterator[str]:
    return itertools.chain.from_iterable(pairs["captions"] if "captions" in pairs.column_names else ())


def _hash(pairs: Dataset, name: str) -> tuple[list[str], np.ndarray]:
    """Give a digest of each image's pixels, and (N,) its perceptual hash as a whole number of 64 bits."""
    if not len(pairs):
        return [], np.empty(0, dtype=np.uint64)
    columns = [column for column in ("image", "image_id") if column in pairs.column_names]
    hashed = pairs.select_columns(columns).map(
        _hash_row,
        with_indices=True,
        remove_columns=columns,
        features=Features({"pixels": Value("string"), "looks": Value("string")}),
        keep_in_memory=True,
        # `datasets` would serve what it once computed from files that have changed since.
        load_from_cache_file=False,
        new_fingerprint=os.urandom(8).hex(),
        desc=f"looking for leaks: {name}",
    )
    return hashed["pixels"][:], np.array([int(digits, 16) for digits in hashed["looks"]], dtype=np.uint64)


def _hash_row(row: dict[str, Any], number: int) -> dict[str, Any]:
    image = read_named(row["image"], f"image_id {row['image_id']}" if "image_id" in row else f"row {number + 1}")
    return {"pixels": hash_image(image), "looks": str(imagehash.phash(image))}


def _closest(hashes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find for each hash the closest of `others`, and in how many bits they differ: 65 where there is none."""
    closest, bits = np.zeros(len(hashes), dtype=int), np.full(len(hashes), 65)
    if not len(others):
        return closest, bits
    at_once = max(1, MAX_DIFFERENCES // len(others))
    for start in range(0, len(hashes), at_once):
        rows = slice(start, start + at_once)
        differences = np.bitwise_count(hashes[rows, None] ^ others[None, :])
        closest[rows] = differences.argmin(axis=1)
        bits[rows] = differences.min(axis=1)
    return closest, bits
