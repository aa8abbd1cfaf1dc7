"""Retrieval metrics, as pure functions of embeddings, from exact ranks over all similarities.

Shape letters: I images, T captions, D the width of the shared space, Q queries of one direction, K candidates kept.

The correct candidates of a caption are the images with its id, those of an image the captions with its id: any number
of either. Each query counts once, in its direction. An image or caption without a correct candidate is no query, but
stays a candidate for others.

The (I, T) matrix of similarities is never in memory as a whole: it is computed block by block, and each block serves
both directions. Images and captions are first sorted by id, so that few blocks hold correct pairs.
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
    """The ranked candidates of each query of one direction, most similar first.

    Attributes:
        ranks: (Q,) rank of the best correct candidate among the wrong ones, from 0; -1 for a query without a correct
            candidate.
        correct: (Q, K) similarities of correct candidates; -inf where there are fewer.
        wrong: (Q, K) similarities of wrong candidates; -inf where there are fewer.
        wrong_rows: (Q, K) rows of these wrong candidates; -1 where there are fewer.
        num_correct: (Q,) number of correct candidates in all.
    """

    ranks: Tensor
    correct: Tensor
    wrong: Tensor
    wrong_rows: Tensor
    num_correct: Tensor

    def average_precision(self) -> Tensor:
        """Return the average precision among the first K candidates (AP@K).

        This is the sum of the precision at the rank of each of a query's m correct candidates, up to rank K, divided
        by min(m, K). Ties and NaN count against the model, as in `ranks`.

        Returns:
            (Q,) in [0, 1]; 1 if all correct candidates come first. NaN for a query without a correct candidate.
        """
        num_kept = self.correct.shape[1]
        correct_before = torch.arange(num_kept)
        exists = correct_before < self.num_correct[:, None]
        wrong_before = (~(self.wrong[:, None, :] < self.correct[:, :, None])).sum(dim=2)  # (Q, K)
        rank = wrong_before + correct_before + 1  # from 1
        precision = (correct_before + 1) / rank
        total = precision.where(exists & (rank <= num_kept), 0).sum(dim=1)
        return total / self.num_correct.clamp(max=num_kept).where(self.num_correct > 0, torch.nan)


def rank_candidates(
    image_embeds: Tensor,
    text_embeds: Tensor,
    text_image_ids: Tensor,
    image_ids: Tensor | None = None,
    num_kept: int = 10,
) -> tuple[Ranking, Ranking]:
    """Rank all images for every caption, and all captions for every image.

    A candidate is correct if it has the query's id; other correct candidates do not lower the rank of the best one.
    Ties count against the model, and so does NaN: neither a collapsed model, which gives every pair the same
    similarity, nor a diverged one must look perfect.

    Args:
        image_embeds: (I, D), of length 1.
        text_embeds: (T, D), of length 1.
        text_image_ids: (T,) integers, the id of the image that each caption describes.
        image_ids: (I,) integers, several images may share one; by default 0 to I - 1.
        num_kept: K, correct candidates and wrong ones each, to keep; 0 for the ranks alone.

    Returns:
        The rankings of images for each caption, and of captions for each image. On the CPU.

    Raises:
        ValueError: the number of ids is not that of the embeddings.
    """
    pairs = _SortedPairs(image_embeds, text_embeds, text_image_ids, image_ids)
    of_text = _Direction(pairs.num_texts, num_kept, image_embeds.device)
    of_image = _Direction(pairs.num_images, num_kept, image_embeds.device)
    # Correct candidates first: wrong ones ranked before the best of them are then counted block by block.
    for block in pairs.blocks(only_with_correct=True):
        assert block.is_correct is not None
        of_image.take_correct(block.images, block.similarity, block.is_correct)
        of_text.take_correct(block.texts, block.similarity.T, block.is_correct.T)
    for block in pairs.blocks():
        is_correct = block.is_correct
        of_image.take_wrong(block.images, block.texts, block.similarity, is_correct)
        is_correct = None if is_correct is None else is_correct.T
        of_text.take_wrong(block.texts, block.images, block.similarity.T, is_correct)
    return (
        of_text.ranking(pairs.text_order, pairs.image_order, pairs.images_of_text),
        of_image.ranking(pairs.image_order, pairs.text_order, pairs.texts_of_image),
    )


class _Block(NamedTuple):
    """Similarities of some images and some captions, both by their positions in the sorted order."""

    images: slice
    texts: slice
    similarity: Tensor  # (images, texts); the next block overwrites it
    is_correct: Tensor | None  # of the same shape; None where no pair is


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
                f"{len(text_image_ids)} do not match; pass one id for each."
            )
        device = image_embeds.device
        self.image_ids, self.image_order = image_ids.to(device).sort(stable=True)
        self.text_image_ids, self.text_order = text_image_ids.to(device).sort(stable=True)
        self.images = _in_order(image_embeds, self.image_order)
        self.texts = _in_order(text_embeds, self.text_order)
        self.texts_of_image = count_ids(self.image_ids, self.text_image_ids)
        self.images_of_text = count_ids(self.text_image_ids, self.image_ids)

    def blocks(self, only_with_correct: bool = False) -> Iterator[_Block]:
        """Compute the similarities block by block; if asked, only of blocks that may hold a correct pair."""
        buffer = torch.empty(IMAGE_BLOCK * TEXT_BLOCK, device=self.images.device)
        for text_start in range(0, self.num_texts, TEXT_BLOCK):
            texts = slice(text_start, min(text_start + TEXT_BLOCK, self.num_texts))
            ids = self.text_image_ids[texts]
            # The images of these captions are consecutive, since both are sorted.
            first = torch.searchsorted(self.image_ids, ids[0]).item()
            end = torch.searchsorted(self.image_ids, ids[-1], right=True).item()
            for image_start in range(0, self.num_images, IMAGE_BLOCK):
                images = slice(image_start, min(image_start + IMAGE_BLOCK, self.num_images))
                may_have_correct = images.start < end and first < images.stop
                if only_with_correct and not may_have_correct:
                    continue
                shape = (images.stop - images.start, texts.stop - texts.start)
                similarity = buffer[: shape[0] * shape[1]].view(shape)
                with torch.autocast(self.images.device.type, enabled=False), torch.no_grad():
                    torch.mm(self.images[images], self.texts[texts].T, out=similarity)
                is_correct = self.image_ids[images, None] == ids[None, :] if may_have_correct else None
                yield _Block(images, texts, similarity, is_correct)


class _Direction:
    """What is known so far about the candidates of the queries of one direction, both in sorted order."""

    def __init__(self, num_queries: int, num_kept: int, device: torch.device) -> None:
        self.num_kept = num_kept
        self.correct = torch.full((num_queries, max(num_kept, 1)), -torch.inf, device=device)
        self.wrong = torch.full((num_queries, num_kept), -torch.inf, device=device)
        self.rows = torch.full((num_queries, num_kept), -1, device=device)
        self.num_worse = torch.zeros(num_queries, dtype=torch.long, device=device)

    def take_correct(self, queries: slice, similarity: Tensor, is_correct: Tensor) -> None:
        """Keep the most similar correct candidates of a (queries, candidates) block; NaN is the least similar."""
        correct = similarity.nan_to_num(nan=-torch.inf).masked_fill(~is_correct, -torch.inf)
        num_kept = self.correct.shape[1]
        correct = correct.topk(min(num_kept, correct.shape[1]), dim=1).values
        self.correct[queries] = torch.cat([self.correct[queries], correct], dim=1).topk(num_kept, dim=1).values

    def take_wrong(self, queries: slice, candidates: slice, similarity: Tensor, is_correct: Tensor | None) -> None:
        """Count and keep wrong candidates of a block, once all correct ones are known."""
        # Counted are those worse than the best correct one: NaN never is, and nothing is worse than -inf.
        wrong = similarity if is_correct is None else similarity.masked_fill(is_correct, torch.inf)
        is_worse = wrong < self.correct[queries, :1]
        # Summed as integers: booleans take torch several times as long.
        self.num_worse[queries] += is_worse.view(torch.uint8).sum(dim=1, dtype=torch.int32)
        if not self.num_kept:
            return
        wrong = similarity if is_correct is None else similarity.masked_fill(is_correct, -torch.inf)
        # After some blocks, few queries find anything in the next one that is worth keeping.
        is_closer = ~(wrong.amax(dim=1) <= self.wrong[queries, -1])
        closer = is_closer.nonzero().squeeze(1)
        # NaN counts as most similar: here it is wrong.
        wrong = wrong[closer].nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        wrong, columns = wrong.topk(min(self.num_kept, wrong.shape[1]), dim=1)
        closer += queries.start
        values = torch.cat([self.wrong[closer], wrong], dim=1)
        rows = torch.cat([self.rows[closer], (columns + candidates.start).where(wrong > -torch.inf, -1)], dim=1)
        self.wrong[closer], best = values.topk(self.num_kept, dim=1)
        self.rows[closer] = rows.gather(1, best)

    def ranking(self, queries: Tensor, candidates: Tensor, num_correct: Tensor) -> Ranking:
        """Return the ranking in the original order; `queries` and `candidates` are the orders they were sorted in."""
        ranks = (len(candidates) - num_correct - self.num_worse).where(num_correct > 0, -1)
        rows = candidates[self.rows.clamp(min=0)].where(self.rows >= 0, -1) if len(candidates) else self.rows
        found = (ranks, self.correct[:, : self.num_kept], self.wrong, rows, num_correct)
        return Ranking(*(torch.empty_like(values).index_copy_(0, queries, values).cpu() for values in found))


def _in_order(embeds: Tensor, order: Tensor) -> Tensor:
    """Sort embeddings, without a copy where they are float32 and in order already."""
    is_sorted = bool((order[1:] > order[:-1]).all())
    return embeds.float() if is_sorted else embeds.float()[order]


def count_ids(ids: Tensor, sorted_ids: Tensor) -> Tensor:
    """Count how often each of `ids` occurs in `sorted_ids`."""
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
    """Scores of each query of one direction; queries without a correct candidate are left out.

    Attributes:
        ranks: (Q,) rank of the best correct candidate among the wrong ones, from 0.
        average_precision: (Q,) AP@10, in [0, 1]; see `Ranking.average_precision`.
        ids: (Q,) the image that each query shows or describes.
    """

    ranks: Tensor
    average_precision: Tensor
    ids: Tensor


def retrieval_scores(
    image_embeds: Tensor, text_embeds: Tensor, text_image_ids: Tensor, image_ids: Tensor | None = None
) -> dict[str, QueryScores]:
    """Score every query of both directions, for metrics and their intervals; arguments as in `rank_candidates`.

    Returns:
        Scores by direction: "text_to_image" and "image_to_text".
    """
    if image_ids is None:
        image_ids = torch.arange(len(image_embeds))
    rankings = rank_candidates(image_embeds, text_embeds, text_image_ids, image_ids, PRECISION_AT)
    return score_rankings(rankings, text_image_ids, image_ids)


def score_rankings(
    rankings: tuple[Ranking, Ranking], text_image_ids: Tensor, image_ids: Tensor
) -> dict[str, QueryScores]:
    """Convert what `rank_candidates` found to scores; see `retrieval_scores`."""
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
    """Measure retrieval in both directions; arguments as in `rank_candidates`, metrics as in `summarize_scores`."""
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
        For each direction `{direction}_r{k}`, the share of queries, in [0, 1], with a correct candidate among the
        first k; `{direction}_map10`, the mean of AP@10, in [0, 1]; `{direction}_mean_rank` and
        `{direction}_median_rank` of the best correct candidate, from 1. `mean_recall`: the mean of all recalls. NaN
        without a query.
    """
    metrics: dict[str, float] = {}
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
    """Return the expected recalls of a random order, under the same keys as `retrieval_metrics`.

    A query with c correct ones among N candidates misses all of them in k draws without replacement with probability
    C(N - c, k) / C(N, k).

    Args:
        text_image_ids: (T,) integers, the id of the image that each caption describes.
        image_ids: (I,) integers.
        recall_at: the values of k.

    Returns:
        The recalls, in [0, 1].
    """
    metrics: dict[str, float] = {}
    for direction, queries, candidates in zip(
        DIRECTIONS, (text_image_ids, image_ids), (image_ids, text_image_ids), strict=True
    ):
        num_candidates = len(candidates)
        num_correct = count_ids(queries, candidates.sort().values).double()
        num_correct, num_queries = num_correct[num_correct > 0].unique(return_counts=True)
        for k in recall_at:
            drawn = torch.arange(min(k, num_candidates))
            miss = (
                ((num_candidates - num_correct[:, None] - drawn) / (num_candidates - drawn)).clamp(min=0).prod(dim=1)
            )
            metrics[f"{direction}_r{k}"] = ((1 - miss) @ num_queries.double() / num_queries.sum()).item()
    return {**metrics, "mean_recall": sum(metrics.values()) / len(metrics)}
