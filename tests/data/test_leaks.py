import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from skimage import data

from clipmini.data import leaks
from clipmini.data.leaks import find_leaks
from clipmini.data.scan import ImageFacts


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


def test_captions_without_a_word_are_not_the_same_words(toy_pairs, photographs):
    train = pairs_of(toy_pairs, [encode(photographs[0])], [["...", "a man"]])
    held_out = pairs_of(toy_pairs, [encode(photographs[1])], [["!", "", "A man."]])
    assert find_leaks(train, held_out).captions == [2]


def test_images_without_captions_are_compared(toy_pairs):
    images = toy_pairs.select_columns(["image"])
    report = find_leaks(images, images)
    assert (report.exact, report.near_duplicates, report.captions) == (list(range(len(images))), [], [])
    assert find_leaks(images, toy_pairs).captions == []


@pytest.mark.parametrize(("num_bits", "is_near"), [(0, True), (1, True), (3, True), (4, True), (5, False), (8, False)])
def test_a_look_that_differs_in_up_to_four_bits_is_a_near_copy(num_bits, is_near, monkeypatch, toy_pairs):
    train_hash = np.arange(64) % 3 == 0
    hash_of_copy = train_hash.copy()
    hash_of_copy[np.linspace(0, 63, num_bits, dtype=int)] ^= True  # far apart: every piece of the hash may differ
    pixels = np.arange(32, dtype=np.uint8).reshape(2, 16)
    facts = iter(ImageFacts([], [], pixels[[row]], bits[None]) for row, bits in enumerate((train_hash, hash_of_copy)))
    monkeypatch.setattr(leaks, "scan_readable", lambda rows: next(facts))
    images = toy_pairs.select_columns(["image"])
    report = find_leaks(images.select([0]), images.select([1]))
    assert report.exact == []
    assert report.near_duplicates == [(0, 0)] * is_near
    assert report.rows == [0] * is_near


@pytest.mark.parametrize("seed", range(20))
def test_looks_are_compared_as_each_with_each(seed, monkeypatch, toy_pairs):
    """Exact: copies, looks at every distance to 8 bits, equally near ones, and clusters of alike looks."""
    draw = np.random.default_rng(seed)
    centers = draw.random((draw.integers(1, 5), 64)) < draw.choice([0.02, 0.5])

    def draw_facts(num_images):
        hashes = centers[draw.integers(0, len(centers), num_images)]
        flips = draw.random((num_images, 64)).argsort(axis=1) < draw.integers(0, 9, (num_images, 1))
        pixels = np.zeros((num_images, 16), np.uint8)
        pixels[:, 0] = draw.integers(0, 200, num_images)
        return ImageFacts([], [], pixels, hashes ^ flips)

    train, held_out = draw_facts(200), draw_facts(50)
    facts = {200: train, 50: held_out}
    monkeypatch.setattr(leaks, "scan_readable", lambda rows: facts[len(rows)])
    images = toy_pairs.select_columns(["image"])
    report = find_leaks(images.select([0] * 200), images.select([0] * 50))

    seen = {pixels.tobytes() for pixels in train.pixels}
    exact = [row for row, pixels in enumerate(held_out.pixels) if pixels.tobytes() in seen]
    near = []
    for row in set(range(50)) - set(exact):
        bits = (train.perceptual_hashes != held_out.perceptual_hashes[row]).sum(axis=1)
        if bits.min() <= 4:
            near.append((bits.min(), row, int(bits.argmin())))
    assert report.exact == exact
    assert report.near_duplicates == [(row, train_row) for _, row, train_row in sorted(near)]
