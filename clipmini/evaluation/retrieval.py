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

import numpy as np
import torch
from scipy.stats import hypergeom
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
    num_images, num_texts, device = len(image_embeds), len(text_embeds), image_embeds.device
    if image_ids is None:
        image_ids = torch.arange(num_images)
    if len(image_ids) != num_images or len(text_image_ids) != num_texts:
        raise ValueError(
            f"{num_images} images with {len(image_ids)} ids and {num_texts} captions with {len(text_image_ids)} do "
            "not match; pass one id for each."
        )
    image_ids, image_order = image_ids.to(device).sort(stable=True)
    text_image_ids, text_order = text_image_ids.to(device).sort(stable=True)
    of_text = _Direction(num_texts, num_kept, device)
    of_image = _Direction(num_images, num_kept, device)
    sorted_pairs = _in_order(image_embeds, image_order), _in_order(text_embeds, text_order), image_ids, text_image_ids
    # Correct candidates first: wrong ones ranked before the best of them are then counted block by block.
    for images, texts, similarity, is_correct in _blocks(*sorted_pairs, only_with_correct=True):
        assert is_correct is not None
        of_image.take_correct(images, similarity, is_correct)
        of_text.take_correct(texts, similarity.T, is_correct.T)
    for images, texts, similarity, is_correct in _blocks(*sorted_pairs):
        of_image.take_wrong(images, texts, similarity, is_correct)
        of_text.take_wrong(texts, images, similarity.T, None if is_correct is None else is_correct.T)
    return (
        of_text.ranking(text_order, image_order, count_ids(text_image_ids, image_ids)),
        of_image.ranking(image_order, text_order, count_ids(image_ids, text_image_ids)),
    )


def _blocks(
    images: Tensor, texts: Tensor, image_ids: Tensor, text_image_ids: Tensor, only_with_correct: bool = False
) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
    """Compute similarities block by block, of images and captions sorted by id.

    Yields:
        The rows of some images and of some captions, their (images, captions) similarities, which the next block
        overwrites, and which of them are of correct pairs: None where no pair is. If asked, only blocks where one may.
    """
    buffer = torch.empty(IMAGE_BLOCK * TEXT_BLOCK, device=images.device)
    for text_start in range(0, len(texts), TEXT_BLOCK):
        text_rows = slice(text_start, text_start + TEXT_BLOCK)
        some_texts, ids = texts[text_rows], text_image_ids[text_rows]
        # The images of these captions are consecutive, since both are sorted.
        first = torch.searchsorted(image_ids, ids[0]).item()
        end = torch.searchsorted(image_ids, ids[-1], right=True).item()
        for image_start in range(0, len(images), IMAGE_BLOCK):
            image_rows = slice(image_start, image_start + IMAGE_BLOCK)
            may_have_correct = image_rows.start < end and first < image_rows.stop
            if only_with_correct and not may_have_correct:
                continue
            some_images = images[image_rows]
            similarity = buffer[: len(some_images) * len(some_texts)].view(len(some_images), len(some_texts))
            with torch.autocast(images.device.type, enabled=False), torch.no_grad():
                torch.mm(some_images, some_texts.T, out=similarity)
            yield image_rows, text_rows, similarity, image_ids[image_rows, None] == ids if may_have_correct else None


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
        average_precision: (Q,) AP@10, in [0, 1].
        ids: (Q,) the image that each query shows or describes.
    """

    ranks: Tensor
    average_precision: Tensor
    ids: Tensor


def retrieval_scores(
    image_embeds: Tensor, text_embeds: Tensor, text_image_ids: Tensor, image_ids: Tensor | None = None
) -> dict[str, QueryScores]:
    """Score every query, by direction, for metrics and their intervals; arguments as in `rank_candidates`."""
    if image_ids is None:
        image_ids = torch.arange(len(image_embeds))
    rankings = rank_candidates(image_embeds, text_embeds, text_image_ids, image_ids, PRECISION_AT)
    return score_rankings(rankings, text_image_ids, image_ids)


def score_rankings(
    rankings: tuple[Ranking, Ranking], text_image_ids: Tensor, image_ids: Tensor
) -> dict[str, QueryScores]:
    """Convert what `rank_candidates` found to the scores of every query, by direction."""
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
        scores: by direction.
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
    recalls = {f"{direction}_r{k}": metrics[f"{direction}_r{k}"] for direction in scores for k in recall_at}
    return {**recalls, "mean_recall": sum(recalls.values()) / len(recalls), **metrics}


def chance_metrics(
    text_image_ids: Tensor, image_ids: Tensor, recall_at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """Return the expected recalls of a random order, in [0, 1], under the same keys as `retrieval_metrics`.

    The number of correct ones among the first k of N candidates, of which c are correct, is hypergeometric.

    Args:
        text_image_ids: (T,) integers, the id of the image that each caption describes.
        image_ids: (I,) integers.
        recall_at: the values of k.
    """
    metrics: dict[str, float] = {}
    ids = ((text_image_ids, image_ids), (image_ids, text_image_ids))
    for direction, (queries, candidates) in zip(DIRECTIONS, ids, strict=True):
        num_correct = count_ids(queries, candidates.sort().values)
        num_correct, num_queries = num_correct[num_correct > 0].unique(return_counts=True)
        for k in recall_at:
            found = hypergeom.sf(0, len(candidates), num_correct.numpy(), min(k, len(candidates)))
            metrics[f"{direction}_r{k}"] = (torch.from_numpy(found) @ num_queries.double() / num_queries.sum()).item()
    return {**metrics, "mean_recall": sum(metrics.values()) / len(metrics)}
