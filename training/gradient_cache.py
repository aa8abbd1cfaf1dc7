"""Gradient cache: the gradient of a batch of any size, in the memory of one chunk.

A contrastive loss needs all embeddings of a batch at once, but a tower needs only its own inputs. So the batch is
embedded chunk by chunk without a graph, and the loss yields the gradient of each embedding. Then each chunk is
embedded again, with a graph, and these gradients are propagated through the towers. This costs one more forward pass.
Source: Gao et al., 2021, "Scaling deep contrastive learning batch size under memory limited setup".
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import get_device_states, set_device_states

Batch = Mapping[str, Tensor]


def moving_batch_norms(model: nn.Module) -> list[str]:
    """Return the names of the BatchNorm layers that use the statistics of their input, as in train mode."""
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]


def check_batch_norm(model: nn.Module) -> None:
    """Raise if a BatchNorm layer is in train mode.

    Raises:
        ValueError: a layer would use the statistics of a chunk instead of those of the batch.
    """
    if moving := moving_batch_norms(model):
        raise ValueError(
            f"gradient_cache_chunk cannot be used while {moving[0]} normalizes by the statistics of its input: those "
            "of a chunk differ from those of the batch, and so would the gradient. Set freeze_batch_norm: true."
        )


def cached_backward(
    embed: Callable[[Batch], tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    batch: Batch,
    chunk_size: int,
    *,
    backward: Callable[[Tensor], None] = Tensor.backward,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
    last: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Accumulate the gradient of the loss of a whole batch, chunk by chunk.

    Args:
        embed: returns the (C, D) image and caption embeddings of C rows of the batch; called twice for each chunk,
            with the same random state, so that dropout drops the same units.
        loss_of: the loss of all (B, D) image and caption embeddings. Other tensors that it differentiates must be
            leaves; `last` carries their gradients on to the parameters.
        batch: tensors of B rows each.
        chunk_size: rows embedded with a graph at once.
        backward: backward pass of the loss; a scale for mixed precision is passed on in the embeddings' gradients.
        no_sync: context in which a backward pass does not reduce gradients over processes, for all chunks but the
            last.
        last: returns a scalar to differentiate together with the last chunk.

    Returns:
        The loss, detached.
    """
    num_rows = len(next(iter(batch.values())))
    starts = range(0, num_rows, chunk_size)
    chunks = [{name: rows[start : start + chunk_size] for name, rows in batch.items()} for start in starts]
    states = []
    embedded = []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_RandomState(*chunk.values()))
            embedded.append(embed(chunk))
    images, texts = (torch.cat(side).requires_grad_() for side in zip(*embedded, strict=True))
    loss = loss_of(images, texts)
    backward(loss)
    assert images.grad is not None
    assert texts.grad is not None
    gradients = zip(images.grad.split(chunk_size), texts.grad.split(chunk_size), strict=True)

    for index, (chunk, state, (image_grad, text_grad)) in enumerate(zip(chunks, states, gradients, strict=True)):
        is_last = index == len(chunks) - 1
        with nullcontext() if is_last else no_sync():
            with state.replayed():
                image, text = embed(chunk)
            # By the chain rule, its gradient is that of the loss with respect to the parameters, for this chunk.
            surrogate = (image * image_grad).sum() + (text * text_grad).sum()
            if is_last and last is not None:
                surrogate = surrogate + last()
            surrogate.backward()
    return loss.detach()


class _RandomState:
    """The random state of the CPU and of the devices that hold some tensors."""

    def __init__(self, *tensors: Tensor) -> None:
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*tensors)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Restore this state within the context."""
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield
