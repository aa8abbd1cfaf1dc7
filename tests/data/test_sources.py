"""Every kind of source gives the same pairs."""

import json
import pickle
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from clipmini import names
from clipmini.data.images import Skipped
from clipmini.data.pairs import load_pairs
from modeling_clipmini.images_clipmini import read_image
from pair_files import TOLERANT, WHOLE, color_of, encode, write_csv, write_images, write_jsonl

EXAMPLE_PHOTOS = Path(__file__).parents[2] / "examples" / "photos"


def contents(pairs):
    """Map each image's color, split by split, to its captions."""
    return {
        split: {read_image(row["image"]).getpixel((0, 0)): row["captions"] for row in rows}
        for split, rows in pairs.items()
    }


def captions_of(source, **options):
    (rows,) = load_pairs(source, **{**TOLERANT, **options}).values()
    return [row["captions"] for row in rows]


THREE = {color_of(0): ["zero", "nought"], color_of(1): ["one"], color_of(2): ["two"]}
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
    dataset.save_to_disk(str(folder / "saved"))
    return folder / "saved"


def make_saved_dict(folder):
    dataset = datasets.load_from_disk(make_saved(folder))
    DatasetDict({"train": dataset}).save_to_disk(str(folder / "saved dict"))
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
        pairs = load_pairs(make(write_images(tmp_path, 3)), **WHOLE, skipped=skipped)
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
        make_csv(write_images(tmp_path / "here", 3))
        monkeypatch.chdir(tmp_path)
        pairs = load_pairs("here/pairs.csv", **WHOLE)
        monkeypatch.chdir("/")
        assert contents(pairs) == {"train": THREE}

    @pytest.mark.parametrize("folder", ["Images", "flickr/Flicker8k_Dataset"])
    def test_images_in_a_sub_folder(self, folder, tmp_path):
        write_images(tmp_path / folder, 3)
        (tmp_path / "another").mkdir()
        assert contents(load_pairs(make_tokens(tmp_path), **WHOLE)) == {"train": THREE}
        assert contents(load_pairs(tmp_path, **WHOLE)) == {"train": THREE}

    def test_image_root(self, tmp_path):
        root = write_images(tmp_path / "elsewhere", 3)
        write_images(tmp_path, 3, start=100)  # not these
        table = make_tokens(tmp_path)
        assert contents(load_pairs(table, image_root=root, **WHOLE)) == {"train": THREE}

    def test_named_columns(self, tmp_path):
        rows = [("image", "caption", "foto", "titel"), ("x", "y", "0.png", "null"), ("x", "y", "1.png", "eins")]
        table = write_csv(write_images(tmp_path, 2) / "a.csv", rows)
        assert captions_of(table, image_column="foto", caption_column="titel") == [["null"], ["eins"]]

    def test_quotes_newlines_and_words_that_look_missing(self, tmp_path):
        texts = ["None", "NA", "null", "nan", 'a "red" fish, swimming', "two\nlines", "🐟 émoji", "7"]
        rows = [("image", "caption"), *(("0.png", text) for text in texts)]
        assert captions_of(write_csv(write_images(tmp_path, 1) / "a.csv", rows)) == [texts]

    def test_the_same_path_spelt_differently(self, tmp_path):
        write_images(tmp_path / "sub", 1)
        spellings = ["sub/0.png", "./sub/0.png", "sub/../sub//0.png", str(tmp_path / "sub/0.png")]
        table = write_jsonl(tmp_path / "a.jsonl", [{"image": name, "caption": name[:5]} for name in spellings])
        assert len(captions_of(table)) == 1

    def test_is_read_lazily_and_pickles_small(self, tmp_path):
        data = [encode(number) + bytes(100_000) for number in range(20)]
        pq.write_table(pa.table({"image": data, "caption": ["a fish"] * 20}), tmp_path / "train.parquet")
        pairs = load_pairs(tmp_path)
        assert sum(map(len, pairs.values())) == 20
        assert len(pickle.dumps(pairs)) < 100_000  # of two megabytes: images stay in the memory-mapped file
        assert len(pairs["train"][0]["image"]["bytes"]) > 100_000

    def test_an_edited_table_or_image_is_seen(self, tmp_path):
        for caption in ("before", "after"):
            pq.write_table(pa.table({"image": [encode()], "caption": [caption]}), tmp_path / "a.parquet")
            assert captions_of(tmp_path / "a.parquet") == [[caption]]
        table = make_csv(write_images(tmp_path, 3))
        (tmp_path / "1.png").write_bytes(b"")
        assert len(captions_of(table)) == 2
        (tmp_path / "1.png").write_bytes(encode(1))
        assert len(captions_of(table)) == 3

    def test_a_parquet_table_contacts_no_server(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datasets.load.get_session", lambda: pytest.fail("contacted a server"))
        assert len(captions_of(make_parquet_of_bytes(write_images(tmp_path, 3)))) == 3

    def test_leaves_nothing_behind(self, tmp_path):
        make_image_folder(write_images(tmp_path / "data", 3))
        before = sorted(tmp_path.rglob("*"))
        load_pairs(tmp_path / "data", **WHOLE)
        assert sorted(tmp_path.rglob("*")) == before
        assert not list(Path(datasets.config.HF_DATASETS_CACHE).rglob("*"))

    def test_checking_leaves_nothing_in_the_cache(self, tmp_path):
        table = make_parquet_of_bytes(write_images(tmp_path, 3))
        load_pairs(table, **WHOLE)
        found = [path.name for path in Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")]
        assert found == ["parquet-train.arrow"]

    @pytest.mark.parametrize("column", ["image", "picture", "photo", "file_name", "File Path"])
    def test_usual_columns_of_a_table_are_found_among_others(self, column, tmp_path):
        write_images(tmp_path, 2)
        (tmp_path / "pairs.csv").write_text(f"notes,{column},caption\nlong,0.png,zero\ntext,1.png,one\n")
        assert captions_of(tmp_path / "pairs.csv") == [["zero"], ["one"]]


class TestHub:
    def load(self, monkeypatch, loaded, **options):
        monkeypatch.setattr(datasets, "load_dataset", lambda name, config_name: loaded)
        monkeypatch.setattr(names, "_find_on_hub", lambda name, kind: name)
        return load_pairs("owner/name", **options)

    def rows(self, numbers, **columns):
        images = [{"bytes": encode(number), "path": None} for number in numbers]
        table = {"image": images, "caption": [[f"n{number}"] for number in numbers], **columns}
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
            color_of(4): ["n4"],
            color_of(2): ["n2"],
        }

    def test_offline(self, monkeypatch):
        def fail(name, config_name):
            raise ConnectionError("Couldn't reach\n'owner/name' on the Hub")

        monkeypatch.setattr(datasets, "load_dataset", fail)
        monkeypatch.setattr(names, "_find_on_hub", lambda name, kind: name)
        with pytest.raises(
            ValueError, match=r"owner/name is no folder here, and loading it .*: Couldn't reach 'owner"
        ):
            load_pairs("owner/name")

    @pytest.mark.parametrize("source", ["gone", "./gone", "a/b/c", "data/gone.csv", "/gone", Path("owner/name")])
    def test_what_is_no_hub_id_never_asks_the_hub(self, source, monkeypatch):
        monkeypatch.setattr(datasets, "load_dataset", lambda *args: pytest.fail("asked the Hub"))
        with pytest.raises(ValueError, match="does not exist"):
            load_pairs(source)
