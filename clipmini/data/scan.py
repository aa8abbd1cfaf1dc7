"""Look at every image once: whether it can be read, which pixels it has, and what it looks like.

The readable check of `load_pairs`, `find_duplicates` and `find_leaks` all take these facts from here. They are kept
under a digest of the image's bytes, or of its file's path, size, times and inode. So a second start costs one look at
each file's status; a file that was changed, touched or moved is decoded again.
"""

import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import datasets
import imagehash
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from PIL import Image, features
from torch.utils.data import DataLoader

from clipmini.store import KEY_BYTES, as_keys, digest, stored_rows
from modeling_clipmini.images_clipmini import FORMATS, ImageError, read_image

POLICY = "1"  # to be raised when `read_image` or what is computed from its result changes
HASH_BITS = 64  # of a perceptual hash
UNKNOWN = bytes(KEY_BYTES + HASH_BITS // 8)  # in place of the facts of an image that could not be read
NO_KEY = bytes(KEY_BYTES)  # of an image whose facts cannot be kept
DOUBTFUL_NS = 2 * 10**9  # a file may change again within a tick of its clock, at most 2 seconds (FAT's)
CHUNK_ROWS = 2048  # kept at once: five seconds' work of two cores
ROWS_AT_ONCE = 1000  # of columns without bytes; of selected rows, larger batches take longer
ROWS_PER_BATCH = 100  # whose bytes are in memory at once
IMAGES_PER_TASK = 16  # of a worker
TASKS_PER_WORKER = 2  # on their way at a time
MAX_WORKERS = 16  # a container may have fewer cores than it sees
MIN_IMAGES_FOR_WORKERS = 256


@dataclass(frozen=True)
class ImageFacts:
    """What is known of N images.

    Attributes:
        paths: each image's path or address; None if it has none.
        faults: why `read_image` refuses it; None if it can be read.
        pixels: (N, 16) uint8, digest of size and decoded pixels, equal for copies.
        perceptual_hashes: (N, 64) booleans, similar for images that look alike.
    """

    paths: list[str | None]
    faults: list[str | None]
    pixels: np.ndarray
    perceptual_hashes: np.ndarray


class _Look(NamedTuple):
    """What one image has shown: its fault, or its facts; and its key after it was read."""

    fault: str | None
    facts: bytes
    key: bytes


def read_columns(rows: Dataset, *names: str) -> pa.Table:
    """Read some columns of all rows into memory.

    Iterating over a column of a `Dataset` takes 35 µs for each row, and this takes two.
    """
    selected = rows.select_columns(list(names)).with_format("arrow")
    # A selected row is a chunk of its own until chunks are combined.
    parts = [batch.combine_chunks() for batch in selected.iter(ROWS_AT_ONCE)]
    return pa.concat_tables(parts or [selected[:]])


def read_paths(rows: Dataset) -> Iterator[str | None]:
    """Yield the path of each row's image, None where it has none, without its bytes."""
    for batch in rows.select_columns(["image"]).with_format("arrow").iter(ROWS_AT_ONCE):
        yield from pc.struct_field(batch["image"], "path").to_pylist()


def scan_images(rows: Dataset) -> ImageFacts:
    """Find out what there is to know of images, decoding only those that were not seen before.

    An image that cannot be read is looked at again every time, since the reason may have gone.

    Args:
        rows: images in the column `image`: paths, bytes, or `{"bytes", "path"}` as in `datasets.Image`.

    Returns:
        The facts, in the order of the rows.

    Raises:
        ValueError: the cache cannot be written; see `stored_rows`.
    """
    images = rows.with_format(None).select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    paths: list[str | None] = []
    keys: list[bytes] = []
    for batch in images.iter(ROWS_PER_BATCH):
        for image in batch["image"]:
            paths.append(image and image["path"])
            keys.append(_key_of(image))
    num_workers = _num_workers() if len(images) >= MIN_IMAGES_FOR_WORKERS else 0
    known = [row for row, key in enumerate(keys) if key != NO_KEY]

    def compute(places: list[int]) -> np.ndarray:
        chosen = [known[place] for place in places]
        looks = zip(_look_at_all(images, chosen, num_workers), chosen, strict=True)
        # A file that has changed meanwhile has another key.
        return _as_array([look.facts if look.key == keys[row] else UNKNOWN for look, row in looks], len(UNKNOWN))

    facts = np.zeros((len(images), len(UNKNOWN)), dtype=np.uint8)
    if known:
        facts[known] = stored_rows(
            _space(),
            as_keys(keys[row] for row in known),
            compute,
            dtype=np.uint8,
            chunk_rows=CHUNK_ROWS,
            description="checking images",
        )[...]
    faults: list[str | None] = [None] * len(images)
    unknown = np.flatnonzero(~facts.any(axis=1)).tolist()
    for row, look in zip(unknown, _look_at_all(images, unknown, num_workers), strict=True):
        faults[row], facts[row] = look.fault, np.frombuffer(look.facts, np.uint8)
    return ImageFacts(paths, faults, facts[:, :KEY_BYTES], np.unpackbits(facts[:, KEY_BYTES:], axis=1).view(bool))


def scan_readable(rows: Dataset) -> ImageFacts:
    """Find out what there is to know of images as `scan_images` does, all of which must be readable.

    Raises:
        ImageError: an image cannot be read; the message names it by path, address, `image_id` or row, and says why.
    """
    facts = scan_images(rows)
    for row, (path, fault) in enumerate(zip(facts.paths, facts.faults, strict=True)):
        if fault is not None:
            name = f"image_id {rows[row]['image_id']}" if "image_id" in rows.column_names else f"row {row + 1}"
            raise ImageError(f"{path or name}: {fault}")
    return facts


def check_pixels(image: Image.Image, expected: np.ndarray, name: str) -> None:
    """Check that an image still has the pixels that a scan found: what is computed from it is kept under their digest.

    Raises:
        ImageError: it has changed; the message begins with `name`.
    """
    if _digest_pixels(image) != expected.tobytes():
        raise ImageError(f"{name}: has changed since it was scanned; start again when nothing changes the images")


def _digest_pixels(image: Image.Image) -> bytes:
    pixels = hashlib.blake2b(f"{image.width}x{image.height} ".encode(), digest_size=KEY_BYTES)
    pixels.update(image.tobytes())
    return pixels.digest()


def _space() -> dict[str, str]:
    """Return what facts depend on besides an image's bytes."""
    try:
        heif = version("pillow-heif")  # not whether it is registered, which happens at the first image that needs it
    except PackageNotFoundError:
        heif = ""
    return {
        "kind": "facts of images",
        "policy": POLICY,
        "pillow": PIL.__version__,
        "heif": heif,
        "formats": " ".join([*FORMATS, *features.get_supported_codecs(), *features.get_supported_modules()]),
        "imagehash": imagehash.__version__,
    }


def _key_of(image: Any) -> bytes:
    """Return the key of an image's facts: if its content changes, so does its key."""
    if image and image["bytes"] is not None:
        return digest(image["bytes"])
    try:
        status = os.stat(image["path"])
    except (OSError, ValueError, TypeError):  # ValueError: a zero byte in the path; TypeError: no image, or no path
        return NO_KEY
    if status.st_ctime_ns >= time.time_ns() - DOUBTFUL_NS:  # the system's; archives set st_mtime to any time
        return NO_KEY
    facts = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return digest(os.path.abspath(image["path"]), repr(facts))


def _as_array(rows: Sequence[bytes], num_bytes: int) -> np.ndarray:
    return np.frombuffer(b"".join(rows), np.uint8).reshape(-1, num_bytes)


def _look_at_each(examples: Sequence[dict[str, Any]]) -> list[_Look]:
    looks = []
    for example in examples:
        try:
            image = read_image(example["image"])
        except ImageError as error:
            looks.append(_Look(str(error), UNKNOWN, NO_KEY))
            continue
        facts = _digest_pixels(image) + np.packbits(imagehash.phash(image).hash).tobytes()
        looks.append(_Look(None, facts, _key_of(example["image"])))
    return looks


def _look_at_all(images: Dataset, rows: list[int], num_workers: int) -> list[_Look]:
    """Look at the images in some rows, in this order; where there are workers, one that ends its process costs itself.

    Workers come by fork only, which takes a tenth of a second. Where there is none, a process would first import all
    that this one has, and run a script that does not guard its main part again; there, this process does all the work.
    """
    if num_workers == 0:
        return [look for row in rows for look in _look_at_each([images[row]])]

    def load(rows: list[int], batch_size: int, num_workers: int) -> DataLoader:
        return DataLoader(
            images,
            batch_size,
            sampler=rows,
            num_workers=num_workers,
            collate_fn=_look_at_each,
            prefetch_factor=TASKS_PER_WORKER,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # else the numbers that training draws would depend on what was known before
        )

    looks: list[_Look] = []
    while len(looks) < len(rows):
        try:
            for batch in load(rows[len(looks) :], IMAGES_PER_TASK, num_workers):
                looks += batch
        except RuntimeError:  # by torch: a worker has died of one of the images that were on their way
            num_on_their_way = num_workers * TASKS_PER_WORKER * IMAGES_PER_TASK
            for row in rows[len(looks) :][:num_on_their_way]:
                try:
                    ((look,),) = load([row], batch_size=1, num_workers=1)
                except RuntimeError:
                    look = _Look("ends the process that reads it", UNKNOWN, NO_KEY)
                looks.append(look)
    return looks


def _num_workers() -> int:
    return min(MAX_WORKERS, len(os.sched_getaffinity(0))) if sys.platform == "linux" else 0
