"""An index follows its sources: what is new, changed, renamed, gone or unreadable."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from PIL import Image

import clipmini
from clipmini.data.images import Skipped
from clipmini.indexing import update
from clipmini.indexing.index import LOCK_FILE, Index
from clipmini.inference.encoders import load_encoder
from modeling_clipmini import ClipMiniModel
from pair_files import encode, write_images, write_jsonl


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos", 5)


@pytest.fixture
def num_embedded(monkeypatch):
    """Count images that went through the tower."""
    counts = []
    embed = ClipMiniModel.embed_pixels
    monkeypatch.setattr(
        ClipMiniModel, "embed_pixels", lambda self, batch: counts.append(len(batch)) or embed(self, batch)
    )
    return lambda: sum(counts)


@pytest.fixture
def index(tmp_path, tiny_folder, num_embedded):
    return clipmini.open_index(tmp_path / "photos.index", tiny_folder)


def numbers(changes):
    return {
        name.removeprefix("num_"): number
        for name, number in changes.to_dict().items()
        if name.startswith("num_") and number
    }


def keys(index):
    return sorted(Path(key).name for key in index.known())


def assert_vectors(index, folder, model):
    """Compare the vector of every image with that of the model."""
    files = sorted(folder.iterdir())
    expected = load_encoder(model).encode_images(files)
    rows = {row["key"]: row for row in index.to_datasets()}
    assert sorted(rows) == [str(file) for file in files]
    vectors = torch.tensor([rows[str(file)]["vector"] for file in files], dtype=torch.float32)
    torch.testing.assert_close(vectors, expected, atol=1e-3, rtol=0)


class TestFiles:
    def test_only_what_is_new_is_embedded(self, index, photos, num_embedded):
        assert numbers(index.add(photos)) == {"embedded": 5, "images": 5}
        assert numbers(index.add(photos)) == {"unchanged": 5, "images": 5}
        write_images(photos, 1, start=5)
        assert numbers(index.add(photos)) == {"embedded": 1, "unchanged": 5, "images": 6}
        assert num_embedded() == 6

    def test_vectors_are_those_of_the_model(self, index, photos, tiny_folder):
        index.add(photos)
        assert_vectors(index, photos, tiny_folder)

    def test_new_and_renamed_images_of_one_run_keep_to_their_own_vectors(self, index, photos, tiny_folder):
        index.add(photos)
        (photos / "1.png").rename(photos / "new.png")
        (photos / "4.png").rename(photos / "another.png")
        write_images(photos, 2, start=5)
        assert numbers(index.add(photos)) == {"embedded": 2, "moved": 2, "unchanged": 3, "images": 7}
        assert_vectors(index, photos, tiny_folder)

    def test_a_changed_file_is_embedded_again_and_keeps_one_row(self, index, photos, num_embedded):
        index.add(photos)
        (photos / "0.png").write_bytes(encode(99))
        assert numbers(index.add(photos)) == {"embedded": 1, "unchanged": 4, "images": 5}
        assert num_embedded() == 6

    def test_what_is_renamed_touched_or_copied_is_not(self, index, photos, num_embedded):
        index.add(photos)
        (photos / "0.png").rename(photos / "new.png")
        os.utime(photos / "1.png", ns=(1, 1))
        (photos / "copy.png").write_bytes((photos / "2.png").read_bytes())
        assert numbers(index.add(photos)) == {"moved": 3, "unchanged": 3, "images": 6}
        assert keys(index) == ["1.png", "2.png", "3.png", "4.png", "copy.png", "new.png"]
        assert num_embedded() == 5
        hits = index.search(f"image:{photos / 'new.png'}", top=1)[0]
        assert (hits[0].image, round(hits[0].score, 3)) == (photos / "new.png", 1)

    def test_names_are_exchanged(self, index, photos, num_embedded, monkeypatch):
        """As when files are numbered anew: one replaces the row that another's vector is taken from."""
        index.add(photos)
        expected = {row["digest"]: row["vector"] for row in index.to_datasets()}
        monkeypatch.setattr(update, "NUM_PER_WRITE", 1)
        for number in reversed(range(5)):
            (photos / f"{number}.png").rename(photos / f"{number + 1}.png")
        assert numbers(index.add(photos)) == {"moved": 5, "images": 5}
        assert num_embedded() == 5
        assert {row["digest"]: row["vector"] for row in index.to_datasets()} == expected

    def test_what_is_gone_is_dropped_from_its_source_alone(self, index, photos, tmp_path):
        other = write_images(tmp_path / "other", 2, start=50)
        index.add(photos, other)
        (photos / "0.png").unlink()
        (other / "50.png").unlink()
        assert numbers(index.add(photos)) == {"unchanged": 4, "dropped": 1, "images": 6}
        assert "50.png" in keys(index)

    @pytest.mark.parametrize("lose", [lambda folder: folder.rename(folder.with_name("away")), None])
    def test_a_source_that_is_away_drops_nothing(self, index, photos, lose):
        """As a drive that is not mounted: the folder is missing, or empty."""
        index.add(photos)
        if lose is None:
            for file in photos.iterdir():
                file.unlink()
        else:
            lose(photos)
        with pytest.raises(ValueError, match=r"does not exist|has no images"):
            index.add(photos)
        assert len(index) == 5

    def test_a_folder_that_cannot_be_looked_into_drops_nothing(self, index, photos, monkeypatch, caplog):
        write_images(photos / "locked", 2, start=60)
        index.add(photos)
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith("locked"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        assert numbers(index.add(photos)) == {"unchanged": 5, "images": 7}
        assert "cannot look into" in caplog.text

    def test_a_file_that_cannot_be_looked_at_is_not_dropped(self, index, photos, monkeypatch):
        index.add(photos)
        stat = os.stat

        def refuse(path, **options):
            if str(path).endswith(".png"):
                raise PermissionError(13, "Permission denied", str(path))
            return stat(path, **options)

        monkeypatch.setattr(os, "stat", refuse)
        assert numbers(index.add(photos)) == {"images": 5, "skipped": 5}

    @pytest.mark.parametrize(
        ("name", "content"),
        [("notes.csv", "date,place\n1,2\n"), ("package.json", '{"a": 1}'), ("9.png.json", '{"title": "9.png"}')],
    )
    def test_tables_of_something_else_are_left_out(self, index, photos, tmp_path, caplog, name, content):
        (photos / name).write_text(content)
        assert numbers(index.add(photos)) == {"embedded": 5, "images": 5}
        assert f"left out {photos / name} has no image column" in caplog.text
        (tmp_path / "documents").mkdir()
        (tmp_path / "documents" / name).write_text(content)
        with pytest.raises(ValueError, match="documents has no images; looked for"):
            index.add(tmp_path / "documents")

    def test_what_is_no_table_of_the_folder_is_not_opened(self, index, photos, caplog):
        """What a program knows of an image lies beside each of thousands, and tables of other things further below."""
        (photos / "0.png.json").write_text('{"title": "0.png"}')
        (photos / "project/node_modules").mkdir(parents=True)
        (photos / "project/node_modules/package.json").write_text('{"a": 1}')
        assert numbers(index.add(photos)) == {"embedded": 5, "images": 5}
        assert "left out" not in caplog.text

    def test_captions_are_kept_and_updated(self, index, photos, num_embedded):
        rows = [{"file_name": "0.png", "caption": "a dog"}, {"file_name": "0.png", "caption": "a brown dog"}]
        write_jsonl(photos / "metadata.jsonl", rows)
        index.add(photos)
        captions = {Path(row["key"]).name: row["caption"] for row in index.to_datasets()}
        assert captions == {"0.png": "a dog\na brown dog", **dict.fromkeys([f"{n}.png" for n in range(1, 5)])}
        write_jsonl(photos / "metadata.jsonl", [{"file_name": "0.png", "caption": "a cat"}])
        assert numbers(index.add(photos)) == {"moved": 1, "unchanged": 4, "images": 5}
        assert [row["caption"] for row in index.to_datasets() if row["caption"]] == ["a cat"]
        assert num_embedded() == 5

    def test_a_single_file_is_a_source(self, index, photos):
        assert numbers(index.add(photos / "0.png")) == {"embedded": 1, "images": 1}


class TestDataSets:
    @pytest.fixture
    def table(self, tmp_path):
        images = [{"bytes": encode(number), "path": None} for number in (1, 2, 1)]
        file = tmp_path / "data" / "train.parquet"
        file.parent.mkdir()
        pq.write_table(pa.table({"image": images, "caption": ["one", "two", "uno"]}), file)
        return file

    @pytest.mark.parametrize("as_folder", [True, False])
    def test_images_in_no_file_are_found_and_shown(self, index, table, as_folder, num_embedded):
        source = table.parent if as_folder else table
        assert numbers(index.add(source)) == {"embedded": 2, "images": 2}
        assert numbers(index.add(source)) == {"unchanged": 2, "images": 2}
        assert num_embedded() == 2
        hits = index.search("anything", top=5)[0]
        assert {hit.image.size for hit in hits} == {(4, 3)}
        assert all(hit.path.startswith(f"{source}#") for hit in hits)
        assert {row["caption"] for row in index.to_datasets()} == {"one\nuno", "two"}
        again = index.search(f"image:{hits[1].path}", top=1)[0]
        assert again[0].path == hits[1].path

    def test_captions_are_not_needed(self, index, tmp_path):
        file = tmp_path / "images.parquet"
        pq.write_table(pa.table({"image": [{"bytes": encode(1), "path": None}]}), file)
        assert numbers(index.add(file)) == {"embedded": 1, "images": 1}

    def test_a_table_of_paths(self, index, photos, tmp_path):
        file = tmp_path / "list.csv"
        file.write_text(f"image,caption\n{photos / '0.png'},a dog\nhttps://example.org/a.png,b\nnone.png,c\n")
        changes = index.add(file)
        assert numbers(changes) == {"embedded": 1, "images": 1, "skipped": 2}
        assert sorted(reason for _, reason in changes.skipped.items) == [
            "No such file or directory",
            "is a web address, which is not fetched here; download the image first",
        ]


class TestBadImages:
    def test_each_is_skipped_with_its_reason(self, index, photos, tmp_path):
        (photos / "empty.jpg").touch()
        (photos / "text.jpg").write_text("no image")
        (photos / "cut.png").write_bytes(encode(7)[:40])
        Image.new("RGB", (3000, 10)).save(photos / "long.png")
        os.mkfifo(photos / "pipe.jpg")
        (photos / "loop.jpg").symlink_to(photos / "loop.jpg")
        (photos / "around").symlink_to(photos)
        Path(os.fsdecode(os.fsencode(photos) + b"/\xff.png")).write_bytes(encode(70))
        for number, name in enumerate(["two\nlines.png", "🐟.png", "x" * 251 + ".png", "it's.png"]):
            (photos / name).write_bytes(encode(80 + number))
        changes = index.add(photos)
        assert numbers(changes) == {"embedded": 9, "images": 9, "skipped": 7}
        reasons = {Path(name).name: reason for name, reason in changes.skipped.items}
        assert reasons["empty.jpg"] == "is empty (zero bytes)"
        assert reasons["pipe.jpg"] == "is not a file"
        assert reasons["loop.jpg"] == "Too many levels of symbolic links"
        assert reasons["'\\udcff.png'" if "'\\udcff.png'" in reasons else "\\udcff.png'"].startswith("has a name")
        assert "longer than 1:100" in reasons["long.png"]
        for name in ["two\nlines.png", "🐟.png", "it's.png"]:
            (photos / name).unlink()
        assert numbers(index.add(photos))["dropped"] == 3

    def test_strict_stops_at_the_first_and_keeps_what_is_there(self, index, photos):
        index.add(photos)
        (photos / "empty.jpg").touch()
        write_images(photos, 1, start=9)
        with pytest.raises(ValueError, match=r"empty.jpg: is empty"):
            index.add(photos, strict=True)
        assert len(index) == 5
        assert numbers(index.add(photos)) == {"embedded": 1, "unchanged": 5, "images": 6, "skipped": 1}

    def test_animation_alpha_and_orientation(self, index, tmp_path):
        folder = tmp_path / "odd"
        folder.mkdir()
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        exif.get_ifd(0x8769)[0x9003] = "2024:05:06 07:08:09"
        exif.get_ifd(0x8825).update({1: "S", 2: (33.0, 51.0, 36.0), 3: "E", 4: (151.0, 12.0, 0.0)})
        Image.new("RGB", (30, 20)).save(folder / "turned.jpg", exif=exif)
        damaged = Image.Exif()
        damaged[0x0132] = "yesterday"
        damaged.get_ifd(0x8825).update({1: "N", 2: (99.0, 0.0, 0.0), 3: "E", 4: (0.0, 0.0, 0.0)})
        Image.new("RGB", (30, 20)).save(folder / "damaged.jpg", exif=damaged)
        nowhere = Image.Exif()
        nowhere.get_ifd(0x8825).update({1: "?", 2: (9.0, 0.0, 0.0), 3: "E", 4: (0.0, 0.0, 0.0)})
        Image.new("RGB", (31, 20)).save(folder / "nowhere.jpg", exif=nowhere)
        index.add(folder)
        rows = {Path(row["key"]).name: row for row in index.to_datasets()}
        names = ("width", "height", "date", "latitude", "longitude")
        assert [rows["moving.gif"][name] for name in names] == [8, 8, None, None, None]
        assert [rows["turned.jpg"][name] for name in names] == [
            *(20, 30, "2024-05-06 07:08:09"),
            *(pytest.approx(-33.86), pytest.approx(151.2)),
        ]
        assert [rows["damaged.jpg"][name] for name in names] == [30, 20, None, None, None]
        assert rows["nowhere.jpg"]["latitude"] is None  # north or south?
        hits = index.search("a", where="date >= '2024-01-01' and latitude < 0 and width < 25")[0]
        assert [hit.name for hit in hits] == ["turned.jpg"]


class TestInterruptions:
    def test_a_second_run_is_refused(self, index, photos):
        with FileLock(Path(index.path, LOCK_FILE)), pytest.raises(ValueError, match="Another process is writing"):
            index.add(photos)
        assert numbers(index.add(photos)) == {"embedded": 5, "images": 5}

    def test_a_full_disk_costs_what_is_not_written_yet(self, index, photos, monkeypatch):
        monkeypatch.setattr(update, "NUM_PER_WRITE", 2)
        write, calls = Index.write, []

        class Full:
            def __getattr__(self, name):
                return lambda *args: self

            def execute(self, table):
                raise OSError("LanceError(IO): No space left on device (os error 28), /rust/src/lib.rs:28:9")

        def fail_at_the_second(self, *args):
            calls.append(1)
            if len(calls) == 2:
                self.table = type("Table", (), {"merge_insert": lambda self, key: Full()})()
            write(self, *args)

        monkeypatch.setattr(Index, "write", fail_at_the_second)
        with pytest.raises(ValueError, match=r"cannot be written: .*No space left on device \(os error 28\)\. What"):
            index.add(photos)
        monkeypatch.setattr(Index, "write", write)
        again = clipmini.open_index(index.path)
        assert len(again) == 2
        assert numbers(again.add(photos)) == {"embedded": 3, "unchanged": 2, "images": 5}

    def test_nan_is_refused(self, index, photos, monkeypatch):
        monkeypatch.setattr(index.encoder.model, "embed_pixels", lambda batch: torch.full((len(batch), 16), np.nan))
        with pytest.raises(ValueError, match="weights are damaged"):
            index.add(photos)
        assert len(index) == 0

    @pytest.mark.slow
    def test_a_killed_run_goes_on_with_what_is_missing(self, tmp_path, tiny_folder):
        photos = tmp_path / "photos"
        write_images(photos, 3000)
        out = tmp_path / "photos.index"
        command = [sys.executable, "-m", "clipmini.cli", "index", tiny_folder, photos, "--out", out]
        sizes = []
        for _ in range(3):
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            before = time.monotonic()
            while process.poll() is None and time.monotonic() - before < 60:
                time.sleep(0.2)
                if (out / "manifest.json").exists() and len(Index(out)) > (sizes[-1] if sizes else 0) + 300:
                    break
            process.send_signal(signal.SIGKILL)
            process.wait()
            sizes.append(len(Index(out)))
        assert sizes == sorted(set(sizes))
        subprocess.run(command, check=True)
        index = Index(out)
        assert len(index) == len(index.known()) == 3000
        assert numbers(update.update_index(index, [photos], Skipped())) == {"unchanged": 3000, "images": 3000}
