"""Find where the images lie that a table names.

People name images in every way: relative to the table or to a folder beside it, by a path of another machine, by an id
without a suffix. A name is first looked up as it is written. What is not there is searched among all files at and
below the table's folder, or, where that is called "annotations" or the like, beside it. A folder is chosen by how many
of all names it holds; two that hold equally many are an error, since nothing tells which one is meant.
"""

import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from clipmini.names import is_utf8

from .images import IMAGE_SUFFIXES, shorten, walk_files

# A column of these names may hold the folder of a row's image.
FOLDER_COLUMNS = ("filepath", "folder", "dir", "directory", "subdir", "subfolder", "split", "subset", "class", "label")
# In the name of a folder that holds tables alone, with the images beside it; beside others lie other data sets.
TABLE_FOLDERS = frozenset("annotation annotations caption captions label labels metadata text texts".split())
IMAGE_FOLDERS = ("images", "image", "img", "imgs", "photos", "pictures", "jpg", "jpgs")
# Of what the best folder holds: another that holds as much fits equally. Masks may be complete where some images are
# missing, so less is enough if the best is not called "images".
ENOUGH, ENOUGH_FOR_IMAGES = 0.5, 0.95
MAX_AMBIGUOUS = 0.05  # of the names: these cost themselves alone
NUM_SAMPLED = 100
MAX_CANDIDATES = 100  # files of one name that are looked at


@dataclass(frozen=True)
class Places:
    """Where the images of N rows lie.

    Attributes:
        paths: (N,) absolute paths, or addresses; null for a row that names no image. One that is found nowhere has the
            path where it was looked for first.
        anchor: the folder that keys are relative to, so that a data set is split alike wherever it lies.
        folders: by folder, how many images were found there.
        num_missing: images that were found nowhere.
        note: on images that a few folders hold alike; "" if there are none.
    """

    paths: pa.Array
    anchor: str
    folders: dict[str, int]
    num_missing: int
    note: str


def find_places(
    names: pa.Array, folders: Mapping[str, pa.Array], table: Path, base: Path | None, image_root: Path | None
) -> Places:
    """Find the images that the rows of a table name.

    Args:
        names: (N,) as the table has them; null for none.
        folders: (N,) by column, what may be the folder of each.
        table: the table's folder.
        base: the folder of the data set that the table is part of; None if the table was named itself.
        image_root: the folder that holds the images, if it is known; no other is looked at.

    Raises:
        ValueError: two folders hold equally many of the images, under the same names.
    """
    finder = _Finder(table.absolute(), base and base.absolute(), image_root and image_root.absolute())
    best: _Search | None = None
    for prefix in (None, *folders.values()):
        full = names if prefix is None else pc.binary_join_element_wise(prefix, names, "/")
        encoded = full.dictionary_encode()
        unique, indices = encoded.dictionary.to_pylist(), encoded.indices
        del full, encoded  # a million names are enough in memory once
        search = finder.find(unique)
        if best is None or search.num_open < best.num_open:
            best, codes = search, indices
        if not best.num_open:
            break
    assert best is not None
    note = ""
    if best.conflicts:
        pair, number = best.conflicts.most_common(1)[0]
        example = shorten(best.examples[pair])
        note = f"{number:,} images that {table} names, such as {example}, are both in {pair[0]} and in {pair[1]}"
        if best.conflicts.total() > MAX_AMBIGUOUS * len(best.names):
            raise ValueError(f"{note}; set image_root to the folder that is meant, or move the other away.")
    counts = Counter(map(os.path.dirname, filter(None, best.files)))
    pairs = zip(best.names, best.files, strict=True)
    paths = [finder.expected(name) if file is None else _storable(file) for name, file in pairs]
    anchor = finder.image_root or finder.base or _common_folder(best.roots) or table.absolute()
    return Places(pa.array(paths, pa.string()).take(codes), str(anchor), dict(counts), best.num_open, note)


