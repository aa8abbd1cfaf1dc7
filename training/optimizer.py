"""Learning rate and weight decay of every parameter."""

import re
from typing import Any

from timm.models import group_parameters
from torch import nn

from modeling_clipmini import ClipMiniModel

from .arguments import ClipMiniTrainingArguments

TOWERS = ("vision_model", "text_model")


def parameter_groups(model: ClipMiniModel, args: ClipMiniTrainingArguments) -> list[dict[str, Any]]:
    """Split the trainable parameters by learning rate and weight decay.

    Each tower has its own rate, the heads and the temperature another. Within a tower the rate falls by `layer_decay`
    from layer to layer towards the input: what a tower learnt first, edges and word senses, fits any pictures and
    captions, and a few thousand pairs should not unlearn it.

    Weight decay pulls matrices and kernels only: on norms and biases it does nothing useful, on the temperature it
    would be a pull towards a logit scale of 1.

    Args:
        model: the dual encoder.
        args: `learning_rate` is that of the heads and the temperature; the towers' default to it.

    Returns:
        Groups for a torch optimizer; those of heads come with `part` "heads", those of towers with the tower's name.
    """
    rates = {"heads": args.learning_rate}
    for tower, rate in zip(TOWERS, (args.vision_learning_rate, args.text_learning_rate), strict=True):
        rates[tower] = args.learning_rate if rate is None else rate
    heights = _heights_over_layers(model) if args.layer_decay != 1 else {}
    groups: dict[tuple[str, int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((tower for tower in TOWERS if name.startswith(f"{tower}.")), "heads")
            groups.setdefault((part, heights.get(name, 0), parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates[part] * args.layer_decay**height,
            "weight_decay": args.weight_decay if decays else 0.0,
            "part": part,
        }
        for (part, height, decays), parameters in groups.items()
    ]


def _heights_over_layers(model: ClipMiniModel) -> dict[str, int]:
    """Say of each tower parameter how many layers of its tower come after its own."""
    timm_model = model.vision_model.timm_model
    matcher: Any = getattr(timm_model, "group_matcher", None)
    if matcher is None:
        raise ValueError(
            f"layer_decay cannot be used: timm does not say how deep the layers of {type(timm_model).__name__} lie. "
            "Leave it at 1."
        )
    groups = group_parameters(timm_model, matcher(coarse=False))
    layers = {f"vision_model.timm_model.{name}": depth for depth, names in groups.items() for name in names}
    heights = {name: max(groups) - depth for name, depth in layers.items()}

    text_layers = {name: _text_layer(name) for name, _ in model.text_model.named_parameters()}
    top = max(text_layers.values())
    return heights | {f"text_model.{name}": top - layer for name, layer in text_layers.items()}


def _text_layer(name: str) -> int:
    """Number a text encoder's layers from 1, and what comes before them 0."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) + 1 if number else 0
