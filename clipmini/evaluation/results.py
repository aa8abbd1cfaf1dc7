"""What runs and evaluations show and write: `results.json`, tables, a model-card entry, and one HTML page.

The page opens without a network: drawings and thumbnails are embedded in it.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from huggingface_hub.repocard_data import eval_results_to_model_index

from clipmini.data.images import Skipped
from clipmini.data.leaks import LeakReport
from clipmini.files import (
    CURVES_FILE,
    MODEL_FOLDER,
    RECIPE_FILE,
    RESULTS_FILE,
    RunRecord,
    atomic_write,
    run_of,
    versions,
)
from clipmini.html import render
from clipmini.inference.drawing import Example, Picture
from clipmini.inference.embed import load_model
from clipmini.recipe_files import publishable_recipe, read_yaml
from modeling_clipmini import ClipMiniModel

from .intervals import LEVEL, NUM_RESAMPLES, Difference, Interval
from .measure import Answer, Answers
from .naming import METRIC_LABELS, eval_results, format_figure, format_interval, format_number, format_with_interval
from .request import FILES, INDEX_FILE, PAGE_FILE, PROBE, RETRIEVAL, TABLE_FILE, ZERO_SHOT, Request, check_folder

RUN_COLUMNS = ("chance", "before", "after")
NORMALIZED = "normalized"  # scores without hubs, beside those by cosine
TEMPLATE = Path(__file__).parent / "report.html"
TITLES = {  # of each task, on the page and on the Hub
    RETRIEVAL: ("Image-text retrieval", "image-text-retrieval"),
    ZERO_SHOT: ("Zero-shot classification", "zero-shot-image-classification"),
    PROBE: ("Linear probe", "image-classification"),
}
TABLE_HTML = """<div style="font:13px system-ui,sans-serif"><p><b>{{ table.title }}</b></p>
{%- set style = 'style="text-align:left;padding:2px 14px 2px 0"' | safe %}
{%- if table.columns %}
<table style="font-size:13px"><thead><tr>{% for name in table.columns %}<th {{ style }}>{{ name }}</th>{% endfor %}
</tr></thead><tbody>
{%- for row in table.rows %}
<tr>{% for text in row %}<td {{ style }}>{{ text }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody></table>
{%- endif %}{% if table.note %}<p>{{ table.note }}</p>{% endif %}</div>"""
INTERVALS = (
    f"Intervals of {LEVEL:.0%}: images, with any captions of theirs, are drawn with replacement, {NUM_RESAMPLES:,} "
    "times. They show how the figures would vary with other images of the same kind, not with "
    "another training seed. Ties count against the model."
)


@dataclass(frozen=True)
class Table:
    """A table of a report, the same in Markdown and on the page; without columns, it is a title and a note."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """Return the table in Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows] if self.columns else []
        table = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
        return "\n".join(filter(None, [f"**{self.title}**\n", table, self.note and f"{self.note}\n"]))

    def _repr_html_(self) -> str:
        return render(TABLE_HTML, table=self)


@dataclass(frozen=True)
class SearchExample:
    """A search to try a new model with.

    Attributes:
        folder: the images, as `clipmini search` takes them.
        query: a caption of one of them.
        split: where the caption is from.
        is_first: whether its image ranked first in the split, and the folder holds images of no other split.
    """

    folder: str
    query: str
    split: str
    is_first: bool