class _Search:
    """What one way to read the names has found.

    Attributes:
        names: as they were looked for.
        files: the path of each; None where there is none.
        roots: folders that the names are relative to.
        conflicts: for pairs of folders that hold equally many, how many images are in both.
        examples: for each of these pairs, an image that is.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.files: list[str | None] = [None] * len(names)
        self.roots: set[str] = set()
        self.conflicts: Counter[tuple[str, str]] = Counter()
        self.examples: dict[tuple[str, str], str] = {}

    @property
    def num_open(self) -> int:
        return self.files.count(None)


class _Finder:
    """Looks for images, and lists the files around a table once."""

    def __init__(self, table: Path, base: Path | None, image_root: Path | None) -> None:
        self.table, self.base, self.image_root = table, base, image_root
        self._listed: dict[Path, list[str]] = {}

    def expected(self, name: str) -> str:
        """Return the path where an image should have been."""
        return name if "://" in name else os.path.normpath(os.path.join(self.image_root or self.table, name))

    def find(self, names: Sequence[str]) -> _Search:
        search = _Search([_respell(name) for name in names])
        self._look_as_written(search, names)
        if search.num_open:
            self._look_around(search)
        return search

    def _starts(self) -> list[Path]:
        """List the folders that names may be relative to, nearest first."""
        if self.image_root:
            return [self.image_root]
        above = [self.table, *self.table.parents]
        return above[: above.index(self.base) + 1] if self.base in above else above[:3]

    def _look_as_written(self, search: _Search, names: Sequence[str]) -> None:
        """Look in the nearest folder that has any of the images; those further up have others of the same names."""
        for start in map(str, self._starts()):
            sample = search.names[:: len(names) // NUM_SAMPLED + 1]
            if not any(os.path.isfile(os.path.join(start, name)) for name in sample):
                continue
            for number, pair in enumerate(zip(search.names, names, strict=True)):
                found = (path for name in dict.fromkeys(pair) if os.path.isfile(path := os.path.join(start, name)))
                if (file := next(found, None)) is not None:
                    search.files[number] = os.path.normpath(file)
            search.roots.add(start)
            return

    def _look_around(self, search: _Search) -> None:
        """Look for the names that are not where they say among all files around the table, nearest first."""
        names = [name.lstrip("/") for name in search.names]
        pending = {number for number, file in enumerate(search.files) if file is None and "://" not in names[number]}
        common = _common_folder({os.path.dirname(name) for name in names}) or ""
        num_common = len(common.split("/")) if common else 0
        for files in self._lists():
            known = [_as_text(file) for file in files]
            # A folder that all names begin with may be one of another machine.
            for num_dropped in range(num_common + 1):
                num_pending = len(pending)
                for change in (str, str.casefold, _stem, _unpadded):
                    if pending:
                        wanted = [change(name.split("/", num_dropped)[-1]) for name in names]
                        found = _match(wanted, known, change)
                        self._resolve(search, wanted, found, files)
                        pending = {number for number in pending if not found.get(wanted[number])}
                if len(pending) < num_pending:
                    return

    def _resolve(
        self, search: _Search, wanted: Sequence[str], found: Mapping[str, tuple[int, ...]], files: Sequence[str]
    ) -> None:
        """Choose among the files of each name by how many names their folder holds."""

        def root(file: int, name: str) -> str:
            return files[file].rsplit("/", name.count("/") + 1)[0]

        counts: Counter[str] = Counter()
        copies: Counter[str] = Counter()  # of images that were found elsewhere
        for number, name in enumerate(wanted):
            for file in found.get(name, ()):
                counts[root(file, name)] += 1
                copies[root(file, name)] += search.files[number] not in (None, files[file])
        for number, name in enumerate(wanted):
            # A folder of copies, such as smaller ones, does not fill the gaps in that of the images.
            fitting = [
                file for file in found.get(name, ()) if copies[root(file, name)] * 2 <= counts[root(file, name)]
            ]
            if search.files[number] is not None or not fitting:
                continue
            first, *others = sorted(fitting, key=lambda file: -counts[root(file, name)])
            if others:
                one, other = root(first, name), root(others[0], name)
                enough = ENOUGH_FOR_IMAGES if os.path.basename(one).lower() in IMAGE_FOLDERS else ENOUGH
                if counts[other] >= enough * counts[one] and not os.path.samefile(files[first], files[others[0]]):
                    rivals = (one, other) if one != other else (files[first], files[others[0]])
                    pair = min(rivals), max(rivals)
                    search.conflicts[pair] += 1
                    search.examples.setdefault(pair, search.names[number])
                    continue
            search.files[number] = files[first]
            search.roots.add(root(first, name))

    def _lists(self) -> Iterator[list[str]]:
        """Yield the images below the table's folder; those of the whole data set; those beside a folder of tables."""
        tops = [self.image_root] if self.image_root else [self.table, self.base]
        for top in dict.fromkeys(filter(None, tops)):
            if top not in self._listed:
                self._listed[top] = [path.as_posix() for path in walk_files(top, IMAGE_SUFFIXES)]
            if self._listed[top]:
                yield self._listed[top]
        if not self.image_root and self.base is None and not self._listed[self.table]:
            yield [path.as_posix() for path in _list_beside(self.table)]


