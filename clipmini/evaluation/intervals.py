"""How sure a figure is: bootstrap intervals over images.

The captions of one image succeed and fail together, so images are drawn, not queries: each resample takes as many
images as there are, with replacement, each with all of its queries (the cluster bootstrap; Efron and Tibshirani, An
Introduction to the Bootstrap, 1993). The answers to choose from stay all of them. What is resampled is the evaluation
set alone: an interval says nothing about how another training seed would do. And a recall of 0 or 1 is the same in
every resample: its interval is a point, however small the set.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .retrieval import PRECISION_AT, RECALL_AT, QueryScores, summarize_scores

NUM_RESAMPLES = 1000
LEVEL = 0.95
MAX_WEIGHTS = 20_000_000  # of resamples times queries in memory at once


@dataclass(frozen=True)
class Interval:
    """A figure and its interval.

    Attributes:
        value: the figure on the whole set.
        low: lower end of the interval of level 95 %, a percentile of the resamples.
        high: its upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A difference of two models, first less second, on the same queries.

    Attributes:
        p_value: two-sided, in (0, 1]: twice the share of resamples in which the difference is zero or has the other
            sign. Below 0.05 the interval leaves out zero.
    """

    p_value: float


def bootstrap_intervals(
    scores: dict[str, QueryScores],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    recall_at: Sequence[int] = RECALL_AT,
) -> dict[str, Interval]:
    """Give every metric of `summarize_scores` with its 95 % interval.

    Args:
        scores: as `retrieval_scores` gives.
        num_resamples: how many sets of images to draw.
        seed: of the draws.
        recall_at: the values of k.

    Returns:
        The intervals by metric; NaN where there is no query.
    """
    values = summarize_scores(scores, recall_at)
    drawn = _resample(scores, num_resamples, seed, recall_at)
    return {name: Interval(value, *percentiles(drawn[name])) for name, value in values.items()}


def paired_bootstrap(
    first: dict[str, QueryScores], second: dict[str, QueryScores], num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, Difference]:
    """Say by how much two models differ on the same set, and how sure that is.

    Both are measured on the same resamples, so that what makes an image hard for both does not blur the difference.

    Args:
        first: as `retrieval_scores` gives.
        second: another model's, of the same queries in the same order.
        num_resamples: how many sets of images to draw.
        seed: of the draws.

    Returns:
        For every metric, first less second. Of ranks less is better, of all else more.

    Raises:
        ValueError: the queries are not the same.
    """
    for direction, scores in first.items():
        if not torch.equal(scores.ids, second[direction].ids):
            raise ValueError(
                "Two models are compared on the same images and captions in the same order; these have "
                f"{len(scores.ids)} and {len(second[direction].ids)} queries {direction.replace('_', ' ')}."
            )
    values, others = summarize_scores(first), summarize_scores(second)
    drawn, drawn_others = (_resample(scores, num_resamples, seed, RECALL_AT) for scores in (first, second))
    differences = {}
    for name, value in values.items():
        difference = drawn[name] - drawn_others[name]
        differences[name] = _difference(value - others[name], difference)
    return differences


def paired_shares(
    first: np.ndarray, second: np.ndarray, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Difference:
    """Say by how much two shares of the same images differ, such as the accuracies of two models.

    Args:
        first: (N,) which images count for the first share.
        second: (N,) likewise.
        num_resamples: how many sets of images to draw.
        seed: of the draws.

    Returns:
        First less second.
    """
    differences = first.astype(float) - second.astype(float)
    num_images = len(differences)
    drawn = [weights @ differences for weights in resample_weights(num_images, num_images, num_resamples, seed)]
    return _difference(differences.mean(), np.concatenate(drawn) / num_images)


def _difference(value: float, drawn: np.ndarray) -> Difference:
    if np.isnan(value):  # there was nothing to compare
        return Difference(*[float("nan")] * 4)
    smaller = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p_value = min(1.0, 2 * int(smaller + 1) / (len(drawn) + 1))  # the set itself counts as one of the resamples
    return Difference(float(value), *percentiles(drawn), p_value)


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """Give the ends of the 95 % interval of a figure's (resamples,) values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resample(
    scores: dict[str, QueryScores], num_resamples: int, seed: int, recall_at: Sequence[int]
) -> dict[str, np.ndarray]:
    """Give every metric on each resample: (resamples,)."""
    ids = torch.cat([score.ids for score in scores.values()])
    images, cluster = np.unique(ids.numpy(), return_inverse=True)
    clusters = np.split(cluster, np.cumsum([len(score.ids) for score in scores.values()])[:-1])
    parts = [
        {
            name: values
            for (direction, score), own in zip(scores.items(), clusters, strict=True)
            for name, values in _weighted(direction, score, own, weights, recall_at).items()
        }
        for weights in resample_weights(len(images), len(ids), num_resamples, seed)
    ]
    drawn = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    recalls = [values for name, values in drawn.items() if name.rpartition("_r")[2].isdigit()]
    return {**drawn, "mean_recall": np.mean(recalls, axis=0)}


def resample_weights(num_images: int, num_queries: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Draw how often each image comes up in each resample.

    Args:
        num_images: images that there are, and that each resample takes.
        num_queries: what is to be weighed by the draws; the more, the fewer resamples come at once.
        num_resamples: how many resamples to draw.
        seed: of the draws.

    Yields:
        (R, images) counts, R resamples at a time until there are `num_resamples`.
    """
    random = np.random.default_rng(seed)
    at_once = max(1, MAX_WEIGHTS // max(1, num_queries))
    for start in range(0, num_resamples, at_once):
        rows = range(min(at_once, num_resamples - start))
        draws = (random.integers(max(1, num_images), size=num_images) for _ in rows)
        yield np.stack([np.bincount(drawn, minlength=num_images) for drawn in draws])


def _weighted(
    direction: str, score: QueryScores, cluster: np.ndarray, weights: np.ndarray, recall_at: Sequence[int]
) -> dict[str, np.ndarray]:
    """Give one direction's metrics under each row of (R, images) weights."""
    num_images = weights.shape[1]
    ranks = score.ranks.numpy()
    num_queries = weights @ np.bincount(cluster, minlength=num_images)

    def mean(values: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # a resample may hold no query of this direction
            return weights @ np.bincount(cluster, weights=values, minlength=num_images) / num_queries

    order = np.argsort(ranks, kind="stable")
    places = ranks[order] + 1.0
    up_to = np.cumsum(weights[:, cluster[order]], axis=1)  # (R, Q): queries at this place or before
    middle = [_places_of(half, up_to, places) for half in ((num_queries - 1) // 2, num_queries // 2)]
    return {
        **{f"{direction}_r{k}": mean((ranks < k).astype(float)) for k in recall_at},
        f"{direction}_map{PRECISION_AT}": mean(score.average_precision.double().numpy()),
        f"{direction}_median_rank": np.mean(middle, axis=0),
        f"{direction}_mean_rank": mean(ranks + 1.0),
    }


def _places_of(index: np.ndarray, up_to: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Give the place of the query that stands at an index, from 0, of each resample's sorted queries."""
    if not len(places):
        return np.full(len(index), np.nan)
    return places[np.minimum((up_to <= index[:, None]).sum(axis=1), len(places) - 1)]
