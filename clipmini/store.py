"""Rows that are computed once from an image or a caption, and kept on disk for the next run.

Frozen features of training, a teacher's embeddings and the facts of a scan are all kept here. A row is found by the
digest of what it is computed from, so nothing is ever out of date: what has changed has another digest. The order and
the number of rows do not matter, and data sets that share images share their rows.

An index that people search is a Lance table instead: rows are added to it, removed and queried. Here they are only
computed, found by their key, and read.

A space is a folder of chunks: safetensors files with `keys` (n, 16) and `rows` (n, ...), each named by the digest of
its bytes. A chunk is written beside its place, renamed, and never changed. So a killed run loses no more than the
chunk that it was computing, several processes can write at once, and damage is found when a chunk is opened: also in a
file that had not reached the disk when the power failed.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from numpy.typing import DTypeLike
from safetensors import safe_open
from safetensors.numpy import save
from tqdm.auto import tqdm

from .files import atomic_write, cache_root, file_sha256, remove_leftovers

logger = logging.getLogger(__name__)

KEY_BYTES = 16
SPACE_FILE = "space.json"  # for people to read; its modification time is the last use
SUFFIX = ".safetensors"
DIGESTS_FILE = "digests.json"  # SHA-256 of the other files in a folder that `made_once` returns
DAY_S = 24 * 60 * 60


def digest(*parts: bytes | str) -> bytes:
    """Return 16 bytes that depend on some parts and on where each ends, by BLAKE2b; text is taken as UTF-8."""
    hasher = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.digest()


def as_keys(digests: Iterable[bytes]) -> np.ndarray:
    """Return digests as the keys of rows: (N, 16) uint8."""
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, KEY_BYTES)


def as_scalars(keys: np.ndarray) -> np.ndarray:
    """Return (N, 16) keys as N values that can be sorted and compared."""
    return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}")[:, 0]


class StoredRows:
    """Rows in memory-mapped chunks, read like an array. Pickling it does not copy the rows.

    Args:
        files: the chunks.
        dtype: type of the rows.
        row_shape: shape of a row.
        chunk_of: (*leading,) the number of each row's chunk.
        row_of: (*leading,) the place of each row in its chunk.

    Attributes:
        shape: (*leading, *row_shape).
        dtype: type of the rows.
    """

    def __init__(
        self,
        files: Sequence[Path],
        dtype: np.dtype,
        row_shape: tuple[int, ...],
        chunk_of: np.ndarray,
        row_of: np.ndarray,
    ) -> None:
        self.dtype = dtype
        self.shape = (*chunk_of.shape, *row_shape)
        self._files, self._row_shape, self._chunk_of, self._row_of = files, row_shape, chunk_of, row_of
        self._chunks = [_parse_chunk(_map_file(file), dtype)[1] for file in files]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Return the rows at any numpy index of the leading dimensions; a single row is a read-only view."""
        chunk_of, row_of = self._chunk_of[index], self._row_of[index]
        if chunk_of.ndim == 0:
            return self._chunks[chunk_of][row_of]
        rows = np.empty((chunk_of.size, *self._row_shape), self.dtype)
        order = np.argsort(chunk_of, axis=None, kind="stable")
        chunks, starts = np.unique(chunk_of.flat[order], return_index=True)
        for chunk, places in zip(chunks, np.split(order, starts)[1:], strict=True):
            rows[places] = self._chunks[chunk][row_of.flat[places]]
        return rows.reshape(*chunk_of.shape, *self._row_shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._files, self.dtype, self._row_shape, self._chunk_of, self._row_of)


