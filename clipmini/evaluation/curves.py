"""Draw the curves of a training run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clipmini.files import atomic_write

from .naming import METRIC_LABELS
from .retrieval import DIRECTIONS

RECALL_STYLES = {
    f"{direction}_r{k}": (color, style)
    for direction, color in zip(DIRECTIONS, ("tab:blue", "tab:orange"), strict=True)
    for k, style in ((1, "-"), (5, "--"))
}
TITLES = ("training loss", "retrieval on the validation split", "temperature", "learning rate, in units of 0.001")
Histories = Mapping[str, Sequence[Mapping[str, float]]]


def draw_curves(stages: Histories, out: Path) -> None:
    """Draw loss, validation recalls, temperature and learning rate over the epochs, as a PNG.

    Args:
        stages: `trainer.state.log_history` of each stage by name, in order. Their epochs follow each other, with a
            line where a stage begins; curves do not cross it, since batch sizes and learning rates differ.
        out: the file to write.
    """
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    (loss, recall), (temperature, rate) = figure.subplots(2, 2, sharex=True, height_ratios=(2, 1))
    _plot(loss, stages, "loss", color="tab:green")
    loss.set_ylabel("nats")
    for name, (color, style) in RECALL_STYLES.items():
        options = {"color": color, "linestyle": style, "marker": ".", "label": METRIC_LABELS[name]}
        _plot(recall, stages, f"eval_{name}", lambda value: 100 * value, **options)
    recall.set_ylabel("recall, %")
    recall.set_ylim(bottom=0)
    if recall.lines:
        recall.legend()
    _plot(temperature, stages, "logit_scale", lambda value: 1 / value, color="tab:red")
    # Trainer logs the learning rate of the first parameter group only.
    _plot(rate, stages, "learning_rate", lambda value: 1000 * value, color="tab:purple")
    for axes, title in zip((loss, recall, temperature, rate), TITLES, strict=True):
        axes.set_title(title, loc="left")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        for start in _starts(stages)[1:]:
            axes.axvline(start, color="gray", linestyle=":")
    for axes in (temperature, rate):
        axes.set_xlabel("epoch")
    if len(stages) > 1:
        for name, start in zip(stages, _starts(stages), strict=True):
            loss.annotate(f" {name}", (start, 1), xycoords=("data", "axes fraction"), va="top", color="gray")
    with atomic_write(out) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def draw_tradeoff(line: Mapping[str, Any], out: Path) -> None:
    """Draw what models between two have gained on new data over how they have changed on kept data, as a PNG.

    Args:
        line: `interpolation` of `results.json`.
        out: the file to write.
    """
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    names = {0.0: f"0: {line['start']}", 1.0: f"1: {line['tuned']}"}
    chosen = line["weight"]
    names[chosen] = f"{names.get(chosen, f'{chosen:g}')}, chosen"
    colors = {0.0: "tab:blue", 1.0: "tab:orange", chosen: "tab:green"}
    points = {
        point["weight"]: [
            {end: 100 * point[key][end] for end in ("value", "low", "high")} for key in ("lost", "gained")
        ]
        for point in line["points"]
    }
    axes.plot(*zip(*[(x["value"], y["value"]) for x, y in points.values()], strict=True), ".-", color="gray")
    for weight, (x, y) in points.items():
        place, color = (x["value"], y["value"]), colors.get(weight, "gray")
        if weight in names:
            xerr, yerr = ([[one["value"] - one["low"]], [one["high"] - one["value"]]] for one in (x, y))
            marker = "*" if weight == chosen else "o"
            axes.errorbar(*place, xerr=xerr, yerr=yerr, color=color, marker=marker, markersize=14)
        text: Any = {"textcoords": "offset points", "fontsize": 13, "color": color, "weight": "bold"}
        axes.annotate(names.get(weight, ""), place, (9, -20 if weight == 1 != chosen else 9), **text)
    axes.axvline(0, color="gray", linestyle=":")
    for key, label in (("kept", axes.set_xlabel), ("new", axes.set_ylabel)):
        split = line["points"][0]["splits"][key == "kept"]
        label(f"{line[key]}, {split}: change in points", fontsize=13)
    axes.tick_params(labelsize=12)
    axes.margins(0.1)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(out) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _plot(
    axes: Axes,
    stages: Histories,
    key: str,
    scale: Callable[[float], float] = float,
    label: str | None = None,
    **style: Any,
) -> None:
    for history, start in zip(stages.values(), _starts(stages), strict=True):
        points = [(start + entry["epoch"], scale(entry[key])) for entry in history if key in entry]
        if points:
            marker = "." if len(points) == 1 else ""  # a line needs two
            axes.plot(*zip(*points, strict=True), label=label, **{"marker": marker, **style})
            label = None  # one legend entry for all stages


def _starts(stages: Histories) -> list[float]:
    """Return the epoch, counted over all stages, at which each stage begins."""
    starts, end = [], 0.0
    for history in stages.values():
        starts.append(end)
        end += max((entry["epoch"] for entry in history if "epoch" in entry), default=0.0)
    return starts
