"""Unpack an archive of images and tables, or a shard of a WebDataset, once and within limits.

It is unpacked into the cache, beside the folder's place, which is renamed when all is there. Nothing in an archive is
trusted: names that leave the folder, links out of it, and what grows beyond reason are refused.
"""

import json
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock
from tqdm.auto import tqdm

from clipmini.files import atomic_write
from clipmini.names import first_sentence
from clipmini.store import SPACE_FILE, digest, unpacked_folder

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_GROWTH = 100  # times the archive's size: tables shrink to a tenth, images not at all
MIN_LIMIT_BYTES = 64 * 2**20
MAX_MEMBERS = 10_000_000


def is_archive(path: Path) -> bool:
    """Return whether a file is an archive, by its name."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def unpack(archive: Path) -> Path:
    """Unpack an archive into the cache, unless it is there from before.

    Returns:
        The folder. Another content, or another time of change, has another one.

    Raises:
        ValueError: it is damaged, or encrypted; it holds a name or a link that leaves the folder; or it would take
            more than `MAX_GROWTH` times its size, or more than the disk has.
    """
    status = archive.stat()
    folder = unpacked_folder() / digest(str(archive.absolute()), f"{status.st_size} {status.st_mtime_ns}").hex()
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock"):  # of several processes that train, one unpacks
            if folder.is_dir():
                os.utime(folder / SPACE_FILE)
            else:
                with atomic_write(folder) as temporary:
                    num_files = _write_members(archive, temporary / "files", status.st_size)
                    about = {"description": f"files of {archive.name}", "num_rows": num_files}
                    (temporary / SPACE_FILE).write_text(json.dumps(about), encoding="utf-8")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, RuntimeError, zlib.error) as error:
        raise ValueError(f"{archive} cannot be unpacked: {first_sentence(error)}") from error
    return folder / "files"


def _write_members(archive: Path, folder: Path, archive_bytes: int) -> int:
    """Write all files, and return their number."""
    folder.mkdir(parents=True)
    limit = min(max(MAX_GROWTH * archive_bytes, MIN_LIMIT_BYTES), shutil.disk_usage(folder).free)
    num_bytes = num_files = 0
    members = _zip_members(archive) if archive.suffix.lower() == ".zip" else _tar_members(archive)
    for name, content in tqdm(members, desc=f"unpacking {archive.name!r}", unit="file", leave=False):
        num_files += 1
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or not path.name or ".." in path.parts or ":" in path.parts[0] or "\0" in name:
            raise ValueError(f"{archive} holds {name[:80]!r}, a name outside its folder; it is not unpacked.")
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            while block := content.read(2**20):
                num_bytes += len(block)
                if num_bytes > limit or num_files > MAX_MEMBERS:
                    raise ValueError(
                        f"{archive} grows beyond {limit / 2**30:.1f} GiB or {MAX_MEMBERS:,} files, the limit of what "
                        "is unpacked; unpack it yourself, and name its folder."
                    )
                file.write(block)
    return num_files


def _zip_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            if not member.is_dir():
                with file.open(member) as content:
                    yield member.filename, content


def _tar_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(archive) as file:
        for member in file:
            if member.islnk() or member.issym():
                raise ValueError(f"{archive} holds a link, {member.name[:80]!r}; unpack it, and name its folder.")
            content = file.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, content
