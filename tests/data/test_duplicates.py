"""Copies are found by their pixels and words, exactly; sharing ids changes ids and nothing else."""

import io
import itertools
import json
import unicodedata
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clipmini.data import duplicates
from clipmini.data.duplicates import find_duplicates, normalize_caption
from clipmini.data.scan import ImageFacts
from modeling_clipmini.images_clipmini import ImageError


def encode(color, size=(8, 6), note=None, suffix="PNG"):
    file, info = io.BytesIO(), PngInfo()
    if note:
        info.add_text("note", note)
    options = {"pnginfo": info} if suffix == "PNG" else {}
    Image.new("RGB", size, color).save(file, suffix, **options)
    return file.getvalue()


def make_pairs(*rows):
    """Rows are (image_id, encoded image or path, captions)."""
    features = Features(
        {"image": ImageFeature(decode=False), "captions": List(Value("string")), "image_id": Value("int64")}
    )
    columns = {
        "image": [{"bytes": None, "path": str(data)} if not isinstance(data, bytes) else {"bytes": data, "path": None}
                  for _, data, _ in rows],
        "captions": [captions for _, _, captions in rows],
        "image_id": [image_id for image_id, _, _ in rows],
    }  # fmt: skip
    return Dataset.from_dict(columns, features=features)


@pytest.fixture
def pairs():
    """1, 4 and 7 are the same red; 2 and 5 the same blue; 4, 5 and 3 share a caption."""
    return DatasetDict(
        train=make_pairs(
            (1, encode("red"), ["red one"]),
            (2, encode("blue"), ["blue one"]),
            (4, encode("red", note="other metadata"), ["A cat!", "red four"]),
            (5, encode("blue"), ["a  cat"]),
            (6, encode("green"), ["unlike"]),
        ),
        test=make_pairs(
            (7, encode("red", suffix="BMP"), ["red seven"]),
            (3, encode("yellow"), ["a cat", "A CAT."]),
        ),
    )


def test_all_groups_are_found(pairs):
    report = find_duplicates(pairs)
    assert report.num_images == 7
    assert report.images == [[1, 4, 7], [2, 5]]
    assert report.within == {"train": 2}
    assert report.across == {("train", "test"): 1}
    assert report.captions == {"a cat": [3, 4, 5]}


def test_one_split_alone(pairs):
    report = find_duplicates(pairs["train"])
    assert report.images == [[1, 4], [2, 5]]
    assert list(report.within.values()) == [2]
    assert report.across == {}


def test_files_are_read(tmp_path):
    for name in ("one.png", "other.png"):
        (tmp_path / name).write_bytes(encode("red"))
    report = find_duplicates(make_pairs((0, tmp_path / "one.png", ["a"]), (1, tmp_path / "other.png", ["b"])))
    assert report.images == [[0, 1]]


def test_same_pixels_in_another_shape_are_another_image():
    report = find_duplicates(make_pairs((0, encode("red", (8, 6)), ["a"]), (1, encode("red", (6, 8)), ["b"])))
    assert report.images == []


def test_nearly_the_same_is_not_the_same():
    report = find_duplicates(make_pairs((0, encode((9, 9, 9)), ["a b"]), (1, encode((9, 9, 8)), ["ab"])))
    assert (report.images, report.captions) == ([], {})
    assert report.summary() == (
        "Images under more than one image id: 0 (0 of 2 ids). Captions of different images: 0 (0 ids)."
    )


def test_captions_of_one_image_are_no_duplicates():
    rows = [(0, encode("red"), ["a dog", "A dog."]), (1, encode("red"), ["a dog"]), (2, encode("blue"), ["...", "!"]),
            (3, encode("green"), ["!?"])]  # fmt: skip
    assert find_duplicates(make_pairs(*rows)).captions == {}


def test_an_unreadable_image_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"gone\.png.*does not exist"):
        find_duplicates(make_pairs((0, tmp_path / "gone.png", ["a"])))
    with pytest.raises(ImageError, match="image_id 5"):
        find_duplicates(make_pairs((5, b"no image", ["a"])))


def test_an_empty_split_is_no_trouble(pairs):
    pairs["validation"] = pairs["train"].select([])
    assert find_duplicates(pairs).num_images == 7


@pytest.mark.parametrize(
    ("caption", "normalized"),
    [
        ("A dog , and a cat .", "a dog and a cat"),
        ("\tA  DOG,and a\u00a0cat!", "a dog and a cat"),
        ("black-and-white", "black and white"),
        ("Straße", "strasse"),
        ("ﬁve \uff12 dogs", "five 2 dogs"),
        ("cafe\u0301", "café"),
        ("हिन्दी।", "हिन्दी"),
        ("«…»", ""),
        ("3 + 4", "3 + 4"),
    ],
)
def test_normalized_captions(caption, normalized):
    assert normalize_caption(caption) == normalized
    assert normalize_caption(normalized) == normalized


