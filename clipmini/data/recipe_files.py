"""Recipes as files: found, read, changed, and each section checked against its dataclass."""

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
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from clipmini.data.pairs import DataArguments
from modeling_clipmini import ClipMiniConfig

logger = logging.getLogger(__name__)

TOP_LEVEL = ("model", "model_config", "license", "data", "training", "stages")
DATA_FACTS = ("image_column", "caption_column", "image_root")  # what a recipe knows of its own data alone
TYPE_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
    type(None): "null",
}
DATA_ALONE: Mapping[str, type] = {"data": DataArguments}


def preset_names(kind: str) -> list[str]:
    """List the presets that the package brings: `kind` is "models" or "recipes"."""
    folder = files("clipmini.configuration") / kind
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(name_or_path: str, overrides: Sequence[str], sections: Mapping[str, type]) -> dict[str, Any]:
    """Read a recipe, with changes, and check its sections' names.

    If another source is set, the recipe's columns and its license, which hold for its own data, are left out.

    Args:
        name_or_path: a YAML file, or the name of a recipe that the package brings.
        overrides: "key=value" strings, the key dotted or bare.
        sections: the dataclass of each section that a bare key may belong to.

    Returns:
        The values as YAML has them.

    Raises:
        ValueError: the file or a key is wrong.
    """
    values = read_yaml(find_preset("recipes", name_or_path))
    changed = _overridden(values, overrides, sections)
    source, other = (one["data"].get("source") if _has_data(one) else None for one in (values, changed))
    if source and other and not _is_same(str(source), str(other)):
        facts = {key: values["data"].pop(key) for key in DATA_FACTS if key in values["data"]}
        facts["license"] = values.pop("license", None)
        changed = _overridden(values, overrides, sections)  # what the overrides say of the other data holds
        gone = {key: value for key, value in facts.items() if value and key not in {**changed, **changed["data"]}}
        if gone:
            named = ", ".join(f"{key}: {value}" for key, value in gone.items())
            remedy = "; set license before you push a model of this data" if "license" in gone else ""
            logger.warning("left out, since it holds for %s and not for %s: %s%s", source, other, named, remedy)
    check_keys(changed, TOP_LEVEL, name_or_path)
    return changed


def _overridden(values: dict[str, Any], overrides: Sequence[str], sections: Mapping[str, type]) -> dict[str, Any]:
    values = copy.deepcopy(values)
    for override in overrides:
        _apply_override(values, override, sections)
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
        values = read_recipe(name_or_source, overrides, DATA_ALONE)
        return build_section(DataArguments, check_mapping(values.get("data", {}), "data"), "data")
    data: dict[str, Any] = {"source": name_or_source, "validation_fraction": 0.0, "test_fraction": 0.0}
    for override in overrides:
        values = {"data": data}
        _apply_override(values, override, DATA_ALONE)
        check_keys(values, ("data",), f"--set {override}")
    return build_section(DataArguments, data, "data")


def config_fields() -> list[str]:
    """List the fields of `ClipMiniConfig` other than the towers."""
    names = inspect.signature(ClipMiniConfig.__init__).parameters
    return [name for name in names if name not in ("self", "kwargs", "vision_config", "text_config")]


def find_preset(kind: str, name_or_path: str) -> Any:
    """Find a YAML file, or a preset that the package brings.

    Args:
        kind: "models" or "recipes".
        name_or_path: a file, or a preset's name.

    Returns:
        Something that can be opened.

    Raises:
        ValueError: it is neither.
    """
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


def read_yaml(file: Any) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        file: as `find_preset` returns it.

    Returns:
        The mapping.

    Raises:
        ValueError: it is not YAML, holds no mapping, or a key twice.
    """
    try:
        with file.open(encoding="utf-8") as stream:
            values = yaml.load(stream, Loader=_OnceLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}.") from None
    return check_mapping(values, str(file))


def check_mapping(value: Any, where: str) -> dict[str, Any]:
    """Return a value if it is a mapping.

    Args:
        value: what a YAML file holds.
        where: its place, for the message.

    Returns:
        The value.

    Raises:
        ValueError: it is something else.
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
    if len(path) == 1 and key not in TOP_LEVEL:
        path = [*_home_of(key, stages, sections), key]
    is_stage = path[0] == "stages" and len(path) == 3
    if is_stage and path[1] not in stages:
        raise ValueError(f"--set {key}=...: the recipe has no such stage; it has {', '.join(stages) or 'none'}.")
    if not is_stage and (len(path) > 2 or (len(path) == 2 and path[0] not in (*sections, "model_config"))):
        raise ValueError(f"--set {key}=...: {_unknown(path[0], [*sections, 'model_config'])}")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # the latter of what looks like a date and is none
        value = text
    home = values
    for part in path[:-1]:
        home = check_mapping(home.setdefault(part, {}), part)
    home[path[-1]] = value


def _home_of(key: str, stages: Mapping[str, Any], sections: Mapping[str, type]) -> list[str]:
    """Find the section that a bare key belongs to."""
    homes = [name for name, cls in sections.items() if key in field_names(cls)]
    if key in config_fields():
        homes.append("model_config")
    # A stage's own value would hide that of `training`.
    homes += [f"stages.{name}" for name, changes in stages.items() if isinstance(changes, dict) and key in changes]
    if len(homes) > 1:
        raise ValueError(f"--set {key}=...: say which: {' or '.join(f'{home}.{key}' for home in homes)}.")
    if not homes:
        known = [*TOP_LEVEL, *config_fields(), *(name for cls in sections.values() for name in field_names(cls))]
        raise ValueError(f"--set {key}=...: {_unknown(key, known)}")
    return homes[0].split(".")


def field_names(cls: type) -> list[str]:
    """List the fields of a dataclass that can be set."""
    return [item.name for item in fields(cls) if item.init]


def check_keys(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse a key that is not known, and name the nearest.

    Args:
        values: what was read.
        known: the keys that there are.
        where: the place of the values, for the message.

    Raises:
        ValueError: a key is not known.
    """
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: {_unknown(str(key), known)}")


def _unknown(key: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
    return f"there is no {key!r}; the nearest name is {nearest[0]!r}."


def build_section(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Make a dataclass of a section, its values fitted to the types of the fields.

    Args:
        cls: the dataclass.
        values: the section.
        where: its name, for messages.

    Returns:
        The instance.

    Raises:
        ValueError: a key or a value is wrong; the message says what is allowed.
    """
    check_keys(values, field_names(cls), where)
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
