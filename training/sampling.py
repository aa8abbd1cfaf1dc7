"""Which pairs make up an epoch, and in what order: a pure function of the seed and the epoch.

Nothing here draws from the global random state. The same epoch gives the same batches on any number of data workers,
and in a run that was killed and resumed.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch


class PairSampler(torch.utils.data.Sampler[tuple[int, int]]):
    """Every image in a new order each epoch, `captions_per_epoch` times.

    It yields (row, turn): counted over all epochs, this is the turn-th time that the image comes up. `draw_index`
    makes of the turn which caption and which augmented view it meets.

    Args:
        image_ids: the image id of each row.
        num_captions: the number of captions of each row.
        seed: another seed gives another order.
        captions_per_epoch: captions of each image in an epoch; an image with fewer comes up once for each it has.
        unique_within: if above 0, the pairs of every such block, one global batch, have different image ids; pairs
            that fit into no block are left out of the epoch.

    Raises:
        ValueError: there are fewer image ids than `unique_within`.
    """

    def __init__(
        self,
        image_ids: Sequence[int],
        num_captions: Sequence[int],
        *,
        seed: int = 0,
        captions_per_epoch: int = 1,
        unique_within: int = 0,
    ) -> None:
        self.seed, self.unique_within, self.epoch = seed, unique_within, 0
        self.turns_per_epoch = np.minimum(num_captions, captions_per_epoch)
        self.rows = np.repeat(np.arange(len(image_ids)), self.turns_per_epoch)
        starts = np.cumsum(self.turns_per_epoch) - self.turns_per_epoch
        self.offsets = np.arange(len(self.rows)) - starts[self.rows]  # 0, 1, ... within each image's turns
        self.ids = np.unique(np.asarray(image_ids), return_inverse=True)[1][self.rows]
        self.num_blocks = _count_blocks(np.bincount(self.ids), unique_within) if unique_within else 0
        if unique_within and self.num_blocks == 0:
            raise ValueError(
                f"unique_images_in_batch: a batch of {unique_within} pairs with different images cannot be filled "
                f"from {len(np.unique(self.ids))} images. Use a smaller batch, or leave the option out."
            )

    def __len__(self) -> int:
        return self.num_blocks * self.unique_within if self.unique_within else len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.rows))
        if self.unique_within:
            order = self._deal_into_blocks(order, generator)
        rows = self.rows[order]
        turns = self.epoch * self.turns_per_epoch[rows] + self.offsets[order]
        return zip(rows.tolist(), turns.tolist(), strict=True)

    def _deal_into_blocks(self, order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Deal the pairs, those of one image after each other, to the blocks in turn, like cards to players.

        An image with no more pairs than there are blocks then never meets itself in one (McNaughton 1959).
        """
        ids = self.ids[order]
        order = order[_rank_within(ids) < self.num_blocks]
        order = order[: len(self)]  # it is shuffled: what is left out is random
        together = np.argsort(generator.permutation(self.ids.max() + 1)[self.ids[order]], kind="stable")
        blocks = order[together].reshape(self.unique_within, self.num_blocks).T
        return generator.permuted(generator.permutation(blocks), axis=1).reshape(-1)


def draw_index(count: int, turn: int, *seed: int) -> int:
    """Draw one of `count` things without replacement: over `count` turns in a row each comes up once.

    Args:
        count: at least 1.
        turn: from 0.
        *seed: another seed, such as the run's and the image's, gives another order.

    Returns:
        An index in [0, count).
    """
    cycle, position = divmod(turn, count)
    return int(np.random.default_rng((*seed, cycle)).permutation(count)[position])


def draw_seed(*seed: int) -> int:
    """Mix some non-negative integers into one seed in [0, 2**32)."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _count_blocks(pairs_per_id: np.ndarray, block_size: int) -> int:
    """The most blocks of different ids that can be filled: the largest b with b x size <= sum of min(pairs, b)."""
    low, high = 0, int(pairs_per_id.sum()) // block_size
    while low < high:
        middle = (low + high + 1) // 2
        fits = np.minimum(pairs_per_id, middle).sum() >= middle * block_size
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _rank_within(ids: np.ndarray) -> np.ndarray:
    """Count for each entry how many entries before it have the same id."""
    by_id = np.argsort(ids, kind="stable")
    starts = np.searchsorted(ids[by_id], ids[by_id])
    ranks = np.empty(len(ids), dtype=np.int64)
    ranks[by_id] = np.arange(len(ids)) - starts
    return ranks
