"""LoRA: train small low-rank updates of a tower's layers in place of the layers (Hu et al., 2021, arXiv:2106.09685).

A layer with m inputs and n outputs computes with W + (alpha / rank) B A in place of its weight W. W stays as it was
pretrained; A (rank, m) and B (n, rank) are trained, and since B starts at zero, so does the update.

`peft` does the work. A checkpoint is an adapter in its format, which `PeftModel.from_pretrained(model, folder)` loads
too. Beside A and B the adapter holds everything else that was trained, such as the heads and the temperature. At the
end of a run the updates are added to the weights, and using the model takes no `peft`.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modeling_clipmini import ClipMiniModel
from modeling_clipmini.encoding_clipmini import eval_mode
from modeling_clipmini.folding_clipmini import CONVOLUTIONS
from modeling_clipmini.processing_clipmini import image_processor_for

logger = logging.getLogger(__name__)

TOWERS = {"vision": "vision_model", "text": "text_model"}
PREFIX = "base_model.model."  # what peft writes before each name in the state dict of the model
WEIGHTS_FILE = "adapter_model.safetensors"  # peft's name for it


@dataclass(frozen=True)
class Lora:
    """Which towers train low-rank updates.

    Attributes:
        parts: "vision", "text" or a list of both.
        rank: rank of each update, at least 1; alpha is twice the rank.

    Raises:
        ValueError: a part is unknown, or the rank is below 1.
    """

    parts: str | list[str]
    rank: int = 8

    def __post_init__(self) -> None:
        if not self.towers or not set(self.towers) <= set(TOWERS):
            raise ValueError(f"lora.parts={self.parts!r} is not allowed; use vision, text or [vision, text].")
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} is not allowed; use at least 1.")

    @property
    def towers(self) -> list[str]:
        """The parts as a list."""
        return [self.parts] if isinstance(self.parts, str) else list(self.parts)


def add_lora(model: ClipMiniModel, towers: Sequence[str], rank: int = 8) -> None:
    """Freeze towers, and add trainable low-rank updates to their layers; the rest of the model is left as it is.

    All linear layers get one, in attention and MLPs, and so do 1x1 convolutions in one group, which are linear layers
    over the channels of each pixel. The following do not:

    - larger convolutions, whose weight is not a matrix, and depthwise ones, which have few weights anyway;
    - layers that do more than multiply by their weight, such as NFNet's, which standardize it: an update that runs
      beside such a layer cannot be added to its weight;
    - layers whose weight the tower reads without calling them, such as BEiT's: their update would never run. A warning
      lists these.

    Args:
        model: changed in place; its outputs stay the same.
        towers: "vision", "text" or both.
        rank: rank of each update; a layer with m inputs and n outputs trains rank (m + n) numbers in place of m n.

    Raises:
        ValueError: peft is not installed, or a tower has adapters already or no layer that could take one.
    """
    try:
        import peft
    except ImportError:
        raise ValueError("LoRA needs peft, which is not installed: pip install 'clipmini[lora]'.") from None
    if has_adapters(model):
        raise ValueError("The model has LoRA adapters already; merge them first.")
    layers = [f"{TOWERS[tower]}.{name}" for tower in towers for name in _find_layers(model, tower)]
    adapted = tuple(f"{TOWERS[tower]}." for tower in towers)
    trained = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith(adapted)
    ]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="|".join(map(re.escape, layers)),  # of a list, peft would compare the ends of names
        base_model_name_or_path=model.name_or_path or None,
    )
    peft.inject_adapter_in_model(config, model)  # which freezes all that was there
    for parameter in trained:
        parameter.requires_grad_(True)
    model.train(model.training)  # new modules are in training mode, whichever the model is in


def has_adapters(model: ClipMiniModel) -> bool:
    """Return whether `add_lora` has changed the model, and `merge_lora` not yet."""
    return bool(getattr(model, "peft_config", None))


def save_adapter(model: ClipMiniModel, folder: Path) -> None:
    """Save everything that training changes, as an adapter of peft.

    Args:
        model: with adapters.
        folder: gets `adapter_config.json` and `adapter_model.safetensors`; made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = model.peft_config["default"]
    config.save_pretrained(folder)
    state = {PREFIX + name: value.detach().cpu().contiguous() for name, value in _adapter_state(model).items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_adapter(model: ClipMiniModel, folder: Path) -> None:
    """Load what `save_adapter` saved, to continue training.

    Args:
        model: with adapters on the same towers and of the same rank.
        folder: the adapter's.

    Raises:
        ValueError: the adapter does not fit the model, which is left as it was.
    """
    from peft import set_peft_model_state_dict

    state = {name.removeprefix(PREFIX): value for name, value in load_file(folder / WEIGHTS_FILE).items()}
    saved = {name: tuple(value.shape) for name, value in state.items()}
    here = {name: tuple(value.shape) for name, value in _adapter_state(model).items()}
    if here != saved:
        name = next(name for name in {**here, **saved} if here.get(name) != saved.get(name))
        raise ValueError(
            f"{folder} is not an adapter of this model: {name} has shape {saved.get(name)} there and {here.get(name)} "
            "here. Resume with the lora.parts and lora.rank that it was trained with."
        )
    set_peft_model_state_dict(model, state)


def merge_lora(model: ClipMiniModel) -> None:
    """Add the updates to the weights and remove the adapters: the model is a plain one again, its towers frozen.

    Args:
        model: changed in place; its outputs stay the same. Without adapters it is left as it is.
    """
    if not has_adapters(model):
        return
    from peft.tuners.lora import LoraLayer

    # Not `merge_and_unload`, which takes any module with a `base_layer` for an adapter, and timm's DLA has some.
    for name, layer in [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]:
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


def _adapter_state(model: ClipMiniModel) -> dict[str, Tensor]:
    """Return A and B of each layer, the other trained parameters, and the buffers, which training moves as well."""
    from peft import get_peft_model_state_dict

    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    others = {name: value for name, value in model.state_dict().items() if name not in frozen and ".lora_" not in name}
    return {**get_peft_model_state_dict(model, save_embedding_layers=False), **others}


def _find_layers(model: ClipMiniModel, tower: str) -> list[str]:
    """List the layers of a tower that can take an update and that a forward pass calls."""
    module = model.get_submodule(TOWERS[tower])
    candidates = {layer: name for name, layer in module.named_modules() if _is_linear(layer)}
    called: set[str] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda layer, _: called.add(candidates[layer]))  # returns None
        for layer in candidates
    ]
    try:
        with torch.no_grad(), eval_mode(model):  # BatchNorm's statistics must not see the blank input
            if tower == "vision":
                size = image_processor_for(model.config.vision_config).crop_size
                model.pool_images(torch.zeros(1, 3, size["height"], size["width"], device=model.device))
            else:
                model.pool_texts(torch.zeros(1, 2, dtype=torch.long, device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise ValueError(
            f"The {tower} tower ({type(module).__name__}) has no linear layer or 1x1 convolution for LoRA; "
            "train the tower itself."
        )
    if not_called := [name for name in candidates.values() if name not in called]:
        logger.warning(
            "%d layers of the %s tower get no LoRA update, since the tower does not call them: %s",
            *(len(not_called), tower, ", ".join(not_called)),
        )
    return [name for name in candidates.values() if name in called]


def _is_linear(layer: nn.Module) -> bool:
    # The type itself: a subclass may do more than multiply by its weight. One that may be folded still does no more.
    if isinstance(layer, nn.Conv2d) and type(layer) in (nn.Conv2d, CONVOLUTIONS[nn.Conv2d]):
        return layer.kernel_size == (1, 1) and layer.groups == 1
    return type(layer) is nn.Linear
