"""Open an image from any source, or raise with the reason: all images are read here.

Content decides what an image is, never its name, and only the formats in `FORMATS` are tried. Whatever the source
holds, reading one image takes at most `MAX_MEMORY`, and an unusable image raises nothing but `ImageError`.
"""

import io
import os
import re
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from PIL import ExifTags, Image

# Listed one by one: some of Pillow's other formats start programs (EPS), or have no signature, so that any file passes
# for one.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "HEIF")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
HEIF_SIZE = re.compile(rb"ispe\0...(.{4})(.{4})", re.DOTALL)  # width and height (ISO/IEC 23008-12, section 6.5.3)
ADDRESSES = ("http://", "https://")

MAX_PIXELS = 100_000_000
MAX_BYTES = 320 * 2**20  # per file: 100 megapixels uncompressed; metadata can make a decoder read a whole file twice
MAX_SLOW_PIXELS = 5_000_000  # for what Pillow decodes in Python, at a megapixel a second
MAX_ASPECT_RATIO = 100  # resizing the shorter edge to 224 makes 5 megapixels of 1:100, and a gigapixel of 1:20,000
MAX_MEMORY = 2**30  # bytes per image, from opening it until the processor has made `pixel_values`
MAX_WHOLE_PIXELS = 50_000_000  # larger images are halved while decoding: processors take up to 20 bytes per pixel
# Upper bounds on the bytes per pixel that decoding takes, for formats that Pillow cannot decode row by row; measured
# by benchmarks/images.py. Pillow's own image takes 4.
BYTES_PER_PIXEL = {"WEBP": 17, "AVIF": 18, "HEIF": 18, "JPEG2000": 25, "TIFF": 5}
READ_WHOLE = ("WEBP", "AVIF", "HEIF")  # formats whose decoders hold the whole file in memory as well
STRIP_PIXELS = 2**20  # converted at once

MAX_ADDRESS_BYTES = 64 * 2**20
ADDRESS_TIMEOUT_S = 60.0  # from the request to the last byte
READ_TIMEOUT_S = 10.0  # without any byte

