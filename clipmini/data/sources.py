"""Where pairs come from: the Hub, folders, tables and token files, all read into the same raw rows.

What is text goes through `tables`: the readers of `datasets` stop at the first odd row, take the caption "None" for a
missing one, and leave a copy in the cache. What holds images (parquet, saved data sets, the Hub) is read by
`datasets`, and stays on disk.
"""

import hashlib
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Image, Value
from datasets.table import InMemoryTable
from tqdm.auto import tqdm

from .images import Skipped, find_images, warn_of_unreadable
from .tables import NoPairsError, caption_texts, is_token_file, read_rows, valid_unicode

logger = logging.getLogger(__name__)

# Usual names, likeliest first.
IMAGE_COLUMNS = (
    *("image", "images", "img", "image", "photo", "image_path", "img_path", "image_file", "image_filename"),
    *("image_file_name", "image_name", "file_name", "filename", "filepath", "file_path", "path", "file"),
    *("jpg", "jpeg", "png", "webp"),
)
CAPTION_COLUMNS = (
    *("captions", "caption", "image_caption", "sentences", "sentence", "texts", "text", "descriptions", "description"),
    *("comments", "comment", "alt_text", "alt", "title", "raw", "txt"),
)
SPLITS = {
    **dict.fromkeys(
        ("train", "training", "restval"), "train"
    ),  # restval: Karpathy's spare images of COCO's validation
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
TABLE_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
TOKEN_SUFFIXES = (".txt", ".token")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
NUM_SAMPLED = 100  # rows that column names and the place of the images are found from
BATCH_SIZE = 10_000


@dataclass
class RawPairs:
    """Rows as the source has them; an image may have several.

    Attributes:
        images: one column, `image`, not decoded.
        captions: a list of texts per row; null where a caption is empty or no text.
        keys: what tells one image from another: its path, relative where it can be, or its bytes' hash.
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
        image_column: the column with paths, bytes or images; None to find it.
        caption_column: the column with captions; None to find it.
        image_root: the folder that paths are relative to; None for the table's.
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
            return self._read_table(path, split=None, base=None)
        if isinstance(source, Path) or not HUB_ID.fullmatch(source) or path.suffix in TABLE_SUFFIXES + TOKEN_SUFFIXES:
            raise ValueError(f"{source} does not exist. Name a folder, a table, or a Hub data set as owner/name.")
        try:
            loaded = datasets.load_dataset(source)
        except Exception as error:  # of a dozen kinds, from three packages
            raise ValueError(
                f"{source} is no local path, and loading it from the Hub failed: {_one_line(error)}"
            ) from error
        return self._from_loaded(loaded, source, folder=Path())

    def _read_folder(self, folder: Path) -> RawPairs:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            try:
                loaded = datasets.load_from_disk(str(folder))
            except Exception as error:
                raise ValueError(f"{folder} cannot be read as a saved data set: {_one_line(error)}") from error
            return self._from_loaded(loaded, str(folder), folder)
        tables = _find_tables(folder)
        if not tables:
            find_images(folder)  # raises if there are none
            raise ValueError(
                f"{folder} has images but no captions; add metadata.jsonl with a line "
                '{"file_name": "a.jpg", "caption": "a dog"} for each.'
            )
        splits = {table: _split_in(table.relative_to(folder)) for table in tables}
        if any(splits.values()):
            left_out = [str(table) for table, split in splits.items() if split is None]
            if left_out:
                logger.warning("left out %s: the name has no split, as others in the folder have", ", ".join(left_out))
            splits = {table: split for table, split in splits.items() if split}
        return self._read_tables(splits, folder)

    def _read_tables(self, splits: dict[Path, str | None], folder: Path) -> RawPairs:
        """Read a folder's tables; what holds no pairs is left out, unless it is named as a split or all there is."""
        parts: dict[Path, RawPairs] = {}
        faults: list[NoPairsError] = []
        for table, split in splits.items():
            try:
                parts[table] = self._read_table(table, split, base=folder)
            except NoPairsError as error:
                if split:
                    raise
                faults.append(error)
        if not parts:
            raise faults[0]
        for fault in faults:
            logger.warning("left out %s", fault)
        _refuse_copies(parts)
        return _concatenate(list(parts.values()))

    def _read_table(self, table: Path, split: str | None, base: Path | None) -> RawPairs:
        if table.suffix.lower() != ".parquet":
            return self._from_rows(read_rows(table, self.skipped), str(table), table.parent, split, base)
        try:
            dataset = datasets.load_dataset("parquet", data_files=[str(table)], split="train")
        except Exception as error:
            raise ValueError(f"{table} cannot be read as parquet: {_one_line(error)}") from error
        return self._from_dataset(dataset, str(table), table.parent, split, base)

    def _from_loaded(self, loaded: Dataset | DatasetDict, where: str, folder: Path) -> RawPairs:
        if isinstance(loaded, Dataset):
            return self._from_dataset(loaded, where, folder, None, None)
        splits = {name: _split_in(Path(name)) for name in loaded}
        if len(splits) == 1:
            ((name, split),) = splits.items()
            # A lone split says little where a column tells rows apart, as in Hub copies of Flickr30k.
            has_column = _find_named(loaded[name].column_names, ("split",)) is not None
            return self._from_dataset(loaded[name], where, folder, None if has_column else split, None)
        left_out = [name for name, split in splits.items() if split is None]
        if len(left_out) == len(splits):
            raise ValueError(f"{where} has the splits {', '.join(splits)}; none is named train, validation or test.")
        if left_out:
            logger.warning("%s: left out the splits %s, which are not train, validation or test", where, left_out)
        return _concatenate(
            [
                self._from_dataset(loaded[name], f"{where} {name}", folder, split, None)
                for name, split in splits.items()
                if split
            ]
        )

    def _from_rows(
        self, rows: Iterator[dict[str, Any]], where: str, folder: Path, split: str | None, base: Path | None
    ) -> RawPairs:
        head = list(itertools.islice(rows, NUM_SAMPLED))
        if not head:
            raise NoPairsError(f"{where} has no rows.")
        columns = list(dict.fromkeys(name for row in head for name in row))
        image = _find_column(columns, self.image_column, IMAGE_COLUMNS, "image", where)
        caption = _find_column(columns, self.caption_column, CAPTION_COLUMNS, "caption", where)
        split_column = None if split else _find_named(columns, ("split",))
        paths: list[str | None] = []
        splits: list[str | None] = []
        captions = []
        rows = itertools.chain(head, rows)
        while batch := list(itertools.islice(rows, BATCH_SIZE)):
            paths += [_path_in(row.get(image)) for row in batch]
            splits += [_split_named(row.get(split_column), where) if split_column else split for row in batch]
            captions.append(_caption_lists(row.get(caption) for row in batch))
        images, keys = self._locate(paths, where, folder, base)
        return RawPairs(images, pa.chunked_array(captions), keys, splits)

    def _from_dataset(
        self, dataset: Dataset, where: str, folder: Path, split: str | None, base: Path | None
    ) -> RawPairs:
        if len(dataset) == 0:
            raise NoPairsError(f"{where} has no rows.")
        columns, features = dataset.column_names, dataset.features
        image = self.image_column or _find_images(features)
        image = _find_column(columns, image, IMAGE_COLUMNS, "image", where)
        others = [name for name in columns if name != image]
        caption = _find_column(others, self.caption_column, CAPTION_COLUMNS, "caption", where)
        captions = [_caption_lists(batch[caption]) for batch in dataset.select_columns([caption]).iter(BATCH_SIZE)]
        split_column = None if split else _find_named(columns, ("split",))
        splits: list[str | None] = [split] * len(dataset)
        if split_column:
            to_name = getattr(features[split_column], "int2str", lambda value: value)  # of a ClassLabel
            splits = [
                _split_named(None if value is None else to_name(value), where) for value in dataset[split_column]
            ]

        if features[image] in (Value("string"), Value("large_string")):
            images, keys = self._locate([_path_in(path) for path in dataset[image]], where, folder, base)
        elif _is_image(features[image]) or features[image] in (Value("binary"), Value("large_binary")):
            images = dataset.select_columns([image]).cast_column(image, Image(decode=False))
            images = images if image == "image" else images.rename_column(image, "image")
            hashes = _hash_images(images)
            if any(hashes):
                keys = [digest or f"{where} row {number}" for number, digest in enumerate(hashes, 1)]
            else:  # images that lie elsewhere
                images, keys = self._locate([_path_in(row) for row in images["image"]], where, folder, base)
        else:
            raise ValueError(f"{where}: column {image!r} is {features[image]}, neither images nor bytes nor paths.")
        return RawPairs(images, pa.chunked_array(captions), keys, splits)

    def _locate(
        self, paths: Sequence[str | None], where: str, folder: Path, base: Path | None
    ) -> tuple[Dataset, list[str]]:
        """Make paths absolute, and keys of them relative, so that a data set splits alike wherever it lies."""
        root = (self.image_root or _find_root([path for path in paths[:NUM_SAMPLED] if path], folder)).absolute()
        prefix = os.path.join((self.image_root or base or root).absolute(), "")
        full = [path and (path if "://" in path else os.path.normpath(os.path.join(root, path))) for path in paths]
        keys = [path.removeprefix(prefix) if path else f"{where} row {number}" for number, path in enumerate(full, 1)]
        structs = pa.StructArray.from_arrays(
            [pa.nulls(len(full), pa.binary()), pa.array(full, pa.string())], ["bytes", "path"]
        )
        info = datasets.DatasetInfo(features=Features({"image": Image(decode=False)}))
        images = Dataset(InMemoryTable.from_pydict({"image": structs}), info=info, fingerprint=os.urandom(8).hex())
        return images, keys


def _find_tables(folder: Path) -> list[Path]:
    """List a folder's tables: `metadata.*` in any sub-folder, else data files, else the one token file."""
    found = []
    for parent, folders, files in os.walk(folder, onerror=warn_of_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        suffixes = (*TABLE_SUFFIXES, *TOKEN_SUFFIXES)
        names = [name for name in files if not name.startswith(".") and name.lower().endswith(suffixes)]
        found += [Path(parent, name) for name in sorted(names)]
    tables = [path for path in found if path.suffix.lower() in TABLE_SUFFIXES]
    metadata = [path for path in tables if path.stem == "metadata"]
    known_folders = {"data", *SPLITS}
    data_files = [path for path in tables if known_folders.issuperset(path.relative_to(folder).parts[:-1])]
    if metadata or data_files:
        return metadata or data_files
    tokens = [path for path in found if path.suffix.lower() in TOKEN_SUFFIXES and is_token_file(path)]
    if len(tokens) > 1:
        raise ValueError(f"{folder} has several caption files, {', '.join(map(str, tokens))}; name one of them.")
    return tokens


def _refuse_copies(tables: Iterable[Path]) -> None:
    """Refuse one table in two formats, which would give every caption twice."""
    names: dict[Path, str] = {}
    for table in tables:
        other = names.setdefault(table.with_suffix(""), table.name)
        if other != table.name:
            raise ValueError(
                f"{table.parent} has both {other} and {table.name}, which may hold the same captions; remove one."
            )


def _find_root(names: Sequence[str], folder: Path) -> Path:
    """Find the folder that holds the images: the given one, or one up to two levels below it."""
    for depth in (".", "*/", "*/*/"):
        for candidate in [folder] if depth == "." else sorted(folder.glob(depth)):
            if any(os.path.isfile(candidate / name) for name in names[:10]):
                return candidate
    return folder


def _split_in(path: Path) -> str | None:
    """Find the split that a file or one of its folders is named after.

    Of a file's name one word will do, as in train-00000-of-00002.parquet; of a folder's it takes the whole. Either may
    end in a year, as COCO's do.
    """
    for word in (*re.split("[-_.]", path.name), *reversed(path.parts[:-1])):
        split = SPLITS.get(word.lower().rstrip("0123456789"))
        if split:
            return split
    return None


def _split_named(value: Any, where: str) -> str:
    name = "" if value is None else str(value).strip().lower()
    split = SPLITS.get(name or "train")  # as for every row of a source that does not say
    if split is None:
        raise ValueError(f"{where}: split {value!r} is not known; use one of {', '.join(SPLITS)}.")
    return split


def _find_named(columns: Iterable[str], usual: Sequence[str]) -> str | None:
    by_name = {re.sub(r"[\s-]+", "_", column.strip().lower()): column for column in columns}
    return next((by_name[name] for name in usual if name in by_name), None)


def _find_column(columns: Sequence[str], wanted: str | None, usual: Sequence[str], kind: str, where: str) -> str:
    found = wanted or _find_named(columns, usual)
    if found is None or found not in columns:
        fault = f"column {wanted!r}" if wanted else f"{kind} column by any usual name"
        names = ", ".join(map(repr, columns))
        raise NoPairsError(f"{where} has no {fault}; set {kind}_column to one of its columns: {names}.")
    return found


def _is_image(feature: Any) -> bool:
    return isinstance(feature, Image) or (isinstance(feature, dict) and "bytes" in feature)


def _find_images(features: Features) -> str | None:
    """Find the image column by type, where that is certain; what is left is found by name."""
    images = [name for name, feature in features.items() if _is_image(feature)]
    if images:
        return images[0] if len(images) == 1 else _find_named(images, IMAGE_COLUMNS)
    binaries = [name for name, feature in features.items() if feature in (Value("binary"), Value("large_binary"))]
    return binaries[0] if len(binaries) == 1 and _find_named(features, IMAGE_COLUMNS) is None else None


def _path_in(value: Any) -> str | None:
    """Read an image column's value as a path; None where there is none."""
    if isinstance(value, dict):
        value = value.get("path")
    if value is None:
        return None
    return valid_unicode(str(value).strip()) or None


def _caption_lists(values: Iterable[Any]) -> pa.ListArray:
    return pa.array((caption_texts(value) for value in values), pa.list_(pa.string()))


def _hash_images(images: Dataset) -> list[str | None]:
    """Hash each image's bytes where they lie, without making Python objects of them; None where there are none."""
    hashes: list[str | None] = []
    with tqdm(total=len(images), desc="telling images apart", unit="image", leave=False) as progress:
        for table in images.with_format("arrow").iter(100):
            for chunk in table["image"].chunks:
                for value in chunk.field("bytes"):
                    buffer = value.as_buffer()
                    hashes.append(hashlib.blake2b(buffer, digest_size=16).hexdigest() if buffer is not None else None)
                progress.update(len(chunk))
    return hashes


def _concatenate(parts: Sequence[RawPairs]) -> RawPairs:
    return RawPairs(
        datasets.concatenate_datasets([part.images for part in parts]),
        pa.chunked_array([chunk for part in parts for chunk in part.captions.chunks]),
        [key for part in parts for key in part.keys],
        [split for part in parts for split in part.splits],
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."
