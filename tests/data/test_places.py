"""Images are found where they lie, and never in a folder that only looks like theirs."""

import pytest

from clipmini.data.images import Skipped
from clipmini.data.pairs import load_pairs
from clipmini.data.sources import SourceReader
from pair_files import TOLERANT, WHOLE, encode, write_csv, write_images


def table(folder, count=12, name="{}.png"):
    rows = [(name.format(number), f"image {number}") for number in range(count)]
    return write_csv(folder / "captions.csv", [("image", "caption"), *rows])


def folders_of(source, **options):
    """Map each folder, relative to the source's, to how many of its images are taken."""
    reader = SourceReader(Skipped(), **options)
    reader.read(source)
    (found,) = reader.findings.tables
    root = source if source.is_dir() else source.parent
    return {str(folder).removeprefix(str(root)).lstrip("/"): number for folder, number in found.folders.items()}


class TestPlaces:
    def test_masks_that_are_complete_are_not_taken_for_images(self, tmp_path):
        table(tmp_path)
        write_images(tmp_path / "images", 11)
        write_images(tmp_path / "masks", 12)
        with pytest.raises(ValueError, match=r"11 images .* are both in .*images and in .*masks"):
            load_pairs(tmp_path)

    def test_the_split_of_a_table_chooses_among_folders(self, tmp_path):
        for split in ("train", "val"):
            write_images(tmp_path / "images" / split, 3)
            rows = [("image", "caption"), *((f"{n}.png", split) for n in range(3))]
            write_csv(tmp_path / f"{split}.csv", rows)
        pairs = load_pairs(tmp_path)
        assert {name: rows["captions"][0] for name, rows in pairs.items()} == {
            "train": ["train"],
            "validation": ["val"],
        }

    def test_folders_that_fit_equally_are_named(self, tmp_path):
        table(tmp_path)
        write_images(tmp_path / "images", 12)
        write_images(tmp_path / "depth", 12)
        with pytest.raises(ValueError, match=r"12 images .* are both in .*depth and in .*images; set image_root"):
            load_pairs(tmp_path)
        assert folders_of(tmp_path, image_root=tmp_path / "images") == {"images": 12}

    def test_the_folder_that_holds_the_most_is_taken(self, tmp_path):
        table(tmp_path)
        write_images(tmp_path / "images", 12)
        write_images(tmp_path / "a preview", 10)  # first by name, and it has those that come first
        assert folders_of(tmp_path) == {"images": 12}

    def test_images_in_several_folders_are_joined(self, tmp_path):
        table(tmp_path)
        write_images(tmp_path / "one", 7)
        write_images(tmp_path / "two/three", 5, start=7)
        assert folders_of(tmp_path) == {"one": 7, "two/three": 5}

    @pytest.mark.parametrize("name", ["thumbnails", "@eaDir", "__MACOSX", ".cache"])
    def test_thumbnails_and_system_folders_are_passed_over(self, name, tmp_path):
        table(tmp_path)
        write_images(tmp_path / "images", 12)
        write_images(tmp_path / name, 12)
        assert folders_of(tmp_path) == {"images": 12}

    def test_a_folder_of_copies_does_not_fill_gaps(self, tmp_path):
        table(tmp_path, 40)
        write_images(tmp_path, 39)
        write_images(tmp_path / "small", 40)
        assert folders_of(tmp_path) == {"": 39}

    def test_a_few_equal_names_in_folders_cost_themselves(self, tmp_path, caplog):
        table(tmp_path, 40)
        write_images(tmp_path / "one", 21)
        write_images(tmp_path / "two", 20, start=20)
        assert folders_of(tmp_path) == {"one": 20, "two": 19}
        assert "1 images that" in caplog.text

    def test_other_data_sets_beside_are_not_looked_at(self, tmp_path):
        write_images(tmp_path / "other/images", 12)
        write_images(tmp_path / "another", 12)
        (tmp_path / "mine").mkdir()
        with pytest.raises(ValueError, match=r"no usable pair; 12 inputs skipped, the first .*mine/0\.png: does not"):
            load_pairs(table(tmp_path / "mine"))

    def test_beside_a_folder_of_annotations(self, tmp_path):
        write_images(tmp_path / "images/val2017", 12)
        (tmp_path / "annotations").mkdir()
        source = table(tmp_path / "annotations")
        assert list(folders_of(source)) == [str(tmp_path / "images/val2017").lstrip("/")]

    @pytest.mark.parametrize("num_test", [10, 9])
    def test_each_split_has_its_own_images(self, num_test, tmp_path):
        """Equal names in both; one that is missing in a split is not taken from the other."""
        for split, number in {"train": 20, "test": num_test}.items():
            write_images(tmp_path / split / "images", number)
            rows = [(f"{n}.png", split) for n in range(20 if split == "train" else 10)]
            write_csv(tmp_path / split / "captions.csv", [("image", "caption"), *rows])
        pairs = load_pairs(tmp_path, **TOLERANT)
        assert {name: len(rows) for name, rows in pairs.items()} == {"train": 20, "test": num_test}
        assert all("/test/" in row["image"]["path"] for row in pairs["test"])

    def test_a_folder_that_some_names_begin_with_is_not_dropped(self, tmp_path):
        """cats/0.png is not dogs/0.png."""
        rows = [(f"{name}/{number}.png", "x") for name in ("cats", "dogs") for number in range(3)]
        write_images(tmp_path / "dogs", 3)
        source = write_csv(tmp_path / "a.csv", [("image", "caption"), *rows])
        pairs = load_pairs(source, **TOLERANT)
        assert len(pairs["train"]) == 3
        with pytest.raises(ValueError, match=r"50% of 6 rows cannot be used, over max_skipped=0.05; .* \(3 in all\)"):
            load_pairs(source, **WHOLE)

    def test_a_link_to_the_same_folder_is_no_second_one(self, tmp_path):
        table(tmp_path)
        write_images(tmp_path / "images", 12)
        (tmp_path / "latest").symlink_to("images")
        for number in range(12):
            (tmp_path / "linked").mkdir(exist_ok=True)
            (tmp_path / f"linked/{number}.png").symlink_to(tmp_path / f"images/{number}.png")
        assert sum(folders_of(tmp_path).values()) == 12

    def test_exact_names_come_before_other_suffixes(self, tmp_path):
        """Masks of the same stem are not the images."""
        table(tmp_path, name="{}.jpg")
        for number in range(12):
            (tmp_path / "images").mkdir(exist_ok=True)
            (tmp_path / f"images/{number}.jpg").write_bytes(encode(number))
        write_images(tmp_path / "masks", 12)
        assert folders_of(tmp_path) == {"images": 12}
