"""Find images and captions that come up under more than one image id.

A copy of an image in the same batch is a negative of itself: the loss then pushes a caption away from the image it
describes. A copy in the test split makes figures flatter. Sharing an id repairs the first, not the second.
"""

import hashlib
import itertools
import os
import unicodedata
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
    """What `find_duplicates` found. Groups are of at least two image ids, and both ids and groups are sorted.

    Attributes:
        num_images: images looked at.
        images: groups of images with the same image, over all splits.
        within: by split, the groups of the same image in that split.
        across: by pair of splits, the groups of the same image that reach into both, with their images in either.
        captions: by normalized caption, the images that share it, unless all of them have the same image.
    """

    num_images: int
    images: list[list[int]]
    within: dict[str, list[list[int]]]
    across: dict[tuple[str, str], list[list[int]]]
    captions: dict[str, list[int]]

    def summary(self) -> str:
        """Say in two plain sentences what was found."""
        leaks = [f"; {len(groups):,} in both {one} and {other}" for (one, other), groups in self.across.items()]
        warning = ", where copies flatter figures" if leaks else ""
        return (
            f"{_say('image', len(self.images))} up under more than one image id "
            f"({_num_images(self.images):,} of {self.num_images:,} images{''.join(leaks)}{warning}). "
            f"{_say('caption', len(self.captions))} up with different images "
            f"({_num_images(self.captions.values()):,} images)."
        )

    def as_dict(self) -> dict[str, Any]:
        """Give counts and the first few groups, ready for JSON.

        Returns:
            `num_images`; `images` and `captions`, each with `num_groups`, `num_images` and `examples`; `within` by
            split and `across` by "one+other" pair of splits, both numbers of groups.
        """
        captions = list(itertools.islice(self.captions.items(), MAX_EXAMPLES))
        return {
            "num_images": self.num_images,
            "images": {
                "num_groups": len(self.images),
                "num_images": _num_images(self.images),
                "examples": [ids[:MAX_EXAMPLES] for ids in self.images[:MAX_EXAMPLES]],
            },
            "within": {split: len(groups) for split, groups in self.within.items()},
            "across": {f"{one}+{other}": len(groups) for (one, other), groups in self.across.items()},
            "captions": {
                "num_groups": len(self.captions),
                "num_images": _num_images(self.captions.values()),
                "examples": [{"caption": text, "image_ids": ids[:MAX_EXAMPLES]} for text, ids in captions],
            },
        }


def find_duplicates(pairs: DatasetDict | Dataset, *, num_proc: int | None = None) -> DuplicateReport:
    """Find images that are exactly the same, and captions that say the same of different images.

    Images are compared by a hash of their size and decoded pixels. It finds the same file under two names, and also
    the same pixels in files that differ, by their metadata or their (lossless) compression; not an image saved anew
    as JPEG. Captions are compared by [`normalize_caption`].

    Every image is read and decoded, one at a time, with a progress bar; only hashes and captions stay in memory.

    Args:
        pairs: what `load_pairs` gives, or one split of it; image ids are unique over all splits.
        num_proc: processes that read images; None for this one alone.

    Returns:
        The groups of image ids.

    Raises:
        ImageError: an image cannot be read; the message names it. `load_pairs` leaves such out.
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
    within, across = _sort_by_split(images, split_of, list(splits))
    shared = {
        caption: sorted(ids)
        for caption, ids in sorted(ids_of_caption.items())
        if len({image_of[image_id] for image_id in ids}) > 1
    }
    return DuplicateReport(len(image_of), images, within, across, captions=shared)


def normalize_caption(caption: str) -> str:
    """Take from a caption what makes no difference to its meaning, mostly.

    Args:
        caption: any text.

    Returns:
        The caption in Unicode's form NFKC and case-folded, with one blank for each run of punctuation and blanks
        between words; "" where it has no words.
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
        # `datasets` would serve what it once computed from files that have changed since.
        load_from_cache_file=False,
        new_fingerprint=os.urandom(8).hex(),
        desc=f"comparing images of {split}",
    )["image"][:]


def _hash_row(row: dict[str, Any]) -> dict[str, str]:
    return {"image": hash_image(read_named(row["image"], f"image_id {row['image_id']}"))}


def hash_image(image: Image.Image) -> str:
    """Give a digest of an image's size and pixels, which copies share."""
    digest = hashlib.blake2b(f"{image.width}x{image.height} ".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


def _sort_by_split(
    images: list[list[int]], split_of: dict[int, str], splits: list[str]
) -> tuple[dict[str, list[list[int]]], dict[tuple[str, str], list[list[int]]]]:
    within: dict[str, list[list[int]]] = {}
    across: dict[tuple[str, str], list[list[int]]] = {}
    for ids in images:
        members: dict[str, list[int]] = {}
        for image_id in ids:
            members.setdefault(split_of[image_id], []).append(image_id)
        for split, own in members.items():
            if len(own) > 1:
                within.setdefault(split, []).append(own)
        for one, other in itertools.combinations([split for split in splits if split in members], 2):
            across.setdefault((one, other), []).append(sorted(members[one] + members[other]))
    return within, across


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


def _say(noun: str, count: int) -> str:
    return f"{count:,} {noun}s come" if count > 1 else f"{count or 'No'} {noun} comes"


def _num_images(groups: Iterable[list[int]]) -> int:
    return len(set(itertools.chain.from_iterable(groups)))