# What makes each EXIF orientation upright (CIPA DC-008, section 4.6.4).
TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image cannot be used. From `read_image`, the message is the reason as one clause, without a file name.

    Attributes:
        is_too_large: whether the reason is a limit on bytes, pixels or memory.
    """

    is_too_large = False


class ImageTooLargeError(ImageError):
    """An image exceeds a limit on bytes, pixels or memory."""

    is_too_large = True


def read_image(
    source: Any,
    *,
    allow_paths: bool = True,
    allow_addresses: bool = False,
    formats: Sequence[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
    min_edge: int | None = None,
) -> Image.Image:
    """Read an image as people see it: upright, alpha over white, three 8-bit channels.

    Args:
        source: an encoded image as bytes; a path or an http(s) address, where allowed; a row of a
            `datasets.Image(decode=False)` column (`{"bytes": ..., "path": ...}`); or a Pillow image. Of an animated
            file the first frame is read, of a Pillow image the current frame.
        allow_paths: open a path. Turn this off for untrusted input.
        allow_addresses: fetch an address, within `MAX_ADDRESS_BYTES` and `ADDRESS_TIMEOUT_S`. Leave this off for
            untrusted input.
        formats: the formats to try, a subset of `FORMATS`.
        max_pixels: refuse images with more pixels, before decoding them.
        min_edge: decode a JPEG at a half, a quarter or an eighth of its width and height, whichever is the smallest
            with at least so many pixels on the shorter edge; that takes a fraction of the time. None: at full size.

    Returns:
        A decoded image of mode "RGB", with no file behind it. Width and height are halved for an image of over
        `MAX_WHOLE_PIXELS`, and for a JPEG 2000 image that would otherwise take more than `MAX_MEMORY`.

    Raises:
        ImageError: the image is missing, not a regular file, empty, of another format, truncated or damaged; would
            take more than `MAX_MEMORY`; has over `max_pixels` pixels; is over `MAX_ASPECT_RATIO` times as long as
            wide; has 32-bit pixels, whose range is unknown; or is HEIF, and pillow-heif is not installed.
        TypeError: `source` is none of these types.
    """
    with open_image(source, allow_paths, allow_addresses, formats, max_pixels) as image:
        if image is not source:
            _choose_scale(image, min_edge)
        return _decode(image, max_pixels)


def read_named(source: Any, name: str, **options: Any) -> Image.Image:
    """Read an image as `read_image` does, with its path, address or name in the error message.

    Args:
        source: as in `read_image`.
        name: identifies the image if it has neither path nor address.
        **options: as in `read_image`.

    Returns:
        The image, as from `read_image`.

    Raises:
        ImageError: the image cannot be read.
    """
    try:
        return read_image(source, **options)
    except ImageError as error:
        path = source.get("path") if isinstance(source, Mapping) else getattr(source, "filename", source)
        has_path = isinstance(path, (str, os.PathLike)) and os.fspath(path)
        raise type(error)(f"{path if has_path else name}: {error}") from error


def image_size(source: Any, **options: Any) -> tuple[int, int]:
    """Return an image's width and height in pixels, without decoding it and before its orientation is applied.

    Args:
        source: as in `read_image`.
        **options: as in `read_image`.

    Raises:
        ImageError: the image cannot be opened or exceeds a limit; faults that only decoding reveals are not found.
    """
    with open_image(source, **options) as image:
        width, height = image.size
        return width, height


def convert_to_rgb(image: Image.Image, factor: int = 1) -> Image.Image:
    """Return a copy of an image as people see it: upright, opaque, three 8-bit channels.

    Pillow's own `convert("RGB")` ignores the EXIF orientation, drops alpha (transparent pixels show whatever color
    lies beneath, mostly black) and clips 16-bit grays to white.

    Args:
        image: any Pillow image; of an animation the current frame is used.
        factor: divide width and height by this number, rounding up.

    Returns:
        A new image of mode "RGB": orientation applied, alpha over white, 16-bit values scaled to 8.
    """
    image.load()  # a truncated file fails here
    try:
        transpose = TRANSPOSE_BY_ORIENTATION.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data raises errors of all kinds, and says nothing against the pixels
        transpose = None
    result = image
    if image.mode != "RGB" or image.has_transparency_data or factor > 1:
        width, height = image.size
        # In strips, because every step makes a copy.
        num_rows = max(STRIP_PIXELS // width // factor, 1) * factor
        result = Image.new("RGB", (-(-width // factor), -(-height // factor)))
        for top in range(0, height, num_rows):
            strip = _make_opaque(image.crop((0, top, width, min(top + num_rows, height))))
            result.paste(strip.reduce(factor) if factor > 1 else strip, (0, top // factor))
    if transpose is not None:
        result = result.transpose(transpose)
        result.info = {}  # the orientation in it would be applied again
    return result.copy() if result is image else result


def _make_opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # I;16 in either byte order, or the 32-bit I that Pillow makes of 16-bit PNGs
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")  # Pillow truncates
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextmanager
def open_image(
    source: Any,
    allow_paths: bool = True,
    allow_addresses: bool = False,
    formats: Sequence[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Image.Image]:
    """Open an image without decoding it, and check its size: for what its header says.

    Args:
        source: as in `read_image`, like the other arguments.
        allow_paths: see there.
        allow_addresses: see there.
        formats: see there.
        max_pixels: see there.

    Yields:
        The image as its file has it, before its orientation is applied.

    Raises:
        ImageError: the image cannot be opened or exceeds a limit; faults that only decoding reveals are not found.
    """
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
        stream = _open_file(_path_of(source))
    with stream:
        image = _identify(stream, formats)
        _check_size(image, max_pixels)
        _check_memory(image, stream)
        yield image


def _path_of(source: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the path of a `file://` address, which can spell names that are not UTF-8; any other path as it is."""
    if str(source).startswith("file://"):
        return urllib.parse.unquote(str(source).removeprefix("file://"), errors="surrogateescape")
    return source


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of an image's file, which `read_image` takes as well as the path.

    Raises:
        ImageError: it does not exist, is no regular file, is larger than `MAX_BYTES`, or cannot be read.
    """
    with _open_file(path) as stream:
        try:
            content = stream.read(MAX_BYTES + 1)
        except OSError as error:
            raise ImageError(f"cannot be read ({error.strerror})") from None
    if len(content) > MAX_BYTES:
        raise ImageTooLargeError(f"has over {MAX_BYTES / 2**20:g} MiB, the limit")
    return content


def _open_file(path: str | os.PathLike[str]) -> BinaryIO:
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait forever
        raise ImageError("is not a file")
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise ImageError("does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise ImageError(f"cannot be opened ({getattr(error, 'strerror', None) or error})") from None


class _Connector(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens http and https connections and keeps them, so that another thread can shut them down."""

    def __init__(self) -> None:
        super().__init__()
        self.connections: list[Any] = []

    def do_open(self, http_class: Any, *args: Any, **kwargs: Any) -> Any:
        def connect(*args: Any, **kwargs: Any) -> Any:
            self.connections.append(http_class(*args, **kwargs))
            return self.connections[-1]

        return super().do_open(connect, *args, **kwargs)


