"""Load image-caption pairs as a data set: one row per image, split by image, without unreadable images."""

import hashlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
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

from .images import Skipped, join_names, shorten
from .scan import read_columns, scan_images
from .sources import AUTO, Findings, RawPairs, SourceReader

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
MAX_SKIPPED = 0.05
MAX_REASONS = 3  # in an error message


@dataclass
class DataArguments:
    """The source of pairs, and how it is read and split; see `load_pairs`.

    Attributes:
        source: a folder, a table, an archive or the id of a data set on the Hub.
        image_column: column of images, paths or bytes; by default it is detected.
        caption_column: column of captions, or a list of several; by default they are detected.
        image_root: folder that paths in a table are relative to; by default it is found.
        split_column: column that names splits; null to draw them at random, whatever the source has.
        config_name: configuration to read, of a data set that has several.
        validation_fraction: share of the images for validation, if the data has no such split.
        test_fraction: share of the images for testing, if the data has neither split.
        split_seed: seed of the split.
        max_skipped: largest share of rows that may be left out, since they cannot be used.
        strict: stop at the first image or caption that cannot be used, instead of leaving it out.
    """

    source: str
    image_column: str | None = None
    caption_column: str | list[str] | None = None
    image_root: str | None = None
    split_column: str | None = AUTO
    config_name: str | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    split_seed: int = 0
    max_skipped: float = MAX_SKIPPED
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
        image_ids: (I,) integers.
        num_captions: (I,) integers.
        caption_starts: (I + 1,) the number of captions before each row, and T.
    """

    rows: Dataset
    image_features: StoredRows | np.ndarray | None = None
    text_features: StoredRows | np.ndarray | None = None
    frozen_stages: Any = None
    # Not lists, which data workers would copy: reading a Python object writes to its page, by counting references.
    image_ids: np.ndarray = field(init=False)
    num_captions: np.ndarray = field(init=False)
    caption_starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        columns = read_columns(self.rows, "image_id", "captions")
        self.image_ids = columns["image_id"].to_numpy()
        self.num_captions = pc.list_value_length(columns["captions"]).to_numpy()
        self.caption_starts = np.concatenate([[0], np.cumsum(self.num_captions, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def captions(self) -> list[str]:
        """All captions, image by image."""
        return pc.list_flatten(read_columns(self.rows, "captions")["captions"]).to_pylist()

    def image_of_captions(self) -> Tensor:
        """Return the row of each caption's image: (T,) integers."""
        return torch.from_numpy(np.repeat(np.arange(len(self)), self.num_captions))


