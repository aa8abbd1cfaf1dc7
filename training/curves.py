"""Training curves as a picture."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RECALL_STYLES = {
    "eval_text_to_image_r1": ("text to image R@1", "tab:blue", "-"),
    "eval_text_to_image_r5": ("text to image R@5", "tab:blue", "--"),
    "eval_image_to_text_r1": ("image to text R@1", "tab:orange", "-"),
    "eval_image_to_text_r5": ("image to text R@5", "tab:orange", "--"),
}


def draw_curves(log_history: list[dict[str, float]], out: Path) -> None:
    """Draw the loss and the validation recalls over the epochs.

    Args:
        log_history: `trainer.state.log_history`.
        out: the PNG to write.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, recall_axes = figure.subplots(1, 2)
    logged = [(entry["epoch"], entry["loss"]) for entry in log_history if "loss" in entry]
    loss_axes.plot(*zip(*logged, strict=True), color="tab:green") if logged else None
    loss_axes.set(title="training loss", xlabel="epoch", ylabel="nats")
    for key, (name, color, style) in RECALL_STYLES.items():
        points = [(entry["epoch"], 100 * entry[key]) for entry in log_history if key in entry]
        if points:
            recall_axes.plot(*zip(*points, strict=True), color=color, linestyle=style, marker=".", label=name)
    recall_axes.set(title="retrieval on the validation split", xlabel="epoch", ylabel="recall, %")
    recall_axes.set_ylim(bottom=0)
    if recall_axes.lines:
        recall_axes.legend()
    for axes in (loss_axes, recall_axes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)
