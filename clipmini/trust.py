"""Refuse models whose files would run code or fetch something else, before any library has read them.

Each library has its own switch for a model's code; some ask on the terminal, and some versions run what they should
not. So everything that a model's JSON files name is checked here first, whichever library reads them later.
"""

import glob
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from clipmini.names import (
    CONFIG_FILE,
    MODEL_TYPE,
    OPEN_CLIP_FILE,
    SENTENCE_TRANSFORMERS_FILE,
    first_sentence,
)

VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.json")  # large, and of words alone
PROCESSOR_FILE = "processor_config.json"
ROUTER_FILES = ("router_config.json", CONFIG_FILE)
# What clipmini's folders name for AutoModel and its kin; clipmini's commands load them by the installed classes.
CLIPMINI_AUTO_CLASSES = {"AutoConfig", "AutoModel", "AutoModelForZeroShotImageClassification", "AutoProcessor"}
# Keys that permit code, or name files, weights and models elsewhere.
REFUSED_KEYS = (
    *("trust_remote_code", "checkpoint_path", "use_pretrained_backbone", "configuration_files", "subfolder"),
    *("base_model_name_or_path", "tokenizer_name_or_path"),
)
TRANSFORMERS_MODEL_KEYS = ("hf_model_name", "hf_tokenizer_name")  # models that open_clip loads through transformers
TIMM_SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")  # timm's prefixes of models that bring their own arguments
KERNEL_KEYS = ("attn_implementation", "_attn_implementation")  # a value with a slash is code from the Hub
STOCK_MODULE = re.compile(r"sentence_transformers(\.\w+)+")
STOCK_ACTIVATION = re.compile(r"(torch\.nn|sentence_transformers)(\.\w+)+")


def refuse_code(name_or_path: str | Path) -> Path:
    """Raise if a model's configuration names classes, weights or models beyond its own weights.

    Args:
        name_or_path: a folder or Hub id, of any library's model.

    Returns:
        The folder with its configuration files, here or in the Hub's cache.

    Raises:
        ValueError: a file names such a thing (the message says which key of which file), or the model is neither a
            folder here nor available from the Hub.
    """
    folder = fetch(name_or_path, ["*.json"], VOCABULARY_FILES)
    config = read_json(folder / CONFIG_FILE)
    is_clipmini = isinstance(config, dict) and config.get("model_type") == MODEL_TYPE
    for file in sorted(glob.glob("**/*.json", root_dir=folder, recursive=True, include_hidden=True)):
        name = Path(file).name
        if name in VOCABULARY_FILES:
            continue
        for keys, value in _walk(read_json(folder / file)):
            if _is_refused(file, keys, value, is_clipmini):
                raise ValueError(
                    f"{name_or_path} is refused: in its {file}, {'.'.join(keys)} is {json.dumps(value)[:100]}, which "
                    "would run or fetch more than the model's own weights. clipmini runs no code of a model's folder; "
                    "name a model without it."
                )
            if name == OPEN_CLIP_FILE and keys and keys[-1] in TRANSFORMERS_MODEL_KEYS and value:
                refuse_code(str(value))
    return folder


def fetch(name_or_path: str | Path, wanted: Iterable[str], ignored: Iterable[str] = ()) -> Path:
    """Return the folder of a model: the one here, or one in the Hub's cache with the wanted files.

    Args:
        name_or_path: a folder or Hub id.
        wanted: patterns of files to fetch from the Hub.
        ignored: patterns of files among these not to fetch.

    Raises:
        ValueError: the model is neither a folder here nor available from the Hub.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        patterns = list(wanted)
        return Path(snapshot_download(str(name_or_path), allow_patterns=patterns, ignore_patterns=list(ignored)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name_or_path} cannot be fetched: it is neither a folder here nor available from the Hub: "
            f"{first_sentence(error)}."
        ) from error


def read_json(file: Path) -> Any:
    """Return what a JSON file holds, or None for a missing or broken file, which its library will report."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _walk(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each value of a tree, including its dicts and lists, with the keys that lead to it."""
    yield keys, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _walk(item, (*keys, str(key)))


def _is_refused(file: str, keys: tuple[str, ...], value: Any, is_clipmini: bool) -> bool:
    """Return whether a value permits or names anything beyond the weights in the folder."""
    if not value:
        return False
    key, file_name = keys[-1] if keys else "", Path(file).name
    if key == "auto_map":
        is_outermost = len(keys) == 1 or file_name == PROCESSOR_FILE  # which includes the files of its parts
        return not (is_clipmini and is_outermost and isinstance(value, dict) and set(value) <= CLIPMINI_AUTO_CLASSES)
    if file_name == SENTENCE_TRANSFORMERS_FILE and len(keys) == 2 and key == "type":
        return not STOCK_MODULE.fullmatch(str(value))
    if file_name == SENTENCE_TRANSFORMERS_FILE and len(keys) == 2 and key == "path":
        return Path(str(value)).is_absolute() or ".." in Path(str(value)).parts
    if file_name in ROUTER_FILES and "types" in keys[:-1] and isinstance(value, str):  # the class of each route
        return not STOCK_MODULE.fullmatch(value)
    if file_name.endswith(".safetensors.index.json") and "weight_map" in keys[:-1]:
        return not str(value).endswith(".safetensors")
    if key == "activation_function" and isinstance(value, str):
        return "." in value and not STOCK_ACTIVATION.fullmatch(value)
    if key in KERNEL_KEYS:
        return "/" in str(value)
    return key in REFUSED_KEYS or (isinstance(value, str) and value.lower().startswith(TIMM_SCHEMES))
