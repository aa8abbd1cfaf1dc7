"""File names in a run's folder, the record of who wrote them, atomic writing, the cache folder, versions, digests."""

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock, Timeout

RECIPE_FILE, RESULTS_FILE, MODEL_FOLDER = "recipe_as_run.yaml", "results.json", "model"
CURVES_FILE, SAMPLES_FILE = "curves.png", "samples.jpg"
WEIGHTS_FILE, BANK_FILE = "model.safetensors", "bank.safetensors"
STAGE_FILE, RECORD_FILE = "stage.json", "written_files.json"
CHECKPOINTS = "checkpoint-*"  # in a record, this stands for all checkpoints: Trainer adds the step to their names
TEMPORARY = ".clipmini-tmp-"  # begins the names of folders in which a process works, each with a lock that it holds
NOBODYS = re.compile(rf"/(__pycache__/|\.DS_Store$|{re.escape(TEMPORARY)})")  # left anywhere by Python, systems and us
MAX_TRIES = 100  # to make a folder that other processes remove
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
            with atomic_write(self.folder / RECORD_FILE) as temporary_path:
                temporary_path.write_text(json.dumps({"files": sorted(names)}, indent=2) + "\n", encoding="utf-8")

    def find_outputs(self, stages: Iterable[str]) -> list[str]:
        """Return what exists of all that a run with some stages writes, every file of its models too; as `read`."""
        files = (file for stage in ("", *stages) for file in self._find_in(stage))
        return sorted(file.relative_to(self.folder).as_posix() for file in files)

    def _find_in(self, stage: str) -> Iterator[Path]:
        folder = self.folder / stage
        files = (STAGE_FILE,) if stage else (RECIPE_FILE, RESULTS_FILE, CURVES_FILE, SAMPLES_FILE)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name == MODEL_FOLDER and path.is_dir() and not path.is_symlink():
                inside = (file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
                yield from (file for file in inside if not NOBODYS.search(file.as_posix()))
            # By the prefix alone: Trainer deletes old checkpoints by step, whatever follows the number.
            elif path.name in (*files, MODEL_FOLDER) or re.match(r"checkpoint-\d", path.name):
                yield path


def run_of(model_folder: Path) -> Path | None:
    """Return the folder of the run that saved a model's folder, or None if it lies elsewhere."""
    folder = model_folder.absolute()
    return folder.parent if folder.name == MODEL_FOLDER and (folder.parent / RECIPE_FILE).is_file() else None


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`, a file or a folder, which it replaces once it is written.

    Raises:
        OSError: the folder, which is created if necessary, cannot be written to; the disk is full; or a file was
            written where a folder is. The target is as it was.
    """
    place = target.parent / f"{TEMPORARY}{secrets.token_hex(4)}"
    new, old = place / "new", place / "old" / target.name
    with explain_full_disk(target), _held_folder(place):
        yield new
        if target.is_dir() and not target.is_symlink() and not new.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        if new.is_dir() and (target.is_dir() or target.is_symlink()):  # which cannot be replaced in one step
            old.parent.mkdir()
            target.rename(old)
        new.replace(target)


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Let no other run into an output folder until this one ends or is killed, and remove what killed ones left there.

    Raises:
        ValueError: another run is in it, or it cannot be written to.
    """
    place = folder / f"{TEMPORARY}run"
    owner, since = place / "owner", datetime.now().astimezone()
    with ExitStack() as stack:
        try:
            stack.enter_context(_held_folder(place))
            owner.write_text(f"process {os.getpid()} on {platform.node()}, since {since:%Y-%m-%d %H:%M:%S %Z}")
        except OSError as error:
            problem = f"cannot be written to ({error.strerror}): make it writable"
            if isinstance(error, Timeout):
                first = owner.read_text() if owner.exists() else "it has just begun"
                problem = f"is being written by another run ({first}): wait for its end"
            raise ValueError(f"{folder} {problem}, or --set output_dir=another/folder.") from error
        for below in (folder, *folder.glob("*/"), *folder.glob("*/*/")):  # stages, and each with a model
            remove_leftovers(below)
        yield


@contextmanager
def _held_folder(folder: Path) -> Iterator[None]:
    """Make a folder that is a leftover once this process is gone, since the system then ends the lock inside."""
    lock, is_first = FileLock(folder / "lock"), not folder.parent.exists()
    num_tries = 0
    while not (lock.is_locked and folder.exists()):  # another process may remove it before it is locked
        lock.release()
        num_tries += 1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=1)
        except (FileNotFoundError, FileExistsError):
            if num_tries == MAX_TRIES:  # there can be no such folder
                raise
    try:
        yield
    finally:
        lock.release()
        remove_leftovers(folder.parent)
        if is_first:
            with suppress(OSError):  # something was written
                folder.parent.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of `atomic_write`, and put back a folder that one of them was replacing."""
    for temporary in folder.glob(f"{TEMPORARY}*"):
        with suppress(OSError):  # its process lives, or another one is at it, or what cannot be put back must stay
            # Held until all is removed: whoever made the folder just now, and locked it in between, would lose it.
            with FileLock(temporary / "lock", timeout=0) as lock:
                for old in (temporary / "old").glob("*"):
                    if not (place := folder / old.name).exists():
                        old.rename(place)
                if os.name == "nt":  # which removes no open file, and so nothing of a next owner either
                    lock.release()
                shutil.rmtree(temporary)


@contextmanager
def explain_full_disk(target: Path) -> Iterator[None]:
    """Turn what libraries raise on a full disk, or at a limit for the size of files, into one clear `OSError`."""
    try:
        yield
    except Exception as error:
        known = re.search(r"(?:os error|code:) (\d+)", str(error))  # as safetensors says it; torch gives no reason
        is_torchs = re.search("PytorchStreamWriter|iostream error|unexpected pos", str(error))
        code = int(known[1]) if known else errno.ENOSPC if is_torchs else getattr(error, "errno", None)
        if code not in DISK_FULL:
            raise
        reason = f"{os.strerror(code)}; what was there before is kept, so make room and run the same command again"
        raise OSError(code, reason, str(target)) from error


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
    return file_sha256(folder / WEIGHTS_FILE)


def file_sha256(file: Path) -> str | None:
    """Return the SHA-256 of a file; None if there is no such file."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