def test_report_in_words_and_json(pairs):
    report = find_duplicates(pairs)
    assert report.summary() == (
        "Images under more than one image id: 2 (5 of 7 ids; 1 in both train and test, where copies inflate the "
        "metrics). Captions of different images: 1 (3 ids)."
    )
    assert json.loads(json.dumps(report.as_dict())) == {
        "num_images": 7,
        "images": {"num_groups": 2, "num_images": 5, "examples": [[1, 4, 7], [2, 5]]},
        "within": {"train": 2},
        "across": {"train+test": 1},
        "captions": {"num_groups": 1, "num_images": 3, "examples": [{"caption": "a cat", "image_ids": [3, 4, 5]}]},
    }


def test_json_has_only_a_few_examples():
    data = encode("red")
    report = find_duplicates(make_pairs(*[(number, data, ["a"]) for number in range(30)]))
    assert report.as_dict()["images"] == {"num_groups": 1, "num_images": 30, "examples": [[0, 1, 2, 3, 4]]}


def test_all_images_of_an_id_are_compared():
    joined = DatasetDict(
        train=make_pairs((1, encode("red"), ["a"]), (1, encode("blue"), ["b"])),
        test=make_pairs((9, encode("red"), ["c"])),
    )
    assert find_duplicates(joined).images == [[1, 9]]


def find_one_by_one(splits, pixels):
    """What `find_duplicates` finds, with a Python object for each row."""
    ids_of_image, ids_of_caption, split_of, image_of = {}, {}, {}, {}
    for split, rows in splits.items():
        for row, image in zip(rows, pixels[split], strict=True):
            image_id = row["image_id"]
            ids_of_image.setdefault(image.tobytes(), set()).add(image_id)
            image_of[image_id], split_of[image_id] = image.tobytes(), split
            for caption in filter(None, map(normalize_caption, row["captions"])):
                ids_of_caption.setdefault(caption, set()).add(image_id)
    groups = sorted(sorted(ids) for ids in ids_of_image.values() if len(ids) > 1)
    within, across = Counter(), Counter()
    for ids in groups:
        counts = Counter(split_of[image_id] for image_id in ids)
        within.update(split for split, count in counts.items() if count > 1)
        across.update(itertools.combinations([split for split in splits if split in counts], 2))
    shared = {
        caption: sorted(ids)
        for caption, ids in sorted(ids_of_caption.items())
        if len({image_of[image_id] for image_id in ids}) > 1
    }
    return duplicates.DuplicateReport(len(image_of), groups, dict(within), dict(across), shared)


@pytest.mark.parametrize("seed", range(20))
def test_columns_give_what_rows_one_by_one_give(seed, monkeypatch):
    draw = np.random.default_rng(seed)
    num_words = draw.integers(1, 200)
    splits, pixels = DatasetDict(), {}
    for split in ("train", "validation", "test"):
        num_rows = int(draw.integers(0, 2500 if seed == 0 else 60))
        words = [["!", "A  dog,", "\u00e9t\u00e9", "e\u0301t"][word] if word < 4 else f"Word {word}"
                 for word in draw.integers(0, num_words, num_rows * 3)]  # fmt: skip
        rows = [
            (int(image_id), b"", words[row * 3 : row * 3 + int(draw.integers(1, 4))])
            for row, image_id in enumerate(draw.integers(-5, 100, num_rows))
        ]
        order = draw.permutation(num_rows)
        splits[split] = make_pairs(*rows).select(order)
        # Digests that end in zeros, or are all zeros, are digests like others.
        pixels[split] = draw.integers(0, 3, (num_rows, 16), dtype=np.uint8) * (np.arange(16) == draw.integers(16))
    facts = iter([ImageFacts([], [], pixels[split], np.empty(0)) for split in splits])
    monkeypatch.setattr(duplicates, "scan_readable", lambda rows: next(facts))
    report = find_duplicates(splits)
    assert report == find_one_by_one(splits, pixels)
    assert json.dumps(report.as_dict()) == json.dumps(find_one_by_one(splits, pixels).as_dict())


def test_captions_of_every_script_are_normalized_letter_by_letter():
    def one_by_one(caption):
        folded = unicodedata.normalize("NFKC", caption).casefold()
        spaced = (" " if unicodedata.category(letter)[0] == "P" else letter for letter in folded)
        return " ".join("".join(spaced).split())

    letters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(letters), 97):
        caption = "".join(letters[start : start + 97])
        assert normalize_caption(caption) == one_by_one(caption)
