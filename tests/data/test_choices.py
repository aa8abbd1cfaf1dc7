"""What is chosen of a source is said, and can be chosen otherwise; what is ambiguous is refused by name."""

import contextlib
import json
import logging
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipmini.data.images import Skipped
from clipmini.data.pairs import load_pairs
from pair_files import TOLERANT, WHOLE, encode, write_csv, write_images, write_jsonl

HOSTILE = "---\nconfigs:\n- data_files: 3\n- data_files: [{split: train}, {path: null}, {path: [1]}]\n- {}\n---\n"


def parquet(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [encode(n) for n in numbers], "caption": [f"c{n}" for n in numbers]}), path)


def captions_of(source, **options):
    return {
        name: [text for texts in rows["captions"] for text in texts]
        for name, rows in load_pairs(source, **WHOLE, **options).items()
    }


def found_in(source, **options):
    findings = []
    load_pairs(source, **{**WHOLE, **options}, findings=findings)
    (found,) = findings
    return found


class TestFindings:
    def test_say_what_is_used(self, tmp_path, caplog):
        caplog.set_level(logging.INFO, "clipmini.data")
        write_images(tmp_path / "images", 2)
        rows = [("Image", "Caption 1", "Caption 2", "Title"), ("0.png", "a", "b", "t"), ("1.png", "c", "", "t")]
        write_csv(tmp_path / "captions.csv", rows, ";")
        found = found_in(tmp_path)
        assert (
            found.lines()
            == caplog.messages
            == [
                "captions.csv (separated by ;): 2 rows, images in 'Image', captions in 'Caption 1' and 'Caption 2'",
                "columns that are not read: Title",
                f"2 images in {tmp_path / 'images'}",
                "splits: none, all images are for training",
                "used: 2 of 2 rows",
            ]
        )
        assert str(tmp_path) not in "".join(found.lines(is_public=True))
        assert json.loads(json.dumps(found.to_dict()))["tables"][0]["unread_columns"] == ["Title"]

    def test_say_where_splits_come_from(self, tmp_path):
        write_images(tmp_path, 4)
        rows = [("image", "caption", "split"), *((f"{n}.png", "a", "train") for n in range(3)), ("3.png", "a", "test")]
        source = write_csv(tmp_path / "a.csv", rows)
        found = found_in(source, validation_fraction=0.1)
        assert found.tables[0].splits == "column 'split'"
        assert found.splits == "test and train as the source has them; validation drawn at random, by image (seed 0)"
        assert found_in(source, split_column=None).splits == "none, all images are for training"

    def test_are_in_a_dry_run_of_the_command(self, tmp_path):
        write_images(tmp_path, 3)
        found = found_in(write_csv(tmp_path / "a.csv", [("image", "text"), *((f"{n}.png", "a") for n in range(3))]))
        assert found.tables[0].caption_columns == ["text"]
        assert (found.num_rows, found.num_used) == (3, 3)