@dataclass(frozen=True, repr=False)
class Run:
    """A finished training run.

    Attributes:
        folder: it holds `recipe_as_run.yaml`, `results.json`, `curves.png`, `samples.jpg`, the model, and the
            checkpoints, which a recipe with stages keeps in one folder per stage.
        results: content of `results.json`: for each split the recalls by chance, before and after training, all in
            [0, 1], and the 95 % bootstrap intervals of the latter.
        example: a search to try; None if the images are in no folder.
    """

    folder: Path
    results: dict[str, Any]
    example: SearchExample | None = None

    @property
    def model_folder(self) -> Path:
        """The folder of the trained model: code, config, weights and processor."""
        return self.folder / MODEL_FOLDER

    @property
    def curves(self) -> Path:
        """The drawing of how training went, or of the models that were interpolated."""
        return self.folder / CURVES_FILE

    @property
    def tables(self) -> list[Table]:
        """The recalls of each split, in percent, and what was kept and interpolated, if anything."""
        tables = [_tabulate_run(split, facts) for split, facts in self.results["splits"].items()]
        if kept := self.results.get("kept"):
            tables.append(tabulate_kept(kept))
        if line := self.results.get("interpolation"):
            tables += [_tabulate_line(line, "chosen", "points"), _tabulate_line(line, "measured", "reported")]
        return tables

    def model(self) -> ClipMiniModel:
        """Load the trained model, in eval mode, with its processor."""
        return load_model(self.model_folder)

    def __repr__(self) -> str:
        recalls = [
            f"{split} {format_with_interval('mean_recall', _interval(facts, 'mean_recall'))}"
            for split, facts in self.results["splits"].items()
        ]
        return f"<run in {self.folder}; mean recall in %: {', '.join(recalls) or 'not measured'}>"

    def to_dict(self) -> dict[str, Any]:
        """Return the results and the folders, ready for JSON."""
        return {**self.results, "model_dir": str(self.model_folder), "output_dir": str(self.folder)}

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self.tables)


def _tabulate_run(split: str, facts: Mapping[str, Any]) -> Table:
    columns, note = ["", *RUN_COLUMNS, "95 % interval"], ""
    rows = [
        [
            METRIC_LABELS[name],
            *(format_figure(name, facts[column][name]) for column in RUN_COLUMNS),
            format_interval(name, _interval(facts, name)),
        ]
        for name in facts["chance"]
    ]
    if NORMALIZED in facts:
        columns += [NORMALIZED, "95 % interval"]
        for row, name in zip(rows, facts["chance"], strict=True):
            interval = Interval(facts[NORMALIZED][name], *facts["normalized_intervals"].get(name, ()))
            row += [format_figure(name, interval.value), format_interval(name, interval)]
        note = f"Before and after: by cosine. {describe_normalized(facts['never_first'])}"
    title = f"{split}: {facts['num_images']} images, {facts['num_captions']} captions; recall in percent"
    return Table(title, columns, rows, note)


def tabulate_kept(facts: Mapping[str, Any]) -> Table:
    """Return a table of what a model did before and does after training on data that it was to keep, in percent."""
    before, after, change = Interval(**facts["before"]), Interval(**facts["after"]), Difference(**facts["change"])
    cells = [METRIC_LABELS[facts["metric"]], *(format_with_interval("", one) for one in (before, after, change))]
    title = f"kept: {facts['source']}, {facts['split']}, {facts['num_images']:,} images"
    note = "In percent, with 95 % intervals; that of the change is paired, on the same resamples of images."
    return Table(title, ["", "before", "after", "change"], [cells], note)


def _tabulate_line(line: Mapping[str, Any], word: str, key: str) -> Table:
    """Return a table of models between two, of which one was chosen."""
    figures = (("new", Interval), ("gained", Difference), ("kept", Interval), ("lost", Difference))
    rows = [
        [
            f"{point['weight']:g}" + " (chosen)" * (point["weight"] == line["weight"]),
            *(format_with_interval("", kind(**point[name])) for name, kind in figures),
        ]
        for point in line[key]
    ]
    new, kept = (f"{line[name]}, {split}" for name, split in zip(("new", "kept"), line[key][0]["splits"], strict=True))
    title = f"{word} on {new}, and kept on {kept}"
    note = f"In percent, with 95 % intervals, of changes paired; 0 is {line['start']}, and 1 is {line['tuned']}."
    return Table(title, ["weight", "new", "change", "kept", "change"], rows, note)


def describe_normalized(never_first: Mapping[str, float]) -> str:
    """Say what normalized scores are, and how many images no caption ranks first, by "cosine" and "normalized"."""
    by_cosine, normalized = (format_figure("", never_first[name]) for name in ("cosine", NORMALIZED))
    return (
        "Normalized: from the cosine is taken how well an image fits captions in general, and a caption images. By "
        f"cosine {by_cosine} % of the images are first for no caption, normalized {normalized} %."
    )


def _interval(facts: Mapping[str, Any], name: str) -> Interval:
    return Interval(facts["after"][name], *facts["intervals"].get(name, ()))


