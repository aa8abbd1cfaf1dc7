"""Find images and captions that occur under more than one image id.

A copy of an image in the same batch is a negative of itself: the loss then pushes a caption away from the image it
describes. Even with every image twice in the training data this cost nothing that could be measured (see
benchmarks/README.md). A copy in the test split inflates its metrics.
"""

import functools
import itertools
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict

from clipmini.store import as_scalars

from .scan import read_columns, scan_readable

MAX_EXAMPLES = 5  # groups in `as_dict`, and ids of each: a gray placeholder can have thousands


@dataclass(frozen=True)
class DuplicateReport:
    """The result of `find_duplicates`. Groups are sorted lists of at least two image ids, and are sorted themselves.

    Attributes:
        num_images: number of image ids.
        images: groups of ids with the same image, over all splits.
        within: by split, the number of groups with several ids in that split.
        across: by pair of splits, the number of groups with ids in both.
        captions: by normalized caption, the ids that share it, unless all of them have the same image.
    """

    num_images: int
    images: list[list[int]]
    within: dict[str, int]
    across: dict[tuple[str, str], int]
    captions: dict[str, list[int]]

    def summary(self) -> str:
        """Return two sentences that count the duplicates, for the log."""
        leaks = [f"; {count:,} in both {one} and {other}" for (one, other), count in self.across.items()]
        warning = ", where copies inflate the metrics" if leaks else ""
        return (
            f"Images under more than one image id: {len(self.images):,} "
            f"({_num_ids(self.images):,} of {self.num_images:,} ids{''.join(leaks)}{warning}). "
            f"Captions of different images: {len(self.captions):,} ({_num_ids(self.captions.values()):,} ids)."
        )

    def as_dict(self) -> dict[str, Any]:
        """Return counts and the first few groups, ready for JSON; pairs of splits are written "one+other"."""
        captions = list(self.captions.items())[:MAX_EXAMPLES]
        return {
            "num_images": self.num_images,
            "images": {
                "num_groups": len(self.images),
                "num_images": _num_ids(self.images),
                "examples": [ids[:MAX_EXAMPLES] for ids in self.images[:MAX_EXAMPLES]],
            },
            "within": self.within,
            "across": {"+".join(splits): count for splits, count in self.across.items()},
            "captions": {
                "num_groups": len(self.captions),
                "num_images": _num_ids(self.captions.values()),
                "examples": [{"caption": text, "image_ids": ids[:MAX_EXAMPLES]} for text, ids in captions],
            },
        }


def _num_ids(groups: Iterable[list[int]]) -> int:
    return len(set(itertools.chain.from_iterable(groups)))


def find_duplicates(pairs: DatasetDict | Dataset) -> DuplicateReport:
    """Find identical images under several image ids, and captions shared by different images.

    Images are compared by a hash of their size and decoded pixels. It finds the same file under two names, and files
    with the same pixels that differ in their metadata or (lossless) compression, but not an image that was saved again
    as JPEG. Captions are compared after `normalize_caption`.

    Args:
        pairs: what `load_pairs` returns, or one split of it; image ids are unique over all splits.

    Raises:
        ImageError: an image cannot be read; the message names it. `load_pairs` leaves out such images.
    """
    splits = pairs if isinstance(pairs, DatasetDict) else DatasetDict({str(pairs.split or "pairs"): pairs})
    columns = pa.concat_tables([read_columns(rows, "image_id", "captions") for rows in splits.values()])
    pixels = np.concatenate([as_scalars(scan_readable(rows).pixels) for rows in splits.values()])
    image_of_row, id_of_row = np.unique(pixels, return_inverse=True)[1], columns["image_id"].to_numpy()
    groups = sorted(_find_shared(pa.array(image_of_row), id_of_row, id_of_row).values())

    # An id that comes twice has the image and the split of its last row.
    ids, place_of_row = np.unique(id_of_row, return_inverse=True)
    image_of, split_of = np.empty((2, len(ids)), dtype=np.int64)
    image_of[place_of_row] = image_of_row
    split_of[place_of_row] = np.repeat(np.arange(len(splits)), [len(rows) for rows in splits.values()])
    within: Counter[str] = Counter()
    across: Counter[tuple[str, str]] = Counter()
    names = list(map(str, splits))
    for group in groups:
        counts = Counter(names[split] for split in split_of[np.searchsorted(ids, group)])
        within.update(split for split, count in counts.items() if count > 1)
        across.update(itertools.combinations([split for split in names if split in counts], 2))

    place_of_caption = np.repeat(place_of_row, pc.list_value_length(columns["captions"]))
    texts = normalize_captions(columns["captions"]).combine_chunks()
    shared = _find_shared(texts, ids[place_of_caption], image_of[place_of_caption])
    shared.pop("", None)
    return DuplicateReport(len(ids), groups, dict(within), dict(across), dict(sorted(shared.items())))


def _find_shared(keys: pa.Array, ids: np.ndarray, values: np.ndarray) -> dict[Any, list[int]]:
    """Return the sorted ids that come with a key, for each key that comes with several values."""
    codes = keys.dictionary_encode().indices.to_numpy()
    repeated = np.flatnonzero(np.bincount(codes)[codes] > 1)  # to group all of them would take ten times as long
    table = pa.table({"key": keys.take(repeated), "id": ids[repeated], "value": values[repeated]})
    groups = table.group_by("key").aggregate([("id", "distinct"), ("value", "count_distinct")])
    found = groups.filter(pc.greater(groups["value_count_distinct"], 1))
    return dict(zip(found["key"].to_pylist(), map(sorted, found["id_distinct"].to_pylist()), strict=True))


def normalize_captions(captions: pa.ChunkedArray) -> pa.ChunkedArray:
    """Normalize lists of captions as `normalize_caption` does: all texts, in order."""
    chunks = (map(normalize_caption, chunk.to_pylist()) for chunk in pc.list_flatten(captions).chunks)
    return pa.chunked_array([pa.array(texts, pa.large_string()) for texts in chunks], pa.large_string())


@functools.cache
def _spaces_for_punctuation() -> dict[int, str]:
    letters = map(chr, range(sys.maxunicode + 1))
    return {ord(letter): " " for letter in letters if unicodedata.category(letter)[0] == "P"}


def normalize_caption(caption: str) -> str:
    """Remove differences from a caption that rarely change its meaning: case, punctuation and white space.

    Returns:
        The caption in Unicode's NFKC form and case-folded, with one space for each run of punctuation and white space
        between words; "" if it has no words.
    """
    folded = unicodedata.normalize("NFKC", caption).casefold()
    return " ".join(folded.translate(_spaces_for_punctuation()).split())
