"""Load image-caption pairs as a data set: one row per image, split by image, without unreadable images."""

import hashlib
import itertools
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, List, Value
from torch import Tensor

from clipmini.store import StoredRows

from .images import Skipped
from .scan import scan_images
from .sources import RawPairs, SourceReader

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")


@dataclass
class DataArguments:
    """The source of pairs, and how it is read and split; see `load_pairs`.

    Attributes:
        source: a folder, a table, a Flickr token file or the id of a data set on the Hub.
        image_column: column of images, paths or bytes; by default it is detected.
        caption_column: column of captions; by default it is detected.
        image_root: folder that paths in a table are relative to; by default the folder of the table.
        validation_fraction: share of the images for validation, if the data has no such split.
        test_fraction: share of the images for testing, if the data has neither split.
        split_seed: seed of the split.
        strict: stop at the first image or caption that cannot be used, instead of leaving it out.
    """

    source: str
    image_column: str | None = None
    caption_column: str | None = None
    image_root: str | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    split_seed: int = 0
    strict: bool = False


@dataclass
class PairDataset:
    """Pairs, with the features that frozen parts of the towers compute from them.

    Attributes:
        rows: one row per image, with `image`, `captions` and `image_id`.
        image_features: features of K views of each image, or None to read the images: (I, K, V) pooled outputs of the
            vision tower or, with `frozen_stages`, (I, K, ...) activations that enter its first trained stage.
        text_features: (T, W) pooled outputs of the text tower for all captions in order, or None to read the captions.
        frozen_stages: the frozen first stages of the vision tower that computed `image_features`.
    """

    rows: Dataset
    image_features: StoredRows | None = None
    text_features: StoredRows | None = None
    frozen_stages: Any = None
    image_ids: list[int] = field(init=False)
    num_captions: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.image_ids = list(self.rows["image_id"])
        self.num_captions = [len(captions) for captions in self.rows["captions"]]

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def captions(self) -> list[str]:
        """All captions, image by image."""
        return list(itertools.chain.from_iterable(self.rows["captions"]))

    def image_of_captions(self) -> Tensor:
        """Return the row of each caption's image: (T,) integers."""
        return torch.arange(len(self)).repeat_interleave(torch.tensor(self.num_captions))


def load_pairs(
    source: str | Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_root: str | Path | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    skipped: Skipped | None = None,
) -> DatasetDict:
    """Load image-caption pairs, one row per image with all its captions.

    Rows with the same path, or the same bytes, are one image. Images stay where they are, in files or in the
    memory-mapped cache of `datasets`, and are read when a row is.

    Splits of the data are kept: files or folders named after them, or a `split` column (where blank means train). If
    there is only a train split, or none, validation and test images are drawn from it; if there is a test split, only
    validation images; if there is a validation split, none. Images are drawn by a hash of the seed with their path or
    bytes, so the order of rows does not matter, and adding or removing one image moves hardly any other. Every drawn
    split gets at least one image.

    A caption may be a string, a number (read as a string), or a list of these. Captions that are empty or not text are
    left out, and so are images that cannot be read or have no caption left. Captions are cut at 100,000 characters;
    the tokenizer cuts them further.

    Args:
        source: the id of a data set on the Hub (owner/name); a folder of images with `metadata.jsonl`, `.csv` or
            `.parquet`; a folder of tables named after splits, or saved by `save_to_disk`; a CSV, TSV, JSON, JSON Lines
            or parquet table; or a Flickr8k or Flickr30k token file.
        image_column: column of paths, bytes or images; None to find it by its type and name.
        caption_column: column of captions; None to find it by its name.
        image_root: folder that paths are relative to; None for the folder of the table, or one up to two levels below
            it that has the first images.
        validation_fraction: share of the images to draw for validation; 0 for none.
        test_fraction: likewise.
        seed: another seed draws other images.
        skipped: collects what is left out; None to warn, and to log a summary at the end.

    Returns:
        Data sets for some of "train", "validation" and "test", with the columns `image` (as `read_image` takes it),
        `captions` (a list of at least one string) and `image_id` (the row in the source, from 0, where the image first
        appears, and so unique over all splits).

    Raises:
        ValueError: the source or its columns cannot be found, it has no usable pair, there are too few images to
            split, or `skipped` is strict and something had to be left out.
    """
    fractions = {"validation": validation_fraction, "test": test_fraction}
    if min(fractions.values()) < 0 or sum(fractions.values()) >= 1:
        raise ValueError(
            f"validation_fraction={validation_fraction} and test_fraction={test_fraction} must not be negative, and "
            "their sum must be under 1."
        )
    logs_summary = skipped is None
    skipped = Skipped() if skipped is None else skipped
    root = None if image_root is None else Path(image_root).expanduser()
    reader = SourceReader(image_column, caption_column, root, skipped)
    images, keys, splits = _group_by_image(reader.read(source), skipped)
    facts = scan_images(images)
    for path, image_id, fault in zip(facts.paths, images["image_id"], facts.faults, strict=True):
        if fault is not None:
            skipped.add(path or f"row {image_id + 1}", fault)
    kept = np.flatnonzero([fault is None for fault in facts.faults])
    images, keys, splits = images.select(kept), keys[kept], splits[kept]
    if len(images) == 0:
        name, reason = skipped.items[0]
        raise ValueError(f"{source} has no usable pair; {skipped.count} inputs skipped, the first {name}: {reason}.")
    _warn_of_leaks(keys, splits, str(source))
    splits = _draw_splits(keys, splits, fractions, seed)
    if logs_summary:
        skipped.log_summary()
    names = [name for name in SPLITS if name in splits]
    return DatasetDict({name: images.select(np.flatnonzero(splits == name)) for name in names})


