import math

import pytest
from torch import nn
from transformers import AutoConfig, BertConfig, T5Config, TimmWrapperConfig, ViTConfig

from modeling_clipmini import ClipMiniConfig


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"projection": "mlp", "projection_dropout": 0.3, "text_pooling": "cls", "projection_dim": 7},
        {"loss": "sigmoid", "logit_bias_init_value": -3.5, "logit_scale_max": 50.0},
        {"vision_levels": [3, 1, 3], "vision_dropout": 0.5},
        {"text_config": BertConfig(hidden_size=48, num_attention_heads=4)},
        {"vision_config": TimmWrapperConfig(architecture="resnet18", model_args={"in_chans": 3})},
    ],
)
def test_round_trips_exactly(options, tmp_path, tiny_config):
    config = tiny_config(**options)
    config.save_pretrained(tmp_path)
    for loaded in (ClipMiniConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is ClipMiniConfig
        assert loaded.to_json_string() == config.to_json_string()
        assert type(loaded.text_config) is type(config.text_config)


def test_defaults_follow_the_loss(tiny_config):
    assert tiny_config().logit_scale_init_value == pytest.approx(math.log(1 / 0.07))
    assert tiny_config().logit_bias_init_value is None
    sigmoid = tiny_config(loss="sigmoid")
    assert (sigmoid.logit_scale_init_value, sigmoid.logit_bias_init_value) == (pytest.approx(math.log(10)), -10.0)


def test_the_classifier_of_a_timm_config_is_dropped():
    labeled = TimmWrapperConfig.from_dict({"architecture": "resnet18", "num_classes": 1000})
    config = ClipMiniConfig(vision_config=labeled)
    assert config.vision_config.num_labels == 0
    assert "tench" not in config.to_json_string()
    assert labeled.num_labels == 1000  # the caller's own is left alone


def test_no_folder_is_told_and_a_hub_id_stays(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "towers" / "text").mkdir(parents=True)
    towers = [BertConfig(name_or_path=name) for name in (str(tmp_path / "gone"), "towers/text", "org/text")]
    configs = [tiny_config(text_config=tower) for tower in towers]
    assert [config.text_config.name_or_path for config in configs] == ["", "", "org/text"]
    assert towers[1].name_or_path == "towers/text"  # the caller's own is left alone
    vision = [{"architecture": "resnet18", "_name_or_path": name} for name in (str(tmp_path), "org/vision")]
    assert [tiny_config(vision_config=tower).vision_config.name_or_path for tower in vision] == ["", "org/vision"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": "conv"}, "projection='conv' is not allowed; use one of 'linear', 'mlp'"),
        ({"text_pooling": "max"}, "text_pooling='max' .* 'mean', 'cls', 'eos', 'last'"),
        (
            {"text_pooling": "eos"},
            "text_pooling='eos' needs a text tower with eos_token_id, which this Distil",
        ),
        ({"text_padding_id": -1}, "text_padding_id=-1 is not allowed"),
        ({"text_padding_id": True}, "text_padding_id=True is not allowed"),
        ({"projection_bias": 2}, "projection_bias=2 is not allowed; use one of False, True"),
        ({"loss": "triplet"}, "loss='triplet' .* 'infonce', 'sigmoid'"),
        ({"projection_dim": 0}, "projection_dim=0 .* at least 1"),
        ({"projection_dim": 2.5}, "projection_dim=2.5 .* whole number"),
        ({"projection_dropout": 1.0}, "projection_dropout=1.0 .* from 0 to below 1"),
        ({"logit_scale_max": 0.5}, "logit_scale_max=0.5"),
        ({"logit_scale_init_value": 5.0}, "logit_scale_init_value=5.0 .* to 4.6"),
        ({"logit_scale_init_value": math.nan}, "logit_scale_init_value=nan"),
        ({"logit_bias_init_value": -1.0}, "logit_bias_init_value=-1.0 has no effect with loss='infonce'"),
        ({"logit_bias_init_value": "low", "loss": "sigmoid"}, "logit_bias_init_value='low'"),
        ({"vision_levels": [-1]}, r"vision_levels=\[-1\] is not allowed; use stages counted from 0"),
        ({"vision_levels": 2}, "vision_levels=2 is not allowed"),
        ({"vision_dropout": 1}, "vision_dropout=1 .* from 0 to below 1"),
        ({"vision_embed_dim": -1}, "vision_embed_dim=-1"),
        ({"vision_config": ViTConfig()}, "vision_config is a ViTConfig; .* timm"),
        ({"vision_config": {"architecture": "resnet18", "do_pooling": False}}, "pooled output"),
        ({"vision_config": "resnet50"}, "vision_config is a str; the vision tower must be a timm model"),
        (
            {"vision_config": {"architecture": 5}},
            r"vision_config\.architecture=5 is not allowed",
        ),
        *(
            ({"vision_config": {"architecture": name}}, f"vision_config.architecture='{name}' is not allowed")
            for name in ("hf-hub:org/name", "hf_hub:org/name", "local-dir:/x", "timm/resnet18", "../resnet18", "a b")
        ),
        *(
            (
                {"vision_config": {"architecture": "resnet18", "model_args": {key: value}}},
                rf"vision_config\.model_args\['{key}'\] is not allowed: it may name a file, .* described by img_size",
            )
            for key, value in {
                "checkpoint_path": "a.pth",
                "pretrained": True,
                "pretrained_cfg": {"file": "a.pth"},
                "pretrained_cfg_overlay": {"url": "http://x"},
                "cache_dir": "/x",
                "device": "cuda",
                "of_tomorrow": 1,
            }.items()
        ),
        *(
            (
                {"vision_config": {"architecture": "resnet18", "model_args": {key: value}}},
                rf"vision_config\.model_args\['{key}'\]=.* is not allowed; use numbers, names, or lists",
            )
            for key, value in {"act_layer": nn.ReLU, "embed_dim": {"a": 1}, "layers": [[1], print]}.items()
        ),
        ({"text_config": "bert"}, "text_config is a str"),
        ({"text_config": {"dim": "x"}}, "text_config is not allowed: .*dim"),
        ({"text_config": T5Config()}, "T5Config, an encoder-decoder"),
        ({"text_config": TimmWrapperConfig()}, "without a hidden_size"),
    ],
)
def test_a_bad_value_names_the_field_and_what_is_allowed(options, message, tiny_config):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)
