"""The model card: facts of a run, rendered into the README.md of a model's folder."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from clipmini.evaluation.intervals import NUM_RESAMPLES, Interval
from clipmini.evaluation.naming import (
    eval_results,
    format_figure,
    format_interval,
    format_with_interval,
    hub_id,
    public_name,
)
from clipmini.evaluation.retrieval import DIRECTIONS, RECALL_AT
from modeling_clipmini import ClipMiniConfig
from modeling_clipmini.processing_clipmini import image_processor_for

HERE = Path(__file__).parent
# In a wheel beside this file, where setup.py puts it; in a checkout at its root.
TEMPLATE = next(folder / "model_card.md" for folder in (HERE, HERE.parents[1]) if (folder / "model_card.md").is_file())
OWNER = "your-name"  # in the place of the real one until the model is pushed
TOWERS = {"vision": "image tower", "text": "text tower"}
DATA, STARTING_MODEL = "training data", "starting model"  # roles of parts
TASK = "image-text-retrieval"
TAGS = ("clip", "clipmini", TASK, "timm")
RECALLS = {direction: [f"{direction}_r{k}" for k in RECALL_AT] for direction in DIRECTIONS}


@dataclass(frozen=True)
class Part:
    """What a model is made of.

    Attributes:
        role: what it is to the model.
        name: as the Hub knows it, or for what the Hub does not have, its own name without a path.
        license: as the Hub writes it, or None if it is not stated.
        note: what a user of the model should know of it.
        base_models: ids on the Hub of the models that it is, or was made of.
    """

    role: str
    name: str
    license: str | None = None
    note: str = ""
    base_models: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """How a stage of training went, in words.

    Attributes:
        name: the stage's; "" in a run without stages.
        trains: what was trained.
        length: in epochs or steps.
        batch: pairs in a step, over all processes.
        rate: the learning rates.
        seed: the run's.
        has_frozen_vision: the image tower was not trained.
        is_cached: both towers were frozen, and ran once.
        is_chosen: the best checkpoint was kept, by figures on validation.
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


@dataclass(frozen=True)
class CardFacts:
    """What a card tells.

    Attributes:
        name: the model's name.
        config: its config.
        source: what it was trained on: a Hub id, or the name of what lies elsewhere, without a path.
        license: the model's own, as the Hub writes it; None if it is not stated.
        parts: towers, or the model that it goes on from, and data.
        stages: each stage of training, in order; of a run without stages one, without a name.
        results: as `results.json` has them; what is missing there is not told.
        recipe: as it was run, in YAML, without what is of one machine; "" for none.
        tags: others than every such model has.
        language: of the captions, as ISO 639-1 writes it: "en".
    """

    name: str
    config: ClipMiniConfig
    source: str
    license: str | None
    parts: Sequence[Part]
    stages: Sequence[Stage]
    results: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""
    tags: Sequence[str] = ()
    language: str | list[str] | None = None

    @property
    def base_models(self) -> list[str]:
        """Ids on the Hub of all models that this one was made of."""
        return list(dict.fromkeys(model for part in self.parts for model in part.base_models))


