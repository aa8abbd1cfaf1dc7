import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

from clipmini.evaluation.labelled import load_labelled
from clipmini.inference.images import Skipped, read_image


def test_folders_are_classes(class_folder):
    pictures = load_labelled(class_folder)
    assert pictures.names == ["red fox", "sea", "tree"]
    assert list(pictures.splits) == ["train"]
    rows = pictures.splits["train"]
    assert rows.column_names == ["image", "label"]
    assert sorted(rows["label"]) == [0] * 10 + [1] * 10 + [2] * 10
    for row in rows:
        corner = read_image(row["image"]).getpixel((39, 31))
        assert corner == {0: (255, 0, 0), 1: (0, 0, 255), 2: (0, 128, 0)}[row["label"]]


def test_splits_may_stand_above_classes(class_folder):
    (class_folder / "test").mkdir()
    (class_folder / "train").mkdir()
    for name in ("red_fox", "tree", "sea"):
        (class_folder / name).rename(class_folder / "train" / name)
        (class_folder / "test" / name).mkdir()
        (class_folder / "train" / name / "0.png").rename(class_folder / "test" / name / "0.png")
    pictures = load_labelled(class_folder)
    assert {split: len(rows) for split, rows in pictures.splits.items()} == {"train": 27, "test": 3}


def test_a_class_may_be_called_like_a_split(class_folder):
    (class_folder / "tree").rename(class_folder / "train")
    (class_folder / "sea" / "1.png").rename(class_folder / "sea" / "test_1.png")
    pictures = load_labelled(class_folder)
    assert pictures.names == ["red fox", "sea", "train"]
    assert len(pictures.splits["train"]) == 30


def test_a_folder_without_classes_is_named(class_folder):
    with pytest.raises(ValueError, match="has no sub-folder with pictures"):
        load_labelled(class_folder / "tree")


def test_what_cannot_be_read_is_left_out_and_named(class_folder):
    (class_folder / "tree" / "3.png").write_bytes(b"no picture")
    skipped = Skipped()
    assert len(load_labelled(class_folder, skipped=skipped).splits["train"]) == 29
    ((name, reason),) = skipped.items
    assert name.endswith("3.png")
    assert reason


def hub_like(monkeypatch, features, rows):
    loaded = DatasetDict(test=Dataset.from_list(rows, features=features))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config_name: loaded)


def test_columns_are_found_by_type(monkeypatch):
    features = Features(
        {"img": datasets.Image(), "coarse": Value("int64"), "fine_label": ClassLabel(names=["a_b", "c"])}
    )
    picture = Image.new("RGB", (8, 8))
    hub_like(monkeypatch, features, [{"img": picture, "coarse": 1, "fine_label": 1}])
    pictures = load_labelled("org/name")
    assert pictures.names == ["a b", "c"]
    assert pictures.splits["test"]["label"] == [1]


def test_labels_may_be_names_and_some_may_be_missing(monkeypatch):
    features = Features({"image": datasets.Image(), "label": Value("string")})
    picture = Image.new("RGB", (8, 8))
    rows = [{"image": picture, "label": label} for label in ("wolf", "bear", None)]
    hub_like(monkeypatch, features, rows)
    skipped = Skipped()
    pictures = load_labelled("org/name", skipped=skipped)
    assert pictures.names == ["bear", "wolf"]
    assert pictures.splits["test"]["label"] == [1, 0]
    assert skipped.items == [("test row 3", "has no label")]


def test_what_cannot_be_used_is_named(tmp_path, monkeypatch, class_folder):
    with pytest.raises(ValueError, match=r"nowhere/at/all does not exist"):
        load_labelled(str(tmp_path / "nowhere/at/all"))
    with pytest.raises(ValueError, match="is a file"):
        load_labelled(class_folder / "tree" / "1.png")
    features = Features({"a": datasets.Image(), "b": datasets.Image(), "label": ClassLabel(names=["x"])})
    picture = Image.new("RGB", (8, 8))
    hub_like(monkeypatch, features, [{"a": picture, "b": picture, "label": 0}])
    with pytest.raises(ValueError, match="several columns, a, b, label; say which with --set image_column=NAME"):
        load_labelled("org/name")
    with pytest.raises(ValueError, match="has no column 'kind'; it has a, b, label"):
        load_labelled("org/name", image_column="a", label_column="kind")
