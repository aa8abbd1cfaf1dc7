"""File names in a run's folder, the record of who wrote them, atomic writing, the cache folder, versions, digests."""

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RECIPE_FILE, RESULTS_FILE, MODEL_FOLDER = "recipe_as_run.yaml", "results.json", "model"
CURVES_FILE, SAMPLES_FILE = "curves.png", "samples.jpg"
WEIGHTS_FILE, BANK_FILE = "model.safetensors", "bank.safetensors"
STAGE_FILE, RECORD_FILE = "stage.json", "written_files.json"
IGNORED_NAMES = {"__pycache__", ".DS_Store"}  # Python and operating systems leave these anywhere
CHECKPOINTS = "checkpoint-*"  # in a record, this stands for all checkpoints: Trainer adds the step to their names
DRAWING_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf")
PACKAGES = ("clipmini", "torch", "torchvision", "transformers", "timm", "datasets", "accelerate", "peft")


class RunRecord:
    """The files that runs and evaluations wrote into a folder, and so may replace; any other file is somebody else's.

    The record is a list of relative paths, kept in the folder itself. A file is recorded before it is written, so that
    a run which is killed at any moment recognizes its files later.

    Args:
        folder: the run's output folder; it need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> set[str]:
        """Return the recorded paths, relative to the folder; an empty set if there is no record.

        Raises:
            ValueError: the record is damaged.
        """
        file = self.folder / RECORD_FILE
        try:
            return set(json.loads(file.read_text(encoding="utf-8"))["files"]) if file.exists() else set()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}): move {self.folder} away, or use another.") from error

    def add(self, files: Iterable[Path]) -> None:
        """Record files that are about to be written.

        Args:
            files: paths below the folder, which is created if necessary.
        """
        known = self.read()
        names = known | {file.relative_to(self.folder).as_posix() for file in files}
        if names != known:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.folder / RECORD_FILE) as temporary_path:
                temporary_path.write_text(json.dumps({"files": sorted(names)}, indent=2) + "\n", encoding="utf-8")

    def find_unrecorded(self, stages: Iterable[str]) -> list[str]:
        """Return files that a run would replace or mistake for its own, although no run wrote them.

        Args:
            stages: names of the recipe's stages, each of which has a folder below the run's.

        Returns:
            Paths relative to the folder, sorted.
        """
        known = self.read()
        files = (file for stage in ("", *stages) for file in self._find_outputs(stage))
        names = (file.relative_to(self.folder).as_posix() for file in files)
        return sorted(name for name in names if re.sub(r"checkpoint-\d+$", CHECKPOINTS, name) not in known)

    def _find_outputs(self, stage: str) -> Iterator[Path]:
        """Yield what exists of all that a run writes, including every file of its model."""
        folder = self.folder / stage
        files = (STAGE_FILE,) if stage else (RECIPE_FILE, RESULTS_FILE, CURVES_FILE, SAMPLES_FILE)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name == MODEL_FOLDER and path.is_dir() and not path.is_symlink():
                inside = (file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
                yield from (file for file in inside if not IGNORED_NAMES & set(file.parts))
            # By the prefix alone: Trainer deletes old checkpoints by step, whatever follows the number.
            elif path.name in (*files, MODEL_FOLDER) or re.match(r"checkpoint-\d", path.name):
                yield path


def run_of(model_folder: Path) -> Path | None:
    """Return the folder of the run that saved a model's folder, or None if it lies elsewhere."""
    folder = model_folder.absolute()
    return folder.parent if folder.name == MODEL_FOLDER and (folder.parent / RECIPE_FILE).is_file() else None


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; once it is written, it replaces `target`, a file or a folder."""
    temporary_path, old = (target.with_name(f".{target.name}.{os.getpid()}{suffix}") for suffix in ("", ".old"))
    try:
        yield temporary_path
        if target.is_symlink():
            target.unlink()
        if target.is_dir():  # a folder cannot be replaced in one step
            target.rename(old)
        try:
            temporary_path.replace(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        for path in (temporary_path, old):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def check_drawing(out: str | Path) -> None:
    """Check that a drawing can be written to a file.

    Raises:
        ValueError: its suffix is none of `DRAWING_SUFFIXES`, or it is a folder.
    """
    if Path(out).suffix.lower() not in DRAWING_SUFFIXES:
        raise ValueError(f"A drawing cannot be written to {out}; end its name in {', '.join(DRAWING_SUFFIXES)}.")
    if Path(out).expanduser().is_dir():
        raise ValueError(f"A drawing cannot be written to {out}, which is a folder; name a file.")


def cache_root(cache_dir: Path | None = None) -> Path:
    """Return the absolute path of the folder that holds all caches; it need not exist.

    Args:
        cache_dir: the folder; by default the environment variable `CLIPMINI_CACHE`, else `~/.cache/clipmini`.
    """
    chosen = cache_dir or os.environ.get("CLIPMINI_CACHE") or Path("~/.cache/clipmini")
    return Path(chosen).expanduser().absolute()


def versions() -> dict[str, str]:
    """Return the versions and the hardware that a run's figures may depend on.

    Returns:
        Versions of Python and of the installed packages in `PACKAGES`, the kind of processor, the number of threads
        that torch computes with, and the GPU's name if there is one. Nothing identifies the machine.
    """
    import torch  # here, since all else in this file is light

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):  # peft is optional; clipmini may run from a copied folder
            found[package] = version(package)
    found |= {"machine": platform.machine(), "cpu_threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def weights_sha256(folder: Path) -> str | None:
    """Return the SHA-256 of a folder's `model.safetensors`, by which results name their weights; None without one."""
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
