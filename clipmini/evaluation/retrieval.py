"""Retrieval metrics, as pure functions of embeddings, from exact ranks over all similarities.

Shape letters: I images, T captions, D the width of the shared space, Q queries of one direction, K answers kept.

A caption's right answers are the images with its id, an image's the captions with its id: any number of either. Each
query counts once, in its direction; one without a right answer stands in the way of others, and is itself no query.

The (I, T) matrix of similarities is never whole in memory: it is computed block by block, and each block serves both
directions. Images and captions are first sorted by id, so that few blocks hold what belongs together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IMAGE_BLOCK, TEXT_BLOCK = 768, 768  # similarities computed at once: 2 MB, which stay in the processor's cache


@dataclass(frozen=True)
class Ranking:
    """How the answers to each query of one direction are ranked, most similar first.

    Attributes:
        ranks: (Q,) place of the best placed right answer among the wrong ones, 0 being first; -1 for a query without a
            right answer.
        own: (Q, K) similarities of right answers; -inf where there are fewer.
        others: (Q, K) similarities of wrong answers; -inf where there are fewer.
        other_rows: (Q, K) which wrong answers these are; -1 where there are fewer.
        num_own: (Q,) how many right answers there are in all.
    """

    ranks: Tensor
    own: Tensor
    others: Tensor
    other_rows: Tensor
    num_own: Tensor

    def average_precision(self) -> Tensor:
        """Average precision among the first K answers (AP@K).

        Over the places p of right answers, of which a query has m: the sum of the share of right answers among the
        first p, for p up to K, divided by min(m, K). Ties and NaN count against the model, as in `ranks`.

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


def rank_answers(
    image_embeds: Tensor,
    text_embeds: Tensor,
    text_image_ids: Tensor,
    image_ids: Tensor | None = None,
    num_kept: int = 10,
) -> tuple[Ranking, Ranking]:
    """Rank all images for every caption, and all captions for every image.

    Right is an answer with the query's id; other right answers do not stand in the way of the best one. Ties count
    against the model, and so does NaN: neither a collapsed model, which gives every pair the same similarity, nor a
    diverged one must look perfect.

    Args:
        image_embeds: (I, D), of length 1.
        text_embeds: (T, D), of length 1.
        text_image_ids: (T,) integers, the id of the image that each caption describes.
        image_ids: (I,) integers, several images may share one; by default 0 to I - 1.
        num_kept: K, right answers and wrong ones each, to keep; 0 for the ranks alone.

    Returns:
        The rankings of images for each caption, and of captions for each image. On the CPU.

    Raises:
        ValueError: there is not one id for each embedding.
    """
    pairs = _SortedPairs(image_embeds, text_embeds, text_image_ids, image_ids)
    of_text = _Direction(pairs.num_texts, num_kept, image_embeds.device)
    of_image = _Direction(pairs.num_images, num_kept, image_embeds.device)
    # Right answers first: how many wrong ones stand before the best of them is counted block by block.
    for block in pairs.blocks(only_with_own=True):
        assert block.is_own is not None
        of_image.take_own(block.images, block.similarity, block.is_own)
        of_text.take_own(block.texts, block.similarity.T, block.is_own.T)
    for block in pairs.blocks():
        is_own = block.is_own
        of_image.take_others(block.images, block.texts, block.similarity, is_own)
        of_text.take_others(block.texts, block.images, block.similarity.T, None if is_own is None else is_own.T)
    return (
        of_text.ranking(pairs.text_order, pairs.image_order, pairs.images_of_text),
        of_image.ranking(pairs.image_order, pairs.text_order, pairs.texts_of_image),
    )


class _Block(NamedTuple):
    """Similarities of some images and some captions, both by their places in the sorted order."""

    images: slice
    texts: slice
    similarity: Tensor  # (images, texts); the next block overwrites it
    is_own: Tensor | None  # of the same shape: what belongs together; None where nothing does


class _SortedPairs:
    """Embeddings sorted by id, and the blocks of their similarities."""

    def __init__(
        self, image_embeds: Tensor, text_embeds: Tensor, text_image_ids: Tensor, image_ids: Tensor | None
    ) -> None:
        self.num_images, self.num_texts = len(image_embeds), len(text_embeds)
        if image_ids is None:
            image_ids = torch.arange(self.num_images)
        if len(image_ids) != self.num_images or len(text_image_ids) != self.num_texts:
            raise ValueError(
                f"{self.num_images} images with {len(image_ids)} ids and {self.num_texts} captions with "
                f"{len(text_image_ids)} do not go together; give one id for each."
            )
        device = image_embeds.device
        self.image_ids, self.image_order = image_ids.to(device).sort(stable=True)
        self.text_image_ids, self.text_order = text_image_ids.to(device).sort(stable=True)
        self.images = _in_order(image_embeds, self.image_order)
        self.texts = _in_order(text_embeds, self.text_order)
        self.texts_of_image = count_ids(self.image_ids, self.text_image_ids)
        self.images_of_text = count_ids(self.text_image_ids, self.image_ids)

    def blocks(self, only_with_own: bool = False) -> Iterator[_Block]:
        """Compute the similarities; those of blocks in which something belongs together alone, if asked for."""
        buffer = torch.empty(IMAGE_BLOCK * TEXT_BLOCK, device=self.images.device)
        for text_start in range(0, self.num_texts, TEXT_BLOCK):
            texts = slice(text_start, min(text_start + TEXT_BLOCK, self.num_texts))
            ids = self.text_image_ids[texts]
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


