import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

from clipmini import names
from clipmini.data.images import Skipped
from clipmini.data.labeled import keep_readable, load_labeled
from modeling_clipmini.images_clipmini import read_image


def test_folders_are_classes(class_folder):
    images = load_labeled(class_folder)
    assert images.names == ["red fox", "sea", "tree"]
    assert list(images.splits) == ["train"]
    rows = images.splits["train"]
    assert rows.column_names == ["image", "label"]
    assert sorted(rows["label"]) == [0] * 10 + [1] * 10 + [2] * 10
    for row in rows:
        corner = read_image(row["image"]).getpixel((39, 31))
        assert corner == {0: (255, 0, 0), 1: (0, 0, 255), 2: (0, 128, 0)}[row["label"]]


def test_split_folders_may_contain_the_class_folders(class_folder):
    (class_folder / "test").mkdir()
    (class_folder / "train").mkdir()
    for name in ("red_fox", "tree", "sea"):
        (class_folder / name).rename(class_folder / "train" / name)
        (class_folder / "test" / name).mkdir()
        (class_folder / "train" / name / "0.png").rename(class_folder / "test" / name / "0.png")
    images = load_labeled(class_folder)
    assert {split: len(rows) for split, rows in images.splits.items()} == {"train": 27, "test": 3}


def test_a_class_may_be_named_like_a_split(class_folder):
    (class_folder / "tree").rename(class_folder / "train")
    (class_folder / "sea" / "1.png").rename(class_folder / "sea" / "test_1.png")
    images = load_labeled(class_folder)
    assert images.names == ["red fox", "sea", "train"]
    assert len(images.splits["train"]) == 30


def test_images_in_sub_folders_of_a_class_belong_to_it(class_folder):
    (class_folder / "tree" / "winter").mkdir()
    (class_folder / "tree" / "1.png").rename(class_folder / "tree" / "winter" / "1.png")
    assert sorted(load_labeled(class_folder).splits["train"]["label"]) == [0] * 10 + [1] * 10 + [2] * 10


@pytest.mark.parametrize("name", ["test", "__MACOSX"])
def test_split_folders_beside_another_folder_are_refused(class_folder, name):
    (class_folder / "train" / "tree").mkdir(parents=True)
    for file in (class_folder / "tree").iterdir():
        file.rename(class_folder / "train" / "tree" / file.name)
    (class_folder / "tree").rmdir()
    (class_folder / "sea").rename(class_folder / "train" / "sea")
    (class_folder / "red_fox").rename(class_folder / name)  # unlabeled images
    with pytest.raises(ValueError, match=rf"classes like splits, and others that do not \({name}\)"):
        load_labeled(class_folder)


def test_a_split_without_any_label_is_left_out(monkeypatch):
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["a", "b"])})
    image = Image.new("RGB", (8, 8))
    of = {
        split: Dataset.from_list([{"image": image, "label": label}] * 2, features=features)
        for split, label in (("validation", 1), ("test", -1))
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config_name: DatasetDict(of))
    monkeypatch.setattr(names, "_find_on_hub", lambda name, kind: name)
    assert list(load_labeled("org/name").splits) == ["validation"]


def test_two_classes_with_one_name_are_refused(class_folder):
    (class_folder / "sea").rename(class_folder / "red fox")
    with pytest.raises(ValueError, match="two classes of one name, 'red fox' and 'red_fox'"):
        load_labeled(class_folder)


def test_an_option_that_a_folder_does_not_have_is_refused(class_folder):
    with pytest.raises(ValueError, match="label_column='kind' has no meaning for the folder"):
        load_labeled(class_folder, label_column="kind")


def test_a_folder_without_classes_is_refused(class_folder):
    with pytest.raises(ValueError, match="has no sub-folder with images"):
        load_labeled(class_folder / "tree")


def test_unreadable_images_are_left_out_and_named(class_folder):
    (class_folder / "tree" / "3.png").write_bytes(b"no image")
    skipped = Skipped()
    rows = load_labeled(class_folder).splits["train"]
    assert len(rows) == 30  # none is opened before it is needed
    assert len(keep_readable(rows, "train", skipped)) == 29
    ((name, reason),) = skipped.items
    assert name.endswith("3.png")
    assert reason


def hub_like(monkeypatch, features, rows):
    loaded = DatasetDict(test=Dataset.from_list(rows, features=features))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config_name: loaded)
    monkeypatch.setattr(names, "_find_on_hub", lambda name, kind: name)


def test_columns_are_found_by_type(monkeypatch):
    features = Features(
        {"img": datasets.Image(), "coarse": Value("int64"), "fine_label": ClassLabel(names=["a_b", "c"])}
    )
    image = Image.new("RGB", (8, 8))
    hub_like(monkeypatch, features, [{"img": image, "coarse": 1, "fine_label": 1}])
    images = load_labeled("org/name")
    assert images.names == ["a b", "c"]
    assert images.splits["test"]["label"] == [1]


def test_labels_may_be_names_and_some_may_be_missing(monkeypatch):
    features = Features({"image": datasets.Image(), "label": Value("string")})
    image = Image.new("RGB", (8, 8))
    rows = [{"image": image, "label": label} for label in ("wolf", "bear", None)]
    hub_like(monkeypatch, features, rows)
    skipped = Skipped()
    images = load_labeled("org/name")
    assert images.names == ["bear", "wolf"]
    assert keep_readable(images.splits["test"], "test", skipped)["label"] == [1, 0]
    assert skipped.items == [("test row 3", "has no label")]


def test_unusable_sources_are_refused(tmp_path, monkeypatch, class_folder):
    with pytest.raises(ValueError, match=r"nowhere/at/all does not exist"):
        load_labeled(str(tmp_path / "nowhere/at/all"))
    with pytest.raises(ValueError, match="is a file"):
        load_labeled(class_folder / "tree" / "1.png")
    features = Features({"a": datasets.Image(), "b": datasets.Image(), "label": ClassLabel(names=["x"])})
    image = Image.new("RGB", (8, 8))
    hub_like(monkeypatch, features, [{"a": image, "b": image, "label": 0}])
    with pytest.raises(ValueError, match=r"no image column .*; set image_column to one of .*: 'a', 'b', 'label'"):
        load_labeled("org/name")
    with pytest.raises(ValueError, match=r"no column 'kind'; set label_column to one of .*: 'a', 'b', 'label'"):
        load_labeled("org/name", image_column="a", label_column="kind")
