"""What `encode_image` and `encode_text` share: single inputs and lists, batches, the bar, and eval mode meanwhile."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

BAR_AFTER_S = 2.0  # a bar that flashes by only disturbs


@torch.no_grad()
def encode(
    model: Any,
    inputs: Any,
    kinds: tuple[type, ...],
    embed: Callable[[list[tuple[int, Any]]], Tensor],
    order: Callable[[Any], int] | None,
    batch_size: int,
    show_progress_bar: bool | None,
    convert_to_tensor: bool,
    truncate_dim: int | None,
) -> np.ndarray | Tensor:
    """Embed one input or many, batch by batch, in eval mode.

    Args:
        model: the dual encoder or a half of it.
        inputs: one input, or any iterable of inputs.
        kinds: the types that one input may have.
        embed: a batch of (position, input) to features (N, D) before normalization.
        order: inputs for which it is least come first, for which all are held; the result keeps the order given. None
            takes them as they come, a batch at a time.
        batch_size: inputs per call of `embed`.
        show_progress_bar: draw one, or not; None draws it where the work takes longer than `BAR_AFTER_S`.
        convert_to_tensor: give a tensor on the model's device rather than an array.
        truncate_dim: keep the first so many of the D dimensions; None keeps all.

    Returns:
        (N, truncate_dim) float32, rows of length 1; (truncate_dim,) for one input that is not in a list.

    Raises:
        ValueError: `batch_size` or `truncate_dim` is out of range, or an input is of no allowed type.
    """
    width = model.config.projection_dim
    kept = width if truncate_dim is None else _check_whole("truncate_dim", truncate_dim, most=width)
    _check_whole("batch_size", batch_size)
    is_single = isinstance(inputs, kinds)
    numbered: Iterator[tuple[int, Any]] = enumerate(_checked([inputs] if is_single else inputs, kinds))
    if order is not None:
        numbered = iter(sorted(numbered, key=lambda item: order(item[1])))
    total = 1 if is_single else len(inputs) if hasattr(inputs, "__len__") else None
    delay = BAR_AFTER_S if show_progress_bar is None else 0
    positions: list[int] = []
    embeds = [torch.empty(0, kept)]
    with eval_mode(model), logging.tqdm(total=total, delay=delay, disable=show_progress_bar is False) as bar:
        while batch := list(itertools.islice(numbered, batch_size)):
            features = embed(batch)
            embeds.append(F.normalize(features.float()[:, :kept], dim=-1).cpu())
            positions += [position for position, _ in batch]
            bar.update(len(batch))
    result = torch.empty(len(positions), kept)
    result[positions] = torch.cat(embeds)
    result = result[0] if is_single else result
    return result.to(model.device) if convert_to_tensor else result.numpy()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Keep a model in eval mode for a while, and leave the mode of every module as it was found.

    Only the modules that train are touched, one by one: `train()` walks over all of them, and would put what somebody
    has set to eval mode, such as the BatchNorm of a frozen tower, into train mode. Threads that share a model call its
    `eval()` first: of several that find it in train mode, the first to end would put it back under the others.

    Args:
        model: any module.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _checked(inputs: Any, kinds: tuple[type, ...]) -> Iterator[Any]:
    """Give the inputs one by one; what is no input ends it, at once where all of them are there already."""
    allowed = ", ".join(kind.__name__ for kind in kinds)
    try:
        items = iter(inputs)
    except TypeError:
        kind = type(inputs).__name__
        raise ValueError(f"An input of type {kind} is not allowed; give {allowed}, or a list of these.") from None

    def check(number: int, item: Any) -> Any:
        if not isinstance(item, kinds):
            raise ValueError(f"Input number {number} is of type {type(item).__name__}; give {allowed}.")
        return item

    if isinstance(inputs, (list, tuple)):
        items = iter([check(number, item) for number, item in enumerate(inputs, start=1)])
    return (check(number, item) for number, item in enumerate(items, start=1))


def _check_whole(name: str, value: Any, most: int | None = None) -> int:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < 1 or (most is not None and value > most):
        end = "at least 1" if most is None else f"from 1 to {most}"
        raise ValueError(f"{name}={value!r} is not allowed; use a whole number {end}.")
    return value
