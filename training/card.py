"""The model card: facts of a run, rendered into the README.md of a model's folder."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from modeling_clipmini import ClipMiniConfig
from modeling_clipmini.processing_clipmini import image_processor_for

from .arguments import ClipMiniTrainingArguments
from .build import ModelPreset
from .intervals import NUM_RESAMPLES, Interval
from .licences import UNKNOWN, strictest
from .metrics import DIRECTIONS, RECALL_AT
from .model_index import eval_results, format_figure, format_interval, format_with_interval, hub_id, public_name
from .recipes import Recipe
from .towers import OFFLINE_PREFIX, OFFLINE_TOWERS

TEMPLATE = Path(__file__).parent.parent / "model_card.md"  # beside this package in a checkout and in a wheel alike
OWNER = "your-name"  # in the place of the real one until the model is pushed
TOWERS = {"vision": "image tower", "text": "text tower"}
DATA, STARTING_MODEL = "training data", "starting model"  # roles of parts
TASK = "image-text-retrieval"
TAGS = ("clip", "clipmini", TASK, "timm")
OF_ONE_MACHINE = ("output_dir", "feature_cache_dir", "strict")  # keys of a recipe that say nothing to others
RECALLS = {direction: [f"{direction}_r{k}" for k in RECALL_AT] for direction in DIRECTIONS}


@dataclass(frozen=True)
class Part:
    """What a model is made of.

    Attributes:
        role: what it is to the model.
        name: as the Hub knows it, or for what the Hub does not have, its own name without a path.
        licence: as the Hub writes it, or None if it is not stated.
        note: what a user of the model should know of it.
        base_models: ids on the Hub of the models that it is, or was made of.
    """

    role: str
    name: str
    licence: str | None = None
    note: str = ""
    base_models: tuple[str, ...] = ()


@dataclass(frozen=True)
class CardFacts:
    """What a card tells.

    Attributes:
        name: the model's name.
        config: its config.
        source: what it was trained on: a Hub id, or the name of what lies elsewhere, without a path.
        licence: the model's own, as the Hub writes it; None if it cannot be told.
        parts: towers, or the model that it goes on from, and data.
        stages: the arguments of each stage of training, by its name; of a run without stages one, under "".
        results: as `results.json` has them; what is missing there is not told.
        recipe: as it was run, in YAML, without what is of one machine; "" for none.
        tags: others than every such model has.
        language: of the captions, as ISO 639-1 writes it: "en".
    """

    name: str
    config: ClipMiniConfig
    source: str
    licence: str | None
    parts: Sequence[Part]
    stages: Mapping[str, ClipMiniTrainingArguments]
    results: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""
    tags: Sequence[str] = ()
    language: str | list[str] | None = None

    @property
    def base_models(self) -> list[str]:
        """Ids on the Hub of all models that this one was made of."""
        return list(dict.fromkeys(model for part in self.parts for model in part.base_models))


def render_recipe_card(recipe: Recipe, config: ClipMiniConfig, results: Mapping[str, Any]) -> ModelCard:
    """Render the card of a model that a recipe trained.

    Args:
        recipe: what was run.
        config: the model's.
        results: as `results.json` holds them.

    Returns:
        The card, with metadata that the Hub reads. The licence is the strictest of the towers' and the data's, and
        absent where one of them is not stated, or they cannot be compared.
    """
    parts = recipe_parts(recipe)
    wanted = results.get("stages") or list(recipe.stages)
    return render_card(
        CardFacts(
            name=Path(str(recipe.training.output_dir)).absolute().name,
            config=config,
            source=recipe.data.source,
            licence=strictest(part.licence for part in parts),
            parts=parts,
            stages={name: recipe.stages[name] for name in wanted} or {"": recipe.training},
            results=results,
            recipe=_recipe_for_others(recipe.values),
        )
    )


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
        license=facts.licence,
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
        licence=facts.licence,
        are_stated=not any(part.licence in (None, UNKNOWN) for part in facts.parts),
        is_strictest=facts.licence == strictest(part.licence for part in facts.parts),
        parts=facts.parts,
        made_of=[part for part in facts.parts if part.role != DATA],
        stages=[_describe_stage(stage, args) for stage, args in facts.stages.items()],
        has_frozen_vision=all(args.freeze_vision for args in facts.stages.values()),
        is_cached=all(
            args.freeze_vision and args.freeze_text and args.cache_features for args in facts.stages.values()
        ),
        is_chosen=any(args.load_best_model_at_end for args in facts.stages.values()),
        seed=next(iter(facts.stages.values())).seed,
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


def recipe_parts(recipe: Recipe) -> list[Part]:
    """Tell what a recipe's model is made of: see `model_parts`, and its data."""
    return [*model_parts(recipe.model), Part(DATA, public_name(recipe.data.source), recipe.data.license)]


