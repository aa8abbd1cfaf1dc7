"""Every image is decoded once and then known; nothing is known wrongly, and no image stops the scan."""

import hashlib
import io
import os
import shutil
import signal
import sys
import time
from importlib.metadata import PackageNotFoundError

import imagehash
import numpy as np
import pillow_heif
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from clipmini.data import scan
from clipmini.data.scan import scan_images, scan_readable
from modeling_clipmini.images_clipmini import ImageError, read_image
from pair_files import encode, write_images


def rows_of(*sources):
    """Rows as `load_pairs` has them, from paths and bytes."""
    images = [source if source is None or isinstance(source, bytes) else str(source) for source in sources]
    return Dataset.from_dict({"image": images}, features=Features({"image": ImageFeature(decode=False)}))


@pytest.fixture
def later(monkeypatch):
    """Ten seconds from now, when files that a test has just written are settled."""
    monkeypatch.setattr(scan.time, "time_ns", lambda: int((time.time() + 10) * 1e9))


@pytest.fixture
def work(monkeypatch):
    """Count the images that are decoded in this process since the last time."""
    decoded = []
    monkeypatch.setattr(scan, "read_image", lambda source: decoded.append(source) or read_image(source))

    def since_last():
        count = len(decoded)
        decoded.clear()
        return count

    return since_last


def test_facts_are_those_of_the_image_that_is_read(tmp_path):
    sources = [path for path in write_images(tmp_path, 3).iterdir()] + [encode(7)]
    facts = scan_images(rows_of(*sources))
    assert facts.paths == [*map(str, sources[:3]), None]
    assert facts.faults == [None] * 4
    for source, pixels, look in zip(sources, facts.pixels, facts.perceptual_hashes, strict=True):
        image = read_image(source)
        assert pixels.tobytes() == hashlib.blake2b(b"4x3 " + image.tobytes(), digest_size=16).digest()
        np.testing.assert_array_equal(look, imagehash.phash(image).hash.ravel())


def test_all_kinds_of_rows_are_read(tmp_path):
    path = str(write_images(tmp_path, 1) / "0.png")
    both = {"bytes": encode(0), "path": "name.png"}
    decoded = Dataset.from_dict({"image": [both]}, features=Features({"image": ImageFeature()}))
    expected = scan_images(rows_of(path)).pixels.tobytes()
    for rows, name in (
        (Dataset.from_dict({"image": [path]}), path),
        (Dataset.from_dict({"image": [encode(0)]}), None),
        (decoded.cast_column("image", ImageFeature(decode=False)), "name.png"),
        (decoded, "name.png"),
        (decoded.with_format("numpy"), "name.png"),
    ):
        facts = scan_images(rows)
        assert (facts.paths, facts.faults, facts.pixels.tobytes()) == ([name], [None], expected)
    facts = scan_images(rows_of(path).select([]))
    assert (facts.paths, facts.faults, len(facts.pixels)) == ([], [], 0)


