import copy
import logging
import sys

import pytest
import torch
from torch import nn
from transformers import BertConfig

from clipmini.training import lora
from clipmini.training.lora import add_lora, load_adapter, merge_lora, save_adapter
from modeling_clipmini import ClipMiniModel

peft = pytest.importorskip("peft")

BERT = BertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    vocab_size=200,
    max_position_embeddings=64,
)
TOWERS = {
    "resnet and distilbert": {},
    "mobilenet and bert": {"vision_config": {"architecture": "mobilenetv3_small_050"}, "text_config": BERT},
    "vit and distilbert": {"vision_config": {"architecture": "test_vit"}},
    "two vision towers": {"side_vision_config": {"architecture": "test_convnext"}},
}


@pytest.fixture(params=TOWERS)
def model(request, tiny_config):
    torch.manual_seed(0)
    return ClipMiniModel(tiny_config(**TOWERS[request.param])).eval()


def inputs_for(model):
    size = 160 if "test_" in model.config.vision_config.architecture else 64
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(3, 3, size, size, generator=generator),
        "input_ids": torch.tensor([[1, 7, 9, 2], [1, 8, 3, 2], [1, 4, 2, 2]]),
    }


@torch.no_grad()
def embed(model):
    outputs = model(**inputs_for(model))
    return torch.cat([outputs.image_embeds, outputs.text_embeds])


