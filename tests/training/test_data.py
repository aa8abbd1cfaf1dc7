"""Every kind of source gives the same pairs, split by image; what cannot be used is counted, and said."""

import csv
import io
import json
import logging
import pickle
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipmini.inference.images import Skipped, read_image
from clipmini.training.data import load_pairs

EXAMPLE_PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
WHOLE = {"validation_fraction": 0, "test_fraction": 0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def colour_of(number):
    return (number % 256, number * 7 % 256, number * 31 % 256)


def encode(number=0):
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), colour_of(number)).save(stream, "PNG")
    return stream.getvalue()


def write_pictures(folder, count, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        (folder / f"{number}.png").write_bytes(encode(number))
    return folder


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path, rows, delimiter=","):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def contents(pairs):
    """Map each picture's colour, split by split, to its captions."""
    return {
        split: {read_image(row["image"]).getpixel((0, 0)): row["captions"] for row in rows}
        for split, rows in pairs.items()
    }


def captions_of(source, **options):
    (rows,) = load_pairs(source, **{**WHOLE, **options}).values()
    return [row["captions"] for row in rows]


def names_of(rows):
    return {Path(row["image"]["path"]).name for row in rows}


THREE = {colour_of(0): ["zero", "nought"], colour_of(1): ["one"], colour_of(2): ["two"]}
ROWS = [("0.png", "zero"), ("1.png", "one"), ("2.png", "two"), ("0.png", "nought")]
BY_IMAGE = [("0.png", ["zero", "nought"]), ("1.png", ["one"]), ("2.png", ["two"])]


def make_csv(folder):
    return write_csv(folder / "pairs.csv", [("image", "caption"), *ROWS])


def make_semicolons(folder):
    return write_csv(folder / "pairs.csv", [("Image Path", "Caption"), *ROWS], ";")


def make_tsv(folder):
    return write_csv(folder / "pairs.tsv", [("file_name", "text"), *ROWS], "\t")


def make_csv_with_mark(folder):
    path = make_csv(folder)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return path


def make_csv_of_lists(folder):
    return write_csv(
        folder / "pairs.csv", [("filename", "raw"), *((name, json.dumps(texts)) for name, texts in BY_IMAGE)]
    )


def make_jsonl(folder):
    return write_jsonl(folder / "pairs.jsonl", [{"path": name, "text": text} for name, text in ROWS])


def make_jsonl_of_lists(folder):
    return write_jsonl(folder / "pairs.jsonl", [{"img": name, "captions": texts} for name, texts in BY_IMAGE])


def make_json(folder):
    path = folder / "pairs.json"
    path.write_text(json.dumps([{"filename": name, "caption": text} for name, text in ROWS]))
    return path


def make_json_lines_named_json(folder):
    return make_jsonl(folder).rename(folder / "pairs.json")


def make_karpathy(folder):
    images = [
        {"filename": name, "sentences": [{"raw": text, "tokens": []} for text in texts]} for name, texts in BY_IMAGE
    ]
    path = folder / "dataset.json"
    path.write_text(json.dumps({"dataset": "mine", "images": images}))
    return path


def make_tokens(folder):
    path = folder / "Flickr8k.token.txt"
    path.write_text("0.png#0\tzero\n1.png#0\tone\n2.png#0\ttwo\n0.png#1\tnought\n")
    return path


def make_tokens_without_suffix(folder):
    return make_tokens(folder).rename(folder / "results_20130124.token")


def make_kaggle_8k(folder):
    return make_csv(folder).rename(folder / "captions.txt")


