"""Read pairs from the Hub, folders, tables and token files, all into the same raw rows.

Text is read by `tables`, because the readers of `datasets` stop at the first odd row, turn a missing caption into
"None", and leave a copy in the cache. Sources that hold images (parquet, saved data sets, the Hub) are read by
`datasets`, which leaves the images on disk.
"""

import hashlib
import itertools
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Image, Value
from datasets.table import InMemoryTable
from tqdm.auto import tqdm

from clipmini.names import TABLE_SUFFIXES, TOKEN_SUFFIXES, first_sentence, locate

from .images import Skipped, find_images, walk_files
from .tables import NoPairsError, caption_texts, is_token_file, read_rows, valid_unicode

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
SPLITS = {
    # restval: COCO validation images that Karpathy's split adds to training
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
TEXT_TYPES = (Value("string"), Value("large_string"))
BINARY_TYPES = (Value("binary"), Value("large_binary"))
NUM_SAMPLED = 100  # rows that columns and the folder of the images are found from


@dataclass
class RawPairs:
    """Rows as the source has them; an image may have several.

    Attributes:
        images: the column `image`, not decoded.
        captions: a list of texts per row; null where a caption is empty or not a text.
        keys: the identity of each row's image: its path, relative where possible, or a hash of its bytes.
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
        skipped: collects rows that cannot be parsed.
        needs_captions: refuse a source without captions; otherwise its images have none.
    """

    image_column: str | None
    caption_column: str | None
    image_root: Path | None
    skipped: Skipped
    needs_captions: bool = True

    def read(self, source: str | Path) -> RawPairs:
        """Read the rows of a source, a path or the id of a data set on the Hub, in order.

        Raises:
            ValueError: the source does not exist, has no pairs, or its columns cannot be found.
        """
        located = locate(source, "a folder or a table", "dataset")
        path = Path(located)
        if self.image_root is not None and not self.image_root.is_dir():
            raise ValueError(f"image_root {self.image_root} is not a folder; name the folder that paths start from.")
        if path.is_dir():
            return self._read_folder(path)
        if path.exists():
            return self._read_table(path, split=None, base=None)
        return self._from_splits(load_from_hub(located), located, folder=Path())

    def _read_folder(self, folder: Path) -> RawPairs:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            try:
                saved = datasets.load_from_disk(str(folder))
            except Exception as error:
                raise ValueError(f"{folder} cannot be read as a saved data set: {first_sentence(error)}") from error
            if isinstance(saved, Dataset):
                return self._from_columns(saved, str(folder), folder)
            return self._from_splits(saved, str(folder), folder)
        tables = find_tables(folder)
        if not tables:
            find_images(folder)  # raises an error if there are none
            raise ValueError(
                f"{folder} has images but no captions; add metadata.jsonl with a line "
                '{"file_name": "a.jpg", "caption": "a dog"} for each.'
            )
        splits = {table: _split_in(table.relative_to(folder)) for table in tables}
        if any(splits.values()):
            left_out = [str(table) for table, split in splits.items() if split is None]
            if left_out:
                logger.warning("left out %s: named after no split, unlike others in the folder", ", ".join(left_out))
            splits = {table: split for table, split in splits.items() if split}
        return self._read_tables(splits, folder)

    def _read_tables(self, splits: dict[Path, str | None], folder: Path) -> RawPairs:
        """Read a folder's tables; leave out one without pairs, unless it is named after a split or all are like it."""
        parts: dict[Path, RawPairs] = {}
        errors: list[NoPairsError] = []
        for table, split in splits.items():
            try:
                parts[table] = self._read_table(table, split, base=folder)
            except NoPairsError as error:
                if split:
                    raise
                errors.append(error)
        if not parts:
            raise errors[0]
        for left_out in errors:
            logger.warning("left out %s", left_out)
        _refuse_copies(parts)
        return _concatenate(list(parts.values()))

    def _read_table(self, table: Path, split: str | None, base: Path | None) -> RawPairs:
        if table.suffix.lower() != ".parquet":
            rows = read_rows(table, self.skipped)
            sample = list(itertools.islice(rows, NUM_SAMPLED))
            columns: dict[str, list[Any]] = {name: [] for row in sample for name in row}
            usual = (*IMAGE_COLUMNS, *CAPTION_COLUMNS, "split")
            chosen = (self.image_column, self.caption_column)
            wanted = {name for name in columns if name in chosen or _find_named([name], usual)}
            for row in itertools.chain(sample, rows):
                for name, values in columns.items():
                    values.append(row.get(name) if name in wanted else None)  # other columns may be long
            return self._from_columns(columns, str(table), table.parent, split, base)
        try:
            dataset = Dataset.from_parquet(str(table))  # `load_dataset` would also report the download to a server
        except Exception as error:
            raise ValueError(f"{table} cannot be read as parquet: {first_sentence(error)}") from error
        return self._from_columns(dataset, str(table), table.parent, split, base)

    def _from_splits(self, loaded: DatasetDict, name: str, folder: Path) -> RawPairs:
        splits = {key: _split_in(Path(key)) for key in loaded}
        if len(splits) == 1:
            ((key, split),) = splits.items()
            # The name of a single split says little where a column assigns rows to splits, as in copies of Flickr30k.
            has_column = _find_named(loaded[key].column_names, ("split",)) is not None
            return self._from_columns(loaded[key], name, folder, None if has_column else split)
        left_out = [key for key, split in splits.items() if split is None]
        if len(left_out) == len(splits):
            raise ValueError(f"{name} has the splits {', '.join(splits)}; none is named train, validation or test.")
        if left_out:
            logger.warning("%s: left out the splits %s, which are not train, validation or test", name, left_out)
        named = {key: split for key, split in splits.items() if split}
        return _concatenate(
            [self._from_columns(loaded[key], f"{name} {key}", folder, split) for key, split in named.items()]
        )

    def _from_columns(
        self,
        columns: Dataset | dict[str, list[Any]],
        name: str,
        folder: Path,
        split: str | None = None,
        base: Path | None = None,
    ) -> RawPairs:
        """Convert the columns of a data set, or of a table that `tables` has read, to pairs."""
        features: Mapping[str, Any] = columns.features if isinstance(columns, Dataset) else dict.fromkeys(columns)
        if not features or not len(columns[next(iter(features))]):
            raise NoPairsError(f"{name} has no rows.")
        image = find_image_column(features, self.image_column, name)
        others = [column for column in features if column != image]
        if self.needs_captions or _find_named(others, CAPTION_COLUMNS):
            caption = find_column(others, self.caption_column, CAPTION_COLUMNS, "caption", name)
            texts = pa.array((caption_texts(value) for value in columns[caption][:]), pa.list_(pa.string()))
        else:
            texts = pa.nulls(len(columns[image]), pa.list_(pa.string()))
        split_column = None if split else _find_named(features, ("split",))
        splits: list[str | None] = [split] * len(texts)
        if split_column:
            to_name = getattr(features[split_column], "int2str", lambda value: value)  # of a ClassLabel
            splits = [_split_named(None if value is None else to_name(value), name) for value in columns[split_column]]

        if features[image] in (None, *TEXT_TYPES):
            images, keys = self._locate([_path_in(path) for path in columns[image]], name, folder, base)
        elif isinstance(columns, Dataset) and (_is_image(features[image]) or features[image] in BINARY_TYPES):
            images = columns.select_columns([image]).cast_column(image, Image(decode=False))
            images = images.rename_columns({image: "image"})
            hashes = _hash_images(images)
            if any(hashes):
                keys = [digest or f"{name} row {number}" for number, digest in enumerate(hashes, 1)]
            else:  # only paths
                images, keys = self._locate([_path_in(row) for row in images["image"]], name, folder, base)
        else:
            raise ValueError(
                f"{name}: column {image!r} is {features[image]}, neither images nor bytes nor paths; set image_column "
                "to one that is."
            )
        return RawPairs(images, pa.chunked_array([texts]), keys, splits)

    def _locate(
        self, paths: Sequence[str | None], name: str, folder: Path, base: Path | None
    ) -> tuple[Dataset, list[str]]:
        """Return absolute paths, and relative ones as keys, so that a data set is split alike wherever it lies."""
        root = (self.image_root or _find_root([path for path in paths[:NUM_SAMPLED] if path], folder)).absolute()
        prefix = os.path.join((self.image_root or base or root).absolute(), "")
        full = [path and (path if "://" in path else os.path.normpath(os.path.join(root, path))) for path in paths]
        keys = [path.removeprefix(prefix) if path else f"{name} row {number}" for number, path in enumerate(full, 1)]
        structs = pa.StructArray.from_arrays(
            [pa.nulls(len(full), pa.binary()), pa.array(full, pa.string())], ["bytes", "path"]
        )
        # Without a fingerprint, `datasets` would hash all paths.
        info = datasets.DatasetInfo(features=Features({"image": Image(decode=False)}))
        images = Dataset(InMemoryTable.from_pydict({"image": structs}), info=info, fingerprint=os.urandom(8).hex())
        return images, keys


def load_from_hub(name: str, config_name: str | None = None) -> DatasetDict:
    """Load all splits of a data set on the Hub.

    Raises:
        ValueError: it cannot be loaded; the message says why.
    """
    try:
        return datasets.load_dataset(name, config_name)
    except Exception as error:  # of a dozen kinds, from three packages
        reason = first_sentence(error)
        raise ValueError(
            f"The data set {name} is no folder here, and loading it from the Hub failed: {reason}. Name a folder or a "
            "table here; offline:photos needs no Hub."
        ) from error


def find_tables(folder: Path) -> list[Path]:
    """Find a folder's tables: `metadata.*` in any sub-folder; if none, data files; if none, the only token file.

    Raises:
        ValueError: there are several token files.
    """
    found = list(walk_files(folder, TABLE_SUFFIXES + TOKEN_SUFFIXES))
    tables = [path for path in found if path.suffix.lower() in TABLE_SUFFIXES]
    metadata = [path for path in tables if path.stem == "metadata"]
    data_folders = {"data", *SPLITS}
    data_files = [path for path in tables if data_folders.issuperset(path.relative_to(folder).parts[:-1])]
    if metadata or data_files:
        return metadata or data_files
    tokens = [path for path in found if path.suffix.lower() in TOKEN_SUFFIXES and is_token_file(path)]
    if len(tokens) > 1:
        raise ValueError(f"{folder} has several caption files, {', '.join(map(str, tokens))}; name one of them.")
    return tokens


def _refuse_copies(tables: Iterable[Path]) -> None:
    """Raise if there is one table in two formats, which would duplicate every caption."""
    names: dict[Path, str] = {}
    for table in tables:
        other = names.setdefault(table.with_suffix(""), table.name)
        if other != table.name:
            raise ValueError(
                f"{table.parent} has both {other} and {table.name}, which may hold the same captions; remove one."
            )


def _find_root(names: Sequence[str], folder: Path) -> Path:
    """Find the folder that holds the images: the given one, or one up to two levels below it."""
    for level in ([folder], folder.glob("*/"), folder.glob("*/*/")):
        for candidate in sorted(level):
            if any(os.path.isfile(candidate / name) for name in names[:10]):
                return candidate
    return folder


def _split_in(path: Path) -> str | None:
    """Find the split that a file or one of its folders is named after.

    One word of a file's name is enough, as in train-00000-of-00002.parquet; a folder's name must match as a whole.
    Either may end in a year, as COCO's do.
    """
    for word in (*re.split("[-_.]", path.name), *reversed(path.parts[:-1])):
        split = SPLITS.get(word.lower().rstrip("0123456789"))
        if split:
            return split
    return None


def _split_named(value: Any, source: str) -> str:
    name = "" if value is None else str(value).strip().lower()
    split = SPLITS.get(name or "train")  # blank means train, as where a source names no splits
    if split is None:
        raise ValueError(f"{source}: split {value!r} is not known; use one of {', '.join(SPLITS)}.")
    return split


def _find_named(columns: Iterable[str], usual: Sequence[str]) -> str | None:
    by_name = {re.sub(r"[\s-]+", "_", column.strip().lower()): column for column in columns}
    return next((by_name[name] for name in usual if name in by_name), None)


def find_column(
    columns: Collection[str], wanted: str | None, usual: Sequence[str], kind: str, source: str | Path
) -> str:
    """Find a column by its exact name, if one is wanted, or else by usual names, likeliest first.

    Raises:
        NoPairsError: there is no such column; the message lists those that there are.
    """
    found = wanted or _find_named(columns, usual)
    if found is None or found not in columns:
        missing = f"column {wanted!r}" if wanted else f"{kind} column by any usual name"
        names = ", ".join(map(repr, columns))
        raise NoPairsError(f"{source} has no {missing}; set {kind}_column to one of its columns: {names}.")
    return found


def _is_image(feature: Any) -> bool:
    return isinstance(feature, Image) or (isinstance(feature, dict) and "bytes" in feature)


def find_image_column(features: Mapping[str, Any], wanted: str | None, source: str | Path) -> str:
    """Find the column of images: the one that is wanted; or the only one of their type, or of bytes; or by its name.

    Raises:
        NoPairsError: as in `find_column`.
    """
    images = [name for name, feature in features.items() if _is_image(feature)]
    binaries = [name for name, feature in features.items() if feature in BINARY_TYPES]
    if wanted is None and len(images) == 1:
        wanted = images[0]
    elif wanted is None and images:
        wanted = _find_named(images, IMAGE_COLUMNS)
    elif wanted is None and len(binaries) == 1 and _find_named(features, IMAGE_COLUMNS) is None:
        wanted = binaries[0]
    return find_column(features, wanted, IMAGE_COLUMNS, "image", source)


def _path_in(value: Any) -> str | None:
    """Convert a value of an image column to a path; None if there is none."""
    if isinstance(value, dict):
        value = value.get("path")
    if value is None:
        return None
    return valid_unicode(str(value).strip()) or None


def _hash_images(images: Dataset) -> list[str | None]:
    """Hash each image's bytes; None for an image without bytes."""
    hashes: list[str | None] = []
    for image in tqdm(images["image"], desc="telling images apart", unit="image", leave=False):
        data = image and image["bytes"]
        hashes.append(None if data is None else hashlib.blake2b(data, digest_size=16).hexdigest())
    return hashes


def _concatenate(parts: Sequence[RawPairs]) -> RawPairs:
    return RawPairs(
        datasets.concatenate_datasets([part.images for part in parts]),
        pa.chunked_array([chunk for part in parts for chunk in part.captions.chunks]),
        [key for part in parts for key in part.keys],
        [split for part in parts for split in part.splits],
    )
