"""Where every picture and every caption finds its own, exactly, over all similarities.

Shape letters: I images, T captions, D the width of the shared space, Q queries of one direction, K answers kept.

The (I, T) matrix of similarities is never whole in memory: it is computed block by block, and each block serves both
directions. Pictures and captions are first sorted by id, so that few blocks hold what belongs together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IMAGE_BLOCK, TEXT_BLOCK = 1024, 1024  # similarities computed at once: 4 MB, which stay in the processor's cache


def retrieval_ranks(
    image_embeds: Tensor, text_embeds: Tensor, text_ids: Tensor, image_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rank the best placed right answer of every query, 0 being first place.

    Right is an answer with the query's id; other right answers do not stand in the way of the best one. Ties count
    against the model, and so does NaN: neither a collapsed model, which gives every pair the same similarity, nor a
    diverged one must look perfect.

    Args:
        image_embeds: (I, D), of length 1.
        text_embeds: (T, D), of length 1.
        text_ids: (T,) integers, the id of the image that each caption describes.
        image_ids: (I,) integers, several images may share one; by default 0 to I - 1.

    Returns:
        (T,) ranks of images for each caption; (I,) ranks of captions for each image; -1 for a query without a right
        answer. Both on the CPU.
    """
    pairs = _SortedPairs(image_embeds, text_embeds, text_ids, image_ids)
    best_of_image = torch.full((pairs.num_images,), -torch.inf, device=image_embeds.device)
    best_of_text = torch.full((pairs.num_texts,), -torch.inf, device=image_embeds.device)
    for block in pairs.blocks(only_with_own=True):
        assert block.is_own is not None
        own = block.similarity.nan_to_num(nan=-torch.inf).masked_fill(~block.is_own, -torch.inf)
        best_of_image[block.images] = torch.maximum(best_of_image[block.images], own.amax(dim=1))
        best_of_text[block.texts] = torch.maximum(best_of_text[block.texts], own.amax(dim=0))

    # Counted is what is worse than the best right answer: NaN never is, and nothing is worse than -inf.
    worse_of_image = torch.zeros(pairs.num_images, dtype=torch.long, device=image_embeds.device)
    worse_of_text = torch.zeros(pairs.num_texts, dtype=torch.long, device=image_embeds.device)
    for block in pairs.blocks():
        similarity = block.similarity
        if block.is_own is not None:
            similarity = similarity.masked_fill(block.is_own, torch.inf)
        worse_of_image[block.images] += (similarity < best_of_image[block.images, None]).sum(dim=1)
        worse_of_text[block.texts] += (similarity < best_of_text[None, block.texts]).sum(dim=0)
    image_ranks = (pairs.num_texts - pairs.texts_of_image - worse_of_image).where(pairs.texts_of_image > 0, -1)
    text_ranks = (pairs.num_images - pairs.images_of_text - worse_of_text).where(pairs.images_of_text > 0, -1)
    return pairs.as_given(text_ranks, pairs.text_order), pairs.as_given(image_ranks, pairs.image_order)


@dataclass(frozen=True)
class Neighbours:
    """The answers closest to each query of one direction, most similar first.

    Attributes:
        own: (Q, K) similarities of right answers; -inf where there are fewer.
        others: (Q, K) similarities of wrong answers; -inf where there are fewer.
        other_rows: (Q, K) which wrong answers these are; -1 where there are fewer.
        num_own: (Q,) how many right answers there are in all.
    """

    own: Tensor
    others: Tensor
    other_rows: Tensor
    num_own: Tensor

    def average_precision(self) -> Tensor:
        """Average precision among the first K answers (AP@K).

        Over the places p of right answers, of which a query has m: the sum of the share of right answers among the
        first p, for p up to K, divided by min(m, K). Ties and NaN count against the model, as in `retrieval_ranks`.

        Returns:
            (Q,) in [0, 1]; 1 if all right answers come first. NaN for a query without a right answer.
        """
        num_kept = self.own.shape[1]
        is_there = torch.arange(num_kept) < self.num_own[:, None]
        wrong_before = (~(self.others[:, None, :] < self.own[:, :, None])).sum(dim=2)  # (Q, K): before each right one
        right_before = torch.arange(num_kept)
        place = wrong_before + right_before + 1
        precision = (right_before + 1) / place
        total = precision.where(is_there & (place <= num_kept), 0).sum(dim=1)
        return total / self.num_own.clamp(max=num_kept).where(self.num_own > 0, torch.nan)


def nearest_answers(
    image_embeds: Tensor,
    text_embeds: Tensor,
    text_ids: Tensor,
    image_ids: Tensor | None = None,
    num_kept: int = 10,
) -> tuple[Neighbours, Neighbours]:
    """Find the most similar right and wrong answers of every query.

    Args:
        image_embeds: (I, D), of length 1.
        text_embeds: (T, D), of length 1.
        text_ids: (T,) integers, the id of the image that each caption describes.
        image_ids: (I,) integers, several images may share one; by default 0 to I - 1.
        num_kept: K, right answers and wrong ones each.

    Returns:
        Images for each caption, and captions for each image. On the CPU.
    """
    pairs = _SortedPairs(image_embeds, text_embeds, text_ids, image_ids)
    of_text = _Closest(pairs.num_texts, num_kept, image_embeds.device)
    of_image = _Closest(pairs.num_images, num_kept, image_embeds.device)
    for block in pairs.blocks():
        is_own = torch.zeros_like(block.similarity, dtype=torch.bool) if block.is_own is None else block.is_own
        of_image.update(block.images, block.texts, block.similarity, is_own)
        of_text.update(block.texts, block.images, block.similarity.T, is_own.T)
    return (
        of_text.neighbours(pairs, pairs.text_order, pairs.image_order, pairs.images_of_text),
        of_image.neighbours(pairs, pairs.image_order, pairs.text_order, pairs.texts_of_image),
    )