def _list_beside(folder: Path) -> Iterator[Path]:
    """Yield the images in the folders beside one of tables, and in those below one that is called "images" or so."""
    if TABLE_FOLDERS.isdisjoint(re.split(r"[^a-z]+", folder.name.lower())):
        return
    for path in sorted(folder.parent.iterdir()) if folder.parent != folder else ():
        if path.is_dir() and path != folder:
            found = walk_files(path, IMAGE_SUFFIXES)
            is_whole = path.name.lower() in IMAGE_FOLDERS
            yield from found if is_whole else itertools.takewhile(lambda file: file.parent == path, found)  # noqa: B023


def _match(names: Iterable[str], files: Sequence[str], change: Callable[[str], str]) -> dict[str, tuple[int, ...]]:
    """Find the files whose paths end in some names, after a change: the numbers of files of each name."""
    found: dict[str, tuple[int, ...]] = {name: () for name in names if name}
    depths = {name.count("/") + 1 for name in found}
    for number, file in enumerate(files):
        changed = change(file)
        for depth in depths:
            parts = changed.rsplit("/", depth)
            key = "/".join(parts[1:])
            if len(parts) > depth and key in found and len(found[key]) < MAX_CANDIDATES:
                found[key] = (*found[key], number)
    return found


def _respell(name: str) -> str:
    """Write a name with "/" between folders, without a scheme or drive, as Unicode composes its letters."""
    if name.startswith("file:"):
        name = unquote(re.sub(r"^file:(//[^/]*)?", "", name))
    if "://" not in name:
        name = re.sub(r"^[A-Za-z]:(?=/)", "", name.replace("\\", "/"))
        if "/./" in name or "//" in name or name.startswith("./"):
            name = os.path.normpath(name)
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _as_text(path: str) -> str:
    """Return a path as a table would write it: one that is not UTF-8 as a Western name."""
    text = path if is_utf8(path) else os.fsencode(path).decode("cp1252", "replace")
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _storable(path: str) -> str:
    """Return a path as Arrow can store it: one that is not UTF-8 as an address, `file:///caf%E9.jpg`."""
    return path if is_utf8(path) else Path(path).as_uri()


def _stem(name: str) -> str:
    head, suffix = os.path.splitext(name)
    return (head if suffix.lower() in IMAGE_SUFFIXES else name).casefold()


def _unpadded(name: str) -> str:
    """Return a number without a suffix and leading zeros, which Excel drops; or "" for another name."""
    folder, separator, last = _stem(name).rpartition("/")
    return f"{folder}{separator}{last.lstrip('0') or '0'}" if last.isdecimal() else ""


def _common_folder(folders: Iterable[str]) -> str | None:
    try:
        return os.path.commonpath(list(folders))
    except ValueError:  # there are none, or they are on several drives
        return None