def load_data(data: DataArguments, skipped: Skipped) -> DatasetDict:
    """Load the pairs that a recipe or a command describes, as `load_pairs` does."""
    options = {name: value for name, value in vars(data).items() if name not in ("strict", "split_seed")}
    return load_pairs(**options, seed=data.split_seed, skipped=skipped)


def choose_split(splits: Mapping[str, Any], wanted: str | None, source: str) -> str:
    """Return the split of `source` to measure on: the wanted one, or else test, validation or train.

    Raises:
        ValueError: there is no such split.
    """
    if wanted is None:
        return next((name for name in reversed(SPLITS) if name in splits), next(iter(splits)))
    if wanted not in splits:
        raise ValueError(f"{source} has no split {wanted!r}; it has {', '.join(splits)}.")
    return wanted


def _group_by_image(raw: RawPairs, skipped: Skipped) -> tuple[Dataset, np.ndarray, np.ndarray]:
    """Join the rows of each image of a split into one, in the order of their first rows.

    Captions and ids are added as columns, and then the first row of each image is selected: this way `datasets` does
    not copy images.

    Returns:
        The data set, and for each row its key and its split ("" if the source does not name it).
    """
    splits = np.array([split or "" for split in raw.splits], dtype=object)
    first_rows: dict[tuple[str, str], int] = {}
    pairs = zip(raw.keys, splits, strict=True)
    image_ids = np.array([first_rows.setdefault(pair, row) for row, pair in enumerate(pairs)], dtype=np.int64)
    texts = pc.list_flatten(raw.captions).combine_chunks()
    image_of_text = image_ids[pc.list_parent_indices(raw.captions).to_numpy()]
    order = np.argsort(image_of_text, kind="stable")
    texts, image_of_text = texts.take(pa.array(order)), image_of_text[order]

    is_usable = texts.is_valid().to_numpy(zero_copy_only=False)
    counts = np.bincount(image_of_text[is_usable], minlength=len(image_ids))  # at the first row of each image
    for index in np.flatnonzero(~is_usable):
        row = image_of_text[index]
        if counts[row]:
            number = index - np.searchsorted(image_of_text, row) + 1
            skipped.add(f"{_name_row(raw.images, row)} caption {number}", "is empty or no text")
    for row in first_rows.values():
        if not counts[row]:
            skipped.add(_name_row(raw.images, row), "has no caption that is a text")

    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    captions = pa.ListArray.from_arrays(pa.array(offsets), texts.filter(pa.array(is_usable)))
    images = _add_column(raw.images, "captions", captions, List(Value("string")))
    images = _add_column(images, "image_id", pa.array(image_ids), Value("int64"))
    kept = np.flatnonzero(counts)
    return images.select(kept), np.array(raw.keys, dtype=object)[kept], splits[kept]


def _name_row(images: Dataset, row: int) -> str:
    image = images[int(row)]["image"]
    return (image and image["path"]) or f"row {row + 1}"


def _add_column(images: Dataset, name: str, values: pa.Array, feature: Any) -> Dataset:
    # Without a given fingerprint, all values would be hashed. A random one also keeps `datasets` from reusing what it
    # computed from files that have changed since.
    return images.add_column(name, values, new_fingerprint=os.urandom(8).hex(), feature=feature)


def _warn_of_leaks(keys: np.ndarray, splits: np.ndarray, source: str) -> None:
    keys_of = {split: set(keys[splits == split]) for split in sorted(set(splits))}
    for one, other in itertools.combinations(keys_of, 2):
        if num_shared := len(keys_of[one] & keys_of[other]):
            logger.warning(
                "%s has %d images in both %s and %s; they are kept, but they flatter the results",
                *(source, num_shared, one, other),
            )


def _draw_splits(keys: np.ndarray, splits: np.ndarray, fractions: dict[str, float], seed: int) -> np.ndarray:
    """Assign every image to a split, and draw the splits that the source does not have."""
    splits = np.where(splits == "", "train", splits)
    given = set(splits)
    train = np.flatnonzero(splits == "train")
    wanted = [name for name in fractions if name not in given and (name == "validation" or given == {"train"})]
    counts = {name: max(1, round(fractions[name] * len(train))) for name in wanted if fractions[name] and len(train)}
    if counts and sum(counts.values()) >= len(train):
        raise ValueError(
            f"{len(train)} images are too few to draw {' and '.join(counts)} images from; add images, or set "
            "validation_fraction=0 and test_fraction=0."
        )
    draws = [hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).hexdigest() for key in keys[train]]
    order = train[np.argsort(draws)]
    start = 0
    for name, count in counts.items():
        splits[order[start : start + count]] = name
        start += count
    return splits
