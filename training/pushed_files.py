"""Which files of a model's folder go to the Hub, and which stop a push."""

import fnmatch
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

import modeling_clipmini
from clipmini.inference.encode import load_model
from clipmini.inference.encoders import weights_sha256

from .folder import CURVES_FILE, HANDLER, MODEL_FOLDER, RECIPE_FILE, RESULTS_FILE
from .model_index import public_name

logger = logging.getLogger(__name__)

EVALUATIONS = f"evaluation*/{RESULTS_FILE}"
# All that is known by its name goes along; anything else is refused rather than left out, lest somebody misses it.
KNOWN_FILES = (
    *("README.md", "LICENSE*", "NOTICE*", ".gitattributes"),
    *("config.json", "model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    *("processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    *("*_clipmini.py", "handler.py", "requirements.txt"),
    *(RESULTS_FILE, CURVES_FILE, EVALUATIONS),
    *("examples/*.jpg", "examples/*.jpeg", "examples/*.png", "examples/*.webp"),
)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
SECRET_NAMES = (".env*", "*token", "*.pem", "*.key", "*secret*", "*credential*", ".netrc", "id_rsa*")
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
TEXTS = (".md", ".json", ".py", ".txt")
# What results hold of single pictures and captions: other people's, and nothing that a figure needs.
OF_SINGLE_INPUTS = ("skipped", "examples", "alike_examples", "rows", "misses")


def list_files(folder: Path) -> dict[str, Path]:
    """List the files of a model's folder by their path in the repository.

    Args:
        folder: as `clipmini train` leaves it.

    Returns:
        The files, sorted by path.

    Raises:
        ValueError: there is no model, or a file that must not be published: a pickle, what looks like a secret, what
            is not known, or a link out of the folder.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json. Name one that training saved.")
    root = folder.resolve()
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()):
        name = path.relative_to(folder).as_posix()
        _check_name(folder, name)
        if not path.resolve().is_relative_to(root):
            raise ValueError(f"{folder} holds a link that leads out of it, {name}; put the file in its place.")
        if path.suffix in TEXTS and TOKEN.search(path.read_bytes()):
            raise ValueError(f"{path} holds what looks like a token of the Hub; take it out, and revoke the token.")
        files[name] = path
    return files


def _check_name(folder: Path, name: str) -> None:
    own = PurePosixPath(name)
    if any(fnmatch.fnmatch(own.name.lower(), pattern) for pattern in SECRET_NAMES):
        raise ValueError(f"{folder} holds {name}, which looks like a secret; take it out of the folder.")
    if own.suffix.lower() in PICKLES:
        raise ValueError(
            f"{folder} holds {name}, which may be a pickle, and a pickle runs code when it is loaded; take it out. "
            "Weights belong in model.safetensors."
        )
    if not any(fnmatch.fnmatch(name, pattern) for pattern in KNOWN_FILES):
        raise ValueError(f"{folder} holds {name}, which is no file of a model; take it out of the folder.")


def drifted_code(folder: Path) -> list[str]:
    """Name the code files that differ from the installed package's, or are there on one side only.

    Args:
        folder: a model's.

    Returns:
        Their names, sorted; none where the folder's code is the package's.
    """
    package = Path(modeling_clipmini.__file__).parent
    installed = {path.name: path for path in package.glob("*_clipmini.py")}
    wanted = set(installed)
    if HANDLER.is_file():
        installed[HANDLER.name] = HANDLER  # it may be missing in a folder, but not differ
    own = {path.name: path for path in folder.glob("*.py")}
    return sorted(
        name
        for name in wanted | own.keys()
        if name not in own or name not in installed or own[name].read_bytes() != installed[name].read_bytes()
    )


def check_weights(folder: Path, *, loads: bool = True) -> None:
    """See that the weights are there, and whole.

    Args:
        folder: a model's.
        loads: whether this package's code can load the model; without it files alone are looked at.

    Raises:
        ValueError: files are missing or damaged, or a weight is NaN or infinite.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no weights: model.safetensors is missing.")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is damaged ({error}); save the model again.") from error
    if loads:
        model, _ = load_model(folder, device="cpu")
        for name, weight in model.state_dict().items():
            if not weight.isfinite().all():
                raise ValueError(f"{folder} has a weight that is not finite ({name}); train it again.")


def run_files(folder: Path) -> dict[str, Path]:
    """Gather what a run left beside its model: figures, and curves.

    Args:
        folder: a model's.

    Returns:
        The files by their path in the repository; none where the folder is not the one in which a run left its model.
    """
    folder = folder.absolute()
    run = folder.parent
    if folder.name != MODEL_FOLDER or not (run / RECIPE_FILE).is_file():
        return {}
    return {name: run / name for name in (CURVES_FILE, RESULTS_FILE) if (run / name).is_file()}


def evaluation_files(folder: Path) -> dict[str, Path]:
    """Gather the results of evaluations of these very weights, from beside the folder and from inside it.

    Args:
        folder: a model's.

    Returns:
        The files by their path in the repository. Those of other weights are left out, with a warning.
    """
    digest, found = weights_sha256(folder), {}
    for place in (folder.absolute().parent, folder):
        for file in sorted(place.glob(EVALUATIONS)):
            try:
                model = json.loads(file.read_bytes())["model"]
                is_own = digest is not None and model["weights_sha256"] == digest
            except (ValueError, KeyError, TypeError):
                is_own = False
            if is_own:
                found[file.relative_to(place).as_posix()] = file
            else:
                logger.warning("%s is left out: it does not say that it is of these weights; evaluate again", file)
    return found


def results_for_others(file: Path) -> bytes:
    """Give results as others may see them: without paths of this machine, and without single pictures and captions.

    Args:
        file: `results.json` of a run or of an evaluation.

    Returns:
        JSON.

    Raises:
        ValueError: it does not say of which data it is.
    """
    try:
        results = json.loads(file.read_bytes())
        source = results["data"]["source"]
    except (ValueError, KeyError, TypeError):
        source = None
    if not source:
        raise ValueError(f'{file} does not say of which data it is; add "data": {{"source": "NAME"}} to it.')
    results = _without_places(results)
    results["data"]["source"] = public_name(str(source))
    return (json.dumps(results, indent=2) + "\n").encode()


def _without_places(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_places(item) for key, item in value.items() if key not in OF_SINGLE_INPUTS}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith((".", "~"))):
        return public_name(value)
    return value