class TestColumns:
    def test_a_list_chooses_among_captions(self, tmp_path):
        rows = [("image", "short", "long", "caption"), ("0.png", "a", "b", "c")]
        source = write_csv(write_images(tmp_path, 1) / "a.csv", rows)
        assert captions_of(source) == {"train": ["c"]}
        assert captions_of(source, caption_column=["long", "short"]) == {"train": ["b", "a"]}
        with pytest.raises(ValueError, match="no column 'longer'; set caption_column to one"):
            load_pairs(source, caption_column=["short", "longer"])

    def test_captions_in_languages_are_not_passed_over_for_a_title(self, tmp_path):
        rows = [("image", "title", "caption_en", "caption_de"), ("0.png", "t", "a", "b")]
        source = write_csv(write_images(tmp_path, 1) / "a.csv", rows)
        with pytest.raises(ValueError, match="captions in caption_en, caption_de or in 'title'; set caption_column"):
            load_pairs(source)
        assert captions_of(source, caption_column=["caption_en"]) == {"train": ["a"]}

    def test_masks_are_not_the_images(self, tmp_path):
        write_images(tmp_path, 2)
        masks = [{"bytes": encode(9), "path": None}] * 2
        table = pa.table({"mask": masks, "file_name": ["0.png", "1.png"], "caption": ["a", "b"]})
        pq.write_table(table, tmp_path / "a.parquet")
        assert found_in(tmp_path / "a.parquet").tables[0].image_column == "file_name"

    def test_addresses_are_named_with_the_remedy(self, tmp_path):
        source = write_csv(tmp_path / "a.csv", [("URL", "TEXT"), ("http://example.org/1.jpg", "a dog")])
        with pytest.raises(ValueError, match="addresses in URL, which are not fetched; download them first"):
            load_pairs(source)

    def test_ids_that_pandas_has_made_floats(self, tmp_path):
        write_images(tmp_path, 3)
        rows = [{"image_id": 0.0, "caption": "a"}, {"image_id": 2.0, "caption": "b"}]
        assert captions_of(write_jsonl(tmp_path / "a.jsonl", rows)) == {"train": ["a", "b"]}
        for bad in (True, 1.5):
            with pytest.raises(ValueError, match="neither images nor bytes nor paths"):
                load_pairs(write_jsonl(tmp_path / "a.jsonl", [{"image": bad, "caption": "a"}]))

    def test_long_values_are_not_shown(self, tmp_path):
        source = write_csv(tmp_path / "a.csv", [("x" * 5000, "y" * 5000), ("1", "2")])
        with pytest.raises(ValueError, match=r"\.\.\. \(5,002 characters\)") as caught:
            load_pairs(source)
        assert len(str(caught.value)) < 700
        skipped = Skipped()
        skipped.add("x" * 5000, "y" * 5000)
        assert sum(map(len, skipped.items[0])) < 700

    def test_values_as_they_are(self, tmp_path):
        """Brackets, numbers and words that look like code are captions where they are no list."""
        texts = ["[a dog]", "['tis the season", "{x}", "[-]", "12", "['a', dog]", "['a' + 'b']"]
        source = write_csv(write_images(tmp_path, 1) / "a.csv", [("image", "caption"), *(("0.png", t) for t in texts)])
        assert captions_of(source) == {"train": texts}