@dataclass(frozen=True, repr=False)
class Evaluation:
    """A finished evaluation.

    Attributes:
        results: all figures, as `results.json` holds them, and `warnings`: what to know before trusting them.
        tables: the tables of `results.md`.
        page: the HTML page.
        skipped: images and captions that cannot be used.
    """

    results: dict[str, Any]
    tables: list[Table]
    page: str
    skipped: Skipped = field(default_factory=Skipped)

    def __repr__(self) -> str:
        shown = ", ".join(f"{row[0]} {row[1]} ({row[2]})" for row in self.tables[0].rows[:3])
        return f"<{self.results['task']} of {self.results['model']['name']}; in %: {shown}>"

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, and what was skipped, ready for JSON."""
        return {**self.results, **self.skipped.to_dict()}

    def _repr_html_(self) -> str:
        warnings = [Table(f"Note: {warning}", [], []) for warning in self.results["warnings"]]
        return "".join(table._repr_html_() for table in (*warnings, self.tables[0]))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the four files; `results.json` comes last, so it is there only if the others are.

        Args:
            folder: created if missing; other files in it are left alone.
            overwrite: replace an earlier evaluation.

        Raises:
            ValueError: as `check_folder` does.
        """
        folder = Path(folder).expanduser()
        check_folder(folder, overwrite)
        RunRecord(folder).add(folder / name for name in FILES)
        index = {"model-index": self.results["model_index"]}
        contents = {
            RESULTS_FILE: json.dumps(self.results, indent=2) + "\n",
            TABLE_FILE: "\n".join(table.markdown() for table in self.tables),
            INDEX_FILE: yaml.safe_dump(index, sort_keys=False, allow_unicode=True),
            PAGE_FILE: self.page,
        }
        with ExitStack() as stack:  # all are written before any replaces an earlier one, the last first
            for name, content in contents.items():
                stack.enter_context(atomic_write(folder / name)).write_text(content, encoding="utf-8")
            (folder / RESULTS_FILE).unlink(missing_ok=True)


@dataclass(frozen=True)
class Shown:
    """What a report shows of single images: successes and failures in the same form.

    Attributes:
        groups: examples by heading.
        rule: how they were chosen.
        worst: queries whose correct images ranked lowest, the lowest first.
    """

    groups: Mapping[str, Sequence[Example]]
    rule: str
    worst: Sequence[Example] = ()


def show_answers(rows: Dataset, answers: Answers) -> Shown:
    """Return what captions of a split found, with the images.

    Args:
        rows: the split, one row per image.
        answers: what its captions found.
    """
    num_wrong = answers.num_queries - answers.num_right

    def example(answer: Answer) -> Example:
        pictures = []
        for found in answer.found:
            row = rows[found.row]
            label = f"{'✓ ' if found.is_correct else ''}{found.rank:,}. {format_number(found.similarity, 3)}"
            name = image_name(row["image"], f"image {row['image_id']}")
            pictures.append(Picture(row["image"], name, label, row["captions"][0], found.is_correct))
        return Example(f"“{answer.caption}”", pictures)

    return Shown(
        {
            f"Right: {answers.num_right:,} of {answers.num_queries:,} captions": list(map(example, answers.right)),
            f"Wrong: {num_wrong:,} of {answers.num_queries:,} captions": list(map(example, answers.wrong)),
        },
        f"A caption is right if its own image (framed, ✓) comes first. Below each image: its rank among all "
        f"{len(rows):,}, and its cosine with the caption. All captions were put in one random order (seed 0), "
        "without looking at what they found: shown are the first that are right and the first that are wrong, as many "
        "of each.",
        list(map(example, answers.worst)),
    )


def image_name(image: Any, otherwise: str) -> str:
    """Return the name of an image's file, for an image as a data set holds it, or another name if it has no file."""
    path = image.get("path") if isinstance(image, Mapping) else None
    return Path(path).name if path else otherwise