def _fetch(address: str) -> bytes:
    """Fetch an address in a thread, because no socket timeout ends a response that arrives byte by byte."""
    connector, is_over = _Connector(), threading.Event()
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(_read_address(address, connector, is_over))
        except Exception as error:  # malformed addresses and broken responses raise nearly anything
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(ADDRESS_TIMEOUT_S)
    if thread.is_alive():
        is_over.set()  # ends the reading of a body
        for connection in connector.connections:  # ends the reading of a header
            with suppress(OSError, AttributeError):  # there is no socket before the header, nor during the body
                connection.sock.shutdown(socket.SHUT_RDWR)
        raise ImageError(f"did not arrive within {ADDRESS_TIMEOUT_S:g} seconds")
    (result,) = outcome
    if isinstance(result, Exception):
        raise ImageError(f"cannot be fetched ({' '.join(str(result).split()) or type(result).__name__})") from result
    if len(result) > MAX_ADDRESS_BYTES:
        raise ImageTooLargeError(f"has more than {MAX_ADDRESS_BYTES // 2**20} MiB, the limit for web addresses")
    return result


def _read_address(address: str, connector: _Connector, is_over: threading.Event) -> bytes:
    """Read an address to its end, or until it exceeds the limit or `is_over` is set."""
    opener = urllib.request.OpenerDirector()  # build_opener() would follow redirects to ftp as well
    for handler in (
        connector,
        urllib.request.ProxyHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),  # refuses a redirect to another protocol
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(address, headers={"User-Agent": "clipmini"})
    content = bytearray()
    with opener.open(request, timeout=READ_TIMEOUT_S) as response:
        while len(content) <= MAX_ADDRESS_BYTES and not is_over.is_set() and (part := response.read1(2**16)):
            content += part
    return bytes(content)


def _identify(stream: BinaryIO, formats: Sequence[str]) -> Image.Image:
    """Do what `Image.open` does, without its size warning, which can only be silenced for all threads at once."""
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
        if name == "HEIF" and prefix[4:8] == b"ftyp" and prefix[8:12] in HEIF_BRANDS and name not in Image.OPEN:
            _register_heif()
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