def render_card(facts: CardFacts) -> ModelCard:
    """Render a card.

    Args:
        facts: what it tells.

    Returns:
        The card. Until the model is pushed its id is `your-name/` and the name.
    """
    name = re.sub(r"[^\w.-]+", "-", facts.name).strip("-.") or "clipmini"
    splits = facts.results.get("splits", {})
    shown = _held_out(splits)
    data_id = hub_id(facts.source)
    card_data = ModelCardData(
        model_name=name,
        language=facts.language,
        license=facts.license and facts.license.lower(),  # SPDX writes Apache-2.0, the Hub apache-2.0
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=list(dict.fromkeys([*TAGS, *facts.tags])),
        base_model=facts.base_models or None,
        datasets=[data_id] if data_id else None,
        eval_results=eval_results(TASK, {"source": facts.source, "split": shown}, _recalls(splits[shown]))
        if shown
        else None,
    )
    pixels = image_processor_for(facts.config.vision_config)
    goes_on = STARTING_MODEL in [part.role for part in facts.parts]
    card: ModelCard = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        model_id=f"{OWNER}/{name}",
        config=facts.config,
        image_size=pixels.crop_size,
        is_cropped="shortest_edge" in pixels.size,
        source=public_name(facts.source),
        license=facts.license,
        parts=facts.parts,
        made_of=[part for part in facts.parts if part.role != DATA],
        stages=facts.stages,
        has_frozen_vision=all(stage.has_frozen_vision for stage in facts.stages),
        is_cached=all(stage.is_cached for stage in facts.stages),
        is_chosen=any(stage.is_chosen for stage in facts.stages),
        seed=facts.stages[0].seed,
        results=facts.results,
        headline=_headline(shown, splits[shown]) if shown else None,
        tables={split: _rows(measured, goes_on) for split, measured in splits.items()},
        widths={split: list(_width_rows(measured)) for split, measured in splits.items()},
        num_resamples=NUM_RESAMPLES,
        hardware=_hardware(facts.results.get("versions", {})),
        time=_duration(facts.results.get("train_s")),
        recipe=facts.recipe,
    )
    return card


def _held_out(splits: Mapping[str, Any]) -> str | None:
    """Choose the split to be known by: the checkpoint may have been chosen on validation, but not on test."""
    return next((name for name in ("test", "validation") if splits.get(name, {}).get("intervals")), None)


def _recalls(measured: Mapping[str, Any]) -> dict[str, Interval]:
    """Give the recalls of whole embeddings, with intervals: without one a figure says too much."""
    names = [*RECALLS["text_to_image"], *RECALLS["image_to_text"], "mean_recall"]
    intervals = measured.get("intervals", {})
    return {name: Interval(measured["after"][name], *intervals[name]) for name in names if name in intervals}


def _rows(measured: Mapping[str, Any], goes_on: bool) -> list[tuple[str, list[str]]]:
    """Lay a split's recalls out, a row for each direction; then what the starting model, if any, and chance reach."""
    recalls = _recalls(measured)
    rows = [
        (
            direction.replace("_", " "),
            [f"**{format_figure(key, recalls[key].value)}** ({format_interval(key, recalls[key])})" for key in keys],
        )
        for direction, keys in RECALLS.items()
        if recalls
    ]
    for column, label in ((("before", "before training"),) if goes_on else ()) + (("chance", "chance"),):
        for direction, keys in RECALLS.items():
            if figures := measured.get(column):
                cells = [format_figure(key, figures[key]) for key in keys]
                rows.append((f"{direction.replace('_', ' ')}, {label}", cells))
    return rows


def _width_rows(measured: Mapping[str, Any]) -> Iterable[tuple[str, list[str]]]:
    """Lay out what embeddings reach at the widths that they were trained for, the widest first."""
    after, intervals = measured.get("after", {}), measured.get("intervals", {})
    widths = {int(key.rpartition("_")[2]) for key in intervals if key.startswith("mean_recall_at_")}
    for width in sorted(widths, reverse=True):
        keys = {name: f"{name}_at_{width}" for name in ("text_to_image_r1", "image_to_text_r1", "mean_recall")}
        figures = {name: Interval(after[key], *intervals[key]) for name, key in keys.items()}
        yield str(width), [format_with_interval(name, one) for name, one in figures.items()]


def _headline(split: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Give the one figure that a reader should see first: what a caption finds among held-out images."""
    key = "text_to_image_r1"
    recall = _recalls(measured)[key]
    return {
        "split": split,
        "num_images": measured["num_images"],
        "value": format_figure(key, recall.value),
        "interval": format_interval(key, recall),
        "chance": format_figure(key, measured["chance"][key]),
    }


def _hardware(versions: Mapping[str, str]) -> str:
    if "gpu" in versions:
        return f"a GPU, {versions['gpu']}"
    return f"a CPU ({versions['machine']}), {versions['cpu_threads']} threads" if "machine" in versions else ""


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