def stored_rows(
    space: Mapping[str, str],
    keys: np.ndarray,
    compute: Callable[[list[int]], np.ndarray],
    *,
    dtype: DTypeLike,
    chunk_rows: int,
    description: str,
) -> StoredRows:
    """Open rows that are kept on disk, and compute and keep those that are missing.

    A run that is killed loses only its current chunk. Of several processes that want the same rows, one computes them
    and the others wait. Where no row is missing, nothing needs to be written.

    Args:
        space: all that every row depends on besides its own key: weights, transforms, the kind of rows.
        keys: (*leading, 16) uint8, the `digest` of what each row is computed from; equal keys share a row.
        compute: takes flat indices of missing rows, ascending, and returns these rows: (n, *row_shape). All rows of a
            space have one shape.
        dtype: type in which the rows are kept, a part of the space.
        chunk_rows: number of rows to compute and keep at once, at least 1.
        description: names the rows in the log and the progress bar.

    Returns:
        The rows, of shape (*leading, *row_shape). Without any key, row_shape is ().

    Raises:
        ValueError: rows are missing, and the folder cannot be written or the disk has too little room.
    """
    assert keys.dtype == np.uint8
    assert keys.shape[-1:] == (KEY_BYTES,)
    leading, dtype = keys.shape[:-1], np.dtype(dtype)
    if keys.size == 0:
        return StoredRows((), dtype, (), *np.zeros((2, *leading), dtype=np.int32))
    identity = {"space": dict(space), "dtype": dtype.str}
    folder = _rows_folder() / digest(json.dumps(identity, sort_keys=True)).hex()
    remove_leftovers(folder)
    found = _FoundRows(folder, dtype, np.ascontiguousarray(keys).reshape(-1, KEY_BYTES))
    found.look()
    if found.missing.size:
        with cache_refusals(description, folder):
            with atomic_write(folder / SPACE_FILE) as file:
                about = json.dumps({"description": description, **identity}, indent=2, ensure_ascii=False)
                file.write_text(about + "\n", encoding="utf-8", errors="backslashreplace")
            # By all wanted keys and not by the missing ones, which become fewer while another process works. Sixteen
            # locks are few files, and runs that want other rows seldom wait for each other.
            lock = FileLock(folder / f"lock-{digest(found.wanted.tobytes()).hex()[0]}")
            try:
                held = lock.acquire(timeout=0)
            except Timeout:
                logger.info("%s: another process is computing it; waiting for %s", description, folder)
                held = lock.acquire()
        with held:  # the system releases it if this process is killed
            found.look()  # another process may have computed them
            _compute_missing(found, compute, chunk_rows, description)
    else:
        logger.info("%s: reused from %s", description, folder)
        with suppress(OSError):
            os.utime(folder / SPACE_FILE)
    chunk_of, row_of = (places[found.number_of].reshape(leading) for places in (found.chunk_of, found.row_of))
    assert found.row_shape is not None
    return StoredRows(found.files, dtype, found.row_shape, chunk_of, row_of)


class _FoundRows:
    """The places of wanted rows in a folder of chunks.

    Attributes:
        keys: (N, 16) uint8, what is wanted.
        wanted: (U,) the distinct keys, sorted.
        number_of: (N,) each key's place among the distinct ones.
        chunk_of: (U,) the number of each row's chunk in `files`; -1 if it is missing.
        row_of: (U,) the place of each row in its chunk.
        files: the chunks that hold wanted rows.
        row_shape: shape of the space's rows; None if it has none.
    """

    def __init__(self, folder: Path, dtype: np.dtype, keys: np.ndarray) -> None:
        self.folder, self.dtype, self.keys = folder, dtype, keys
        self.wanted, self._firsts, self.number_of = np.unique(as_scalars(keys), return_index=True, return_inverse=True)
        self.chunk_of = np.full(len(self.wanted), -1, dtype=np.int32)
        self.row_of = np.zeros(len(self.wanted), dtype=np.int32)
        self.files: list[Path] = []
        self.row_shape: tuple[int, ...] | None = None
        self._seen: set[Path] = set()

    @property
    def missing(self) -> np.ndarray:
        """Return the flat index at which each missing key comes first, ascending."""
        return np.sort(self._firsts[self.chunk_of < 0])

    def look(self) -> None:
        """Look for missing rows in the chunks that have come since the last time."""
        for file in sorted(set(self.folder.glob(f"*{SUFFIX}")) - self._seen):
            self.add(file)

    def add(self, file: Path) -> None:
        """Take missing rows from a chunk; remove it if it is damaged. Only chunks with missing rows are digested."""
        self._seen.add(file)
        if not file.is_file():  # reading a pipe would wait forever
            return
        try:
            data = _map_file(file)
            keys, rows = _parse_chunk(data, self.dtype)
            keys = as_scalars(keys)
            places = np.minimum(np.searchsorted(self.wanted, keys), len(self.wanted) - 1)
            is_new = (self.wanted[places] == keys) & (self.chunk_of[places] < 0)
            if not is_new.any():
                return
            if _name_of(data) != file.name:
                raise ValueError("its content has changed")
        except FileNotFoundError:  # another process has removed it
            return
        except Exception as error:  # a damaged header raises nearly anything
            reason = f"{type(error).__name__}: {error}"
            logger.warning("%s is damaged (%s); it is removed, and its rows are computed again", file, reason)
            with suppress(OSError):
                file.unlink()
            return
        self.row_shape = rows.shape[1:]
        self.chunk_of[places[is_new]] = len(self.files)
        self.row_of[places[is_new]] = np.flatnonzero(is_new)
        self.files.append(file)


