"""Recipes: whole training runs as YAML, checked before anything is loaded, and their description in a model card."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import DistilBertConfig

from clipmini.data.pairs import DataArguments
from clipmini.names import OFFLINE_PREFIX
from clipmini.publishing.card import STARTING_MODEL, TOWERS, Part, Stage, data_part, model_part, render_card
from clipmini.recipe_files import (
    build_section,
    check_keys,
    find_model,
    publishable_recipe,
    read_recipe,
    read_yaml,
    section_keys,
)
from modeling_clipmini import ClipMiniConfig

from .arguments import ClipMiniTrainingArguments
from .build import ModelPreset
from .offline_towers import OFFLINE_TOWERS


@dataclass
class Recipe:
    """A whole training run.

    Attributes:
        model: a preset, changed by the recipe's `model_config`; or a saved model (folder or Hub id) to train further.
        data: the source of the pairs.
        training: the training arguments, with `output_dir`; in a recipe with stages, those that they share.
        stages: the name and arguments of each stage, in order, if the recipe has stages; each continues from the model
            of the one before it, and has a folder of its own for checkpoints.
        license: license of the trained model, as the Hub spells it, such as "apache-2.0"; required for a push.
        values: the recipe as it was read and changed, to be saved with the results.
    """

    model: ModelPreset | str
    data: DataArguments
    training: ClipMiniTrainingArguments
    stages: dict[str, ClipMiniTrainingArguments]
    license: str | None
    values: dict[str, Any]


def load_recipe(name_or_path: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and check every name, type and value in it: `read_recipe`, then `build_recipe`."""
    return build_recipe(read_recipe(name_or_path, changes or {}))


def build_recipe(values: dict[str, Any]) -> Recipe:
    """Build a recipe of what `read_recipe` has read, and check the types and values in it.

    Raises:
        ValueError: a value is not allowed; the message says what is.
    """
    training, license = values["training"], values.get("license")
    stages = {
        name: {**training, **changes, "output_dir": str(Path(str(training["output_dir"])) / name)}
        for name, changes in values.get("stages", {}).items()
    }
    return Recipe(
        model=_load_preset(values["model"], values.get("model_config", {})),
        data=build_section(DataArguments, values["data"], "data"),
        training=build_section(ClipMiniTrainingArguments, training, "training"),
        stages={
            name: build_section(ClipMiniTrainingArguments, stage, f"stages.{name}") for name, stage in stages.items()
        },
        license=license and license.lower(),  # SPDX writes Apache-2.0, the Hub apache-2.0
        values=values,
    )


def _load_preset(name: str, changes: dict[str, Any]) -> ModelPreset | str:
    file = find_model(name)
    if file is None:
        if changes:
            raise ValueError(
                f"model_config={changes!r} cannot change {name}: its heads are trained already; remove it."
            )
        return name
    preset = build_section(ModelPreset, read_yaml(file), name)
    check_keys(preset.config, section_keys("model_config"), f"{name}: config")
    if isinstance(preset.text, dict):
        check_keys(preset.text, DistilBertConfig().to_dict(), f"{name}: text")
    return replace(preset, config={**preset.config, **changes})


def render_recipe_card(recipe: Recipe, config: ClipMiniConfig, results: Mapping[str, Any]) -> ModelCard:
    """Render the card of a model that a recipe trained; `results` is the content of `results.json`."""
    names = results.get("stages") or list(recipe.stages)
    return render_card(
        Path(str(recipe.training.output_dir)).absolute().name,
        config,
        source=recipe.data.source,
        license=recipe.license,
        parts=[*model_parts(recipe.model), data_part(recipe.data.source)],
        stages=[describe_stage(name, recipe.stages[name]) for name in names] or [describe_stage("", recipe.training)],
        results=results,
        recipe=publishable_recipe(recipe.values),
    )


def model_parts(model: ModelPreset | str) -> list[Part]:
    """Describe the pretrained parts of a model for the card: its towers, or the model that is trained further."""
    if isinstance(model, str):
        return [model_part(STARTING_MODEL, model)]
    if not model.pretrained:
        return []
    roles = {**TOWERS, "side_vision": f"second {TOWERS['vision']}"}
    return [_tower_part(roles[key], name) for key, name in model.towers.items()]


def describe_stage(name: str, args: ClipMiniTrainingArguments) -> Stage:
    """Describe the arguments of a stage for the card; `name` is "" for a run without stages."""
    rates = {tower: getattr(args, f"{side}_learning_rate") for side, tower in TOWERS.items()}
    tower_rates = [f"{tower} {rate:g}" for tower, rate in rates.items() if rate is not None]
    return Stage(
        name=name,
        trains=", ".join(_trained_parts(args)),
        length=f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
        batch=str(args.per_device_train_batch_size * args.world_size),
        rate=f"{args.learning_rate:g}" + (f" ({', '.join(tower_rates)})" if tower_rates else ""),
        seed=args.seed,
        has_frozen_vision=args.freeze_vision,
        is_cached=args.freeze_vision and args.freeze_text and args.cache_features,
        is_chosen=args.load_best_model_at_end,
    )


def _trained_parts(args: ClipMiniTrainingArguments) -> Iterable[str]:
    yield "heads"
    for side, tower in TOWERS.items():
        if side in args.lora_towers:
            yield f"low-rank updates of the {tower}"
        elif side == "vision" and args.vision_stages is not None:
            yield f"last {args.vision_stages} stages of the {tower}"
        elif not getattr(args, f"freeze_{side}"):
            yield tower


def _tower_part(role: str, name: str) -> Part:
    if name.startswith(OFFLINE_PREFIX):
        tower = OFFLINE_TOWERS[name.removeprefix(OFFLINE_PREFIX)]
        return Part(role, tower.hub_id, tower.license.lower(), f"{tower.note} {tower.changes}", (tower.hub_id,))
    return model_part(role, name)
