"""Gradient cache: the gradient of a batch of any size, in the memory of one chunk.

A contrastive loss needs all embeddings of a batch at once, but a tower needs only its own inputs. So the batch is
embedded chunk by chunk without a graph; the loss gives the gradient of every embedding; then each chunk is embedded
again, with a graph, and its embeddings' gradients are sent down the towers. It costs one more forward pass. Source:
Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup".
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import get_device_states, set_device_states

Batch = Mapping[str, Tensor]


def moving_batch_norms(model: nn.Module) -> list[str]:
    """Name the BatchNorm layers that take their statistics from their input, as they do in train mode."""
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]


def check_batch_norm(model: nn.Module) -> None:
    """Refuse BatchNorm in train mode.

    Raises:
        ValueError: a layer would take its statistics from a chunk instead of from the batch.
    """
    if moving := moving_batch_norms(model):
        raise ValueError(
            f"gradient_cache_chunk cannot be used while {moving[0]} takes statistics from its input: those of a chunk "
            "are not those of the batch, so the gradient would be another. Set freeze_batch_norm: true."
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
    """Accumulate the gradient of a whole batch's loss, chunk by chunk.

    Args:
        embed: gives the (C, D) image and caption embeddings of C rows of the batch; called twice for each chunk, with
            the same random state, so that dropout drops the same units.
        loss_of: the loss of all (B, D) image and caption embeddings. What it uses besides must be a leaf of its own,
            whose gradient `last` brings to the parameters.
        batch: tensors of B rows each.
        chunk_size: rows embedded with a graph at once.
        backward: for the loss; where mixed precision scales it, the scale travels with the embeddings' gradients.
        no_sync: the context in which a backward pass does not reduce gradients over processes; all but the last
            chunk's run in it.
        last: a scalar to send back together with the last chunk.

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
            # Its derivative by the parameters is the chain rule's second factor, summed over the chunk.
            surrogate = (image * image_grad).sum() + (text * text_grad).sum()
            if is_last and last is not None:
                surrogate = surrogate + last()
            surrogate.backward()
    return loss.detach()


class _RandomState:
    """The random state of the CPU and of the devices that some tensors live on."""

    def __init__(self, *tensors: Tensor) -> None:
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*tensors)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Return to this state for a while."""
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield
