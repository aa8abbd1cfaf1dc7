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


def test_split_folders_beside_another_folder_are_refused(class_folder):
    (class_folder / "train" / "tree").mkdir(parents=True)
    for file in (class_folder / "tree").iterdir():
        file.rename(class_folder / "train" / "tree" / file.name)
    (class_folder / "tree").rmdir()
    (class_folder / "sea").rename(class_folder / "train" / "sea")
    (class_folder / "red_fox").rename(class_folder / "test")  # unlabeled images
    with pytest.raises(ValueError, match=r"splits, which are no classes: .* Not so test; make"):
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
    with pytest.raises(ValueError, match="several classes of one name, red fox, red_fox; rename or join"):
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


def build(root, *names):
    """Write an image for each name."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name)
    return root


def test_splits_that_hold_images_are_no_classes(tmp_path):
    for test in ("test", "test1", "dev", "testing_data"):  # as Kaggle's cats and dogs
        root = build(tmp_path / f"with {test}", "train/cat.0.jpg", "train/dog.0.jpg", f"{test}/1.jpg")
        names = ", ".join(sorted((test, "train")))
        with pytest.raises(ValueError, match=rf"splits, which are no classes: .* Not so {names}; make"):
            load_labeled(root)
    with pytest.raises(ValueError, match="Not so train; make these folders"):
        load_labeled(build(tmp_path / "one", "train/cat.0.jpg", "train/dog.0.jpg"))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training_set/training_set", "test_set/test_set"),
        ("seg_train", "seg_test"),
        ("Train", "val2017"),
        ("train", ""),
    ],
)
def test_splits_as_people_name_them(tmp_path, train, test):
    names = [f"{split}/{name}/1.jpg" for split in (train, test) if split for name in ("buildings", "sea")]
    images = load_labeled(build(tmp_path, *names))
    assert images.names == ["buildings", "sea"]
    second = {"": None, "val2017": "validation"}.get(test, "test")
    assert {split: len(rows) for split, rows in images.splits.items()} == dict.fromkeys(
        filter(None, ("train", second)), 2
    )


def test_classes_that_only_begin_like_splits(tmp_path, caplog):
    names = ("train_station/1.jpg", "test_tube/1.jpg", "freight_train/1.jpg", "train/1.jpg")
    assert load_labeled(build(tmp_path, *names)).names == ["freight train", "test tube", "train", "train station"]
    assert "took freight_train, train for classes, although they are named like splits" in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        ("images/cat/1.jpg", "images/dog/1.jpg"),
        ("data/train/cat/1.jpg", "data/train/dog/1.jpg", "data/val/dog/1.jpg"),
        ("cat/train/1.jpg", "cat/test/1.jpg", "dog/train/1.jpg", "dog/test/1.jpg"),
        ("real/cat/1.jpg", "sketch/cat/1.jpg"),
    ],
)
def test_folders_of_the_wrong_depth_are_refused(tmp_path, names):
    outer, inner = min(names).split("/")[:2]
    with pytest.raises(ValueError, match=rf"{outer} would be a class, but has no image, .* as in {inner}\. If"):
        load_labeled(build(tmp_path, *names))


def test_one_class_is_enough_where_it_has_images(tmp_path):
    assert load_labeled(build(tmp_path, "sea/1.jpg", "sea/winter/1.jpg")).names == ["sea"]


def test_what_is_left_out_is_named(tmp_path, caplog):
    root = build(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "train/loose.jpg", "sample.png")
    (root / "train" / "bird").mkdir()
    (root / "labels").mkdir()
    (root / "labels" / "a.txt").write_text("")
    assert load_labeled(root).names == ["cat", "dog"]
    assert "left out 4 images and folders that belong to no class: " in caplog.text
    for name in ("bird", "labels", "loose.jpg", "sample.png"):
        assert name in caplog.text


def test_folders_that_systems_make_are_no_classes(tmp_path, caplog):
    images = load_labeled(
        build(tmp_path, "cat/1.jpg", "dog/1.jpg", "@eaDir/1.jpg", "__MACOSX/cat/1.jpg", ".trash/1.jpg")
    )
    assert images.names == ["cat", "dog"]
    assert "left out 2 images and folders that belong to no class: " in caplog.text


def test_linked_folders_are_classes(tmp_path):
    store = build(tmp_path / "store", "x/1.jpg", "y/1.jpg")
    root = build(tmp_path / "classes", "cat/1.jpg")
    (root / "dog").symlink_to(store / "x", target_is_directory=True)
    (root / "emu").symlink_to(store / "y", target_is_directory=True)
    assert load_labeled(root).names == ["cat", "dog", "emu"]


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (("001.Black_footed_Albatross", "002.Laysan_Albatross"), ["Black footed Albatross", "Laysan Albatross"]),
        (("n02085620-Chihuahua", "n02085782-Japanese_spaniel"), ["Chihuahua", "Japanese spaniel"]),
        (("Apple___Apple_scab", "Tomato___healthy"), ["Apple Apple scab", "Tomato healthy"]),
    ],
)
def test_names_are_cleaned_and_shown(tmp_path, caplog, folders, words):
    assert load_labeled(build(tmp_path, *(f"{folder}/1.jpg" for folder in folders))).names == words
    assert f"2 of 2 classes have another name: {folders[0]} is {words[0]}, {folders[1]} is {words[1]}" in caplog.text


def test_a_number_that_means_something_stays(tmp_path, caplog):
    root = build(tmp_path / "all", "2_door_sedan/1.jpg", "4_poster/1.jpg", "van/1.jpg", "737/1.jpg")
    assert load_labeled(root).names == ["2 door sedan", "4 poster", "737", "van"]
    assert "1 of 4 class names are codes, which say nothing to a model: 737; set class_names" in caplog.text
    assert load_labeled(build(tmp_path / "doors", "2_door/1.jpg", "4_door/1.jpg")).names == ["2 door", "4 door"]


@pytest.mark.parametrize(
    "folders", [("n01440764", "n01443537"), ("0", "1"), ("class_17", "class_18"), ("c0001", "C2")]
)
def test_codes_are_warned_of(tmp_path, caplog, folders):
    load_labeled(build(tmp_path, *(f"{folder}/1.jpg" for folder in folders)))
    assert "2 of 2 class names are codes" in caplog.text


FILES = {
    "LOC_synset_mapping.txt": "n01440764 tench, Tinca tinca\nn01443537 goldfish\n",
    "words.txt": "n01440764\ttench, Tinca tinca\nn01443537\tgoldfish\n",
    "class_index.json": '{"0": ["n01440764", "tench,_Tinca tinca"], "1": ["n01443537", "goldfish"]}',
    "names.json": '\ufeff{"n01440764": "tench, Tinca tinca", "n01443537": "goldfish", "n3": "more"}',
    "names.csv": 'folder,name\r\nn01440764,"tench, Tinca tinca"\r\nn01443537,goldfish\r\n',
    "excel.csv": "n01440764;tench, Tinca tinca\n\nn01443537;goldfish\n",
}


@pytest.mark.parametrize("file", FILES)
def test_class_names_come_from_a_file(tmp_path, caplog, file):
    (tmp_path / file).write_text(FILES[file], encoding="utf-8")
    root = build(tmp_path / "images", "n01440764/1.jpg", "n01443537/1.jpg")
    assert load_labeled(root, class_names=tmp_path / file).names == ["tench, Tinca tinca", "goldfish"]
    assert "n01443537 is goldfish" in caplog.text
    assert "codes" not in caplog.text


def test_classes_of_one_name_in_a_file_are_told_apart(tmp_path, caplog):
    """Two of ImageNet's classes are a crane: a bird, and a machine."""
    lines = ["n02012849 crane", "n03126707 crane", "n02018207 American coot, marsh hen"]
    (tmp_path / "LOC_synset_mapping.txt").write_text("\n".join(lines))
    root = build(tmp_path / "images", *(f"train/{line.split()[0]}/1.jpg" for line in lines))
    images = load_labeled(root, class_names=tmp_path / "LOC_synset_mapping.txt")
    assert images.names == ["crane (n02012849)", "American coot, marsh hen", "crane (n03126707)"]
    assert "told apart 2 classes of one name by their own in brackets: n02012849, n03126707" in caplog.text


