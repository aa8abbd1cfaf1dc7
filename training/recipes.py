"""Recipes: whole training runs as YAML, checked before anything is loaded."""

import contextlib
import copy
import datetime
import difflib
import inspect
import logging
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from transformers import DistilBertConfig

from modeling_clipmini import ClipMiniConfig

from .arguments import ClipMiniTrainingArguments, DataArguments
from .build import ModelPreset

logger = logging.getLogger(__name__)

SECTIONS = {"data": DataArguments, "training": ClipMiniTrainingArguments}
TOP_LEVEL = ("model", "model_config", *SECTIONS, "stages")
OF_THE_SOURCE = ("image_column", "caption_column", "image_root", "license")  # what a recipe knows of its own data
# One folder, one seed and one repository serve a whole run.
NOT_BY_STAGE = (
    *("output_dir", "seed", "data_seed", "feature_cache_dir"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"),
)
TYPE_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
    type(None): "null",
}


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
        values: the recipe as it was read, overrides applied, to be written beside the result.
    """

    model: ModelPreset | str
    data: DataArguments
    training: ClipMiniTrainingArguments
    stages: dict[str, ClipMiniTrainingArguments] = field(default_factory=dict)
    model_config: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def preset_names(kind: str) -> list[str]:
    """List the presets that the package brings: `kind` is "models" or "recipes"."""
    folder = files("clipmini.configuration") / kind
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


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
    values = _read_recipe(name_or_path, overrides)
    values.setdefault("training", {})
    _mapping(values["training"], "training").setdefault("output_dir", f"runs/{Path(name_or_path).stem}")
    if not values["training"]["output_dir"]:
        raise ValueError("training.output_dir is empty; name a folder.")
    sections = {name: _build(cls, _mapping(values.get(name, {}), name), name) for name, cls in SECTIONS.items()}
    if not isinstance(values.get("model"), str):
        raise ValueError(
            f"{name_or_path}: model={values.get('model')!r}; name a preset, a YAML file or a saved model."
        )
    model_config = _mapping(values.get("model_config", {}), "model_config")
    _check_keys(model_config, _config_fields(), "model_config")
    return Recipe(
        _load_preset(values["model"]),
        stages=_build_stages(values),
        model_config=model_config,
        values=values,
        **sections,
    )


def _read_recipe(name_or_path: str, overrides: Sequence[str]) -> dict[str, Any]:
    values = _read_yaml(_find("recipes", name_or_path))
    changed = _overridden(values, overrides)
    source, other = (one["data"].get("source") if _has_data(one) else None for one in (values, changed))
    if source and other and not _is_same(str(source), str(other)):
        facts = {key: values["data"].pop(key) for key in OF_THE_SOURCE if key in values["data"]}
        changed = _overridden(values, overrides)  # what is said of the other data holds
        gone = {key: value for key, value in facts.items() if value is not None and key not in changed["data"]}
        if gone:
            named = ", ".join(f"{key}: {value}" for key, value in gone.items())
            remedy = "; set data.license before a model of them is pushed" if "license" in gone else ""
            logger.warning("left out, since it holds for %s and not for %s: %s%s", source, other, named, remedy)
    _check_keys(changed, TOP_LEVEL, name_or_path)
    return changed


def _overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    values = copy.deepcopy(values)
    for override in overrides:
        _apply_override(values, override)
    return values


def _has_data(values: dict[str, Any]) -> bool:
    return isinstance(values.get("data"), dict)


def _is_same(source: str, other: str) -> bool:
    return source == other or (os.path.exists(source) and os.path.exists(other) and os.path.samefile(source, other))


def load_data_arguments(name_or_source: str, overrides: Sequence[str] = ()) -> DataArguments:
    """Read which pairs are meant.

    Args:
        name_or_source: a recipe, whose data section is taken; or a source of pairs, which are taken as they are.
        overrides: "key=value" strings, as in `load_recipe`; of a source, keys of `DataArguments`.

    Returns:
        The arguments.

    Raises:
        ValueError: a file, a key or a value is wrong.
    """
    if name_or_source in preset_names("recipes") or name_or_source.endswith((".yaml", ".yml")):
        # Not the whole recipe: its training may need a GPU that is not here.
        values = _read_recipe(name_or_source, overrides)
        return _build(DataArguments, _mapping(values.get("data", {}), "data"), "data")
    data: dict[str, Any] = {"source": name_or_source, "validation_fraction": 0.0, "test_fraction": 0.0}
    for override in overrides:
        values = {"data": data}
        _apply_override(values, override)
        _check_keys(values, ("data",), f"--set {override}")
    return _build(DataArguments, data, "data")


def _build_stages(values: dict[str, Any]) -> dict[str, ClipMiniTrainingArguments]:
    stages = {}
    for name, changes in _mapping(values.get("stages", {}), "stages").items():
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", str(name)) or name == "model":
            raise ValueError(f"stages: {name!r} cannot name a stage's folder; use small letters, digits, - and _.")
        where = f"stages.{name}"
        for key in _mapping(changes, where):
            if key in NOT_BY_STAGE:
                raise ValueError(f"{where}.{key}: one value serves all stages; set training.{key}.")
        _check_keys(changes, _field_names(ClipMiniTrainingArguments), where)
        folder = str(Path(values["training"]["output_dir"]) / name)
        stages[name] = _build(
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
    values = _read_yaml(_find("models", name))
    preset = _build(ModelPreset, values, name)
    _check_keys(preset.config, _config_fields(), f"{name}: config")
    if isinstance(preset.text, dict):
        _check_keys(preset.text, DistilBertConfig().to_dict(), f"{name}: text")
    return preset


def _config_fields() -> list[str]:
    names = inspect.signature(ClipMiniConfig.__init__).parameters
    return [name for name in names if name not in ("self", "kwargs", "vision_config", "text_config")]


def _find(kind: str, name_or_path: str) -> Any:
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    if name_or_path in preset_names(kind):
        return files("clipmini.configuration") / kind / f"{name_or_path}.yaml"
    raise ValueError(
        f"{name_or_path} is neither a file nor among the {kind} that clipmini brings: {', '.join(preset_names(kind))}."
    )


class _OnceLoader(yaml.SafeLoader):
    """Loads YAML as `SafeLoader` does, which would take the last of two equal keys and say nothing."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines:
                file = node.start_mark.name
                raise ValueError(f"{file}: {name!r} stands in line {lines[name]} and in line {line}; keep one.")
            lines[name] = line
        return node


