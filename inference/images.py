"""Read pictures of any kind, say why one cannot be read, and count what had to be left out."""

import io
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from modeling_clipmini.processing_clipmini import convert_to_rgb

logger = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000  # 300 MB as RGB
MAX_ASPECT_RATIO = 100  # resizing the shorter edge to 224 makes 5 megapixels of 1:100, and a gigapixel of 1:20,000
MAX_NAMED = 20  # warnings before only counting goes on
# By contents, whatever the suffix. Named one by one, since some of Pillow's other formats start programs (EPS) or
# have no signature, so that any file may pass for one. HEIF is there once `pillow_heif` has registered it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "HEIF")
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .jp2 .ppm .pgm .pbm .heic .heif".split()
)


class ImageError(ValueError):
    """A picture cannot be used; of `read_image` the message is the reason in one clause, without a file name."""


def read_image(source: str | Path | bytes | Mapping[str, Any] | Image.Image | None) -> Image.Image:
    """Read a picture as people see it: upright, alpha over white, three 8-bit channels.

    Args:
        source: a path, an encoded picture, a row of a `datasets.Image(decode=False)` column
            (`{"bytes": ..., "path": ...}`), or a Pillow picture. Of an animation the first frame is read; of a Pillow
            picture the frame it stands at.

    Returns:
        A decoded picture of mode "RGB", with no file behind it.

    Raises:
        ImageError: it is missing, empty, no picture, truncated or damaged, has over `MAX_PIXELS` pixels, is over
            `MAX_ASPECT_RATIO` times as long as wide, or has pixels of a kind whose range nothing tells.
    """
    return _read(source, is_reduced=False)


def find_fault(source: str | Path | bytes | Mapping[str, Any] | Image.Image | None) -> str | None:
    """Say why `read_image` would refuse a picture.

    Large JPEGs are decoded at an eighth of their size, which finds truncation just as well in a fraction of the time.

    Args:
        source: as in `read_image`.

    Returns:
        The reason, or None where the picture can be read.
    """
    try:
        _read(source, is_reduced=True)
    except ImageError as error:
        return str(error)
    return None


def find_images(folder: str | Path) -> list[Path]:
    """List a folder's pictures, those of its sub-folders too, by suffix.

    Args:
        folder: where to look; hidden files and folders are passed over, and with a warning those that cannot be read.

    Returns:
        Paths that begin with `folder`, sorted.

    Raises:
        ValueError: there is no such folder, or no picture in it.
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
        raise ValueError(f"{folder} has no pictures; looked for {', '.join(sorted(IMAGE_SUFFIXES))}.")
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


def _read(source: Any, is_reduced: bool) -> Image.Image:
    if isinstance(source, Mapping):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if source is None:
        raise ImageError("has neither bytes nor a path")
    if isinstance(source, Image.Image):
        return _decode(source, is_reduced=False)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode_stream(io.BytesIO(source), is_reduced)
    if not isinstance(source, (str, Path)):
        raise TypeError(f"A picture is a path, bytes, a {{'bytes', 'path'}} row or a PIL image, not {type(source)}.")
    if str(source).startswith(("http://", "https://")):
        raise ImageError("is a web address; download the pictures first")
    try:
        if os.path.exists(source) and not os.path.isfile(source):  # opening a pipe would wait for ever
            raise ImageError("is not a file")
        stream = open(source, "rb")
    except FileNotFoundError:
        raise ImageError("does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise ImageError(f"cannot be opened ({getattr(error, 'strerror', None) or error})") from None
    with stream:
        return _decode_stream(stream, is_reduced)


def _decode_stream(stream: BinaryIO, is_reduced: bool) -> Image.Image:
    """Do `Image.open`'s work without its warning at 89 megapixels, which could only be silenced for all threads."""
    Image.init()
    try:
        prefix = stream.read(16)
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror})") from None
    if not prefix:
        raise ImageError("is empty (zero bytes)")
    fault = "is not an image that Pillow can read"
    for name in FORMATS:
        factory, accepts = Image.OPEN.get(name, (None, None))
        verdict = accepts(prefix) if factory and accepts else False
        if isinstance(verdict, str):  # Pillow was built without this format
            fault = f"is {name}, which the installed Pillow cannot read"
        elif factory and verdict:
            stream.seek(0)
            try:
                image = factory(stream, "")
            except Exception as error:
                fault = _describe(error)
                continue
            return _decode(image, is_reduced)
    raise ImageError(fault)


def _decode(image: Image.Image, is_reduced: bool) -> Image.Image:
    width, height = image.size
    if not (width and height):
        raise ImageError("has no pixels")
    if width * height > MAX_PIXELS:
        raise ImageError(f"has {width * height / 1e6:.0f} megapixels, over the limit of {MAX_PIXELS // 1_000_000}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(f"is {width}x{height} pixels, longer than 1:{MAX_ASPECT_RATIO}")
    try:
        if is_reduced and image.format in ("JPEG", "MPO"):
            image.draft(None, (1, 1))
        image.load()
        is_wide = image.mode == "F" or (image.mode == "I" and not _is_16_bit(image))
        result = None if is_wide else convert_to_rgb(image)
    except (
        Exception
    ) as error:  # Pillow's plugins raise nearly anything: OSError, SyntaxError, struct.error, MemoryError
        raise ImageError(_describe(error)) from error
    if result is None:
        raise ImageError(f"has 32-bit pixels (mode {image.mode}), whose range nothing tells")
    return result


def _is_16_bit(image: Image.Image) -> bool:
    darkest, brightest = image.getextrema()
    return darkest >= 0 and brightest <= 65535  # type: ignore[operator]


def _describe(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"is over the limit of {MAX_PIXELS // 1_000_000} megapixels"
    return f"is truncated or damaged ({' '.join(str(error).split()) or type(error).__name__})"
