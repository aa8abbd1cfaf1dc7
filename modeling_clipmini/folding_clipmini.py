"""Compute a convolution and the frozen BatchNorm behind it as one convolution, for inference and in training.

In eval mode a BatchNorm multiplies each channel by a number and adds another. A convolution with other weights does
both at once (Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 3.2): activations are passed over once less,
and none are kept between the two for the backward pass.

What is trained and saved stays the two layers: the joint weights are made of theirs in each forward pass, so that
gradients reach both, and nothing has to be undone.
"""

import contextlib
import copy
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, pad_same
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

logger = logging.get_logger(__name__)

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_kept: ContextVar[dict["FoldedPair", tuple[Tensor, Tensor]] | None] = ContextVar("kept", default=None)


def fold_batch_norms(module: nn.Module) -> int:
    """Fold each BatchNorm whose input is the output of a convolution, and of nothing else, while it is in eval mode.

    Names, weights and, up to rounding, outputs stay the same. Where one of the two is replaced, as LoRA does, or has a
    hook that could see what is between them, both run as before; so they do in a copy of one of them alone.

    Args:
        module: a timm model; left as it is if it does not run on the meta device.

    Returns:
        The number of folded BatchNorms.
    """
    modules = dict(module.named_modules())
    if not any(type(part) in NORMALIZATIONS for part in modules.values()):
        return 0
    try:
        pairs = _find_pairs(module)
    except Exception as error:  # the model's own code runs on tensors without values, and can raise anything
        logger.debug(f"{type(module).__name__} does not run on the meta device, so nothing is folded: {error}")
        return 0
    for convolution, normalization in pairs:
        pair = FoldedPair(module, convolution, normalization)
        for name, kinds in ((convolution, CONVOLUTIONS), (normalization, NORMALIZATIONS)):
            layer = modules[name]
            layer.__class__ = kinds[type(layer)]
            layer.pair = pair
    return len(pairs)


@torch.no_grad()
def _find_pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Return the names of the convolutions and BatchNorms to fold, as seen in a run without values.

    `torch.fx` would find them too, but changes how modules are called in all threads meanwhile.
    """
    empty = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in module.buffers()}
    empty |= {id(weight): nn.Parameter(torch.empty_like(weight, device="meta")) for weight in module.parameters()}
    shadow: Any = copy.deepcopy(module, empty)
    shadow.eval()
    layers = {part: name for name, part in shadow.named_modules()}
    runs: list[tuple[nn.Module, Tensor, Tensor]] = []  # of each layer, in order, with what it takes and returns
    for part in layers:
        if type(part) in CONVOLUTIONS or type(part) in NORMALIZATIONS:
            part.register_forward_hook(lambda part, inputs, output: runs.append((part, inputs[0], output)))
    size = (getattr(shadow, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    pixels = torch.empty(2, *size, device="meta", dtype=next(shadow.parameters()).dtype)
    with _Uses() as uses:
        outputs = [shadow(pixels)]
        if hasattr(shadow, "forward_intermediates"):  # GhostNet, for one, returns maps from before a BatchNorm
            outputs.append(shadow.forward_intermediates(pixels))
    returned = {id(leaf) for leaf in tree_leaves(outputs)}
    sources = {id(output): part for part, _, output in runs if type(part) in CONVOLUTIONS}
    found: dict[nn.Module, set[nn.Module | None]] = {}  # of each BatchNorm, the convolutions that may be folded
    for part, hidden, _ in runs:
        if type(part) in NORMALIZATIONS:
            is_alone = uses.count(hidden) == 1 and id(hidden) not in returned
            found.setdefault(part, set()).add(sources.get(id(hidden)) if is_alone else None)
    pairs = []
    for normalization, convolutions in found.items():
        (convolution, *others) = convolutions
        if convolution is None or others or getattr(convolution, "padding_mode", None) != "zeros":
            continue
        num_runs = [sum(part is layer for part, _, _ in runs) for layer in (convolution, normalization)]
        if num_runs[0] == num_runs[1]:
            pairs.append((layers[convolution], layers[normalization]))
    return pairs


class _Uses(TorchFunctionMode):
    """Counts how often each tensor is used. Tensors are kept, so that no two have the same id."""

    def __init__(self) -> None:
        super().__init__()
        self.used: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if made:  # it is no question, such as how many dimensions a tensor has
            self.used += [*made, *(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))]
        return result

    def count(self, tensor: Tensor) -> int:
        """Return how often a tensor was used, apart from the call that made it."""
        return sum(used is tensor for used in self.used) - 1


class FoldedPair:
    """A convolution and the BatchNorm behind it.

    Args:
        module: the model that holds both.
        convolution: the convolution's name in it.
        normalization: the BatchNorm's.
    """

    def __init__(self, module: nn.Module, convolution: str, normalization: str) -> None:
        self.module = module
        self.places = []
        for name in (convolution, normalization):
            owner, _, attribute = name.rpartition(".")
            self.places.append((module.get_submodule(owner), attribute))
        self.convolution: Any = module.get_submodule(convolution)
        self.normalization: Any = module.get_submodule(normalization)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FoldedPair | None":
        """Copy the pair with the model; without the model, a copied layer belongs to no pair."""
        if id(self.module) not in memo:
            return None
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce__(self) -> Any:
        """Pickle as None: a single layer would take the model along."""
        return type(None), ()

    def is_folded(self, layer: nn.Module) -> bool:
        """Return whether the statistics are frozen, both layers in their places, and nobody looks between them."""
        layers = self.convolution, self.normalization
        return (
            not self.normalization.training
            and self.normalization.running_var is not None
            and layer in layers
            and all(getattr(*place) is each for place, each in zip(self.places, layers, strict=True))
            # Hooks, and what replaces a layer's `forward`, as accelerate does to move weights.
            and not any(getattr(each, name) for each in layers for name in HOOKS)
            and not any("forward" in vars(each) for each in layers)
        )

    def joint_weights(self) -> tuple[Tensor, Tensor]:
        """Return the weight, (out, in / groups, height, width), and the bias, (out,), of the two layers as one."""
        kept = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else _kept.get()
        if kept is not None and self in kept:
            return kept[self]
        convolution, normalization = self.convolution, self.normalization
        scale = (normalization.running_var + normalization.eps).rsqrt()  # (out,)
        shift = -normalization.running_mean
        if convolution.bias is not None:
            shift = shift + convolution.bias
        if normalization.affine:
            scale = scale * normalization.weight
            shift = shift * scale + normalization.bias
        else:
            shift = shift * scale
        weight = convolution.weight * scale[:, None, None, None]
        joint = weight.to(convolution.weight.dtype), shift.to(convolution.weight.dtype)
        if kept is not None:
            kept[self] = joint
        return joint


@contextlib.contextmanager
def keep_joint_weights() -> Iterator[None]:
    """Make joint weights once in a `with` block, not in every forward pass without gradients; no weight may change."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


