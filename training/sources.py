"""Where pairs come from: the Hub, folders, tables and token files, all read into the same raw rows.

Text (CSV, TSV, JSON, token files) is parsed here: the readers of `datasets` stop at the first odd row, take the caption
"None" for a missing one, and leave a copy in the cache. What holds pictures (parquet, saved data sets, the Hub) is read
by `datasets` and stays on disk.
"""

import hashlib
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from datasets.table import InMemoryTable
from tqdm.auto import tqdm

from clipmini.inference.images import Skipped, find_images

from .tables import caption_texts, is_token_file, read_rows

logger = logging.getLogger(__name__)

# Usual names, likeliest first.
IMAGE_COLUMNS = (
    *("image", "images", "img", "picture", "photo", "image_path", "img_path", "image_file", "image_filename"),
    *("image_file_name", "image_name", "file_name", "filename", "filepath", "file_path", "path", "file"),
    *("jpg", "jpeg", "png", "webp"),
)
CAPTION_COLUMNS = (
    *("captions", "caption", "image_caption", "sentences", "sentence", "texts", "text", "descriptions", "description"),
    *("comments", "comment", "alt_text", "alt", "title", "raw", "txt"),
)
SPLITS = {"train": "train", "training": "train", "restval": "train"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation") | dict.fromkeys(("test", "testing"), "test")
TABLE_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
TOKEN_SUFFIXES = (".txt", ".token")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NUM_SAMPLED = 100  # rows that column names and the place of the pictures are found from
BATCH_SIZE = 10_000


@dataclass
class RawPairs:
    """Rows as the source has them: an image may have several.

    Attributes:
        images: column `image`, undecoded.
        captions: a list of texts per row; null where a caption cannot be used.
        keys: what tells one image from another: its path, relative to the source where it can be, or its bytes' hash.
        splits: "train", "validation", "test", or None where the source does not say.
    """

    images: Dataset
    captions: pa.ChunkedArray
    keys: list[str]
    splits: list[str | None]


@dataclass(frozen=True)
class SourceReader:
    """Reads a source of any kind.

    Attributes:
        image_column: the column with paths, bytes or pictures; None to find it.
        caption_column: the column with captions; None to find it.
        image_root: the folder that paths are relative to; None for that of the table.
        skipped: takes rows that cannot be parsed.
    """

    image_column: str | None
    caption_column: str | None
    image_root: Path | None
    skipped: Skipped

    def read(self, source: str | Path) -> RawPairs:
        """Read a source.

        Args:
            source: a path, or a Hub data set's id.

        Returns:
            Its rows, in order.

        Raises:
            ValueError: there is no such source, it has no pairs, or its columns are not known.
        """
        path = Path(source).expanduser()
        if self.image_root is not None and not self.image_root.is_dir():
            raise ValueError(f"image_root {self.image_root} is not a folder.")
        if path.is_dir():
            return self._read_folder(path)
        if path.exists():
            return self._read_table(path, None, base=None)
        is_hub_id = isinstance(source, str) and HUB_ID.fullmatch(source) and path.suffix not in TABLE_SUFFIXES
        if not is_hub_id or source.startswith("."):  # type: ignore[union-attr]
            raise ValueError(f"{source} does not exist. Name a folder, a table, or a Hub data set as owner/name.")
        try:
            loaded = datasets.load_dataset(str(source))
        except Exception as error:  # of a dozen kinds, from three packages
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ValueError(f"{source} is no local path and cannot be loaded from the Hub: {reason}.") from error
        return self._from_splits(loaded, str(source), folder=Path())

    def _read_folder(self, folder: Path) -> RawPairs:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return self._from_splits(datasets.load_from_disk(str(folder)), str(folder), folder)
        tables = _find_tables(folder)
        if not tables:
            find_images(folder)  # says so if there are none
            raise ValueError(
                f"{folder} has pictures but no captions; add metadata.jsonl with a line "
                '{"file_name": "a.jpg", "caption": "a dog"} for each.'
            )
        splits = [_split_of(table.relative_to(folder)) for table in tables]
        if any(splits) and not all(splits):
            left_out = [str(table.relative_to(folder)) for table, split in zip(tables, splits, strict=True) if not split]
            logger.warning("%s: left out %s, which names no split", folder, ", ".join(left_out))
        parts = [
            self._read_table(table, split, base=folder)
            for table, split in zip(tables, splits, strict=True)
            if split or not any(splits)
        ]
        return _concatenate(parts)

    def _read_table(self, table: Path, split: str | None, base: Path | None) -> RawPairs:
        if table.suffix.lower() != ".parquet":
            return self._from_rows(read_rows(table, self.skipped), str(table), table.parent, base, split)
        try:
            dataset = datasets.load_dataset("parquet", data_files=[str(table)], split="train")
        except Exception as error:
            raise ValueError(f"{table} cannot be read as parquet: {str(error).splitlines()[0]}") from error
        return self._from_dataset(dataset, str(table), table.parent, base, split)

    def _from_splits(self, loaded: Dataset | DatasetDict, where: str, folder: Path) -> RawPairs:
        if isinstance(loaded, Dataset):
            return self._from_dataset(loaded, where, folder, None, None)
        splits = {name: _split_of(Path(name)) for name in loaded}
        known = {name: split for name, split in splits.items() if split}
        if len(loaded) > 1 and len(known) < len(loaded):
            logger.warning("%s: left out %s, which name no split", where, ", ".join(splits.keys() - known.keys()))
        if len(loaded) > 1 and not known:
            raise ValueError(f"{where} has the splits {', '.join(loaded)}; one must be named train.")
        chosen = known or splits
        if len(chosen) == 1 and "split" in map(str.lower, loaded[next(iter(chosen))].column_names):
            chosen = dict.fromkeys(chosen)  # all rows are under one name, and the column tells them apart
        return _concatenate(
            [self._from_dataset(loaded[name], where, folder, None, split) for name, split in chosen.items()]
        )

    def _from_rows(
        self, rows: Iterator[dict[str, Any]], where: str, folder: Path, base: Path | None, split: str | None
    ) -> RawPairs:
        head = list(itertools.islice(rows, NUM_SAMPLED))
        if not head:
            raise ValueError(f"{where} has no rows.")
        names = list(dict.fromkeys(name for row in head for name in row))
        image = _find_column(names, self.image_column, IMAGE_COLUMNS, "image", where)
        caption = _find_column(names, self.caption_column, CAPTION_COLUMNS, "caption", where)
        split_column = None if split else _find_named(names, ("split",))
        parts = [
            (
                [_path_of(row.get(image)) for row in batch],
                _to_lists(row.get(caption) for row in batch),
                [_split_named(row.get(split_column), where) if split_column else split for row in batch],
            )
            for batch in _batches(itertools.chain(head, rows), BATCH_SIZE)
        ]
        paths, captions, splits = zip(*parts, strict=True)
        images, keys = self._locate(list(itertools.chain(*paths)), where, folder, base)
        return RawPairs(images, pa.chunked_array(captions), keys, list(itertools.chain(*splits)))

    def _from_dataset(
        self, dataset: Dataset, where: str, folder: Path, base: Path | None, split: str | None
    ) -> RawPairs:
        if not len(dataset):
            raise ValueError(f"{where} has no rows.")
        features = dataset.features
        pictures = [name for name, feature in features.items() if _holds_pictures(feature)]
        texts = [name for name, feature in features.items() if feature in (Value("string"), Value("large_string"))]
        image = self.image_column
        if image is None and len(pictures) == 1:
            image = pictures[0]
        image = _find_column(dataset.column_names, image, IMAGE_COLUMNS, "image", where, pictures or texts)
        others = [name for name in dataset.column_names if name != image]
        caption = _find_column(dataset.column_names, self.caption_column, CAPTION_COLUMNS, "caption", where, others)
        batches = dataset.select_columns([caption]).iter(BATCH_SIZE)
        captions = pa.chunked_array([_to_lists(batch[caption]) for batch in batches])

        split_column = None if split else _find_named(dataset.column_names, ("split",))
        splits: list[str | None] = [split] * len(dataset)
        if split_column:
            to_name = getattr(features[split_column], "int2str", lambda value: value)  # of a ClassLabel
            splits = [_split_named(to_name(value), where) for value in dataset[split_column]]

        if image in texts:
            images, keys = self._locate([_path_of(path) for path in dataset[image]], where, folder, base)
        elif image in pictures:
            images = dataset.select_columns([image]).cast_column(image, Image(decode=False))
            images = images if image == "image" else images.rename_column(image, "image")
            keys = _hash_pictures(images)
            if not any(keys):  # paths only
                paths = [row["path"] if row else None for row in images["image"]]
                images, keys = self._locate(paths, where, folder, base)
        else:
            raise ValueError(f"{where}: column {image!r} holds neither pictures, bytes nor paths but {features[image]}.")
        return RawPairs(images, captions, [key or f"{where} row {i}" for i, key in enumerate(keys, 1)], splits)

    def _locate(
        self, paths: Sequence[str | None], where: str, folder: Path, base: Path | None
    ) -> tuple[Dataset, list[str]]:
        """Make paths whole, and keys of them: relative, so that a data set splits alike wherever it lies."""
        root = self.image_root or _find_root([path for path in paths[:NUM_SAMPLED] if path], folder)
        root = root.absolute()
        prefix = os.path.join((self.image_root or base or root).absolute(), "")
        full = [path and (path if "://" in path else os.path.normpath(os.path.join(root, path))) for path in paths]
        keys = [path.removeprefix(prefix) if path else f"{where} row {i}" for i, path in enumerate(full, 1)]
        column = pa.StructArray.from_arrays(
            [pa.nulls(len(full), pa.binary()), pa.array(full, pa.string())], names=["bytes", "path"]
        )
        info = datasets.DatasetInfo(features=Features({"image": Image(decode=False)}))
        table = InMemoryTable(pa.table({"image": column}))
        return Dataset(table, info=info, fingerprint=os.urandom(8).hex()), keys


def _find_tables(folder: Path) -> list[Path]:
    """List the tables of a folder: `metadata.*` wherever they lie, else data files, else the one token file."""
    found = [
        Path(parent, name)
        for parent, folders, files in os.walk(folder)
        if not folders.sort() and "/." not in Path(parent).relative_to(folder).as_posix().join("//")
        for name in sorted(files)
        if not name.startswith(".") and name.lower().endswith((*TABLE_SUFFIXES, *TOKEN_SUFFIXES))
    ]
    metadata = [path for path in found if path.stem == "metadata" and path.suffix.lower() in TABLE_SUFFIXES]
    tables = [path for path in found if path.suffix.lower() in TABLE_SUFFIXES]
    if metadata or tables:
        return metadata or tables
    tokens = [path for path in found if is_token_file(path)]
    if len(tokens) > 1:
        raise ValueError(f"{folder} has several caption files ({', '.join(map(str, tokens))}); name one of them.")
    return tokens
