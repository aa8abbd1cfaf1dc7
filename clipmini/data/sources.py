"""Read pairs from the Hub, folders, tables and archives, all into the same raw rows, and say what was found.

`tables` reads one table, `columns` chooses among its columns and converts them, `places` finds the images that it
names, `archives` unpacks. Here it is decided which files of a source are its tables, and where its splits come from.
Nothing is chosen in silence: `Findings` has it all. Sources that hold images (parquet, saved data sets, the Hub) are
read by `datasets`, which leaves the images on disk.
"""

import hashlib
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Image
from fsspec.utils import infer_compression
from huggingface_hub import DatasetCard
from tqdm.auto import tqdm

from clipmini.names import TABLE_SUFFIXES, TOKEN_SUFFIXES, first_sentence, locate

from .archives import ARCHIVE_SUFFIXES, is_archive, unpack
from .columns import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    as_array,
    as_images,
    captions_in,
    decode_base64,
    find_captions,
    find_column,
    find_image_column,
    find_named,
    is_image_type,
    join_captions,
    names_in,
    values_of,
)
from .images import IMAGE_SUFFIXES, MAX_NAMED, Skipped, find_images, join_names, shorten, walk_files
from .places import FOLDER_COLUMNS, find_places
from .tables import (
    BINARY_TYPES,
    SPLITS,
    TOKEN_LINE,
    NoPairsError,
    Table,
    is_base64,
    is_image_name,
    read_caption_files,
    read_table,
    stems,
)

logger = logging.getLogger(__name__)

SPLIT_COLUMNS = ("split", "data_split", "subset", "partition", "set_name", "set")
AUTO = "auto"
NUM_SAMPLED = 100  # rows that columns are found from
MAX_SHARED = 0.5  # of the images of a table that another has too: more, and they are copies or versions of each other
OTHER_CAPTIONS = re.compile(r"captions?_[a-z]{2}|[a-z]+_captions?")  # such as caption_en or short_caption
# In COCO's folder of annotations, beside those of captions.
COCO_OTHERS = ("instances_", "person_keypoints_", "stuff_", "panoptic_", "image_info_")
KNOWN_LAYOUTS = (
    "Add metadata.csv, whose first two lines may be `file_name,caption` and `a.jpg,a red fish`; or a.txt with the "
    "caption beside each a.jpg; or name a table (CSV, JSON, parquet, Excel) as the source. docs/data.md lists all "
    "layouts."
)


@dataclass
class FoundTable:
    """What is used of a table.

    Attributes:
        name: its path, relative to the source where it lies in it.
        num_rows: how many rows it has.
        image_column: where images come from.
        caption_columns: where captions come from.
        unread_columns: the others.
        notes: what was detected to read it, such as its encoding.
        folders: by folder, how many of its images are there; empty where the table holds the images themselves.
        num_missing: images that it names and that were found nowhere.
        splits: where its splits come from; "" where it has none.
    """

    name: str
    num_rows: int
    image_column: str
    caption_columns: list[str]
    unread_columns: list[str]
    notes: list[str]
    folders: dict[str, int] = field(default_factory=dict)
    num_missing: int = 0
    splits: str = ""