def build_evaluation(
    request: Request,
    facts: dict[str, Any],
    *,
    headline: Sequence[str],
    tables: Sequence[Table],
    drawings: Sequence[tuple[str, str, str]],
    method: Sequence[str],
    warnings: Sequence[str] = (),
    leak_table: Table | None = None,
    shown: Shown,
) -> Evaluation:
    """Build the report of any task from what was measured.

    Args:
        request: what was measured.
        facts: what `results.json` holds: `task`, `model`, `data`, `metrics`, `chance`, perhaps `baseline`, and what
            only this task has.
        headline: the metrics at the top of the page.
        tables: all tables but that of leaks.
        drawings: title, SVG element and caption of each.
        method: paragraphs on how this was measured.
        warnings: what to know before trusting the figures.
        leak_table: as `tabulate_leaks` returns it; None where leaks were not checked.
        shown: successes and failures.
    """
    metrics, chance = facts["metrics"], facts["chance"]
    title, hub_task = TITLES[facts["task"]]
    entries = eval_results(hub_task, facts["data"], metrics)
    leak_tables = [] if leak_table is None else [leak_table]
    facts = {
        **facts,
        "measured_utc": datetime.now(UTC).isoformat(sep=" ", timespec="minutes").removesuffix("+00:00"),
        "command": request.command,
        "num_resamples": NUM_RESAMPLES,
        "model_index": eval_results_to_model_index(facts["model"]["name"], entries),
        "versions": versions(),
        "warnings": [*warnings, *(table.note for table in leak_tables if table.rows)],
    }
    page = render(
        TEMPLATE.read_text(encoding="utf-8"),
        facts=facts,
        title=title,
        headline=[
            (
                METRIC_LABELS[name],
                f"{format_figure(name, metrics[name].value)} %",
                f"95 % interval: {format_interval(name, metrics[name])}",
                f"chance: {format_figure(name, chance[name])}" if name in chance else "",
            )
            for name in headline
        ],
        warnings=warnings,
        leaks=leak_table,
        tables=tables,
        drawings=drawings,
        shown=shown,
        run=_run_on_page(request.model),
        method=[*method, INTERVALS],
    )
    # JSON has no NaN and no infinity: both become null.
    results = json.loads(json.dumps(facts, default=asdict), parse_constant=lambda _: None)
    return Evaluation(results, [*tables, *leak_tables], page)


def _run_on_page(model: Any) -> dict[str, str] | None:
    """Return name, recipe and curves (as a data URI) of the run that trained a model; None if it is not known here.

    The page holds them itself, so that nothing is missing when it is moved.
    """
    run = run_of(Path(model).expanduser()) if isinstance(model, (str, Path)) else None
    if run is None:
        return None
    curves, recipe = run / CURVES_FILE, ""
    with suppress(ValueError):  # a damaged recipe must not cost what was measured
        recipe = publishable_recipe(read_yaml(run / RECIPE_FILE))
    uri = f"data:image/png;base64,{base64.b64encode(curves.read_bytes()).decode()}" if curves.is_file() else ""
    return {"name": run.name, "recipe": recipe, "curves": uri}


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
    name: str,
    metrics: Mapping[str, Interval],
    other_name: str,
    other_metrics: Mapping[str, Interval],
    differences: Mapping[str, Difference],
) -> Table:
    """Return a table of the differences of two models, or of two ways to score, the first minus the second."""
    rows = [
        [
            METRIC_LABELS[metric],
            format_figure(metric, metrics[metric].value),
            format_figure(metric, other_metrics[metric].value),
            format_figure(metric, difference.value),
            format_interval(metric, difference),
            format_number(difference.p_value, 3),
        ]
        for metric, difference in differences.items()
    ]
    note = (
        "Both on the same resamples of images (paired bootstrap). The difference is the first minus the second; p is "
        "two-sided, for each metric by itself."
    )
    columns = ["metric", name, other_name, "difference", "95 % interval", "p"]
    return Table(f"{name} against {other_name}", columns, rows, note)


def tabulate_leaks(
    leaks: LeakReport, note: str, shares: Mapping[str, Interval], left_shares: Mapping[str, Interval], rest: str
) -> Table:
    """Return a table of metrics on all images, and on those that are not in the training data.

    Args:
        leaks: what was found; without any leak the table has no rows.
        note: how much was found, in words.
        shares: by label, on all images.
        left_shares: on the rest; empty where nothing is left.
        rest: what is left, in words.
    """
    if not leaks.rows and not leaks.captions:
        return Table("Seen in training", [], [], note)
    rows = [
        [label, *(format_with_interval("", some[label]) if label in some else "-" for some in (shares, left_shares))]
        for label in shares
    ]
    return Table("Seen in training", ["in percent", "all", f"without these: {rest}"], rows, note)