def test_class_names_come_from_a_mapping(tmp_path, monkeypatch):
    root = build(tmp_path / "images", "0/1.jpg", "1/1.jpg")
    assert load_labeled(root, class_names={"0": "a", 1: "b"}).names == ["a", "b"]
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["n1", "n2"])})
    hub_like(monkeypatch, features, [{"image": Image.new("RGB", (8, 8)), "label": 1}])
    assert load_labeled("org/name", class_names={"n1": "a", "n2": "b"}).names == ["a", "b"]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("a.json", '{"n1": "a"}', "no name to 1 of 2 classes in .*: n2; it names n1"),
        ("a.json", '{"n1": "a", "n2": " "}', "no name to 1 of 2 classes in .*: n2"),
        ("a.json", '{"sea": 0, "tree": 1}', r"a.json has \['sea', 0\], which is no class and its name; write a line"),
        ("a.json", '{"n1": ["a", "b"]}', "no name to 2 of 2 classes in .*: n1, n2; it names a"),
        ("a.json", '{"0": []}', "which is no class and its name"),
        ("a.json", '["a", "b"]', "cannot be read"),
        ("a.json", "{", "cannot be read"),
        ("a.csv", "n1,tench,Tinca\n", "which is no class and its name"),
        ("a.csv", 'n1,"tench\n', "cannot be read"),
        ("a.txt", "tench\n", "which is no class and its name"),
        ("gone.txt", None, r"gone.txt cannot be read \(No such file or directory\)"),
    ],
)
def test_class_names_that_cannot_be_used(tmp_path, file, content, words):
    root = build(tmp_path / "images", "n1/1.jpg", "n2/1.jpg")
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        load_labeled(root, class_names=tmp_path / file)
    assert len(str(caught.value)) < 400
