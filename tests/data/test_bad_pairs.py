"""What cannot be used is left out, counted and named; what is wrong as a whole is said in one sentence."""

import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipmini.data.images import Skipped
from clipmini.data.pairs import load_pairs
from modeling_clipmini.images_clipmini import FORMATS
from pair_files import TOLERANT, encode, write_csv, write_images, write_jsonl


def captions_of(source, **options):
    (rows,) = load_pairs(source, **{**TOLERANT, **options}).values()
    return [row["captions"] for row in rows]


def names_of(rows):
    return {Path(row["image"]["path"]).name for row in rows}


ROWS = [("0.png", "zero"), ("1.png", "one"), ("2.png", "two"), ("0.png", "nought")]


def make_csv(folder):
    return write_csv(folder / "pairs.csv", [("image", "caption"), *ROWS])


class TestBadInput:
    def test_bad_images_are_left_out(self, tmp_path, caplog):
        write_images(tmp_path, 6)
        (tmp_path / "1.png").unlink()
        (tmp_path / "2.png").write_bytes(b"")
        (tmp_path / "3.png").write_text("no image")
        (tmp_path / "4.png").write_bytes(encode()[:44])
        rows = [{"image": f"{number}.png", "caption": "a", "x": number} for number in range(6)]
        table = write_jsonl(tmp_path / "a.jsonl", [*rows, {"image": None, "caption": "b"}, {"caption": "c"}])
        skipped = Skipped()
        pairs = load_pairs(table, **TOLERANT, skipped=skipped)
        assert names_of(pairs["train"]) == {"0.png", "5.png"}
        assert [(Path(name).name, reason.split(" (")[0]) for name, reason in skipped.items] == [
            ("1.png", "does not exist"),
            ("2.png", "is empty"),
            ("3.png", f"is not an image of a format that is read here: {', '.join(FORMATS)}"),
            ("4.png", "is truncated or damaged"),
            ("row 7", "has neither bytes nor a path"),
            ("row 8", "has neither bytes nor a path"),
        ]
        assert skipped.items[0][0] == str(tmp_path / "1.png")
        assert len(caplog.records) == 6

    def test_sums_up_by_itself(self, tmp_path, caplog):
        table = make_csv(write_images(tmp_path, 3))
        (tmp_path / "1.png").unlink()
        load_pairs(table, **TOLERANT)
        assert caplog.messages[-1] == "1 input skipped"
        caplog.clear()
        load_pairs(table, **TOLERANT, skipped=Skipped())
        assert len(caplog.messages) == 1

    def test_strict(self, tmp_path):
        table = make_csv(write_images(tmp_path, 3))
        (tmp_path / "1.png").unlink()
        with pytest.raises(ValueError, match=r"1\.png: does not exist"):
            load_pairs(table, skipped=Skipped(strict=True))

    def test_captions_of_every_kind(self, tmp_path):
        write_images(tmp_path, 3)
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
        table = write_jsonl(write_images(tmp_path, 1) / "a.jsonl", [{"image": "0.png", "caption": "x" * 1_000_000}])
        assert [len(text) for text in captions_of(table)[0]] == [100_000]

    def test_numbers_and_nulls_in_parquet(self, tmp_path):
        data = [encode(0), encode(1), None]
        table = pa.table({"image": data, "caption": pa.array([1.5, None, 2.0])})
        pq.write_table(table, tmp_path / "a.parquet")
        skipped = Skipped()
        assert captions_of(tmp_path / "a.parquet", skipped=skipped) == [["1.5"]]
        assert skipped.items == [("row 2", "has no caption that is a text"), ("row 3", "has neither bytes nor a path")]

    def test_rows_that_cannot_be_parsed(self, tmp_path):
        write_images(tmp_path, 3)
        skipped = Skipped()
        table = tmp_path / "a.csv"
        table.write_text(
            'image,caption\n0.png,a\n1.png,a, b\n"1.png"x,b\n\n2.png\n2.png,c\n1.png,"never closed\n2.png,d\n'
        )
        assert captions_of(table, skipped=skipped) == [["a"], ["c", "d"]]
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

    def test_a_quote_that_is_never_closed_costs_its_row(self, tmp_path):
        lines = [f"{number}.png,{number}" for number in range(1000)]
        lines[2], lines[500], lines[999] = '2.png,"5 inch screen', '500.png,"two\nlines"', '999.png,"last'
        table = write_images(tmp_path, 1000) / "a.csv"
        table.write_text("image,caption\n" + "\n".join(lines))
        skipped = Skipped()
        captions = captions_of(table, skipped=skipped)
        assert captions == [[str(n)] if n != 500 else ["two\nlines"] for n in range(999) if n != 2]
        assert [Path(name).name for name, _ in skipped.items] == ["a.csv line 4", "a.csv line 1002"]
        assert "cannot be parsed" in skipped.items[0][1]

    def test_every_row_with_a_quote_that_is_never_closed(self, tmp_path):
        table = write_images(tmp_path, 1) / "a.csv"
        table.write_text("image,caption\n0.png,a\n" + '1.png,"b\n' * 20_000)
        skipped = Skipped()
        assert captions_of(table, skipped=skipped) == [["a"]]
        assert skipped.count == 20_000

    def test_quotes_in_a_table_with_tabs(self, tmp_path):
        table = write_images(tmp_path, 5) / "a.tsv"
        lines = ["image\tcaption", '0.png\t"Stop" says the sign', '1.png\t"5 inch screen', '2.png\t"a ""red"" fish"']
        table.write_text("\r\n".join([*lines, "3.png\tlast", '4.png\t"a"\tb c"']), newline="")
        skipped = Skipped()
        captions = captions_of(table, skipped=skipped)
        assert captions == [['"Stop" says the sign'], ['"5 inch screen'], ['a "red" fish'], ["last"]]
        assert [(Path(name).name, reason) for name, reason in skipped.items] == [
            ("a.tsv line 6", "has 3 fields instead of 2")
        ]

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
        pq.write_table(pa.table({"image": [1.5], "caption": ["a"]}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match="'image' is double"):
            load_pairs(tmp_path / "a.parquet")
        pq.write_table(pa.table({"a": [b"1"], "b": [b"1"], "caption": ["a"]}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match="no image column"):
            load_pairs(tmp_path / "a.parquet")

    @pytest.mark.parametrize(
        ("files", "reason"),
        [
            ({}, "has no images"),
            ({"notes.txt": b"hello"}, "has no images"),
            ({"a.png": b"x"}, r"no captions in a layout that is known \(files: 1 \.png\)\. Add metadata\.csv"),
            ({"a.txt": b"0.png#0\ta\n", "b.txt": b"0.png#0\ta\n"}, "describe the same images"),
            ({"a.csv": b""}, "no rows"),
            ({"a.csv": b"image,caption\n"}, "no rows"),
            ({"a.csv": "image,caption\na.png,кот на окне\n".encode("cp1251")}, "not UTF-8, UTF-16 or cp1252"),
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
        write_images(tmp_path, 2)
        write_jsonl(tmp_path / "train.jsonl", [{"image": "0.png", "caption": "a"}])
        write_jsonl(tmp_path / "info.json", [{"anything": 1}])
        assert captions_of(tmp_path) == [["a"]]
        assert "left out" in caplog.text
        assert caplog.records[0].levelno == logging.WARNING

    @pytest.mark.parametrize("contents", ['{"MIT": "the text"}', '["MIT"]', "3", "[]"])
    def test_table_without_pairs_beside_others(self, contents, tmp_path, caplog):
        make_csv(write_images(tmp_path, 3))
        for name in ("licenses.json", "pairs.json"):
            (tmp_path / name).write_text(contents)
            assert captions_of(tmp_path) == [["zero", "nought"], ["one"], ["two"]]
            assert f"left out {tmp_path / name}" in caplog.text

    def test_a_split_without_pairs_is_an_error(self, tmp_path):
        write_images(tmp_path, 2)
        write_jsonl(tmp_path / "train.jsonl", [{"image": "0.png", "caption": "a"}])
        write_jsonl(tmp_path / "test.jsonl", [{"image": "1.png", "titel": "b"}])
        with pytest.raises(ValueError, match=r"test\.jsonl has no caption column"):
            load_pairs(tmp_path)

    def test_the_same_table_in_two_formats(self, tmp_path):
        write_csv(write_images(tmp_path, 3) / "metadata.csv", [("image", "caption"), *ROWS])
        write_jsonl(tmp_path / "metadata.jsonl", [{"image": name, "caption": text} for name, text in ROWS])
        with pytest.raises(
            ValueError, match=r"metadata\.csv and metadata\.jsonl describe the same images .*, or remove"
        ):
            load_pairs(tmp_path)
        assert len(captions_of(tmp_path / "metadata.csv")) == 3

    def test_a_sub_folder_that_cannot_be_read(self, tmp_path, monkeypatch, caplog):
        make_csv(write_images(tmp_path, 3))
        closed = write_images(tmp_path / "closed", 1)
        scandir = os.scandir

        def refuse(path):
            if Path(path) == closed:
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        assert len(captions_of(tmp_path)) == 3
        assert caplog.messages == [f"cannot look into {closed} (Permission denied)"]

    def test_a_path_that_is_too_long(self, tmp_path):
        write_images(tmp_path, 1)
        rows = [{"image": "x" * 300, "caption": "a"}, {"image": "0.png", "caption": "b"}]
        assert captions_of(write_jsonl(tmp_path / "a.jsonl", rows)) == [["b"]]
