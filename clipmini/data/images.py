"""Find images in folders, and count what had to be left out; `modeling_clipmini.images_clipmini` opens them."""

import logging
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from clipmini.names import expand

logger = logging.getLogger(__name__)

MAX_NAMED = 5  # of many names in a message
MAX_NAME_CHARACTERS = 300  # of an input in a message: a path, not the whole image as base64
MAX_LOGGED = 20  # warnings about single inputs; later ones are only counted
# Folders of thumbnails, trash and metadata, by the names that systems and viewers give them, in lower case.
LEFT_OUT = frozenset(
    {"@eadir", "__macosx", "thumbnails", "thumbs", "$recycle.bin", "system volume information", "lost+found"}
)
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .jp2 .ppm .pgm .pbm .heic .heif".split()
)


def find_images(folder: str | Path) -> list[Path]:
    """List the images in a folder and its sub-folders, by suffix.

    Returns:
        Sorted paths that begin with `folder`; see `walk_files`.

    Raises:
        ValueError: the folder does not exist or has no images.
    """
    root = Path(expand(folder))
    if not root.is_dir():
        raise ValueError(f"{folder} is not a folder." if root.exists() else f"The folder {folder} does not exist.")
    found = sorted(walk_files(root, IMAGE_SUFFIXES))
    if not found:
        raise ValueError(f"{folder} has no images; looked for {', '.join(sorted(IMAGE_SUFFIXES))}.")
    return found


def expand_files(images: Iterable[Any]) -> list[Any]:
    """Return images with the names of files as they are on disk; anything but a name stays as it is.

    Raises:
        ValueError: there is no image that exists; the message names the last one.
    """
    expanded = [expand(image) if isinstance(image, (str, Path)) else image for image in images]
    if not any(not isinstance(image, str) or Path(image).exists() for image in expanded):
        last = f"{expanded[-1]} does not exist" if expanded else "there is none"
        raise ValueError(f"No image can be read: {last}.")
    return expanded


def folder_of(source: str, paths: Iterable[str | None]) -> str | None:
    """Return the nearest folder above some images, by the name that their source has if they lie in it.

    Args:
        source: as in `load_pairs`.
        paths: absolute paths of the images; None for one without a file.

    Returns:
        A name that `find_images` takes; None if an image is in no folder.
    """
    folders = set()
    for path in paths:
        if not path or not os.path.isfile(path):
            return None
        folders.add(os.path.dirname(path))
    try:
        folder = os.path.commonpath(folders)
    except ValueError:  # there are none, or they are on several drives
        return None
    root = Path(expand(source)).absolute()
    if Path(folder).is_relative_to(root):
        below = Path(folder).relative_to(root).as_posix()
        return source if below == "." else f"{source.rstrip('/')}/{below}"
    return os.path.relpath(folder) if Path(folder).is_relative_to(Path.cwd()) else folder


def walk_files(folder: Path, suffixes: Collection[str], unreachable: list[str] | None = None) -> Iterator[Path]:
    """Yield the files below a folder that have one of some lower-case suffixes, each folder before its sub-folders.

    Symbolic links are followed, but no folder is entered twice. Hidden files and folders, and those that systems and
    viewers make (`LEFT_OUT`), are ignored. Folders that cannot be read, which `os.walk` would ignore silently, are
    logged, and added to `unreachable`.
    """

    def warn(error: OSError) -> None:
        logger.warning("cannot look into %s (%s)", error.filename, error.strerror)
        if unreachable is not None:
            unreachable.append(error.filename)

    entered = {_identify(folder)}

    def is_new(parent: str, name: str) -> bool:
        if name.startswith(".") or name.lower() in LEFT_OUT:
            return False
        identity = _identify(os.path.join(parent, name))
        is_known = identity in entered
        entered.add(identity)
        return not is_known

    for parent, folders, files in os.walk(folder, onerror=warn, followlinks=True):
        # Links last, so that a folder that can be reached both ways is known by its own name.
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        folders[:] = [name for name in folders if is_new(parent, name)]
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield Path(parent, name)


def _identify(folder: str | Path) -> tuple[int, int] | str:
    try:
        status = os.stat(folder)
    except OSError:  # is reported when it is entered
        return str(folder)
    return status.st_dev, status.st_ino


def shorten(text: str, limit: int = 80) -> str:
    """Return a text of the data as it may stand in a message: its beginning, if it is long."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def join_names(names: Iterable[Any]) -> str:
    """Join the first few names of many."""
    texts = list(map(str, names))
    rest = f" and {len(texts) - MAX_NAMED:,} more" if len(texts) > MAX_NAMED else ""
    return ", ".join(texts[:MAX_NAMED]) + rest


class Skipped:
    """Inputs that were left out, each with the reason; in strict mode, the first one raises an error instead.

    Only the first `MAX_LOGGED` are logged, so that a bad data set does not flood the log; `items` has all of them.

    Attributes:
        strict: raise an error instead of leaving an input out.
        items: (name, reason) of each input.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.items: list[tuple[str, str]] = []

    @property
    def count(self) -> int:
        """Return how many inputs were left out."""
        return len(self.items)

    def add(self, name: str | Path, reason: str) -> None:
        """Leave out one input.

        Args:
            name: the file, or the row or line of a file.
            reason: why, in one clause.

        Raises:
            ValueError: in strict mode.
        """
        name, reason = shorten(str(name), MAX_NAME_CHARACTERS), shorten(reason, MAX_NAME_CHARACTERS)
        if self.strict:
            raise ValueError(f"{name}: {reason}. Repair or remove it, or turn strict mode off to go on without it.")
        self.items.append((name, reason))
        if self.count <= MAX_LOGGED:
            logger.warning("skipped %d so far: %s: %s", self.count, name, reason)

    def to_dict(self) -> dict[str, Any]:
        """Return what was left out, ready for JSON, under the keys that all results use."""
        items = [{"path": name, "reason": reason} for name, reason in self.items]
        return {"num_skipped": self.count, "skipped": items}

    def log_summary(self) -> None:
        """Log how many inputs were left out, if any."""
        if self.items:
            unlisted = f"; the first {MAX_LOGGED} are named above" if self.count > MAX_LOGGED else ""
            logger.warning("%d input%s skipped%s", self.count, "" if self.count == 1 else "s", unlisted)
