"""Views are pure functions of their seed, keep the processor's pixels, and never mirror a named side."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from clipmini.data.augment import ImageAugmentation, ImageAugmenter, names_a_side

NOTHING = {"crop_scale": 1.0, "flip": "never"}


def make_image(width=50, height=40, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def image():
    return make_image()


@pytest.fixture
def processor():
    return CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})


def augment(processor, resolution=None, **options):
    return ImageAugmenter(processor, ImageAugmentation(**{**NOTHING, **options, "resolution": resolution}))


def process(processor, image):
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("size", [(50, 40), (41, 67), (20, 20), (32, 32), (4, 100), (300, 3)])
@pytest.mark.parametrize("resample", [0, 2, 3])
def test_no_augmentation_is_exactly_the_processor(size, resample):
    image, processor = make_image(*size), CLIPImageProcessor(size={"shortest_edge": 36}, resample=resample)
    processor.crop_size = {"height": 32, "width": 32}
    assert torch.equal(augment(processor)(image, ["a"], seed=3), process(processor, image))


def test_no_augmentation_follows_a_towers_own_processor(tiny_processor, image):
    pixels = augment(tiny_processor.image_processor)(image, ["a"], seed=3)
    torch.testing.assert_close(pixels, tiny_processor(images=image)["pixel_values"][0], rtol=0, atol=1e-6)


def test_squashing_processor_is_followed_too(image):
    processor = CLIPImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    assert torch.equal(augment(processor)(image, [], 0), process(processor, image))
    assert augment(processor, resolution=16)(image, [], 0).shape == (3, 16, 16)


def test_a_resolution_scales_size_and_crop_alike(processor, image):
    smaller = CLIPImageProcessor(size={"shortest_edge": 27}, crop_size={"height": 24, "width": 24})
    assert torch.equal(augment(processor, resolution=24)(image, [], 0), process(smaller, image))


def test_flip_mirrors_the_processors_pixels(processor, image):
    plain, views = process(processor, image), [augment(processor, flip="always")(image, [], s) for s in range(40)]
    mirrored = [torch.equal(view, plain.flip(-1)) for view in views]
    assert all(is_mirrored or torch.equal(view, plain) for is_mirrored, view in zip(mirrored, views, strict=True))
    assert 8 < sum(mirrored) < 32


@pytest.mark.parametrize(
    ("flip", "captions", "flips"),
    [
        ("safe", ["a dog"], True),
        ("safe", [], True),
        ("safe", ["a dog", "a dog on the LEFT"], False),
        ("always", ["a dog on the left"], True),
        ("never", ["a dog"], False),
    ],
)
def test_flip_looks_at_every_caption(processor, image, flip, captions, flips):
    augmenter, plain = augment(processor, flip=flip), process(processor, image)
    assert any(not torch.equal(augmenter(image, captions, s), plain) for s in range(20)) == flips


def test_a_crop_shows_part_of_the_image(processor):
    # Red and green tell the column and row of each pixel, so a view says which box it shows.
    grid = np.zeros((200, 200, 3), dtype=np.uint8)
    grid[..., 0], grid[..., 1] = np.arange(200)[None, :], np.arange(200)[:, None]
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    shares = []
    for seed in range(40):
        view = augment(processor, crop_scale=0.35)(Image.fromarray(grid), [], seed)
        red, green, _ = (view * std + mean) * 255
        width, height = (c.amax() - c.amin() for c in (red, green))
        assert red[0, -1] > red[0, 0]
        assert green[-1, 0] > green[0, 0]
        shares.append((width * height / 200**2).item())
    assert 0.27 < min(shares) < 0.5  # interpolation takes half a pixel of 32 from every edge
    assert 0.7 < max(shares) < 1


def test_a_crop_is_resized_as_the_processor_resizes(processor, image, monkeypatch):
    augmenter = augment(processor, crop_scale=0.35)
    monkeypatch.setattr(augmenter.crop, "make_params", lambda _: {"left": 3, "top": 5, "width": 41, "height": 30})
    squash = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    assert torch.equal(augmenter(image, [], 0), process(squash, image.crop((3, 5, 44, 35))))


ALL = {"crop_scale": 0.3, "flip": "safe"}


def test_views_are_pure_functions_of_their_arguments(processor, image):
    one, other = augment(processor, **ALL), augment(processor, **ALL)
    torch.manual_seed(1)
    views = [one(image, ["a"], seed) for seed in range(8)]
    torch.manual_seed(2)
    for seed in reversed(range(8)):
        assert torch.equal(other(image, ["a"], seed), views[seed])
    assert len({view.numpy().tobytes() for view in views}) == 8


def test_all_bits_of_a_seed_count(processor, image):
    augmenter = augment(processor, **ALL)
    views = [augmenter(image, ["a"], seed) for seed in (1, 1 + 2**32, 1 + 2**63, -1, 2**70)]
    assert len({view.numpy().tobytes() for view in views}) == 5


def test_random_state_is_left_alone(processor, image, monkeypatch):
    def refuse(*_):
        raise AssertionError("the random state of GPUs was touched")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    before = torch.get_rng_state()
    augment(processor, **ALL)(image, ["a"], 7)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [NOTHING, ALL])
def test_result_is_a_float_tensor_of_the_crop_size(processor, image, options):
    for resolution, edge in ((None, 32), (24, 24)):
        pixels = augment(processor, resolution, **options)(image, ["a"], 0)
        assert pixels.shape == (3, edge, edge)
        assert pixels.dtype == torch.float32
        assert torch.isfinite(pixels).all()


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 1), (2, 3), (3, 300)])
def test_extreme_images_are_taken(processor, size):
    for seed in range(5):
        assert augment(processor, **ALL)(Image.new("RGB", size, "red"), ["a"], seed).shape == (3, 32, 32)


def test_a_resolution_must_be_positive(processor):
    with pytest.raises(ValueError, match="resolution=0"):
        augment(processor, resolution=0)


@pytest.mark.parametrize(
    "options",
    [
        {"crop_scale": 0.0},
        {"crop_scale": 1.1},
        {"crop_scale": float("nan")},
        {"flip": "sometimes"},
    ],
)
def test_wrong_options_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}=.*{options[name]}"):
        ImageAugmentation(**options)


def test_description_changes_with_whatever_changes_pixels(processor):
    variants = [{}, {"crop_scale": 0.5}, {"flip": "safe"}]
    descriptions = [augment(processor, **options).describe() for options in variants]
    descriptions.append(augment(processor, resolution=24).describe())
    edges = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    for options in ({"resample": 2}, {"image_mean": [0.5] * 3}, {"image_std": [0.5] * 3}, {"do_normalize": False},
                    {"size": {"shortest_edge": 32}}, {"rescale_factor": 1 / 127.5}):  # fmt: skip
        descriptions.append(augment(CLIPImageProcessor(**{**edges, **options})).describe())
    assert len(set(descriptions)) == len(descriptions)


def test_description_is_stable(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    reloaded = CLIPImageProcessor.from_pretrained(tmp_path)
    assert augment(reloaded, **ALL).describe() == augment(processor, **ALL).describe()
    assert augment(processor, 32, **ALL).describe() == augment(processor, **ALL).describe()  # same pixels
    assert "torchvision" in augment(processor).describe()


@pytest.mark.parametrize(
    "caption",
    ["a dog on the left", "Left", "RIGHT!", "left-hand side", "right-handed", "the leftmost cup", "rightmost",
     "(left)", "He left the room.", "left/right", "left_arrow", "turning leftward", "lefthand"],
)  # fmt: skip
def test_sides_are_found(caption):
    assert names_a_side(["a dog", caption])


@pytest.mark.parametrize("caption", ["", "bright", "upright", "cleft", "leftover soup", "copyright", "a fright"])
def test_other_words_are_no_sides(caption):
    assert not names_a_side([caption, "a dog"])
    assert not names_a_side([])
