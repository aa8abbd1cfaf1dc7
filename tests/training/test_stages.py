import copy
import logging

import pytest
import timm
import torch
from torch import nn

from clipmini.training.stages import FrozenStages, stage_parts

ARCHITECTURES = [
    "test_resnet",
    "resnet18",
    "tf_efficientnet_lite0",
    "mobilenetv3_small_050",
    "convnext_atto",
    "regnetx_002",
]


def make(architecture):
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=0).eval()
    # Layer scales and last norms start near 0: blocks would be as good as empty, and hide that they were skipped.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.0)
    return model


def make_images(batch=2, size=64):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def freeze(frozen_stages):
    for module in frozen_stages.modules.values():
        module.requires_grad_(False).eval()


def test_stages_go_from_the_stem_to_the_head():
    stages = stage_parts(make("test_resnet"))
    assert [{name.split(".")[0] for name in stage} for stage in stages] == [
        {"conv1", "bn1"},
        {"layer1"},
        {"layer2"},
        {"layer3"},
        {"layer4"},
    ]
    last = stage_parts(make("tf_efficientnet_lite0"))[-1]
    assert {name.split(".")[0] for name in last} == {"blocks", "conv_head", "bn2"}


@pytest.mark.parametrize(("architecture", "count"), [("test_resnet", 5), ("convnext_atto", 6), ("test_vit", 7)])
def test_every_parameter_is_in_one_stage(architecture, count):
    model = make(architecture)
    stages = stage_parts(model)
    names = [name for stage in stages for name in stage]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(stages) == count


class Unknown(nn.Sequential):
    pass


class Refusing(nn.Sequential):
    def group_matcher(self, coarse=False):
        assert not coarse


@pytest.mark.parametrize("kind", [Unknown, Refusing])
def test_an_architecture_without_stages_is_a_value_error(kind):
    with pytest.raises(ValueError, match=f"no stages for {kind.__name__}: .*choose another"):
        stage_parts(kind(nn.Linear(2, 2)))


