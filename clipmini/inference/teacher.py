"""Embeddings of a larger image-text model, computed once, for the small one to learn from.

A student that copies how similar a teacher finds images and captions learns more from each pair than whether they
match (TinyCLIP, Wu et al., 2023, arXiv:2309.12314; MobileCLIP, Vasu et al., 2024, arXiv:2311.17049). The teacher is
too slow to run at every step, so its embeddings are kept in a parquet file with one row per image (E is the width of
the teacher's embeddings):

    image_id           int64
    image_embedding    (E,) float16, of length 1
    text_embeddings    for each caption (E,) float16, of length 1, in the order of `captions`
    captions_hash      8 bytes, to detect that captions have changed

The schema's metadata hold the teacher's name and logit scale, as JSON under "clipmini_teacher".
"""

import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from clipmini.data.pairs import PairDataset
from clipmini.data.scan import check_pixels, read_columns, scan_readable
from clipmini.files import atomic_write
from clipmini.names import check_utf8
from clipmini.store import StoredRows, as_keys, digest, stored_rows
from modeling_clipmini.images_clipmini import read_named

from .embed import describe_libraries, hash_weights
from .encoders import load_encoder


@dataclass(frozen=True)
class Teacher:
    """A teacher to learn from.

    Attributes:
        file: a file that `embed_with_teacher` wrote.
        weight: weight of the teacher's term in the loss, from 0 to 1.

    Raises:
        ValueError: the weight is out of range.
    """

    file: str
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"teacher.weight={self.weight:g} is not allowed; use a number from 0 to 1.")


METADATA_KEY = b"clipmini_teacher"
ROWS_PER_CHUNK = 1024  # images or captions that are embedded and kept at once, and images that are written


def embed_with_teacher(
    model_name_or_path: str | Path,
    pairs: Dataset,
    out: Path,
    logit_scale: float | None = None,
    overwrite: bool = False,
) -> None:
    """Write a teacher's embeddings of all images and captions to a parquet file; the module describes its format.

    Args:
        model_name_or_path: any model that `load_encoder` takes.
        pairs: a split, or several concatenated, as `load_pairs` returns them.
        out: the file; it appears only when it is complete.
        logit_scale: factor for the teacher's similarities, above 0; None for the one it was trained with.
        overwrite: replace the file if it exists.

    Raises:
        ImageError: an image cannot be read; the message names it.
        ValueError: the file exists, there are no pairs, or the teacher cannot be used.
    """
    check_utf8(str(out))
    if out.exists() and not overwrite:
        raise ValueError(f"{out} already exists; pass --overwrite, or choose another file.")
    if not len(pairs):
        raise ValueError("There are no pairs for the teacher to embed.")
    if logit_scale is not None and not (0 < logit_scale < math.inf):
        raise ValueError(f"logit_scale={logit_scale} must be a finite number above 0.")
    encoder = load_encoder(model_name_or_path)
    logit_scale = encoder.logit_scale if logit_scale is None else logit_scale
    pixels = scan_readable(pairs).pixels
    captions = PairDataset(pairs).captions
    space = {
        "weights": hash_weights(encoder.model),
        "architecture": digest(f"{encoder.model!r} {getattr(encoder.model, 'config', '')}").hex(),
        "libraries": describe_libraries(),
        "preparation": encoder.describe(),
    }

    def open_image(index: int) -> Image.Image:
        name = f"image_id {pairs[index]['image_id']}"
        image = read_named(pairs[index]["image"], name)
        check_pixels(image, pixels[index], name)
        return image

    def embed_images(indices: list[int]) -> np.ndarray:
        return encoder.encode_images(map(open_image, indices)).numpy()

    def embed_texts(indices: list[int]) -> np.ndarray:
        return encoder.encode_texts([captions[index] for index in indices]).numpy()

    def store(kind: str, keys: np.ndarray, compute: Callable[[list[int]], np.ndarray]) -> StoredRows:
        whole = {"kind": f"teacher, {kind}", **space}
        return stored_rows(
            whole, keys, compute, dtype=np.float16, chunk_rows=ROWS_PER_CHUNK, description=whole["kind"]
        )

    images = store("images", pixels, embed_images)
    texts = store("captions", as_keys(map(digest, captions)), embed_texts)
    _write(out, pairs, images, texts, {"name": encoder.name, "logit_scale": logit_scale})


