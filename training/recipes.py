"""Recipes: whole training runs as YAML, checked before anything is loaded."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import DistilBertConfig

from clipmini.data.pairs import DataArguments
from clipmini.data.recipe_files import (
    build_section,
    check_keys,
    check_mapping,
    config_fields,
    field_names,
    find_preset,
    preset_names,
    read_recipe,
    read_yaml,
)

from .arguments import ClipMiniTrainingArguments
from .build import ModelPreset

logger = logging.getLogger(__name__)

SECTIONS = {"data": DataArguments, "training": ClipMiniTrainingArguments}
# One folder, one seed and one repository serve a whole run.
NOT_BY_STAGE = (
    *("output_dir", "seed", "data_seed"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"),
)


@dataclass
class Recipe:
    """A whole training run.

    Attributes:
        model: a preset, or the name of a saved model (folder or Hub id) to train further.
        data: where the pairs come from.
        training: how to train; holds `output_dir`. Of a recipe in stages, what they have in common.
        stages: each stage's name and arguments, in their order, where the recipe has stages; each goes on from the
            model of the one before it, and keeps its checkpoints in a folder of its own.
        model_config: fields of `ClipMiniConfig` that differ from the preset's.
        license: the trained model's, as the Hub writes it, such as "apache-2.0"; a push needs it.
        values: the recipe as it was read, overrides applied, to be written beside the result.
    """

    model: ModelPreset | str
    data: DataArguments
    training: ClipMiniTrainingArguments
    stages: dict[str, ClipMiniTrainingArguments] = field(default_factory=dict)
    model_config: dict[str, Any] = field(default_factory=dict)
    license: str | None = None
    values: dict[str, Any] = field(default_factory=dict)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check every key and type in it.

    Args:
        name_or_path: a YAML file, or the name of a recipe that the package brings ("demo").
        overrides: "key=value" strings; the key is dotted ("training.learning_rate", "stages.heads.learning_rate") or,
            where only one section has it, bare ("learning_rate"); the value is YAML.

    Returns:
        The recipe.

    Raises:
        ValueError: the file, a key or a value is wrong; the message says what is allowed.
    """
    values = read_recipe(name_or_path, overrides, SECTIONS)
    values.setdefault("training", {})
    check_mapping(values["training"], "training").setdefault("output_dir", f"runs/{Path(name_or_path).stem}")
    if not values["training"]["output_dir"]:
        raise ValueError("training.output_dir is empty; name a folder.")
    sections = {
        name: build_section(cls, check_mapping(values.get(name, {}), name), name) for name, cls in SECTIONS.items()
    }
    if not isinstance(values.get("model"), str):
        raise ValueError(
            f"{name_or_path}: model={values.get('model')!r}; name a preset, a YAML file or a saved model."
        )
    model_config = check_mapping(values.get("model_config", {}), "model_config")
    check_keys(model_config, config_fields(), "model_config")
    license = values.get("license")
    if license is not None and not isinstance(license, str):
        raise ValueError(f"{name_or_path}: license={license!r} is not allowed; use a name such as apache-2.0.")
    return Recipe(
        _load_preset(values["model"]),
        stages=_build_stages(values),
        model_config=model_config,
        license=license,
        values=values,
        **sections,
    )


def _build_stages(values: dict[str, Any]) -> dict[str, ClipMiniTrainingArguments]:
    stages = {}
    for name, changes in check_mapping(values.get("stages", {}), "stages").items():
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", str(name)) or name == "model":
            raise ValueError(f"stages: {name!r} cannot name a stage's folder; use small letters, digits, - and _.")
        where = f"stages.{name}"
        for key in check_mapping(changes, where):
            if key in NOT_BY_STAGE:
                raise ValueError(f"{where}.{key}: one value serves all stages; set training.{key}.")
        check_keys(changes, field_names(ClipMiniTrainingArguments), where)
        folder = str(Path(values["training"]["output_dir"]) / name)
        stages[name] = build_section(
            ClipMiniTrainingArguments, {**values["training"], **changes, "output_dir": folder}, where
        )
    return stages


def _load_preset(name: str) -> ModelPreset | str:
    is_preset = name in preset_names("models") or name.endswith((".yaml", ".yml"))
    if not is_preset:
        if not Path(name).exists() and "/" not in name:
            known = ", ".join(preset_names("models"))
            raise ValueError(f"model={name!r} is neither a preset ({known}) nor a YAML file, a folder or a Hub id.")
        return name
    values = read_yaml(find_preset("models", name))
    preset = build_section(ModelPreset, values, name)
    check_keys(preset.config, config_fields(), f"{name}: config")
    if isinstance(preset.text, dict):
        check_keys(preset.text, DistilBertConfig().to_dict(), f"{name}: text")
    return preset
