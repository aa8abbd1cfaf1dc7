"""A frozen BatchNorm is computed by the convolution before it: the same outputs, gradients and weights."""

import copy
import pickle
import threading
import time

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

from modeling_clipmini import ClipMiniModel
from modeling_clipmini.encoding_clipmini import embed_in_batches
from modeling_clipmini.folding_clipmini import fold_batch_norms, keep_joint_weights


class Pair(nn.Module):
    """A convolution of weight 2 without bias, and a BatchNorm: y = (2x - 1) / 2 * 3 + 4."""

    def __init__(self, is_used_twice=False):
        super().__init__()
        self.pretrained_cfg = {"input_size": (1, 4, 4)}
        self.conv, self.norm = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=1e-12)
        self.is_used_twice = is_used_twice
        with torch.no_grad():
            self.conv.weight.fill_(2)
            self.norm.running_mean.fill_(1)
            self.norm.running_var.fill_(4)
            self.norm.weight.fill_(3)
            self.norm.bias.fill_(4)
        self.eval()

    def forward(self, pixels):
        hidden = self.conv(pixels)
        return self.norm(hidden) + hidden if self.is_used_twice else self.norm(hidden)


class Mixed(nn.Module):
    """Every kind of pair that is folded, and some that are not."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=True),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            Conv2dSame(8, 8, 3, stride=2, groups=8, bias=False),
            BatchNormAct2d(8),
            nn.Conv2d(8, 4, 1),
            nn.BatchNorm2d(4, affine=False),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(4),
        )
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, pixels):
        return self.layers(pixels)


def both(module, dtype=torch.float64):
    plain = module.to(dtype)
    folded = copy.deepcopy(plain)
    return plain, folded, fold_batch_norms(folded)


def see_convolution(module, name="conv"):
    """Return the output of the convolution alone, for an input of 1."""
    convolution = module.get_submodule(name)
    return convolution(torch.ones(1, 1, 1, 1)).item()


def test_a_pair_by_hand():
    pair = Pair()
    assert fold_batch_norms(pair) == 1
    assert see_convolution(pair) == 5.5
    assert pair(torch.ones(1, 1, 1, 1)).item() == 5.5
    pair.train()
    assert see_convolution(pair) == 2  # the statistics are those of the batch


def test_an_output_that_is_used_elsewhere_is_not_folded():
    pair = Pair(is_used_twice=True)
    assert fold_batch_norms(pair) == 0
    assert pair(torch.ones(1, 1, 1, 1)).item() == 7.5


@pytest.mark.parametrize("change", ["hook", "hook before", "hook backward", "forward", "replaced", "sync"])
def test_both_layers_run_where_one_is_replaced_or_looked_at(change):
    pair = Pair()
    fold_batch_norms(pair)
    seen = []
    if change == "hook":
        pair.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.item()))
    elif change == "hook before":
        pair.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].item()))
    elif change == "hook backward":
        pair.conv.register_full_backward_hook(lambda module, inputs, outputs: None)
    elif change == "forward":  # as accelerate replaces it
        pair.norm.forward = lambda hidden: nn.BatchNorm2d.forward(pair.norm, hidden)
    elif change == "replaced":
        pair.conv = nn.Sequential(pair.conv, nn.Identity())  # as LoRA wraps it
    else:
        norm = nn.BatchNorm2d(1, eps=1e-12)
        norm.load_state_dict(pair.norm.state_dict())
        pair.norm = norm.eval()
    assert pair(torch.ones(1, 1, 1, 1)).item() == 5.5
    assert seen == ([2] if change in ("hook", "hook before") else [])


def test_outputs_and_gradients_are_those_of_the_two_layers():
    """In float64, so that a difference beyond rounding would show."""
    torch.manual_seed(0)
    plain, folded, num_folded = both(Mixed())
    assert num_folded == 3
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    again = pixels.detach().clone().requires_grad_()
    for module, inputs in ((plain, pixels), (folded, again)):
        module(inputs).square().sum().backward()
    torch.testing.assert_close(folded(again), plain(pixels), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again.grad, pixels.grad, rtol=1e-10, atol=1e-10)
    for (name, parameter), other in zip(plain.named_parameters(), folded.parameters(), strict=True):
        torch.testing.assert_close(
            other.grad, parameter.grad, rtol=1e-10, atol=1e-10, msg=lambda fault, name=name: f"{name}: {fault}"
        )


def test_weights_and_modules_keep_their_names():
    plain, folded, _ = both(Mixed())
    assert str(folded) == str(plain)
    assert folded.state_dict().keys() == plain.state_dict().keys()


def test_a_copy_is_folded_with_its_own_weights():
    pair = Pair()
    fold_batch_norms(pair)
    other = copy.deepcopy(pair)
    with torch.no_grad():
        pair.conv.weight.fill_(0)
    assert see_convolution(other) == 5.5
    assert see_convolution(pair) == 2.5


@pytest.mark.parametrize("name", ["conv", "norm"])
def test_a_copy_of_one_layer_alone_belongs_to_no_pair(name):
    """As peft makes of `modules_to_save`."""
    pair = Pair()
    fold_batch_norms(pair)
    setattr(pair, name, copy.deepcopy(getattr(pair, name)))
    assert see_convolution(pair) == 2
    assert pair(torch.ones(1, 1, 1, 1)).item() == 5.5


def test_a_pickle_is_small_and_right():
    pair = Pair()
    fold_batch_norms(pair)
    assert pickle.loads(pickle.dumps(pair))(torch.ones(1, 1, 1, 1)).item() == 5.5
    assert pickle.loads(pickle.dumps(pair.conv)).pair is None


def test_a_replica_uses_its_own_weights():
    """As of `nn.DataParallel`, whose replicas share all attributes but modules and weights."""
    pair = Pair()
    fold_batch_norms(pair)
    replica = pair.conv._replicate_for_data_parallel()
    replica._parameters = {"weight": torch.zeros(1, 1, 1, 1), "bias": None}
    assert replica(torch.ones(1, 1, 1, 1)).item() == 0


def test_other_threads_are_left_alone():
    """Other models run, and others are made, while one is folded; `torch.fx` would break both."""
    faults, is_over = [], threading.Event()
    network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))

    def attempt(work):
        try:
            while not is_over.is_set():
                work()
        except Exception as error:
            faults.append(error)

    def make():
        assert fold_batch_norms(Mixed()) == 3

    threads = [threading.Thread(target=attempt, args=(work,)) for work in (make, make, lambda: network(torch.ones(4)))]
    for thread in threads:
        thread.start()
    time.sleep(2)
    is_over.set()
    for thread in threads:
        thread.join()
    assert faults == []


def test_layers_in_other_precisions_and_under_vmap():
    plain, folded, _ = both(Mixed(), torch.bfloat16)
    for module in (plain, folded):
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.float()  # as many keep them
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(folded(pixels), plain(pixels), rtol=0.1, atol=0.1)

    plain, folded, _ = both(Mixed())

    def gradients(module):
        def loss(weights, pixels):
            return torch.func.functional_call(module, weights, (pixels[None],)).square().sum()

        weights = {name: weight.detach() for name, weight in module.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, pixels.double())

    torch.testing.assert_close(gradients(folded), gradients(plain))


def test_joint_weights_are_kept_only_inside_the_block_and_never_with_gradients():
    pair = Pair()
    fold_batch_norms(pair)
    with torch.no_grad(), keep_joint_weights():
        assert see_convolution(pair) == 5.5
        pair.conv.weight.fill_(0)
        assert see_convolution(pair) == 5.5
        with torch.enable_grad():
            assert see_convolution(pair) == 2.5
    with torch.no_grad():
        assert see_convolution(pair) == 2.5
    assert embed_in_batches([torch.ones(1, 1, 1)], lambda batch: pair(torch.stack(batch)), 1).item() == 2.5


def test_a_model_that_does_not_run_without_values_stays_as_it_is():
    class Branching(Pair):
        def forward(self, pixels):
            return super().forward(pixels) if pixels.mean() > 0 else pixels

    pair = Branching()
    assert fold_batch_norms(pair) == 0
    assert see_convolution(pair) == 2


def test_looking_for_pairs_leaves_nothing_in_the_model():
    """LeViT keeps its attention biases, by the device that it is asked on."""
    module = timm.create_model("levit_128s", num_classes=0).eval()
    assert fold_batch_norms(module) > 0
    assert not any(getattr(part, "attention_bias_cache", None) for part in module.modules())


def test_a_compiled_model_is_folded_without_a_break_in_the_graph():
    plain, folded, _ = both(Mixed(), torch.float32)
    compiled = torch.compile(folded, backend="eager", fullgraph=True)
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(compiled(pixels), plain(pixels))
    with torch.no_grad(), keep_joint_weights():
        torch.testing.assert_close(compiled(pixels), plain(pixels))


def test_a_model_is_folded_however_it_is_made(tiny_model, tiny_folder):
    """And only its tower's frozen BatchNorms are."""
    for model in (tiny_model, ClipMiniModel.from_pretrained(tiny_folder), copy.deepcopy(tiny_model)):
        assert _num_folded(model) > 0
        assert _num_folded(model.train()) == 0
        model.freeze_batch_norm()
        assert _num_folded(model) > 0


