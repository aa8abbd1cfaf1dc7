"""What an evaluation writes: `results.json`, Markdown tables, a model-card entry, and one HTML page.

The page opens without a network: drawings and thumbnails are embedded in it.
"""

import base64
import functools
import io
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from datasets import Dataset
from huggingface_hub.repocard_data import eval_results_to_model_index

from clipmini.data.leaks import LeakReport
from clipmini.files import RECIPE_FILE, RESULTS_FILE, RunRecord, versions
from modeling_clipmini.images_clipmini import read_named

from .intervals import LEVEL, NUM_RESAMPLES, Difference, Interval
from .measure import Miss
from .naming import METRIC_LABELS, eval_results, format_figure, format_interval, format_with_interval

TABLE_FILE, INDEX_FILE, PAGE_FILE = "results.md", "model-index.yaml", "report.html"
FILES = (TABLE_FILE, INDEX_FILE, PAGE_FILE, RESULTS_FILE)
TEMPLATE = Path(__file__).parent / "report.html"
THUMBNAIL = (256, 192)  # twice the size shown, for screens of high resolution
QUALITY = 80
NUM_BEATEN_BY = 4  # images shown beside the correct one
INTERVALS = (
    f"Intervals of {LEVEL:.0%}: images, with any captions of theirs, are drawn with replacement, {NUM_RESAMPLES:,} "
    "times. They show how the figures would vary with other images of the same kind, not with "
    "another training seed. Ties count against the model."
)


@dataclass(frozen=True)
class Table:
    """A table of a report, the same in Markdown and on the page.

    Attributes:
        title: heading.
        columns: column names.
        rows: text of every cell.
        note: what a reader should know about it.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """Return the table in Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows] if self.columns else []
        table = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
        return "\n".join(filter(None, [f"**{self.title}**\n", table, self.note and f"{self.note}\n"]))


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        results: all figures, as `results.json` holds them, and `warnings`: what to know before trusting them.
        tables: the tables of `results.md`.
        page: the HTML page.
    """

    results: dict[str, Any]
    tables: list[Table]
    page: str

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write the four files; `results.json` comes last, so it is there only if the others are.

        Args:
            folder: created if missing; other files in it are left alone.
            overwrite: replace an earlier evaluation.

        Raises:
            ValueError: as `check_folder` does.
        """
        check_folder(folder, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        RunRecord(folder).add(folder / name for name in FILES)
        # Inside the folder, which may be a file system of its own, so that each file can be renamed into place.
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary_folder:
            index = {"model-index": self.results["model_index"]}
            contents = {
                TABLE_FILE: "\n".join(table.markdown() for table in self.tables),
                INDEX_FILE: yaml.safe_dump(index, sort_keys=False, allow_unicode=True),
                PAGE_FILE: self.page,
                RESULTS_FILE: json.dumps(self.results, indent=2) + "\n",
            }
            for name, content in contents.items():
                Path(temporary_folder, name).write_text(content, encoding="utf-8")
            (folder / RESULTS_FILE).unlink(missing_ok=True)
            for name in contents:
                Path(temporary_folder, name).replace(folder / name)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Check that an evaluation can be written to a folder, before hours are spent on it.

    Raises:
        ValueError: the path is not a folder, or cannot be written to; it holds a training run, or a file that no
            evaluation wrote; or it holds an evaluation and `overwrite` is not set.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"{nearest} is a file; name a folder with --out.")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"{nearest} cannot be written to ({error.strerror}); name another with --out.") from error
    if (folder / RECIPE_FILE).exists():
        raise ValueError(
            f"{folder} holds a training run, whose {RESULTS_FILE} would be lost; name another with --out."
        )
    recorded = RunRecord(folder).read()
    if others := [name for name in FILES if (folder / name).exists() and name not in recorded]:
        raise ValueError(f"{folder} holds {others[0]}, which no evaluation wrote; name another with --out.")
    if (folder / RESULTS_FILE).exists() and not overwrite:
        raise ValueError(f"{folder} holds an evaluation; pass --overwrite, or --out another folder.")


def build_evaluation(
    facts: dict[str, Any],
    *,
    title: str,
    hub_task: str,
    size: str,
    headline: Sequence[str],
    tables: Sequence[Table],
    drawings: Sequence[tuple[str, str, str]],
    method: Sequence[str],
    warnings: Sequence[str] = (),
    leak_table: Table | None = None,
    misses: Sequence[Mapping[str, Any]] = (),
) -> Evaluation:
    """Build the report of any task from what was measured.

    Args:
        facts: what `results.json` holds: `task`, `model`, `data`, `metrics`, `chance`, perhaps `baseline`, and what
            only this task has.
        title: the task's name on the page.
        hub_task: the task's name on the Hub.
        size: number of images and so on, in words.
        headline: the metrics at the top of the page.
        tables: all tables but that of leaks.
        drawings: title, SVG element and caption of each.
        method: paragraphs on how this was measured.
        warnings: what to know before trusting the figures.
        leak_table: as `tabulate_leaks` returns it; None where leaks were not checked.
        misses: as `show_misses` returns them.

    Returns:
        The evaluation, not yet written.
    """
    metrics, chance = facts["metrics"], facts["chance"]
    results = eval_results(hub_task, facts["data"], metrics)
    has_leaks = leak_table is not None and leak_table.rows
    facts = {
        **facts,
        "num_resamples": NUM_RESAMPLES,
        "model_index": eval_results_to_model_index(facts["model"]["name"], results),
        "versions": versions(),
        "warnings": [*warnings, *([leak_table.note] if leak_table is not None and has_leaks else [])],
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        model=facts["model"],
        data=facts["data"],
        title=title,
        size=size,
        baseline=facts.get("baseline"),
        headline=[
            (
                METRIC_LABELS[name],
                format_figure(name, metrics[name].value),
                format_interval(name, metrics[name])
                + (f", chance {format_figure(name, chance[name])}" if name in chance else ""),
            )
            for name in headline
        ],
        warnings=warnings,
        leaks=leak_table,
        tables=tables,
        drawings=drawings,
        misses=misses,
        method=[*method, INTERVALS],
        versions=facts["versions"],
    )
    all_tables = [*tables, *([] if leak_table is None else [leak_table])]
    return Evaluation(as_json(facts), all_tables, page)