class _Direction:
    """What is known so far of the answers to the queries of one direction, both in sorted order."""

    def __init__(self, num_queries: int, num_kept: int, device: torch.device) -> None:
        self.num_kept = num_kept
        self.own = torch.full((num_queries, max(num_kept, 1)), -torch.inf, device=device)
        self.others = torch.full((num_queries, num_kept), -torch.inf, device=device)
        self.rows = torch.full((num_queries, num_kept), -1, device=device)
        self.num_worse = torch.zeros(num_queries, dtype=torch.long, device=device)

    def take_own(self, queries: slice, similarity: Tensor, is_own: Tensor) -> None:
        """Keep the most similar right answers of a (queries, answers) block; NaN is the least similar of all."""
        own = similarity.nan_to_num(nan=-torch.inf).masked_fill(~is_own, -torch.inf)
        num_kept = self.own.shape[1]
        own = own.topk(min(num_kept, own.shape[1]), dim=1).values
        self.own[queries] = torch.cat([self.own[queries], own], dim=1).topk(num_kept, dim=1).values

    def take_others(self, queries: slice, answers: slice, similarity: Tensor, is_own: Tensor | None) -> None:
        """Count and keep wrong answers of a block, once all right ones are known."""
        # Counted is what is worse than the best right answer: NaN never is, and nothing is worse than -inf.
        others = similarity if is_own is None else similarity.masked_fill(is_own, torch.inf)
        is_worse = others < self.own[queries, :1]
        # Added up as whole numbers: truth values take torch several times as long.
        self.num_worse[queries] += is_worse.view(torch.uint8).sum(dim=1, dtype=torch.int32)
        if not self.num_kept:
            return
        others = similarity if is_own is None else similarity.masked_fill(is_own, -torch.inf)
        # Once some blocks have been seen, few queries find anything in the next that is worth keeping.
        is_closer = ~(others.amax(dim=1) <= self.others[queries, -1])
        closer = is_closer.nonzero().squeeze(1)
        # NaN counts as most similar: here it is wrong.
        others = others[closer].nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        others, columns = others.topk(min(self.num_kept, others.shape[1]), dim=1)
        closer += queries.start
        values = torch.cat([self.others[closer], others], dim=1)
        rows = torch.cat([self.rows[closer], (columns + answers.start).where(others > -torch.inf, -1)], dim=1)
        self.others[closer], best = values.topk(self.num_kept, dim=1)
        self.rows[closer] = rows.gather(1, best)

    def ranking(self, queries: Tensor, answers: Tensor, num_own: Tensor) -> Ranking:
        """Give what was found in the order of embeddings as they were given, of which these are the sorting orders."""
        ranks = (len(answers) - num_own - self.num_worse).where(num_own > 0, -1)
        rows = answers[self.rows.clamp(min=0)].where(self.rows >= 0, -1) if len(answers) else self.rows
        found = (ranks, self.own[:, : self.num_kept], self.others, rows, num_own)
        return Ranking(*(torch.empty_like(values).index_copy_(0, queries, values).cpu() for values in found))


def _in_order(embeds: Tensor, order: Tensor) -> Tensor:
    """Sort embeddings, without a copy where they are in float32 and in order already."""
    is_sorted = bool((order[1:] > order[:-1]).all())
    return embeds.float() if is_sorted else embeds.float()[order]


def count_ids(ids: Tensor, sorted_ids: Tensor) -> Tensor:
    """Count for every one of `ids` how often it stands in `sorted_ids`."""
    return torch.searchsorted(sorted_ids, ids, right=True) - torch.searchsorted(sorted_ids, ids)


RECALL_AT = (1, 5, 10)
PRECISION_AT = 10
DIRECTIONS = ("text_to_image", "image_to_text")
METRIC_NAMES = (
    *(f"{direction}_r{k}" for direction in DIRECTIONS for k in RECALL_AT),
    "mean_recall",
    *(
        f"{direction}_{name}"
        for direction in DIRECTIONS
        for name in (f"map{PRECISION_AT}", "mean_rank", "median_rank")
    ),
)


@dataclass(frozen=True)
class QueryScores:
    """How each query of one direction did; queries without a right answer are left out.

    Attributes:
        ranks: (Q,) place of the best placed right answer among the wrong ones, 0 being first.
        average_precision: (Q,) AP@10, in [0, 1]; see `Ranking.average_precision`.
        ids: (Q,) the image that each query shows or describes.
    """

    ranks: Tensor
    average_precision: Tensor
    ids: Tensor


