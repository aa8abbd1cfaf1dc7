"""Which files of a model's folder go to the Hub, and which stop a push."""

import filecmp
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

import modeling_clipmini
from clipmini.files import BANK_FILE, CURVES_FILE, RESULTS_FILE, SAMPLES_FILE, TEMPORARY, run_of, weights_sha256
from clipmini.inference.embed import load_model
from clipmini.names import MODEL_TYPE, ONNX_FOLDER, as_command, first_sentence, public_name
from clipmini.trust import read_json, refuse_code
from modeling_clipmini import ClipMiniTextModel, ClipMiniVisionModel

logger = logging.getLogger(__name__)

EXAMPLES = "examples"
EXPORT_FILE = "export.json"  # beside the graphs of an export
EVALUATIONS = f"evaluation*/{RESULTS_FILE}"
# Any other file is refused rather than left out, so that nobody finds out only later that it was not pushed.
KNOWN_FILES = (
    *("README.md", "LICENSE*", "NOTICE*", ".gitattributes"),
    *("config.json", "model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    BANK_FILE,
    *("processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    *("*_clipmini.py", "handler.py", "requirements.txt"),
    *(RESULTS_FILE, CURVES_FILE, SAMPLES_FILE, EVALUATIONS),
    *(f"{ONNX_FOLDER}/{name}" for name in ("vision_model*.onnx*", "text_model*.onnx*", EXPORT_FILE)),
    *(f"{EXAMPLES}/*{suffix}" for suffix in (".jpg", ".jpeg", ".png", ".webp")),
)
# Left by a run or a tool: neither pushed nor a reason to refuse.
SKIPPED_FOLDERS = (".git", ".cache", "checkpoint-*", "runs", f"{TEMPORARY}*")
SKIPPED_FILES = (".git", ".DS_Store", "training_args.bin")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
SECRET_NAMES = (".env*", "*token", "*.pem", "*.key", "*secret*", "*credential*", ".netrc", "id_rsa*")
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
TEXT_SUFFIXES = (".md", ".json", ".py", ".txt")
# Keys of results that list single images and captions: they belong to other people, and no figure needs them.
SINGLE_INPUT_KEYS = ("skipped", "examples", "alike_examples", "rows")


def list_files(folder: Path) -> dict[str, Path]:
    """List the files of a model's folder by their path in the repository.

    Args:
        folder: a folder that `clipmini train` saved, or a snapshot in the Hub's cache.

    Returns:
        The files, sorted by path, without what runs and tools leave among them.

    Raises:
        ValueError: the folder holds no model, or names code of its own, or holds a file that must not be published: a
            pickle, a likely secret, an unknown file, or a link out of the folder.
    """
    _check_config(folder)
    root = folder.resolve()
    # A snapshot in the Hub's cache consists of links to blobs.
    allowed = (root, root.parent.parent / "blobs") if root.parent.name == "snapshots" else (root,)
    files, unknown = {}, []
    for path in sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()):
        relative = PurePosixPath(path.relative_to(folder).as_posix())
        name = str(relative)
        in_skipped_folder = any(matches(part, SKIPPED_FOLDERS) for part in relative.parts[:-1])
        if in_skipped_folder or matches(relative.name, SKIPPED_FILES):
            continue
        if matches(relative.name.lower(), SECRET_NAMES):
            raise ValueError(f"{folder} holds {name}, which looks like a secret; remove it from the folder.")
        if relative.suffix.lower() in PICKLES:
            raise ValueError(
                f"{folder} holds {name}, which may be a pickle, and loading a pickle runs code; remove it. Weights "
                "belong in model.safetensors."
            )
        if not matches(name, KNOWN_FILES):
            unknown.append(name)
            continue
        if not any(path.resolve().is_relative_to(parent) for parent in allowed):
            raise ValueError(
                f"{folder} holds a link to a file outside of it, {name}; replace the link with the file itself."
            )
        if path.suffix in TEXT_SUFFIXES and TOKEN.search(path.read_bytes()):
            raise ValueError(f"{path} holds what looks like a Hub token; remove it, and revoke the token.")
        files[name] = path
    if unknown:
        raise ValueError(
            f"{folder} holds files that do not belong to a model: {', '.join(unknown)}; remove them from the folder."
        )
    return files


def _check_config(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json. Name one that training saved.")
    refuse_code(folder)
    config = read_json(folder / "config.json")
    if isinstance(config, dict) and config.get("model_type") != MODEL_TYPE:
        command = as_command("convert", folder, options=["--out", "NEW_FOLDER"])
        raise ValueError(f"{folder} holds a model of another library; convert it, and push the new folder: {command}")


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Return whether a path in a repository matches one of some patterns, in which `*` never matches a slash."""
    # Against an absolute pattern the whole path has to match, not just its end.
    return any(PurePosixPath("/", path).match(f"/{pattern}") for pattern in patterns)


def is_replaced(path: str) -> bool:
    """Return whether a push deletes a file of the repository that it does not hold: what pushes make, and pickles."""
    if matches(path, (".gitattributes", "LICENSE*")) or path.startswith(f"{EXAMPLES}/"):
        return False  # people may have added them
    return matches(path, KNOWN_FILES) or PurePosixPath(path).suffix.lower() in PICKLES


def drifted_code(folder: Path) -> list[str]:
    """List the code files of a model's folder that differ from the installed package's, or that only one of them has.

    `handler.py` may be missing from the folder.

    Returns:
        File names, sorted.
    """
    package = Path(modeling_clipmini.__file__).parent
    names = {path.name for path in (*folder.glob("*.py"), *package.glob("*_clipmini.py"))}
    _, different, missing = filecmp.cmpfiles(folder, package, names, shallow=False)
    return sorted(different + missing)


def check_weights(folder: Path, *, loads: bool = True) -> None:
    """Check that the weights of a model's folder are complete and finite.

    Args:
        folder: the model's folder.
        loads: whether the installed code can load the model; otherwise only the files are checked.

    Raises:
        ValueError: files are missing or damaged, or a weight is missing, NaN or infinite.
    """
    files = sorted(file for file in folder.glob("*.safetensors") if file.name != BANK_FILE)
    if not files:
        raise ValueError(f"{folder} has no weights: model.safetensors is missing.")
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                infinite = [name for name in weights.keys() if not weights.get_tensor(name).isfinite().all()]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is damaged ({error}); save the model again.") from error
        if infinite:
            raise ValueError(f"{folder} has a weight that is not finite ({infinite[0]}); train it again.")
    if loads:
        _check_loading(folder)
    graphs = folder / ONNX_FOLDER
    if graphs.is_dir() and not _are_of_these_weights(graphs, weights_sha256(folder)):
        raise ValueError(
            f"The graphs in {graphs} are of other weights than those beside them: remove them, or run `clipmini "
            "export` again."
        )


def _are_of_these_weights(graphs: Path, digest: str | None) -> bool:
    """Return whether an export wrote these graphs for weights with a digest, and nobody has changed them since."""
    facts = read_json(graphs / EXPORT_FILE)
    try:
        written = {graph["file"]: graph["sha256"] for graph in facts["graphs"]}
        is_of_these = facts["weights_sha256"] == digest
    except (TypeError, KeyError):
        return False
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in graphs.glob("*.onnx")}
    return is_of_these and found.items() <= written.items()


def _check_loading(folder: Path) -> None:
    """Raise if the model, or the single tower, of a folder does not load or lacks weights."""
    config = read_json(folder / "config.json")
    names = config.get("architectures") if isinstance(config, dict) else None
    tower: Any = next((cls for cls in (ClipMiniVisionModel, ClipMiniTextModel) if names == [cls.__name__]), None)
    if tower is None:
        load_model(folder, device="cpu")
        return
    try:
        _, info = tower.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # libraries raise nearly anything for a damaged file
        raise ValueError(f"{folder} is incomplete or damaged: {first_sentence(error)}.") from error
    if info["missing_keys"]:
        raise ValueError(f"{folder} lacks weights, among them {sorted(info['missing_keys'])[0]!r}.")


def list_results(folder: Path) -> dict[str, Path]:
    """List what belongs to a model but is not always in its folder: figures, curves and evaluations.

    Args:
        folder: the model's folder.

    Returns:
        The files by their path in the repository: results, curves and samples of the run, if the folder lies where a
        run saved it; and evaluations of exactly these weights, from beside and from inside the folder. Evaluations of
        other weights are left out with a warning.
    """
    folder = folder.absolute()
    files = {}
    if run := run_of(folder):
        files = {name: run / name for name in (CURVES_FILE, RESULTS_FILE, SAMPLES_FILE) if (run / name).is_file()}
    digest = weights_sha256(folder)
    for parent in (folder.parent, folder):
        for file in sorted(parent.glob(EVALUATIONS)):
            try:
                is_of_model = digest is not None and json.loads(file.read_bytes())["model"]["weights_sha256"] == digest
            except (ValueError, KeyError, TypeError):
                is_of_model = False
            if is_of_model:
                files[file.relative_to(parent).as_posix()] = file
            else:
                logger.warning("%s is left out: it does not say that it is of these weights; evaluate again", file)
    return files


def public_results(file: Path) -> bytes:
    """Return results as others may see them: without paths on this machine, and without single images and captions.

    Args:
        file: `results.json` of a run or of an evaluation.

    Returns:
        JSON.

    Raises:
        ValueError: the results do not name their data.
    """
    try:
        results = json.loads(file.read_bytes())
        source = results["data"]["source"]
    except (ValueError, KeyError, TypeError):
        source = None
    if not source:
        raise ValueError(f'{file} does not say what data it was measured on; add "data": {{"source": "NAME"}} to it.')
    results.pop("command", None)  # it may hold paths on this machine
    results = _public(results)
    results["data"]["source"] = public_name(str(source))
    return (json.dumps(results, indent=2) + "\n").encode()


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items() if key not in SINGLE_INPUT_KEYS}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith((".", "~"))):
        return public_name(value)
    return value