def test_faults_are_told_in_their_rows(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    names = ("0.png", "gone.png", "empty.png", "1.png", "folder", "pipe")
    facts = scan_images(rows_of(*(tmp_path / name for name in names), "https://x.org/a.png", None, b"text", encode()))
    told = [fault and fault.split(",")[0].split(";")[0] for fault in facts.faults]
    assert told == [
        *(None, "does not exist", "is empty (zero bytes)", None, "is not a file", "is not a file"),
        *("is a web address", "has neither bytes nor a path"),
        *("is not an image of a format that is read here: JPEG", None),
    ]
    with pytest.raises(ImageError, match=r"gone\.png: does not exist"):
        scan_readable(rows_of(*(tmp_path / name for name in names)))
    rows = rows_of(encode(), None)
    with pytest.raises(ImageError, match=r"^row 2: has neither"):
        scan_readable(rows)
    with pytest.raises(ImageError, match=r"^image_id 8: has neither"):
        scan_readable(rows.add_column("image_id", [7, 8]))


def test_what_is_known_is_not_decoded(tmp_path, later, work):
    paths = [write_images(tmp_path, 3) / f"{number}.png" for number in range(3)]
    first = scan_images(rows_of(*paths))
    assert work() == 3
    again = scan_images(rows_of(*reversed(paths)))
    assert work() == 0
    np.testing.assert_array_equal(again.pixels, first.pixels[::-1])
    np.testing.assert_array_equal(again.perceptual_hashes, first.perceptual_hashes[::-1])


def test_what_was_touched_moved_or_copied_is_decoded_again(tmp_path, later, work):
    write_images(tmp_path, 4)
    scan_images(rows_of(*(tmp_path / f"{number}.png" for number in range(4))))
    assert work() == 4
    os.utime(tmp_path / "0.png")
    (tmp_path / "1.png").rename(tmp_path / "moved.png")
    shutil.copy(tmp_path / "2.png", tmp_path / "copied.png")
    facts = scan_images(rows_of(*(tmp_path / f"{name}.png" for name in ("0", "moved", "copied", "2", "3"))))
    assert work() == 3
    assert facts.pixels[2].tobytes() == facts.pixels[3].tobytes()


def test_bytes_are_decoded_once(work):
    scan_images(rows_of(encode(0), encode(1), encode(0)))
    scan_images(rows_of(encode(1), encode(0)))
    assert work() == 2


def test_a_changed_file_is_seen(tmp_path, later):
    path = tmp_path / "a.bmp"
    looks, known = [], set()
    for color in ("red", "blue"):
        Image.new("RGB", (8, 6), color).save(path)
        os.utime(path, ns=(10, 10))  # as rsync or git would: the system's own time of change differs
        known.add((path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino))
        looks.append(scan_images(rows_of(path)).pixels.tobytes())
    assert looks[0] != looks[1]
    assert len(known) == 1  # nothing else tells the two apart


@pytest.mark.parametrize("age_s", [0.0, 1.5])
def test_a_file_of_a_doubtful_time_is_decoded_again(tmp_path, work, age_s, monkeypatch):
    path = write_images(tmp_path, 1) / "0.png"
    now = path.stat().st_ctime_ns + int(age_s * 1e9)
    monkeypatch.setattr(scan.time, "time_ns", lambda: now)
    for _ in range(2):
        scan_images(rows_of(path))
        assert work() == 1


def test_a_file_that_an_archive_dates_into_the_future_is_decoded_once(tmp_path, later, work):
    path = write_images(tmp_path, 1) / "0.png"
    os.utime(path, (time.time() + 3600, time.time() + 3600))
    scan_images(rows_of(path))
    scan_images(rows_of(path))
    assert work() == 1


def test_a_file_that_changes_while_it_is_decoded_is_not_kept(tmp_path, later, monkeypatch):
    path = write_images(tmp_path, 1) / "0.png"

    def change_and_read(source):
        path.write_bytes(encode(1))
        return read_image(source)

    with monkeypatch.context() as patch:
        patch.setattr(scan, "read_image", change_and_read)
        scan_images(rows_of(path))
    path.write_bytes(encode(0))
    np.testing.assert_array_equal(scan_images(rows_of(path)).pixels, scan_images(rows_of(encode(0))).pixels)


def test_a_fault_is_not_kept(tmp_path, later, monkeypatch):
    rows = rows_of(write_images(tmp_path, 1) / "0.png", encode(1))

    def refuse(_):
        raise ImageError("is AVIF, which the installed Pillow cannot read")

    with monkeypatch.context() as patch:
        patch.setattr(scan, "read_image", refuse)
        assert scan_images(rows).faults == ["is AVIF, which the installed Pillow cannot read"] * 2
    assert scan_images(rows).faults == [None] * 2


def test_heif_is_looked_at_again_once_it_can_be_read(work, monkeypatch):
    def raise_not_found(_):
        raise PackageNotFoundError

    stream = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 48))).save(stream)
    rows = rows_of(encode(0), stream.getvalue())
    monkeypatch.setattr(Image, "OPEN", {name: opener for name, opener in Image.OPEN.items() if name != "HEIF"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        patch.setattr(scan, "version", raise_not_found)
        fault = "is HEIF (.heic), which takes one more package: pip install pillow-heif"
        assert scan_images(rows).faults == scan_images(rows).faults == [None, fault]
    work()
    assert scan_images(rows).faults == [None, None]
    assert work() == 2
    assert scan_images(rows).faults == [None, None]
    assert work() == 0  # although HEIF is registered now


def test_another_pillow_heif_looks_again(work, monkeypatch):
    rows = rows_of(encode(0))
    scan_images(rows)
    monkeypatch.setattr(scan, "version", lambda _: "99.0")
    scan_images(rows)
    assert work() == 2


def test_another_pillow_looks_again(work, monkeypatch):
    rows = rows_of(encode(0))
    scan_images(rows)
    monkeypatch.setattr(scan.PIL, "__version__", "99.0")
    scan_images(rows)
    assert work() == 2


@pytest.fixture
def many(monkeypatch):
    """Rows of bytes that are shared among two workers."""
    monkeypatch.setattr(scan, "MIN_IMAGES_FOR_WORKERS", 2)
    monkeypatch.setattr(scan, "IMAGES_PER_TASK", 3)
    monkeypatch.setattr(scan, "_num_workers", lambda: 2)
    return rows_of(*(encode(number) if number % 7 else b"" for number in range(40)))


def test_workers_keep_the_order_and_leave_random_numbers_alone(many, monkeypatch):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    facts = scan_images(many)
    assert torch.equal(torch.get_rng_state(), state)
    assert [row for row, fault in enumerate(facts.faults) if fault] == list(range(0, 40, 7))
    monkeypatch.setattr(scan, "MIN_IMAGES_FOR_WORKERS", 100)
    for row in (3, 39):
        np.testing.assert_array_equal(facts.pixels[row], scan_images(rows_of(encode(row))).pixels[0])


@pytest.mark.skipif(sys.platform != "linux", reason="without workers it would end the test")
def test_an_image_that_ends_its_worker_costs_itself_every_time(many, monkeypatch):
    def read_or_die(source):
        if source["bytes"] in (encode(5), encode(30)):
            os.kill(os.getpid(), signal.SIGKILL)
        return read_image(source)

    monkeypatch.setattr(scan, "read_image", read_or_die)
    monkeypatch.setattr(scan, "MIN_IMAGES_FOR_WORKERS", len(many))
    monkeypatch.setattr(scan, "IMAGES_PER_TASK", 1)
    for _ in range(2):
        faults = scan_images(many).faults
        assert {row: fault for row, fault in enumerate(faults) if fault} == {
            **dict.fromkeys(range(0, 40, 7), "is empty (zero bytes)"),
            **dict.fromkeys((5, 30), "ends the process that reads it"),
        }