def _compute_missing(
    found: _FoundRows, compute: Callable[[list[int]], np.ndarray], chunk_rows: int, description: str
) -> None:
    missing, num_wanted = found.missing, len(found.wanted)
    num_done = num_wanted - len(missing)
    action = f"resumed with {num_done} of {num_wanted} rows in" if num_done else "computing into"
    logger.info("%s: %s %s", description, action, found.folder)
    with tqdm(total=num_wanted, initial=num_done, desc=description, unit="row", leave=False) as bar:
        for start in range(0, len(missing), chunk_rows):
            chosen = missing[start : start + chunk_rows]
            rows = np.ascontiguousarray(compute(chosen.tolist()), dtype=found.dtype)
            expected = (len(chosen), *(rows.shape[1:] if found.row_shape is None else found.row_shape))
            assert rows.shape == expected, f"{description}: the rows have shape {rows.shape}, not {expected}"
            found.folder.mkdir(parents=True, exist_ok=True)  # somebody may have cleared the cache by hand
            needed = (len(missing) - start) * (rows[0].nbytes + KEY_BYTES)
            free = shutil.disk_usage(found.folder).free
            if needed > free:
                raise ValueError(
                    f"{description}: the cache needs {tqdm.format_sizeof(needed, 'B')} in {found.folder}, and "
                    f"{tqdm.format_sizeof(free, 'B')} are free: make room, or set the environment variable "
                    "CLIPMINI_CACHE to a folder on a larger disk."
                )
            data = save({"keys": found.keys[chosen], "rows": rows})
            file = found.folder / _name_of(data)
            with cache_refusals(description, found.folder), atomic_write(file) as temporary_path:
                temporary_path.write_bytes(data)
            found.add(file)
            bar.update(len(chosen))


@contextmanager
def cache_refusals(description: str, folder: Path) -> Iterator[None]:
    """Turn what goes wrong with writing to the cache into one clear `ValueError`."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{description}: cannot write to {folder} ({error.strerror or error}): set the environment variable "
            "CLIPMINI_CACHE to a writable folder on a disk with room."
        ) from error


def made_once(target: Path, make: Callable[[Path], None], description: str) -> Path:
    """Return a folder of the cache, which is made on first use, and again if one of its files has changed.

    The finished folder is moved into place, so a killed run leaves no incomplete one; of parallel runs, one makes it.

    Args:
        target: the folder.
        make: fills a new folder.
        description: names what it holds.

    Raises:
        ValueError: the cache cannot be written.
    """
    remove_leftovers(target.parent)
    if not _is_whole(target):
        with cache_refusals(description, target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.parent / "lock"):
                if not _is_whole(target):
                    if target.exists():
                        logger.warning("%s is damaged, or has no digests yet; it is made again", target)
                    with atomic_write(target) as folder:
                        folder.mkdir()
                        make(folder)
                        (folder / SPACE_FILE).write_text(json.dumps({"description": description}), encoding="utf-8")
                        files = sorted(file for file in folder.rglob("*") if file.is_file())
                        digests = {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}
                        (folder / DIGESTS_FILE).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    with suppress(OSError):  # a cache that may only be read
        os.utime(target / SPACE_FILE)
    return target


def _is_whole(folder: Path) -> bool:
    """Return whether a folder is as `made_once` left it; a flipped bit would give embeddings of 1e35."""
    try:
        digests = json.loads((folder / DIGESTS_FILE).read_text(encoding="utf-8"))
        return all(file_sha256(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def _map_file(file: Path) -> np.ndarray:
    # Neither np.memmap nor safetensors, which hold a file open or copy it: there may be thousands of chunks.
    with pa.memory_map(os.fsencode(file)) as source:
        return np.frombuffer(source.read_buffer(), np.uint8)


def _parse_chunk(data: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys and rows in a safetensors file as views, which are not read yet."""
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())

    def tensor(name: str, dtype: DTypeLike) -> np.ndarray:
        begin, end = header[name]["data_offsets"]
        return data[start + begin : start + end].view(dtype).reshape(header[name]["shape"])

    return tensor("keys", np.uint8), tensor("rows", dtype)