@dataclass
class Findings:
    """What was found in a source, and what of it is used.

    Attributes:
        source: as it was named.
        tables: what is used of each.
        passed_over: what is not used, and why.
        splits: where the splits come from.
        num_rows: rows of all tables.
        num_used: rows with an image that can be read and a caption.
    """

    source: str
    tables: list[FoundTable] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    splits: str = ""
    num_rows: int = 0
    num_used: int = 0

    def lines(self, is_public: bool = False) -> list[str]:
        """Return what is used in sentences; for the public, without the folders of this machine."""
        lines = []
        for table in self.tables[:MAX_NAMED]:
            name = Path(table.name).name if is_public else table.name
            notes = f" ({'; '.join(table.notes)})" if table.notes else ""
            captions = " and ".join(map(repr, table.caption_columns)) or "none"
            lines.append(
                f"{name}{notes}: {table.num_rows:,} rows, images in {table.image_column!r}, captions in {captions}"
                f"{f', splits in {table.splits}' if table.splits else ''}"
            )
            if table.unread_columns:
                lines.append(f"columns that are not read: {join_names(table.unread_columns)}")
        if len(self.tables) > MAX_NAMED:
            lines.append(f"and {len(self.tables) - MAX_NAMED:,} more tables")
        folders: Counter[str] = Counter()
        for table in self.tables if not is_public else ():
            folders.update(table.folders)
        named = folders.most_common(MAX_NAMED)
        lines += [f"{number:,} images in {folder}" for folder, number in named]
        if rest := len(folders) - len(named):
            lines.append(f"{folders.total() - sum(number for _, number in named):,} images in {rest:,} more folders")
        lines.append(f"splits: {self.splits}")
        lines.append(f"used: {self.num_used:,} of {self.num_rows:,} rows")
        return list(dict.fromkeys(lines))

    def to_dict(self) -> dict[str, Any]:
        """Return the findings, ready for JSON."""
        return asdict(self)


@dataclass
class RawPairs:
    """Rows as the source has them; an image may have several.

    Attributes:
        images: the column `image`, not decoded.
        captions: a list of texts per row; null where a caption is empty or not a text.
        keys: the identity of each row's image: its path, relative where possible, or a hash of its bytes.
        splits: "train", "validation", "test", or null where the source does not say.
    """

    images: Dataset
    captions: pa.ChunkedArray
    keys: pa.ChunkedArray
    splits: pa.ChunkedArray


