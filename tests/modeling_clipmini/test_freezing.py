"""A model that is frozen in whole or in part goes through eval(), train() and encode_* as any other module does."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from modeling_clipmini import ClipMiniTextModel, ClipMiniVisionModel

CALLS = {
    "eval": lambda model: model.eval(),
    "train": lambda model: model.train(),
    "train(False)": lambda model: model.train(False),
    "encode_text": lambda model: model.encode_text("a dog"),
    "frozen anew": lambda model: model.requires_grad_(False).eval(),
    "freeze_batch_norm": lambda model: model.freeze_batch_norm(),
    "freeze_text_tower": lambda model: model.freeze_text_tower(),
}


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.fixture
def model(tiny_model, tiny_processor):
    tiny_model.processor = tiny_processor
    return tiny_model


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", [True, False])
def test_a_model_that_is_frozen_whole(call, mode, model):
    model.train(mode)
    for parameter in model.parameters():
        parameter.requires_grad = False
    before = modes(model)
    CALLS[call](model)
    if call == "encode_text":  # which leaves the modes as they are
        assert modes(model) == before
    else:
        assert not any(modes(model).values())
    model.train()
    assert not any(module.training for module in model.modules())
    model.requires_grad_(True).train()
    assert all(module.training for module in model.modules() if not isinstance(module, _BatchNorm))


def test_a_frozen_teacher_inside_another_module(model):
    student = nn.Linear(4, 4)
    outer = nn.ModuleDict({"student": student, "teacher": model.requires_grad_(False)})
    outer.train()
    assert student.training
    assert not any(module.training for module in model.modules())
    outer.eval()
    assert not student.training


def test_a_peft_adapter_is_added_and_loaded_again(model, tmp_path):
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_lin"], r=2))
    adapted.train()
    base = adapted.get_base_model()
    assert not any(module.training for module in base.vision_model.modules())
    assert base.text_model.training  # it holds what trains
    adapted.save_pretrained(tmp_path)
    plain = adapted.unload().requires_grad_(True)
    loaded = PeftModel.from_pretrained(plain, tmp_path)  # frozen whole
    loaded.train()
    loaded.eval()
    assert loaded.get_base_model().encode_text(["a", "b"]).shape == (2, 16)


def test_encoding_leaves_every_mode_as_it_was(model):
    model.freeze_vision_tower()
    model.train()
    odd = [model.text_model.get_submodule("transformer.layer.0"), model.vision_dropout]
    for module in odd:
        module.training = not module.training
    norms = [module for module in model.vision_model.modules() if isinstance(module, _BatchNorm)]
    norms[0].training = True
    before = modes(model)
    statistics = norms[0].running_mean.clone()
    model.encode_text("a dog")
    model.encode_image(Image.new("RGB", (40, 30), "red"))
    assert modes(model) == before
    assert torch.equal(norms[0].running_mean, statistics)
    with pytest.raises(ValueError, match="does not exist"):
        model.encode_image(["no such file"])
    assert modes(model) == before


def test_encoding_a_model_in_eval_mode_switches_nothing(model, monkeypatch):
    model.eval()
    monkeypatch.setattr(type(model), "train", lambda *_: pytest.fail("switched"))
    model.encode_text("a dog")


def test_frozen_halves(tiny_config):
    for half in (ClipMiniVisionModel, ClipMiniTextModel):
        one = half(tiny_config()).requires_grad_(False)
        one.train()
        one.eval()
        assert not one.training