def _write(out: Path, rows: Dataset, images: StoredRows, texts: StoredRows, about: dict[str, Any]) -> None:
    """Write the file, some rows at a time, whole or not at all."""
    vector = pa.list_(pa.float16(), images.shape[1])
    schema = pa.schema(
        {
            "image_id": pa.int64(),
            "image_embedding": vector,
            "text_embeddings": pa.list_(vector),
            "captions_hash": pa.binary(8),
        },
        metadata={METADATA_KEY: json.dumps(about)},
    )
    starts = PairDataset(rows).caption_starts
    with atomic_write(out) as temporary_path, pq.ParquetWriter(temporary_path, schema) as writer:
        for start in range(0, len(rows), ROWS_PER_CHUNK):
            stop = min(start + ROWS_PER_CHUNK, len(rows))
            part, bounds = rows[start:stop], itertools.pairwise(starts[start : stop + 1])
            columns = {
                "image_id": part["image_id"],
                "image_embedding": list(images[start:stop]),
                "text_embeddings": [list(texts[first:last]) for first, last in bounds],
                "captions_hash": list(map(_hash, part["captions"])),
            }
            writer.write_table(pa.table(columns, schema=schema))


@dataclass
class TeacherEmbeddings:
    """A teacher's embeddings of a data set, in the order of its rows, in memory: 2 E bytes per image and caption.

    Attributes:
        images: (I, E) float16.
        texts: (T, E) float16, all captions image by image.
        caption_starts: (I + 1,) the index in `texts` of the first caption of each row, and T.
        logit_scale: the teacher's inverse temperature.
    """

    images: Tensor
    texts: Tensor
    caption_starts: np.ndarray
    logit_scale: float

    @classmethod
    def load(cls, path: Path, pairs: Dataset) -> Self:
        """Read the embeddings of some or all of the pairs that a file was made from.

        Args:
            path: a file that `embed_with_teacher` wrote.
            pairs: with the same `image_id` and `captions` as then, in any order, which the embeddings follow.

        Raises:
            ValueError: the file is missing or of another kind, or lacks an image with these captions.
        """
        try:
            with pq.ParquetFile(path) as file:
                table = file.read()
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"The teacher's embeddings {path} cannot be read: {error}") from error
        about = (table.schema.metadata or {}).get(METADATA_KEY)
        if about is None:
            raise ValueError(f"{path} does not hold a teacher's embeddings; make it with `clipmini teach`.")
        found = table.select(["image_embedding", "text_embeddings"]).take(_find_rows(table, pairs, path))
        return cls(
            images=_to_tensor(found["image_embedding"]),
            texts=_to_tensor(pc.list_flatten(found["text_embeddings"])),
            caption_starts=PairDataset(pairs).caption_starts,
            logit_scale=float(json.loads(about)["logit_scale"]),
        )

    def rows(self, row: int, caption: int) -> tuple[Tensor, Tensor]:
        """Return the embeddings of a pair, by its row and the number of the caption among the row's.

        Returns:
            (E,) of the image and (E,) of the caption: float32, of length 1 to the precision of float16.
        """
        start, stop = self.caption_starts[row : row + 2]
        assert 0 <= caption < stop - start
        return self.images[row].float(), self.texts[start + caption].float()


def _to_tensor(vectors: pa.ChunkedArray) -> Tensor:
    return torch.tensor(pc.list_flatten(vectors).to_numpy()).view(-1, vectors.type.list_size)


def _hash(captions: Sequence[str]) -> bytes:
    return hashlib.blake2b(json.dumps(captions).encode(), digest_size=8).digest()


def _find_rows(stored: pa.Table, pairs: Dataset, path: Path) -> list[int]:
    """Return the row in the file of each row of a data set."""
    unused = defaultdict(list)  # several rows if image ids repeat
    for row, key in enumerate(zip(stored["image_id"].to_pylist(), stored["captions_hash"].to_pylist(), strict=True)):
        unused[key].append(row)
    known_ids = {image_id for image_id, _ in unused}
    rows = []
    columns = read_columns(pairs, "image_id", "captions")
    for image_id, captions in zip(columns["image_id"].to_pylist(), columns["captions"].to_pylist(), strict=True):
        candidates = unused[image_id, _hash(captions)]
        if not candidates:
            fault = "was made from other captions of" if image_id in known_ids else "has no embeddings of"
            raise ValueError(f"{path} {fault} image_id {image_id}; make it from this data with `clipmini teach`.")
        rows.append(candidates.pop(0))
    return rows
