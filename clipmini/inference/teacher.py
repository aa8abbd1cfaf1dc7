"""Embeddings of a larger image-text model, computed once, for the small one to learn from.

A student that copies how similar a teacher finds images and captions learns more from each pair than that they match
(TinyCLIP, Wu et al., 2023, arXiv:2309.12314; MobileCLIP, Vasu et al., 2024, arXiv:2311.17049). The teacher is too slow
to run at every step, so its embeddings go to a parquet file, a row per image (E is the teacher's width):

    image_id           int64
    image_embedding    (E,) float16, of length 1
    text_embeddings    for each caption (E,) float16, of length 1, in the order of `captions`
    captions_hash      8 bytes; others than these captions are found out by it

Metadata of the schema name the teacher and its logit scale, as JSON under "clipmini_teacher".
"""

import hashlib
import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from tqdm.auto import tqdm

from clipmini.data.duplicates import ORIGINAL_ID
from modeling_clipmini.images_clipmini import read_named

from .encoders import DualEncoder, check_widths, load_encoder


@dataclass(frozen=True)
class Teacher:
    """A teacher to learn from.

    Attributes:
        file: what `embed_with_teacher` wrote.
        weight: share of the teacher's term in the loss, from 0 to 1.

    Raises:
        ValueError: the weight is out of range.
    """

    file: str
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"teacher.weight={self.weight:g} is not allowed; use a number from 0 to 1.")


METADATA_KEY = b"clipmini_teacher"
ROWS_PER_GROUP = 1024  # written, and later read, at once


def embed_with_teacher(
    model_name_or_path: str | Path,
    pairs: Dataset | DatasetDict,
    out: Path,
    batch_size: int = 16,
    logit_scale: float | None = None,
    overwrite: bool = False,
) -> None:
    """Write a teacher's embeddings of all images and captions to a parquet file, as the module describes it.

    Args:
        model_name_or_path: whatever `load_encoder` takes.
        pairs: as `load_pairs` gives; the rows of all splits go to the one file.
        out: the file; it is written beside and renamed.
        batch_size: images per forward; captions go eight times as many at once.
        logit_scale: what to scale the teacher's similarities by, above 0; None for what it was trained with.
        overwrite: replace the file if it is there.

    Raises:
        ImageError: an image cannot be read; the message names it.
        ValueError: the file is there, there are no pairs, or the teacher cannot be used.
    """
    splits = list(pairs.values()) if isinstance(pairs, DatasetDict) else [pairs]
    if out.exists() and not overwrite:
        raise ValueError(f"{out} is there already; pass --overwrite, or name another file.")
    if not any(map(len, splits)):
        raise ValueError("There are no pairs for the teacher to embed.")
    if logit_scale is not None and not (0 < logit_scale < math.inf):
        raise ValueError(f"logit_scale={logit_scale} must be a finite number above 0.")
    encoder = load_encoder(model_name_or_path)
    logit_scale = encoder.logit_scale if logit_scale is None else logit_scale
    if logit_scale is None:
        raise ValueError(
            f"{encoder.name} is of {encoder.kind} and has no logit scale of its own; pass --logit-scale, such as 50."
        )
    about = {"name": encoder.name, "logit_scale": logit_scale}
    tables = _embed(encoder, splits, batch_size, {METADATA_KEY: json.dumps(about)})
    first = next(tables)  # its schema has the teacher's width
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with pq.ParquetWriter(beside, first.schema) as writer:
            for table in itertools.chain([first], tables):
                writer.write_table(table)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)