class TestTables:
    def test_two_of_the_same_images_are_named(self, tmp_path):
        write_images(tmp_path / "images", 4)
        rows = [("image", "caption"), *((f"{n}.png", "a") for n in range(4))]
        for name in ("captions.csv", "captions_old.csv"):
            write_csv(tmp_path / name, rows)
        with pytest.raises(ValueError, match=r"captions\.csv and captions_old\.csv describe the same images \(4\)"):
            load_pairs(tmp_path)

    def test_parts_are_joined(self, tmp_path):
        write_images(tmp_path / "images", 4)
        for part in range(2):
            rows = [("image", "caption"), *((f"{n}.png", "a") for n in range(2 * part, 2 * part + 2))]
            write_csv(tmp_path / f"part{part}.csv", rows)
        assert len(captions_of(tmp_path)["train"]) == 4

    def test_a_table_of_a_split_without_pairs_is_named(self, tmp_path):
        write_images(tmp_path, 2)
        write_jsonl(tmp_path / "train.jsonl", [{"image": "0.png", "caption": "a"}])
        write_jsonl(tmp_path / "test.jsonl", [{"image": "1.png"}])
        with pytest.raises(ValueError, match=r"test\.jsonl .* If there are no captions for test, move the table away"):
            load_pairs(tmp_path)

    def test_a_table_that_only_sounds_like_a_split_does_not_hide_the_others(self, tmp_path):
        """As H&M's transactions_train.csv beside articles.csv."""
        write_images(tmp_path / "images", 2)
        write_csv(tmp_path / "transactions_train.csv", [("t_dat", "price"), ("2018", "1")])
        write_csv(tmp_path / "articles.csv", [("image", "description"), ("0.png", "a"), ("1.png", "b")])
        assert captions_of(tmp_path) == {"train": ["a", "b"]}

    def test_why_no_row_can_be_read(self, tmp_path):
        (tmp_path / "a.csv").write_text("image,caption\n0.png,a, b\n1.png,c, d\n")
        with pytest.raises(
            ValueError, match=r"no row that can be read; the first, .*line 2, has 3 fields instead of 2"
        ):
            load_pairs(tmp_path / "a.csv")

    def test_a_dangling_link_beside_costs_nothing(self, tmp_path):
        write_csv(write_images(tmp_path, 1) / "a.csv", [("image", "caption"), ("0.png", "a")])
        (tmp_path / "dead.csv").symlink_to(tmp_path / "gone")
        assert captions_of(tmp_path) == {"train": ["a"]}

    def test_a_caption_file_that_cannot_be_read_costs_its_image(self, tmp_path):
        write_images(tmp_path, 30)
        for number in range(30):
            (tmp_path / f"{number}.txt").write_bytes(b"caf\xe9" if number else b"\xff\xd8\0\1")
        skipped = Skipped()
        assert len(load_pairs(tmp_path, **WHOLE, skipped=skipped)["train"]) == 29
        assert "is a binary file" in skipped.items[0][1]

    @pytest.mark.parametrize(
        "document",
        [
            {"a.jpg": {"caption": "x"}, "b.jpg": "y"},
            {"images": [{"id": [1], "file_name": "0.png"}, 3], "annotations": [{"image_id": [1], "caption": "x"}]},
            [{"image": "file://[", "caption": "x"}],
            [{"image": 10**400, "caption": "x"}],
        ],
    )
    def test_strange_json_is_no_crash(self, document, tmp_path):
        write_images(tmp_path, 1)
        (tmp_path / "a.json").write_text(json.dumps(document))
        with contextlib.suppress(ValueError):
            load_pairs(tmp_path / "a.json")

    def test_a_json_object_of_splits(self, tmp_path):
        write_images(tmp_path, 3)
        splits = {name: [{"image": f"{n}.png", "caption": name}] for n, name in enumerate(["test", "train", "val"])}
        (tmp_path / "a.json").write_text(json.dumps(splits))
        assert captions_of(tmp_path / "a.json") == {"train": ["train"], "validation": ["val"], "test": ["test"]}

    def test_lists_of_a_json_object_that_are_not_read_are_named(self, tmp_path):
        write_images(tmp_path, 1)
        document = {"images": [{"file_name": "0.png", "caption": "a"}], "categories": [{"id": 1}]}
        (tmp_path / "a.json").write_text(json.dumps(document))
        assert found_in(tmp_path / "a.json").tables[0].notes == ["its list 'images', and not categories"]

    def test_two_kinds_of_caption_files_are_named(self, tmp_path):
        write_images(tmp_path / "images", 3)
        for folder in ("captions", "tags"):
            (tmp_path / folder).mkdir()
            for number in range(3):
                (tmp_path / folder / f"{number}.txt").write_text(f"{folder} of it")
        with pytest.raises(ValueError, match=r"has captions in .*captions/0.txt and in .*tags/0.txt; move"):
            load_pairs(tmp_path)

    def test_shards_that_share_images_are_joined(self, tmp_path):
        parquet(tmp_path / "part-0.parquet", [1, 2, 3])
        parquet(tmp_path / "part-1.parquet", [2, 3, 4])
        assert len(captions_of(tmp_path)["train"]) == 6

    def test_blank_rows_are_no_rows(self, tmp_path):
        write_images(tmp_path, 1)
        (tmp_path / "a.csv").write_text("image,caption\n0.png,a\n" + ",\n" * 50)
        assert found_in(tmp_path / "a.csv").num_rows == 1

    def test_files_of_other_things_are_not_opened(self, tmp_path):
        """A compressed file that is no table, Excel's lock, and what a program knows of each image."""
        write_csv(write_images(tmp_path, 2) / "a.csv", [("image", "caption"), ("0.png", "a"), ("1.png", "b")])
        for name in ("brain.nii.gz", "~$a.xlsx", "log.xz"):
            (tmp_path / name).write_bytes(bytes(range(256)))
        for number in range(2):
            (tmp_path / f"{number}.png.json").write_text('{"title": "0.png"}')
        found = found_in(tmp_path)
        assert [table.name for table in found.tables] == ["a.csv"]
        assert found.passed_over == []

    def test_what_a_program_knows_of_each_image(self, tmp_path):
        """As in a Google Takeout."""
        write_images(tmp_path, 2)
        for number in range(2):
            about = {"title": f"{number}.png", "description": f"about {number}"}
            (tmp_path / f"{number}.png.json").write_text(json.dumps(about))
        assert captions_of(tmp_path) == {"train": ["about 0", "about 1"]}

    def test_archives_beside_a_table_are_named(self, tmp_path, caplog):
        write_images(tmp_path, 2)
        write_csv(tmp_path / "a.csv", [("image", "caption"), ("0.png", "a"), ("1.png", "b")])
        (tmp_path / "images.zip").write_bytes(b"")
        assert len(captions_of(tmp_path)["train"]) == 2
        assert "images.zip: beside tables" in caplog.text

    def test_configurations(self, tmp_path):
        for name in ("labeled", "unlabeled"):
            parquet(tmp_path / name / "train-00000-of-00001.parquet", [1, 2] if name == "labeled" else [3, 4, 5])
        with pytest.raises(ValueError, match="the configurations labeled, unlabeled; choose one with config_name="):
            load_pairs(tmp_path)
        assert len(captions_of(tmp_path, config_name="unlabeled")["train"]) == 3
        with pytest.raises(ValueError, match="no configuration 'en'; it has labeled, unlabeled"):
            load_pairs(tmp_path, config_name="en")

    def test_declared_configurations(self, tmp_path):
        parquet(tmp_path / "files/a.parquet", [1, 2])
        parquet(tmp_path / "files/b.parquet", [3])
        parquet(tmp_path / "files/c.parquet", [4])
        files = "[{split: train, path: files/a.parquet}, {split: test, path: [files/b.parquet]}]"
        configs = f"- config_name: en\n  data_files: {files}\n- config_name: de\n  data_files: files/c.parquet\n"
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# Data\n")
        assert captions_of(tmp_path, config_name="en") == {"train": ["c1", "c2"], "test": ["c3"]}
        with pytest.raises(ValueError, match="the configurations en, de; choose one with config_name=en"):
            load_pairs(tmp_path)

    @pytest.mark.parametrize(
        "readme", ["---\n{\n---\n", "---\nconfigs: 3\n---\n", "no card", "---\nconfigs: [1]\n---\n", HOSTILE]
    )
    def test_a_readme_that_is_no_card_harms_nothing(self, readme, tmp_path):
        write_csv(write_images(tmp_path, 1) / "a.csv", [("image", "caption"), ("0.png", "a")])
        (tmp_path / "README.md").write_text(readme)
        assert captions_of(tmp_path) == {"train": ["a"]}

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("a.pkl", pickle.dumps([1]), "is a pickle, which can run any code"),
            ("a.csv", pickle.dumps([1]), "is a pickle, which can run any code"),
            ("a.h5", b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
            ("a.db", b"SQLite format 3\0", "is an SQLite database"),
            ("a.xlsx", b"no sheet", "cannot be read as an Excel sheet"),
            ("a.csv", bytes(range(256)) * 9, "is a binary file"),
            ("a.json", b"[" * 200_000, "nested too deeply"),
            ("a.arrow", b"ARROW1 and more", "cannot be read as Arrow"),
            ("a.csv.gz", b"\x1f\x8b and more", "cannot be unpacked"),
        ],
    )
    def test_what_is_no_table_is_named(self, name, content, reason, tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            load_pairs(tmp_path / name)

    def test_boxes_are_no_captions(self, tmp_path):
        write_images(tmp_path / "images", 3)
        (tmp_path / "labels").mkdir()
        for number in range(3):
            (tmp_path / f"labels/{number}.txt").write_text("dog 0.5 0.5 0.1 0.1\n")
        with pytest.raises(ValueError, match="hold mostly numbers, as the boxes of a detector"):
            load_pairs(tmp_path)


class TestSplits:
    def test_a_column_of_something_else(self, tmp_path):
        rows = [("image", "caption", "split"), *((f"{n}.png", "a", f"fold{n}") for n in range(3))]
        source = write_csv(write_images(tmp_path, 3) / "a.csv", rows)
        with pytest.raises(ValueError, match=r"split 'fold0' is not known; .* Set split_column to another column, or"):
            load_pairs(source)
        assert len(captions_of(source, split_column=None)["train"]) == 3

    def test_a_named_column(self, tmp_path):
        rows = [("image", "caption", "part"), ("0.png", "a", "Train"), ("1.png", "b", "dev")]
        source = write_csv(write_images(tmp_path, 2) / "a.csv", rows)
        assert captions_of(source, split_column="part") == {"train": ["a"], "validation": ["b"]}
        with pytest.raises(ValueError, match="no column 'parts'; set split_column"):
            load_pairs(source, split_column="parts")

    def test_none_draws_also_where_files_are_named_after_splits(self, tmp_path):
        write_images(tmp_path, 4)
        for name, numbers in {"train": [0, 1, 2], "test": [3]}.items():
            write_jsonl(tmp_path / f"{name}.jsonl", [{"image": f"{n}.png", "caption": "a"} for n in numbers])
        assert len(captions_of(tmp_path, split_column=None)["train"]) == 4

    @pytest.mark.parametrize("name", ["{split}/{number}.png", "{number}.png"])
    def test_folders_of_the_images_are_splits(self, name, tmp_path):
        rows = [("image", "caption")]
        for split, numbers in {"train": range(6), "test": range(6, 8)}.items():
            write_images(tmp_path / split, len(numbers), start=numbers[0])
            rows += [(name.format(split=split, number=number), "a") for number in numbers]
        found = found_in(write_csv(tmp_path / "a.csv", rows))
        assert found.splits == "test and train as the source has them"

    @pytest.mark.parametrize("column", ["subset", "split"])
    def test_a_column_that_names_splits_and_more(self, column, tmp_path):
        """As in WikiArt, whose rows are also of uncertain artists: no test image may be trained on unsaid."""
        rows = [
            ("image", "caption", column),
            ("0.png", "a", "train"),
            ("1.png", "b", "test"),
            ("2.png", "c", "uncertain"),
        ]
        with pytest.raises(ValueError, match="split 'uncertain' is not known"):
            load_pairs(write_csv(write_images(tmp_path, 3) / "a.csv", rows))

    def test_some_folders_of_the_images_are_splits(self, tmp_path):
        write_images(tmp_path / "photos", 6)
        write_images(tmp_path / "test", 2, start=6)
        source = write_csv(tmp_path / "a.csv", [("image", "caption"), *((f"{n}.png", "a") for n in range(8))])
        assert {name: len(texts) for name, texts in captions_of(source).items()} == {"train": 6, "test": 2}

    def test_lists_in_a_folder_of_their_own(self, tmp_path):
        write_images(tmp_path / "images", 3)
        rows = [("image", "caption"), *((f"images/{n}.png", "a") for n in range(3))]
        (tmp_path / "splits").mkdir()
        for number, name in enumerate(["train", "val", "test"]):
            (tmp_path / f"splits/{name}.txt").write_text(f"images/{number}.png\n")
        assert list(captions_of(write_csv(tmp_path / "a.csv", rows))) == ["train", "validation", "test"]

    def test_a_column_of_another_name_and_content(self, tmp_path):
        rows = [("image", "caption", "subset"), *((f"{n}.png", "a", "fashion") for n in range(3))]
        assert len(captions_of(write_csv(write_images(tmp_path, 3) / "a.csv", rows))["train"]) == 3


class TestMaxSkipped:
    def test_is_a_share_of_rows(self, tmp_path):
        source = write_csv(
            write_images(tmp_path, 19) / "a.csv", [("image", "caption"), *((f"{n}.png", "a") for n in range(20))]
        )
        assert len(captions_of(source)["train"]) == 19
        (tmp_path / "3.png").write_bytes(b"")
        with pytest.raises(ValueError, match=r"10% of 20 rows .* over max_skipped=0.05; the first .*3\.png: is empty"):
            load_pairs(source)
        assert len(load_pairs(source, **TOLERANT)["train"]) == 18
        with pytest.raises(ValueError, match="max_skipped=5 is not a share; set it between 0 and 1"):
            load_pairs(source, max_skipped=5)

    def test_counts_rows_that_cannot_be_parsed(self, tmp_path):
        lines = ["image,caption", *(f"{n}.png,a" for n in range(9)), "x,y,z"]
        write_images(tmp_path, 9)
        (tmp_path / "a.csv").write_text("\n".join(lines))
        with pytest.raises(ValueError, match=r"10% of 10 rows .*line 11: has 3 fields instead of 2"):
            load_pairs(tmp_path / "a.csv")
