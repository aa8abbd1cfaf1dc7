"""Feature maps of earlier stages beside the vision tower's own pooled output."""

import pytest
import torch

from modeling_clipmini import ClipMiniModel, ClipMiniVisionModel

PIXELS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def build(tiny_config, **options):
    torch.manual_seed(0)
    return ClipMiniModel(tiny_config(**options)).eval()


def test_parts_are_the_averages_of_the_stages_scaled_alike(tiny_config):
    model = build(tiny_config, vision_levels=[1, 3])
    timm_model = model.vision_model.timm_model
    stages, seen = {1: timm_model.layer1, 3: timm_model.layer3}, {}
    for level, stage in stages.items():
        stage.register_forward_hook(lambda module, inputs, output, level=level: seen.update({level: output}))
    features = model.pool_images(PIXELS)
    expected = [timm_model(PIXELS), *(seen[level].mean(dim=(2, 3)) for level in (1, 3))]
    assert features.shape == (2, model.config.vision_embed_dim)
    for part, raw in zip(features.split([raw.shape[1] for raw in expected], dim=1), expected, strict=True):
        torch.testing.assert_close(part.square().mean(dim=1), torch.ones(2))
        torch.testing.assert_close(part * raw.square().mean(dim=1, keepdim=True).sqrt(), raw)


def test_without_levels_the_towers_own_output_is_passed_on_as_it_is(tiny_config):
    model = build(tiny_config)
    torch.testing.assert_close(model.pool_images(PIXELS), model.vision_model.timm_model(PIXELS))


@pytest.mark.parametrize("architecture", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
def test_a_saved_model_gives_the_same_embeddings(architecture, tiny_config, tmp_path):
    vision_config = {"architecture": architecture}
    if architecture == "test_vit":
        vision_config["model_args"] = {"img_size": 64}
    model = build(tiny_config, vision_config=vision_config, vision_levels=[0, 1])
    model.save_pretrained(tmp_path)
    expected = model.get_image_features(PIXELS).pooler_output
    for cls in (ClipMiniModel, ClipMiniVisionModel):
        loaded = cls.from_pretrained(tmp_path)
        assert loaded.config.vision_levels == [0, 1]
        torch.testing.assert_close(loaded.get_image_features(PIXELS).pooler_output, expected)


@pytest.mark.parametrize("levels", [[], [0, 2]])
def test_all_hidden_states_can_still_be_had(levels, tiny_config):
    model = build(tiny_config, vision_levels=levels)
    plain = model.get_image_features(PIXELS)
    full = model.get_image_features(PIXELS, output_hidden_states=True)
    assert plain.hidden_states is None
    assert len(full.hidden_states) == 5
    torch.testing.assert_close(full.pooler_output, plain.pooler_output)


def test_early_stages_learn_through_their_level(tiny_config):
    model = build(tiny_config, vision_levels=[0])
    model.get_image_features(PIXELS).pooler_output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.vision_model.parameters())


def test_a_stage_that_the_tower_has_not_is_named(tiny_config):
    with pytest.raises(ValueError, match=r"vision_levels=\[5\] is not allowed: test_resnet has stages 0 to 4"):
        build(tiny_config, vision_levels=[5])


def test_features_are_dropped_in_training_alone(tiny_config):
    model = build(tiny_config, vision_dropout=0.5)
    features = torch.ones(1, model.config.vision_embed_dim)

    def embed():
        return model.get_image_features(pooled_image=features).pooler_output

    assert torch.equal(embed(), embed())
    model.train()
    assert not torch.equal(embed(), embed())
    model.freeze_vision_tower()  # its projection goes on training, and so does what drops its inputs
    assert not torch.equal(embed(), embed())