def test_the_boundary_of_a_small_resnet():
    frozen_stages = FrozenStages.find(make("test_resnet"), 2, make_images())
    assert frozen_stages.entry == "layer3.0"
    assert frozen_stages.run(make_images()).shape == (2, 48, 8, 8)
    assert list(frozen_stages.modules)[-3:] == ["maxpool", "layer1.0", "layer2.0"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_front_and_rest_are_the_whole(architecture):
    model = make(architecture)
    images = make_images()
    with torch.no_grad():
        whole = model(images)
    num_stages = len(stage_parts(model))
    for count in {1, 2, num_stages // 2, num_stages - 1}:
        frozen_stages = FrozenStages.find(model, count, make_images(batch=1))
        activation = frozen_stages.run(images)
        assert not activation.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(frozen_stages.resumed(model)(activation), whole, rtol=1e-6, atol=1e-6)
        trainable = {name for stage in stage_parts(model)[-count:] for name in stage}
        assert not trainable & {
            f"{name}.{parameter}"
            for name, module in frozen_stages.modules.items()
            for parameter, _ in module.named_parameters()
        }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_rest_gets_the_gradients_of_the_whole(architecture):
    model, count, images = make(architecture), 2, make_images(size=32)
    frozen_stages = FrozenStages.find(model, count, images)
    freeze(frozen_stages)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = torch.autograd.grad(model(images).square().mean(), list(trained.values()))
    activation = frozen_stages.run(images)
    output = frozen_stages.resumed(model)(activation)
    gradients = torch.autograd.grad(output.square().mean(), list(trained.values()))
    for name, gradient, other in zip(trained, gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, msg=lambda text, name=name: f"{name}: {text}")
    assert set(trained) >= {name for stage in stage_parts(model)[-count:] for name in stage}


def test_the_front_runs_nothing_of_the_rest():
    model = make("resnet18")
    frozen_stages = FrozenStages.find(model, 2, make_images())
    ran = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    activation = frozen_stages.run(make_images())
    assert ran[-1] == "layer2"  # the whole model's hook, "", would come last of all
    assert not any(name.startswith(("layer3", "layer4")) for name in ran)
    ran.clear()
    frozen_stages.resumed(model)(activation)
    assert "layer2.0.conv1" not in ran
    assert "layer3.0.conv1" in ran


def test_the_model_is_left_as_it_was():
    model = make("test_resnet").train()
    model.layer1.eval()
    model.layer4.forward = layer4 = model.layer4.forward
    state, names = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    modes = [module.training for module in model.modules()]
    frozen_stages = FrozenStages.find(model, 2, make_images())
    for _ in range(2):
        assert [module.training for module in model.modules()] == modes
        assert [name for name, _ in model.named_modules()] == names
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert [name for name, module in model.named_modules() if "forward" in vars(module)] == ["layer4"]
        assert model.layer4.forward is layer4
        assert not any(module._forward_pre_hooks for module in model.modules())
        freeze(frozen_stages)
        modes = [module.training for module in model.modules()]
        frozen_stages.run(make_images())


def test_the_resumed_model_shares_weights_modes_and_hooks(tiny_model):
    timm_model = tiny_model.vision_model.timm_model
    frozen_stages = FrozenStages.find(timm_model, 2, make_images())
    names = [name for name, _ in tiny_model.named_modules()]
    resumed = frozen_stages.resumed(tiny_model)
    assert resumed.text_model is tiny_model.text_model
    assert resumed.vision_model.timm_model.layer4 is timm_model.layer4
    assert resumed.vision_model.timm_model.layer1 is not timm_model.layer1
    assert [name for name, _ in tiny_model.named_modules()] == names
    tiny_model.train()
    assert frozen_stages.resumed(tiny_model).vision_model.timm_model.training
    assert not any("forward" in vars(module) for module in tiny_model.modules())


def test_an_error_within_the_front_is_not_taken_for_its_end():
    frozen_stages = FrozenStages.find(make("test_resnet"), 2, make_images())
    with pytest.raises(RuntimeError, match="channels"):
        frozen_stages.run(torch.randn(2, 5, 64, 64))
    frozen_stages.run(make_images())


def test_the_front_must_be_in_eval_mode():
    model = make("test_resnet")
    frozen_stages = FrozenStages.find(model, 2, make_images())
    model.layer2[0].bn1.train()
    with pytest.raises(AssertionError, match="eval mode"):
        frozen_stages.run(make_images())
    model.eval().layer3.train()
    frozen_stages.run(make_images())


@pytest.mark.parametrize("architecture", ["test_resnet", "convnext_atto"])
def test_channels_last(architecture):
    model = make(architecture).to(memory_format=torch.channels_last)
    images = make_images().contiguous(memory_format=torch.channels_last)
    frozen_stages = FrozenStages.find(model, 2, images)
    activation = frozen_stages.run(images)
    assert activation.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        from_cache = frozen_stages.resumed(model)(activation.contiguous())
    torch.testing.assert_close(from_cache, model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["test_resnet", "mobilenetv3_small_050", "convnext_atto", "regnetx_002"])
def test_gradient_checkpointing_runs_the_same(architecture):
    """timm then runs the blocks of a stage without the stage, forward and once more in backward."""
    model = make(architecture)
    images = make_images(size=32)
    whole = model(images)
    model.set_grad_checkpointing()
    frozen_stages = FrozenStages.find(model, 2, images)
    freeze(frozen_stages)
    activation = frozen_stages.run(images)
    output = frozen_stages.resumed(model)(activation)
    torch.testing.assert_close(output, whole, rtol=1e-6, atol=1e-6)
    output.sum().backward()


def test_the_wrapper_of_transformers_resumes(tiny_model):
    tower = tiny_model.vision_model
    frozen_stages = FrozenStages.find(tower.timm_model, 2, make_images())
    freeze(frozen_stages)
    expected = tiny_model.pool_images(make_images())
    activation = frozen_stages.run(make_images())
    pooled = frozen_stages.resumed(tiny_model).pool_images(activation)
    torch.testing.assert_close(pooled, expected, rtol=1e-6, atol=1e-6)
    pooled.sum().backward()
    trained = {name for name, parameter in tower.timm_model.named_parameters() if parameter.grad is not None}
    assert trained == {name for stage in stage_parts(tower.timm_model)[-2:] for name in stage}


@pytest.mark.parametrize("count", [1, 6])
def test_a_vision_transformer_cannot_be_split(count, caplog):
    size = timm.get_pretrained_cfg("test_vit").input_size[-1]
    assert FrozenStages.find(make("test_vit"), count, make_images(size=size)) is None
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "VisionTransformer cannot be split before blocks." in warning.getMessage()
    assert "whole tower" in warning.getMessage()


def test_a_image_that_the_model_itself_refuses_is_an_error():
    with pytest.raises((RuntimeError, AssertionError)):
        FrozenStages.find(make("test_vit"), 2, make_images(size=50))


class Chain(nn.Module):
    """Three layers; how they are joined is the subclass's affair."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def group_matcher(self, coarse=False):
        return lambda name: ["one", "two", "three"].index(name.split(".")[0])

    def forward(self, x):
        return self.three(self.two(self.one(x)))


class AddsBetween(Chain):
    """What it adds is small enough to hide in the output's tolerance."""

    def forward(self, x):
        return self.three(self.two(self.one(x) + 1e-4) * 1e-4)


class Bypass(Chain):
    def forward(self, x):
        return self.three(self.two(self.one(x))) + x


class Tuple(Chain):
    def __init__(self):
        super().__init__()
        self.two.forward = lambda pair: pair[0]

    def forward(self, x):
        return self.three(self.two((self.one(x), x)))


class Keyword(Chain):
    def forward(self, x):
        return self.three(self.two(input=self.one(x)))


class NeverRun(Chain):
    def forward(self, x):
        return self.three(self.one(x))


class Folded(Chain):
    def forward(self, x):
        return self.three(self.two(self.one(x).view(1, -1, 4))).view(-1, 4)


class Backwards(Chain):
    def forward(self, x):
        return self.one(self.two(self.three(x)))


class Reused(Chain):
    def forward(self, x):
        return self.one(self.three(self.two(self.one(x))))


def test_a_chain_can_be_split():
    assert FrozenStages.find(Chain(), 2, torch.randn(3, 4)).entry == "two"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (AddsBetween, "another output"),
        (Bypass, "another output"),
        (Tuple, "more than one tensor"),
        (Keyword, "more than one tensor"),
        (NeverRun, "never run"),
        (Folded, "one row for each"),
        (Backwards, "another output"),
        (Reused, "another output"),
    ],
)
def test_what_is_no_chain_cannot_be_split(kind, reason, caplog):
    assert FrozenStages.find(kind(), 2, torch.randn(3, 4)) is None
    assert f"{kind.__name__} cannot be split before two" in caplog.text
    assert reason in caplog.text


def test_stages_out_of_order_leave_no_front(caplog):
    class HeadFirst(Chain):
        def group_matcher(self, coarse=False):
            return lambda name: ["three", "two", "one"].index(name.split(".")[0])

    assert FrozenStages.find(HeadFirst(), 1, torch.randn(3, 4)) is None
    assert "no stage before it" in caplog.text


def test_a_module_that_is_used_twice_is_left_out_twice():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            activation = nn.ReLU()
            self.one = nn.Sequential(nn.Linear(4, 4), activation)
            self.two = nn.Sequential(nn.Linear(4, 4), activation)
            self.three = nn.Linear(4, 4)

        group_matcher = Chain.group_matcher
        forward = Chain.forward

    model = Shared().eval()
    frozen_stages = FrozenStages.find(model, 1, torch.randn(3, 4))
    assert list(frozen_stages.modules) == ["one.0", "one.1", "two.0", "two.1"]
    assert torch.equal(frozen_stages.resumed(model)(frozen_stages.run(torch.ones(3, 4))), model(torch.ones(3, 4)))
