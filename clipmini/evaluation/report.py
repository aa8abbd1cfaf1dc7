"""Evaluate a model on data, given by name: retrieval, zero-shot classification or a probe."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict

from clipmini.data.duplicates import find_duplicates
from clipmini.data.images import Skipped
from clipmini.data.labeled import keep_readable, load_labeled
from clipmini.data.leaks import LeakReport, find_leaks
from clipmini.data.pairs import DataArguments, choose_split, load_data
from clipmini.inference.bank import Bank
from clipmini.inference.drawing import Example, Picture
from clipmini.inference.embed import DualEncoder
from clipmini.inference.encoders import load_encoder, load_encoders
from clipmini.inference.prompts import FEW, load_templates, warn_of_unreadable
from clipmini.names import public_name
from clipmini.recipe_files import build_section
from modeling_clipmini.handler import DEFAULT_TEMPLATE

from .classification import ClassificationMetrics, measure_zero_shot
from .diagnostics import PRECISIONS, Diagnostics
from .figures import draw_compression, draw_confusion, draw_ranks, draw_recall_curve, draw_similarities
from .intervals import Interval, bootstrap_intervals, paired_bootstrap, paired_shares
from .measure import (
    Embeddings,
    RetrievalResult,
    embed_pairs,
    measure_normalized,
    measure_retrieval,
    pair_similarities,
    pick_examples,
)
from .naming import METRIC_LABELS, format_figure, format_number
from .probe import NEIGHBOR_TEMPERATURE, ProbeResult, probe
from .request import PROBE, RETRIEVAL, ZERO_SHOT, Request
from .results import (
    NORMALIZED,
    Evaluation,
    Shown,
    Table,
    build_evaluation,
    describe_normalized,
    image_name,
    show_answers,
    tabulate_differences,
    tabulate_leaks,
    tabulate_metrics,
)
from .retrieval import RECALL_AT

HEADLINE = ("text_to_image_r1", "image_to_text_r1", "mean_recall")
MIN_WIDTH = 32  # embeddings are measured at half their width, a quarter, ..., down to this
MAX_SIMILARITIES = 200_000_000  # of larger sets, embeddings are not measured again at other sizes
TEST_SHARE = 0.2  # of the images of each class, where a probe's data has only one split
FEW_IMAGES = 30  # of a class, below which its accuracy says little


def evaluate(request: Request, skipped: Skipped) -> Evaluation:
    """Measure a model, and build the report.

    Args:
        request: the model, the data and the task.
        skipped: collects what cannot be read.

    Raises:
        ValueError: a model, the data or the split cannot be used.
    """
    evaluation = TASKS[request.task](request, skipped)
    skipped.log_summary()
    return replace(evaluation, skipped=skipped)


def _evaluate_retrieval(request: Request, skipped: Skipped) -> Evaluation:
    source, pairs = load_pairs(request.pairs, skipped)
    name = choose_split(pairs, request.split, source)
    train = _training_pairs(pairs, name, request, skipped) if request.check_leaks else None
    rows = pairs[name]
    encoder, *others = load_encoders(*request.models, engine=request.engine)
    leaks = None if train is None else find_leaks(train, rows)  # before the hours: it may meet a broken image
    embeds = embed_pairs(encoder, rows)
    warn_of_unreadable(encoder.tokenizer, embeds.captions, "captions", FEW)
    full_width = embeds.images.shape[1]
    is_large = len(embeds.images) * len(embeds.texts) > MAX_SIMILARITIES
    widths = [width for halvings in range(1, 16) if (width := full_width >> halvings) >= MIN_WIDTH]
    result = measure_retrieval(
        embeds,
        logit_scale=encoder.logit_scale,
        widths=() if is_large else widths,
        precisions=() if is_large else tuple(PRECISIONS),
    )
    measured = ("metrics", "chance", "diagnostics", "by_width", "by_precision", "recall_curve")
    facts: dict[str, Any] = {
        "task": RETRIEVAL,
        "model": encoder.about(),
        "data": {
            "source": public_name(source),
            "split": name,
            "num_images": len(embeds.images),
            "num_captions": len(embeds.texts),
        },
        "embedding_width": full_width,
        **{attribute: getattr(result, attribute) for attribute in measured},
    }
    tables = [tabulate_metrics("Image-text retrieval", result.metrics, result.chance)]
    if encoder.bank is not None:
        facts[NORMALIZED], table = _normalized(embeds, encoder.bank, result)
        tables.append(table)
    curves = {encoder.name: result.recall_curve}
    for other in others:
        second = measure_retrieval(embed_pairs(other, rows), logit_scale=other.logit_scale)
        differences = paired_bootstrap(result.scores, second.scores)
        facts["baseline"] = {
            "model": other.about(),
            "metrics": second.metrics,
            "diagnostics": second.diagnostics,
            "differences": differences,
        }
        curves[other.name] = second.recall_curve
        tables.append(tabulate_differences(encoder.name, result.metrics, other.name, second.metrics, differences))
    tables += [_diagnostics_table(result.diagnostics, full_width), *_size_tables(result)]

    warnings, leak_table = list(result.diagnostics.faults), None
    if name == "train":
        warnings.append(
            "This is a train split, or data without splits: a model trained on it looks better than it is."
        )
    duplicates = find_duplicates(rows)
    if duplicates.images or duplicates.captions:
        warnings.append(f"{duplicates.summary()} As answers they tie, and ties count against the model.")
    if leaks is not None:
        facts["leaks"], leak_table = _retrieval_leaks(leaks, embeds, result)
    return build_evaluation(
        request,
        facts,
        headline=HEADLINE,
        tables=tables,
        drawings=_retrieval_drawings(embeds, result, curves),
        method=_retrieval_method(embeds, request.check_leaks, leaks is not None),
        warnings=warnings,
        leak_table=leak_table,
        shown=show_answers(rows, result.answers),
    )


def _normalized(embeds: Embeddings, bank: Bank, result: RetrievalResult) -> tuple[dict[str, Any], Table]:
    """Return what `results.json` and the report say about scores without hubs, against those by cosine."""
    second = measure_normalized(embeds, bank)
    differences = paired_bootstrap(second.scores, result.scores)
    never_first = {"cosine": result.never_first, NORMALIZED: second.never_first}
    facts = {
        "bank": bank.sizes,
        "metrics": second.metrics,
        "differences": differences,
        "never_first": never_first,
    }
    table = tabulate_differences(NORMALIZED, second.metrics, "cosine", result.metrics, differences)
    note = f"{describe_normalized(never_first)} All other tables and drawings are by cosine. {table.note}"
    return facts, replace(table, note=note)


def load_pairs(section: Mapping[str, Any], skipped: Skipped) -> tuple[str, DatasetDict]:
    """Return the source of the pairs that a data section describes, and its splits."""
    data: DataArguments = build_section(DataArguments, section, "data")
    return data.source, load_data(data, skipped)


def _training_pairs(pairs: DatasetDict, split: str, request: Request, skipped: Skipped) -> Dataset | None:
    """Return the pairs that the model was, or may have been, trained on."""
    if request.train_pairs is not None:
        source, splits = load_pairs(request.train_pairs, skipped)
        return splits[choose_split(splits, "train", source)]
    return pairs["train"] if split != "train" and "train" in pairs else None


def _retrieval_leaks(leaks: LeakReport, embeds: Embeddings, result: RetrievalResult) -> tuple[dict[str, Any], Table]:
    """Return what `results.json` and the report say about leaks, with metrics of what is left without them."""
    facts = leaks.as_dict()
    metrics: dict[str, Interval] = {}
    rest = "nothing is left"
    left = embeds.without(leaks.rows, leaks.captions)
    if (leaks.rows or leaks.captions) and len(left.images) and len(left.texts):
        metrics = bootstrap_intervals(left.scores())
        rest = f"{len(left.images):,} images, {len(left.texts):,} captions"
        facts["without"] = {"num_images": len(left.images), "num_captions": len(left.texts), "metrics": metrics}
    note = f"{leaks.summary()} {len(leaks.captions):,} captions also describe a training image, in the same words."
    shares, left_shares = (
        {METRIC_LABELS[name]: measured[name] for name in HEADLINE if name in measured}
        for measured in (result.metrics, metrics)
    )
    return facts, tabulate_leaks(leaks, note, shares, left_shares, rest)


def _diagnostics_table(shape: Diagnostics, width: int) -> Table:
    dimensions = f"1 to {width}"
    figures = [
        ("modality gap", shape.modality_gap, 3, "0 to 2", "distance of the mean image from the mean caption"),
        ("alignment", shape.alignment, 3, "0 to 4", "mean squared distance of a caption from its image"),
        ("uniformity of images", shape.image_uniformity, 2, "-8 to 0", "lower is more evenly spread"),
        ("uniformity of captions", shape.text_uniformity, 2, "-8 to 0", "likewise"),
        ("effective rank of images", shape.image_effective_rank, 1, dimensions, "dimensions used"),
        ("effective rank of captions", shape.text_effective_rank, 1, dimensions, "likewise"),
        ("cosine with the correct image", shape.own_similarity, 3, "-1 to 1", "mean over captions"),
        ("cosine with other images", shape.other_similarity, 3, "-1 to 1", "mean over captions and images"),
    ]
    if shape.temperature is not None:
        figures.append(("temperature", shape.temperature, 4, "above 0", "similarities are divided by it"))
    rows = [
        [name, format_number(value, num_digits), limits, text] for name, value, num_digits, limits, text in figures
    ]
    return Table("The shared space", ["figure", "value", "range", "meaning"], rows)


def _size_tables(result: RetrievalResult) -> list[Table]:
    full_width = max(result.by_width)
    sizes = [(f"{width} x float32", 4 * width, metrics) for width, metrics in result.by_width.items()]
    sizes += [
        (f"{full_width} x {name}", full_width * PRECISIONS[name] // 8, metrics)
        for name, metrics in result.by_precision.items()
        if name != "float32"
    ]
    if len(sizes) < 2:
        return []
    rows = [
        [name, f"{num_bytes:,}", *(format_figure(metric, metrics[metric]) for metric in HEADLINE)]
        for name, num_bytes, metrics in sizes
    ]
    columns = ["embedding", "bytes", *(METRIC_LABELS[name] for name in HEADLINE)]
    return [Table("Smaller embeddings", columns, rows, "In percent; the same model, embeddings truncated or rounded.")]


def _retrieval_drawings(
    embeds: Embeddings, result: RetrievalResult, curves: Mapping[str, Mapping[str, Sequence[float]]]
) -> list[tuple[str, str, str]]:
    ranks = {direction: score.ranks.numpy() for direction, score in result.scores.items()}
    recall_curve = draw_recall_curve(curves, result.chance_curve)
    similarities = draw_similarities(*pair_similarities(embeds))
    drawings = [
        ("Recall curve", recall_curve, "Share of queries with a correct answer among the first k."),
        ("Ranks", draw_ranks(ranks), "Rank of the best correct answer."),
        ("Similarities", similarities, "The less the two overlap, the better captions tell images apart."),
    ]
    if len(result.by_width) > 1 or len(result.by_precision) > 1:
        by_width = {width: metrics["mean_recall"] for width, metrics in result.by_width.items()}
        by_precision = {name: metrics["mean_recall"] for name, metrics in result.by_precision.items()}
        compression = draw_compression(by_width, by_precision)
        drawings.append(("Smaller embeddings", compression, "What truncation and rounding cost."))
    return drawings


def _retrieval_method(embeds: Embeddings, is_checked: bool, is_known: bool) -> list[str]:
    if is_known:
        leaks = (
            "Seen in training: the images and captions were compared with those of the data's train split, or of the "
            "training data that was named. A model that was trained on other data may have seen more of them."
        )
    else:
        why = ": no training data was named" if is_checked else ""
        leaks = f"Whether these images are in the training data too was not checked{why}."
    return [
        f"Every caption is a query for its image among all {len(embeds.images):,}, and every image a query for any of "
        f"its captions among all {len(embeds.texts):,}. R@k, for k of {', '.join(map(str, RECALL_AT))}, is the share "
        "of queries with a correct answer among the first k; an image's other captions do not count against it. Mean "
        "recall is the mean of the six.",
        leaks,
    ]


def _evaluate_zero_shot(request: Request, skipped: Skipped) -> Evaluation:
    images = load_labeled(request.data, **request.changes)
    source, templates = request.data, load_templates(request.template or DEFAULT_TEMPLATE)
    name = choose_split(images.splits, request.split, source)
    rows, names = keep_readable(images.splits[name], name, skipped), images.names
    encoder, *others = load_encoders(*request.models, engine=request.engine)
    metrics = measure_zero_shot(encoder, rows, names, templates)
    facts: dict[str, Any] = {"task": ZERO_SHOT, "templates": templates}
    tables = [_accuracy_table("Zero-shot classification", metrics)]
    for other in others:
        second = measure_zero_shot(other, rows, names, templates)
        differences = {"top1": paired_shares(metrics.is_correct, second.is_correct)}
        facts["baseline"] = {"model": other.about(), "metrics": second.shares, "differences": differences}
        tables.append(tabulate_differences(encoder.name, metrics.shares, other.name, second.shares, differences))
    examples = ", ".join(f"“{template}”" for template in templates[:3]) + ", ..." * (len(templates) > 3)
    method = [
        f"Each class name is put into {len(templates)} template{'s' * (len(templates) > 1)} ({examples}), the "
        "embeddings of these captions are averaged, and the predicted class of an image is the one whose embedding is "
        "closest. No image is used to learn the classes. Whether the model saw these images in training was not "
        "checked."
    ]
    return _report_classes(request, encoder, rows, name, metrics, names, facts, tables, method)


def _evaluate_probe(request: Request, skipped: Skipped) -> Evaluation:
    images = load_labeled(request.data, **request.changes)
    source, splits, names = request.data, images.splits, images.names
    only = next(iter(splits)) if len(splits) == 1 else None
    if only is not None:
        splits = _hold_out(keep_readable(splits[only], only, skipped))
    if "train" not in splits:
        raise ValueError(f"{source} has no train split to fit a probe on; it has {', '.join(splits)}.")
    name = choose_split(splits, request.split, source)
    if name == "train":
        raise ValueError("A probe is fitted on the train split; name another split to measure on.")
    if only is None:
        splits = {part: keep_readable(splits[part], part, skipped) for part in ("train", name)}
    encoder = load_encoder(request.model, request.engine)
    leaks = find_leaks(splits["train"], splits[name]) if request.check_leaks else None
    train_embeds, embeds = (encoder.encode_images(splits[part]["image"]) for part in ("train", name))
    train_labels, labels = (torch.tensor(splits[part]["label"][:]) for part in ("train", name))
    result = probe(train_embeds, train_labels, embeds, labels, len(names))
    facts: dict[str, Any] = {
        "task": PROBE,
        "num_train_images": len(train_labels),
        "inverse_penalty": result.inverse_penalty,
        "neighbors": {**result.neighbors.shares, "num_neighbors": result.num_neighbors},
    }
    leak_table = None
    if leaks is not None:
        facts["leaks"] = leaks.as_dict()
        rest = np.setdiff1d(np.arange(len(labels)), leaks.rows)
        left = None
        if 0 < len(rest) < len(labels):
            left = probe(train_embeds, train_labels, embeds[rest], labels[rest], len(names))
            facts["leaks"]["without"] = {
                "num_images": len(rest),
                "metrics": left.linear.shares,
                "neighbors": left.neighbors.shares,
            }
        note, left_over = leaks.summary(), "nothing is left" if left is None else f"{len(rest):,} images"
        leak_table = tabulate_leaks(leaks, note, _top1(result), {} if left is None else _top1(left), left_over)
    held_out = f"The only split is {only}: a fifth of each class was held out, and the rest is for training. "
    method = [
        ("" if only is None else held_out)
        + f"Image embeddings are frozen. Linear probe: logistic regression on {len(train_labels):,} training "
        f"images, its L2 penalty (C = {result.inverse_penalty:g}) chosen by {result.num_folds}-fold cross-validation"
        f" on them. Nearest neighbors: {result.num_neighbors} training images vote, weighted by exp(cosine / "
        f"{NEIGHBOR_TEMPERATURE}).",
        *([] if request.check_leaks else ["Whether these images are in the train split too was not checked."]),
    ]
    return _report_classes(
        request,
        encoder,
        splits[name],
        name if only is None else f"a held-out fifth of {only}",
        result.linear,
        names,
        facts,
        [
            _accuracy_table("Linear probe", result.linear),
            _accuracy_table(f"{result.num_neighbors} nearest neighbors", result.neighbors),
        ],
        method,
        leak_table,
    )


def _top1(result: ProbeResult) -> dict[str, Interval]:
    label = METRIC_LABELS["top1"]
    return {
        f"linear probe, {label}": result.linear.shares["top1"],
        f"nearest neighbors, {label}": result.neighbors.shares["top1"],
    }


def _hold_out(rows: Dataset) -> dict[str, Dataset]:
    """Hold out a share of each class, always the same images."""
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


def _report_classes(
    request: Request,
    encoder: DualEncoder,
    rows: Dataset,
    split: str,
    metrics: ClassificationMetrics,
    names: Sequence[str],
    facts: Mapping[str, Any],
    tables: Sequence[Table],
    method: Sequence[str],
    leak_table: Table | None = None,
) -> Evaluation:
    """Build the report of a classifier; `facts` and `tables` are what only this task has."""
    warnings = []
    num_present = int((metrics.confusion.sum(axis=1) > 0).sum())
    # Answering the same class for every image reaches 1 / num_present.
    if num_present > 1 and metrics.shares["mean_per_class"].low <= 1 / num_present:
        warnings.append("Mean accuracy per class is not significantly above chance.")
    confusion = draw_confusion(metrics.confusion, names)
    return build_evaluation(
        request,
        {
            "model": encoder.about(),
            "data": {
                "source": public_name(request.data),
                "split": split,
                "num_images": len(metrics.is_correct),
                "num_classes": len(names),
            },
            "metrics": metrics.shares,
            "chance": {"top1": metrics.chance},
            "calibration_error": metrics.calibration_error,
            "per_class": dict(zip(names, metrics.per_class.tolist(), strict=True)),
            # Of many classes most pairs are never confused, so only the others are listed: label, prediction, count.
            "confusion": [
                [names[label], names[predicted], int(metrics.confusion[label, predicted])]
                for label, predicted in np.argwhere(metrics.confusion).tolist()
            ],
            **facts,
        },
        headline=list(metrics.shares),
        tables=[*tables, _class_table(names, metrics)],
        drawings=[("Confusion", confusion, "Each row is a label, each column a predicted class.")],
        method=method,
        warnings=warnings,
        leak_table=leak_table,
        shown=_show_predictions(rows, metrics, names),
    )


def _show_predictions(rows: Dataset, metrics: ClassificationMetrics, names: Sequence[str]) -> Shown:
    is_right = torch.from_numpy(metrics.is_correct)
    num_images, num_right = len(is_right), int(is_right.sum())

    def example(chosen: list[int]) -> list[Example]:
        pictures = []
        for index in chosen:
            row, predicted = rows[index], names[int(metrics.predicted[index])]
            label = names[row["label"]]
            text = f"✓ {label}" if is_right[index] else f"{predicted}, but is {label}"
            name = image_name(row["image"], f"image {index + 1}")
            pictures.append(Picture(row["image"], name, text, label, bool(is_right[index])))
        return [Example("", pictures)] if pictures else []

    right, wrong = pick_examples(is_right)
    return Shown(
        {
            f"Right: {num_right:,} of {num_images:,} images": example(right),
            f"Wrong: {num_images - num_right:,} of {num_images:,} images": example(wrong),
        },
        "Below each image: the predicted class and, where it is wrong, the label. All images were put in one random "
        "order (seed 0), without looking at the predictions: shown are the first that are right and the first that "
        "are wrong, as many of each.",
    )


def _accuracy_table(title: str, metrics: ClassificationMetrics) -> Table:
    return tabulate_metrics(title, metrics.shares, {"top1": metrics.chance}, metrics.calibration_error)


def _class_table(names: Sequence[str], metrics: ClassificationMetrics) -> Table:
    counts = metrics.confusion.sum(axis=1)
    wrong = metrics.confusion - np.diag(np.diag(metrics.confusion))
    rows = []
    for label in np.argsort(np.nan_to_num(metrics.per_class, nan=2.0), kind="stable").tolist():
        predicted = int(wrong[label].argmax())
        mostly = f"{names[predicted]} ({wrong[label, predicted]})" if wrong[label].any() else ""
        rows.append([names[label], str(counts[label]), format_figure("", float(metrics.per_class[label])), mostly])
    note = f"Hardest first. The accuracy of a class with fewer than {FEW_IMAGES} images says little."
    return Table("Class by class", ["class", "images", "accuracy in %", "mostly predicted as"], rows, note)


TASKS = {RETRIEVAL: _evaluate_retrieval, ZERO_SHOT: _evaluate_zero_shot, PROBE: _evaluate_probe}
