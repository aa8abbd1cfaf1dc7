"""Find images and captions that occur under more than one image id.

A copy of an image in the same batch is a negative of itself: the loss then pushes a caption away from the image it
describes. A copy in the test split inflates its metrics. Sharing an id repairs the first, not the second.
"""

import hashlib
import itertools
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from modeling_clipmini.images_clipmini import read_named

ORIGINAL_ID = "original_image_id"  # the column that keeps what `image_id` was before ids were shared
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
        """Return counts and the first few groups, ready for JSON.

        Returns:
            `num_images`; `images` and `captions`, each with `num_groups`, `num_images` and `examples`; `within` by
            split and `across` by "one+other" pair of splits, both numbers of groups.
        """
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


def find_duplicates(pairs: DatasetDict | Dataset, *, num_proc: int | None = None) -> DuplicateReport:
    """Find identical images under several image ids, and captions shared by different images.

    Images are compared by a hash of their size and decoded pixels. It finds the same file under two names, and files
    with the same pixels that differ in their metadata or (lossless) compression, but not an image that was saved again
    as JPEG. Captions are compared after [`normalize_caption`].

    Every image is read and decoded, one at a time, with a progress bar; only hashes and captions stay in memory.

    Args:
        pairs: what `load_pairs` returns, or one split of it; image ids are unique over all splits.
        num_proc: number of processes that read images; None for this one alone.

    Returns:
        The groups of image ids.

    Raises:
        ImageError: an image cannot be read; the message names it. `load_pairs` leaves out such images.
    """
    splits = pairs if isinstance(pairs, DatasetDict) else DatasetDict({str(pairs.split or "pairs"): pairs})
    ids_of_image: dict[str, set[int]] = {}
    ids_of_caption: dict[str, set[int]] = {}
    split_of: dict[int, str] = {}
    image_of: dict[int, str] = {}
    for split, dataset in splits.items():
        image_ids = dataset["image_id"][:]
        for image_id, image in zip(image_ids, _hash_images(dataset, str(split), num_proc), strict=True):
            ids_of_image.setdefault(image, set()).add(image_id)
            image_of[image_id], split_of[image_id] = image, str(split)
        for image_id, captions in zip(image_ids, dataset["captions"], strict=True):
            for caption in filter(None, map(normalize_caption, captions)):
                ids_of_caption.setdefault(caption, set()).add(image_id)
    images = sorted(sorted(ids) for ids in ids_of_image.values() if len(ids) > 1)
    within: Counter[str] = Counter()
    across: Counter[tuple[str, str]] = Counter()
    for ids in images:
        counts = Counter(split_of[image_id] for image_id in ids)
        within.update(split for split, count in counts.items() if count > 1)
        across.update(itertools.combinations([split for split in splits if split in counts], 2))
    shared = {
        caption: sorted(ids)
        for caption, ids in sorted(ids_of_caption.items())
        if len({image_of[image_id] for image_id in ids}) > 1
    }
    return DuplicateReport(len(image_of), images, dict(within), dict(across), shared)


def normalize_caption(caption: str) -> str:
    """Remove differences from a caption that rarely change its meaning: case, punctuation and white space.

    Args:
        caption: any text.

    Returns:
        The caption in Unicode's NFKC form and case-folded, with one space for each run of punctuation and white space
        between words; "" if it has no words.
    """
    folded = unicodedata.normalize("NFKC", caption).casefold()
    return " ".join("".join(" " if unicodedata.category(letter)[0] == "P" else letter for letter in folded).split())


def share_ids(pairs: DatasetDict, report: DuplicateReport, *, captions: bool = False) -> DatasetDict:
    """Give all images of a group the smallest image id in it, so that training takes them for positives of each other.

    Rows stay as they are, also those in other splits: copies of training images in a test split flatter its figures
    as before.

    Args:
        pairs: what the report was made of.
        report: what `find_duplicates` found in it.
        captions: join images that share a normalized caption too. Ids belong to images, not to captions: such images
            become positives of each other wholly, with all their other captions, and so does whatever else is linked
            to one of them. "A dog." of a hundred images makes one image of them; read the report first.

    Returns:
        The same pairs with other values in `image_id`, and those they had in `original_image_id`. No image is copied.
    """
    groups = [*report.images, *(report.captions.values() if captions else ())]
    new_ids = _join(groups)
    return DatasetDict({split: _replace_ids(dataset, new_ids) for split, dataset in pairs.items()})


def _hash_images(pairs: Dataset, split: str, num_proc: int | None) -> list[str]:
    if not len(pairs):
        return []
    return pairs.select_columns(["image", "image_id"]).map(
        _hash_row,
        remove_columns=["image", "image_id"],
        features=Features({"image": Value("string")}),
        num_proc=min(num_proc, len(pairs)) if num_proc and num_proc > 1 else None,
        keep_in_memory=True,
        # Otherwise `datasets` would return hashes of files that have changed since.
        load_from_cache_file=False,
        new_fingerprint=os.urandom(8).hex(),
        desc=f"comparing images of {split}",
    )["image"][:]


def _hash_row(row: dict[str, Any]) -> dict[str, str]:
    return {"image": hash_image(read_named(row["image"], f"image_id {row['image_id']}"))}


def hash_image(image: Image.Image) -> str:
    """Return a digest of an image's size and pixels, which is the same for copies."""
    digest = hashlib.blake2b(f"{image.width}x{image.height} ".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


def _join(groups: Sequence[list[int]]) -> dict[int, int]:
    """Map each id to the smallest that it is linked to over any number of groups."""
    ids = sorted({image_id for group in groups for image_id in group})
    place = {image_id: index for index, image_id in enumerate(ids)}
    links = np.array([(place[group[0]], place[other]) for group in groups for other in group]).reshape(-1, 2)
    graph = coo_array((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(len(ids), len(ids)))
    _, components = connected_components(graph, directed=False)
    smallest: dict[int, int] = {}
    for image_id, component in zip(ids, components.tolist(), strict=True):  # the smallest comes first
        smallest.setdefault(component, image_id)
    return {image_id: smallest[component] for image_id, component in zip(ids, components.tolist(), strict=True)}


def _replace_ids(pairs: Dataset, new_ids: dict[int, int]) -> Dataset:
    """Replace ids in the table beneath a data set, and select the same rows again.

    `add_column` on a selection, which a split mostly is, would copy all its images.
    """
    # Without fingerprints of our own, all images would be hashed to make one.
    whole = Dataset(pairs.data, info=pairs.info, split=pairs.split, fingerprint=os.urandom(8).hex())
    image_ids = np.array([new_ids.get(image_id, image_id) for image_id in whole["image_id"][:]], dtype=np.int64)
    if ORIGINAL_ID in pairs.column_names:  # ids were shared before
        whole = whole.remove_columns("image_id")
    else:
        whole = whole.rename_column("image_id", ORIGINAL_ID)
    whole = whole.add_column("image_id", image_ids, feature=Value("int64"))
    columns = [name for name in pairs.column_names if name != ORIGINAL_ID]  # in their order
    whole = whole.select_columns([*columns, ORIGINAL_ID])
    return Dataset(whole.data, whole.info, pairs.split, indices_table=pairs._indices, fingerprint=os.urandom(8).hex())
