"""Find images and captions of an evaluation split that training has seen.

Exact copies are found by their decoded pixels. Images that were re-encoded, resized or slightly changed are found by
a perceptual hash (pHash: the signs of the lowest frequencies; Zauner, 2010, Implementation and Benchmarking of
Perceptual Image Hash Functions). It errs both ways: two dark or empty images may share a hash, and a crop has a
different one.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from clipmini.store import as_scalars

from .duplicates import normalize_captions
from .scan import HASH_BITS, read_columns, scan_readable

MAX_BITS = 4  # in which the perceptual hashes of near-duplicates may differ
MAX_EXAMPLES = 20  # near-duplicates to list, to be judged by eye


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
    exact = np.flatnonzero(np.isin(as_scalars(facts.pixels), as_scalars(train_facts.pixels)))
    distances, nearest = _find_alike(facts.perceptual_hashes, train_facts.perceptual_hashes)
    distances[exact] = HASH_BITS
    near = [row for row in np.argsort(distances, kind="stable") if distances[row] <= MAX_BITS]
    captions, known = _captions(held_out), _captions(train)
    is_known = pc.and_(pc.is_in(captions, known), pc.not_equal(captions, ""))
    return LeakReport(
        num_train_images=len(train),
        exact=exact.tolist(),
        near_duplicates=[(int(row), int(nearest[row])) for row in near],
        captions=np.flatnonzero(is_known).tolist(),
    )


def _find_alike(hashes: np.ndarray, train_hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest training hash of each hash, where it differs in at most `MAX_BITS` bits.

    Hashes are cut into one piece more than bits may differ, so that one piece at least is equal: only training hashes
    with an equal piece are compared, which at random are one in thousands, and none is missed.

    Returns:
        (N,) distances in bits, some larger number where there is none; and (N,) rows, of equally near ones the first.
    """
    codes, train_codes = (np.packbits(bits, axis=1).view(np.uint64)[:, 0] for bits in (hashes, train_hashes))
    distances, nearest = np.full(len(codes), HASH_BITS), np.zeros(len(codes), dtype=np.int64)
    for piece in np.array_split(np.arange(HASH_BITS, dtype=np.uint64), MAX_BITS + 1):
        mask = np.bitwise_or.reduce(np.uint64(1) << piece)
        order = np.argsort(train_codes & mask, kind="stable")
        candidates = train_codes[order]
        first, end = (np.searchsorted(candidates & mask, codes & mask, side) for side in ("left", "right"))
        for row in np.flatnonzero(first < end):
            bits = np.bitwise_count(candidates[first[row] : end[row]] ^ codes[row])
            closest = bits.argmin()
            found = bits[closest], order[first[row] + closest]
            if found < (distances[row], nearest[row]):
                distances[row], nearest[row] = found
    return distances, nearest


def _captions(pairs: Dataset) -> pa.ChunkedArray:
    """Return all captions of a split, normalized; none if it has only images."""
    if "captions" not in pairs.column_names:
        return pa.chunked_array([], pa.large_string())
    return normalize_captions(read_columns(pairs, "captions")["captions"])