class SourceReader:
    """Reads a source of any kind.

    Args:
        skipped: collects rows that cannot be parsed.
        image_column: the column with paths, bytes or images; None to find it.
        caption_column: the column with captions, or several; None to find them.
        image_root: the folder that paths are relative to; None to find it.
        split_column: the column that names splits; "auto" to find it; None to read no splits, whatever names them.
        config_name: the configuration to read of a data set that has several.
        needs_captions: refuse a source without captions; otherwise its images have none.

    Attributes:
        findings: what the last source was found to be.
    """

    def __init__(
        self,
        skipped: Skipped,
        *,
        image_column: str | None = None,
        caption_column: str | Sequence[str] | None = None,
        image_root: Path | None = None,
        split_column: str | None = AUTO,
        config_name: str | None = None,
        needs_captions: bool = True,
    ) -> None:
        self.skipped, self.image_column, self.image_root = skipped, image_column, image_root
        self.caption_columns = [caption_column] if isinstance(caption_column, str) else list(caption_column or ())
        self.split_column, self.config_name, self.needs_captions = split_column, config_name, needs_captions
        self.findings = Findings("")

    def read(self, source: str | Path) -> RawPairs:
        """Read the rows of a source, a path or the id of a data set on the Hub, in order.

        Raises:
            ValueError: the source does not exist, has no pairs, or its columns cannot be found.
        """
        located = locate(source, "a folder or a table", "dataset")
        path = Path(located)
        self.findings = Findings(str(source))
        if self.image_root is not None and not self.image_root.is_dir():
            raise ValueError(f"image_root {self.image_root} is not a folder; name the folder that paths start from.")
        if path.is_dir():
            return self._read_folder(path)
        if path.exists():
            if self.config_name is not None:
                raise ValueError(
                    f"config_name={self.config_name!r} has no meaning for the file {source}; leave it out."
                )
            return self._read_archive(path) if is_archive(path) else self._read_table(path)
        return self._from_splits(load_from_hub(located, self.config_name), located, Path())

    def _read_folder(self, folder: Path, split: str | None = None) -> RawPairs:
        """Read the first of these that a folder has: a saved data set, tables, shards, files of captions."""
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            try:
                saved = datasets.load_from_disk(str(folder))
            except Exception as error:
                raise ValueError(f"{folder} cannot be read as a saved data set: {first_sentence(error)}") from error
            return self._from_splits(saved if isinstance(saved, DatasetDict) else {"": saved}, str(folder), folder)
        contents = _Contents.of(folder)
        parts, faults = self._read_groups(folder, contents.tables, split)
        for fault in faults if parts or contents.archives or contents.captions else ():
            self._pass_over(str(fault))
        if parts:
            if contents.archives:
                self._pass_over(f"{join_names(contents.archives)}: beside tables, archives are not unpacked")
            return _concatenate(parts)
        if contents.archives:
            return self._read_archives(folder, contents.archives)
        if contents.captions:
            table = read_caption_files(folder, contents.images, contents.captions, self.skipped)
            return self._from_columns(table, split, base=folder)
        if faults:
            raise faults[0]
        find_images(folder)  # raises an error if there are none
        suffixes = Counter(Path(name).suffix.lower() for _, _, names in os.walk(folder) for name in names)
        seen = join_names(f"{number:,} {suffix or 'without suffix'}" for suffix, number in suffixes.most_common())
        raise NoPairsError(
            f"{folder} has images but no captions in a layout that is known (files: {seen}). {KNOWN_LAYOUTS}"
        )

    def _read_groups(
        self, folder: Path, tables: Sequence[Path], split: str | None
    ) -> tuple[list[RawPairs], list[NoPairsError]]:
        """Read the tables of the only configuration that has pairs; return also why other tables have none."""
        found: dict[str, list[RawPairs]] = {}
        faults: list[NoPairsError] = []
        for name, group in self._group_tables(folder, tables).items():
            is_given = split or self.split_column is None
            parts = self._read_tables(dict.fromkeys(group, split) if is_given else group, folder, faults)
            if parts:
                found[name] = parts
            if found.get(""):
                break
        if len(found) > 1:
            raise ValueError(
                f"{folder} has tables of pairs in {join_names(found)}; choose one with config_name, such as "
                f"config_name={next(iter(found))}, or name a table."
            )
        return next(iter(found.values()), []), faults

    def _group_tables(self, folder: Path, tables: Sequence[Path]) -> dict[str, dict[Path, str | None]]:
        """Group a folder's tables by configuration, each with its split: "" for those of no special folder, first.

        Raises:
            ValueError: there are several configurations, and none is chosen.
        """
        groups = _declared_groups(folder, tables)
        is_declared = bool(groups)
        for table in () if is_declared else tables:
            path = table.relative_to(folder)
            special = [] if path.stem == "metadata" else [name for name in path.parts[:-1] if not _is_plain(name)]
            groups.setdefault("/".join(special), {})[table] = _split_in(path)
        if self.config_name is not None:
            if self.config_name not in groups:
                names = join_names(filter(None, groups)) or "none"
                raise ValueError(f"{folder} has no configuration {self.config_name!r}; it has {names}.")
            return {self.config_name: groups[self.config_name]}
        has_images = {table.suffix.lower() for table in tables} == {".parquet"}
        if len(groups) > 1 and "" not in groups and (is_declared or has_images):
            if "default" not in groups:
                first = next(iter(groups))
                raise ValueError(
                    f"{folder} has the configurations {join_names(groups)}; choose one with config_name={first}."
                )
            return {"default": groups["default"]}
        metadata = {table: split for table, split in groups.get("", {}).items() if table.stem == "metadata"}
        if metadata:
            groups[""] = metadata
        return dict(sorted(groups.items(), key=lambda group: group[0] != ""))

    def _read_tables(
        self, splits: Mapping[Path, str | None], folder: Path, faults: list[NoPairsError]
    ) -> list[RawPairs]:
        """Read those of some tables that have pairs; add to `faults` why others have none."""
        named = {table: split for table, split in splits.items() if split}
        parts, others = self._try_tables(named, folder)
        rest = {table: None for table in splits if table not in named}
        if not parts:
            parts, more = self._try_tables(rest, folder)
            others |= more
        elif rest:
            names = join_names(table.relative_to(folder) for table in rest)
            self._pass_over(f"{names}: named after no split, unlike others in the folder")
        for table, fault in others.items():
            split = splits[table]
            found = {splits[part] for part in parts}
            if split and any(found) and split not in found:  # it would be drawn at random
                raise NoPairsError(f"{fault} If there are no captions for {split}, move the table away.")
            faults.append(fault)
        for split in set(splits.values()):
            self._check_copies({table: raw for table, raw in parts.items() if splits[table] == split})
        return list(parts.values())

    def _try_tables(
        self, splits: Mapping[Path, str | None], folder: Path
    ) -> tuple[dict[Path, RawPairs], dict[Path, NoPairsError]]:
        parts: dict[Path, RawPairs] = {}
        faults: dict[Path, NoPairsError] = {}
        for table, split in splits.items():
            try:
                parts[table] = self._read_table(table, split, base=folder)
            except NoPairsError as error:
                faults[table] = error
        return parts, faults

    def _check_copies(self, parts: Mapping[Path, RawPairs]) -> None:
        """Raise if two tables of a split have the same images: they are copies, versions or languages of one."""
        unique = {table: raw.keys.unique() for table, raw in parts.items()}
        if len(pa.chunked_array(list(unique.values()), pa.string()).unique()) == sum(map(len, unique.values())):
            return
        for (one, keys), (other, others) in itertools.combinations(unique.items(), 2):
            if re.sub(r"\d+", "", one.name) == re.sub(r"\d+", "", other.name):  # shards
                continue
            num_shared = pc.sum(pc.is_in(keys, others)).as_py() or 0
            if num_shared > MAX_SHARED * min(len(keys), len(others)):
                raise ValueError(
                    f"{one} and {other.name} describe the same images ({num_shared:,}); name one of the two as the "
                    "source, or remove the other."
                )

    def _read_archives(self, folder: Path, archives: Sequence[Path]) -> RawPairs:
        """Read the shards of a WebDataset, or the only other archive of a folder."""
        others = [archive for archive in archives if archive.suffix.lower() == ".zip"]
        if others and len(archives) > 1:
            raise ValueError(
                f"{folder} has no table, but several archives: {join_names(archives)}; unpack them there."
            )
        return _concatenate([self._read_archive(archive, folder) for archive in archives])

    def _read_archive(self, archive: Path, folder: Path | None = None) -> RawPairs:
        unpacked = unpack(archive)
        num_before = len(self.findings.tables)
        raw = self._read_folder(unpacked, _split_in(archive.relative_to(folder)) if folder else None)
        for table in self.findings.tables[num_before:]:
            table.name = table.name.replace(str(unpacked), str(archive))
            table.folders = {name.replace(str(unpacked), str(archive)): n for name, n in table.folders.items()}
        if folder:  # shards may have equal names in them
            raw.keys = pc.binary_join_element_wise(archive.relative_to(folder).as_posix(), raw.keys, "/")
        return raw

    def _read_table(self, path: Path, split: str | None = None, base: Path | None = None) -> RawPairs:
        chosen = (self.image_column, self.split_column, *self.caption_columns)
        usual = (*IMAGE_COLUMNS, *SPLIT_COLUMNS, *FOLDER_COLUMNS)

        def is_wanted(name: str) -> bool:
            return name in chosen or bool(find_captions([name])) or find_named([name], usual) is not None

        table = read_table(path, self.skipped, is_wanted)
        raw = self._from_columns(table, split, base)
        has_splits = self.split_column is None or raw.splits.null_count < len(raw.splits)
        return raw if has_splits else self._split_by_lists(raw, path)

    def _split_by_lists(self, raw: RawPairs, table: Path) -> RawPairs:
        """Split pairs as the lists of images beside a table say, which Flickr8k and others have."""
        split_of = _read_lists(table)
        if not split_of:
            return raw
        stems = {os.path.splitext(name)[0]: split for name, split in split_of.items()}
        names = [os.path.basename(key) for key in raw.keys.to_pylist()]
        splits = pa.array([split_of.get(name) or stems.get(os.path.splitext(name)[0]) for name in names], pa.string())
        kept = pc.is_valid(splits)
        num_kept = pc.sum(kept).as_py()
        if num_kept * 2 < len(names):
            self._pass_over(f"lists of images beside {table.name}, which name only {num_kept:,} of its rows")
            return raw
        self.findings.tables[-1].splits = f"the lists {join_names(path.name for path, _ in _find_lists(table))}"
        if num_kept < len(names):
            self._pass_over(f"{len(names) - num_kept:,} rows whose images are in no list of a split")
        rows = pa.array(np.flatnonzero(kept.to_numpy(zero_copy_only=False)))
        return RawPairs(
            raw.images.select(rows.to_numpy()),
            raw.captions.take(rows),
            raw.keys.take(rows),
            pa.chunked_array([splits.take(rows)]),
        )

    def _from_splits(self, loaded: Mapping[str, Dataset], name: str, folder: Path) -> RawPairs:
        splits = {key: _split_in(Path(key)) for key in map(str, loaded)}
        if len(splits) == 1:
            ((key, split),) = splits.items()
            # The name of a single split says little where a column assigns rows to splits, as in copies of Flickr30k.
            has_column = find_named(loaded[key].column_names, ("split",)) is not None
            return self._from_columns(_as_table(loaded[key], folder / name), None if has_column else split)
        left_out = [key for key, split in splits.items() if split is None]
        if len(left_out) == len(splits):
            raise ValueError(f"{name} has the splits {', '.join(splits)}; none is named train, validation or test.")
        if left_out:
            self._pass_over(f"the splits {join_names(left_out)} of {name}, which are not train, validation or test")
        named = {key: split for key, split in splits.items() if split}
        return _concatenate(
            [
                self._from_columns(_as_table(loaded[key], folder / f"{name} {key}"), split)
                for key, split in named.items()
            ]
        )

    def _from_columns(self, table: Table, split: str | None, base: Path | None = None) -> RawPairs:
        """Convert the columns of a table to pairs."""
        columns, name = table.columns, str(table.path)
        features: Mapping[str, Any] = columns.features if isinstance(columns, Dataset) else dict.fromkeys(columns)
        num_rows = len(columns) if isinstance(columns, Dataset) else max(map(len, columns.values()), default=0)
        shown = dict.fromkeys(table.names)  # in errors, also those that were not wanted
        image = find_image_column(features, self.image_column, name, shown)
        others = [column for column in features if column != image]
        captions: list[str] = []
        if self.needs_captions or find_captions(others):
            captions = self._choose_captions(others, name, shown)
        if num_rows == 0:
            raise NoPairsError(f"{name} has no rows.")
        unread = [column for column in table.names if column not in (image, *captions)]
        is_below = base and table.path != base and table.path.is_relative_to(base)
        shown_name = str(table.path.relative_to(base) if base and is_below else table.path)
        found = FoundTable(shown_name, num_rows, image, captions, unread, table.notes)
        self.findings.tables.append(found)
        is_named = split is not None and self.split_column is not None
        splits = pa.repeat(split, num_rows) if is_named else self._read_splits(columns, features, found)
        images, keys = self._find_images(table, features[image], base, found, split)
        if splits.null_count == num_rows and self.split_column == AUTO:
            splits = self._split_by_folders(keys, found)
        texts = join_captions([captions_in(values_of(columns, column)) for column in captions], num_rows)
        return RawPairs(images, *(pa.chunked_array([column]) for column in (texts, keys, splits)))

    def _split_by_folders(self, keys: pa.Array, found: FoundTable) -> pa.Array:
        """Split images as the folders are called that they lie in, others are for training; nulls if all are alike."""
        folders = pc.replace_substring_regex(keys, r"/?[^/]*$", "").dictionary_encode()
        names = [_split_in(Path(folder), is_file=False) for folder in folders.dictionary.to_pylist()]
        if len(set(names)) < 2:
            return pa.nulls(len(keys), pa.string())
        found.splits = "the folders of the images"
        return pc.fill_null(pa.array(names, pa.string()).take(folders.indices), "train")

    def _find_images(
        self, table: Table, feature: Any, base: Path | None, found: FoundTable, split: str | None
    ) -> tuple[Dataset, pa.Array]:
        """Return the images of a table, and the key of each row's: a hash of its bytes, or else its path."""
        columns, image, name = table.columns, found.image_column, str(table.path)
        if isinstance(columns, Dataset) and (is_image_type(feature) or feature in BINARY_TYPES):
            images = columns.select_columns([image]).cast_column(image, Image(decode=False))
            images = images.rename_columns({image: "image"})
        else:
            names = names_in(values_of(columns, image))
            if names is None:
                kind = feature or getattr(as_array(values_of(columns, image)), "type", "of several types")
                raise ValueError(
                    f"{name}: column {image!r} is {kind}, neither images nor bytes nor paths; set image_column to one "
                    "that is."
                )
            if not is_base64(next((text for text in names[:NUM_SAMPLED].to_pylist() if text), None)):
                return self._find_files(names, table, base, found, split)
            found.notes.append("images as base64")
            images = as_images(pa.array(map(decode_base64, names.to_pylist()), pa.binary()), None)
        hashes = _hash_images(images)
        if not any(hashes):  # only paths
            paths = names_in([row and row["path"] for row in images["image"]])
            return self._find_files(paths, table, base, found, split)
        return images, pa.array([key or f"{name} row {number}" for number, key in enumerate(hashes, 1)], pa.string())

    def _find_files(
        self, names: pa.Array, table: Table, base: Path | None, found: FoundTable, split: str | None
    ) -> tuple[Dataset, pa.Array]:
        columns, path = table.columns, table.path
        folders = {}
        for usual in FOLDER_COLUMNS:
            column = find_named(table.names, [usual])
            values = as_array(values_of(columns, column)) if column and column != found.image_column else None
            if column and values is not None and pa.types.is_string(values.type):
                folders[column] = values
        folders |= {word: pa.repeat(word, len(names)) for word in SPLITS if split and SPLITS[word] == split}
        places = find_places(names, folders, path.parent if path.is_file() else path, base, self.image_root)
        found.folders, found.num_missing = places.folders, places.num_missing
        if places.note:
            self._pass_over(places.note)
        prefix = os.path.join(places.anchor, "")
        is_below = pc.starts_with(places.paths, prefix)
        keys = pc.if_else(is_below, pc.utf8_slice_codeunits(places.paths, len(prefix)), places.paths)
        if keys.null_count:
            keys = pc.coalesce(keys, pa.array([f"{path} row {number}" for number in range(1, len(names) + 1)]))
        return as_images(pa.nulls(len(names), pa.binary()), places.paths), keys

    def _choose_captions(self, columns: Sequence[str], name: str, shown: Mapping[str, None]) -> list[str]:
        for wanted in self.caption_columns:
            find_column(columns, wanted, CAPTION_COLUMNS, "caption", name, shown)
        if self.caption_columns:
            return list(dict.fromkeys(self.caption_columns))
        found = find_captions(columns) or [find_column(columns, None, CAPTION_COLUMNS, "caption", name, shown)]
        others = [column for column in shown if OTHER_CAPTIONS.fullmatch(column.lower()) and column not in found]
        if others and not any(
            "caption" in column.lower() for column in found
        ):  # a title beside caption_en, caption_de
            raise NoPairsError(
                f"{name} may have captions in {join_names(others)} or in {found[0]!r}; set caption_column to one, or "
                "to several."
            )
        return found

    def _read_splits(self, columns: Any, features: Mapping[str, Any], found: FoundTable) -> pa.Array:
        """Read the column of splits, where a blank means train; nulls if there is none."""
        num_rows = found.num_rows
        if self.split_column not in (AUTO, None) and self.split_column not in features:
            raise ValueError(
                f"{found.name} has no column {self.split_column!r}; set split_column to one of its columns."
            )
        usual = (
            () if self.split_column is None else SPLIT_COLUMNS if self.split_column == AUTO else (self.split_column,)
        )
        for column in (named for one in usual if (named := find_named(features, [one]))):
            to_name = getattr(features[column], "int2str", lambda value: value)  # of a ClassLabel
            cells = values_of(columns, column)
            cells = cells if isinstance(cells, list) else cells.to_pylist()
            texts = [None if cell is None else str(to_name(cell)).strip() or None for cell in cells]
            encoded = pa.array(texts, pa.string()).dictionary_encode()
            values = encoded.dictionary.to_pylist()
            unknown = [value for value in values if value.lower() not in SPLITS]
            if not unknown:
                found.splits = f"column {column!r}"
                named = pa.array([SPLITS[value.lower()] for value in values], pa.string()).take(encoded.indices)
                return pc.fill_null(named, "train")
            if self.split_column != AUTO or column == "split" or len(unknown) < len(values):
                raise ValueError(
                    f"{found.name}: split {shorten(repr(unknown[0]))} is not known; use one of {', '.join(SPLITS)}. "
                    "Set split_column to another column, or to null to have splits drawn at random."
                )
        return pa.nulls(num_rows, pa.string())

    def _pass_over(self, text: str) -> None:
        logger.warning("left out %s", text)
        self.findings.passed_over.append(text)


