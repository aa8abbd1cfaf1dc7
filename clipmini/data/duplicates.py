"""Find images and captions that occur under more than one image id.

A copy of an image in the same batch is a negative of itself: the loss then pushes a caption away from the image it
describes. Even with every image twice in the training data this cost nothing that could be measured (see
benchmarks/README.md). A copy in the test split inflates its metrics.
"""

import itertools
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict

from .scan import scan_readable

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
    ids_of_image: dict[bytes, set[int]] = {}
    ids_of_caption: dict[str, set[int]] = {}
    split_of: dict[int, str] = {}
    image_of: dict[int, bytes] = {}
    for split, dataset in splits.items():
        image_ids = dataset["image_id"][:]
        for image_id, pixels in zip(image_ids, scan_readable(dataset).pixels, strict=True):
            digest = pixels.tobytes()
            ids_of_image.setdefault(digest, set()).add(image_id)
            image_of[image_id], split_of[image_id] = digest, str(split)
        for image_id, captions in zip(image_ids, dataset["captions"], strict=True):
            for caption in filter(None, map(normalize_caption, captions)):
                ids_of_caption.setdefault(caption, set()).add(image_id)
    groups = sorted(sorted(ids) for ids in ids_of_image.values() if len(ids) > 1)
    within: Counter[str] = Counter()
    across: Counter[tuple[str, str]] = Counter()
    for ids in groups:
        counts = Counter(split_of[image_id] for image_id in ids)
        within.update(split for split, count in counts.items() if count > 1)
        across.update(itertools.combinations([split for split in splits if split in counts], 2))
    shared = {
        caption: sorted(ids)
        for caption, ids in sorted(ids_of_caption.items())
        if len({image_of[image_id] for image_id in ids}) > 1
    }
    return DuplicateReport(len(image_of), groups, dict(within), dict(across), shared)


def normalize_caption(caption: str) -> str:
    """Remove differences from a caption that rarely change its meaning: case, punctuation and white space.

    Returns:
        The caption in Unicode's NFKC form and case-folded, with one space for each run of punctuation and white space
        between words; "" if it has no words.
    """
    folded = unicodedata.normalize("NFKC", caption).casefold()
    return " ".join("".join(" " if unicodedata.category(letter)[0] == "P" else letter for letter in folded).split())
