"""Find images and captions of an evaluation split that training has seen.

Exact copies are found by their decoded pixels. Images that were re-encoded, resized or slightly changed are found by
a perceptual hash (pHash: the signs of the lowest frequencies; Zauner, 2010, Implementation and Benchmarking of
Perceptual Image Hash Functions). It errs both ways: two dark or empty images may share a hash, and a crop has a
different one.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import sklearn
from datasets import Dataset
from sklearn.metrics import pairwise_distances_argmin_min

from .duplicates import normalize_caption
from .scan import HASH_BITS, scan_readable

MAX_BITS = 4  # in which the perceptual hashes of near-duplicates may differ
MAX_EXAMPLES = 20  # near-duplicates to list, to be judged by eye
MEMORY_MIB = 128  # for distances between hashes


@dataclass(frozen=True)
class LeakReport:
    """What an evaluation split shares with the training data. All indices are of the evaluation split.

    Attributes:
        num_train_images: how many training images were compared.
        exact: rows of images whose pixels equal those of a training image.
        near_duplicates: (row, training row) of other images whose perceptual hash is within `MAX_BITS` of a training
            image's, closest first.
        captions: indices, among all captions, of those that describe a training image in the same words.
    """

    num_train_images: int
    exact: list[int]
    near_duplicates: list[tuple[int, int]]
    captions: list[int]

    @property
    def rows(self) -> list[int]:
        """Return the rows of all images that training has seen, as exact copies or near-duplicates."""
        return sorted({*self.exact, *(row for row, _ in self.near_duplicates)})

    def summary(self) -> str:
        """Describe in plain words how many images were found."""
        return (
            f"{len(self.exact):,} of these images are among {self.num_train_images:,} training images, pixel by "
            f"pixel; {len(self.near_duplicates):,} more look nearly like one (perceptual hash; some may be chance)."
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, the rows, and the closest near-duplicates, for `results.json`."""
        return {
            "num_train_images": self.num_train_images,
            "exact_images": len(self.exact),
            "alike_images": len(self.near_duplicates),
            "captions": len(self.captions),
            "rows": self.rows,
            "alike_examples": self.near_duplicates[:MAX_EXAMPLES],
        }


def find_leaks(train: Dataset, held_out: Dataset) -> LeakReport:
    """Compare an evaluation split with the training data.

    Args:
        train: one row per image, as returned by `load_pairs`; or only images, in the column `image`.
        held_out: likewise.

    Raises:
        ImageError: an image cannot be read; the message names it.
    """
    train_facts, facts = scan_readable(train), scan_readable(held_out)
    seen = {pixels.tobytes() for pixels in train_facts.pixels}
    exact = [row for row, pixels in enumerate(facts.pixels) if pixels.tobytes() in seen]
    near_duplicates: list[tuple[int, int]] = []
    if len(train) and len(held_out):
        with sklearn.config_context(working_memory=MEMORY_MIB):
            nearest, distances = pairwise_distances_argmin_min(
                facts.perceptual_hashes, train_facts.perceptual_hashes, metric="hamming"
            )
        distances[exact] = 1
        near = [row for row in np.argsort(distances, kind="stable") if distances[row] <= MAX_BITS / HASH_BITS]
        near_duplicates = [(int(row), int(nearest[row])) for row in near]
    known = set(map(normalize_caption, _captions(train))) - {""}
    return LeakReport(
        num_train_images=len(train),
        exact=exact,
        near_duplicates=near_duplicates,
        captions=[index for index, caption in enumerate(_captions(held_out)) if normalize_caption(caption) in known],
    )


def _captions(pairs: Dataset) -> Iterator[str]:
    return itertools.chain.from_iterable(pairs["captions"] if "captions" in pairs.column_names else ())