def _name_of(data: Any) -> str:
    """Return the name of a chunk with these bytes."""
    return hashlib.blake2b(data, digest_size=KEY_BYTES).hexdigest() + SUFFIX


def _rows_folder() -> Path:
    return cache_root() / "rows"


def indexes_folder() -> Path:
    """Return the folder of the indexes that `clipmini search` keeps; they are listed and cleared like other rows."""
    return cache_root() / "indexes"


def unpacked_folder() -> Path:
    """Return the folder of unpacked archives, which are listed and cleared likewise."""
    return cache_root() / "unpacked"


def converted_folder() -> Path:
    """Return the folder of models converted from other libraries, which are listed and cleared likewise."""
    return cache_root() / "converted"


@dataclass(frozen=True)
class StoredSpace:
    """What a space holds.

    Attributes:
        folder: its folder.
        description: names its rows; from the run that last computed any.
        num_rows: how many rows it has.
        num_bytes: their size on disk.
        days_unused: days since it was last used.
    """

    folder: Path
    description: str
    num_rows: int
    num_bytes: int
    days_unused: float


def _is_content(file: Path) -> bool:
    return file.is_file() and file.name != SPACE_FILE and not file.name.startswith("lock-")


def spaces(older_than_days: float = 0.0) -> list[StoredSpace]:
    """List what the cache holds, last used first.

    Args:
        older_than_days: leave out what was used later than so many days ago.
    """
    found = []
    parents = (_rows_folder(), indexes_folder(), unpacked_folder(), converted_folder())
    for about in (folder / SPACE_FILE for parent in parents for folder in parent.glob("[!.]*/")):
        chunks = [chunk for chunk in about.parent.glob(f"*{SUFFIX}") if chunk.is_file()]
        try:
            facts = json.loads(about.read_text(encoding="utf-8"))
            description = str(facts["description"])
            num_rows = sum(safe_open(chunk, "numpy").get_slice("keys").get_shape()[0] for chunk in chunks)
            num_rows += facts.get("num_rows", 0)  # of an index, whose own files are Lance's
        except Exception as error:  # a damaged header raises nearly anything
            description, num_rows = f"damaged ({type(error).__name__})", 0
        num_bytes = sum(file.stat().st_size for file in about.parent.rglob("*") if _is_content(file))
        used = about if about.exists() else about.parent
        days_unused = max(0.0, time.time() - used.stat().st_mtime) / DAY_S
        if days_unused >= older_than_days:
            found.append(StoredSpace(about.parent, description, num_rows, num_bytes, days_unused))
    return sorted(found, key=lambda space: space.days_unused)


def clear(older_than_days: float = 0.0) -> list[StoredSpace]:
    """Remove what `spaces` lists, and return it; a space whose rows a run is computing is kept, with a warning."""
    removed = []
    for space in spaces(older_than_days):
        with ExitStack() as held:
            try:
                for lock in space.folder.glob("lock-*"):
                    held.enter_context(FileLock(lock).acquire(timeout=0))
            except Timeout:
                logger.warning("%s: in use, and kept", space.folder)
                continue
            shutil.rmtree(space.folder, ignore_errors=True)
            removed.append(space)
    return removed
