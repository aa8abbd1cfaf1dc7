"""Metrics as people read them, in percent, and as a model card's metadata hold them."""

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult

from clipmini.names import hub_id, public_name

from .intervals import Interval
from .retrieval import DIRECTIONS

DIRECTION_LABELS = {direction: direction.replace("_", " ") for direction in DIRECTIONS}
METRIC_LABELS = {
    **{
        f"{direction}_{metric}": f"{words} {label}"
        for direction, words in DIRECTION_LABELS.items()
        for metric, label in (
            ("r1", "R@1"),
            ("r5", "R@5"),
            ("r10", "R@10"),
            ("map10", "mAP@10"),
            ("mean_rank", "mean rank"),
            ("median_rank", "median rank"),
        )
    },
    "mean_recall": "mean recall",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_per_class": "mean accuracy per class",
}


def format_number(value: float, num_digits: int) -> str:
    """Format a number with so many decimals; "-" for NaN and infinity."""
    return f"{value:.{num_digits}f}" if math.isfinite(value) else "-"


def format_figure(name: str, value: float) -> str:
    """Format a metric: shares in percent, ranks as they are, with one decimal; "-" for NaN."""
    if not math.isfinite(value):
        return "-"
    return f"{value:,.1f}" if name.endswith("_rank") else f"{100 * value:.1f}"


def format_interval(name: str, interval: Interval) -> str:
    """Format the ends of an interval: "29.1 to 31.5"; "" where there is none."""
    if not math.isfinite(interval.low):
        return ""
    return f"{format_figure(name, interval.low)} to {format_figure(name, interval.high)}"


def format_with_interval(name: str, interval: Interval) -> str:
    """Format a metric and its interval: "30.3 (29.1 to 31.5)"."""
    return f"{format_figure(name, interval.value)} ({format_interval(name, interval)})"


def eval_results(task: str, data: Mapping[str, Any], metrics: Mapping[str, Interval]) -> list[EvalResult]:
    """Convert metrics to entries of a model card's metadata.

    Args:
        task: the task's name on the Hub, such as "image-text-retrieval".
        data: `source` and `split`.
        metrics: by name as in `METRIC_LABELS`.

    Returns:
        One entry for each finite metric, with its interval.
    """
    source = str(data["source"])
    return [
        EvalResult(
            task_type=task,
            dataset_type=hub_id(source) or "local",
            dataset_name=public_name(source),
            dataset_split=data.get("split"),
            metric_type=name,
            metric_name=METRIC_LABELS[name],
            metric_value=round(interval.value, 4),
            metric_args={"interval_95": [round(interval.low, 4), round(interval.high, 4)]}
            if math.isfinite(interval.low)
            else None,
        )
        for name, interval in metrics.items()
        if math.isfinite(interval.value)
    ]
