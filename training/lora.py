"""LoRA: train small low-rank updates of a tower's layers in place of the layers (Hu et al., 2021, arXiv:2106.09685).

A layer of m inputs and n outputs computes with W + (alpha / rank) B A in place of its weight W. W stays as it was
pretrained; trained are A (rank, m) and B (n, rank), and as B starts at zero, so does the update. In the end the update
is added to W, so that who uses the model needs no `peft`.

To resume a run exactly, merged weights are not enough, since W, A and B cannot be told from their sum. Build the model
as at the start, call `add_lora`, load the merged weights with `strict=False`, then call `load_lora_state`. The merged
weights bring heads, temperature and BatchNorm's statistics; to a W they do nothing, as it has another name under its
adapter.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modeling_clipmini import ClipMiniModel
from modeling_clipmini.encoding_clipmini import eval_mode
from modeling_clipmini.processing_clipmini import image_processor_for

logger = logging.getLogger(__name__)

TOWERS = {"vision": "vision_model", "text": "text_model"}
ADAPTER = "default"


def add_lora(
    model: ClipMiniModel, towers: Sequence[str], rank: int = 8, alpha: int = 16, dropout: float = 0.0
) -> None:
    """Freeze towers, and give their layers low-rank updates to train; heads and temperature are left as they are.

    Adapted are all linear layers, those of attention and of the MLPs, and 1x1 convolutions in one group, which are
    linear layers over the channels of each pixel. Not adapted are

    - larger convolutions, whose weight is no matrix, and depthwise ones, which have few weights as it is;
    - layers that do more than multiply by their weight, as NFNet's, which standardize it: an update that is run beside
      such a layer cannot be added to its weight;
    - layers whose weight the tower reads without calling them, as BEiT's: an adapter would never run. A warning names
      these.

    Args:
        model: changed in place; its outputs are the same as before.
        towers: "vision", "text" or both.
        rank: the rank of each update; a layer of m inputs and n outputs trains rank (m + n) numbers in place of m n.
        alpha: updates are scaled by alpha / rank.
        dropout: the share, in [0, 1), of an adapter's inputs that training sets to zero.

    Raises:
        ValueError: peft is not installed, an argument is out of its range, or a tower has adapters already or no layer
            that could take one.
    """
    try:
        import peft
    except ImportError:
        raise ValueError("LoRA needs peft, which is not installed: pip install 'clipmini[lora]'.") from None
    if unknown := [tower for tower in towers if tower not in TOWERS]:
        raise ValueError(f"There is no tower {unknown[0]!r} for LoRA; name one of {', '.join(TOWERS)}, or both.")
    if rank < 1 or alpha < 1:
        raise ValueError(f"LoRA's rank={rank} and alpha={alpha} must be at least 1.")
    if not 0 <= dropout < 1:
        raise ValueError(f"LoRA's dropout={dropout} must be at least 0 and under 1.")
    layers = {tower: _find_layers(model, tower) for tower in dict.fromkeys(towers)}
    for tower, names in layers.items():
        module = model.get_submodule(TOWERS[tower])
        pattern = "|".join(map(re.escape, names))  # whole names: in a list, peft would compare their ends
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern)
        peft.inject_adapter_in_model(config, module, adapter_name=ADAPTER)  # this freezes what was there
        num_trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        logger.info("LoRA on the %s tower: %d layers, %d parameters to train", tower, len(names), num_trained)
    model.train(model.training)  # new modules are in training mode, whatever the model is in


def merge_lora(model: ClipMiniModel) -> None:
    """Add the updates to the weights and take the adapters out: the model is a plain one again, its towers frozen.

    Args:
        model: changed in place; its outputs are the same as before. Without adapters it is left as it is.
    """
    for name, layer in _adapted_layers(model).items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())


@torch.no_grad()
def merged_state_dict(model: ClipMiniModel) -> dict[str, Tensor]:
    """Give the weights that the model would have after `merge_lora`, without changing it.

    Args:
        model: with adapters or without.

    Returns:
        The state dict of the plain model. Only the adapted weights are copies.
    """
    layers, adapters = _adapted_layers(model), _adapter_parameters(model)
    plain_names = {
        f"{name}.base_layer.{key}": f"{name}.{key}"
        for name, layer in layers.items()
        for key in layer.get_base_layer().state_dict()
    }
    state = {plain_names.get(key, key): value for key, value in model.state_dict().items() if key not in adapters}
    for name, layer in layers.items():
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = weight + layer.get_delta_weight(ADAPTER).to(weight.dtype)
    return state


def lora_state(model: ClipMiniModel) -> dict[str, Tensor]:
    """Give the adapters' own weights, which merged weights no longer hold.

    Args:
        model: with adapters.

    Returns:
        A and B of every adapted layer, by their names in the model's state dict; copies on the CPU, fit to be saved.
    """
    return {
        name: parameter.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, parameter in _adapter_parameters(model).items()
    }


@torch.no_grad()
def load_lora_state(model: ClipMiniModel, state: Mapping[str, Tensor]) -> None:
    """Put back what `lora_state` gave.

    Args:
        model: with the adapters that it had then: the same towers and rank.
        state: as `lora_state` gives.

    Raises:
        ValueError: the state is of other adapters; the model is as it was.
    """
    own = _adapter_parameters(model)
    here = {name: tuple(parameter.shape) for name, parameter in own.items()}
    saved = {name: tuple(value.shape) for name, value in state.items()}
    if here != saved:
        name = next(name for name in {**here, **saved} if here.get(name) != saved.get(name))
        raise ValueError(
            f"The saved LoRA adapters are not this model's: {name} has shape {saved.get(name)} there and "
            f"{here.get(name)} here. Resume with the towers and the rank that they were trained with."
        )
    for name, parameter in own.items():
        parameter.copy_(state[name])


def _find_layers(model: ClipMiniModel, tower: str) -> list[str]:
    """Name the layers of a tower that can take an adapter and that a forward pass calls."""
    module = model.get_submodule(TOWERS[tower])
    if _adapted_layers(module):
        raise ValueError(f"The {tower} tower has LoRA adapters already; merge them first.")
    candidates = {layer: name for name, layer in module.named_modules() if _is_linear(layer)}
    called: set[str] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda layer, _: called.add(candidates[layer]))  # called.add gives None
        for layer in candidates
    ]
    try:
        with eval_mode(model):  # BatchNorm's statistics must not see the blank input
            _run_blank(model, tower)
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise ValueError(
            f"The {tower} tower ({type(module).__name__}) has no linear layer or 1x1 convolution for LoRA; "
            "train the tower itself."
        )
    if passed_over := [name for name in candidates.values() if name not in called]:
        logger.warning(
            "%d layers of the %s tower get no LoRA adapter, as it does not call them itself: %s",
            *(len(passed_over), tower, ", ".join(passed_over)),
        )
    return [name for name in candidates.values() if name in called]


def _is_linear(layer: nn.Module) -> bool:
    # The type itself: a subclass may do more than multiply by its weight.
    if type(layer) is nn.Conv2d:
        return layer.kernel_size == (1, 1) and layer.groups == 1
    return type(layer) is nn.Linear


@torch.no_grad()
def _run_blank(model: ClipMiniModel, tower: str) -> None:
    if tower == "vision":
        size = image_processor_for(model.config.vision_config).crop_size
        model.pool_images(torch.zeros(1, 3, size["height"], size["width"], device=model.device))
    else:
        model.pool_texts(torch.zeros(1, 2, dtype=torch.long, device=model.device))


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    # Known by the attribute, since peft need not be installed where there is none.
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{key}": parameter
        for name, layer in _adapted_layers(model).items()
        for key, parameter in layer.named_parameters()
        if not key.startswith("base_layer.")
    }
