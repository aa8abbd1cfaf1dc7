"""Images of every awkward kind are read rightly, or refused with a reason and nothing but `ImageError`."""

import contextlib
import http.server
import io
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib

import pillow_heif
import pytest
from PIL import ExifTags, Image, ImageFile

from modeling_clipmini import images_clipmini
from modeling_clipmini.images_clipmini import (
    ImageError,
    convert_to_rgb,
    image_size,
    read_image,
    read_named,
)

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def encode(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width, height, depth, color_type, rows, *extra):
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    compressor = zlib.compressobj()
    data = b"".join(compressor.compress(b"\0" + row) for row in rows) + compressor.flush()
    body = png_chunk(b"IHDR", header) + b"".join(extra) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def noise(width=64, height=48):
    return Image.effect_noise((width, height), 80).convert("RGB")


def pixels(image):
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]


def row_of(mode, *values):
    image = Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    return image


class TestReadImage:
    def test_takes_path_bytes_row_and_image(self, tmp_path):
        data = encode(row_of("RGB", RED, GREEN))
        path = tmp_path / "a.png"
        path.write_bytes(data)
        sources = [path, str(path), data, {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}]
        sources += [{"bytes": data, "path": "gone.png"}, row_of("RGB", RED, GREEN), Image.open(path)]
        for source in sources:
            image = read_image(source)
            assert image.mode == "RGB"
            assert pixels(image) == [RED, GREEN]

    def test_suffix_does_not_matter(self, tmp_path):
        path = tmp_path / "really a png.jpg"
        path.write_bytes(encode(row_of("RGB", RED)))
        assert pixels(read_image(path)) == [RED]

    def test_leaves_the_file_closed(self, tmp_path):
        path = tmp_path / "a.gif"
        path.write_bytes(encode(noise().convert("P"), "GIF"))
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            image = read_image(path)
            path.unlink()
        assert image.resize((2, 2)).size == (2, 2)

    def test_smallest(self):
        assert pixels(read_image(encode(row_of("RGB", BLUE)))) == [BLUE]

    @pytest.mark.parametrize(
        ("orientation", "expected"),
        [
            (1, [RED, GREEN, BLUE, WHITE]),
            (2, [GREEN, RED, WHITE, BLUE]),
            (3, [WHITE, BLUE, GREEN, RED]),
            (4, [BLUE, WHITE, RED, GREEN]),
            (5, [RED, BLUE, GREEN, WHITE]),
            (6, [BLUE, RED, WHITE, GREEN]),
            (7, [WHITE, GREEN, BLUE, RED]),
            (8, [GREEN, WHITE, RED, BLUE]),
        ],
    )
    def test_turned_upright_once(self, orientation, expected):
        image = Image.new("RGB", (2, 2))
        for index, color in enumerate([RED, GREEN, BLUE, WHITE]):
            image.putpixel((index % 2, index // 2), color)
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright = read_image(encode(image, exif=exif))
        assert pixels(upright) == expected
        assert pixels(convert_to_rgb(upright)) == expected  # as the processor will do again

    def test_turned_jpeg_swaps_its_edges(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        assert read_image(encode(noise(64, 48), "JPEG", exif=exif)).size == (48, 64)

    def test_damaged_exif_costs_the_orientation_alone(self):
        exif = bytearray(b"Exif\0\0MM\0*\0\0\0\x08" + b"\0\x02")
        exif += struct.pack(">HHII", 0x0112, 3, 1, 6 << 16)
        exif += struct.pack(">HHII", 0x010F, 9, 1, 0)[:7]  # cut off within a tag
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert read_image(encode(noise(), "JPEG", exif=bytes(exif))).mode == "RGB"

    def test_unwritable_exif_does_not_stop_reading(self, monkeypatch):
        def fail(*args, **kwargs):
            raise struct.error("required argument is not an integer")

        monkeypatch.setattr(Image.Exif, "tobytes", fail)
        exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHII", 0x0112, 3, 1, 6 << 16) + b"\0\0\0\0"
        assert read_image(encode(noise(), "JPEG", exif=exif)).mode == "RGB"

    def test_alpha_over_white(self):
        image = row_of("RGBA", (255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128))
        assert pixels(read_image(encode(image))) == [RED, WHITE, (127, 127, 127)]

    def test_gray_with_alpha(self):
        assert pixels(read_image(encode(row_of("LA", (0, 255), (0, 0))))) == [BLACK, WHITE]

    @pytest.mark.parametrize("transparency", [0, b"\0\xff"])
    def test_palette_with_transparency(self, transparency):
        image = row_of("P", 0, 1)
        image.putpalette([*RED, *GREEN])
        assert pixels(read_image(encode(image, transparency=transparency))) == [WHITE, GREEN]

    def test_palette_without(self):
        image = row_of("P", 0, 1)
        image.putpalette([*RED, *GREEN])
        assert pixels(read_image(encode(image))) == [RED, GREEN]

    @pytest.mark.parametrize(("mode", "key", "other", "shown"), [("RGB", RED, BLUE, BLUE), ("L", 9, 0, BLACK)])
    def test_transparent_color(self, mode, key, other, shown):
        assert pixels(read_image(encode(row_of(mode, key, other), transparency=key))) == [WHITE, shown]

    @pytest.mark.parametrize(
        ("value", "expected"), [(0, 0), (128, 0), (129, 1), (257, 1), (32768, 128), (65278, 254), (65535, 255)]
    )
    def test_16_bit_gray_is_scaled_and_rounded(self, value, expected):
        data = png_of(1, 1, 16, 0, [struct.pack(">H", value)])
        assert pixels(read_image(data)) == [(expected,) * 3]

    def test_16_bit_tiff_and_color(self):
        tiff = encode(row_of("I;16", 0, 65535), "TIFF")
        assert pixels(read_image(tiff)) == [BLACK, WHITE]
        assert pixels(read_image(png_of(1, 1, 16, 2, [struct.pack(">HHH", 65535, 0, 32768)]))) == [(255, 0, 128)]

    def test_1_bit_and_gray(self):
        assert pixels(read_image(encode(row_of("1", 0, 1)))) == [BLACK, WHITE]
        assert pixels(read_image(encode(row_of("L", 7)))) == [(7, 7, 7)]

    def test_cmyk_jpeg(self):
        image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
        red, green, blue = read_image(encode(image, "JPEG", quality=100)).getpixel((4, 4))
        assert red > 250
        assert max(green, blue) < 5

    @pytest.mark.parametrize(
        ("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})]
    )
    def test_first_frame_of_an_animation(self, kind, options):
        frames = [Image.new("RGB", (4, 4), color) for color in (RED, GREEN)]
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 2
        assert set(pixels(read_image(data))) == {RED}

    def test_does_not_change_the_callers_image(self):
        image = row_of("RGBA", (255, 0, 0, 0))
        read_image(image)
        assert image.mode == "RGBA"
        assert pixels(image) == [(255, 0, 0, 0)]


def jpeg():
    return encode(noise(200, 160), "JPEG")


def truncate(data, share):
    return data[: int(len(data) * share)]


FAULTS = {
    "empty": (lambda: b"", "zero bytes"),
    "text": (lambda: b"this is not an image, whatever its name", "not an image"),
    "html": (lambda: b"<!DOCTYPE html><html></html>", "not an image"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "jpeg in half": (lambda: truncate(jpeg(), 0.5), "truncated"),
    "jpeg head": (lambda: jpeg()[:30], "truncated"),
    "jpeg signature": (lambda: jpeg()[:3], "truncated"),
    "progressive jpeg in half": (lambda: truncate(encode(noise(), "JPEG", progressive=True), 0.5), "truncated"),
    "png in half": (lambda: truncate(encode(noise()), 0.5), "truncated"),
    "png head": (lambda: encode(noise())[:20], "truncated"),
    "gif in half": (lambda: truncate(encode(noise().convert("P"), "GIF"), 0.5), "truncated"),
    "webp in half": (lambda: truncate(encode(noise(), "WEBP"), 0.5), "truncated"),
    "tiff in half": (lambda: truncate(encode(noise(), "TIFF"), 0.5), "truncated"),
    "bmp in half": (lambda: truncate(encode(noise(), "BMP"), 0.5), "truncated"),
    "png of garbage": (lambda: png_of(8, 8, 8, 2, [], png_chunk(b"IDAT", b"garbage")), "damaged"),
    "108 megapixels": (lambda: png_of(12000, 9000, 1, 0, [bytes(1500)] * 9000), "has 108.0 megapixels"),
    "a claim of 400 megapixels": (lambda: png_of(20000, 20000, 8, 2, [b"\0"]), "has 400.0 megapixels"),
    "a claim of 4 gigapixels": (lambda: png_of(65000, 65000, 8, 2, [b"\0"]), "has 4225.0 megapixels"),
    "too long": (lambda: encode(Image.new("L", (101, 1))), "101x1"),
    "too tall": (lambda: encode(Image.new("L", (2, 201))), "2x201"),
    "32-bit float": (lambda: encode(Image.new("F", (2, 2)), "TIFF"), "32-bit"),
    "32-bit integer": (lambda: encode(row_of("I", 0, 70000), "TIFF"), "32-bit"),
}


class TestFaults:
    @pytest.mark.parametrize("name", FAULTS)
    @pytest.mark.parametrize("from_file", [True, False])
    def test_reason(self, name, from_file, tmp_path):
        make, reason = FAULTS[name]
        source = make()
        if from_file:
            source = tmp_path / "a.jpg"
            source.write_bytes(make())
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with pytest.raises(ImageError, match=reason) as caught:
                read_image(source)
        assert "a.jpg" not in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("gone.jpg", "does not exist"),
            ("", "is not a file"),
            ("a" * 300, "cannot be opened"),
            ("a\0b.jpg", "cannot be opened"),
            ("https://example.org/a.jpg", "web address"),
        ],
    )
    def test_paths(self, name, reason, tmp_path):
        source = name if "://" in name else f"{tmp_path}/{name}"
        with pytest.raises(ImageError, match=reason):
            read_image(source)

    @pytest.mark.parametrize("source", [None, {"bytes": None, "path": None}])
    def test_nothing(self, source):
        with pytest.raises(ImageError, match="neither"):
            read_image(source)

    def test_images_in_memory(self):
        with pytest.raises(ImageError, match="no pixels"):
            read_image(Image.new("RGB", (0, 5)))
        with pytest.raises(ImageError, match="101x1"):
            read_image(Image.new("RGB", (101, 1)))
        with pytest.raises(ImageError, match="truncated"):
            read_image(Image.open(io.BytesIO(truncate(jpeg(), 0.5))))
        with pytest.raises(ImageError, match="La"):
            read_image(Image.new("La", (2, 2)))

    def test_other_types_are_the_callers_mistake(self):
        with pytest.raises(TypeError, match="int"):
            read_image(3)

    def test_is_a_value_error(self):
        assert issubclass(ImageError, ValueError)

    def test_at_the_limits(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow's comes at 89 megapixels
            assert read_image(png_of(10000, 9900, 1, 0, [bytes(1250)] * 9900)).size == (5000, 4950)
            assert read_image(png_of(10000, 5000, 1, 0, [bytes(1250)] * 5000)).size == (10000, 5000)
        assert read_image(Image.new("RGB", (100, 1))).size == (100, 1)

    def test_own_limit_of_pillow_is_kept_and_not_needed(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        with pytest.raises(ImageError, match=r"has 108\.0 megapixels"):
            read_image(FAULTS["108 megapixels"][0]())
        monkeypatch.undo()
        limit = Image.MAX_IMAGE_PIXELS
        read_image(jpeg())
        assert limit == Image.MAX_IMAGE_PIXELS
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False

    @pytest.mark.parametrize("size", [(1, 1), (7, 7), (1, 9), (9, 9)])
    def test_the_smallest_jpegs(self, size):
        assert read_image(encode(noise(*size), "JPEG")).size == size

    def test_damage_anywhere_raises_nothing_else(self):
        kinds = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "JPEG2000")
        for kind in kinds:
            data = encode(noise(24, 24), kind)
            for start in range(0, min(len(data), 120), 3):
                damaged = data[:start] + b"\xff\x00\xa7" + data[start + 3 :]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    with contextlib.suppress(ImageError):
                        read_image(damaged)

    def test_many_threads(self):
        good, bad = encode(row_of("RGB", RED)), truncate(jpeg(), 0.5)
        results = []

        def work():
            for _ in range(20):
                with pytest.raises(ImageError):
                    read_image(bad)
                results.append(pixels(read_image(good)) == [RED])

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [True] * 80


ODD_KINDS = {
    "RGBA": row_of("RGBA", (255, 0, 0, 90), (0, 9, 0, 0)),
    "LA": row_of("LA", (9, 90), (200, 255)),
    "I;16": row_of("I;16", 300, 65000),
    "L": row_of("L", 3, 200),
    "CMYK": row_of("CMYK", (9, 90, 0, 3), (200, 255, 1, 0)),
    "1": row_of("1", 0, 1),
}


class TestConversion:
    @pytest.mark.parametrize("mode", [*ODD_KINDS, "P"])
    def test_strips_join_without_a_seam(self, mode, monkeypatch):
        if mode == "P":
            image = noise(61, 47).convert("P")
            image.info["transparency"] = 5
        else:
            image = ODD_KINDS[mode].resize((61, 47))
        whole = convert_to_rgb(image)
        monkeypatch.setattr(images_clipmini, "STRIP_PIXELS", 61 * 4)
        assert convert_to_rgb(image).tobytes() == whole.tobytes()

    @pytest.mark.parametrize("size", [(60, 40), (61, 47), (60, 41)])
    def test_what_is_too_large_is_halved_by_averaging(self, size, monkeypatch):
        image = noise(*size)
        image.putalpha(image.getchannel("R"))
        whole = read_image(encode(image))
        monkeypatch.setattr(images_clipmini, "MAX_WHOLE_PIXELS", 2000)
        monkeypatch.setattr(images_clipmini, "STRIP_PIXELS", 61 * 4)
        halved = read_image(encode(image))
        assert halved.size == (-(-size[0] // 2), -(-size[1] // 2))
        assert halved.tobytes() == whole.reduce(2).tobytes()

    def test_a_large_jpeg_is_halved_while_it_is_decoded(self, monkeypatch):
        content = encode(noise(200, 160), "JPEG")
        monkeypatch.setattr(images_clipmini, "MAX_WHOLE_PIXELS", 200 * 160)
        assert read_image(content).size == (200, 160)
        monkeypatch.setattr(images_clipmini, "MAX_WHOLE_PIXELS", 200 * 160 - 1)
        assert read_image(content).size == (100, 80)
        assert image_size(content) == (200, 160)
        given = Image.open(io.BytesIO(content))
        assert read_image(given).size == (100, 80)
        assert given.size == (200, 160)  # the caller's own stays as it is

    def test_a_turned_image_keeps_no_orientation(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        upright = read_image(encode(noise(6, 4), exif=exif))
        assert upright.size == (4, 6)
        assert upright.getexif().get(0x0112) is None


def tiff_of_one_tile(width, height, compression=5):
    """A TIFF image of 64x64 pixels whose one tile is larger."""
    entries = [(256, 64), (257, 64), (258, 8), (259, compression), (262, 1), (277, 1)]
    entries += [(322, width), (323, height), (324, 8), (325, 4)]
    body = b"II*\0" + struct.pack("<I", 12) + b"\x80\0\0\0" + struct.pack("<H", len(entries))
    return body + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries) + bytes(4)


def icon_of(content):
    """An icon that claims 16x16 pixels, whatever is in it."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22) + content


class TestMemory:
    def test_a_tile_larger_than_its_image_is_refused(self):
        with pytest.raises(
            ImageError, match=r"would take 3\.7 GiB of memory as TIFF, over the limit of 1; save it"
        ) as e:
            read_image(tiff_of_one_tile(63200, 63200))
        assert e.value.is_too_large
        with pytest.raises(ImageError, match="truncated or damaged"):  # only its data
            read_image(tiff_of_one_tile(640, 640))

    @pytest.mark.parametrize("kind", ["WEBP", "AVIF", "TIFF"])
    def test_what_can_only_be_decoded_whole_is_refused(self, kind, monkeypatch):
        content = encode(noise(), kind)
        assert read_image(content).size == (64, 48)
        monkeypatch.setattr(images_clipmini, "MAX_MEMORY", 64 * 48 * 4)
        with pytest.raises(ImageError, match=f"would take .* GiB of memory as {kind}, over the limit"):
            read_image(content)

    def test_jpeg_2000_is_halved_while_it_is_decoded(self, monkeypatch):
        content = encode(noise(), "JPEG2000")
        monkeypatch.setattr(images_clipmini, "MAX_MEMORY", 64 * 48 * 20)
        assert read_image(content).size == (32, 24)

    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
    def test_a_huge_file_is_not_read(self, kind, tmp_path):
        """A sparse one takes next to nothing on disk; decoders would read it whole before its size is known."""
        path = tmp_path / "a"
        path.write_bytes(encode(noise(), kind))
        os.truncate(path, 2**31)
        with pytest.raises(ImageError, match="has 2048 MiB, over the limit of 320") as caught:
            read_image(path)
        assert caught.value.is_too_large

    def test_jpeg_2000_that_cannot_be_halved(self, monkeypatch):
        content = encode(noise(), "JPEG2000", num_resolutions=1)
        assert read_image(content).size == (64, 48)
        monkeypatch.setattr(images_clipmini, "MAX_MEMORY", 64 * 48 * 20)
        with pytest.raises(ImageError, match="cannot be halved while it is decoded") as caught:
            read_image(content)
        assert caught.value.is_too_large

    def test_ppm_that_is_decoded_in_python(self, monkeypatch):
        content = b"P6 3 2 100 " + bytes(18)
        assert read_image(content).size == (3, 2)
        monkeypatch.setattr(images_clipmini, "MAX_SLOW_PIXELS", 5)
        with pytest.raises(ImageError, match="for this kind of PPM"):
            read_image(content)
        assert read_image(b"P6 3 2 255 " + bytes(18)).size == (3, 2)

    def test_what_an_icon_holds_is_measured_too(self):
        assert read_image(icon_of(encode(noise(16, 16)))).size == (16, 16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ImageError, match=r"has 108\.0 megapixels"):
                read_image(icon_of(FAULTS["108 megapixels"][0]()))

    def test_1_by_60000_pixels_are_refused(self):
        with pytest.raises(ImageError, match="longer than 1:100"):
            read_image(png_of(1, 60000, 8, 0, [b"\0"] * 60000))

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "PPM", "JPEG2000"])
    def test_99_megapixels_take_less_than_a_gibibyte(self, kind, tmp_path):
        """In a process of its own, since the largest amount of memory that a process has had never shrinks."""
        image = Image.linear_gradient("L").resize((11000, 9000))
        path = tmp_path / "large"
        if kind == "PNG":
            image = Image.merge("RGBA", [image] * 4)
        elif kind in ("JPEG", "BMP", "TIFF", "PPM"):
            image = Image.merge("RGB", [image] * 3)
        image.save(path, kind, **({"progressive": True, "subsampling": 0} if kind == "JPEG" else {}))
        del image
        code = """
import resource, sys
from transformers import CLIPImageProcessor
from modeling_clipmini.images_clipmini import read_image
processor = CLIPImageProcessor()
processor(images=[read_image(sys.argv[2])], return_tensors="pt")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
processor(images=[read_image(sys.argv[1])], return_tensors="pt")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""
        small = tmp_path / "small.png"
        noise().save(small)
        done = subprocess.run([sys.executable, "-c", code, path, small], capture_output=True, text=True, check=True)
        assert float(done.stdout) < 1


def heic(image, *others, quality=95, **options):
    """Encode images as an iPhone does; the last is the one to show."""
    file = pillow_heif.from_pillow(image)
    for other in others:
        file.add_from_pillow(other)
    stream = io.BytesIO()
    file.save(stream, quality=quality, primary_index=len(others), **options)
    return stream.getvalue()


def replace_in(content, box, skip, *numbers):
    """Write 32-bit numbers into the first box of a kind."""
    start = content.index(box) + len(box) + skip
    changed = struct.pack(f">{len(numbers)}I", *numbers)
    return content[:start] + changed + content[start + len(changed) :]


@pytest.fixture
def unregistered(monkeypatch):
    """Pillow as it is before the first HEIF image of a process."""
    Image.init()  # what it registers must outlive this test
    monkeypatch.setattr(Image, "OPEN", {name: opener for name, opener in Image.OPEN.items() if name != "HEIF"})
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])


@pytest.mark.usefixtures("unregistered")
class TestHeif:
    def test_is_read_whatever_its_name(self, tmp_path):
        path = tmp_path / "IMG_0001.jpg"
        path.write_bytes(heic(noise()))
        assert read_image(path).size == (64, 48)
        assert image_size(path.read_bytes()) == (64, 48)

    def test_without_pillow_heif_it_says_what_to_install(self, monkeypatch):
        content = heic(noise())
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        for brand in (b"heic", b"mif1", b"hevc"):  # of mif1 may be AVIF as well
            with pytest.raises(ImageError, match=r"is HEIF .*: pip install pillow-heif"):
                read_image(content[:8] + brand + content[12:])
        with pytest.raises(ImageError, match="is not an image"):
            read_image(content[:8] + b"isom" + content[12:])  # a video
        with pytest.raises(ImageError, match=r"format that is read here: PNG, JPEG$"):
            read_image(content, formats=("PNG", "JPEG"))
        assert read_image(encode(noise(), "AVIF")).size == (64, 48)
        monkeypatch.undo()
        assert read_image(content).size == (64, 48)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_is_turned_upright_once(self, orientation):
        image = Image.new("RGB", (64, 32))
        for index, color in enumerate([RED, GREEN, BLUE, WHITE]):
            image.paste(color, (32 * (index % 2), 16 * (index // 2), 64, 32))
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright, expected = read_image(heic(image, exif=exif.tobytes())), read_image(encode(image, exif=exif))
        assert upright.size == expected.size
        for x, y in ((0.2, 0.2), (0.8, 0.2), (0.2, 0.8), (0.8, 0.8)):
            place = int(x * upright.width), int(y * upright.height)
            assert upright.getpixel(place) == pytest.approx(expected.getpixel(place), abs=8)
        assert upright.getexif().get(0x0112, 1) == 1

    def test_alpha_over_white_and_10_bits_scaled(self):
        assert read_image(heic(Image.new("RGBA", (64, 64), (255, 0, 0, 0)))).getpixel((9, 9)) == WHITE
        assert read_image(heic(Image.new("I;16", (64, 64), 32896))).getpixel((9, 9)) == (128, 128, 128)
        stream = io.BytesIO()
        pillow_heif.from_bytes("RGB;16", (64, 64), b"\x80\x80" * 64 * 64 * 3).save(stream)
        assert read_image(stream.getvalue()).getpixel((9, 9)) == pytest.approx((128, 128, 128), abs=1)

    def test_of_several_the_primary_one(self):
        content = heic(Image.new("RGB", (64, 64), RED), Image.new("RGB", (32, 32), BLUE))
        assert read_image(content).size == (32, 32)
        assert read_image(content).getpixel((9, 9)) == pytest.approx(BLUE, abs=3)

    def test_an_odd_size_and_tiles(self):
        assert read_image(heic(noise(61, 27))).size == (61, 27)
        assert read_image(heic(noise(301, 205), tile_size=128)).size == (301, 205)

    def test_what_is_decoded_before_it_is_cropped_counts(self, monkeypatch):
        content = heic(noise(641, 481))
        cropped = replace_in(content, b"clap", 0, 64, 1, 64, 1)
        assert read_image(cropped).size == (64, 64)
        monkeypatch.setattr(images_clipmini, "MAX_MEMORY", 640 * 480 * 18)
        with pytest.raises(ImageError, match=r"would take .* GiB of memory as HEIF") as caught:
            read_image(cropped)
        assert caught.value.is_too_large
        with pytest.raises(ImageError, match="does not say how large it is"):
            read_image(cropped.replace(b"ispe", b"xspe"))

    def test_other_sizes_than_it_says(self):
        content = heic(noise(64, 64))
        with pytest.raises(ImageError, match=r"has 3600\.0 megapixels"):
            read_image(replace_in(content, b"ispe", 4, 60_000, 60_000))
        with pytest.raises(ImageError, match=r"would take 1\.4 GiB of memory as HEIF"):
            read_image(replace_in(content, b"ispe", 4, 9000, 9000))
        with pytest.raises(ImageError, match="truncated or damaged"):
            read_image(replace_in(heic(noise(640, 480)), b"ispe", 4, 64, 64))

    def test_damage_anywhere_raises_nothing_else(self):
        content = heic(noise(24, 24))
        for end in range(1, len(content), 7):
            with pytest.raises(ImageError):
                read_image(content[:end])
        for start in range(0, len(content), 2):
            with contextlib.suppress(ImageError):
                read_image(content[:start] + b"\xff\x00\xa7" + content[start + 3 :])


class TestWhatIsLetIn:
    def test_postscript_starts_no_program(self, tmp_path, monkeypatch):
        """Of an EPS Pillow knows only by the name of its format; Ghostscript would run whatever the suffix."""
        path = tmp_path / "a.jpg"
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
        monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
        with pytest.raises(ImageError, match="is not an image"):
            read_image(path)
        with pytest.raises(ImageError, match="is not an image"):
            read_named(path, "", allow_addresses=True)

    @pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
    def test_only_regular_files(self, kind, tmp_path):
        path = tmp_path / "a.jpg"
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(path))
        else:
            path = "/dev/zero"
        with pytest.raises(ImageError, match="is not a file"):
            read_image(path)

    def test_paths_and_addresses_where_they_are_not_allowed(self, tmp_path):
        noise().save(tmp_path / "a.png")
        for source in (tmp_path / "a.png", str(tmp_path / "a.png"), {"bytes": None, "path": str(tmp_path / "a.png")}):
            for call in (read_image, image_size):
                with pytest.raises(ImageError, match="is a path, which is not opened here"):
                    call(source, allow_paths=False)
        with pytest.raises(ImageError, match="is a web address, which is not fetched here"):
            read_image("http://127.0.0.1/a.png")

    def test_formats_and_pixels(self):
        content = encode(noise(), "TIFF")
        assert image_size(content) == (64, 48)
        with pytest.raises(ImageError, match=r"format that is read here: PNG, JPEG$"):
            read_image(content, formats=("PNG", "JPEG"))
        for call in (read_image, image_size):
            with pytest.raises(ImageError, match=r"has 0\.0 megapixels, over the limit of 0\.003") as caught:
                call(content, max_pixels=3000)
            assert caught.value.is_too_large

    def test_size_is_looked_up_without_decoding(self, monkeypatch):
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
        assert image_size(encode(noise(30, 20), "JPEG")) == (30, 20)


class Web(http.server.BaseHTTPRequestHandler):
    """Serves an image in as many ways as there are paths."""

    elsewhere = {"/file": "file:///etc/passwd", "/ftp": "ftp://127.0.0.1/a.png", "/again": "/good"}  # noqa: RUF012

    def do_GET(self):
        with contextlib.suppress(OSError):  # the client goes
            getattr(self, self.path.strip("/"), self.redirect)()

    def redirect(self):
        self.send_response(302)
        self.send_header("Location", self.elsewhere[self.path])
        self.end_headers()

    def good(self):
        self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + encode(noise()))

    def endless(self):
        self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        while True:
            self.wfile.write(bytes(2**20))

    def slow(self):
        self.drip(b"HTTP/1.0 200 OK\r\n\r\n", encode(noise()))

    def slow_head(self):
        self.drip(b"HTTP/1.0 200 OK\r\nX: ", b"x" * 1000)

    def silent(self):
        time.sleep(2)

    def drip(self, start, rest):
        self.wfile.write(start)
        for byte in rest:
            self.wfile.write(bytes([byte]))
            time.sleep(0.02)

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def fetching():
    return [thread for thread in threading.enumerate() if "(work)" in thread.name]


class TestAddresses:
    @pytest.mark.parametrize("path", ["/good", "/again"])
    def test_good(self, web, path):
        assert read_image(web + path, allow_addresses=True).size == (64, 48)

    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            ("/slow", "did not arrive within 0.5 seconds"),
            ("/slow_head", "did not arrive within 0.5 seconds"),
            ("/silent", "cannot be fetched|did not arrive"),
            ("/endless", "has more than 2 MiB, the limit for web addresses"),
            ("/file", "cannot be fetched .*file"),
            ("/ftp", "cannot be fetched .*ftp"),
        ],
    )
    def test_limits(self, web, path, reason, monkeypatch):
        monkeypatch.setattr(images_clipmini, "ADDRESS_TIMEOUT_S", 0.5)
        monkeypatch.setattr(images_clipmini, "MAX_ADDRESS_BYTES", 2 * 2**20)
        start = time.monotonic()
        with pytest.raises(ImageError, match=reason):
            read_image(web + path, allow_addresses=True)
        assert time.monotonic() - start < 5
        deadline = time.monotonic() + 2
        while (left := fetching()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left  # no thread waits on

    @pytest.mark.parametrize("address", ["http://", "http://[", "http://127.0.0.1:1/a", "http://a b/", "http://x:y/"])
    def test_what_is_no_address(self, address):
        with pytest.raises(ImageError, match="cannot be fetched"):
            read_image(address, allow_addresses=True)


class TestMinEdge:
    """A JPEG is decoded at a half, a quarter or an eighth, as long as its shorter edge keeps so many pixels."""

    @pytest.mark.parametrize(
        ("size", "min_edge", "expected"),
        [
            ((800, 1600), 400, (400, 800)),
            ((800, 1600), 401, (800, 1600)),
            ((800, 1600), 100, (100, 200)),
            ((801, 1600), 400, (401, 800)),  # rounded up
            ((3200, 1700), 200, (400, 213)),  # an eighth at most
            ((300, 300), 400, (300, 300)),
            ((800, 1600), None, (800, 1600)),
        ],
    )
    def test_sizes(self, size, min_edge, expected):
        content = io.BytesIO()
        Image.new("RGB", size, "red").save(content, "JPEG")
        assert read_image(content.getvalue(), min_edge=min_edge).size == expected

    def test_other_formats_keep_their_size(self):
        content = io.BytesIO()
        Image.new("RGB", (800, 800)).save(content, "PNG")
        assert read_image(content.getvalue(), min_edge=100).size == (800, 800)

    def test_an_image_on_its_side_is_turned_upright(self):
        content, exif = io.BytesIO(), Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        Image.new("RGB", (800, 400)).save(content, "JPEG", exif=exif)
        assert read_image(content.getvalue(), min_edge=200).size == (200, 400)
