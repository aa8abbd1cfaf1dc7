"""Names of files in a run's folder, who wrote them, the one atomic writer, the cache's root, versions, digests."""

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers.utils import SAFE_WEIGHTS_NAME

RECIPE_FILE, RESULTS_FILE, CURVES_FILE, MODEL_FOLDER = "recipe_as_run.yaml", "results.json", "curves.png", "model"
STAGE_FILE, RECORD_FILE = "stage.json", "written_files.json"
OF_NOBODY = {"__pycache__", ".DS_Store"}  # what Python and systems leave anywhere
CHECKPOINTS = "checkpoint-*"  # stands in a record for all that Trainer names by a step
PACKAGES = ("clipmini", "torch", "torchvision", "transformers", "timm", "datasets", "accelerate", "peft")


class RunRecord:
    """What runs and evaluations wrote into a folder, and so may replace; whatever else is there is somebody else's.

    It is a list of relative paths, kept in the folder itself. A file is recorded before it is written, so that a run
    which is killed at any moment knows its own again.

    Args:
        folder: the run's output folder; it need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> set[str]:
        """Return the recorded paths, relative to the folder; none where no run has recorded any.

        Raises:
            ValueError: the record is damaged.
        """
        file = self.folder / RECORD_FILE
        try:
            return set(json.loads(file.read_text(encoding="utf-8"))["files"]) if file.exists() else set()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}): move {self.folder} away, or name another.") from error

    def add(self, files: Iterable[Path]) -> None:
        """Record files that are about to be written.

        Args:
            files: paths below the folder, which is made if need be.
        """
        known = self.read()
        names = known | {file.relative_to(self.folder).as_posix() for file in files}
        if names != known:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_beside(self.folder / RECORD_FILE) as beside:
                beside.write_text(json.dumps({"files": sorted(names)}, indent=2) + "\n", encoding="utf-8")

    def find_unrecorded(self, stages: Iterable[str]) -> list[str]:
        """List what a run would replace, or take for its own, though no run wrote it.

        Args:
            stages: names of the recipe's stages, each of which has a folder below the run's.

        Returns:
            Paths relative to the folder, sorted.
        """
        known = self.read()
        found = []
        for stage in ("", *stages):
            for file in self._entries(stage):
                name = file.relative_to(self.folder).as_posix()
                # Of checkpoints Trainer deletes old ones by the step, whatever else may stand behind it.
                own = re.sub(r"checkpoint-\d+$", CHECKPOINTS, name)
                if own not in known:
                    found.append(name)
        return sorted(found)

    def _entries(self, stage: str) -> Iterator[Path]:
        """List what is there of all that a run writes, of its model every file."""
        folder = self.folder / stage
        files = (STAGE_FILE,) if stage else (RECIPE_FILE, RESULTS_FILE, CURVES_FILE)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name == MODEL_FOLDER and path.is_dir() and not path.is_symlink():
                inside = (file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
                yield from (file for file in inside if not OF_NOBODY & set(file.parts))
            elif path.name in (*files, MODEL_FOLDER) or re.match(r"checkpoint-\d", path.name):
                yield path


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """Give a path beside `target` to write to; when all is written, it takes the place of what stood there."""
    beside, old = (target.with_name(f".{target.name}.{os.getpid()}{suffix}") for suffix in ("", ".old"))
    try:
        yield beside
        if target.is_symlink():
            target.unlink()
        if target.is_dir():  # a folder cannot be replaced in one step
            target.rename(old)
        try:
            beside.replace(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        for path in (beside, old):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def cache_root(cache_dir: Path | None = None) -> Path:
    """Return the folder that everything is cached below.

    Args:
        cache_dir: the folder; by default the environment variable `CLIPMINI_CACHE`, else `~/.cache/clipmini`.

    Returns:
        Its absolute path; it need not exist.
    """
    chosen = cache_dir or os.environ.get("CLIPMINI_CACHE") or Path("~/.cache/clipmini")
    return Path(chosen).expanduser().absolute()


def versions() -> dict[str, str]:
    """Name what a run's figures may depend on.

    Returns:
        Versions of Python and of the packages that are installed, the kind of processor, the number of threads that
        torch computes with, and the GPU's name if there is one. Nothing tells one machine from its like.
    """
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # peft is optional; clipmini may run from a copied folder
            continue
    found |= {"machine": platform.machine(), "cpu_threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def weights_sha256(folder: Path) -> str | None:
    """Give the SHA-256 of a folder's `model.safetensors`, by which results tell whose they are; None without it."""
    file = folder / SAFE_WEIGHTS_NAME
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