def tabulate_metrics(
    title: str, metrics: Mapping[str, Interval], chance: Mapping[str, float], calibration_error: float | None = None
) -> Table:
    """Return a table of metrics with their intervals and chance levels."""
    rows = [
        [
            METRIC_LABELS[name],
            format_figure(name, interval.value),
            format_interval(name, interval),
            format_figure(name, chance[name]) if name in chance else "",
        ]
        for name, interval in metrics.items()
    ]
    if calibration_error is not None:
        rows.append(["calibration error", format_figure("", calibration_error), "", ""])
    unit = "In percent, except ranks" if any(name.endswith("_rank") for name in metrics) else "In percent"
    note = f"{unit}; 95 % bootstrap intervals over images, {NUM_RESAMPLES:,} resamples."
    return Table(title, ["metric", "value", "95 % interval", "chance"], rows, note)


def tabulate_differences(
    names: tuple[str, str],
    metrics: tuple[Mapping[str, Interval], Mapping[str, Interval]],
    differences: Mapping[str, Difference],
) -> Table:
    """Return a table of the differences of two models, the first minus the second."""
    rows = [
        [
            METRIC_LABELS[name],
            *(format_figure(name, one[name].value) for one in metrics),
            format_figure(name, difference.value),
            format_interval(name, difference),
            format_number(difference.p_value, 3),
        ]
        for name, difference in differences.items()
    ]
    note = (
        "Both models on the same resamples of images (paired bootstrap). The difference is the first minus the "
        "second; p is two-sided, for each metric by itself."
    )
    return Table(f"{names[0]} against {names[1]}", ["metric", *names, "difference", "95 % interval", "p"], rows, note)


def tabulate_leaks(
    leaks: LeakReport, note: str, metrics: Mapping[str, tuple[Interval, Interval | None]], rest: str
) -> Table:
    """Return a table of metrics on all images, and on those that are not in the training data.

    Args:
        leaks: what was found; without any leak the table has no rows.
        note: how much was found, in words.
        metrics: by label, shares on all images and on the rest; None where nothing is left.
        rest: what is left, in words.

    Returns:
        The table.
    """
    title = "Seen in training"
    if not leaks.rows and not leaks.captions:
        return Table(title, [], [], note)
    rows = [
        [label, *("-" if share is None else format_with_interval("", share) for share in shares)]
        for label, shares in metrics.items()
    ]
    return Table(title, ["in percent", "all", f"without these: {rest}"], rows, note)


def format_number(value: float, num_digits: int) -> str:
    """Format a number with so many decimals; "-" for NaN and infinity."""
    return f"{value:.{num_digits}f}" if math.isfinite(value) else "-"


def as_json(value: Any) -> Any:
    """Convert results to what JSON can hold: NaN and infinity become null, arrays become lists."""
    if isinstance(value, Mapping):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return as_json(asdict(value))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def show_misses(misses: Sequence[Miss], pairs: Dataset) -> list[dict[str, Any]]:
    """Return missed captions with thumbnails of the images they are shown beside.

    Args:
        misses: as `measure_retrieval` finds them.
        pairs: the split that was measured.

    Returns:
        For each its `caption`, `rank`, `of` how many, the `correct` image and the `others` that beat it, each with
        `src`, `name` and `similarity`.
    """

    @functools.cache
    def thumbnail(row: int) -> tuple[str, str]:
        content = pairs[row]
        source = content["image"]
        path = source.get("path") if isinstance(source, Mapping) else None
        name = Path(path).name if path else f"image {content['image_id']}"
        image = read_named(source, name)
        image.thumbnail(THUMBNAIL)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY)
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", name

    def show(row: int, similarity: float) -> dict[str, str]:
        src, name = thumbnail(row)
        return {"src": src, "name": name, "similarity": format_number(similarity, 3)}

    return [
        {
            "caption": miss.caption,
            "rank": f"{miss.rank:,}",
            "of": f"{len(pairs):,}",
            "correct": show(miss.row, miss.similarity),
            "others": [show(row, similarity) for row, similarity in miss.beaten_by[:NUM_BEATEN_BY]],
        }
        for miss in misses
    ]
