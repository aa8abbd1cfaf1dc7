"""List the images of a source without opening them: files of a folder or a table, and rows of a data set."""

import errno
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipmini.data.images import IMAGE_SUFFIXES, Skipped, find_images, walk_files
from clipmini.names import is_utf8, locate

logger = logging.getLogger(__name__)

GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # other errors say nothing of whether a file is still there


@dataclass(frozen=True)
class Entry:
    """An image of a source.

    Attributes:
        key: identifies the image: the absolute path of its file or, without a file, its source and a digest of its
            bytes.
        source: the source, as the index records it: an absolute path, or an id on the Hub.
        image: the path of its file; or a data set and the row that holds its bytes.
        size: bytes of the file; 0 without one, since the key then changes with the content.
        mtime_ns: when the file was last changed; 0 likewise.
        caption: its captions, one a line; None if the source has none.
    """

    key: str
    source: str
    image: Any
    size: int = 0
    mtime_ns: int = 0
    caption: str | None = None

    @property
    def has_file(self) -> bool:
        """Whether the image lies in a file of its own."""
        return isinstance(self.image, str)

    @property
    def state(self) -> tuple[int, int, str | None]:
        """What changes when the image or its captions do."""
        return self.size, self.mtime_ns, self.caption

    def read_bytes(self) -> bytes | None:
        """Return the bytes of an image without a file; None if the row has none."""
        rows, number = self.image
        image = rows[number]["image"]
        return image and image["bytes"]

    def as_row(self) -> dict[str, Any]:
        """Return the columns of an index that are known before the image is read."""
        return {name: getattr(self, name) for name in ("key", "source", "size", "mtime_ns", "caption")}


@dataclass(frozen=True)
class Listing:
    """The images of a source.

    Attributes:
        source: as in `Entry`.
        entries: the images that are there.
        unreachable: folders that cannot be looked into: what is below them is unknown, not gone.
    """

    source: str
    entries: list[Entry]
    unreachable: list[str]


def list_images(source: str | Path, skipped: Skipped) -> Listing:
    """List the images of a source, with their captions where it has some.

    Args:
        source: a folder, including its subfolders; an image file; or what `load_pairs` takes: a table, a saved data
            set, or the id of a data set on the Hub. Images need no captions here.
        skipped: collects what is no file, and names that are not text.

    Raises:
        ValueError: the source cannot be reached or read, or has no images.
    """
    located = locate(source, "a folder or a table of images", "dataset")
    path = Path(located)
    name = os.path.abspath(path) if path.exists() else located
    unreachable: list[str] = []
    is_image = path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES
    files = [path] if is_image else sorted(walk_files(path, IMAGE_SUFFIXES, unreachable)) if path.is_dir() else []
    found: dict[str, tuple[Any, str | None]] = {os.path.abspath(file): (os.path.abspath(file), None) for file in files}
    if not is_image:
        found |= _read_rows(path, located, name, has_files=bool(files), skipped=skipped)
    entries = []
    for key, (image, caption) in found.items():
        try:
            entries.append(_make_entry(key, name, image, caption))
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in GONE:
                unreachable.append(os.path.dirname(key))
            skipped.add(ascii(key) if not key.isprintable() else key, getattr(error, "strerror", None) or str(error))
    if not found:
        find_images(path)  # raises an error that says what was looked for
    return Listing(name, entries, unreachable)


def _make_entry(key: str, source: str, image: Any, caption: str | None) -> Entry:
    """Return an entry, with the status of its file.

    Raises:
        OSError: the file is gone since it was listed, or a symbolic link to itself.
        ValueError: it is no file, or its name is not text.
    """
    if not isinstance(image, str):
        return Entry(key, source, image, caption=caption)
    if "://" in image:
        raise ValueError("is a web address, which is not fetched here; download the image first")
    if not is_utf8(image):
        raise ValueError("has a name that is not UTF-8; rename it")
    status = os.stat(image)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a file")
    return Entry(key, source, image, status.st_size, status.st_mtime_ns, caption)


def _read_rows(
    path: Path, located: str, name: str, has_files: bool, skipped: Skipped
) -> Iterator[tuple[str, tuple[Any, str | None]]]:
    """Yield key, image and captions of each image that tables and data sets of a source name."""
    from clipmini.data.sources import SourceReader, find_tables  # seconds, which a folder of files need not cost
    from clipmini.data.tables import NoPairsError

    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if has_files and not is_saved and not find_tables(path):
        return
    try:
        raw = SourceReader(skipped, needs_captions=False).read(located)
    except ValueError as error:
        is_of_something_else = path.is_dir() and isinstance(error, NoPairsError)
        if not is_of_something_else and (not has_files or skipped.strict):
            raise
        logger.warning("left out %s", error)  # a table of something else, as people keep beside photographs
        return
    first_row: dict[str, int] = {}
    captions: dict[str, list[str]] = {}
    for row, (key, texts) in enumerate(zip(raw.keys.to_pylist(), raw.captions.to_pylist(), strict=True)):
        first_row.setdefault(key, row)
        captions.setdefault(key, []).extend(filter(None, texts or ()))
    for key, row in first_row.items():
        image = raw.images[row]["image"]
        caption = "\n".join(captions[key]) or None
        if image and image["bytes"] is None and image["path"]:
            yield image["path"], (image["path"], caption)
        else:
            yield f"{name}#{key}", ((raw.images, row), caption)
