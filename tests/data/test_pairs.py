"""Pairs are split by image, one row each, the same way every time."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipmini.data.pairs import load_pairs
from clipmini.data.sources import _split_in
from modeling_clipmini.images_clipmini import read_image
from pair_files import WHOLE, color_of, encode, write_csv, write_images, write_jsonl


def contents(pairs):
    """Map each image's color, split by split, to its captions."""
    return {
        split: {read_image(row["image"]).getpixel((0, 0)): row["captions"] for row in rows}
        for split, rows in pairs.items()
    }


def names_of(rows):
    return {Path(row["image"]["path"]).name for row in rows}


ROWS = [("0.png", "zero"), ("1.png", "one"), ("2.png", "two"), ("0.png", "nought")]


def make_csv(folder):
    return write_csv(folder / "pairs.csv", [("image", "caption"), *ROWS])


def make_many(folder, count=40, **columns):
    write_images(folder, count)
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
        colors = [set(captions) for captions in contents(pairs).values()]
        assert sum(map(len, colors)) == len(set.union(*colors)) == 20
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
            write_jsonl(write_images(tmp_path, 13) / "pairs.jsonl", rows),
            seed=seed,
            validation_fraction=fractions[0],
            test_fraction=fractions[1],
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
            folder = write_images(tmp_path / split, 10, start=10 * index)
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
            write_jsonl(write_images(tmp_path, 1, index) / f"{name}.jsonl", rows)
        pairs = load_pairs(tmp_path)
        assert {split: len(rows) for split, rows in pairs.items()} == {"train": 2, "validation": 1}

    def test_names_that_only_hold_the_name_of_a_split(self, tmp_path):
        for index, name in enumerate(["dev trip", "home", "my-test"]):
            folder = write_images(tmp_path / name, 1, index)
            write_jsonl(folder / "metadata.jsonl", [{"file_name": f"{index}.png", "caption": name}])
        pairs = load_pairs(tmp_path, **WHOLE)
        assert {split: len(rows) for split, rows in pairs.items()} == {"train": 3}

    @pytest.mark.parametrize(
        ("name", "split"),
        [
            ("train-00000-of-00002.parquet", "train"),
            ("captions.Val.jsonl", "validation"),
            ("captions_val2017.json", "validation"),
            ("Dev/metadata.csv", "validation"),
            ("train/test.csv", "test"),
            ("train2017/metadata.csv", "train"),
            ("test-photos/metadata.csv", None),
            ("dev trip.csv", None),
            ("contest.csv", None),
        ],
    )
    def test_split_in_a_path(self, name, split):
        assert _split_in(Path(name)) == split

    def test_split_column(self, tmp_path):
        write_images(tmp_path, 4)
        splits = ["train", "restval", "val", "test"]
        table = write_csv(
            tmp_path / "a.csv", [("image", "caption", "split"), *((f"{n}.png", "a", s) for n, s in enumerate(splits))]
        )
        pairs = load_pairs(table)
        assert {split: len(rows) for split, rows in pairs.items()} == {"train": 2, "validation": 1, "test": 1}
        write_csv(table, [("image", "caption", "split"), ("0.png", "a", "train"), ("0.png", "b", " ")])
        assert [row["captions"] for row in load_pairs(table, **WHOLE)["train"]] == [["a", "b"]]
        rows = [{"image": "0.png", "caption": "a", "split": None}, {"image": "1.png", "caption": "b", "split": "test"}]
        pairs = load_pairs(write_jsonl(tmp_path / "a.jsonl", rows), **WHOLE)
        assert {split: len(rows) for split, rows in pairs.items()} == {"train": 1, "test": 1}
        write_csv(table, [("image", "caption", "split"), ("0.png", "a", "holdout")])
        with pytest.raises(ValueError, match="'holdout' is not known; use one of train"):
            load_pairs(table)

    def test_an_image_in_two_splits_is_kept_and_said(self, tmp_path, caplog):
        write_images(tmp_path, 3)
        for split, numbers in {"train": [0, 1], "test": [1, 2]}.items():
            write_jsonl(tmp_path / f"{split}.jsonl", [{"image": f"{n}.png", "caption": split} for n in numbers])
        pairs = load_pairs(tmp_path, **WHOLE)
        assert contents(pairs)["train"][color_of(1)] == ["train"]
        assert contents(pairs)["test"][color_of(1)] == ["test"]
        assert len({image_id for rows in pairs.values() for image_id in rows["image_id"]}) == 4
        assert "has 1 images in both test and train" in caplog.text

    def test_a_few_images(self, tmp_path):
        pairs = load_pairs(make_csv(write_images(tmp_path, 3)))
        assert {split: len(rows) for split, rows in pairs.items()} == {"train": 1, "validation": 1, "test": 1}
        table = write_csv(tmp_path / "pairs.csv", [("image", "caption"), *ROWS[:2]])
        with pytest.raises(ValueError, match="2 images are too few"):
            load_pairs(table)

    @pytest.mark.parametrize("fractions", [(-0.1, 0.1), (0.5, 0.5), (0.1, 1.0)])
    def test_fractions(self, fractions, tmp_path):
        with pytest.raises(ValueError, match="under 1"):
            load_pairs(tmp_path, validation_fraction=fractions[0], test_fraction=fractions[1])