def _read_yaml(file: Any) -> dict[str, Any]:
    try:
        with file.open(encoding="utf-8") as stream:
            values = yaml.load(stream, Loader=_OnceLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}.") from None
    return _mapping(values, str(file))


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold `key: value` lines, not {type(value).__name__}.")
    return value


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"--set {override!r} is not of the form key=value.")
    path = key.split(".")
    stages = _mapping(values.get("stages", {}), "stages")
    if len(path) == 1 and key not in TOP_LEVEL:
        path = [*_home_of(key, stages), key]
    is_stage = path[0] == "stages" and len(path) == 3
    if is_stage and path[1] not in stages:
        raise ValueError(f"--set {key}=...: the recipe has no such stage; it has {', '.join(stages) or 'none'}.")
    if not is_stage and (len(path) > 2 or (len(path) == 2 and path[0] not in (*SECTIONS, "model_config"))):
        raise ValueError(f"--set {key}=...: {_unknown(path[0], [*SECTIONS, 'model_config'])}")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # the latter of what looks like a date and is none
        value = text
    home = values
    for part in path[:-1]:
        home = _mapping(home.setdefault(part, {}), part)
    home[path[-1]] = value


def _home_of(key: str, stages: Mapping[str, Any]) -> list[str]:
    """Find the section that a bare key belongs to."""
    homes = [name for name, cls in SECTIONS.items() if key in _field_names(cls)]
    if key in _config_fields():
        homes.append("model_config")
    # A stage's own value would hide that of `training`.
    homes += [f"stages.{name}" for name, changes in stages.items() if isinstance(changes, dict) and key in changes]
    if len(homes) > 1:
        raise ValueError(f"--set {key}=...: say which: {' or '.join(f'{home}.{key}' for home in homes)}.")
    if not homes:
        known = [*TOP_LEVEL, *_config_fields(), *(name for cls in SECTIONS.values() for name in _field_names(cls))]
        raise ValueError(f"--set {key}=...: {_unknown(key, known)}")
    return homes[0].split(".")


def _field_names(cls: type) -> list[str]:
    return [item.name for item in fields(cls) if item.init]


def _check_keys(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: {_unknown(str(key), known)}")


def _unknown(key: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
    return f"there is no {key!r}; the nearest name is {nearest[0]!r}."


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    _check_keys(values, _field_names(cls), where)
    if "hub_token" in values:
        raise ValueError(
            f"{where}.hub_token would be written beside the model; log in with `hf auth login`, or set HF_TOKEN."
        )
    hints = typing.get_type_hints(cls)
    typed = {key: _coerce(value, hints[key], f"{where}.{key}") for key, value in values.items()}
    try:
        return cls(**typed)
    except TypeError as error:
        raise ValueError(f"{where}: {str(error).split('__init__() ')[-1]}.") from None


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Fit a YAML value to a field's type, and bend as little as possible.

    YAML 1.1 reads 5e-5 as text; where a number is wanted and text is not, it becomes one. It reads 2024 as a number,
    2024-01-02 as a date and `no` as false; where only text is wanted they become text again.
    """
    allowed = _members(hint)
    takes_text = str in allowed or any(isinstance(member, type) and issubclass(member, str) for member in allowed)
    if isinstance(value, str) and not takes_text and float in allowed:
        with contextlib.suppress(ValueError):
            value = float(value)
    if float in allowed and type(value) is int and int not in allowed:
        value = float(value)
    if takes_text and type(value) in (int, datetime.date) and type(value) not in allowed:
        value = str(value)
    if takes_text and value is False and bool not in allowed and where.endswith("_strategy"):
        value = "no"
    if Any in allowed or type(value) in allowed or (isinstance(value, str) and takes_text):
        return value
    words = [TYPE_WORDS.get(member, getattr(member, "__name__", str(member))) for member in allowed]
    raise ValueError(f"{where}={value!r} is not allowed; use {' or '.join(dict.fromkeys(words))}.")


def _members(hint: Any) -> list[Any]:
    """List the plain types that a type hint admits."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [member for part in typing.get_args(hint) for member in _members(part)]
    return [typing.get_origin(hint) or hint]
