"""Names of models and data: folders and files here, or ids on the Hub; and what went wrong with them, in a sentence.

Nothing slow is imported here, so that the command can refuse a wrong name at once.
"""

import json
import os
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

MODEL_TYPE = "clipmini"  # in a model's config.json; the class itself takes seconds to import
OPEN_CLIP_PREFIX = "open_clip:"
CONFIG_FILE, SENTENCE_TRANSFORMERS_FILE = "config.json", "modules.json"  # every model folder has one of them
TABLE_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
TOKEN_SUFFIXES = (".txt", ".token")


def is_hub_id(name: str) -> bool:
    """Return whether a name is an id on the Hub, owner/name; what ends like a table is a path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not name.endswith((*TABLE_SUFFIXES, *TOKEN_SUFFIXES, "\n"))


def hub_id(name: str) -> str | None:
    """Return a name if it is a Hub id, or None if it is a path, or the name of something that exists here."""
    return name if is_hub_id(name) and not Path(name).exists() else None


def public_name(name: str) -> str:
    """Return a name that can be published: a Hub id as it is, and only the last part of a path."""
    # Windows paths may have either separator.
    return hub_id(name) or PureWindowsPath(os.path.abspath(name)).name or "data"


def check_name(name: str | Path, allowed: str) -> None:
    """Check that a name is a path that exists, or could be an id on the Hub.

    Args:
        name: of a model or of data; a `Path` is never an id.
        allowed: what to name instead, such as "a model folder".

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(name, (str, Path)) or not str(name).strip():
        raise ValueError(f"{name!r} is not a name. Name {allowed}, or a Hub id like owner/name.")
    if not Path(name).expanduser().exists() and (isinstance(name, Path) or not is_hub_id(name)):
        raise ValueError(f"{name} does not exist. Name {allowed}, or a Hub id like owner/name.")


def check_repository(name: str) -> None:
    """Check that a name could be that of a repository to make on the Hub.

    Raises:
        ValueError: it is not of the form owner/name.
    """
    if not is_hub_id(name):
        raise ValueError(f"{name!r} is not a repository on the Hub; name one as owner/name.")


def expand_home(name: str | Path) -> str:
    """Return the name of a model, with the home folder in place of a "~" at its beginning."""
    return str(Path(name).expanduser()) if str(name).startswith("~") else str(name)


def check_any_model(model: Any) -> None:
    """Check that a name could be that of a model of any library; see `load_encoder`. A model itself passes.

    Raises:
        ValueError: it is neither a model's folder, nor a Hub id, nor one of open_clip's names.
    """
    if hasattr(model, "encode_text") or hasattr(model, "encode_texts") or str(model).startswith(OPEN_CLIP_PREFIX):
        return
    check_name(model, "a model folder")
    folder = Path(model).expanduser()
    if folder.exists() and not any((folder / file).is_file() for file in (CONFIG_FILE, SENTENCE_TRANSFORMERS_FILE)):
        raise ValueError(f"{folder} is not a model folder: it has no config.json. Name one that training saved.")


def check_model(name: str | Path) -> None:
    """Check that a name could be that of a clipmini model, by the `config.json` of a folder.

    Raises:
        ValueError: it is neither a folder with a clipmini model nor a Hub id.
    """
    check_name(name, "a model folder")
    check_any_model(name)
    config_file = Path(name).expanduser() / CONFIG_FILE
    if not config_file.parent.exists():
        return
    try:
        model_type = json.loads(config_file.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError, RecursionError, FileNotFoundError) as error:
        raise ValueError(f"{config_file} is not a JSON object: {error}.") from None
    if model_type != MODEL_TYPE:
        raise ValueError(f"{name} holds a model of type {model_type!r}; a clipmini model is needed.")


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error, without its period: other libraries append paragraphs of advice."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