def model_parts(model: ModelPreset | str) -> list[Part]:
    """Tell what a run's model is made of.

    Args:
        model: as a recipe names it.

    Returns:
        Both towers, or the model that training goes on from; nothing for a model that starts at random.
    """
    if isinstance(model, str):
        licence, base_models = _from_card(model)
        own_id = hub_id(model)
        return [Part(STARTING_MODEL, public_name(model), licence, base_models=(own_id,) if own_id else base_models)]
    if not model.pretrained:
        return []
    return [_tower_part(TOWERS["vision"], model.vision), _tower_part(TOWERS["text"], str(model.text))]


def _tower_part(role: str, name: str) -> Part:
    if name.startswith(OFFLINE_PREFIX):
        tower = OFFLINE_TOWERS[name.removeprefix(OFFLINE_PREFIX)]
        return Part(role, tower.hub_id, tower.licence.lower(), f"{tower.note} {tower.changes}", (tower.hub_id,))
    own_id = hub_id(name)
    return Part(role, public_name(name), _from_card(name)[0], base_models=(own_id,) if own_id else ())


def _from_card(name_or_path: str) -> tuple[str | None, tuple[str, ...]]:
    """Read licence and base models off another model's card; nothing where it has none, or it cannot be had."""
    path = Path(name_or_path)
    try:
        data = ModelCard.load(path / "README.md" if path.is_dir() else name_or_path, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):
        return None, ()
    bases, licence = data.get("base_model") or [], data.get("license")
    return licence if isinstance(licence, str) else None, (bases,) if isinstance(bases, str) else tuple(bases)


def _describe_stage(name: str, args: ClipMiniTrainingArguments) -> dict[str, str]:
    rates = {tower: getattr(args, f"{side}_learning_rate") for side, tower in TOWERS.items()}
    own_rates = [f"{tower} {rate:g}" for tower, rate in rates.items() if rate is not None]
    return {
        "name": name,
        "trains": ", ".join(_what_trains(args)),
        "length": f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
        "batch": str(args.per_device_train_batch_size * args.world_size),
        "rate": f"{args.learning_rate:g}" + (f" ({', '.join(own_rates)})" if own_rates else ""),
    }


def _what_trains(args: ClipMiniTrainingArguments) -> Iterable[str]:
    yield "heads"
    for side, tower in TOWERS.items():
        if side in args.lora_towers:
            yield f"low-rank updates of the {tower}"
        elif side == "vision" and args.vision_stages is not None:
            yield f"last {args.vision_stages} stages of the {tower}"
        elif not getattr(args, f"freeze_{side}"):
            yield tower


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
    """Give the one figure that a reader should see first: what a caption finds among held-out pictures."""
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


def _recipe_for_others(values: Mapping[str, Any]) -> str:
    """Write a recipe as others may see it: paths shortened to their last part, and what is of one machine left out."""

    def shorten(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: shorten(item) for key, item in value.items() if key not in OF_ONE_MACHINE}
        if isinstance(value, str) and ("/" in value or "\\" in value):
            return public_name(value)
        return value

    return yaml.safe_dump(shorten(values), sort_keys=False, allow_unicode=True)
