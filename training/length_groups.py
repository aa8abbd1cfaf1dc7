"""Captions of like length together: less padding to compute."""

import torch
from torch import Tensor

from modeling_clipmini import ClipMiniModel


def pool_by_length(model: ClipMiniModel, input_ids: Tensor, attention_mask: Tensor, num_groups: int) -> Tensor:
    """Run the text tower over a batch in groups of captions of like length, each cut to its own longest.

    A batch is padded to its longest caption, often twice as long as most. Padding is masked out, so the result is the
    same; only what dropout drops is another draw.

    Args:
        model: its `pool_texts` is run.
        input_ids: (B, L), padded on the right.
        attention_mask: (B, L).
        num_groups: at least 1; no more than B are made.

    Returns:
        (B, W) what `pooled_text` takes, in the order of the batch.
    """
    lengths = attention_mask.sum(dim=1)
    order = lengths.argsort(stable=True)
    pooled = []
    for rows in order.tensor_split(min(num_groups, len(order))):
        longest = int(lengths[rows].max())
        pooled.append(model.pool_texts(input_ids[rows, :longest], attention_mask[rows, :longest]))
    return torch.cat(pooled)[order.argsort()]
