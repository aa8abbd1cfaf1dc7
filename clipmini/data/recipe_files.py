"""Find, read and change recipe files, and check each section against its dataclass."""

import contextlib
import copy
import datetime
import difflib
import inspect
import logging
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from clipmini.data.pairs import DataArguments
from clipmini.files import RECIPE_FILE
from modeling_clipmini import ClipMiniConfig

logger = logging.getLogger(__name__)

TOP_LEVEL = ("model", "model_config", "license", "data", "training", "stages")
SOURCE_KEYS = ("image_column", "caption_column", "image_root")  # of `data`; like `license`, for one source only
MOVED_KEYS = {
    "license": "`license` at the top of the recipe, which states the model's",
    "lora_rank": "lora: {parts: ..., rank: ...}",
    "hard_negative_weight": "hard_negatives: {weight: ..., start: ...}",
    "hard_negative_start": "hard_negatives: {weight: ..., start: ...}",
    "distillation_weight": "teacher: {file: ..., weight: ...}",
    "feature_cache_dir": "the environment variable CLIPMINI_CACHE",
}
TYPE_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
    type(None): "null",
}
DATA_ONLY: Mapping[str, type] = {"data": DataArguments}


def preset_names(kind: str) -> list[str]:
    """List the presets in the package; `kind` is "models" or "recipes"."""
    folder = files("clipmini.configuration") / kind
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(name_or_path: str, overrides: Sequence[str], sections: Mapping[str, type]) -> dict[str, Any]:
    """Read a recipe, apply overrides, and check the names of its sections.

    Where an override sets another source, the recipe's license and columns, which hold for its own data, are dropped.

    Args:
        name_or_path: a YAML file, or the name of a recipe in the package.
        overrides: "key=value" strings; the key may be dotted or bare.
        sections: the dataclass of each section that a bare key may belong to.

    Returns:
        The values as read from YAML, not yet checked.

    Raises:
        ValueError: the file or a key is wrong.
    """
    values = read_yaml(find_preset("recipes", name_or_path))
    changed = _override(values, overrides, sections)
    source, new_source = _source_in(values), _source_in(changed)
    if source and new_source and not _is_same(source, new_source):
        facts = {key: values["data"].pop(key) for key in SOURCE_KEYS if key in values["data"]}
        facts["license"] = values.pop("license", None)
        changed = _override(values, overrides, sections)  # keeps what the overrides say about the new source
        dropped = {key: value for key, value in facts.items() if value and key not in {**changed, **changed["data"]}}
        if dropped:
            listed = ", ".join(f"{key}: {value}" for key, value in dropped.items())
            remedy = "; set license before you push a model of this data" if "license" in dropped else ""
            logger.warning("left out, since it holds for %s and not for %s: %s%s", source, new_source, listed, remedy)
    check_keys(changed, TOP_LEVEL, name_or_path)
    return changed


def _override(values: dict[str, Any], overrides: Sequence[str], sections: Mapping[str, type]) -> dict[str, Any]:
    """Return a copy of a recipe's values with overrides applied."""
    values = copy.deepcopy(values)
    for override in overrides:
        _apply_override(values, override, sections)
    return values


def _source_in(values: Mapping[str, Any]) -> str:
    data = values.get("data")
    return str(data.get("source") or "") if isinstance(data, dict) else ""


def _is_same(source: str, other: str) -> bool:
    return source == other or (os.path.exists(source) and os.path.exists(other) and os.path.samefile(source, other))


def load_data_arguments(name_or_source: str, overrides: Sequence[str] = ()) -> DataArguments:
    """Read the data section of a recipe, or make one for a source of pairs.

    Args:
        name_or_source: a recipe; or a source of pairs, which is not split.
        overrides: "key=value" strings, as in `load_recipe`; for a source, with keys of `DataArguments`.

    Returns:
        The arguments.

    Raises:
        ValueError: a file, a key or a value is wrong.
    """
    if name_or_source in preset_names("recipes") or name_or_source.endswith((".yaml", ".yml")):
        # Not the whole recipe, whose training may need a GPU that is not here.
        values = read_recipe(name_or_source, overrides, DATA_ONLY)
    else:
        data = {"source": name_or_source, "validation_fraction": 0.0, "test_fraction": 0.0}
        values = _override({"data": data}, overrides, DATA_ONLY)
        check_keys(values, ("data",), f"--set {' '.join(overrides)}")
    data = check_mapping(values.get("data", {}), "data")
    if Path(name_or_source).name == RECIPE_FILE:  # an earlier version may have written keys that are gone
        data = {key: value for key, value in data.items() if key in field_names(DataArguments)}
    return build_section(DataArguments, data, "data")


def config_fields() -> list[str]:
    """List the fields of `ClipMiniConfig`, without the towers' configs."""
    names = inspect.signature(ClipMiniConfig.__init__).parameters
    return [name for name in names if name not in ("self", "kwargs", "vision_config", "text_config")]


