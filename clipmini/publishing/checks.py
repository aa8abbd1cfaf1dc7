"""Which files of a model's folder go to the Hub, and which stop a push."""

import fnmatch
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

import modeling_clipmini
from clipmini.data.images import first_sentence
from clipmini.evaluation.naming import public_name
from clipmini.files import CURVES_FILE, MODEL_FOLDER, RECIPE_FILE, RESULTS_FILE, weights_sha256
from clipmini.inference.encode import load_model
from clipmini.inference.trust import refuse_code
from modeling_clipmini import ClipMiniTextModel, ClipMiniVisionModel

from .folder import HANDLER

logger = logging.getLogger(__name__)

EXAMPLES = "examples"
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
    *(f"{EXAMPLES}/*{suffix}" for suffix in (".jpg", ".jpeg", ".png", ".webp")),
)
# Of a run or a tool, and so neither pushed nor a reason to refuse.
SKIPPED_FOLDERS = (".git", ".cache", "checkpoint-*", "runs")
SKIPPED_FILES = (".git", ".DS_Store", "training_args.bin")
SINGLE_TOWERS: Mapping[str, Any] = {tower.__name__: tower for tower in (ClipMiniVisionModel, ClipMiniTextModel)}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
SECRET_NAMES = (".env*", "*token", "*.pem", "*.key", "*secret*", "*credential*", ".netrc", "id_rsa*")
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
TEXTS = (".md", ".json", ".py", ".txt")
# What results hold of single images and captions: other people's, and nothing that a figure needs.
OF_SINGLE_INPUTS = ("skipped", "examples", "alike_examples", "rows", "misses")


def list_files(folder: Path) -> dict[str, Path]:
    """List the files of a model's folder by their path in the repository.

    Args:
        folder: as `clipmini train` leaves it, or as the Hub's cache holds it.

    Returns:
        The files, sorted by path, without those of a run or a tool that stand among them.

    Raises:
        ValueError: there is no model, it names code of its own, or there is a file that must not be published: a
            pickle, what looks like a secret, what is not known, or a link out of the folder.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json. Name one that training saved.")
    refuse_code(folder)
    root = folder.resolve()
    roots = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    files, unknown = {}, []
    for path in sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()):
        name = path.relative_to(folder).as_posix()
        if _is_skipped(name):
            continue
        _check_name(folder, name)
        if not matches(name, KNOWN_FILES):
            unknown.append(name)
            continue
        if not any(path.resolve().is_relative_to(one) for one in roots):
            raise ValueError(f"{folder} holds a link that leads out of it, {name}; put the file in its place.")
        if path.suffix in TEXTS and TOKEN.search(path.read_bytes()):
            raise ValueError(f"{path} holds what looks like a token of the Hub; take it out, and revoke the token.")
        files[name] = path
    if unknown:
        raise ValueError(
            f"{folder} holds what is no file of a model: {', '.join(unknown)}; take it out of the folder."
        )
    return files


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a path fits one of some patterns, in which `*` stands for anything but a slash."""
    parts = name.split("/")
    wanted = [pattern.split("/") for pattern in patterns]
    return any(len(one) == len(parts) and all(map(fnmatch.fnmatchcase, parts, one)) for one in wanted)


def is_replaced(path: str) -> bool:
    """Tell whether a push that does not hold a file of the repository takes it out: what pushes make, and pickles."""
    if matches(path, (".gitattributes", "LICENSE*")) or path.startswith(f"{EXAMPLES}/"):
        return False  # a person may have put them there
    return matches(path, KNOWN_FILES) or PurePosixPath(path).suffix.lower() in PICKLES


def _is_skipped(name: str) -> bool:
    *folders, own = name.split("/")
    return matches(own, SKIPPED_FILES) or any(matches(folder, SKIPPED_FOLDERS) for folder in folders)


def _check_name(folder: Path, name: str) -> None:
    own = PurePosixPath(name)
    if matches(own.name.lower(), SECRET_NAMES):
        raise ValueError(f"{folder} holds {name}, which looks like a secret; take it out of the folder.")
    if own.suffix.lower() in PICKLES:
        raise ValueError(
            f"{folder} holds {name}, which may be a pickle, and a pickle runs code when it is loaded; take it out. "
            "Weights belong in model.safetensors."
        )


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
        for name, weight in _load_any(folder).state_dict().items():
            if not weight.isfinite().all():
                raise ValueError(f"{folder} has a weight that is not finite ({name}); train it again.")


def _load_any(folder: Path) -> PreTrainedModel:
    """Load the model or the single tower that a folder holds."""
    try:
        kind = json.loads((folder / "config.json").read_bytes())["architectures"][0]
    except (ValueError, KeyError, TypeError, IndexError):
        kind = None  # whatever is wrong, the whole model's loader says it
    if kind not in SINGLE_TOWERS:
        return load_model(folder, device="cpu")[0]
    try:
        loaded: Any = SINGLE_TOWERS[kind].from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # libraries raise nearly anything for a damaged file
        raise ValueError(f"{folder} is incomplete or damaged: {first_sentence(error)}.") from error
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"{folder} lacks weights, among them {sorted(info['missing_keys'])[0]!r}.")
    return model


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
    """Give results as others may see them: without paths of this machine, and without single images and captions.

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
