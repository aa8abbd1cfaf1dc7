"""The training objective: a contrastive loss and its options, over a few rows of the similarity matrix at a time.

Negatives come from all processes: embeddings are gathered with their gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modeling_clipmini.loss_clipmini import affinity_rows, infonce_rows, sigmoid_rows


def world_size() -> int:
    """Return the number of processes that train together; 1 without a launcher."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes in the order of their ranks, with gradients.

    A row is a candidate for the queries of every process, so its gradient is the sum over all processes. Treating the
    rows of other processes as constants would lose all but one of these terms.

    Args:
        rows: (B_r, ...); the number of rows B_r may differ from rank to rank.

    Returns:
        (sum of B_r, ...), the same on every rank; `rows` itself if there is one process.
    """
    if world_size() == 1:
        return rows
    size = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.zeros_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    return _GatherRows.apply(rows, [int(size) for size in sizes])


class _GatherRows(torch.autograd.Function):
    """All-gather forward, all-reduce backward: two collectives that every backend has, even gloo on a CPU."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.start, ctx.size = sum(sizes[: dist.get_rank()]), len(rows)
        # The collective needs equal shapes, and the last batch of an epoch may be shorter on some ranks.
        padding = [0, 0] * (rows.ndim - 1) + [0, max(sizes) - len(rows)]
        padded = F.pad(rows, padding).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)  # autograd may still need its own tensor
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.size], None


class Embeddings(NamedTuple):
    """The pairs of a batch in the shared space.

    Attributes:
        image: (B, D), of length 1.
        text: (B, D), of length 1.
        image_ids: (B,) integers; pairs with the same id are positives of each other.
        teacher_image: (B, E) image embeddings of a teacher, of length 1, or None.
        teacher_text: (B, E) caption embeddings of the teacher, of length 1, or None.
    """

    image: Tensor
    text: Tensor
    image_ids: Tensor
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None

    def gather(self) -> "Embeddings":
        """Concatenate the pairs of all processes, with gradients; see `gather_rows`."""
        return Embeddings._make(None if field is None else gather_rows(field) for field in self)

    def select(self, rows: slice) -> "Embeddings":
        """Select some of the pairs."""
        return Embeddings._make(None if field is None else field[rows] for field in self)

    def truncate(self, dim: int) -> "Embeddings":
        """Truncate the student's embeddings to their first `dim` dimensions, normalized again."""
        image, text = (F.normalize(embeds[:, :dim], dim=-1) for embeds in (self.image, self.text))
        return self._replace(image=image, text=text)


@dataclass(frozen=True)
class HardNegatives:
    """Options of the weights that hard negatives get in the loss; see `hard_negative_weights`.

    Attributes:
        weight: strength of the weighting, at least 0; at 0 all negatives have the same weight.
        start: fraction of the training steps, from 0 to 1, before the weighting begins.

    Raises:
        ValueError: a value is out of range.
    """

    weight: float
    start: float = 0.3

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"hard_negatives.weight={self.weight:g} is not allowed; use at least 0.")
        if not 0 <= self.start <= 1:
            raise ValueError(f"hard_negatives.start={self.start:g} is not allowed; use a number from 0 to 1.")


@dataclass(frozen=True)
class ContrastiveObjective:
    """A loss over pairs.

    Attributes:
        label_smoothing: share of InfoNCE's target that is spread over all candidates, in [0, 1).
        hardness: strength of the weighting of hard negatives; 0 gives all negatives the same weight.
        matryoshka_dims: widths below D at which the loss of truncated embeddings is taken too (Kusupati et al., 2022);
            the loss is the mean over D and these widths.
        distillation: weight of the teacher's affinity term in [0, 1]; the contrastive term has the remaining weight.
        teacher_scale: the teacher's inverse temperature.
        chunk_size: rows of logits in memory at once. If there are more rows, or several terms, logits are recomputed
            in the backward pass: memory grows with chunk_size x N, not with N x N or the number of terms.
    """

    label_smoothing: float = 0.0
    hardness: float = 0.0
    matryoshka_dims: tuple[int, ...] = ()
    distillation: float = 0.0
    teacher_scale: float = 100.0
    chunk_size: int = 1024

    def __call__(self, pairs: Embeddings, logit_scale: Tensor, logit_bias: Tensor | None = None) -> Tensor:
        """Compute this process's share of the loss of the global batch.

        The images and captions of this process are the queries; the candidates are those of all processes. Summed
        over the processes, the shares and their gradients equal those of one process with the global batch.

        Args:
            pairs: the pairs of this process.
            logit_scale: scalar, the inverse temperature itself (not its logarithm).
            logit_bias: scalar of the sigmoid loss; None for InfoNCE.

        Returns:
            Scalar, at least 0, in nats.
        """
        all_pairs = pairs.gather()
        total = torch.zeros((), device=pairs.image.device)
        for dim in (None, *self.matryoshka_dims):
            queries, candidates = (pairs, all_pairs) if dim is None else (pairs.truncate(dim), all_pairs.truncate(dim))
            if self.distillation < 1:
                rows_loss = partial(self._contrast, candidates=candidates, scale=logit_scale, bias=logit_bias)
                total = total + (1 - self.distillation) * self._sum_in_chunks(rows_loss, queries)
            if self.distillation > 0:
                rows_loss = partial(self._distill, candidates=candidates, scale=logit_scale)
                total = total + self.distillation * self._sum_in_chunks(rows_loss, queries)
        return total / (1 + len(self.matryoshka_dims)) / len(all_pairs.image)

    def _contrast(self, queries: Embeddings, candidates: Embeddings, scale: Tensor, bias: Tensor | None) -> Tensor:
        ids = (queries.image_ids, candidates.image_ids)
        if bias is not None:  # each image meets each caption once, so one direction is enough
            return sigmoid_rows(queries.image, candidates.text, scale, bias, *ids, self.hardness)
        options = (self.label_smoothing, self.hardness)
        images_to_texts = infonce_rows(queries.image, candidates.text, scale, *ids, *options)
        texts_to_images = infonce_rows(queries.text, candidates.image, scale, *ids, *options)
        return (images_to_texts + texts_to_images) / 2

    def _distill(self, queries: Embeddings, candidates: Embeddings, scale: Tensor) -> Tensor:
        assert queries.teacher_image is not None
        assert queries.teacher_text is not None
        assert candidates.teacher_image is not None
        assert candidates.teacher_text is not None
        teacher = (queries.teacher_image, candidates.teacher_text, self.teacher_scale)
        images_to_texts = affinity_rows(queries.image, candidates.text, scale, *teacher)
        teacher = (queries.teacher_text, candidates.teacher_image, self.teacher_scale)
        texts_to_images = affinity_rows(queries.text, candidates.image, scale, *teacher)
        return (images_to_texts + texts_to_images) / 2

    def _sum_in_chunks(self, rows_loss: Callable[[Embeddings], Tensor], queries: Embeddings) -> Tensor:
        num_rows = len(queries.image)
        is_only_term = not self.matryoshka_dims and self.distillation in (0, 1)
        if num_rows <= self.chunk_size and is_only_term:
            return rows_loss(queries).sum()
        total = torch.zeros((), device=queries.image.device)
        for start in range(0, num_rows, self.chunk_size):
            chunk = queries.select(slice(start, start + self.chunk_size))
            # Nothing here is random, so there is no random state to preserve.
            total = total + checkpoint(rows_loss, chunk, use_reentrant=False, preserve_rng_state=False).sum()
        return total