@dataclass(frozen=True)
class _Contents:
    """The files of a folder by what they may be."""

    images: list[Path]
    tables: list[Path]
    captions: list[Path]
    archives: list[Path]

    @classmethod
    def of(cls, folder: Path) -> "_Contents":
        suffixes = {
            *IMAGE_SUFFIXES,
            *TABLE_SUFFIXES,
            *TOKEN_SUFFIXES,
            *(name[name.rindex(".") :] for name in ARCHIVE_SUFFIXES),
        }
        images: list[Path] = []
        others: list[Path] = []
        for path in walk_files(folder, suffixes):
            (images if path.suffix.lower() in IMAGE_SUFFIXES else others).append(path)
        known = {stem for path in images for stem in stems(path, folder)}
        found = cls(images, [], [], [path for path in others if is_archive(path)])
        for path in others:
            suffix = path.suffix.lower()
            is_compressed = infer_compression(path.name) is not None
            inner = Path(path.stem).suffix.lower() if is_compressed else suffix  # of pairs.csv.gz
            if is_archive(path) or inner not in TABLE_SUFFIXES + TOKEN_SUFFIXES or not path.is_file():
                continue
            if path.name.startswith("~$"):  # which Excel holds while it edits a sheet
                continue
            if suffix in (".txt", ".caption", ".json") and not known.isdisjoint(stems(path, folder)):
                found.captions.append(path)
            elif suffix in TOKEN_SUFFIXES and not _is_text_table(path):
                continue
            elif not path.name.endswith("_stats.json"):  # of img2dataset
                found.tables.append(path)
        return cls(images, _without_variants(found.tables), found.captions, found.archives)


