"""Open an image from anything that may hold one, or say why not: the one place where images are read.

Content decides what an image is, never its name, and only the formats listed here are tried. Whatever comes in,
reading one image takes at most `MAX_MEMORY`, and raises nothing but `ImageError` for what cannot be used.
"""

import io
import os
import socket
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from PIL import ExifTags, Image

# Named one by one, since some of Pillow's other formats start programs (EPS) or have no signature, so that any file
# may pass for one. HEIF is there once `pillow_heif` has registered it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "HEIF")
ADDRESSES = ("http://", "https://")

MAX_PIXELS = 100_000_000
MAX_BYTES = 320 * 2**20  # of a file, which the formats' own metadata can make any decoder read twice: 100 megapixels
MAX_SLOW_PIXELS = 5_000_000  # of what Pillow decodes in Python, at a megapixel a second
MAX_ASPECT_RATIO = 100  # resizing the shorter edge to 224 makes 5 megapixels of 1:100, and a gigapixel of 1:20,000
MAX_MEMORY = 2**30  # bytes that one image may take, until the processor has made `pixel_values` of it
# Processors take up to 20 bytes a pixel, so larger images are halved while they are decoded.
MAX_WHOLE_PIXELS = 50_000_000
# Bytes that decoding a pixel takes at the most, of formats that Pillow cannot decode row by row: see
# benchmarks/images.py. Pillow's own image takes 4.
BYTES_PER_PIXEL = {"WEBP": 17, "AVIF": 18, "HEIF": 18, "JPEG2000": 25, "TIFF": 5}
READ_WHOLE = ("WEBP", "AVIF", "HEIF")  # the whole file is in memory too
TIFF_ROWS, TIFF_TILE_WIDTH, TIFF_TILE_ROWS, TIFF_SAMPLES, TIFF_BITS = 278, 322, 323, 277, 258  # tags
STRIP_PIXELS = 2**20  # that are converted at once

MAX_ADDRESS_BYTES = 64 * 2**20
ADDRESS_TIMEOUT_S = 60.0  # from the request to the last byte
READ_TIMEOUT_S = 10.0  # without any byte

# What EXIF's orientations want to be turned by (CIPA DC-008, section 4.6.4).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image cannot be used; of `read_image` the message is the reason in one clause, without a file name.

    Attributes:
        is_too_large: whether the reason is a limit of bytes, pixels or memory.
    """

    is_too_large = False


class ImageTooLargeError(ImageError):
    """An image is over a limit of bytes, pixels or memory."""

    is_too_large = True


def read_image(
    source: Any,
    *,
    allow_paths: bool = True,
    allow_addresses: bool = False,
    formats: Sequence[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Read an image as people see it: upright, alpha over white, three 8-bit channels.

    Args:
        source: an encoded image as bytes; a path or an http(s) address, where allowed; a row of a
            `datasets.Image(decode=False)` column (`{"bytes": ..., "path": ...}`); or a Pillow image. Of an animation
            the first frame is read; of a Pillow image the frame it stands at.
        allow_paths: open a path. Leave this off for what comes from strangers.
        allow_addresses: fetch an address, within `MAX_ADDRESS_BYTES` and `ADDRESS_TIMEOUT_S`. The same holds.
        formats: the formats to try, some of `FORMATS`.
        max_pixels: refuse more, before they are decoded.

    Returns:
        A decoded image of mode "RGB", with no file behind it. One of over `MAX_WHOLE_PIXELS` has half its width and
        height, and so has a JPEG 2000 image that would take more than `MAX_MEMORY` whole.

    Raises:
        ImageError: it is missing, no regular file, empty, no image, truncated or damaged, would take more than
            `MAX_MEMORY`, has over `max_pixels` pixels, is over `MAX_ASPECT_RATIO` times as long as wide, or has pixels
            of a kind whose range nothing tells.
        TypeError: `source` is none of these.
    """
    with _opened(source, allow_paths, allow_addresses, formats, max_pixels) as image:
        if image is not source:
            _choose_scale(image, MAX_WHOLE_PIXELS, divisor=2)
        return _decode(image, max_pixels)