def retrieval_scores(
    image_embeds: Tensor, text_embeds: Tensor, text_image_ids: Tensor, image_ids: Tensor | None = None
) -> dict[str, QueryScores]:
    """Score every query of both directions, from which metrics and their intervals are made.

    Args:
        image_embeds: (I, D), of length 1.
        text_embeds: (T, D), of length 1.
        text_image_ids: (T,) integers, the id of the image that each caption describes.
        image_ids: (I,) integers, several images may share one; by default 0 to I - 1.

    Returns:
        Scores by direction: "text_to_image" and "image_to_text".
    """
    if image_ids is None:
        image_ids = torch.arange(len(image_embeds))
    rankings = rank_answers(image_embeds, text_embeds, text_image_ids, image_ids, PRECISION_AT)
    return score_rankings(rankings, text_image_ids, image_ids)


def score_rankings(
    rankings: tuple[Ranking, Ranking], text_image_ids: Tensor, image_ids: Tensor
) -> dict[str, QueryScores]:
    """Make scores of what `rank_answers` found; see `retrieval_scores`."""
    scores = {}
    for direction, ranking, ids in zip(DIRECTIONS, rankings, (text_image_ids, image_ids), strict=True):
        is_query = ranking.ranks >= 0
        precision = ranking.average_precision()[is_query]
        scores[direction] = QueryScores(ranking.ranks[is_query], precision, ids.cpu()[is_query])
    return scores


def retrieval_metrics(
    image_embeds: Tensor,
    text_embeds: Tensor,
    text_image_ids: Tensor,
    image_ids: Tensor | None = None,
    recall_at: Sequence[int] = RECALL_AT,
) -> dict[str, float]:
    """Measure retrieval in both directions, over the whole set.

    Args:
        image_embeds: (I, D), of length 1.
        text_embeds: (T, D), of length 1.
        text_image_ids: (T,) integers, the id of the image that each caption describes.
        image_ids: (I,) integers, several images may share one; by default 0 to I - 1.
        recall_at: the values of k.

    Returns:
        As [`summarize_scores`] gives it.
    """
    return summarize_scores(retrieval_scores(image_embeds, text_embeds, text_image_ids, image_ids), recall_at)


def query_values(direction: str, score: QueryScores, recall_at: Sequence[int] = RECALL_AT) -> dict[str, Tensor]:
    """Return what the metrics of one direction are means of: (Q,) values by metric."""
    return {
        **{f"{direction}_r{k}": (score.ranks < k).double() for k in recall_at},
        f"{direction}_map{PRECISION_AT}": score.average_precision.double(),
        f"{direction}_mean_rank": score.ranks.double() + 1,
    }


def summarize_scores(scores: Mapping[str, QueryScores], recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Average the scores of all queries.

    Args:
        scores: as `retrieval_scores` returns them.
        recall_at: the values of k.

    Returns:
        For each direction `{direction}_r{k}`, the share of queries, in [0, 1], with a right answer among the first k;
        `{direction}_map10`, the mean of AP@10, in [0, 1]; `{direction}_median_rank` and `{direction}_mean_rank`, of
        the best placed right answer, 1 being first. `mean_recall`: the mean of all recalls. NaN without a query.
    """
    metrics = {}
    for direction, score in scores.items():
        values = query_values(direction, score, recall_at)
        metrics |= {name: value.mean().item() for name, value in values.items()}
        ranks = score.ranks.numpy() + 1
        metrics[f"{direction}_median_rank"] = float(np.median(ranks)) if len(ranks) else float("nan")
    recalls = {name: metrics[name] for name in (f"{direction}_r{k}" for direction in scores for k in recall_at)}
    return {**recalls, "mean_recall": sum(recalls.values()) / len(recalls), **metrics}


def chance_metrics(
    text_image_ids: Tensor, image_ids: Tensor, recall_at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """Give the recalls that a random order reaches on the same set, under the same keys as `retrieval_metrics`.

    A query with c right answers among N misses all of them in k draws without replacement with probability
    C(N - c, k) / C(N, k).

    Args:
        text_image_ids: (T,) integers, the id of the image that each caption describes.
        image_ids: (I,) integers.
        recall_at: the values of k.

    Returns:
        The expected recalls, in [0, 1].
    """
    metrics = {}
    for direction, queries, answers in zip(
        DIRECTIONS, (text_image_ids, image_ids), (image_ids, text_image_ids), strict=True
    ):
        num_answers = len(answers)
        num_right = count_ids(queries, answers.sort().values).double()
        num_right, num_queries = num_right[num_right > 0].unique(return_counts=True)
        for k in recall_at:
            drawn = torch.arange(min(k, num_answers))
            miss = ((num_answers - num_right[:, None] - drawn) / (num_answers - drawn)).clamp(min=0).prod(dim=1)
            metrics[f"{direction}_r{k}"] = ((1 - miss) @ num_queries.double() / num_queries.sum()).item()
    return {**metrics, "mean_recall": sum(metrics.values()) / len(metrics)}
