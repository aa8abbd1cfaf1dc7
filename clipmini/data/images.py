"""Find images in folders, and count what had to be left out; `modeling_clipmini.images_clipmini` opens them."""

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

MAX_NAMED = 20  # warnings before only counting goes on
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .jp2 .ppm .pgm .pbm .heic .heif".split()
)


def find_images(folder: str | Path) -> list[Path]:
    """List a folder's images, those of its sub-folders too, by suffix.

    Args:
        folder: where to look; hidden files and folders are passed over, and with a warning those that cannot be read.

    Returns:
        Paths that begin with `folder`, sorted.

    Raises:
        ValueError: there is no such folder, or no image in it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"{folder} is not a folder." if root.exists() else f"The folder {folder} does not exist.")
    found = []
    for parent, folders, files in os.walk(root, onerror=warn_of_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    if not found:
        raise ValueError(f"{folder} has no images; looked for {', '.join(sorted(IMAGE_SUFFIXES))}.")
    return sorted(found)


def warn_of_unreadable(error: OSError) -> None:
    """Name a folder that `os.walk` would pass over in silence."""
    logger.warning("cannot look into %s (%s)", error.filename, error.strerror)


class Skipped:
    """What was left out, and why: one counted warning each, or in strict mode an error at the first.

    Only the first `MAX_NAMED` are logged, so that a bad data set does not flood the log; all are in `items`.

    Attributes:
        strict: stop at the first rather than go on without it.
        items: (name, reason) of each.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.items: list[tuple[str, str]] = []

    @property
    def count(self) -> int:
        """How many were left out."""
        return len(self.items)

    def add(self, name: str | Path, reason: str) -> None:
        """Leave one out.

        Args:
            name: the file, or the place in a file.
            reason: why, in one clause.

        Raises:
            ValueError: in strict mode.
        """
        if self.strict:
            raise ValueError(f"{name}: {reason}. Repair or remove it, or leave strict mode to go on without it.")
        self.items.append((str(name), reason))
        if self.count <= MAX_NAMED:
            logger.warning("skipped %d so far: %s: %s", self.count, name, reason)

    def log_summary(self) -> None:
        """Say how many were left out in all, if any."""
        if not self.items:
            return
        unnamed = f"; the first {MAX_NAMED} are named above" if self.count > MAX_NAMED else ""
        logger.warning("%d input%s skipped%s", self.count, "" if self.count == 1 else "s", unnamed)


def first_sentence(error: Exception) -> str:
    """Give the first sentence of a library's error, without its point: transformers adds a paragraph of advice."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
