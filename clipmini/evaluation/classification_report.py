"""Zero-shot classification and probes of a model on labeled images, from names to all that is written."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from clipmini.data.images import Skipped
from clipmini.data.labeled import keep_readable, load_labeled
from clipmini.data.leaks import LeakReport, find_leaks
from clipmini.data.pairs import choose_split
from clipmini.files import versions
from clipmini.inference.encoders import DualEncoder, load_encoder, load_encoders
from clipmini.inference.zero_shot import DEFAULT_TEMPLATE, load_templates

from .classification import ClassificationMetrics, ZeroShotResult, measure_zero_shot
from .figures import draw_confusion
from .intervals import LEVEL, NUM_RESAMPLES, Difference, Interval, paired_shares
from .naming import (
    METRIC_LABELS,
    format_figure,
    format_interval,
    format_with_interval,
    model_index,
    public_name,
)
from .probe import NEIGHBOR_TEMPERATURE, ProbeResult, probe
from .results import Evaluation, Table, as_json, render_page

TEST_SHARE = 0.2  # of the images of each class, where a probe's data has no split of its own
FEW = 30  # images below which a class's accuracy says little


def report_zero_shot(
    model: str,
    source: str,
    *,
    split: str | None = None,
    baseline: str | None = None,
    template: str = DEFAULT_TEMPLATE,
    batch_size: int = 16,
    skipped: Skipped | None = None,
    columns: Mapping[str, str] | None = None,
) -> Evaluation:
    """Measure zero-shot classification of a model on labeled images.

    Args:
        model: whatever `load_encoder` takes.
        source: whatever `load_labeled` takes.
        split: which split; by default test, else validation, else train.
        baseline: another model, to be compared on the same images.
        template: whatever `load_templates` takes.
        batch_size: images per forward.
        skipped: takes what cannot be read.
        columns: `image_column`, `label_column` and `config_name` of `load_labeled`.

    Returns:
        The evaluation, not yet written.

    Raises:
        ValueError: a model, the data, the split or the template cannot be used.
    """
    templates = load_templates(template)
    images = load_labeled(source, **(columns or {}))
    name = choose_split(images.splits, split, source)
    rows, names = _readable(images.splits, [name], skipped)[name], images.names
    encoder, *others = load_encoders(*filter(None, (model, baseline)))
    result = measure_zero_shot(encoder, rows, names, templates, batch_size)
    metrics = result.metrics
    facts = _facts("zero-shot", encoder, source, name, metrics, names)
    facts |= {"templates": templates}
    tables = [_metrics_table("Zero-shot classification", metrics)]
    for other in others:
        own = measure_zero_shot(other, rows, names, templates, batch_size)
        difference = paired_shares(result.is_right.numpy(), own.is_right.numpy())
        facts["baseline"] = {
            "model": other.about(),
            "metrics": _shares(own.metrics),
            "differences": {"top1": difference},
        }
        tables.append(_comparison(encoder.name, other.name, result, own, difference))
    tables.append(_class_table(names, metrics))
    facts["model_index"] = model_index(encoder.name, "zero-shot-image-classification", facts["data"], _shares(metrics))
    method = [
        f"Each class name is put into {len(templates)} template{'s' * (len(templates) > 1)} ({_examples(templates)}), "
        "the embeddings of these captions are averaged, and each image is taken for the class whose embedding is "
        "closest. No training image of these classes is used.",
        _INTERVALS,
    ]
    return _finish(facts, "Zero-shot classification", metrics, tables, names, method)


def report_probe(
    model: str,
    source: str,
    *,
    split: str | None = None,
    check_leaks: bool = True,
    batch_size: int = 16,
    skipped: Skipped | None = None,
    columns: Mapping[str, str] | None = None,
) -> Evaluation:
    """Measure what a model's image embeddings know of the classes of labeled images.

    Args:
        model: whatever `load_encoder` takes.
        source: whatever `load_labeled` takes; where it has one split alone, a fifth of each class is held out.
        split: which split to measure on; by default test, else validation.
        check_leaks: look for measured images that stand in the train split too.
        batch_size: images per forward.
        skipped: takes what cannot be read.
        columns: `image_column`, `label_column` and `config_name` of `load_labeled`.

    Returns:
        The evaluation, not yet written.

    Raises:
        ValueError: the model, the data or the split cannot be used.
    """
    images = load_labeled(source, **(columns or {}))
    splits = images.splits
    only = next(iter(splits)) if len(splits) == 1 else None
    if only is not None:
        splits = _hold_out(_readable(splits, [only], skipped)[only])
    if "train" not in splits:
        raise ValueError(f"{source} has no train split to fit a probe on; it has {', '.join(splits)}.")
    name = choose_split(splits, split, source)
    if name == "train":
        raise ValueError("A probe is fitted on the train split; name another split to measure on.")
    if only is None:
        splits = _readable(splits, ["train", name], skipped)
    encoder = load_encoder(model)
    leaks = find_leaks(splits["train"], splits[name]) if check_leaks else None
    embeds = {one: encoder.encode_images(splits[one]["image"], batch_size) for one in ("train", name)}
    labels = {one: torch.tensor(splits[one]["label"][:]) for one in embeds}
    result = probe(embeds["train"], labels["train"], embeds[name], labels[name], len(images.names))
    measured = name if only is None else f"a held-out fifth of {only}"
    facts = _facts("probe", encoder, source, measured, result.linear, images.names)
    facts |= {
        "num_train_images": result.num_train_images,
        "inverse_penalty": result.inverse_penalty,
        "neighbors": {**_shares(result.neighbors), "num_neighbors": result.num_neighbors},
    }
    tables = [
        _metrics_table("Linear probe", result.linear),
        _metrics_table(f"{result.num_neighbors} nearest neighbors", result.neighbors),
        _class_table(images.names, result.linear),
    ]
    leak_table = None
    if leaks is not None:
        rest = np.setdiff1d(np.arange(len(labels[name])), leaks.rows)
        without = None
        if 0 < len(rest) < len(labels[name]):
            without = probe(
                embeds["train"], labels["train"], embeds[name][rest], labels[name][rest], len(images.names)
            )
        facts["leaks"] = _leak_facts(leaks, without)
        leak_table = _leak_table(leaks, result, without)
    facts["model_index"] = model_index(encoder.name, "image-classification", facts["data"], _shares(result.linear))
    method = _probe_method(result, only, check_leaks)
    return _finish(facts, "Linear probe", result.linear, tables, images.names, method, leak_table)


_INTERVALS = (
    f"Intervals of {LEVEL:.0%}: images are drawn with replacement, {NUM_RESAMPLES:,} times. They tell how figures "
    "would vary with other images of the same kind, not with another training seed. Ties count against the model."
)


def _readable(splits: Mapping[str, Dataset], names: Sequence[str], skipped: Skipped | None) -> dict[str, Dataset]:
    found = Skipped() if skipped is None else skipped
    kept = {name: keep_readable(splits[name], name, found) for name in names}
    if skipped is None:
        found.log_summary()
    return kept


def _leak_facts(leaks: LeakReport, without: ProbeResult | None) -> dict[str, Any]:
    facts = leaks.as_dict()
    if without is not None:
        facts["without"] = {
            "num_images": without.linear.num_images,
            "metrics": _shares(without.linear),
            "neighbors": _shares(without.neighbors),
        }
    return facts


def _leak_table(leaks: LeakReport, result: ProbeResult, without: ProbeResult | None) -> Table:
    title = "Seen in training"
    if not leaks.rows:
        return Table(title, [], [], leaks.summary())
    rest = "nothing is left" if without is None else f"{without.linear.num_images:,} images"
    rows = [
        [
            f"{name}, {METRIC_LABELS['top1']}",
            *(
                "-" if one is None else format_with_interval("top1", getattr(one, part).top1)
                for one in (result, without)
            ),
        ]
        for name, part in (("linear probe", "linear"), ("nearest neighbors", "neighbors"))
    ]
    return Table(title, ["in percent", "all", f"without these: {rest}"], rows, leaks.summary())


def _probe_method(result: ProbeResult, only: str | None, check_leaks: bool) -> list[str]:
    held_out = f"The data has no split but {only}: a fifth of each class was held out, and the rest is for training. "
    return [
        ("" if only is None else held_out)
        + f"Image embeddings are frozen. Linear probe: logistic regression on {result.num_train_images:,} training "
        f"images, its L2 penalty (C = {result.inverse_penalty:g}) chosen by {result.num_folds}-fold cross-validation"
        f" on them. Nearest neighbors: {result.num_neighbors} training images vote, weighed by exp(cosine / "
        f"{NEIGHBOR_TEMPERATURE}).",
        _INTERVALS,
        *([] if check_leaks else ["Whether these images stand in the train split too was not checked."]),
    ]


def _hold_out(rows: Dataset) -> dict[str, Dataset]:
    """Hold out a share of each class, always the same."""
    labels = np.array(rows["label"][:])
    draw = np.random.default_rng(0)
    held_out = np.concatenate(
        [
            draw.permutation(np.flatnonzero(labels == label))[: int(TEST_SHARE * (labels == label).sum())]
            for label in np.unique(labels)
        ]
    )
    if not len(held_out):
        raise ValueError(
            f"{len(labels)} images are too few to hold some out; name data with a train and a test split."
        )
    rest = np.setdiff1d(np.arange(len(labels)), held_out)
    return {"train": rows.select(rest), "test": rows.select(np.sort(held_out))}


def _facts(
    task: str, encoder: DualEncoder, source: str, split: str, metrics: ClassificationMetrics, names: Sequence[str]
) -> dict[str, Any]:
    return {
        "task": task,
        "model": encoder.about(),
        "data": {
            "source": public_name(source),
            "split": split,
            "num_images": metrics.num_images,
            "num_classes": len(names),
        },
        "metrics": _shares(metrics),
        "chance": {"top1": metrics.chance},
        "calibration_error": metrics.calibration_error,
        "per_class": dict(zip(names, metrics.per_class.tolist(), strict=True)),
        # Of many classes most pairs are never confused: only those that are, as label, what it was taken for, number.
        "confusion": [
            [names[label], names[taken_for], int(metrics.confusion[label, taken_for])]
            for label, taken_for in np.argwhere(metrics.confusion).tolist()
        ],
        "num_resamples": NUM_RESAMPLES,
        "versions": versions(),
    }


def _shares(metrics: ClassificationMetrics) -> dict[str, Interval]:
    shares = {"top1": metrics.top1, "mean_per_class": metrics.mean_per_class}
    return shares if metrics.top5 is None else {"top1": shares.pop("top1"), "top5": metrics.top5, **shares}


def _metrics_table(title: str, metrics: ClassificationMetrics) -> Table:
    rows = [
        [METRIC_LABELS[name], format_figure(name, interval.value), format_interval(name, interval)]
        for name, interval in _shares(metrics).items()
    ]
    rows.append(["chance", format_figure("top1", metrics.chance), ""])
    if metrics.calibration_error is not None:
        rows.append(["calibration error", format_figure("", metrics.calibration_error), ""])
    note = f"In percent; 95 % bootstrap intervals over images, {NUM_RESAMPLES:,} resamples."
    return Table(title, ["metric", "value", "95 % interval"], rows, note)


def _comparison(name: str, other: str, first: ZeroShotResult, second: ZeroShotResult, difference: Difference) -> Table:
    row = [
        METRIC_LABELS["top1"],
        format_figure("top1", first.metrics.top1.value),
        format_figure("top1", second.metrics.top1.value),
        format_figure("top1", difference.value),
        format_interval("top1", difference),
        f"{difference.p_value:.3f}",
    ]
    note = "Both models on the same resamples of images (paired bootstrap); p is two-sided."
    return Table(f"{name} against {other}", ["metric", name, other, "difference", "95 % interval", "p"], [row], note)


def _class_table(names: Sequence[str], metrics: ClassificationMetrics) -> Table:
    counts = metrics.confusion.sum(axis=1)
    wrong = metrics.confusion - np.diag(np.diag(metrics.confusion))
    rows = []
    for number in np.argsort(np.nan_to_num(metrics.per_class, nan=2.0), kind="stable").tolist():
        taken_for = int(wrong[number].argmax())
        mostly = f"{names[taken_for]} ({wrong[number, taken_for]})" if wrong[number].any() else ""
        rows.append([names[number], str(counts[number]), format_figure("", float(metrics.per_class[number])), mostly])
    note = f"Hardest first. Of a class with fewer than {FEW} images, accuracy says little."
    return Table("Class by class", ["class", "images", "accuracy in %", "mostly taken for"], rows, note)


def _examples(templates: Sequence[str]) -> str:
    shown = ", ".join(f"“{template}”" for template in templates[:3])
    return shown + (", ..." if len(templates) > 3 else "")


def _finish(
    facts: dict[str, Any],
    title: str,
    metrics: ClassificationMetrics,
    tables: list[Table],
    names: Sequence[str],
    method: list[str],
    leak_table: Table | None = None,
) -> Evaluation:
    data = facts["data"]
    headline = [
        {
            "name": METRIC_LABELS[name],
            "value": format_figure(name, interval.value),
            "interval": format_interval(name, interval)
            + (f", chance {format_figure(name, metrics.chance)}" if name == "top1" else ""),
        }
        for name, interval in _shares(metrics).items()
    ]
    warnings = []
    num_present = int((metrics.confusion.sum(axis=1) > 0).sum())
    if num_present > 1 and metrics.mean_per_class.low <= 1 / num_present:  # what one answer for all images reaches
        warnings.append("Accuracy per class is not surely above chance.")
    facts["warnings"] = warnings
    page = render_page(
        model=facts["model"],
        data=data,
        task_name=title,
        size=f"{data['num_images']:,} images of {len(names):,} classes",
        baseline=facts.get("baseline"),
        headline=headline,
        warnings=warnings,
        leaks=leak_table,
        tables=tables,
        drawings=[
            {
                "title": "Confusion",
                "svg": draw_confusion(metrics.confusion, names),
                "note": "Each row is a label, each column what its images were taken for; darker is more.",
            }
        ],
        misses=[],
        method=method,
        versions=facts["versions"],
    )
    if leak_table is not None:
        tables.append(leak_table)
        if leak_table.rows:
            warnings.append(leak_table.note)
    return Evaluation(as_json(facts), tables, page, tuple(warnings))
