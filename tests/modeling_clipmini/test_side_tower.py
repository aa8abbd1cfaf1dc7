"""A second vision tower beside the first."""

import json

import pytest
import torch

from modeling_clipmini import ClipMiniModel, ClipMiniTextModel, ClipMiniVisionModel
from modeling_clipmini.modeling_clipmini import join_levels

PIXELS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SIDE = {"architecture": "test_convnext"}


@pytest.fixture
def build(tiny_config):
    def make(**options):
        torch.manual_seed(0)
        return ClipMiniModel(tiny_config(**{"side_vision_config": SIDE, **options})).eval()

    return make


def test_its_output_follows_that_of_the_first_tower(build):
    model = build()
    towers = model.vision_towers()
    expected = [join_levels([tower.timm_model(PIXELS)]) for tower in towers]
    features = model.pool_images(PIXELS)
    assert features.shape == (2, model.config.vision_embed_dim)
    torch.testing.assert_close(features, torch.cat(expected, dim=1))
    torch.testing.assert_close(model.pool_side(PIXELS), expected[1])
    assert model.side_width == expected[1].shape[1]


def test_levels_are_taken_from_both_towers(build):
    model = build(vision_levels=[0, 2])
    alone = [ClipMiniModel(type(model.config)(**options)) for options in _alone(model)]
    for whole, tower in zip(alone, model.vision_towers(), strict=True):
        whole.vision_model.timm_model.load_state_dict(tower.timm_model.state_dict())
    torch.testing.assert_close(
        model.pool_images(PIXELS), torch.cat([whole.eval().pool_images(PIXELS) for whole in alone], dim=1)
    )


def _alone(model):
    """The options of a model with each of the towers alone."""
    for config in (model.config.vision_config, model.config.side_vision_config):
        yield {
            "vision_config": config,
            "text_config": model.config.text_config,
            "vision_levels": model.config.vision_levels,
        }


def test_known_features_of_the_side_tower_are_used(build):
    model = build()
    given = torch.zeros(2, model.side_width)
    features = model.pool_images(PIXELS, given)
    assert torch.equal(features[:, -model.side_width :], given)
    assert torch.equal(features[:, : -model.side_width], model.pool_images(PIXELS)[:, : -model.side_width])


def test_a_saved_model_gives_the_same_embeddings_whole_and_by_halves(build, tmp_path):
    model = build(vision_levels=[1])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["side_vision_config"]["architecture"] == "test_convnext"
    expected = model.get_image_features(PIXELS).pooler_output
    for cls in (ClipMiniModel, ClipMiniVisionModel):
        loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        torch.testing.assert_close(loaded.get_image_features(PIXELS).pooler_output, expected)
        assert not any(info.values())
    assert not any(ClipMiniTextModel.from_pretrained(tmp_path, output_loading_info=True)[1].values())


def test_both_towers_learn_and_are_frozen_together(build):
    model = build()
    model.train().get_image_features(PIXELS).pooler_output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.vision_model.parameters())
    model.freeze_vision_tower()
    assert not any(parameter.requires_grad for parameter in model.vision_model.parameters())
    assert not any(module.training for module in model.vision_model.modules())


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (
            "test_efficientnet",
            r"efficientnet cannot stand beside test_resnet.* image_mean is \(0.485, .* not \(0.5",
        ),
        ("vit_tiny_patch16_224", r"vit_tiny.* crop_size is .*224.*, not .*160"),
    ],
)
def test_towers_that_need_other_pixels_are_refused(build, side, message):
    with pytest.raises(ValueError, match=message):
        build(side_vision_config={"architecture": side})


def test_a_path_in_its_config_is_dropped_and_arguments_that_name_files_are_refused(tiny_config, tmp_path):
    config = tiny_config(side_vision_config={**SIDE, "_name_or_path": str(tmp_path)})
    assert config.side_vision_config.name_or_path == ""
    with pytest.raises(ValueError, match=r"side_vision_config\.model_args\['checkpoint_path'\] is not allowed"):
        tiny_config(side_vision_config={**SIDE, "model_args": {"checkpoint_path": "a.pth"}})
