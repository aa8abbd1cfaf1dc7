"""Negatives from every process: embeddings gathered with their gradient."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def world_size() -> int:
    """Return the number of processes that train together; 1 without a launcher."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> Tensor:
    """Join the rows of all processes, in the order of their ranks; gradients flow back to each row's own process.

    A row is an answer to the queries of every process, so its gradient is the sum of what all of them ask of it.
    Taking other processes' rows as constants would lose all but one of these terms.

    Args:
        rows: (B_r, ...); B_r, the number of this process's rows, may differ from rank to rank.

    Returns:
        (sum of B_r, ...), the same on every rank; on one process `rows` itself.
    """
    if world_size() == 1:
        return rows
    size = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.zeros_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    return _GatherRows.apply(rows, [int(size) for size in sizes])


class _GatherRows(torch.autograd.Function):
    """all_gather forward, all_reduce backward: two collectives that every backend has, gloo on a CPU included."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.start, ctx.size = sum(sizes[: dist.get_rank()]), len(rows)
        # The collective wants equal shapes: the last batch of an epoch may be shorter on some ranks.
        padding = [0, 0] * (rows.ndim - 1) + [0, max(sizes) - len(rows)]
        padded = F.pad(rows, padding).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        if gradient.data_ptr() == gradients[0].data_ptr():
            gradient = gradient.clone()  # autograd may still need what it passed in
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.size], None