class _Layer:
    """A layer that may belong to a pair; its class is shown by the name that it had."""

    pair: FoldedPair | None = None

    def _get_name(self) -> str:
        return type(self).__bases__[-1].__name__


class _FoldedConvolution(_Layer):
    def forward(self: Any, hidden: Tensor) -> Tensor:
        """Run the convolution, with the joint weights if the pair is folded."""
        if self.pair is None or not self.pair.is_folded(self):
            return super().forward(hidden)  # type: ignore[misc]
        weight, bias = self.pair.joint_weights()
        padding: Any = self.padding
        if isinstance(self, Conv2dSame):
            kernel, stride, dilation = map(list, (self.kernel_size, self.stride, self.dilation))
            hidden, padding = pad_same(hidden, kernel, stride, dilation), (0, 0)
        options = self.stride, padding, self.dilation, self.groups
        in_transform = torch._C._functorch.peek_interpreter_stack() is not None  # vmap, for one
        is_plain = not (in_transform or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        if is_plain and bias.requires_grad and hidden.device.type == "cpu":
            return _Convolution.apply(hidden, weight, bias, *options)
        return F.conv2d(hidden, weight, bias, *options)


class _FoldedNormalization(_Layer):
    def forward(self: Any, hidden: Tensor) -> Tensor:
        """Run the BatchNorm; if the pair is folded, only the activation that timm's has behind it."""
        if self.pair is None or not self.pair.is_folded(self):
            return super().forward(hidden)  # type: ignore[misc]
        return self.act(self.drop(hidden)) if isinstance(self, BatchNormAct2d) else hidden


class _FoldedConv2d(_FoldedConvolution, nn.Conv2d):
    pass


class _FoldedConv2dSame(_FoldedConvolution, Conv2dSame):
    pass


class _FoldedBatchNorm2d(_FoldedNormalization, nn.BatchNorm2d):
    pass


class _FoldedBatchNormAct2d(_FoldedNormalization, BatchNormAct2d):
    pass


# Exactly these: a subclass may compute something else.
CONVOLUTIONS: dict[type, type] = {nn.Conv2d: _FoldedConv2d, Conv2dSame: _FoldedConv2dSame}
NORMALIZATIONS: dict[type, type] = {nn.BatchNorm2d: _FoldedBatchNorm2d, BatchNormAct2d: _FoldedBatchNormAct2d}


class _Convolution(torch.autograd.Function):
    """`F.conv2d` with a faster gradient of the bias: oneDNN's takes longer than the BatchNorm that is folded away."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.options = options
        return F.conv2d(hidden, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        of_hidden, of_weight, _ = torch.ops.aten.convolution_backward(
            *(gradient, hidden, weight, None, stride, padding, dilation, False, (0, 0), groups),
            (*ctx.needs_input_grad[:2], False),
        )
        return of_hidden, of_weight, gradient.sum((0, 2, 3)), None, None, None, None