def read_named(source: Any, name: str, **allowed: Any) -> Image.Image:
    """Read one image of many, so that an error says which.

    Args:
        source: as in `read_image`.
        name: stands for an image that has neither path nor address.
        **allowed: as in `read_image`.

    Returns:
        The image, as `read_image` gives it.

    Raises:
        ImageError: it cannot be read; the message is its path, address or name, and the reason.
    """
    try:
        return read_image(source, **allowed)
    except ImageError as error:
        place = source.get("path") if isinstance(source, Mapping) else getattr(source, "filename", source)
        has_place = isinstance(place, (str, os.PathLike)) and os.fspath(place)
        raise type(error)(f"{place if has_place else name}: {error}") from error


def image_size(source: Any, **allowed: Any) -> tuple[int, int]:
    """Look up an image's width and height without decoding it.

    Args:
        source: as in `read_image`.
        **allowed: as in `read_image`.

    Returns:
        Width and height in pixels, before it is turned upright.

    Raises:
        ImageError: it cannot be opened, or is over a limit; what only decoding shows is not found.
    """
    with _opened(source, **allowed) as image:
        width, height = image.size
        return width, height


def find_fault(source: Any) -> str | None:
    """Find out why `read_image` would refuse an image.

    JPEGs are decoded at an eighth of their size, which finds truncation just as well in a fraction of the time.

    Args:
        source: as in `read_image`; a path is opened, an address is not.

    Returns:
        The reason, or None where the image can be read.
    """
    try:
        with _opened(source) as image:
            if image is not source:
                _choose_scale(image, 0, divisor=8)
            _decode(image, MAX_PIXELS)
    except ImageError as error:
        return str(error)
    return None


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as people see it: upright, opaque, three 8-bit channels.

    Pillow's own `convert("RGB")` ignores the EXIF orientation, drops alpha (what was transparent shows whatever color
    lies beneath it, mostly black) and clips 16-bit grays to white.

    Args:
        image: any Pillow image, which stays as it is; of an animation the current frame is taken.

    Returns:
        A new image of mode "RGB": orientation applied, alpha over white, 16-bit scaled to 8.
    """
    return _convert(image, factor=1)


def _convert(image: Image.Image, factor: int) -> Image.Image:
    """Convert strip by strip, since each step makes a copy; on the way divide width and height by `factor`."""
    image.load()  # a truncated file fails here
    turn = _find_turn(image)
    result = image
    if image.mode != "RGB" or image.has_transparency_data or factor > 1:
        width, height = image.size
        num_rows = max(STRIP_PIXELS // width // factor, 1) * factor
        result = Image.new("RGB", (-(-width // factor), -(-height // factor)))
        for top in range(0, height, num_rows):
            strip = _make_opaque(image.crop((0, top, width, min(top + num_rows, height))))
            result.paste(strip.reduce(factor) if factor > 1 else strip, (0, top // factor))
    if turn is not None:
        result = result.transpose(turn)
        result.info = {}  # it would be turned again
    return result.copy() if result is image else result


def _find_turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data raises all kinds of errors, and says nothing against the pixels
        return None


def _make_opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # I;16 and its byte orders, or the 32-bit I that 16-bit PNGs become
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")  # Pillow truncates
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextmanager
def _opened(
    source: Any,
    allow_paths: bool = True,
    allow_addresses: bool = False,
    formats: Sequence[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Image.Image]:
    """Open an image without decoding it, and check its size."""
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if source is None:
        raise ImageError("has neither bytes nor a path")
    if isinstance(source, Image.Image):
        _check_size(source, max_pixels)
        yield source
        return
    if isinstance(source, (bytes, bytearray, memoryview)):
        stream: BinaryIO = io.BytesIO(source)
    elif not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"An image is a path, bytes, a {{'bytes', 'path'}} row or a Pillow image, not {type(source)}.")
    elif str(source).startswith(ADDRESSES):
        if not allow_addresses:
            raise ImageError("is a web address, which is not fetched here; download the image first")
        stream = io.BytesIO(_fetch(str(source)))
    elif not allow_paths:
        raise ImageError("is a path, which is not opened here; give the image's bytes")
    else:
        stream = _open_file(source)
    with stream:
        image = _identify(stream, formats)
        _check_size(image, max_pixels)
        _check_memory(image, stream)
        yield image


def _open_file(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for ever
            raise ImageError("is not a file")
        return open(path, "rb")
    except FileNotFoundError:
        raise ImageError("does not exist") from None
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise ImageError(f"cannot be opened ({getattr(error, 'strerror', None) or error})") from None


def _fetch(address: str) -> bytes:
    """Fetch an address in a thread, since no timeout of a socket ends what arrives byte by byte."""
    outcome: list[Any] = []
    connections: list[Any] = []
    is_over = threading.Event()

    def work() -> None:
        try:
            outcome.append(_read_address(address, connections, is_over))
        except Exception as error:  # a malformed address and a broken answer raise nearly anything
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(ADDRESS_TIMEOUT_S)
    if thread.is_alive():
        is_over.set()
        for connection in connections:  # so that the thread does not wait for the rest of a header
            with suppress(OSError, AttributeError):  # it is not there yet, or has been left to the body
                connection.sock.shutdown(socket.SHUT_RDWR)
        raise ImageError(f"did not arrive within {ADDRESS_TIMEOUT_S:g} seconds")
    (result,) = outcome
    if isinstance(result, Exception):
        raise ImageError(f"cannot be fetched ({' '.join(str(result).split()) or type(result).__name__})") from result
    if len(result) > MAX_ADDRESS_BYTES:
        raise ImageTooLargeError(f"has more than {MAX_ADDRESS_BYTES // 2**20} MiB, the limit for web addresses")
    return result


class _Kept:
    """Keeps the connections of one of urllib's handlers, so that another thread can end them."""

    connections: list[Any]

    def do_open(self, http_class: Any, *args: Any, **kwargs: Any) -> Any:
        def connect(*args: Any, **kwargs: Any) -> Any:
            self.connections.append(http_class(*args, **kwargs))
            return self.connections[-1]

        return super().do_open(connect, *args, **kwargs)  # type: ignore[misc]


