"""The model card: facts about a model and its training, rendered as the README.md of the model's folder."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, ModelCard, ModelCardData

from clipmini.evaluation.intervals import NUM_RESAMPLES, Interval
from clipmini.evaluation.naming import eval_results, format_figure, format_interval, format_with_interval
from clipmini.evaluation.results import tabulate_kept
from clipmini.evaluation.retrieval import DIRECTIONS, RECALL_AT
from clipmini.files import SAMPLES_FILE
from clipmini.names import expand, hub_id, locate, public_name
from modeling_clipmini import ClipMiniConfig, ClipMiniModel
from modeling_clipmini.processing_clipmini import image_processor_for

HERE = Path(__file__).parent
# A wheel has it beside this file, where setup.py puts it; a checkout has it at its root.
TEMPLATE = next(folder / "model_card.md" for folder in (HERE, HERE.parents[1]) if (folder / "model_card.md").is_file())
OWNER = "your-name"  # stands for the owner until the model is pushed
TOWERS = {"vision": "image tower", "text": "text tower"}
DATA, STARTING_MODEL = "training data", "starting model"  # roles of parts
TASK = "image-text-retrieval"
TAGS = ("clip", "clipmini", TASK, "timm")
RECALLS = {direction: [f"{direction}_r{k}" for k in RECALL_AT] for direction in DIRECTIONS}


@dataclass(frozen=True)
class Part:
    """A tower, model or data set that a model is made of.

    Attributes:
        role: what the model uses it as, such as "image tower".
        name: its Hub id; for what is not on the Hub, its name without a path.
        license: as the Hub writes it; None if it is not stated.
        note: what users of the model should know about it.
        base_models: Hub ids of the models that it is or was made from.
    """

    role: str
    name: str
    license: str | None = None
    note: str = ""
    base_models: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """A stage of training, described in words.

    Attributes:
        name: the stage's name; "" in a run without stages.
        trains: what was trained.
        length: in epochs or steps.
        batch: pairs per step, over all processes.
        rate: the learning rates.
        seed: the run's seed.
        has_frozen_vision: whether the image tower was frozen.
        is_cached: whether both towers were frozen and their features computed once.
        is_chosen: whether the best checkpoint was kept, chosen on validation.
    """

    name: str
    trains: str
    length: str
    batch: str
    rate: str
    seed: int
    has_frozen_vision: bool
    is_cached: bool
    is_chosen: bool


def render_card(
    name: str,
    config: ClipMiniConfig,
    *,
    source: str,
    license: str | None,
    parts: Sequence[Part],
    stages: Sequence[Stage],
    results: Mapping[str, Any],
    recipe: str = "",
    tags: Sequence[str] = (),
    language: str | list[str] | None = None,
) -> ModelCard:
    """Render the card of a model.

    Args:
        name: the model's name.
        config: the model's config.
        source: the training data: a Hub id, or a path, of which only the last part is shown; "" if there was none.
        license: the model's license, as the Hub writes it; None if it is not stated.
        parts: the towers, or the model that training started from, and the data.
        stages: the stages of training, in order; a run without stages has one with an empty name. None for a model
            that was not trained, but converted or interpolated.
        results: as in `results.json`; the card leaves out what is missing.
        recipe: the recipe as it was run, in YAML, without what concerns one machine alone; "" for none.
        tags: tags in addition to those of every such model.
        language: ISO 639-1 code of the captions, such as "en".

    Returns:
        The card. Its model id is `your-name/` and the name, until the model is pushed.
    """
    name = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "clipmini"
    splits = results.get("splits", {})
    # The checkpoint may have been chosen on validation, but never on test.
    shown = next((split for split in ("test", "validation") if split in splits), None)
    metrics = [*RECALLS["text_to_image"], *RECALLS["image_to_text"], "mean_recall"]
    recalls = {metric: _interval(splits[shown], metric) for metric in metrics} if shown else {}
    data_id = hub_id(source)
    card_data = ModelCardData(
        model_name=name,
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=list(dict.fromkeys([*TAGS, *tags])),
        base_model=list(dict.fromkeys(model for part in parts for model in part.base_models)) or None,
        datasets=[data_id] if data_id else None,
        eval_results=eval_results(TASK, {"source": source, "split": shown}, recalls) or None,
    )
    pixels = image_processor_for(config.vision_config)
    is_continued = STARTING_MODEL in [part.role for part in parts]
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        model_id=f"{OWNER}/{name}",
        config=config,
        image_size=pixels.crop_size,
        is_cropped="shortest_edge" in pixels.size,
        source=public_name(source) if source else "",
        license=license,
        parts=parts,
        made_of=[part for part in parts if part.role != DATA],
        stages=stages,
        has_frozen_vision=bool(stages) and all(stage.has_frozen_vision for stage in stages),
        is_cached=bool(stages) and all(stage.is_cached for stage in stages),
        is_chosen=any(stage.is_chosen for stage in stages) or "interpolation" in results,
        results=results,
        shown=shown,
        samples_file=SAMPLES_FILE,
        headline=recalls.get("text_to_image_r1"),
        kept=tabulate_kept(results["kept"]) if results.get("kept") else None,
        tables={split: _recall_rows(measured, is_continued) for split, measured in splits.items()},
        widths={split: _width_rows(measured) for split, measured in splits.items()},
        num_resamples=NUM_RESAMPLES,
        time=_format_duration(results.get("train_s")),
        recipe=recipe,
        count="{:,}".format,
        percent=lambda share: f"{100 * share:.1f}",
    )


def render_converted_card(name: str, model: ClipMiniModel, original: str) -> ModelCard:
    """Render the card of a model, called `name`, that was converted from another one, by its Hub id or path."""
    part = model_part(STARTING_MODEL, original)
    results = {"num_parameters": model.num_parameters()}
    facts: dict[str, Any] = {"source": "", "license": part.license, "parts": [part], "stages": [], "results": results}
    return render_card(name, model.config, **facts)


def data_part(source: str) -> Part:
    """Describe the training data for the card, with the license that its card on the Hub or in a folder states."""
    path = expand(source)
    has_card = hub_id(source) or Path(path).is_dir()
    return Part(DATA, public_name(source), _from_card(path, DatasetCard)[0] if has_card else None)


def model_part(role: str, name: str) -> Part:
    """Describe a model that another is made of, with the license and base models that its own card states."""
    license, base_models = _from_card(name)
    model_id = hub_id(name)
    return Part(role, public_name(name), license, base_models=(model_id,) if model_id else base_models)


def _from_card(
    name_or_path: str, kind: type[ModelCard] | type[DatasetCard] = ModelCard
) -> tuple[str | None, tuple[str, ...]]:
    """Return license and base models from another card; None and () if there is none or it cannot be loaded."""
    try:
        located = locate(name_or_path, "a folder", str(kind.repo_type))  # which does not wait for a Hub that is away
        card = Path(located, "README.md") if Path(located).is_dir() else located
        data = kind.load(card, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):
        return None, ()
    bases, license = data.get("base_model") or [], data.get("license")
    return license if isinstance(license, str) else None, (bases,) if isinstance(bases, str) else tuple(bases)


def _interval(measured: Mapping[str, Any], metric: str) -> Interval:
    return Interval(measured["after"][metric], *measured["intervals"][metric])


def _recall_rows(measured: Mapping[str, Any], is_continued: bool) -> list[tuple[str, list[str]]]:
    """Lay out a split's recalls by direction, then normalized, of the starting model, and by chance, where known."""
    rows = []
    for direction, metrics in RECALLS.items():
        recalls = {metric: _interval(measured, metric) for metric in metrics}
        cells = [
            f"**{format_figure(metric, recall.value)}** ({format_interval(metric, recall)})"
            for metric, recall in recalls.items()
        ]
        rows.append((direction.replace("_", " "), cells))
    if "normalized" in measured:
        for direction, metrics in RECALLS.items():
            intervals = {
                metric: Interval(measured["normalized"][metric], *measured["normalized_intervals"][metric])
                for metric in metrics
            }
            cells = [format_with_interval(metric, interval) for metric, interval in intervals.items()]
            rows.append((f"{direction.replace('_', ' ')}, normalized", cells))
    for column, label in {"before": "before training", "chance": "chance"}.items():
        if column == "chance" or (is_continued and column in measured):
            for direction, metrics in RECALLS.items():
                cells = [format_figure(metric, measured[column][metric]) for metric in metrics]
                rows.append((f"{direction.replace('_', ' ')}, {label}", cells))
    return rows


def _width_rows(measured: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Lay out the recalls of truncated embeddings, for each width that they were trained for, the widest first."""
    prefix = "mean_recall_at_"
    widths = [int(metric.removeprefix(prefix)) for metric in measured["intervals"] if metric.startswith(prefix)]
    metrics = ("text_to_image_r1", "image_to_text_r1", "mean_recall")
    return [
        (str(width), [format_with_interval(metric, _interval(measured, f"{metric}_at_{width}")) for metric in metrics])
        for width in sorted(widths, reverse=True)
    ]


def _format_duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
