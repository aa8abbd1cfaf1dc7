"""Retrieval metrics, as pure functions of embeddings.

Shape letters: I images, T captions, D the width of the shared space, Q queries of one direction.

A caption's right answers are the images with its id, an image's the captions with its id: any number of either. Each
query counts once, in its direction; one without a right answer stands in the way of others, and is itself no query.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .ranking import Ranking, count_ids, rank_answers

RECALL_AT = (1, 5, 10)
PRECISION_AT = 10
DIRECTIONS = ("text_to_image", "image_to_text")
METRIC_NAMES = (
    *(f"{direction}_r{k}" for direction in DIRECTIONS for k in RECALL_AT),
    "mean_recall",
    *(
        f"{direction}_{name}"
        for direction in DIRECTIONS
        for name in (f"map{PRECISION_AT}", "median_rank", "mean_rank")
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
    image_embeds: Tensor, text_embeds: Tensor, text_ids: Tensor, image_ids: Tensor | None = None
) -> dict[str, QueryScores]:
    """Score every query of both directions, from which metrics and their intervals are made.

    Args:
        image_embeds: (I, D), of length 1.
        text_embeds: (T, D), of length 1.
        text_ids: (T,) integers, the id of the image that each caption describes.
        image_ids: (I,) integers, several images may share one; by default 0 to I - 1.

    Returns:
        Scores by direction: "text_to_image" and "image_to_text".
    """
    if image_ids is None:
        image_ids = torch.arange(len(image_embeds))
    rankings = rank_answers(image_embeds, text_embeds, text_ids, image_ids, PRECISION_AT)
    return score_rankings(rankings, text_ids, image_ids)


def score_rankings(rankings: tuple[Ranking, Ranking], text_ids: Tensor, image_ids: Tensor) -> dict[str, QueryScores]:
    """Make scores of what `rank_answers` found; see `retrieval_scores`."""
    scores = {}
    for direction, ranking, ids in zip(DIRECTIONS, rankings, (text_ids, image_ids), strict=True):
        is_query = ranking.ranks >= 0
        precision = ranking.average_precision()[is_query]
        scores[direction] = QueryScores(ranking.ranks[is_query], precision, ids.cpu()[is_query])
    return scores


def retrieval_metrics(
    image_embeds: Tensor,
    text_embeds: Tensor,
    text_ids: Tensor,
    image_ids: Tensor | None = None,
    recall_at: Sequence[int] = RECALL_AT,
) -> dict[str, float]:
    """Measure retrieval in both directions, over the whole set.

    Args:
        image_embeds: (I, D), of length 1.
        text_embeds: (T, D), of length 1.
        text_ids: (T,) integers, the id of the image that each caption describes.
        image_ids: (I,) integers, several images may share one; by default 0 to I - 1.
        recall_at: the values of k.

    Returns:
        As [`summarise_scores`] gives it.
    """
    return summarise_scores(retrieval_scores(image_embeds, text_embeds, text_ids, image_ids), recall_at)


def summarise_scores(scores: dict[str, QueryScores], recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Average the scores of all queries.

    Args:
        scores: as `retrieval_scores` gives.
        recall_at: the values of k.

    Returns:
        For each direction `{direction}_r{k}`, the share of queries, in [0, 1], with a right answer among the first k;
        `{direction}_map10`, the mean of AP@10, in [0, 1]; `{direction}_median_rank` and `{direction}_mean_rank`, of
        the best placed right answer, 1 being first. `mean_recall`: the mean of all recalls. NaN without a query.
    """
    recalls, others = {}, {}
    for direction, score in scores.items():
        for k in recall_at:
            recalls[f"{direction}_r{k}"] = (score.ranks < k).double().mean().item()
        places = score.ranks.double() + 1
        others[f"{direction}_map{PRECISION_AT}"] = score.average_precision.double().mean().item()
        others[f"{direction}_median_rank"] = float(np.median(places)) if len(places) else float("nan")
        others[f"{direction}_mean_rank"] = places.mean().item()
    return {**recalls, "mean_recall": sum(recalls.values()) / len(recalls), **others}


def chance_metrics(text_ids: Tensor, image_ids: Tensor, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Give the recalls that a random order reaches on the same set, under the same keys as `retrieval_metrics`.

    A query with c right answers among N misses all of them in k draws without replacement with probability
    C(N - c, k) / C(N, k).

    Args:
        text_ids: (T,) integers, the id of the image that each caption describes.
        image_ids: (I,) integers.
        recall_at: the values of k.

    Returns:
        The expected recalls, in [0, 1].
    """
    metrics = {}
    for direction, queries, answers in zip(DIRECTIONS, (text_ids, image_ids), (image_ids, text_ids), strict=True):
        num_answers = len(answers)
        num_right = count_ids(queries, answers.sort().values).double()
        num_right, num_queries = num_right[num_right > 0].unique(return_counts=True)
        for k in recall_at:
            drawn = torch.arange(min(k, num_answers))
            miss = ((num_answers - num_right[:, None] - drawn) / (num_answers - drawn)).clamp(min=0).prod(dim=1)
            metrics[f"{direction}_r{k}"] = ((1 - miss) @ num_queries.double() / num_queries.sum()).item()
    return {**metrics, "mean_recall": sum(metrics.values()) / len(metrics)}
