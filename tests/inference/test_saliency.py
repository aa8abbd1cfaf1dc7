"""Where the model looked: which place of a map is brightest, and that it is drawn where the model saw it."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from clipmini.inference.embed import DualEncoder
from clipmini.inference.saliency import COLORS, OPACITY, SHADE, compare_places, draw_places, find_crop
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.modeling_clipmini import normalize

TOWERS = ["test_resnet", "test_vit", "test_vit_relpos", "test_convnext", "test_mambaout"]
TOWERS = [name for name in TOWERS if timm.is_model(name)]  # older versions of timm lack some


@pytest.fixture
def image():
    rows, columns = np.mgrid[0:200, 0:300]
    return Image.fromarray(np.stack([rows, columns // 2, 128 + rows // 2], axis=-1).astype(np.uint8))


class TestComparePlaces:
    def test_the_place_that_equals_the_text_is_the_brightest(self, tiny_model, image, monkeypatch):
        tower = tiny_model.vision_model.timm_model
        known = torch.randn(1, tower.num_features, 2, 3, generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(tower, "forward_features", lambda pixel_values: known)
        text = normalize(tiny_model.get_image_features(pooled_image=known[:, :, 1, 2]).pooler_output)[0].detach()
        similarities = compare_places(DualEncoder(tiny_model), image, text)
        assert similarities.shape == (2, 3)
        assert similarities[1, 2].item() == pytest.approx(1, abs=1e-6)
        assert similarities.argmax() == 5

    @pytest.mark.parametrize(
        "towers", [*([tower] for tower in TOWERS), ["test_resnet", "test_convnext"], ["test_resnet", "test_vit"]]
    )
    @pytest.mark.parametrize("levels", [None, [0, 1]])
    def test_towers(self, tiny_config, tiny_processor, image, towers, levels):
        """Maps with channels first or last, tokens with a class token or none, and two towers, also of unlike maps."""
        torch.manual_seed(0)
        configs = zip(("vision_config", "side_vision_config"), towers, strict=False)
        options = {field: {"architecture": tower} for field, tower in configs}
        config = tiny_config(**options, vision_levels=levels)
        model = ClipMiniModel(config).eval()
        model.processor = ClipMiniProcessor.from_towers(config, tiny_processor.tokenizer)
        encoder = DualEncoder(model)
        own = encoder.encode_images([image])[0]
        similarities = compare_places(encoder, image, own)
        height, width = similarities.shape
        assert height == width > 1
        assert similarities.isfinite().all()
        assert similarities.abs().max() <= 1.00001
        assert similarities.std() > 0

    def test_models_without_a_map(self, tiny_model, image, monkeypatch):
        encoder = DualEncoder(tiny_model)
        encoder.model = torch.nn.Identity()
        with pytest.raises(ValueError, match="it is no clipmini model"):
            compare_places(encoder, image, torch.ones(16))
        tower = tiny_model.vision_model.timm_model
        monkeypatch.setattr(tower, "forward_features", lambda pixel_values: [torch.zeros(1, 4, 8)])
        with pytest.raises(ValueError, match="returns no map"):
            compare_places(DualEncoder(tiny_model), image, torch.ones(16))


def make_processor(size, crop):
    return SimpleNamespace(size=size, crop_size={"height": crop, "width": crop})


class TestFindCrop:
    def test_by_hand(self):
        assert find_crop(make_processor({"shortest_edge": 256}, 224), 100, 200) == (6.25, 56.25, 93.75, 143.75)
        assert find_crop(make_processor({"shortest_edge": 224}, 224), 300, 200) == pytest.approx((50, 0, 250, 200))
        assert find_crop(make_processor({"height": 50, "width": 100}, 50), 300, 200) == (75, 0, 225, 200)

    def test_it_is_what_the_model_is_shown(self, tiny_processor, image):
        processor = tiny_processor.image_processor
        seen = tiny_processor(images=[image])["pixel_values"][0]
        mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        crop = image.resize(tuple(seen.shape[1:]), Image.Resampling.BICUBIC, box=find_crop(processor, *image.size))
        expected = torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255
        assert (seen * std + mean - expected).abs().max() < 0.02


def test_draw_places():
    """Left and right quarter are not seen; of the middle, the right half is like the text."""
    image = Image.new("RGB", (40, 20), (200, 100, 40))
    drawn = np.asarray(draw_places(image, torch.tensor([[-0.1, 0.3]]), (10, 0, 30, 20)))
    assert drawn.shape == (20, 40, 3)
    shaded = [int(value * SHADE) for value in (200, 100, 40)]
    assert (drawn[:, :10] == shaded).all()
    assert (drawn[:, 30:] == shaded).all()
    for column, color in ((10, COLORS(0)), (29, COLORS(255))):
        expected = (1 - OPACITY) * np.array([200, 100, 40]) + OPACITY * 255 * np.array(color[:3])
        assert np.abs(drawn[10, column] - expected).max() < 3


def test_draw_places_that_are_all_alike():
    image = Image.new("RGB", (8, 8), "white")
    assert draw_places(image, torch.full((2, 2), 0.5), (0, 0, 8, 8)).size == (8, 8)
