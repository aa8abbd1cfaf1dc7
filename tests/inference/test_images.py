"""Pictures of every awkward kind are read rightly, or refused with a reason and nothing but `ImageError`."""

import io
import logging
import struct
import threading
import warnings
import zlib

import pytest
from PIL import Image, ImageFile

from clipmini.inference.images import (
    IMAGE_SUFFIXES,
    MAX_NAMED,
    ImageError,
    Skipped,
    find_fault,
    find_images,
    read_image,
)
from modeling_clipmini.processing_clipmini import convert_to_rgb

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def encode(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width, height, depth, colour_type, rows, *extra):
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
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
    def test_takes_path_bytes_row_and_picture(self, tmp_path):
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
        for index, colour in enumerate([RED, GREEN, BLUE, WHITE]):
            image.putpixel((index % 2, index // 2), colour)
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

    def test_grey_with_alpha(self):
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
    def test_transparent_colour(self, mode, key, other, shown):
        assert pixels(read_image(encode(row_of(mode, key, other), transparency=key))) == [WHITE, shown]

    @pytest.mark.parametrize(
        ("value", "expected"), [(0, 0), (128, 0), (129, 1), (257, 1), (32768, 128), (65278, 254), (65535, 255)]
    )
    def test_16_bit_grey_is_scaled_and_rounded(self, value, expected):
        data = png_of(1, 1, 16, 0, [struct.pack(">H", value)])
        assert pixels(read_image(data)) == [(expected,) * 3]

    def test_16_bit_tiff_and_colour(self):
        tiff = encode(row_of("I;16", 0, 65535), "TIFF")
        assert pixels(read_image(tiff)) == [BLACK, WHITE]
        assert pixels(read_image(png_of(1, 1, 16, 2, [struct.pack(">HHH", 65535, 0, 32768)]))) == [(255, 0, 128)]

    def test_1_bit_and_grey(self):
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
        frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 2
        assert set(pixels(read_image(data))) == {RED}

    def test_does_not_change_the_callers_picture(self):
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
    "text": (lambda: b"this is not a picture, whatever its name", "not an image"),
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
    "108 megapixels": (lambda: png_of(12000, 9000, 1, 0, [bytes(1500)] * 9000), "has 108 megapixels"),
    "a claim of 400 megapixels": (lambda: png_of(20000, 20000, 8, 2, [b"\0"]), "has 400 megapixels"),
    "a claim of 4 gigapixels": (lambda: png_of(65000, 65000, 8, 2, [b"\0"]), "has 4225 megapixels"),
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
            assert reason in find_fault(source)
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

    def test_pictures_in_memory(self):
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
            assert read_image(png_of(10000, 9900, 1, 0, [bytes(1250)] * 9900)).size == (10000, 9900)
        assert read_image(Image.new("RGB", (100, 1))).size == (100, 1)

    def test_own_limit_of_pillow_is_kept_and_not_needed(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert "has 108 megapixels" in find_fault(FAULTS["108 megapixels"][0]())
        monkeypatch.undo()
        limit = Image.MAX_IMAGE_PIXELS
        read_image(jpeg())
        assert limit == Image.MAX_IMAGE_PIXELS
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 95}])
    def test_reduced_check_agrees_with_reading_at_every_end(self, options):
        data = encode(noise(133, 117), "JPEG", **options)
        for cut in (*range(1, 40), *range(40, len(data), len(data) // 20)):
            try:
                read_image(data[:-cut])
                is_good = True
            except ImageError:
                is_good = False
            assert (find_fault(data[:-cut]) is None) == is_good, cut

    def test_damage_anywhere_raises_nothing_else(self):
        kinds = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "JPEG2000")
        for kind in kinds:
            data = encode(noise(24, 24), kind)
            for start in range(0, min(len(data), 120), 3):
                damaged = data[:start] + b"\xff\x00\xa7" + data[start + 3 :]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    find_fault(damaged)  # anything but ImageError would come through

    def test_many_threads(self):
        good, bad = encode(row_of("RGB", RED)), truncate(jpeg(), 0.5)
        results = []

        def work():
            for _ in range(20):
                results.append((pixels(read_image(good)) == [RED], find_fault(bad) is not None))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [(True, True)] * 80


class TestFindImages:
    def test_recursive_sorted_and_without_hidden(self, tmp_path):
        for name in ("b.JPG", "a.png", "sub/deep/c.webp", ".hidden.jpg", ".cache/d.jpg", "notes.txt", "e.jpg.part"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        expected = [tmp_path / "a.png", tmp_path / "b.JPG", tmp_path / "sub/deep/c.webp"]
        assert find_images(tmp_path) == expected
        assert find_images(str(tmp_path)) == expected

    def test_hidden_parent_does_not_matter(self, tmp_path):
        folder = tmp_path / ".mine"
        folder.mkdir()
        (folder / "a.png").write_bytes(b"")
        assert find_images(folder) == [folder / "a.png"]

    @pytest.mark.parametrize(
        ("name", "reason"), [("gone", "does not exist"), ("a.txt", "not a folder"), ("empty", "has no pictures")]
    )
    def test_errors(self, name, reason, tmp_path):
        (tmp_path / "a.txt").write_text("a")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=reason):
            find_images(tmp_path / name)

    def test_names_a_sub_folder_that_cannot_be_read(self, tmp_path, monkeypatch, caplog):
        error = PermissionError(13, "Permission denied", "a/b")
        monkeypatch.setattr("os.walk", lambda top, onerror: onerror(error) or [(top, [], ["a.png"])])
        assert find_images(tmp_path) == [tmp_path / "a.png"]
        assert caplog.messages == ["cannot look into a/b (Permission denied)"]

    def test_suffixes(self):
        assert {".jpg", ".png", ".webp", ".gif", ".heic"} <= IMAGE_SUFFIXES
        assert all(suffix.startswith(".") and suffix.islower() for suffix in IMAGE_SUFFIXES)


class TestSkipped:
    def test_counts_and_warns(self, caplog):
        skipped = Skipped()
        assert skipped.count == 0
        skipped.add("a.jpg", "is empty")
        skipped.add("b.jpg", "does not exist")
        skipped.log_summary()
        assert skipped.count == 2
        assert skipped.items == [("a.jpg", "is empty"), ("b.jpg", "does not exist")]
        assert [record.getMessage() for record in caplog.records] == [
            "skipped 1 so far: a.jpg: is empty",
            "skipped 2 so far: b.jpg: does not exist",
            "2 inputs skipped",
        ]
        assert {record.levelno for record in caplog.records} == {logging.WARNING}

    def test_silent_when_all_is_well(self, caplog):
        Skipped().log_summary()
        assert not caplog.records

    def test_does_not_flood(self, caplog):
        skipped = Skipped()
        for number in range(MAX_NAMED + 30):
            skipped.add(f"{number}.jpg", "is empty")
        skipped.log_summary()
        assert len(caplog.records) == MAX_NAMED + 1
        assert caplog.messages[-1] == f"{MAX_NAMED + 30} inputs skipped; the first {MAX_NAMED} are named above"
        assert len(skipped.items) == MAX_NAMED + 30

    def test_strict_stops_at_the_first(self):
        with pytest.raises(ValueError, match=r"a\.jpg: is empty"):
            Skipped(strict=True).add("a.jpg", "is empty")