def find_preset(kind: str, name_or_path: str) -> Any:
    """Find a YAML file or a preset, as a path or a resource of the package; `kind` is "models" or "recipes".

    Raises:
        ValueError: there is no such file or preset.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    if name_or_path in preset_names(kind):
        return files("clipmini.configuration") / kind / f"{name_or_path}.yaml"
    raise ValueError(
        f"{name_or_path} is neither a file nor among the {kind} in clipmini: {', '.join(preset_names(kind))}."
    )


class _OnceLoader(yaml.SafeLoader):
    """A `SafeLoader` that raises on equal keys in one mapping, instead of silently keeping the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines:
                file = node.start_mark.name
                raise ValueError(f"{file}: {name!r} is in line {lines[name]} and again in line {line}; keep one.")
            lines[name] = line
        return node


def read_yaml(file: Any) -> dict[str, Any]:
    """Read a mapping from a YAML file, as returned by `find_preset`.

    Raises:
        ValueError: the file is not YAML or not a mapping, or has a key twice.
    """
    try:
        with file.open(encoding="utf-8") as stream:
            values = yaml.load(stream, Loader=_OnceLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}.") from None
    return check_mapping(values, str(file))


def check_mapping(value: Any, where: str) -> dict[str, Any]:
    """Return a value from a YAML file if it is a mapping.

    Raises:
        ValueError: it is not; the message begins with `where`, its key or file.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold `key: value` lines, not {type(value).__name__}.")
    return value


def _apply_override(values: dict[str, Any], override: str, sections: Mapping[str, type]) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"--set {override!r} is not of the form key=value.")
    path = key.split(".")
    stages = check_mapping(values.get("stages", {}), "stages")
    if path[0] not in (*TOP_LEVEL, *sections):  # a bare key, which may have keys of its own: "lora.rank"
        path = [*_section_of(path[0], stages, sections), *path]
    is_stage = path[0] == "stages" and len(path) > 2
    if is_stage and path[1] not in stages:
        raise ValueError(f"--set {key}=...: the recipe has no such stage; it has {', '.join(stages) or 'none'}.")
    below = path[2:] if is_stage else path[1:]
    if len(below) > 2 or (below and not is_stage and path[0] not in (*sections, "model_config")):
        raise ValueError(f"--set {key}=...: {_unknown(path[0], [*sections, 'model_config'])}")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: it looks like a date, but is not one
        value = text
    section = values
    for part in path[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = check_mapping(section[part], part)
    section[path[-1]] = value


def _section_of(key: str, stages: Mapping[str, Any], sections: Mapping[str, type]) -> list[str]:
    """Find the section that a bare key belongs to, as parts of its dotted name."""
    found = [name for name, cls in sections.items() if key in field_names(cls)]
    if key in config_fields():
        found.append("model_config")
    # A stage that sets the key hides the value in `training`.
    found += [f"stages.{name}" for name, changes in stages.items() if isinstance(changes, dict) and key in changes]
    if len(found) > 1:
        choices = " or ".join(f"{section}.{key}" for section in found)
        raise ValueError(f"--set {key}=... is ambiguous; use {choices}.")
    if not found:
        known = [*TOP_LEVEL, *config_fields(), *(name for cls in sections.values() for name in field_names(cls))]
        raise ValueError(f"--set {key}=...: {_unknown(key, known)}")
    return found[0].split(".")


def field_names(cls: type) -> list[str]:
    """List the fields of a dataclass that can be set."""
    return [item.name for item in fields(cls) if item.init]


def check_keys(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Check that all keys of a mapping are known.

    Raises:
        ValueError: a key is not; the message begins with `where`, the section or file, and has the nearest known key.
    """
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: {_unknown(str(key), known)}")


def _unknown(key: str, known: Iterable[str]) -> str:
    if key in MOVED_KEYS:
        return f"there is no {key!r} any more; set {MOVED_KEYS[key]}."
    nearest = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
    return f"there is no {key!r}; the nearest name is {nearest[0]!r}."


def build_section(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Build a dataclass from a section, converting its values to the types of the fields.

    Raises:
        ValueError: a key or a value is wrong; the message begins with `where`, the section, and says what is allowed.
    """
    check_keys(values, field_names(cls), where)
    if "hub_token" in values:
        raise ValueError(
            f"{where}.hub_token would be saved with the model; log in with `hf auth login` or set HF_TOKEN instead."
        )
    for item in fields(cls):
        if item.init and item.default is MISSING and item.default_factory is MISSING and item.name not in values:
            raise ValueError(f"{where}.{item.name} is missing; set it.")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _coerce(value, hints[key], f"{where}.{key}") for key, value in values.items()})


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Convert a YAML value to a field's type where YAML 1.1 misreads it, and raise on any other type.

    It reads 5e-5 as text, which becomes a number where the field takes numbers and no text. It reads 2024 as a number,
    2024-01-02 as a date and `no` as false; where the field takes text and not these, the first two become text again,
    and `no` becomes a strategy's "no".
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
    """List the plain types that a type hint allows."""
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return [typing.get_origin(member) or member for member in (typing.get_args(hint) if is_union else (hint,))]