def _without_variants(tables: Sequence[Path]) -> list[Path]:
    """Leave out what COCO and Flickr8k have beside their captions: boxes, and captions of words without endings."""
    coco = {table.parent for table in tables if table.name.startswith("captions_")}
    lemmas = {table for table in tables if ".lemma." in table.name}
    tables = [table for table in tables if table not in lemmas or len(lemmas) == len(tables)]
    return [table for table in tables if not (table.parent in coco and table.name.startswith(COCO_OTHERS))]


def load_from_hub(name: str, config_name: str | None = None) -> DatasetDict:
    """Load all splits of a data set on the Hub.

    Raises:
        ValueError: it cannot be loaded; the message says why.
    """
    try:
        return datasets.load_dataset(name, config_name)
    except Exception as error:  # of a dozen kinds, from three packages
        if "Config name is missing" in str(error):
            configurations = ", ".join(re.findall(r"'([^']+)'", str(error).partition("available configs:")[2])[:20])
            raise ValueError(
                f"The data set {name} has several configurations ({configurations}); choose one with config_name."
            ) from error
        raise ValueError(
            f"The data set {name} is no folder here, and loading it from the Hub failed: {first_sentence(error)}. "
            "Name a folder or a table here; offline:photos needs no Hub."
        ) from error


def find_tables(folder: Path) -> list[Path]:
    """Find the files of a folder that may be its tables of pairs, and not those of other things further below."""
    tables = _Contents.of(folder).tables
    return [
        path for path in tables if path.stem == "metadata" or all(map(_is_plain, path.relative_to(folder).parts[:-1]))
    ]


