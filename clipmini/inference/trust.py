"""Refuse a model whose files would have code run, or something else fetched, before any library has read them.

Each library has a switch of its own for the code of models; some ask on the terminal, and some versions run what they
should not. So all that a model's JSON files say is looked at here first, whatever reads them later.
"""

import glob
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from modeling_clipmini import ClipMiniConfig

LARGE = ("tokenizer.json", "vocab.json", "merges.json")  # of words alone
MODULES_FILE, OPEN_CLIP_FILE, PROCESSOR_FILE = "modules.json", "open_clip_config.json", "processor_config.json"
ROUTER_FILES = ("router_config.json", "config.json")
# What our own folders say for those who load them by AutoModel; the commands load them by the installed classes.
OWN_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForZeroShotImageClassification", "AutoProcessor")
# Keys that permit code, or name files, weights and models elsewhere.
NEVER = (
    *("trust_remote_code", "checkpoint_path", "use_pretrained_backbone", "configuration_files", "subfolder"),
    *("base_model_name_or_path", "tokenizer_name_or_path"),
)
OTHER_MODELS = ("hf_model_name", "hf_tokenizer_name")  # that open_clip has transformers load
SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")  # timm's, of models with arguments of their own
KERNEL_KEYS = ("attn_implementation", "_attn_implementation")  # with a slash: code from the Hub
STOCK_MODULE = re.compile(r"sentence_transformers(\.\w+)+")
STOCK_ACTIVATION = re.compile(r"(torch\.nn|sentence_transformers)(\.\w+)+")


def refuse_code(name_or_path: str | Path) -> Path:
    """Refuse a model whose configuration names classes, weights or models that its user has not.

    Args:
        name_or_path: a folder or Hub id, of any library.

    Returns:
        The folder that its configuration files are in, here or in the Hub's cache.

    Raises:
        ValueError: a file of it names such a thing (the message says which key of which file), or it is neither a
            folder nor to be had from the Hub.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name_or_path), allow_patterns=["*.json"], ignore_patterns=[*LARGE]))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
            raise ValueError(
                f"{name_or_path} cannot be loaded: it is neither a folder here nor to be had from the Hub: {reason}."
            ) from error
    config = read_json(folder / "config.json")
    is_own = isinstance(config, dict) and config.get("model_type") == ClipMiniConfig.model_type
    for file in sorted(glob.glob("**/*.json", root_dir=folder, recursive=True, include_hidden=True)):
        name = Path(file).name
        for key, value in _walk(read_json(folder / file)) if name not in LARGE else ():
            if _is_refused(file, key, value, is_own):
                shown = json.dumps(value)
                raise ValueError(
                    f"{name_or_path} is refused: in its {file}, {'.'.join(key)} is {shown[:100]}, which would run or "
                    "fetch more than the model's own weights. clipmini runs no code of a model's folder; name a model "
                    "without it."
                )
            if name == OPEN_CLIP_FILE and key and key[-1] in OTHER_MODELS and value:
                refuse_code(str(value))
    return folder


def read_json(file: Path) -> Any:
    """Read a JSON file; None for one that is missing or broken, which is for the library to complain about."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _walk(value: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """List every value of a tree with the keys that lead to it, those of branches too."""
    yield key, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _walk(item, (*key, str(name)))


def _is_refused(file: str, key: tuple[str, ...], value: Any, is_own: bool) -> bool:
    """Tell whether a value of a file permits, or names, what is not in the folder's weights."""
    name, file_name = key[-1] if key else "", Path(file).name
    if not value:
        return False
    if name == "auto_map":
        is_outermost = len(key) == 1 or file_name == PROCESSOR_FILE  # which holds its parts' files
        return not (is_own and is_outermost and isinstance(value, dict) and set(value) <= set(OWN_CLASSES))
    if file_name == MODULES_FILE and len(key) == 2 and name in ("type", "path"):
        path = Path(str(value))
        return not STOCK_MODULE.fullmatch(str(value)) if name == "type" else path.is_absolute() or ".." in path.parts
    if file_name in ROUTER_FILES and "types" in key[:-1] and isinstance(value, str):  # a class for each route
        return not STOCK_MODULE.fullmatch(value)
    if file_name.endswith(".safetensors.index.json") and "weight_map" in key[:-1]:
        return not str(value).endswith(".safetensors")
    if name == "activation_function" and isinstance(value, str):
        return "." in value and not STOCK_ACTIVATION.fullmatch(value)
    if name in KERNEL_KEYS:
        return "/" in str(value)
    return name in NEVER or (isinstance(value, str) and value.lower().startswith(SOURCES))
