import numpy as np
import pytest
import timm
import torch
from PIL import Image
from skimage import data
from transformers import AutoImageProcessor, AutoTokenizer, CLIPImageProcessor, TimmWrapperConfig

from clipmini.training.build import character_tokenizer
from modeling_clipmini import ClipMiniProcessor
from modeling_clipmini.processing_clipmini import image_processor_for

BASE_CFG = {"input_size": (3, 224, 224), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25), "interpolation": "bicubic"}


def photograph(name, width, height):
    """The middle of a real photograph, cut to an aspect ratio."""
    image = Image.fromarray(getattr(data, name)())
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def make_config(**options):
    return TimmWrapperConfig.from_dict(
        {"architecture": "resnet18", "num_classes": 0, "label_names": [], "pretrained_cfg": {**BASE_CFG, **options}}
    )


def timm_transform(vision_config):
    return timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=vision_config.pretrained_cfg))


def timm_pixels(image, vision_config):
    """timm's own pixels; where an odd number of pixels is cut off, the extra one at the right and at the bottom.

    That is where stock image processors cut. torchvision rounds the half to the nearest even number: for 11 pixels it
    cuts 6 at the left, for 9 it cuts 4. Elsewhere the two are the same, and this function is timm's transform.
    """
    resize, crop, *rest = timm_transform(vision_config).transforms
    image = resize(image)
    height, width = crop.size
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = image.crop((left, top, left + width, top + height))
    for step in rest:
        pixels = step(pixels)
    if (image.width - width) % 4 != 3 and (image.height - height) % 4 != 3:
        assert torch.equal(pixels, rest[-1](rest[0](crop(image))))
    return pixels


def greatest_difference(image, vision_config, expected):
    """Largest difference of a pixel, in steps of 1/255."""
    pixels = image_processor_for(vision_config)(images=[image], return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == expected.shape
    std = torch.tensor(vision_config.pretrained_cfg["std"])[:, None, None]
    return ((pixels - expected) * std).abs().max().item() * 255


PHOTOGRAPHS = [
    ("astronaut", 512, 512),
    ("chelsea", 451, 300),
    ("chelsea", 448, 150),
    ("coffee", 600, 400),
    ("coffee", 200, 400),
    ("coffee", 300, 399),
    ("rocket", 600, 427),
    ("rocket", 300, 400),
]


@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("name", "width", "height"), PHOTOGRAPHS)
def test_pixels_are_timms(name, width, height, interpolation, crop_pct):
    image, config = photograph(name, width, height), make_config(interpolation=interpolation, crop_pct=crop_pct)
    # Pillow and torchvision round bicubic overshoot apart by one step more when they enlarge.
    steps = 2 if interpolation == "bicubic" and min(width, height) < 224 / crop_pct else 1
    assert greatest_difference(image, config, timm_pixels(image, config)) <= steps + 1e-3


def test_most_images_need_no_allowance_for_the_crop():
    image, config = photograph("astronaut", 512, 384), make_config(crop_pct=0.875)
    assert greatest_difference(image, config, timm_transform(config)(image)) <= 1.001


@pytest.mark.parametrize("input_size", [(3, 224, 224), (3, 128, 192)])
def test_squash_resizes_both_edges(input_size):
    image = photograph("coffee", 500, 300)
    config = make_config(crop_mode="squash", crop_pct=1.0, input_size=input_size)
    assert greatest_difference(image, config, timm_transform(config)(image)) <= 1.001


def test_without_a_pretrained_cfg_timms_default_holds():
    config = TimmWrapperConfig(architecture="tf_efficientnet_lite0")
    processor = image_processor_for(config)
    assert (*processor.image_mean, *processor.image_std) == (0.5,) * 6
    assert dict(processor.size) == {"shortest_edge": 256}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": (3, 256, 128)}, "keeps the aspect ratio"),
        ({"crop_mode": "border"}, "crop_mode='border'"),
        ({"interpolation": "random"}, "'random'"),
    ],
)
def test_what_has_no_stock_equivalent_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        image_processor_for(make_config(**options))


def test_saves_and_loads_with_stock_classes(tiny_processor, tmp_path):
    tiny_processor.save_pretrained(tmp_path)
    loaded = ClipMiniProcessor.from_pretrained(tmp_path)
    image_processor = AutoImageProcessor.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(image_processor, CLIPImageProcessor)
    assert tokenizer.model_max_length == loaded.tokenizer.model_max_length == 64
    image = photograph("chelsea", 300, 280)
    expected = tiny_processor(images=[image], text=["a cat!"])
    again = loaded(images=[image], text=["a cat!"])
    assert set(again) == set(expected) == {"pixel_values", "input_ids", "attention_mask"}
    assert torch.equal(again["pixel_values"], expected["pixel_values"])
    assert torch.equal(again["input_ids"], expected["input_ids"])
    assert torch.equal(image_processor(images=[image], return_tensors="pt")["pixel_values"], expected["pixel_values"])


def test_captions_are_padded_and_cut(tiny_processor):
    batch = tiny_processor(text=["ab", "word " * 1000])
    assert batch["input_ids"].shape == (2, 64)
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 64]


def test_a_tokenizer_without_a_limit_gets_the_towers(tiny_config):
    tokenizer = character_tokenizer()
    assert tokenizer.model_max_length > 1e29
    assert ClipMiniProcessor.from_towers(tiny_config(), tokenizer).tokenizer.model_max_length == 64


def test_transparent_images_lie_on_white(tiny_processor):
    image = Image.new("RGBA", (50, 50), (255, 0, 0, 0))
    white = Image.new("RGB", (50, 50), "white")
    for given in (image, [image]):
        pixels = tiny_processor(images=given)["pixel_values"]
        assert torch.equal(pixels, tiny_processor(images=[white])["pixel_values"])


def test_arrays_are_taken_too(tiny_processor):
    array = np.full((40, 40, 3), 128, dtype=np.uint8)
    expected = tiny_processor(images=[Image.fromarray(array)])["pixel_values"]
    assert torch.equal(tiny_processor(images=[array])["pixel_values"], expected)