@dataclass
class TeacherEmbeddings:
    """A teacher's embeddings of a data set, in the order of its rows; in memory, 2 E bytes each.

    Attributes:
        images: (I, E) float16.
        texts: (T, E) float16, all captions image by image.
        caption_starts: the place in `texts` of each row's first caption, and T at the end.
        logit_scale: the teacher's inverse temperature.
    """

    images: Tensor
    texts: Tensor
    caption_starts: list[int]
    logit_scale: float

    @classmethod
    def load(cls, path: Path, pairs: Dataset) -> Self:
        """Read the embeddings of some or all of the pairs that a file was made from.

        Args:
            path: what `embed_with_teacher` wrote.
            pairs: the data set, with `image_id` and `captions` as they were then; the order of rows may be another.

        Returns:
            The embeddings, in the order of `pairs`.

        Raises:
            ValueError: the file is missing or no such file, or lacks an image with these captions.
        """
        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"The teacher's embeddings {path} cannot be read: {error}") from error
        with file:
            about = (file.schema_arrow.metadata or {}).get(METADATA_KEY)
            if about is None:
                raise ValueError(f"{path} does not hold a teacher's embeddings; make it with `clipmini teach`.")
            places = _find_rows(file, pairs, path)
            starts = [0, *itertools.accumulate(len(captions) for captions in pairs["captions"])]
            width = file.schema_arrow.field("image_embedding").type.list_size
            images = np.empty((len(pairs), width), dtype=np.float16)
            texts = np.empty((starts[-1], width), dtype=np.float16)
            first = 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["image_embedding", "text_embeddings"]).combine_chunks()
                group_images = _matrix(table["image_embedding"].chunk(0), width)
                group_texts = table["text_embeddings"].chunk(0)
                ends = np.cumsum(group_texts.value_lengths())
                group_texts = _matrix(group_texts.flatten(), width)
                for row, end in enumerate(ends):
                    place = places.get(first + row)
                    if place is not None:
                        start, stop = starts[place], starts[place + 1]
                        images[place] = group_images[row]
                        texts[start:stop] = group_texts[end - (stop - start) : end]
                first += len(ends)
        return cls(torch.from_numpy(images), torch.from_numpy(texts), starts, float(json.loads(about)["logit_scale"]))

    def rows(self, row: int, caption: int) -> tuple[Tensor, Tensor]:
        """Give the embeddings of a pair.

        Args:
            row: the image's row in the data set.
            caption: which of its captions, from 0.

        Returns:
            (E,) of the image and (E,) of the caption: float32, of length 1 to the precision of float16.
        """
        start, stop = self.caption_starts[row : row + 2]
        assert 0 <= caption < stop - start
        return self.images[row].float(), self.texts[start + caption].float()


def _embed(
    encoder: DualEncoder, splits: Sequence[Dataset], batch_size: int, metadata: dict[bytes, str]
) -> Iterator[pa.Table]:
    """Embed up to `ROWS_PER_GROUP` images, and all their captions, at a time."""
    with tqdm(total=sum(map(len, splits)), desc="teacher", unit="image") as progress:
        for rows in itertools.chain.from_iterable(map(_in_groups, splits)):
            ids, captions = rows["image_id"][:], rows["captions"][:]
            opened = (
                read_named(image, f"image_id {image_id}") for image, image_id in zip(rows["image"], ids, strict=True)
            )
            images = encoder.encode_images(opened, batch_size)
            texts = encoder.encode_texts(list(itertools.chain(*captions)), 8 * batch_size)
            check_widths(encoder, images, texts)
            offsets = pa.array([0, *itertools.accumulate(map(len, captions))], pa.int32())
            columns = {
                "image_id": pa.array(ids, pa.int64()),
                "image_embedding": _vectors(images),
                "text_embeddings": pa.ListArray.from_arrays(offsets, _vectors(texts)),
                "captions_hash": pa.array(map(_hash, captions), pa.binary(8)),
            }
            yield pa.table(columns, metadata=metadata)
            progress.update(len(rows))


def _in_groups(split: Dataset) -> Iterator[Dataset]:
    for start in range(0, len(split), ROWS_PER_GROUP):
        yield split.select(range(start, min(start + ROWS_PER_GROUP, len(split))))


def _vectors(embeddings: Tensor) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(embeddings.half().numpy().ravel()), embeddings.shape[1])


def _matrix(vectors: pa.FixedSizeListArray, width: int) -> np.ndarray:
    return vectors.flatten().to_numpy().reshape(-1, width)


def _hash(captions: Sequence[str]) -> bytes:
    return hashlib.blake2b(json.dumps(captions).encode(), digest_size=8).digest()


def _find_rows(file: pq.ParquetFile, pairs: Dataset, path: Path) -> dict[int, int]:
    """Find each row of a data set in the file: the file's row to the data set's."""
    stored = file.read(columns=["image_id", "captions_hash"])
    hashes = stored["captions_hash"].to_pylist()
    rows_of = defaultdict(list)  # several, where copies of an image share an id
    for row, image_id in enumerate(stored["image_id"].to_pylist()):
        rows_of[image_id].append(row)
    places: dict[int, int] = {}
    ids = pairs[ORIGINAL_ID if ORIGINAL_ID in pairs.column_names else "image_id"]
    for place, (image_id, captions) in enumerate(zip(ids, pairs["captions"], strict=True)):
        own_hash = _hash(captions)
        rows = [row for row in rows_of[image_id] if hashes[row] == own_hash and row not in places]
        if not rows:
            fault = "was made from other captions of" if rows_of[image_id] else "has no embeddings of"
            raise ValueError(f"{path} {fault} image_id {image_id}; make it anew from this data with `clipmini teach`.")
        places[rows[0]] = place
    return places