@torch.no_grad()
def move_adapters(model, std=0.05):
    """Stand in for training, which moves B away from zero."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def adapted(model):
    return {name for name, module in model.named_modules() if hasattr(module, "lora_A")}


def test_every_linear_layer_of_distilbert_is_adapted(tiny_model):
    add_lora(tiny_model, ["text"], rank=2)
    layers = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")
    assert adapted(tiny_model) == {
        f"text_model.transformer.layer.{layer}.{name}" for layer in (0, 1) for name in layers
    }
    layer = tiny_model.text_model.transformer.layer[0].ffn.lin1
    assert layer.lora_A["default"].weight.shape == (2, 32)
    assert layer.lora_B["default"].weight.shape == (64, 2)


def test_every_linear_layer_of_bert_is_adapted(tiny_config):
    model = ClipMiniModel(tiny_config(text_config=BERT))
    add_lora(model, ["text"])
    linear = {name for name, module in model.text_model.named_modules() if type(module) is nn.Linear}
    assert len(adapted(model)) == 12
    assert {name.rpartition(".")[2] for name in linear} <= {"base_layer", "default"}


def test_in_mobilenet_exactly_the_pointwise_convolutions_are_adapted(tiny_config):
    model = ClipMiniModel(tiny_config(vision_config={"architecture": "mobilenetv3_small_050"}))
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    pointwise = {
        name for name, weight in weights.items() if weight.shape[2:] == (1, 1) and weight.shape[1] > 1
    }  # a depthwise one has one channel per group
    add_lora(model, ["vision"])
    assert adapted(model) == pointwise
    assert 20 < len(pointwise) < len(weights)


def test_the_update_is_alpha_over_rank_times_b_a(tiny_model):
    layer = tiny_model.text_model.transformer.layer[1].ffn.lin2
    weight = layer.weight.clone()
    add_lora(tiny_model, ["text"], rank=2)
    move_adapters(tiny_model)
    adapter = tiny_model.text_model.transformer.layer[1].ffn.lin2
    update = adapter.lora_B["default"].weight @ adapter.lora_A["default"].weight
    merge_lora(tiny_model)
    torch.testing.assert_close(layer.weight, weight + 2 * update)
    assert tiny_model.text_model.transformer.layer[1].ffn.lin2 is layer


def test_nothing_changes_before_training(model):
    before = embed(model)
    add_lora(model, ["vision", "text"])
    # Rounding differs: a BatchNorm is folded into a convolution, but not into one that is adapted.
    torch.testing.assert_close(embed(model), before, rtol=0, atol=1e-6)
    assert not model.training


@pytest.mark.parametrize("towers", [["text"], ["vision"], ["vision", "text"]])
def test_only_adapters_heads_and_temperature_are_trained(tiny_model, towers):
    add_lora(tiny_model, towers)
    move_adapters(tiny_model)
    tiny_model.train()(**inputs_for(tiny_model)).loss.backward()
    prefixes = tuple(f"{tower}_model." for tower in towers)
    for name, parameter in tiny_model.named_parameters():
        is_base = name.startswith(prefixes) and ".lora_" not in name
        assert parameter.requires_grad != is_base, name
        assert (parameter.grad is None) == is_base, name


def test_every_adapter_is_run_and_trained(model):
    add_lora(model, ["vision", "text"])
    move_adapters(model)
    model.train()(**inputs_for(model)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_merging_keeps_outputs_and_makes_a_plain_model(model):
    types = {name: type(module) for name, module in model.named_modules()}
    keys, plain = list(model.state_dict()), embed(model)
    add_lora(model, ["vision", "text"])
    move_adapters(model)
    before = embed(model)
    assert (before - plain).abs().max() > 1e-3
    merge_lora(model)
    torch.testing.assert_close(embed(model), before, rtol=0, atol=1e-5)
    assert list(model.state_dict()) == keys
    assert {name: type(module) for name, module in model.named_modules()} == types


def test_the_saved_folder_is_plain(model, tmp_path):
    add_lora(model, ["vision", "text"])
    move_adapters(model)
    expected = embed(model)
    merge_lora(model)
    model.save_pretrained(tmp_path)
    loaded, info = ClipMiniModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert not list(tmp_path.glob("adapter*"))
    torch.testing.assert_close(embed(loaded.eval()), expected, rtol=0, atol=1e-5)


def test_a_tower_named_like_peft_names_its_layers_keeps_its_names(tiny_config):
    model = ClipMiniModel(tiny_config(vision_config={"architecture": "dla46_c"}))  # it has a `base_layer` of its own
    keys = list(model.state_dict())
    assert any(".base_layer." in key for key in keys)
    add_lora(model, ["vision"])
    merge_lora(model)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("towers", [["text"], ["vision", "text"]])
def test_peft_loads_the_adapter_into_the_model_that_training_started_from(model, towers, tmp_path):
    start = copy.deepcopy(model)
    add_lora(model, towers)
    model.train()(**inputs_for(model)).loss.backward()  # moves BatchNorm's statistics
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    save_adapter(model, tmp_path / "adapter")
    expected = model.eval()(**inputs_for(model))
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again = peft.PeftModel.from_pretrained(start, tmp_path / "adapter")
    outputs = again(**inputs_for(model))
    assert torch.equal(outputs.logits_per_image, expected.logits_per_image)
    merged = again.merge_and_unload()(**inputs_for(model))
    torch.testing.assert_close(merged.logits_per_image, expected.logits_per_image, rtol=0, atol=1e-4)


def test_an_adapter_names_the_model_that_it_is_of(tiny_folder, tmp_path):
    model = ClipMiniModel.from_pretrained(tiny_folder)
    add_lora(model, ["text"])
    save_adapter(model, tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == str(tiny_folder)


def test_training_resumes_exactly(tiny_config, tmp_path):
    def start():
        torch.manual_seed(0)
        model = ClipMiniModel(tiny_config())
        add_lora(model, ["vision", "text"])
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def step(model, optimizer):
        model.train()(**inputs_for(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    one, optimizer = start()
    step(one, optimizer)
    save_adapter(one, tmp_path)
    saved_optimizer, random = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    other, other_optimizer = start()
    load_adapter(other, tmp_path)
    other_optimizer.load_state_dict(saved_optimizer)
    for model, its_optimizer in ((one, optimizer), (other, other_optimizer)):
        torch.set_rng_state(random)
        step(model, its_optimizer)
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(("towers", "rank"), [(["text"], 4), (["vision"], 8), (["vision", "text"], 8)])
def test_adapters_of_another_run_are_refused(tiny_model, tiny_config, towers, rank, tmp_path):
    add_lora(tiny_model, ["text"])
    save_adapter(tiny_model, tmp_path)
    other = ClipMiniModel(tiny_config())
    add_lora(other, towers, rank=rank)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"not an adapter of this model.*lora\.parts and lora\.rank"):
        load_adapter(other, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_a_frozen_tower_that_gets_adapters_trains_again(tiny_model):
    tiny_model.freeze_text_tower()
    tiny_model.freeze_vision_tower()
    tiny_model.train()
    add_lora(tiny_model, ["text"])
    assert tiny_model.text_model.training
    assert not tiny_model.vision_model.training
    merge_lora(tiny_model)
    assert not tiny_model.train().text_model.training


def test_finding_layers_leaves_batch_norm_and_random_state_alone(tiny_model):
    tiny_model.train()
    state = torch.get_rng_state()
    lora._find_layers(tiny_model, "vision")
    assert torch.equal(torch.get_rng_state(), state)
    statistics = {name: value.clone() for name, value in tiny_model.named_buffers()}
    add_lora(tiny_model, ["vision"])
    assert tiny_model.training
    buffers = dict(tiny_model.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in statistics.items())
    assert not any(module._forward_pre_hooks for module in tiny_model.modules())


def test_layers_that_are_read_but_not_called_are_passed_over(tiny_model, caplog):
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.called = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, hidden):
            return self.called(nn.functional.linear(hidden, self.read.weight))

    tiny_model.text_model.transformer.layer[0].ffn = Bypass()
    with caplog.at_level(logging.WARNING):
        add_lora(tiny_model, ["text"])
    assert "1 layers of the text tower get no LoRA update" in caplog.text
    assert "text_model.transformer.layer.0.ffn.called" in adapted(tiny_model)
    assert "text_model.transformer.layer.0.ffn.read" not in adapted(tiny_model)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(4, 4), True),
        (nn.Conv2d(4, 4, 1, stride=2), True),
        (nn.Conv2d(4, 4, 1, groups=2), False),
        (nn.Conv2d(4, 4, (1, 3)), False),
        (nn.Embedding(4, 4), False),
    ],
)
def test_what_is_linear(layer, expected):
    assert lora._is_linear(layer) is expected


def test_layers_that_change_their_weight_are_passed_over(tiny_config):
    model = ClipMiniModel(tiny_config(vision_config={"architecture": "test_nfnet"}))
    standardized = {name for name, module in model.named_modules() if type(module).__name__ == "ScaledStdConv2d"}
    add_lora(model, ["vision"])
    assert standardized
    assert not standardized & adapted(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": "audio"}, "lora.parts='audio' is not allowed; use vision, text or"),
        ({"parts": ["text", "audio"]}, "lora.parts"),
        ({"parts": []}, "lora.parts"),
        ({"parts": "text", "rank": 0}, "lora.rank=0 is not allowed; use at least 1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        lora.Lora(**options)


def test_a_tower_without_such_layers_is_named(tiny_model):
    tiny_model.vision_model.timm_model = nn.Sequential(nn.Conv2d(3, 64, 7), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    tiny_model.pool_images = lambda pixels: tiny_model.vision_model.timm_model(pixels)
    with pytest.raises(ValueError, match=r"vision tower.*no linear layer"):
        add_lora(tiny_model, ["text", "vision"])
    assert not adapted(tiny_model)


def test_adapters_are_not_stacked(tiny_model):
    add_lora(tiny_model, ["text"])
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        add_lora(tiny_model, ["text"])


def test_without_peft_the_remedy_is_named(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'clipmini\[lora\]'"):
        add_lora(tiny_model, ["text"])
    before = embed(tiny_model)
    merge_lora(tiny_model)
    assert torch.equal(embed(tiny_model), before)