def _is_text_table(path: Path) -> bool:
    """Return whether a text file begins like a Flickr token file, or like a table with or without a header."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        line = file.readline(10_000)
    fields = [field.strip() for field in re.split(r"[,\t|;]", line)]
    has_header = find_named(fields, IMAGE_COLUMNS) and find_captions(fields)
    has_text = any(" " in field for field in fields)
    return bool(TOKEN_LINE.match(line) or has_header or (has_text and any(map(is_image_name, fields))))


def _find_lists(table: Path) -> list[tuple[Path, str]]:
    """Find lists of images beside a table, each named after a split: Flickr_8k.trainImages.txt, or test.txt."""
    found = []
    for path in sorted([*table.parent.glob("*.txt"), *table.parent.glob("splits/*.txt")]):
        word = re.split(r"[._-]", path.stem)[-1]
        split = SPLITS.get(re.sub(r"_?images?$", "", word, flags=re.IGNORECASE).lower())
        if split and path != table and not _is_text_table(path):
            found.append((path, split))
    return found


def _read_lists(table: Path) -> dict[str, str]:
    """Map names of images to the split whose list has them; a line may go on with a class."""
    split_of = {}
    for path, split in _find_lists(table):
        for line in filter(None, map(str.strip, path.read_text("utf-8", "replace").splitlines())):
            split_of[os.path.basename(line if is_image_name(line) else line.split()[0])] = split
    return split_of


def _declared_groups(folder: Path, tables: Sequence[Path]) -> dict[str, dict[Path, str | None]]:
    """Group tables by the configurations that the README.md of a cloned data set declares, each with its split."""
    readme = folder / "README.md"
    try:
        configurations = DatasetCard.load(readme).data.to_dict().get("configs") if readme.is_file() else None
    except Exception:  # of a README that is no card
        return {}
    groups: dict[str, dict[Path, str | None]] = {}
    for configuration in configurations if isinstance(configurations, list) else ():
        if not isinstance(configuration, dict):
            continue
        name = str(configuration.get("config_name", "default"))
        files = configuration.get("data_files") or f"{configuration.get('data_dir', '.')}/*"
        for entry in files if isinstance(files, list) else [files]:
            entry = entry if isinstance(entry, dict) else {"path": str(entry)}
            split = SPLITS.get(str(entry.get("split")).lower())
            patterns = entry.get("path", []) if isinstance(entry.get("path"), list) else [entry.get("path")]
            for table in tables:
                path = table.relative_to(folder)
                if any(path.match(str(pattern).replace("**", "*").removeprefix("./")) for pattern in patterns):
                    groups.setdefault(name, {})[table] = split or _split_in(path)
    return groups


def _is_plain(folder: str) -> bool:
    """Return whether a folder of this name is part of any data set: then it names no configuration."""
    return folder.lower() == "data" or folder.lower().rstrip("0123456789") in SPLITS


def _split_in(path: Path, is_file: bool = True) -> str | None:
    """Find the split that a file or one of its folders is named after.

    One word of a file's name is enough, as in train-00000-of-00002.parquet; a folder's name must match as a whole.
    Either may end in a year, as COCO's do.
    """
    folders = path.parts[:-1] if is_file else path.parts
    for word in (*(re.split("[-_.]", path.name) if is_file else ()), *reversed(folders)):
        split = SPLITS.get(word.lower().rstrip("0123456789"))
        if split:
            return split
    return None


def _as_table(rows: Dataset, path: Path) -> Table:
    return Table(path, rows, rows.column_names)


def _hash_images(images: Dataset) -> list[str | None]:
    """Hash each image's bytes; None for an image without bytes."""
    hashes: list[str | None] = []
    for image in tqdm(images["image"], desc="telling images apart", unit="image", leave=False):
        data = image and image["bytes"]
        hashes.append(None if data is None else hashlib.blake2b(data, digest_size=16).hexdigest())
    return hashes


def _concatenate(parts: Sequence[RawPairs]) -> RawPairs:
    if len(parts) == 1:
        return parts[0]

    def chunks(name: str) -> pa.ChunkedArray:
        return pa.chunked_array([chunk for part in parts for chunk in getattr(part, name).chunks])

    images = datasets.concatenate_datasets([part.images for part in parts])
    return RawPairs(images, chunks("captions"), chunks("keys"), chunks("splits"))
