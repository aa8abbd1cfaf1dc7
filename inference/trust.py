"""Refuse a model whose files would have code run, or something else fetched, before any library has read them.

Each library has a switch of its own for the code of models; some ask on the terminal, and some versions run what they
should not. So what a model's configuration files say is looked at here first, and no question is asked.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers.utils import cached_file

from modeling_clipmini import ClipMiniConfig

MODULES_FILE, OPEN_CLIP_FILE = "modules.json", "open_clip_config.json"
CONFIG_FILES = (
    *("config.json", "adapter_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer_config.json", "router_config.json", OPEN_CLIP_FILE),
)
# What our own folders say for those who load them by AutoModel; the commands load them by the installed classes.
OWN_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForZeroShotImageClassification", "AutoProcessor")
# Names of other models in open_clip's configuration, which transformers loads.
OTHERS = ("hf_model_name", "hf_tokenizer_name")
NEVER = ("trust_remote_code", "checkpoint_path", "base_model_name_or_path")
SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")  # timm's, of models with arguments of their own
KERNEL_KEYS = ("attn_implementation", "_attn_implementation")  # with a slash: code from the Hub
STOCK_MODULE = re.compile(r"sentence_transformers(\.\w+)+")
STOCK_ACTIVATION = re.compile(r"torch\.nn(\.\w+)+")


class UntrustedModelError(ValueError):
    """A model's files would have code run, or something else fetched."""


def refuse_code(name_or_path: str | Path) -> None:
    """Refuse a model whose configuration names classes, weights or models that its user has not.

    Args:
        name_or_path: a folder or Hub id, of any library.

    Raises:
        UntrustedModelError: a file of it names such a thing; the message says which key of which file.
        OSError: the Hub cannot be reached.
    """
    config = _read(name_or_path, "config.json")
    is_own = isinstance(config, dict) and config.get("model_type") == ClipMiniConfig.model_type
    modules = _read(name_or_path, MODULES_FILE)
    folders = [""]
    for index, module in enumerate(modules if isinstance(modules, list) else []):
        kind, folder = (str(module.get(key, "")) if isinstance(module, dict) else "" for key in ("type", "path"))
        if not STOCK_MODULE.fullmatch(kind):
            raise _refusal(name_or_path, MODULES_FILE, f"{index}.type", kind)
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise _refusal(name_or_path, MODULES_FILE, f"{index}.path", folder)
        folders.append(folder)
    for folder in dict.fromkeys(folders):
        for file in CONFIG_FILES:
            path = (Path(folder) / file).as_posix()
            for key, value in _walk(_read(name_or_path, path)):
                if _is_refused(key, value, is_own):
                    raise _refusal(name_or_path, path, ".".join(key), value)
                if file == OPEN_CLIP_FILE and key and key[-1] in OTHERS and value:
                    refuse_code(str(value))


def _read(name_or_path: str | Path, file: str) -> Any:
    """Read a configuration file; what is missing or broken says nothing, and is for the library to complain about."""
    path = cached_file(
        str(name_or_path),
        file,
        _raise_exceptions_for_missing_entries=False,
        # Offline, what is not in the cache cannot be loaded later either.
        _raise_exceptions_for_connection_errors=not constants.HF_HUB_OFFLINE,
    )
    try:
        return json.loads(Path(path).read_text(encoding="utf-8")) if path else None
    except (ValueError, RecursionError):
        return None


def _walk(value: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """List every value of a tree with the keys that lead to it, those of branches too."""
    yield key, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _walk(item, (*key, str(name)))


def _is_refused(key: tuple[str, ...], value: Any, is_own: bool) -> bool:
    name = key[-1] if key else ""
    if name == "auto_map":
        return not (is_own and isinstance(value, dict) and set(value) <= set(OWN_CLASSES))
    if "types" in key[:-1] and isinstance(value, str):  # of a router: a class for each route
        return not STOCK_MODULE.fullmatch(value)
    if name == "activation_function" and isinstance(value, str):
        return "." in value and not STOCK_ACTIVATION.fullmatch(value)
    if name in KERNEL_KEYS:
        return "/" in str(value)
    return (name in NEVER and bool(value)) or (isinstance(value, str) and value.lower().startswith(SOURCES))


def _refusal(name_or_path: str | Path, file: str, key: str, value: Any) -> UntrustedModelError:
    shown = json.dumps(value)
    return UntrustedModelError(
        f"{name_or_path} is refused: in its {file}, {key} is {shown[:100]}, which would run or fetch more than the "
        "model's own weights. clipmini runs no code of a model's folder; name a model without it."
    )