class _Http(_Kept, urllib.request.HTTPHandler):
    pass


class _Https(_Kept, urllib.request.HTTPSHandler):
    pass


def _read_address(address: str, connections: list[Any], is_over: threading.Event) -> bytes:
    """Read an address to its end, or to where it is over the limit or `is_over`; list its connections on the way."""
    fetcher = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _Http(),
        _Https(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),  # where a redirect leads to another protocol
    ):
        if isinstance(handler, _Kept):
            handler.connections = connections
        fetcher.add_handler(handler)
    request = urllib.request.Request(address, headers={"User-Agent": "clipmini"})
    content = bytearray()
    with fetcher.open(request, timeout=READ_TIMEOUT_S) as response:
        while len(content) <= MAX_ADDRESS_BYTES and not is_over.is_set() and (part := response.read1(2**16)):
            content += part
    return bytes(content)


def _identify(stream: BinaryIO, formats: Sequence[str]) -> Image.Image:
    """Do `Image.open`'s work for some formats, without its warning, which could only be silenced for all threads."""
    Image.init()
    try:
        prefix = stream.read(16)
        num_bytes = stream.seek(0, os.SEEK_END)
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror})") from None
    if num_bytes > MAX_BYTES:
        raise ImageTooLargeError(f"has {num_bytes / 2**20:.0f} MiB, over the limit of {MAX_BYTES / 2**20:g}")
    if not prefix:
        raise ImageError("is empty (zero bytes)")
    fault = f"is not an image of a format that is read here: {', '.join(formats)}"
    for name in formats:
        factory, accepts = Image.OPEN.get(name, (None, None))
        verdict = accepts(prefix) if factory and accepts else False
        if isinstance(verdict, str):  # Pillow was built without this format
            fault = f"is {name}, which the installed Pillow cannot read"
        elif factory and verdict:
            stream.seek(0)
            try:
                return factory(stream, "")
            except Exception as error:
                fault = _describe(error)
    raise ImageError(fault)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if not (width and height):
        raise ImageError("has no pixels")
    if width * height > max_pixels:
        raise ImageTooLargeError(f"has {width * height / 1e6:.1f} megapixels, over the limit of {max_pixels / 1e6:g}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(f"is {width}x{height} pixels, longer than 1:{MAX_ASPECT_RATIO}")


def _check_memory(image: Image.Image, stream: BinaryIO) -> None:
    """Refuse what can only be decoded whole and would take too much memory then."""
    tile = getattr(image, "tile", None)
    if tile and tile[0][0] in ("ppm", "ppm_plain") and image.width * image.height > MAX_SLOW_PIXELS:
        raise ImageTooLargeError(
            f"has {image.width * image.height / 1e6:.1f} megapixels, over the limit of {MAX_SLOW_PIXELS / 1e6:g} for "
            "this kind of PPM; save it as PNG"
        )
    if image.format not in BYTES_PER_PIXEL or image.format == "JPEG2000":
        return
    needed = image.width * image.height * BYTES_PER_PIXEL[image.format]
    if image.format in READ_WHOLE:
        place = stream.tell()
        needed += stream.seek(0, os.SEEK_END)
        stream.seek(place)
    elif image.format == "TIFF":
        needed += _largest_tiff_part(image)
        if isinstance(stream, io.BytesIO):
            needed += stream.getbuffer().nbytes  # Pillow hands a copy on
    if needed > MAX_MEMORY:
        raise ImageTooLargeError(
            f"would take {needed / 2**30:.1f} GiB of memory as {image.format}, over the limit of "
            f"{MAX_MEMORY / 2**30:g}; save it smaller, or as JPEG"
        )


def _choose_scale(image: Image.Image, most_pixels: int, divisor: int) -> None:
    """Let an image be decoded at less than its size, where its format can and the limits demand it."""
    width, height = image.size
    if image.format in ("JPEG", "MPO") and width * height > most_pixels:
        image.draft(None, (max(1, width // divisor), max(1, height // divisor)))
    elif image.format == "JPEG2000" and width * height * BYTES_PER_PIXEL["JPEG2000"] > MAX_MEMORY:
        image.reduce = 1  # type: ignore[method-assign, assignment]  # the plugin's way of saying: at half its size


def _largest_tiff_part(image: Image.Image) -> int:
    """Compute the bytes of a strip or tile, each of which is unpacked whole; a tile may be larger than its image."""
    tags: Any = image.tag_v2  # type: ignore[attr-defined]

    def number(tag: int, default: int) -> int:
        value = tags.get(tag, default)
        return int(max(value) if isinstance(value, tuple) else value)

    try:
        pixels = image.width * min(number(TIFF_ROWS, image.height), image.height)
        if TIFF_TILE_WIDTH in tags:
            pixels = number(TIFF_TILE_WIDTH, 0) * number(TIFF_TILE_ROWS, 0)
        return pixels * number(TIFF_SAMPLES, 1) * number(TIFF_BITS, 1) // 8
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ImageError(_describe(error)) from error


def _decode(image: Image.Image, max_pixels: int) -> Image.Image:
    try:
        image.load()
        _check_size(image, max_pixels)  # again, since an icon tells the size of what is in it only now
        is_wide = image.mode == "F" or (image.mode == "I" and not _is_16_bit(image))
        result = None if is_wide else _convert(image, 2 if image.width * image.height > MAX_WHOLE_PIXELS else 1)
    except ImageError:
        raise
    except (
        Exception
    ) as error:  # Pillow's plugins raise nearly anything: OSError, SyntaxError, struct.error, MemoryError
        if getattr(image, "_reduce", 0):
            raise ImageTooLargeError(
                "would take over 1 GiB of memory as JPEG2000, and cannot be halved while it is decoded "
                f"({' '.join(str(error).split())}); save it smaller, or as JPEG"
            ) from error
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
