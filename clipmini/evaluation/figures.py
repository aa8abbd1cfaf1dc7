"""Drawings of a report: each function returns an SVG element to embed in its page.

Their colors are variables of the page, so that they can be read in its dark scheme too.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .diagnostics import PRECISIONS
from .naming import DIRECTION_LABELS
from .retrieval import DIRECTIONS

INK, GRAY, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN = "#2563eb", "#d97706", "#059669"
VARIABLES = {INK: "ink", GRAY: "gray", GRID: "line", BLUE: "blue", ORANGE: "orange", GREEN: "green"}
SHADE = (59, 130, 246)  # of a confusion matrix, on white and on black
COLORS = dict(zip(DIRECTIONS, (BLUE, ORANGE), strict=True))
SIZE = (5.2, 3.1)  # inches; half the width of the page
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, which is smaller and takes the page's font
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": INK,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "clipmini",  # the same data gives the same SVG
}
MAX_NAMES, MAX_COUNTS = 40, 15  # classes whose names fit beside a confusion matrix, and whose counts fit into it


def draw_recall_curve(
    curves: Mapping[str, Mapping[str, Sequence[float]]], chance: Mapping[str, Sequence[float]]
) -> str:
    """Draw recall at k over k.

    Args:
        curves: by model, then by direction, recalls in [0, 1] for k from 1; the second model is dashed.
        chance: by direction, the same for a random order.
    """
    with rc_context(STYLE):
        figure, axes = _new()
        for number, (model, by_direction) in enumerate(curves.items()):
            for direction, recalls in by_direction.items():
                label = DIRECTION_LABELS[direction] + (f", {model}" if len(curves) > 1 else "")
                ks = range(1, len(recalls) + 1)
                style = "--" if number else "-"
                axes.plot(ks, 100 * np.array(recalls), style, color=COLORS[direction], label=label)
        last = list(chance)[-1]
        for direction, recalls in chance.items():
            ks = range(1, len(recalls) + 1)
            axes.plot(ks, 100 * np.array(recalls), ":", color=GRAY, label="chance" if direction == last else None)
        axes.set_xscale("log")
        longest = max(map(len, chance.values()))
        ticks = [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= longest]
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.set(xlabel="k", ylabel="R@k, in %", ylim=(0, 102))
        axes.legend(loc="best")
        return _svg(figure, f"Recall at k for k from 1 to {longest}.")


def draw_ranks(ranks: Mapping[str, np.ndarray]) -> str:
    """Draw a histogram of ranks, which count from 0, by direction."""
    edges = np.array([0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000, 100_000, np.inf])
    names = ["1", "2", "3", "4-5", "6-10", "11-20", "21-50", "51-100", "101-200", "201-500", "501-1000"]
    names += ["to 10,000", "to 100,000", "beyond"]
    last = max((int(np.searchsorted(edges, one.max(), side="right")) for one in ranks.values() if len(one)), default=1)
    with rc_context(STYLE):
        figure, axes = _new()
        for number, (direction, values) in enumerate(ranks.items()):
            counts = np.histogram(values, bins=edges)[0][:last]
            shares = 100 * counts / max(1, len(values))
            x = np.arange(last) + 0.4 * number - 0.2
            axes.bar(x, shares, 0.38, color=COLORS[direction], label=DIRECTION_LABELS[direction])
        style: dict[str, Any] = {"rotation": 40, "ha": "right"} if last > 6 else {}
        axes.set_xticks(range(last), names[:last], **style)
        axes.set(xlabel="rank of the best correct answer", ylabel="queries, in %")
        axes.grid(axis="x", visible=False)
        axes.legend(loc="best")
        return _svg(figure, "Share of queries by the rank of their best correct answer.")


def draw_similarities(matching: np.ndarray, others: np.ndarray) -> str:
    """Draw histograms of the cosines of captions with their own images and with others."""
    # float64, since a collapsed model's are all alike, and float32 has no 60 numbers between them.
    matching, others = (values[np.isfinite(values)].astype(float) for values in (matching, others))
    both = np.concatenate([matching, others])
    bins = np.linspace(both.min(initial=1), both.max(initial=-1) + 1e-6, 61)
    with rc_context(STYLE):
        figure, axes = _new()
        for values, color, label in ((others, GRAY, "other images"), (matching, GREEN, "correct image")):
            if len(values):
                axes.hist(values, bins.tolist(), density=True, color=color, alpha=0.55, label=label)
        axes.set(xlabel="cosine similarity of a caption and an image", ylabel="density")
        axes.set_yticks([])
        axes.legend(loc="best")
        return _svg(figure, "Similarities of captions to their own images and to others.")


def draw_compression(by_width: Mapping[int, float], by_precision: Mapping[str, float]) -> str:
    """Draw mean recall over the size of an embedding.

    Args:
        by_width: mean recall, in [0, 1], of embeddings truncated to some widths.
        by_precision: mean recall of embeddings of the largest of these widths, by name as in `PRECISIONS`.
    """
    largest = max(by_width)
    truncated = {4 * width: (str(width), recall) for width, recall in sorted(by_width.items())}
    rounded = {largest * PRECISIONS[name] / 8: (name, recall) for name, recall in by_precision.items()}
    series = (
        ("truncated, float32", "o-", BLUE, -15, truncated),
        (f"{largest} dimensions, fewer bits", "s--", ORANGE, 7, rounded),
    )
    with rc_context(STYLE):
        figure, axes = _new()
        for label, line, color, offset, points in series:
            if len(points) < 2:
                continue
            axes.plot(list(points), [100 * recall for _, recall in points.values()], line, color=color, label=label)
            for size, (name, recall) in points.items():
                if name != "float32":  # the same point as the largest width, which has a label
                    style: dict[str, Any] = {"textcoords": "offset points", "xytext": (0, offset), "ha": "center"}
                    axes.annotate(name, (size, 100 * recall), color=color, **style)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="bytes of an embedding", ylabel="mean recall, in %")
        axes.margins(x=0.1, y=0.25)
        axes.legend(loc="lower right")
        return _svg(figure, "Mean recall over the size of an embedding.")


def draw_confusion(confusion: np.ndarray, names: Sequence[str]) -> str:
    """Draw a confusion matrix: (C, C) numbers of images by label (row) and predicted class (column)."""
    shares = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    has_names = len(names) <= MAX_NAMES
    edge = min(9.0, 3 + 0.22 * len(names)) if has_names else 6.0
    with rc_context({**STYLE, "axes.grid": False}):
        figure, axes = _new((edge + 1, edge))
        pixels = np.empty((*shares.shape, 4))
        pixels[..., :3], pixels[..., 3] = np.array(SHADE) / 255, shares
        axes.imshow(pixels, interpolation="nearest")
        for label, predicted in np.argwhere(confusion) if len(names) <= MAX_COUNTS else ():
            axes.text(predicted, label, f"{confusion[label, predicted]:,}", ha="center", va="center")
        shown = names if has_names else []
        axes.set_xticks(range(len(shown)), shown, rotation=60, ha="right", parse_math=False)
        axes.set_yticks(range(len(shown)), shown, parse_math=False)
        axes.set(xlabel="predicted", ylabel="label")
        return _svg(figure, "Confusion matrix.")


def _new(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, title: str) -> str:
    """Return the SVG element alone, without the XML header, as wide as its container, but not enlarged."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Title": title})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for color, name in VARIABLES.items():
        svg = svg.replace(color, f"var(--{name}, {color})")
    size = f'width="100%" style="max-width: {96 * figure.get_figwidth():.0f}px" role="img"'
    return re.sub(r'width="[^"]*" height="[^"]*"', size, svg, count=1)