def make_kaggle_30k(folder):
    path = folder / "results.csv"
    lines = [
        "image_name| comment_number| comment",
        "0.png| 0| zero",
        "1.png| 0| one",
        "2.png| 0| two",
        "0.png| 1| nought",
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def make_parquet_of_paths(folder):
    names, texts = zip(*ROWS, strict=True)
    pq.write_table(pa.table({"url_id": [1, 2, 3, 4], "image": names, "caption": texts}), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def make_parquet_of_bytes(folder):
    data = [(folder / name).read_bytes() for name, _ in ROWS]
    pq.write_table(pa.table({"content": data, "caption": [text for _, text in ROWS]}), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def make_parquet_of_structs(folder):
    structs = [{"bytes": (folder / name).read_bytes(), "path": name} for name, _ in BY_IMAGE]
    table = pa.table({"id": ["a", "b", "c"], "image": structs, "captions": [texts for _, texts in BY_IMAGE]})
    pq.write_table(table, folder / "pairs.parquet")
    return folder / "pairs.parquet"


def make_parquet_of_path_structs(folder):
    structs = pa.array(
        [{"bytes": None, "path": name} for name, _ in BY_IMAGE], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    pq.write_table(
        pa.table({"image": structs, "captions": [texts for _, texts in BY_IMAGE]}), folder / "pairs.parquet"
    )
    return folder / "pairs.parquet"


def make_saved(folder):
    rows = {"image": [str(folder / name) for name, _ in BY_IMAGE], "captions": [texts for _, texts in BY_IMAGE]}
    dataset = Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(folder / "saved")
    return folder / "saved"


def make_saved_dict(folder):
    dataset = datasets.load_from_disk(make_saved(folder))
    DatasetDict({"train": dataset}).save_to_disk(folder / "saved dict")
    return folder / "saved dict"


def make_image_folder(folder):
    write_jsonl(folder / "metadata.jsonl", [{"file_name": name, "caption": text} for name, text in ROWS])
    return folder


def make_image_folder_csv(folder):
    write_csv(folder / "metadata.csv", [("file_name", "caption"), *ROWS])
    return folder


SOURCES = [value for name, value in list(globals().items()) if name.startswith("make_")]


class TestSources:
    @pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__.removeprefix("make_"))
    def test_every_kind_gives_the_same(self, make, tmp_path):
        skipped = Skipped()
        pairs = load_pairs(make(write_pictures(tmp_path, 3)), **WHOLE, skipped=skipped)
        assert contents(pairs) == {"train": THREE}
        assert skipped.items == []
        rows = pairs["train"]
        assert rows.column_names == ["image", "captions", "image_id"]
        assert rows.features["image"] == datasets.Image(decode=False)
        assert rows.features["captions"] == datasets.List(datasets.Value("string"))
        assert rows.features["image_id"] == datasets.Value("int64")
        assert len(set(rows["image_id"])) == 3

    def test_example_photos(self):
        pairs = load_pairs(EXAMPLE_PHOTOS)
        assert {split: len(rows) for split, rows in pairs.items()} == {"train": 168, "validation": 24, "test": 32}
        ids = [image_id for rows in pairs.values() for image_id in rows["image_id"]]
        assert len(set(ids)) == 224
        row = pairs["test"][0]
        assert Path(row["image"]["path"]).parent == EXAMPLE_PHOTOS / "test"
        assert row["image"]["bytes"] is None
        assert row["captions"] == ["a slender silver fish swimming above rocks"]

    def test_does_not_depend_on_the_working_folder(self, tmp_path, monkeypatch):
        make_csv(write_pictures(tmp_path / "here", 3))
        monkeypatch.chdir(tmp_path)
        pairs = load_pairs("here/pairs.csv", **WHOLE)
        monkeypatch.chdir("/")
        assert contents(pairs) == {"train": THREE}

    @pytest.mark.parametrize("folder", ["Images", "flickr/Flicker8k_Dataset"])
    def test_pictures_in_a_sub_folder(self, folder, tmp_path):
        write_pictures(tmp_path / folder, 3)
        (tmp_path / "another").mkdir()
        assert contents(load_pairs(make_tokens(tmp_path), **WHOLE)) == {"train": THREE}
        assert contents(load_pairs(tmp_path, **WHOLE)) == {"train": THREE}

    def test_image_root(self, tmp_path):
        root = write_pictures(tmp_path / "elsewhere", 3)
        write_pictures(tmp_path, 3, start=100)  # not these
        table = make_tokens(tmp_path)
        assert contents(load_pairs(table, image_root=root, **WHOLE)) == {"train": THREE}

    def test_named_columns(self, tmp_path):
        rows = [("image", "caption", "foto", "titel"), ("x", "y", "0.png", "null"), ("x", "y", "1.png", "eins")]
        table = write_csv(write_pictures(tmp_path, 2) / "a.csv", rows)
        assert captions_of(table, image_column="foto", caption_column="titel") == [["null"], ["eins"]]

    def test_quotes_newlines_and_words_that_look_missing(self, tmp_path):
        texts = ["None", "NA", "null", "nan", 'a "red" fish, swimming', "two\nlines", "🐟 émoji", "7"]
        rows = [("image", "caption"), *(("0.png", text) for text in texts)]
        assert captions_of(write_csv(write_pictures(tmp_path, 1) / "a.csv", rows)) == [texts]

    def test_the_same_path_spelt_differently(self, tmp_path):
        write_pictures(tmp_path / "sub", 1)
        spellings = ["sub/0.png", "./sub/0.png", "sub/../sub//0.png", str(tmp_path / "sub/0.png")]
        table = write_jsonl(tmp_path / "a.jsonl", [{"image": name, "caption": name[:5]} for name in spellings])
        assert len(captions_of(table)) == 1

    def test_is_read_lazily_and_pickles_small(self, tmp_path):
        data = [encode(number) + bytes(100_000) for number in range(20)]
        pq.write_table(pa.table({"image": data, "caption": ["a fish"] * 20}), tmp_path / "train.parquet")
        pairs = load_pairs(tmp_path)
        assert sum(map(len, pairs.values())) == 20
        assert len(pickle.dumps(pairs)) < 100_000  # of two megabytes: pictures stay in the memory-mapped file
        assert len(pairs["train"][0]["image"]["bytes"]) > 100_000

    def test_an_edited_table_or_picture_is_seen(self, tmp_path):
        for caption in ("before", "after"):
            pq.write_table(pa.table({"image": [encode()], "caption": [caption]}), tmp_path / "a.parquet")
            assert captions_of(tmp_path / "a.parquet") == [[caption]]
        table = make_csv(write_pictures(tmp_path, 3))
        (tmp_path / "1.png").write_bytes(b"")
        assert len(captions_of(table)) == 2
        (tmp_path / "1.png").write_bytes(encode(1))
        assert len(captions_of(table)) == 3

    def test_leaves_nothing_behind(self, tmp_path):
        make_image_folder(write_pictures(tmp_path / "data", 3))
        before = sorted(tmp_path.rglob("*"))
        load_pairs(tmp_path / "data", **WHOLE)
        assert sorted(tmp_path.rglob("*")) == before
        assert not list(Path(datasets.config.HF_DATASETS_CACHE).rglob("*"))

    def test_several_processes_agree(self, tmp_path):
        make_image_folder(write_pictures(tmp_path, 3))
        (tmp_path / "1.png").write_bytes(b"")
        assert captions_of(tmp_path, num_proc=2) == captions_of(tmp_path) == [["zero", "nought"], ["two"]]


class TestHub:
    def load(self, monkeypatch, loaded, **options):
        monkeypatch.setattr(datasets, "load_dataset", lambda name: loaded)
        return load_pairs("owner/name", **options)

    def rows(self, numbers, **columns):
        pictures = [{"bytes": encode(number), "path": None} for number in numbers]
        table = {"image": pictures, "caption": [[f"n{number}"] for number in numbers], **columns}
        return Dataset.from_dict(table).cast_column("image", datasets.Image())

    def test_splits_as_they_are(self, monkeypatch):
        loaded = DatasetDict({"train": self.rows([1, 2]), "val": self.rows([3]), "test": self.rows([4, 5])})
        pairs = self.load(monkeypatch, loaded)
        assert {split: sorted(captions.values()) for split, captions in contents(pairs).items()} == {
            "train": [["n1"], ["n2"]],
            "validation": [["n3"]],
            "test": [["n4"], ["n5"]],
        }

    def test_split_column_behind_a_lone_split(self, monkeypatch):
        loaded = DatasetDict({"test": self.rows([1, 2, 3], split=["train", "val", "test"])})
        assert {split: len(rows) for split, rows in self.load(monkeypatch, loaded).items()} == {
            "train": 1,
            "validation": 1,
            "test": 1,
        }

    def test_splits_of_other_names_are_left_out(self, monkeypatch, caplog):
        loaded = DatasetDict({"train": self.rows([1, 2]), "extra": self.rows([3])})
        assert sum(map(len, self.load(monkeypatch, loaded, **WHOLE).values())) == 2
        assert "extra" in caplog.text
        with pytest.raises(ValueError, match="one, two"):
            self.load(monkeypatch, DatasetDict({"one": self.rows([1]), "two": self.rows([2])}))

    def test_selected_rows(self, monkeypatch):
        loaded = DatasetDict({"train": self.rows([1, 2, 3, 4]).select([3, 1])})
        assert contents(self.load(monkeypatch, loaded, **WHOLE))["train"] == {
            colour_of(4): ["n4"],
            colour_of(2): ["n2"],
        }

    def test_offline(self, monkeypatch):
        def fail(name):
            raise ConnectionError("Couldn't reach\n'owner/name' on the Hub")

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(ValueError, match=r"owner/name is no local path, and loading it .*: Couldn't reach 'owner"):
            load_pairs("owner/name")

    @pytest.mark.parametrize("source", ["gone", "./gone", "a/b/c", "data/gone.csv", "/gone", Path("owner/name")])
    def test_what_is_no_hub_id_never_asks_the_hub(self, source, monkeypatch):
        monkeypatch.setattr(datasets, "load_dataset", lambda *args: pytest.fail("asked the Hub"))
        with pytest.raises(ValueError, match="does not exist"):
            load_pairs(source)


def make_many(folder, count=40, **columns):
    write_pictures(folder, count)
    rows = [{"image": f"{number}.png", "caption": f"{number} {k}"} for k in range(2) for number in range(count)]
    return write_jsonl(folder / "pairs.jsonl", rows)


class TestSplits:
    def test_drawn_by_image_and_complete(self, tmp_path):
        pairs = load_pairs(make_many(tmp_path), validation_fraction=0.2, test_fraction=0.1)
        assert {split: len(rows) for split, rows in pairs.items()} == {"train": 28, "validation": 8, "test": 4}
        names = [names_of(rows) for rows in pairs.values()]
        assert len(set.union(*names)) == 40
        assert all(len(row["captions"]) == 2 for rows in pairs.values() for row in rows)

    def test_same_seed_same_split_wherever_the_data_lies(self, tmp_path):
        first = load_pairs(make_many(tmp_path / "one"))
        again = load_pairs(make_many(tmp_path / "two"))
        other = load_pairs(tmp_path / "two", seed=1)
        assert {split: names_of(rows) for split, rows in first.items()} == {
            split: names_of(rows) for split, rows in again.items()
        }
        assert names_of(first["validation"]) != names_of(other["validation"])

    def test_order_of_rows_has_no_say(self, tmp_path):
        first = load_pairs(make_many(tmp_path))
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
        again = load_pairs(path)
        assert all(names_of(first[split]) == names_of(again[split]) for split in first)

    def test_bytes_are_split_by_contents(self, tmp_path):
        data = [encode(number // 3) for number in range(60)]
        pq.write_table(pa.table({"image": data, "caption": [str(n) for n in range(60)]}), tmp_path / "a.parquet")
        pairs = load_pairs(tmp_path / "a.parquet")
        colours = [set(captions) for captions in contents(pairs).values()]
        assert sum(map(len, colours)) == len(set.union(*colours)) == 20
        assert {len(row["captions"]) for rows in pairs.values() for row in rows} == {3}

    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        numbers=st.lists(st.integers(0, 12), min_size=12, max_size=60),
        seed=st.integers(0, 5),
        fractions=st.tuples(st.floats(0, 0.3), st.floats(0, 0.3)),
    )
    def test_every_caption_once_and_no_image_twice(self, tmp_path, numbers, seed, fractions):
        rows = [{"image": f"{number}.png", "caption": f"{row}"} for row, number in enumerate([*range(13), *numbers])]
        pairs = load_pairs(
            write_jsonl(tmp_path / "pairs.jsonl", rows),
            seed=seed,
            validation_fraction=fractions[0],
            test_fraction=fractions[1],
            check_images=False,
        )
        found = [row for split in pairs.values() for row in split]
        assert sorted(int(caption) for row in found for caption in row["captions"]) == list(range(len(rows)))
        assert (
            len({row["image"]["path"] for row in found}) == len({row["image_id"] for row in found}) == len(found) == 13
        )
        for row in found:
            assert {rows[int(caption)]["image"] for caption in row["captions"]} == {Path(row["image"]["path"]).name}
        assert ("validation" in pairs) == (fractions[0] > 0)
        assert ("test" in pairs) == (fractions[1] > 0)

    @pytest.mark.parametrize(
        ("given_splits", "expected"),
        [
            (["train"], {"train", "validation", "test"}),
            (["train", "test"], {"train", "validation", "test"}),
            (["train", "val"], {"train", "validation"}),
            (["train", "dev", "test"], {"train", "validation", "test"}),
            (["test"], {"test"}),
        ],
    )
    def test_draws_only_what_is_missing(self, given_splits, expected, tmp_path):
        for index, split in enumerate(given_splits):
            folder = write_pictures(tmp_path / split, 10, start=10 * index)
            write_jsonl(
                folder / "metadata.jsonl", [{"file_name": f"{10 * index + n}.png", "caption": "a"} for n in range(10)]
            )
        pairs = load_pairs(tmp_path)
        assert set(pairs) == expected
        assert sum(map(len, pairs.values())) == 10 * len(given_splits)
        for split, rows in pairs.items():
            if split in given_splits and split != "train":
                assert len(rows) == 10

    def test_files_named_by_split(self, tmp_path):
        for index, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "flickr_val"]):
            rows = [{"image": f"{index}.png", "caption": name}]
            write_jsonl(write_pictures(tmp_path, 1, index) / f"{name}.jsonl", rows)
        pairs = load_pairs(tmp_path)
        assert {split: len(rows) for split, rows in pairs.items()} == {"train": 2, "validation": 1}

    def test_split_column(self, tmp_path):
        write_pictures(tmp_path, 4)
        splits = ["train", "restval", "val", "test"]
        table = write_csv(
            tmp_path / "a.csv", [("image", "caption", "split"), *((f"{n}.png", "a", s) for n, s in enumerate(splits))]
        )
        pairs = load_pairs(table)
        assert {split: len(rows) for split, rows in pairs.items()} == {"train": 2, "validation": 1, "test": 1}
        write_csv(table, [("image", "caption", "split"), ("0.png", "a", "holdout")])
        with pytest.raises(ValueError, match="'holdout' is not known; use one of train"):
            load_pairs(table)

    def test_an_image_in_two_splits_is_kept_and_said(self, tmp_path, caplog):
        write_pictures(tmp_path, 3)
        for split, numbers in {"train": [0, 1], "test": [1, 2]}.items():
            write_jsonl(tmp_path / f"{split}.jsonl", [{"image": f"{n}.png", "caption": split} for n in numbers])
        pairs = load_pairs(tmp_path, **WHOLE)
        assert contents(pairs)["train"][colour_of(1)] == ["train"]
        assert contents(pairs)["test"][colour_of(1)] == ["test"]
        assert len({image_id for rows in pairs.values() for image_id in rows["image_id"]}) == 4
        assert "has 1 images in both test and train" in caplog.text

    def test_a_few_images(self, tmp_path):
        pairs = load_pairs(make_csv(write_pictures(tmp_path, 3)))
        assert {split: len(rows) for split, rows in pairs.items()} == {"train": 1, "validation": 1, "test": 1}
        table = write_csv(tmp_path / "pairs.csv", [("image", "caption"), *ROWS[:2]])
        with pytest.raises(ValueError, match="2 images are too few"):
            load_pairs(table)

    @pytest.mark.parametrize("fractions", [(-0.1, 0.1), (0.5, 0.5), (0.1, 1.0)])
    def test_fractions(self, fractions, tmp_path):
        with pytest.raises(ValueError, match="under 1"):
            load_pairs(tmp_path, validation_fraction=fractions[0], test_fraction=fractions[1])


class TestBadInput:
    def test_bad_pictures_are_left_out(self, tmp_path, caplog):
        write_pictures(tmp_path, 6)
        (tmp_path / "1.png").unlink()
        (tmp_path / "2.png").write_bytes(b"")
        (tmp_path / "3.png").write_text("no picture")
        (tmp_path / "4.png").write_bytes(encode()[:44])
        rows = [{"image": f"{number}.png", "caption": "a", "x": number} for number in range(6)]
        table = write_jsonl(tmp_path / "a.jsonl", [*rows, {"image": None, "caption": "b"}, {"caption": "c"}])
        skipped = Skipped()
        pairs = load_pairs(table, **WHOLE, skipped=skipped)
        assert names_of(pairs["train"]) == {"0.png", "5.png"}
        assert [(Path(name).name, reason.split(" (")[0]) for name, reason in skipped.items] == [
            ("1.png", "does not exist"),
            ("2.png", "is empty"),
            ("3.png", "is not an image that Pillow can read"),
            ("4.png", "is truncated or damaged"),
            ("row 7", "has neither bytes nor a path"),
            ("row 8", "has neither bytes nor a path"),
        ]
        assert skipped.items[0][0] == str(tmp_path / "1.png")
        assert len(caplog.records) == 6

    def test_unchecked(self, tmp_path):
        table = make_csv(write_pictures(tmp_path, 3))
        (tmp_path / "1.png").unlink()
        assert len(captions_of(table, check_images=False)) == 3

    def test_sums_up_by_itself(self, tmp_path, caplog):
        table = make_csv(write_pictures(tmp_path, 3))
        (tmp_path / "1.png").unlink()
        load_pairs(table, **WHOLE)
        assert caplog.messages[-1] == "1 input skipped"
        caplog.clear()
        load_pairs(table, **WHOLE, skipped=Skipped())
        assert len(caplog.messages) == 1

    def test_strict(self, tmp_path):
        table = make_csv(write_pictures(tmp_path, 3))
        (tmp_path / "1.png").unlink()
        with pytest.raises(ValueError, match=r"1\.png: does not exist"):
            load_pairs(table, skipped=Skipped(strict=True))

    def test_captions_of_every_kind(self, tmp_path):
        write_pictures(tmp_path, 3)
        long = " ".join(["word"] * 10_000)
        values = [
            "a",
            "  b \n",
            7,
            7.5,
            ["c", 8, None, ["d"]],
            None,
            "",
            "   ",
            float("nan"),
            True,
            {"raw": "e"},
            "🐟",
        ]
        values += [long, "[f]", "\ud83d!", {"other": "x"}]
        rows = [{"image": "0.png", "caption": value} for value in values]
        rows += [{"image": "1.png", "caption": ""}, {"image": "1.png"}, {"image": "2.png", "caption": []}]
        skipped = Skipped()
        table = write_jsonl(tmp_path / "a.jsonl", rows)
        texts = [["a", "b", "7", "7.5", "c", "8", "d", "e", "🐟", long, "[f]", "?!"]]
        assert captions_of(table, skipped=skipped) == texts
        names = [f"0.png caption {k}" for k in (7, 9, 10, 11, 12, 13, 19)]
        assert [Path(name).name for name, _ in skipped.items] == [*names, "1.png", "2.png"]
        assert {reason for _, reason in skipped.items} == {"is empty or no text", "has no caption that is a text"}

    def test_absurd_caption_is_cut(self, tmp_path):
        table = write_jsonl(write_pictures(tmp_path, 1) / "a.jsonl", [{"image": "0.png", "caption": "x" * 1_000_000}])
        assert [len(text) for text in captions_of(table)[0]] == [100_000]

    def test_numbers_and_nulls_in_parquet(self, tmp_path):
        data = [encode(0), encode(1), None]
        table = pa.table({"image": data, "caption": pa.array([1.5, None, 2.0])})
        pq.write_table(table, tmp_path / "a.parquet")
        skipped = Skipped()
        assert captions_of(tmp_path / "a.parquet", skipped=skipped) == [["1.5"]]
        assert skipped.items == [("row 2", "has no caption that is a text"), ("row 3", "has neither bytes nor a path")]

    def test_rows_that_cannot_be_parsed(self, tmp_path):
        write_pictures(tmp_path, 3)
        skipped = Skipped()
        table = tmp_path / "a.csv"
        table.write_text(
            'image,caption\n0.png,a\n1.png,a, b\n"1.png"x,b\n\n2.png\n2.png,c\n1.png,"never closed\n2.png,d\n'
        )
        assert captions_of(table, skipped=skipped) == [["a"], ["c"]]
        assert [Path(name).name for name, _ in skipped.items] == [f"a.csv line {line}" for line in (3, 4, 6, 8)]
        assert skipped.items[0][1] == "has 3 fields instead of 2"

        skipped = Skipped()
        table = tmp_path / "a.jsonl"
        table.write_text('{"image": "0.png", "caption": "a"}\n{"image": \n[1]\n\n{"image": "1.png", "caption": "b"}')
        assert captions_of(table, skipped=skipped) == [["a"], ["b"]]
        assert [Path(name).name for name, _ in skipped.items] == ["a.jsonl line 2", "a.jsonl line 3"]

        skipped = Skipped()
        table = tmp_path / "tokens.txt"
        table.write_text("0.png#0\ta\n1.png b\n2.png#0\tc\n")
        assert captions_of(table, skipped=skipped) == [["a"], ["c"]]
        assert [Path(name).name for name, _ in skipped.items] == ["tokens.txt line 2"]

    def test_web_addresses(self, tmp_path):
        table = write_jsonl(tmp_path / "a.jsonl", [{"image": "https://example.org/a.jpg", "caption": "a"}])
        with pytest.raises(ValueError, match=r"https://example.org/a.jpg: is a web address"):
            load_pairs(table)

    def test_columns(self, tmp_path):
        table = write_csv(tmp_path / "a.csv", [("bild", "caption"), ("0.png", "a")])
        with pytest.raises(
            ValueError, match=r"no image column .*set image_column to one of its columns: 'bild', 'caption'"
        ):
            load_pairs(table)
        with pytest.raises(ValueError, match=r"no caption column .*set caption_column"):
            load_pairs(write_csv(table, [("image", "titel"), ("0.png", "a")]))
        with pytest.raises(ValueError, match="no column 'foto'; set image_column"):
            load_pairs(table, image_column="foto")
        pq.write_table(pa.table({"image": [1], "caption": ["a"]}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match="'image' is Value"):
            load_pairs(tmp_path / "a.parquet")
        pq.write_table(pa.table({"a": [b"1"], "b": [b"1"], "caption": ["a"]}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match="no image column"):
            load_pairs(tmp_path / "a.parquet")

    @pytest.mark.parametrize(
        ("files", "reason"),
        [
            ({}, "has no pictures"),
            ({"notes.txt": b"hello"}, "has no pictures"),
            ({"a.png": b"x"}, "has pictures but no captions; add metadata.jsonl"),
            ({"a.txt": b"0.png#0\ta\n", "b.txt": b"0.png#0\ta\n"}, "several caption files"),
            ({"a.csv": b""}, "no rows"),
            ({"a.csv": b"image,caption\n"}, "no rows"),
            ({"a.csv": "image,caption\na.png,é\n".encode("latin-1")}, "not UTF-8"),
            (
                {"a.csv": b"image,caption\na.png,a\n"},
                "no usable pair; 1 inputs skipped, the first .*a.png: does",
            ),
            ({"a.csv": b"image,caption\na.png,\n"}, "no usable pair; .*a.png: has no caption that is a text"),
            ({"a.jsonl": b""}, "no rows"),
            ({"a.json": b"3"}, "neither a list of objects"),
            ({"dataset_dict.json": b"{"}, "cannot be read as a saved data set"),
            ({"a.parquet": b"hello"}, "cannot be read as parquet"),
        ],
        ids=str,
    )
    def test_one_sentence(self, files, reason, tmp_path):
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=reason) as caught:
            load_pairs(tmp_path)
        assert "\n" not in str(caught.value)

    def test_image_root_must_be_there(self, tmp_path):
        with pytest.raises(ValueError, match=r"image_root .* is not a folder"):
            load_pairs(make_csv(tmp_path), image_root=tmp_path / "gone")

    def test_table_without_split_beside_others(self, tmp_path, caplog):
        write_pictures(tmp_path, 2)
        write_jsonl(tmp_path / "train.jsonl", [{"image": "0.png", "caption": "a"}])
        write_jsonl(tmp_path / "info.json", [{"anything": 1}])
        assert captions_of(tmp_path) == [["a"]]
        assert "left out" in caplog.text
        assert caplog.records[0].levelno == logging.WARNING