def load_pairs(
    source: str | Path,
    *,
    image_column: str | None = None,
    caption_column: str | Sequence[str] | None = None,
    image_root: str | Path | None = None,
    split_column: str | None = AUTO,
    config_name: str | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    max_skipped: float = MAX_SKIPPED,
    skipped: Skipped | None = None,
    findings: list[Findings] | None = None,
) -> DatasetDict:
    """Load image-caption pairs, one row per image with all its captions.

    Rows with the same path, or the same bytes, are one image. Images stay where they are, in files or in the
    memory-mapped cache of `datasets`, and are read when a row is.

    Splits of the data are kept: files or folders named after them, a `split` column (where blank means train), or
    lists of images beside a token file. If there is only a train split, or none, validation and test images are drawn
    from it; if there is a test split, only validation images; if there is a validation split, none. Images are drawn
    by a hash of the seed with their path or bytes, so the order of rows does not matter, and adding or removing one
    image moves hardly any other. Every drawn split gets at least one image.

    A caption may be a string, a number (read as a string), or a list of these. Captions that are empty or not text are
    left out, and so are images that cannot be read or have no caption left. Captions are cut at 100,000 characters;
    the tokenizer cuts them further.

    Args:
        source: the id of a data set on the Hub (owner/name), a folder, a table or an archive; docs/data.md lists all
            layouts.
        image_column: column of paths, bytes or images; None to find it by its type and name.
        caption_column: column of captions, or several; None to find them by their names.
        image_root: folder that paths are relative to; None to find it, see `find_places`.
        split_column: column that names splits; "auto" to find it by its name; None to draw all splits at random.
        config_name: the configuration to read, of a data set that has several.
        validation_fraction: share of the images to draw for validation; 0 for none.
        test_fraction: likewise.
        seed: another seed draws other images.
        max_skipped: the largest share of rows that may be left out, from 0 to 1.
        skipped: collects what is left out; None to warn, and to log a summary at the end.
        findings: a list to which is added what the source was found to be; it is logged anyway.

    Returns:
        Data sets for some of "train", "validation" and "test", with the columns `image` (as `read_image` takes it),
        `captions` (a list of at least one string) and `image_id` (the row in the source, from 0, where the image first
        appears, and so unique over all splits).

    Raises:
        ValueError: the source or its columns cannot be found, it has no usable pair, more than `max_skipped` of its
            rows had to be left out, or one if `skipped` is strict, or there are too few images to split.
    """
    fractions = {"validation": validation_fraction, "test": test_fraction}
    if min(fractions.values()) < 0 or sum(fractions.values()) >= 1:
        raise ValueError(
            f"validation_fraction={validation_fraction} and test_fraction={test_fraction} must not be negative, and "
            "their sum must be under 1."
        )
    if not 0 <= max_skipped <= 1:
        raise ValueError(f"max_skipped={max_skipped} is not a share; set it between 0 and 1.")
    logs_summary = skipped is None
    skipped = Skipped() if skipped is None else skipped
    num_before = skipped.count
    reader = SourceReader(
        skipped,
        image_column=image_column,
        caption_column=caption_column,
        image_root=None if image_root is None else Path(image_root).expanduser(),
        split_column=split_column,
        config_name=config_name,
    )
    raw = reader.read(source)
    num_unparsed = skipped.count - num_before
    num_rows = len(raw.images) + num_unparsed
    images, keys, splits, rows_of_image = _group_by_image(raw, skipped)
    del raw
    facts = scan_images(images)
    for path, image_id, fault in zip(facts.paths, images["image_id"][:], facts.faults, strict=True):
        if fault is not None:
            skipped.add(path or f"row {image_id + 1}", fault)
    kept = np.flatnonzero([fault is None for fault in facts.faults])
    images, keys, splits = images.select(kept), keys.take(pa.array(kept)), splits[kept]
    found = reader.findings
    found.num_rows, found.num_used = num_rows, int(rows_of_image[kept].sum())
    _check_skipped(found, skipped.items[num_before:], max_skipped)
    _warn_of_leaks(keys, splits, str(source))
    splits, found.splits = _draw_splits(keys, splits, fractions, seed)
    for line in found.lines():
        logger.info("%s", line)
    if findings is not None:
        findings.append(found)
    if logs_summary:
        skipped.log_summary()
    names = [name for name in SPLITS if name in splits]
    return DatasetDict({name: images.select(np.flatnonzero(splits == name)) for name in names})


def _check_skipped(found: Findings, skipped: Sequence[tuple[str, str]], max_skipped: float) -> None:
    """Raise if too many rows were left out: a fault of so many is one of the source, or of how it was read."""
    share = (found.num_rows - found.num_used) / found.num_rows
    if found.num_used and share <= max_skipped:
        return
    first: dict[str, str] = {}
    for name, reason in skipped:
        first.setdefault(reason, name)
    named = "; ".join(
        f"{shorten(first[reason], 200)}: {reason}{f' ({number:,} in all)' if number > 1 else ''}"
        for reason, number in Counter(reason for _, reason in skipped).most_common(MAX_REASONS)
    )
    folders = [folder for table in found.tables for folder in table.folders]
    where = f" Images were found in {join_names(folders)}." if folders else ""
    where += "".join(f" Left out: {text}." for text in found.passed_over[:MAX_REASONS])
    if found.num_used:
        of = f"{share:.0%} of {found.num_rows:,} rows cannot be used, over max_skipped={max_skipped:g}"
        raise ValueError(f"{found.source}: {of}; the first {named}.{where}")
    count = f"{len(skipped):,} inputs skipped"
    raise ValueError(f"{found.source} has no usable pair; {count}, the first {named}.{where}")


def load_data(data: DataArguments, skipped: Skipped, findings: list[Findings] | None = None) -> DatasetDict:
    """Load the pairs that a recipe or a command describes, as `load_pairs` does."""
    options = {name: value for name, value in vars(data).items() if name not in ("strict", "split_seed")}
    return load_pairs(**options, seed=data.split_seed, skipped=skipped, findings=findings)


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


