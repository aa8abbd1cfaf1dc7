"""Find images in folders, and count what had to be left out; `modeling_clipmini.images_clipmini` opens them."""

import logging
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MAX_LOGGED = 20  # warnings about single inputs; later ones are only counted
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
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"{folder} is not a folder." if root.exists() else f"The folder {folder} does not exist.")
    found = sorted(walk_files(root, IMAGE_SUFFIXES))
    if not found:
        raise ValueError(f"{folder} has no images; looked for {', '.join(sorted(IMAGE_SUFFIXES))}.")
    return found


def check_any_exists(images: Iterable[Any]) -> None:
    """Check that there is at least one image: a file that exists, or anything but a path.

    Raises:
        ValueError: there is none; the message names the last path.
    """
    last = "there is none"
    for image in images:
        if not isinstance(image, (str, Path)) or Path(image).exists():
            return
        last = f"{image} does not exist"
    raise ValueError(f"No image can be read: {last}.")


def walk_files(folder: Path, suffixes: Collection[str]) -> Iterator[Path]:
    """Yield the files below a folder that have one of some lower-case suffixes, each folder before its sub-folders.

    Hidden files and folders are ignored. Folders that cannot be read, which `os.walk` would ignore silently, are
    logged.
    """

    def warn(error: OSError) -> None:
        logger.warning("cannot look into %s (%s)", error.filename, error.strerror)

    for parent, folders, files in os.walk(folder, onerror=warn):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield Path(parent, name)


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
        if self.strict:
            raise ValueError(f"{name}: {reason}. Repair or remove it, or turn strict mode off to go on without it.")
        self.items.append((str(name), reason))
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
