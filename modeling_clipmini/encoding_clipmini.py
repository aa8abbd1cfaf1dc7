"""The one loop that turns images and captions into vectors, and what `encode_image` and `encode_text` share."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from .folding_clipmini import keep_joint_weights

BAR_AFTER_S = 2.0  # a bar that only flashes by is a distraction


@torch.no_grad()
def embed_in_batches(
    inputs: Iterable[Any],
    embed: Callable[[list[Any]], Tensor],
    batch_size: int,
    order: Callable[[Any], int] | None = None,
    on_progress: Callable[[int], Any] | None = None,
) -> Tensor:
    """Embed N inputs, batch by batch: training, search, evaluation and the server all do it here.

    Args:
        inputs: whatever `embed` takes, consumed one batch at a time.
        embed: maps a batch, a list of n inputs, to (n, ...) vectors on any device.
        batch_size: inputs per call of `embed`.
        order: sort key; all inputs are then held at once and processed in this order. Captions that are sorted by
            length need little padding.
        on_progress: called after each batch with its number of inputs, such as the `update` of a progress bar.

    Returns:
        (N, ...) float32 on the CPU, in the order of the inputs; (0,) if there are none.
    """
    indexed: Iterator[tuple[int, Any]] = enumerate(inputs)
    if order is not None:
        indexed = iter(sorted(indexed, key=lambda item: order(item[1])))
    indices: list[int] = []
    results: list[Tensor] = []
    with keep_joint_weights():
        while batch := list(itertools.islice(indexed, batch_size)):
            results.append(embed([item for _, item in batch]).float().cpu())
            indices += [index for index, _ in batch]
            if on_progress is not None:
                on_progress(len(batch))
    if not results:
        return torch.empty(0)
    joined = torch.cat(results)
    return joined if order is None else torch.empty_like(joined).index_copy_(0, torch.tensor(indices), joined)


def channels_last(pixel_values: Tensor) -> Tensor:
    """Lay images out channels last: convolutions run a quarter to a half faster, on the CPU and under autocast."""
    return pixel_values.contiguous(memory_format=torch.channels_last)


def by_length(text: str) -> int:
    """Sort captions by length, the longest first: the first batch then takes the most memory."""
    return -len(text)


def encode(
    model: Any,
    parts: Sequence[nn.Module],
    inputs: Any,
    kinds: tuple[type, ...],
    prepare: Callable[[int, Any], Any],
    embed: Callable[[list[Any]], Tensor],
    order: Callable[[Any], int] | None,
    batch_size: int,
    show_progress_bar: bool | None,
    convert_to_tensor: bool,
    truncate_dim: int | None,
) -> np.ndarray | Tensor:
    """Check one input or many, and embed them in eval mode.

    Args:
        model: the dual encoder or a half of it.
        parts: its modules that `embed` runs.
        inputs: one input, or any iterable of inputs.
        kinds: the types that one input may have.
        prepare: maps an input and its index to what `embed` takes; called for one input at a time.
        embed: maps a batch of prepared inputs to features (n, D) before normalization.
        order: as in `embed_in_batches`.
        batch_size: as in `encode_image`, like the rest.
        show_progress_bar: see there.
        convert_to_tensor: see there.
        truncate_dim: see there.

    Returns:
        (N, truncate_dim) float32, rows of length 1; (truncate_dim,) for one input outside a list.

    Raises:
        ValueError: `batch_size` or `truncate_dim` is out of range, or an input has the wrong type.
    """
    width = model.config.projection_dim
    num_kept = width if truncate_dim is None else _check_whole("truncate_dim", truncate_dim, maximum=width)
    _check_whole("batch_size", batch_size)
    is_single = isinstance(inputs, kinds)
    items = _check_types([inputs] if is_single else inputs, kinds)
    prepared = (prepare(index, item) for index, item in enumerate(items))
    total = 1 if is_single else len(inputs) if hasattr(inputs, "__len__") else None
    delay = BAR_AFTER_S if show_progress_bar is None else 0
    is_disabled = is_single if show_progress_bar is None else not show_progress_bar
    with eval_mode(*parts), logging.tqdm(total=total, delay=delay, disable=is_disabled) as bar:
        features = embed_in_batches(prepared, embed, batch_size, order, bar.update)
    result = F.normalize(features[:, :num_kept], dim=-1) if len(features) else torch.empty(0, num_kept)
    result = result[0] if is_single else result
    return result.to(model.device) if convert_to_tensor else result.numpy()


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Keep models in eval mode inside a `with` block, then restore the mode of every module.

    Only modules in train mode are touched, one by one: `train()` would switch all of them, even those that somebody
    has put in eval mode, such as the BatchNorm of a frozen tower. Threads that share a model must call its `eval()`
    first: if several find it in train mode, the first to finish restores that under the others.
    """
    training = [module for model in models for module in _find_training(model)]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _find_training(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules in train mode; `modules()` also makes names, for a tenth of the time that a caption takes."""
    if module.training:
        yield module
    for child in module._modules.values():
        if child is not None:
            yield from _find_training(child)


def _check_types(inputs: Any, kinds: tuple[type, ...]) -> Iterator[Any]:
    """Return an iterator over the inputs that raises at one of the wrong type; a list is checked at once."""
    allowed = ", ".join(kind.__name__ for kind in kinds)
    try:
        items = iter(inputs)
    except TypeError:
        kind = type(inputs).__name__
        raise ValueError(f"An input of type {kind} is not allowed; pass {allowed}, or a list of these.") from None

    def check() -> Iterator[Any]:
        for number, item in enumerate(items, start=1):
            if not isinstance(item, kinds):
                raise ValueError(f"Input number {number} is of type {type(item).__name__}; pass {allowed}.")
            yield item

    return iter(list(check())) if isinstance(inputs, (list, tuple)) else check()


def _check_whole(name: str, value: Any, maximum: int | None = None) -> int:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < 1 or (maximum is not None and value > maximum):
        allowed = "at least 1" if maximum is None else f"from 1 to {maximum}"
        raise ValueError(f"{name}={value!r} is not allowed; use a whole number {allowed}.")
    return value