def _group_by_image(raw: RawPairs, skipped: Skipped) -> tuple[Dataset, pa.ChunkedArray, np.ndarray, np.ndarray]:
    """Join the rows of each image of a split into one, in the order of their first rows.

    Captions and ids are added as columns, and then the first row of each image is selected: this way `datasets` does
    not copy images.

    Returns:
        The data set; and for each row its key, its split ("" if the source does not name it), and how many rows of the
        source it was, without those whose captions cannot be used.
    """
    splits = pc.fill_null(raw.splits, "")
    key_codes, split_codes = (
        column.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
        for column in (raw.keys, splits)
    )
    pair_codes = key_codes * (split_codes.max() + 1) + split_codes
    _, first_rows, codes = np.unique(pair_codes, return_index=True, return_inverse=True)
    image_ids = first_rows[codes]
    texts = pc.list_flatten(raw.captions).combine_chunks()
    row_of_text = pc.list_parent_indices(raw.captions).to_numpy()
    image_of_text = image_ids[row_of_text]
    order = np.argsort(image_of_text, kind="stable")
    is_usable = texts.is_valid().to_numpy(zero_copy_only=False)
    unusable = np.setdiff1d(row_of_text, row_of_text[is_usable])
    num_rows = np.bincount(image_ids, minlength=len(image_ids)) - np.bincount(
        image_ids[unusable], minlength=len(image_ids)
    )
    if (np.diff(order) != 1).any():  # the captions of a million rows are not copied needlessly
        texts, image_of_text, is_usable = texts.take(pa.array(order)), image_of_text[order], is_usable[order]

    counts = np.bincount(image_of_text[is_usable], minlength=len(image_ids))  # at the first row of each image
    for index in np.flatnonzero(~is_usable):
        row = image_of_text[index]
        if counts[row]:
            number = index - np.searchsorted(image_of_text, row) + 1
            skipped.add(f"{_name_row(raw.images, row)} caption {number}", "is empty or no text")
    for row in np.sort(first_rows):
        if not counts[row]:
            skipped.add(_name_row(raw.images, row), "has no caption that is a text")

    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    texts = texts if is_usable.all() else texts.filter(pa.array(is_usable))
    captions = pa.ListArray.from_arrays(pa.array(offsets), texts)
    images = _add_column(raw.images, "captions", captions, List(Value("string")))
    images = _add_column(images, "image_id", pa.array(image_ids), Value("int64"))
    kept = np.flatnonzero(counts)
    return (
        images.select(kept),
        raw.keys.take(pa.array(kept)),
        np.array(splits.take(pa.array(kept)).to_pylist(), dtype=object),
        num_rows[kept],
    )


def _name_row(images: Dataset, row: int) -> str:
    image = images[int(row)]["image"]
    return (image and image["path"]) or f"row {row + 1}"


def _add_column(images: Dataset, name: str, values: pa.Array, feature: Any) -> Dataset:
    # Without a given fingerprint, all values would be hashed. A random one also keeps `datasets` from reusing what it
    # computed from files that have changed since.
    return images.add_column(name, values, new_fingerprint=os.urandom(8).hex(), feature=feature)


def _warn_of_leaks(keys: pa.ChunkedArray, splits: np.ndarray, source: str) -> None:
    names = sorted(set(splits))
    keys_of = {split: keys.filter(pa.array(splits == split)).unique() for split in names if len(names) > 1}
    for one, other in itertools.combinations(keys_of, 2):
        if num_shared := pc.sum(pc.is_in(keys_of[one], keys_of[other])).as_py():
            logger.warning(
                "%s has %d images in both %s and %s; they are kept, but they flatter the results",
                *(source, num_shared, one, other),
            )


def _draw_splits(
    keys: pa.ChunkedArray, splits: np.ndarray, fractions: dict[str, float], seed: int
) -> tuple[np.ndarray, str]:
    """Assign every image to a split, and draw the splits that the source does not have.

    Returns:
        The split of each image, and where they come from, in words.
    """
    has_splits = bool((splits != "").any())
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
    batches = (batch["key"].to_pylist() for batch in pa.table({"key": keys.take(pa.array(train))}).to_batches(10_000))
    names = itertools.chain.from_iterable(batches)
    digests = (hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest() for name in names)
    draws = np.fromiter((int.from_bytes(digest) for digest in digests), np.uint64, len(train))
    order = train[np.argsort(draws)]
    start = 0
    for name, count in counts.items():
        splits[order[start : start + count]] = name
        start += count
    origin = [f"{' and '.join(sorted(given))} as the source has them"] if has_splits else []
    origin += [f"{' and '.join(counts)} drawn at random, by image (seed {seed})"] if counts else []
    return splits, "; ".join(origin) or "none, all images are for training"
