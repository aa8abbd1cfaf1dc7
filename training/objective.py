"""What training minimizes: a contrastive loss and its options, a few rows of the similarity matrix at a time.

Negatives come from every process: embeddings are gathered with their gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
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


class Embeddings(NamedTuple):
    """The pairs of a batch in the shared space.

    Attributes:
        image: (B, D), of length 1.
        text: (B, D), of length 1.
        image_ids: (B,) integers.
        teacher_image: (B, E) a teacher's image embeddings, of length 1, or None.
        teacher_text: (B, E) the teacher's caption embeddings, of length 1, or None.
    """

    image: Tensor
    text: Tensor
    image_ids: Tensor
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None

    def gather(self) -> "Embeddings":
        """Join the pairs of all processes, with gradient; see `gather_rows`."""
        teacher = (None if field is None else gather_rows(field) for field in self[3:])
        return Embeddings(*(gather_rows(field) for field in self[:3]), *teacher)

    def truncate(self, dim: int) -> "Embeddings":
        """Keep the first `dim` dimensions of the student's embeddings, at length 1 again."""
        image, text = (F.normalize(embeds[:, :dim], dim=-1) for embeds in (self.image, self.text))
        return self._replace(image=image, text=text)


@dataclass(frozen=True)
class HardNegatives:
    """How negatives that resemble positives are weighed; see `hard_negative_weights`.

    Attributes:
        weight: how much more similar negatives weigh, at least 0, where all weigh the same.
        start: share of the steps, from 0 to 1, after which they do.

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
        label_smoothing: share of InfoNCE's target that is spread over all answers, in [0, 1).
        hardness: how much negatives that look like positives weigh more; 0 weighs all alike.
        matryoshka_dims: widths below D at which the loss is taken too, on the first dimensions alone (Kusupati et al.
            2022); the loss is the mean over D and all of them.
        distillation: weight of the teacher's affinity term in [0, 1]; the contrastive term weighs the rest.
        teacher_scale: the teacher's inverse temperature.
        chunk_size: rows of logits alive at once. Where there are more rows, or several terms, they are computed again
            in the backward pass, so that memory grows with chunk_size x N and not with N x N or the number of terms.
    """

    label_smoothing: float = 0.0
    hardness: float = 0.0
    matryoshka_dims: tuple[int, ...] = ()
    distillation: float = 0.0
    teacher_scale: float = 100.0
    chunk_size: int = 1024

    def __call__(self, own: Embeddings, logit_scale: Tensor, logit_bias: Tensor | None = None) -> Tensor:
        """Compute this process's share of the loss of the global batch.

        Its own images and captions are the queries; the answers are those of all processes. Over the processes the
        shares sum to what one process would compute on the global batch, and so do their gradients.

        Args:
            own: the pairs of this process.
            logit_scale: scalar, the inverse temperature itself (not its logarithm).
            logit_bias: scalar of the sigmoid loss; None for InfoNCE.

        Returns:
            Scalar, at least 0, in nats.
        """
        every = own.gather()
        total = torch.zeros((), device=own.image.device)
        for dim in (None, *self.matryoshka_dims):
            mine, all_pairs = (own, every) if dim is None else (own.truncate(dim), every.truncate(dim))
            if self.distillation < 1:
                total = total + (1 - self.distillation) * self._contrast(mine, all_pairs, logit_scale, logit_bias)
            if self.distillation > 0:
                total = total + self.distillation * self._distil(mine, all_pairs, logit_scale)
        return total / (1 + len(self.matryoshka_dims)) / len(every.image)

    def _contrast(self, own: Embeddings, every: Embeddings, scale: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:  # every image meets every caption once

            def sigmoid(rows: slice) -> Tensor:
                queries, ids = own.image[rows], own.image_ids[rows]
                return sigmoid_rows(queries, every.text, scale, bias, ids, every.image_ids, self.hardness)

            return self._sum_in_chunks(sigmoid, len(own.image))

        def infonce(rows: slice) -> Tensor:
            ids, options = own.image_ids[rows], (every.image_ids, self.label_smoothing, self.hardness)
            images_to_texts = infonce_rows(own.image[rows], every.text, scale, ids, *options)
            return images_to_texts + infonce_rows(own.text[rows], every.image, scale, ids, *options)

        return self._sum_in_chunks(infonce, len(own.image)) / 2

    def _distil(self, own: Embeddings, every: Embeddings, scale: Tensor) -> Tensor:
        teacher_image, teacher_text = own.teacher_image, own.teacher_text
        all_images, all_texts = every.teacher_image, every.teacher_text
        assert teacher_image is not None
        assert teacher_text is not None
        assert all_images is not None
        assert all_texts is not None

        def affinity(rows: slice) -> Tensor:
            images = (own.image[rows], every.text, scale, teacher_image[rows], all_texts, self.teacher_scale)
            texts = (own.text[rows], every.image, scale, teacher_text[rows], all_images, self.teacher_scale)
            return affinity_rows(*images) + affinity_rows(*texts)

        return self._sum_in_chunks(affinity, len(own.image)) / 2

    def _sum_in_chunks(self, rows_loss: Callable[[slice], Tensor], num_rows: int) -> Tensor:
        is_only_term = not self.matryoshka_dims and self.distillation in (0, 1)
        if num_rows <= self.chunk_size and is_only_term:
            return rows_loss(slice(None)).sum()
        total = torch.zeros(())
        for start in range(0, num_rows, self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            # Nothing here is random, so there is no random state to preserve.
            part = checkpoint(lambda rows: rows_loss(rows).sum(), rows, use_reentrant=False, preserve_rng_state=False)
            total = total.to(part.device) + part
        return total
