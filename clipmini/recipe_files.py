"""Find, read and change recipe files, and check their names; then build a section's dataclass, with its types.

Nothing slow is imported here, so that a wrong recipe is refused at once: the names that a section may hold are read
from the source of its classes.
"""

import contextlib
import copy
import datetime
import difflib
import functools
import logging
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from clipmini.declared import Option, declared_options
from clipmini.files import RECIPE_FILE
from clipmini.names import OFFLINE_PREFIX, check_utf8, expand, hub_id, locate, public_name

logger = logging.getLogger(__name__)

# The sections whose keys need no prefix, and the classes that declare their keys, the nearest first.
SECTIONS = {
    "data": (("clipmini.data.pairs", "DataArguments"),),
    "model_config": (("modeling_clipmini.configuration_clipmini", "ClipMiniConfig"),),
    "training": (
        ("clipmini.training.arguments", "ClipMiniTrainingArguments"),
        ("transformers.training_args", "TrainingArguments"),
    ),
}
RECIPE_KEYS = {  # beside the sections
    "model": Option("", "A preset, a YAML file like one, or the folder or Hub id of a model to train further."),
    "license": Option("null", "License of the trained model, as the Hub writes it; a push needs it."),
    "keep": Option("null", "Data on which the model must not get worse, measured before and after: pairs or classes."),
    "stages": Option("{}", "Changes to `training` by name of a stage, one after the other."),
}
TEXTS = {  # of the keys beside the sections: what each may be, and whether a recipe needs it
    "model": ("a preset, a YAML file or a model", True),
    "license": ("a name such as apache-2.0", False),
    "keep": ("a folder, a table, a Hub id or a recipe", False),
}
TOP_LEVEL = (*RECIPE_KEYS, *SECTIONS)
TOWERS = ("vision_config", "side_vision_config", "text_config")  # of the config; a recipe's `model` has them
SOURCE_KEYS = (
    "image_column",
    "caption_column",
    "image_root",
    "split_column",
    "config_name",
)  # of `data`; like `license`, for one source only
FINE_TUNE = "fine-tune"  # the recipe for data that are named in place of one
# One folder, one seed and one repository serve a whole run.
NOT_BY_STAGE = (
    *("output_dir", "seed", "data_seed"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"),
)
MOVED_KEYS = {
    "license": "`license` at the top of the recipe, which states the model's",
    "lora_rank": "lora: {parts: ..., rank: ...}",
    "hard_negative_weight": "hard_negatives: {weight: ..., start: ...}",
    "hard_negative_start": "hard_negatives: {weight: ..., start: ...}",
    "distillation_weight": "teacher: {file: ..., weight: ...}",
    "feature_cache_dir": "the environment variable CLIPMINI_CACHE",
    "check_images": "nothing instead: every image is checked once, and what was found is kept",
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


@functools.cache
def section_options(section: str) -> list[dict[str, Option]]:
    """Return the options of a section of a recipe, class by class, in the order of `SECTIONS`."""
    declared = [declared_options(*place) for place in SECTIONS[section]]
    seen: set[str] = set(TOWERS)
    for options in declared:
        for name in seen & options.keys():
            del options[name]
        seen |= options.keys()
    return declared


def section_keys(section: str) -> list[str]:
    """List the keys of a section of a recipe."""
    return [name for options in section_options(section) for name in options]


def preset_names(kind: str) -> list[str]:
    """List the presets in the package; `kind` is "models", "recipes" or "templates"."""
    folder = files("clipmini.configuration") / kind
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Parse changes to a recipe as the command line has them.

    Args:
        texts: "key=value" strings; the value is YAML.

    Raises:
        ValueError: a text has no key or no "=".
    """
    changes = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ValueError(f"--set {text!r} is not of the form key=value.")
        if re.search(r"(^|\s)#", value) and value.lstrip()[:1] not in tuple("\"'[{"):
            changes[key] = value  # YAML would take "Photos #1" for "Photos" and a comment
            continue
        try:
            changes[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: it looks like a date, but is not one
            changes[key] = value
    return changes


def read_recipe(name_or_path: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Read a recipe, change it, and check all names in it.

    Where a change sets another source, the recipe's license and columns, which hold for its own data, are dropped.

    Args:
        name_or_path: a YAML file, or the name of a recipe in the package; or a source of pairs, with which the model
            that `changes` name is trained further, by the recipe `FINE_TUNE`.
        changes: values by key. A key is dotted ("training.learning_rate", "stages.heads.learning_rate", "lora.rank")
            or, if only one section has it, bare ("learning_rate"). A mapping for a section changes the keys in it.

    Returns:
        The values as read from YAML, and `training.output_dir`; their types are not yet checked.

    Raises:
        ValueError: the file or a name is wrong; the message says what is allowed.
    """
    name_or_path, changes = _choose_recipe(name_or_path, changes)
    values = _read(name_or_path, changes)
    values.setdefault("training", {})
    for section in SECTIONS:
        check_keys(check_mapping(values.get(section, {}), section), section_keys(section), section)
    values["training"].setdefault("output_dir", f"runs/{Path(name_or_path).stem}")
    if not values["training"]["output_dir"]:
        raise ValueError("training.output_dir is empty; set it to a folder.")
    _check_source(values.get("data", {}), name_or_path)
    for key, (example, is_needed) in TEXTS.items():
        value = values.get(key)
        if not isinstance(value, str) and (is_needed or value is not None):
            raise ValueError(f"{name_or_path}: {key}={value!r} is not allowed; use {example}.")
    find_model(values["model"])
    for name, stage in check_mapping(values.get("stages", {}), "stages").items():
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", str(name)) or name == "model":
            raise ValueError(
                f"stages: {name!r} cannot be the folder name of a stage; use lower-case letters, digits, - and _, "
                "but not 'model'."
            )
        where = f"stages.{name}"
        check_keys(check_mapping(stage, where), section_keys("training"), where)
        for key in stage:
            if key in NOT_BY_STAGE:
                raise ValueError(f"{where}.{key}: one value serves all stages; set training.{key}.")
    return values


def read_data_section(name_or_source: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Read the data section of a recipe, or make one for a source of pairs.

    Args:
        name_or_source: a recipe; or a source of pairs, which is not split.
        changes: values by key of the section, with or without "data." before it.

    Returns:
        The section's values; their types are not yet checked.

    Raises:
        ValueError: the file or a name is wrong.
    """
    changes = {f"data.{key.removeprefix('data.')}": value for key, value in changes.items()}
    if is_recipe(name_or_source):
        # Not the whole recipe, whose training may need a GPU that is not here.
        values = _read(name_or_source, changes)
    else:
        data = {"source": name_or_source, "validation_fraction": 0.0, "test_fraction": 0.0}
        values = _change({"data": data}, changes)
    data = check_mapping(values.get("data", {}), "data")
    if Path(name_or_source).name == RECIPE_FILE:  # an earlier version may have written keys that are gone
        data = {key: value for key, value in data.items() if key in section_keys("data")}
    check_keys(data, section_keys("data"), "data")
    _check_source(data, name_or_source)
    return data


def is_recipe(name: str) -> bool:
    """Return whether a name is a recipe's rather than a source's of data."""
    return name in preset_names("recipes") or name.endswith((".yaml", ".yml"))


def _choose_recipe(name: str, changes: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return a recipe and changes to it: where data are named in place of a recipe, `FINE_TUNE` with these data.

    Raises:
        ValueError: data are named, and no saved model to start from.
    """
    if is_recipe(name):
        return name, changes
    model = changes.get("model")
    if model is None or find_model(os.fspath(model)) is not None:
        raise ValueError(
            f"{name} is not a recipe ({', '.join(preset_names('recipes'))}, or a YAML file). If it is data: "
            f"`clipmini train demo --source {name}` trains a new model on them, and `clipmini train {name} --model "
            "FOLDER`, or a Hub id, trains that model further."
        )
    return FINE_TUNE, {**changes, "data.source": name}


def _check_source(data: Mapping[str, Any], recipe: str) -> None:
    if "source" not in data:
        raise ValueError(
            f"data.source is missing: {recipe} names no data. Add --set source=FOLDER; "
            "a table or a Hub id will do too."
        )
    source = data["source"]
    if not isinstance(source, (str, int, datetime.date)) or isinstance(source, bool):  # YAML reads 2024 as a number
        raise ValueError(f"data.source={source!r} is not allowed; use text.")
    if not str(source).strip():
        raise ValueError("data.source is empty; set it to a folder, a table or a Hub id.")


def check_start(values: Mapping[str, Any], stage: str | None = None) -> None:
    """Check that what a recipe would start with could exist: its data, and the stage that is wanted.

    Raises:
        ValueError: the source, or what to keep, is neither a path that exists nor a Hub id, or there is no such stage.
    """
    check_stage(stage, values.get("stages", {}))
    locate(str(values["data"]["source"]), "a folder or a table", "dataset")
    if values.get("keep") and not is_recipe(values["keep"]):
        locate(values["keep"], "a folder, a table or a recipe", "dataset")


def check_origin(values: Mapping[str, Any]) -> None:
    """Check that what a recipe's model is made of is here, or can be had from the Hub.

    Raises:
        ValueError: a tower, or the model to train further, is not; `locate` says why.
    """
    file = find_model(values["model"])
    preset = {"vision": values["model"]} if file is None else read_yaml(file)
    for tower in map(preset.get, ("vision", "side_vision", "text")):
        if preset.get("pretrained", True) and isinstance(tower, str) and not tower.startswith(OFFLINE_PREFIX):
            locate(tower, "a model folder")


def check_stage(stage: str | None, stages: Collection[str]) -> None:
    """Raise a `ValueError` if a stage is wanted that a recipe does not have."""
    if stage is not None and stage not in stages:
        raise ValueError(f"The recipe has no stage {stage!r}; it has {', '.join(stages) or 'none'}.")


def _read(name_or_path: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Read a recipe and change it; only the names at its top are checked."""
    values = read_yaml(find_preset("recipes", name_or_path))
    changed = _change(values, changes)
    source, new_source = _source_in(values), _source_in(changed)
    if source and new_source and not is_same_source(source, new_source):
        facts = {key: values["data"].pop(key) for key in SOURCE_KEYS if key in values["data"]}
        facts["license"] = values.pop("license", None)
        changed = _change(values, changes)  # keeps what the changes say about the new source
        dropped = {key: value for key, value in facts.items() if value and key not in {**changed, **changed["data"]}}
        if dropped:
            listed = ", ".join(f"{key}: {value}" for key, value in dropped.items())
            remedy = "; set license before you push a model of this data" if "license" in dropped else ""
            logger.warning("left out, since it holds for %s and not for %s: %s%s", source, new_source, listed, remedy)
    check_keys(changed, TOP_LEVEL, name_or_path)
    return changed


def _change(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a recipe's values with changes applied."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        _set(values, key, value)
    return values


def _source_in(values: Mapping[str, Any]) -> str:
    data = values.get("data")
    return str(data.get("source") or "") if isinstance(data, dict) else ""


def is_same_source(source: str, other: str) -> bool:
    """Return whether two sources of data are one: the same name, or the same file or folder."""
    paths = expand(source), expand(other)
    return source == other or (all(map(os.path.exists, paths)) and os.path.samefile(*paths))


def find_preset(kind: str, name_or_path: str) -> Any:
    """Find a YAML file or a preset, as a path or a resource of the package; `kind` is as in `preset_names`.

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


def find_model(name: str) -> Any:
    """Find the preset that a recipe's `model` names, as `find_preset` does; None if it names a saved model.

    Raises:
        ValueError: it names neither.
    """
    if name in preset_names("models") or name.endswith((".yaml", ".yml")):
        return find_preset("models", name)
    if not Path(expand(name)).exists() and hub_id(name) is None:
        known = ", ".join(preset_names("models"))
        raise ValueError(f"model={name!r} is neither a preset ({known}) nor a YAML file, a folder or a Hub id.")
    return None


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
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
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


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted or bare key; of a section, a mapping sets the keys in it."""
    path = key.split(".")
    if isinstance(value, Mapping) and (key in SECTIONS or (path[0] == "stages" and len(path) <= 2)):
        for name, item in value.items():
            _set(values, f"{key}.{name}", item)
        return
    stages = check_mapping(values.get("stages", {}), "stages")
    if path[0] not in TOP_LEVEL:  # a bare key, which may have keys of its own: "lora.rank"
        path = [*_section_of(path[0], stages), *path]
    is_stage = path[0] == "stages" and len(path) > 2
    if is_stage and path[1] not in stages:
        raise ValueError(f"{key}: the recipe has no such stage; it has {', '.join(stages) or 'none'}.")
    below = path[2:] if is_stage else path[1:]
    if len(below) > 2 or (below and not is_stage and path[0] not in SECTIONS):
        raise ValueError(f"{key} has too many parts; write section.key, or key.part of a key that has parts.")
    section = values
    for part in path[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = check_mapping(section[part], part)
    section[path[-1]] = os.fspath(value) if isinstance(value, os.PathLike) else value
    check_utf8(f"{key}={section[path[-1]]}")


def _section_of(key: str, stages: Mapping[str, Any]) -> list[str]:
    """Find the section that a bare key belongs to, as parts of its dotted name."""
    found = [name for name in SECTIONS if key in section_keys(name)]
    # A stage that sets the key hides the value in `training`.
    found += [f"stages.{name}" for name, changes in stages.items() if isinstance(changes, dict) and key in changes]
    if len(found) > 1:
        choices = " or ".join(f"{section}.{key}" for section in found)
        raise ValueError(f"{key} is ambiguous; use {choices}.")
    if not found:
        raise ValueError(
            _unknown(key, [*TOP_LEVEL, *(name for section in SECTIONS for name in section_keys(section))])
        )
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


def publishable_recipe(values: Mapping[str, Any]) -> str:
    """Return a recipe as YAML without private paths: only their last parts, and nothing that concerns one machine."""

    def shorten(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: shorten(item) for key, item in value.items() if key not in ("output_dir", "strict")}
        if isinstance(value, str) and ("/" in value or "\\" in value):
            return public_name(value)
        return value

    return yaml.safe_dump(shorten(values), sort_keys=False, allow_unicode=True)
