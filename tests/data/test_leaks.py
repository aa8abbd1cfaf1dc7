import io

import pytest
from PIL import Image, ImageEnhance
from skimage import data

from clipmini.data.leaks import find_leaks


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def photographs():
    return [
        Image.fromarray(photo()).convert("RGB") for photo in (data.astronaut, data.coffee, data.chelsea, data.rocket)
    ]


def pairs_of(toy_pairs, images, captions):
    rows = [
        {"image": image, "captions": texts, "image_id": number}
        for number, (image, texts) in enumerate(zip(images, captions, strict=True))
    ]
    return type(toy_pairs).from_list(rows, features=toy_pairs.features)


def test_exact_copies_and_near_duplicates_are_told_apart(toy_pairs, photographs):
    astronaut, coffee, cat, rocket = photographs
    train = pairs_of(toy_pairs, [encode(astronaut), encode(coffee)], [["An astronaut."], ["a cup", "Some coffee!"]])
    held_out = pairs_of(
        toy_pairs,
        [
            encode(cat),
            encode(astronaut, "BMP"),
            encode(coffee.resize((300, 200)), "JPEG", quality=60),
            encode(ImageEnhance.Brightness(astronaut).enhance(1.1), "JPEG"),
            encode(rocket),
        ],
        [["a cat"], ["an  ASTRONAUT"], ["coffee"], ["a woman", "a cup"], ["a rocket"]],
    )
    report = find_leaks(train, held_out)
    assert report.num_train_images == 2
    assert report.exact == [1]
    assert report.rows == [1, 2, 3]
    assert dict(report.near_duplicates) == {2: 1, 3: 0}
    assert report.captions == [1, 4]


def test_no_leak_without_shared_images(toy_pairs, photographs):
    train = pairs_of(toy_pairs, [encode(photographs[0])], [["an astronaut"]])
    report = find_leaks(train, pairs_of(toy_pairs, [encode(photographs[1])], [["coffee"]]))
    assert (report.rows, report.captions) == ([], [])
    assert find_leaks(train.select([]), train).rows == []
