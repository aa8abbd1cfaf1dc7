"""Retrieval of a model on data, from names to all that is written."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, DatasetDict

from clipmini.data.duplicates import find_duplicates, share_ids
from clipmini.data.images import Skipped
from clipmini.data.leaks import LeakReport, find_leaks
from clipmini.data.pairs import DataArguments, choose_split, load_data
from clipmini.files import versions
from clipmini.inference.encoders import DualEncoder, load_encoders

from .diagnostics import PRECISIONS
from .figures import draw_compression, draw_ranks, draw_recall_curve, draw_similarities
from .intervals import NUM_RESAMPLES, Difference, Interval, bootstrap_intervals, paired_bootstrap
from .measure import Embeddings, RetrievalResult, embed_split, measure_retrieval
from .naming import (
    METRIC_LABELS,
    format_figure,
    format_interval,
    format_with_interval,
    model_index,
    public_name,
)
from .results import Evaluation, Table, as_json, render_page, show_misses
from .retrieval import RECALL_AT, retrieval_scores

MIN_WIDTH = 32  # down to which widths are halved
MAX_SIMILARITIES = 200_000_000  # of larger sets, embeddings are not measured again at other sizes unless asked for
HEADLINES = ("text_to_image_r1", "image_to_text_r1", "mean_recall")


def report_retrieval(
    model: str,
    data: DataArguments,
    *,
    split: str | None = None,
    baseline: str | None = None,
    widths: Sequence[int] | None = None,
    train_data: DataArguments | None = None,
    check_leaks: bool = True,
    batch_size: int = 16,
    skipped: Skipped | None = None,
) -> Evaluation:
    """Measure retrieval of a model on a split of image-caption pairs.

    Args:
        model: whatever `load_encoder` takes.
        data: where the pairs come from.
        split: which split; by default test, else validation, else train.
        baseline: another model, to be compared on the same queries.
        widths: sizes at which cut-off embeddings are measured too; by default halves down to 32.
        train_data: what the model was trained on, for the leak check; by default the data's own train split.
        check_leaks: look for images and captions that stand in the training data too.
        batch_size: images per forward.
        skipped: takes what cannot be read.

    Returns:
        The evaluation, not yet written.

    Raises:
        ValueError: a model, the data or the split cannot be used.
    """
    skipped = Skipped() if skipped is None else skipped
    pairs = load_data(data, skipped)
    name = choose_split(pairs, split, data.source)
    train = _training_pairs(pairs, name, train_data, skipped) if check_leaks else None
    if data.share_duplicate_ids or data.share_duplicate_captions:  # as in training
        pairs = share_ids(pairs, find_duplicates(pairs))
    rows = pairs[name]
    encoder, *others = load_encoders(*filter(None, (model, baseline)))
    leaks = None if train is None else find_leaks(train, rows)  # before the hours: it may meet a broken image
    embeds = embed_split(encoder, rows, batch_size)
    result = _measure(encoder, embeds, widths)
    facts: dict[str, Any] = {
        "task": "retrieval",
        "model": encoder.about(),
        "data": {
            "source": public_name(data.source),
            "split": name,
            "num_images": result.num_images,
            "num_captions": result.num_texts,
        },
        "embedding_width": result.width,
        "metrics": result.metrics,
        "chance": result.chance,
        "diagnostics": result.diagnostics,
        "by_width": result.by_width,
        "by_precision": result.by_precision,
        "recall_curve": result.recall_curve,
    }
    tables = [_metrics_table(result)]
    curves = {encoder.name: result.recall_curve}
    for other in others:
        own = measure_retrieval(embed_split(other, rows, batch_size), temperature=_temperature(other))
        differences = paired_bootstrap(result.scores, own.scores)
        facts["baseline"] = {
            "model": other.about(),
            "metrics": own.metrics,
            "diagnostics": own.diagnostics,
            "differences": differences,
        }
        curves[other.name] = own.recall_curve
        tables.append(_comparison(encoder.name, other.name, result.metrics, own.metrics, differences))
    tables += [_diagnostics_table(result), *_size_tables(result)]

    warnings, leak_table = list(result.diagnostics.faults), None
    if name == "train":
        warnings.append("This is the train split: a model that was trained on it looks better than it is.")
    if leaks is not None:
        facts["leaks"] = _leak_facts(leaks, embeds)
        leak_table = _leak_table(leaks, facts["leaks"], result.metrics)
    facts |= {
        "num_resamples": NUM_RESAMPLES,
        "model_index": model_index(encoder.name, "image-text-retrieval", facts["data"], result.metrics),
        "versions": versions(),
    }
    page = render_page(
        model=facts["model"],
        data=facts["data"],
        task_name="Image-text retrieval",
        size=f"{result.num_images:,} images, {result.num_texts:,} captions",
        baseline=facts.get("baseline"),
        headline=[
            {
                "name": METRIC_LABELS[metric],
                "value": format_figure(metric, result.metrics[metric].value),
                "interval": f"{format_interval(metric, result.metrics[metric])}, chance "
                f"{format_figure(metric, result.chance[metric])}",
            }
            for metric in HEADLINES
        ],
        warnings=warnings,
        leaks=leak_table,
        tables=tables,
        drawings=_drawings(result, curves),
        misses=show_misses(result.misses, rows),
        method=_method(result, _leak_sentence(check_leaks, leaks is not None)),
        versions=facts["versions"],
    )
    if leak_table is not None:
        tables.append(leak_table)
        if leak_table.rows:
            warnings.append(leak_table.note)
    facts["warnings"] = warnings
    return Evaluation(as_json(facts), tables, page, tuple(warnings))


def _measure(encoder: DualEncoder, embeds: Embeddings, widths: Sequence[int] | None) -> RetrievalResult:
    full_width = embeds.images.shape[1]
    is_large = len(embeds.images) * len(embeds.texts) > MAX_SIMILARITIES
    if widths is None:
        widths = []
        while not is_large and (width := full_width >> (len(widths) + 1)) >= MIN_WIDTH:
            widths.append(width)
    return measure_retrieval(
        embeds,
        temperature=_temperature(encoder),
        widths=widths,
        precisions=() if is_large else tuple(PRECISIONS),
    )


def _temperature(encoder: DualEncoder) -> float | None:
    return None if encoder.logit_scale is None else 1 / encoder.logit_scale


def _training_pairs(
    pairs: DatasetDict, split: str, train_data: DataArguments | None, skipped: Skipped
) -> Dataset | None:
    """Find the pairs that the model was, or may have been, trained on."""
    if train_data is not None:
        loaded = load_data(train_data, skipped)
        return loaded[choose_split(loaded, "train", train_data.source)]
    return pairs["train"] if split != "train" and "train" in pairs else None


def _leak_sentence(is_wanted: bool, is_known: bool) -> str:
    if not is_wanted:
        return "Whether these images stand in the training data too was not checked."
    if not is_known:
        return "Whether these images stand in the training data too was not checked: no training data was named."
    return (
        "Seen in training: compared were the images and captions of the data's train split, or of what was named as "
        "training data. A model that was trained on other data may have seen others of these."
    )


def _leak_facts(leaks: LeakReport, embeds: Embeddings) -> dict[str, Any]:
    facts = leaks.as_dict()
    if leaks.rows or leaks.captions:
        rest = embeds.without(leaks.rows, leaks.captions)
        if len(rest.images) and len(rest.texts):
            facts["without"] = {
                "num_images": len(rest.images),
                "num_captions": len(rest.texts),
                "metrics": bootstrap_intervals(
                    retrieval_scores(rest.images, rest.texts, rest.text_image_ids, rest.image_ids)
                ),
            }
    return facts


def _leak_table(leaks: LeakReport, facts: Mapping[str, Any], metrics: Mapping[str, Interval]) -> Table:
    note = f"{leaks.summary()} {len(leaks.captions):,} captions also describe a training image, in the same words."
    title = "Seen in training"
    if not leaks.rows and not leaks.captions:
        return Table(title, [], [], note)
    if "without" not in facts:
        rows = [[METRIC_LABELS[name], format_with_interval(name, metrics[name]), "-"] for name in HEADLINES]
        return Table(title, ["in percent", "all", "without these: nothing is left"], rows, note)
    rest = facts["without"]
    rows = [
        [METRIC_LABELS[name], *(format_with_interval(name, one[name]) for one in (metrics, rest["metrics"]))]
        for name in HEADLINES
    ]
    without = f"without these: {rest['num_images']:,} images, {rest['num_captions']:,} captions"
    return Table(title, ["in percent", "all", without], rows, note)


def _metrics_table(result: RetrievalResult) -> Table:
    rows = [
        [
            METRIC_LABELS[name],
            format_figure(name, interval.value),
            format_interval(name, interval),
            format_figure(name, result.chance[name]) if name in result.chance else "",
        ]
        for name, interval in result.metrics.items()
    ]
    note = f"Recalls and mAP in percent; 95 % bootstrap intervals over images, {NUM_RESAMPLES:,} resamples."
    return Table("Retrieval", ["metric", "value", "95 % interval", "chance"], rows, note)


def _comparison(
    name: str,
    other: str,
    metrics: Mapping[str, Interval],
    others: Mapping[str, Interval],
    differences: Mapping[str, Difference],
) -> Table:
    rows = [
        [
            METRIC_LABELS[metric],
            format_figure(metric, metrics[metric].value),
            format_figure(metric, others[metric].value),
            format_figure(metric, difference.value),
            format_interval(metric, difference),
            _plain(difference.p_value, 3),
        ]
        for metric, difference in differences.items()
    ]
    note = (
        "Both models on the same resamples of images (paired bootstrap). The difference is the first less the "
        "second; p is two-sided, of each metric by itself."
    )
    return Table(f"{name} against {other}", ["metric", name, other, "difference", "95 % interval", "p"], rows, note)


def _diagnostics_table(result: RetrievalResult) -> Table:
    shape = result.diagnostics
    rows = [
        [
            "modality gap",
            _plain(shape.modality_gap, 3),
            "0 to 2",
            "distance of the mean image from the mean caption",
        ],
        ["alignment", _plain(shape.alignment, 3), "0 to 4", "mean squared distance of a caption from its image"],
        ["uniformity of images", _plain(shape.image_uniformity, 2), "-8 to 0", "less is more evenly spread"],
        ["uniformity of captions", _plain(shape.text_uniformity, 2), "-8 to 0", "likewise"],
        [
            "effective rank of images",
            _plain(shape.image_effective_rank, 1),
            f"1 to {result.width}",
            "dimensions filled",
        ],
        ["effective rank of captions", _plain(shape.text_effective_rank, 1), f"1 to {result.width}", "likewise"],
        ["cosine with the own image", _plain(shape.own_similarity, 3), "-1 to 1", "mean over captions"],
        [
            "cosine with another image",
            _plain(shape.other_similarity, 3),
            "-1 to 1",
            "mean over captions and images",
        ],
    ]
    if shape.temperature is not None:
        rows.append(["temperature", _plain(shape.temperature, 4), "above 0", "similarities are divided by it"])
    return Table("The shared space", ["figure", "value", "range", "meaning"], rows)


def _plain(value: float, num_digits: int) -> str:
    return f"{value:.{num_digits}f}" if math.isfinite(value) else "-"


def _size_tables(result: RetrievalResult) -> list[Table]:
    rows = [
        [f"{width} x float32", f"{4 * width:,}", *(format_figure(name, metrics[name]) for name in HEADLINES)]
        for width, metrics in result.by_width.items()
    ]
    rows += [
        [
            f"{result.width} x {name}",
            f"{result.width * PRECISIONS[name] // 8:,}",
            *(format_figure(metric, metrics[metric]) for metric in HEADLINES),
        ]
        for name, metrics in result.by_precision.items()
        if name != "float32"
    ]
    if len(rows) < 2:
        return []
    columns = ["embedding", "bytes", *(METRIC_LABELS[name] for name in HEADLINES)]
    return [
        Table("Smaller embeddings", columns, rows, "In percent; the same model, cut off or rounded after the fact.")
    ]


def _drawings(result: RetrievalResult, curves: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, str]]:
    drawings = [
        {
            "title": "Recall curve",
            "svg": draw_recall_curve(curves, result.chance_curve),
            "note": "How many queries have a right answer among the first k.",
        },
        {
            "title": "Ranks",
            "svg": draw_ranks({name: score.ranks.numpy() for name, score in result.scores.items()}),
            "note": "In which place the best right answer came.",
        },
        {
            "title": "Similarities",
            "svg": draw_similarities(result.own_similarities, result.other_similarities),
            "note": "The less the two overlap, the better captions tell images apart.",
        },
    ]
    if len(result.by_width) > 1 or len(result.by_precision) > 1:
        by_width = {width: metrics["mean_recall"] for width, metrics in result.by_width.items()}
        by_precision = {name: metrics["mean_recall"] for name, metrics in result.by_precision.items()}
        drawings.append(
            {
                "title": "Smaller embeddings",
                "svg": draw_compression(by_width, by_precision),
                "note": "What cutting off and rounding cost.",
            }
        )
    return drawings


def _method(result: RetrievalResult, leak_sentence: str) -> list[str]:
    k = ", ".join(map(str, RECALL_AT))
    return [
        f"Every caption is a query for its image among all {result.num_images:,}, and every image a query for any "
        f"of its captions among all {result.num_texts:,}. R@k, for k of {k}, is the share of queries with a right "
        "answer among the first k; its other captions do not stand in an image's way. Ties count against the model. "
        "Mean recall is the mean of the six.",
        f"Intervals: images are drawn with replacement, each with all of its captions, {NUM_RESAMPLES:,} times. "
        "They tell how figures would vary with other images of the same kind, not with another training seed.",
        leak_sentence,
    ]
