"""Bootstrap intervals over images: how sure a metric is.

The captions of one image succeed and fail together, so images are resampled, not queries: each resample draws as many
images as there are, with replacement, each with all of its queries (the cluster bootstrap; Efron and Tibshirani, An
Introduction to the Bootstrap, 1993). The candidates stay the whole set. Only the evaluation set is resampled: an
interval says nothing about how another training seed would do. And a recall of 0 or 1 is the same in every resample,
so its interval is a point, however small the set.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .retrieval import RECALL_AT, QueryScores, query_values, summarize_scores

NUM_RESAMPLES = 1000
LEVEL = 0.95
MAX_WEIGHTS = 20_000_000  # resamples times images in memory at once


@dataclass(frozen=True)
class Interval:
    """A metric and its 95 % interval.

    Attributes:
        value: the metric on the whole set.
        low: lower end, a percentile of the resamples; NaN where there is no interval, as for a median rank.
        high: upper end; likewise.
    """

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Difference(Interval):
    """The difference of two models, first minus second, on the same queries.

    Attributes:
        p_value: two-sided, in (0, 1]: twice the share of resamples whose difference is zero or has the other sign.
            Below 0.05 the interval excludes zero. NaN where there is no interval.
    """

    p_value: float = math.nan


def bootstrap_intervals(
    scores: Mapping[str, QueryScores],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    recall_at: Sequence[int] = RECALL_AT,
) -> dict[str, Interval]:
    """Return every metric of `summarize_scores` with its 95 % interval; median ranks and empty sets have none."""
    resampled = _resample(scores, num_resamples, seed, recall_at)
    return {
        name: Interval(value, *percentiles(resampled[name])) if name in resampled else Interval(value)
        for name, value in summarize_scores(scores, recall_at).items()
    }


def interval_ends(metrics: Mapping[str, Interval]) -> dict[str, list[float]]:
    """Return [low, high] of every metric that has an interval."""
    return {name: [metric.low, metric.high] for name, metric in metrics.items() if math.isfinite(metric.low)}


def paired_bootstrap(
    first: Mapping[str, QueryScores], second: Mapping[str, QueryScores], num_resamples: int = NUM_RESAMPLES
) -> dict[str, Difference]:
    """Return how much two models differ on the same queries: first minus second, by metric.

    Both are measured on the same resamples, so that images that are hard for both do not blur the difference.

    Raises:
        ValueError: the queries are not the same, or not in the same order.
    """
    for direction, scores in first.items():
        if not torch.equal(scores.ids, second[direction].ids):
            raise ValueError(
                "Two models are compared on the same images and captions in the same order; these have "
                f"{len(scores.ids)} and {len(second[direction].ids)} queries {direction.replace('_', ' ')}."
            )
    second_values = summarize_scores(second)
    resampled, second_resampled = (_resample(scores, num_resamples, 0, RECALL_AT) for scores in (first, second))
    return {
        name: _difference(value - second_values[name], resampled[name] - second_resampled[name])
        if name in resampled
        else Difference(value - second_values[name])
        for name, value in summarize_scores(first).items()
    }


def paired_shares(first: np.ndarray, second: np.ndarray) -> Difference:
    """Return how much two shares of the same images differ: first minus second, each of (N,) booleans."""
    differences = first.astype(float) - second.astype(float)
    weights = resample_weights(len(differences), NUM_RESAMPLES, seed=0)
    return _difference(differences.mean(), np.concatenate([part @ differences for part in weights]) / len(differences))


def _difference(value: float, resampled: np.ndarray) -> Difference:
    if np.isnan(value):  # there was nothing to compare
        return Difference(math.nan)
    smaller = min((resampled <= 0).sum(), (resampled >= 0).sum())
    p_value = min(1.0, 2 * int(smaller + 1) / (len(resampled) + 1))  # the set itself counts as one of the resamples
    return Difference(float(value), *percentiles(resampled), p_value)


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a metric's (resamples,) values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resample(
    scores: Mapping[str, QueryScores], num_resamples: int, seed: int, recall_at: Sequence[int]
) -> dict[str, np.ndarray]:
    """Return every metric that is a mean over queries, on each resample: (resamples,)."""
    images = np.unique(np.concatenate([score.ids.numpy() for score in scores.values()]))
    sums, counts = {}, []  # (images,) of each metric: its values summed over an image's queries, and their number
    for direction, score in scores.items():
        image_of_query = np.searchsorted(images, score.ids.numpy())
        values = query_values(direction, score, recall_at)
        for name, value in values.items():
            sums[name] = np.bincount(image_of_query, weights=value.numpy(), minlength=len(images))
        counts += [np.bincount(image_of_query, minlength=len(images)).astype(float)] * len(values)
    with np.errstate(invalid="ignore"):  # a resample may hold no query of one direction
        means = [
            weights @ np.stack(list(sums.values()), axis=1) / (weights @ np.stack(counts, axis=1))
            for weights in resample_weights(len(images), num_resamples, seed)
        ]
    resampled = dict(zip(sums, np.concatenate(means).T, strict=True))
    recalls = [resampled[f"{direction}_r{k}"] for direction in scores for k in recall_at]
    return {**resampled, "mean_recall": np.mean(recalls, axis=0)}


def resample_weights(num_images: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Draw how often each image occurs in each resample: (R, images) counts, R resamples at a time."""
    random = np.random.default_rng(seed)
    at_once = max(1, MAX_WEIGHTS // max(1, num_images))
    for start in range(0, num_resamples, at_once):
        rows = range(min(at_once, num_resamples - start))
        draws = (random.integers(max(1, num_images), size=num_images) for _ in rows)
        yield np.stack([np.bincount(images, minlength=num_images) for images in draws])