def _num_folded(model):
    layers = [module for module in model.modules() if getattr(module, "pair", None)]
    assert all(layer in (layer.pair.convolution, layer.pair.normalization) for layer in layers)
    return sum(layer.pair.is_folded(layer) for layer in layers)


@pytest.mark.parametrize(
    "architecture",
    "test_efficientnet test_resnet test_byobnet test_coatnet densenet121 resnetv2_18 mobilenetv3_small_050 "
    "regnetx_002 hrnet_w18_small levit_128s repvit_m1 ghostnet_050".split(),
)
@pytest.mark.slow
def test_real_architectures_keep_outputs_feature_maps_and_gradients(architecture):
    torch.manual_seed(0)
    module = timm.create_model(architecture, num_classes=0).eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.1, 0.1)
            part.running_var.uniform_(0.5, 2)
    plain, folded, num_folded = both(module)
    assert num_folded > 0 or architecture == "resnetv2_18"  # which normalizes before it convolves
    # Two images: of one, torch 2.15's BatchNorm has wrong gradients where they arrive transposed, as in LeViT.
    pixels = torch.randn(2, 3, *module.default_cfg["input_size"][1:], dtype=torch.float64)
    expected, got = plain(pixels), folded(pixels)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    if hasattr(plain, "forward_intermediates"):
        for maps, other in zip(*(m.forward_intermediates(pixels)[1] for m in (plain, folded)), strict=True):
            torch.testing.assert_close(other, maps, rtol=1e-9, atol=1e-9)
    expected.sum().backward()
    got.sum().backward()
    for (name, parameter), other in zip(plain.named_parameters(), folded.parameters(), strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(
                other.grad, parameter.grad, rtol=1e-7, atol=1e-7, msg=lambda fault, name=name: f"{name}: {fault}"
            )