def _register_heif() -> None:
    """Register pillow-heif with Pillow, at the first image that needs it."""
    try:
        import pillow_heif  # here, since transformers refuses a model whose top-level imports are not all installed

        pillow_heif.register_heif_opener()
    except ImportError:
        raise ImageError("is HEIF (.heic), which takes one more package: pip install pillow-heif") from None


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if not (width and height):
        raise ImageError("has no pixels")
    if width * height > max_pixels:
        raise ImageTooLargeError(f"has {width * height / 1e6:.1f} megapixels, over the limit of {max_pixels / 1e6:g}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(f"is {width}x{height} pixels, longer than 1:{MAX_ASPECT_RATIO}")


def _check_memory(image: Image.Image, stream: BinaryIO) -> None:
    """Refuse images that can only be decoded whole and would then take too much memory or time."""
    num_pixels = image.width * image.height
    tile = getattr(image, "tile", None)
    if tile and tile[0][0] in ("ppm", "ppm_plain") and num_pixels > MAX_SLOW_PIXELS:
        raise ImageTooLargeError(
            f"has {num_pixels / 1e6:.1f} megapixels, over the limit of {MAX_SLOW_PIXELS / 1e6:g} for this kind of "
            "PPM; save it as PNG"
        )
    if image.format not in BYTES_PER_PIXEL or image.format == "JPEG2000":  # which can be halved while decoding
        return
    if image.format == "HEIF":
        num_pixels = max(num_pixels, _largest_heif_item(stream))
    needed = num_pixels * BYTES_PER_PIXEL[image.format]
    if image.format in READ_WHOLE:
        position = stream.tell()
        needed += stream.seek(0, os.SEEK_END)
        stream.seek(position)
    elif image.format == "TIFF":
        needed += _largest_tiff_part(image)
        if isinstance(stream, io.BytesIO):
            needed += stream.getbuffer().nbytes  # Pillow passes a copy to the decoder
    if needed > MAX_MEMORY:
        raise ImageTooLargeError(
            f"would take {needed / 2**30:.1f} GiB of memory as {image.format}, over the limit of "
            f"{MAX_MEMORY / 2**30:g}; save it smaller, or as JPEG"
        )


def _largest_heif_item(stream: BinaryIO) -> int:
    """Return the pixels of the largest item in the file: what is shown may be a small part, cut after decoding it."""
    stream.seek(0)
    sizes = HEIF_SIZE.findall(stream.read())
    if not sizes:  # optional for the decoder, but not in the standard
        raise ImageError("is truncated or damaged (it does not say how large it is)")
    return max(int.from_bytes(width) * int.from_bytes(height) for width, height in sizes)


def _largest_tiff_part(image: Image.Image) -> int:
    """Return the bytes of a strip or tile. Each is unpacked whole, and a tile may be larger than its image."""
    tags: Any = image.tag_v2  # type: ignore[attr-defined]

    def number(tag: int, default: int) -> int:
        value = tags.get(tag, default)
        return int(max(value) if isinstance(value, tuple) else value)

    try:
        num_pixels = image.width * min(number(ExifTags.Base.RowsPerStrip, image.height), image.height)
        if ExifTags.Base.TileWidth in tags:
            num_pixels = number(ExifTags.Base.TileWidth, 0) * number(ExifTags.Base.TileLength, 0)
        bits_per_pixel = number(ExifTags.Base.SamplesPerPixel, 1) * number(ExifTags.Base.BitsPerSample, 1)
        return num_pixels * bits_per_pixel // 8
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ImageError(_describe(error)) from error


def _choose_scale(image: Image.Image, min_edge: int | None) -> None:
    """Have an image decoded smaller, where its format can: if it would take too much memory, or down to `min_edge`."""
    width, height = image.size
    if image.format in ("JPEG", "MPO"):
        scale = 2 if width * height > MAX_WHOLE_PIXELS else 1
        if min_edge is not None:
            scale = max(scale, min(width, height) // min_edge)
        image.draft(None, (max(1, width // scale), max(1, height // scale)))
    elif image.format == "JPEG2000" and width * height * BYTES_PER_PIXEL["JPEG2000"] > MAX_MEMORY:
        image.reduce = 1  # type: ignore[method-assign, assignment]  # for this plugin: one halving


def _decode(image: Image.Image, max_pixels: int) -> Image.Image:
    try:
        image.load()
        _check_size(image, max_pixels)  # again: an icon reveals the size of the image inside only now
        if image.mode == "F" or (image.mode == "I" and not _is_16_bit(image)):
            raise ImageError(f"has 32-bit pixels (mode {image.mode}), whose range is unknown")
        return convert_to_rgb(image, 2 if image.width * image.height > MAX_WHOLE_PIXELS else 1)
    except ImageError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything: SyntaxError, struct.error, MemoryError
        if getattr(image, "_reduce", 0):
            raise ImageTooLargeError(
                "would take over 1 GiB of memory as JPEG2000, and cannot be halved while it is decoded "
                f"({' '.join(str(error).split())}); save it smaller, or as JPEG"
            ) from error
        raise ImageError(_describe(error)) from error


def _is_16_bit(image: Image.Image) -> bool:
    darkest, brightest = image.getextrema()
    return darkest >= 0 and brightest <= 65535  # type: ignore[operator]


def _describe(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"is over the limit of {MAX_PIXELS // 1_000_000} megapixels"
    return f"is truncated or damaged ({' '.join(str(error).split()) or type(error).__name__})"