class _Block(NamedTuple):
    """Similarities of some images and some captions, both by their places in the sorted order."""

    images: slice
    texts: slice
    similarity: Tensor  # (images, texts); the next block overwrites it
    is_own: Tensor | None  # of the same shape: what belongs together; None where nothing does


class _SortedPairs:
    """Embeddings sorted by id, and the blocks of their similarities."""

    def __init__(self, image_embeds: Tensor, text_embeds: Tensor, text_ids: Tensor, image_ids: Tensor | None) -> None:
        self.num_images, self.num_texts = len(image_embeds), len(text_embeds)
        if image_ids is None:
            image_ids = torch.arange(self.num_images)
        if len(image_ids) != self.num_images or len(text_ids) != self.num_texts:
            raise ValueError(
                f"{self.num_images} images with {len(image_ids)} ids and {self.num_texts} captions with "
                f"{len(text_ids)} do not go together; give one id for each."
            )
        device = image_embeds.device
        self.image_ids, self.image_order = image_ids.to(device).sort(stable=True)
        self.text_ids, self.text_order = text_ids.to(device).sort(stable=True)
        self.images = _in_order(image_embeds, self.image_order)
        self.texts = _in_order(text_embeds, self.text_order)
        self.texts_of_image = count_ids(self.image_ids, self.text_ids)
        self.images_of_text = count_ids(self.text_ids, self.image_ids)

    def blocks(self, only_with_own: bool = False) -> Iterator[_Block]:
        """Compute the similarities; those of blocks in which something belongs together alone, if asked for."""
        buffer = torch.empty(IMAGE_BLOCK * TEXT_BLOCK, device=self.images.device)
        for text_start in range(0, self.num_texts, TEXT_BLOCK):
            texts = slice(text_start, min(text_start + TEXT_BLOCK, self.num_texts))
            ids = self.text_ids[texts]
            # Sorted, the images of these captions stand beside each other.
            first = torch.searchsorted(self.image_ids, ids[0]).item()
            end = torch.searchsorted(self.image_ids, ids[-1], right=True).item()
            for image_start in range(0, self.num_images, IMAGE_BLOCK):
                images = slice(image_start, min(image_start + IMAGE_BLOCK, self.num_images))
                may_have_own = images.start < end and first < images.stop
                if only_with_own and not may_have_own:
                    continue
                shape = (images.stop - images.start, texts.stop - texts.start)
                similarity = buffer[: shape[0] * shape[1]].view(shape)
                with torch.autocast(self.images.device.type, enabled=False), torch.no_grad():
                    torch.mm(self.images[images], self.texts[texts].T, out=similarity)
                is_own = self.image_ids[images, None] == ids[None, :] if may_have_own else None
                yield _Block(images, texts, similarity, is_own)

    def as_given(self, values: Tensor, order: Tensor) -> Tensor:
        """Put values of the sorted order back into the order that was given, on the CPU."""
        return torch.empty_like(values).index_copy_(0, order, values).cpu()


class _Closest:
    """The closest answers of every query so far, right ones and wrong ones."""

    def __init__(self, num_queries: int, num_kept: int, device: torch.device) -> None:
        shape = (num_queries, num_kept)
        self.own = torch.full(shape, -torch.inf, device=device)
        self.others = torch.full(shape, -torch.inf, device=device)
        self.rows = torch.full(shape, -1, device=device)

    def update(self, queries: slice, answers: slice, similarity: Tensor, is_own: Tensor) -> None:
        """Take in a (queries, answers) block of similarities."""
        num_kept = self.own.shape[1]
        # NaN counts as most similar where it is wrong, and as least similar where it is right.
        others = similarity.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        others = others.masked_fill(is_own, -torch.inf)
        others, columns = others.topk(min(num_kept, others.shape[1]), dim=1)
        values = torch.cat([self.others[queries], others], dim=1)
        rows = torch.cat([self.rows[queries], (columns + answers.start).where(others > -torch.inf, -1)], dim=1)
        self.others[queries], best = values.topk(num_kept, dim=1)
        self.rows[queries] = rows.gather(1, best)
        if is_own.any():
            own = similarity.nan_to_num(nan=-torch.inf).masked_fill(~is_own, -torch.inf)
            own = own.topk(min(num_kept, own.shape[1]), dim=1).values
            self.own[queries] = torch.cat([self.own[queries], own], dim=1).topk(num_kept, dim=1).values

    def neighbours(self, pairs: _SortedPairs, queries: Tensor, answers: Tensor, num_own: Tensor) -> Neighbours:
        """Give what was found, in the order of embeddings as they were given."""
        rows = answers[self.rows.clamp(min=0)].where(self.rows >= 0, -1) if len(answers) else self.rows
        return Neighbours(*(pairs.as_given(values, queries) for values in (self.own, self.others, rows, num_own)))


def _in_order(embeds: Tensor, order: Tensor) -> Tensor:
    """Sort embeddings, without a copy where they are in float32 and in order already."""
    is_sorted = bool((order[1:] > order[:-1]).all())
    return embeds.float() if is_sorted else embeds.float()[order]


def count_ids(ids: Tensor, sorted_ids: Tensor) -> Tensor:
    """Count for every one of `ids` how often it stands in `sorted_ids`."""
    return torch.searchsorted(sorted_ids, ids, right=True) - torch.searchsorted(sorted_ids, ids)
