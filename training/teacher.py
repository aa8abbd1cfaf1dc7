"""Embeddings of a larger image-text model, computed once, for the small one to learn from.

A student that copies how similar a teacher finds pictures and captions learns more from each pair than that they match
(TinyCLIP, Wu et al., 2023, arXiv:2309.12314; MobileCLIP, Vasu et al., 2024, arXiv:2311.17049). The teacher is too slow
to run at every step, so its embeddings go to a parquet file, a row per picture (E is the teacher's width):

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
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetDict
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor

from clipmini.inference.encode import load_model, read_named, run_images, run_texts
from modeling_clipmini import ClipMiniConfig
from modeling_clipmini.processing_clipmini import DEFAULT_MAX_TOKENS
from modeling_clipmini.towers_clipmini import normalise

from .duplicates import OWN_ID

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
    """Write a teacher's embeddings of all pictures and captions to a parquet file, as the module describes it.

    Args:
        model_name_or_path: a clipmini model, or any of transformers' own models with `get_image_features` and
            `get_text_features` (CLIP, SigLIP, ...): Hub id or folder.
        pairs: as `load_pairs` gives; the rows of all splits go to the one file.
        out: the file; it is written beside and renamed.
        batch_size: pictures per forward; captions go eight times as many at once.
        logit_scale: what to scale the teacher's similarities by, above 0; None for what it was trained with.
        overwrite: replace the file if it is there.

    Raises:
        ImageError: a picture cannot be read; the message names it.
        ValueError: the file is there, there are no pairs, or the teacher cannot be used.
    """
    splits = list(pairs.values()) if isinstance(pairs, DatasetDict) else [pairs]
    if out.exists() and not overwrite:
        raise ValueError(f"{out} is there already; pass --overwrite, or name another file.")
    if not any(map(len, splits)):
        raise ValueError("There are no pairs for the teacher to embed.")
    if logit_scale is not None and not (0 < logit_scale < math.inf):
        raise ValueError(f"logit_scale={logit_scale} must be a finite number above 0.")
    model, processor = _load_teacher(model_name_or_path)
    path = Path(model_name_or_path)
    about = {
        "name": path.resolve().name if path.exists() else str(model_name_or_path),
        "logit_scale": _trained_scale(model) if logit_scale is None else logit_scale,
    }
    tables = _embed(model, processor, splits, batch_size, {METADATA_KEY: json.dumps(about)})
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
            row: the picture's row in the data set.
            caption: which of its captions, from 0.

        Returns:
            (E,) of the picture and (E,) of the caption: float32, of length 1 to the precision of float16.
        """
        start, stop = self.caption_starts[row : row + 2]
        assert 0 <= caption < stop - start
        return self.images[row].float(), self.texts[start + caption].float()


def _load_teacher(name_or_path: str | Path) -> tuple[Any, Any]:
    """Load any dual encoder that needs no code of its own, in eval mode and float32, and its processor."""
    name = str(name_or_path)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.model_type == ClipMiniConfig.model_type:
            return load_model(name)
        loaded: Any = AutoModel.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")  # transformers adds a paragraph of advice
        raise ValueError(f"The teacher {name} cannot be loaded: {reason}.") from error
    model, info = loaded
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(
            f"The teacher {name} is a {type(model).__name__}, which does not embed both pictures and "
            "captions; name a dual encoder, such as CLIP, SigLIP or clipmini."
        )
    if info["missing_keys"]:
        raise ValueError(f"The teacher {name} lacks weights, among them {sorted(info['missing_keys'])[0]!r}.")
    inputs = getattr(getattr(processor, "image_processor", None), "model_input_names", None)
    if inputs != ["pixel_values"]:  # SigLIP 2 with free aspect ratios wants masks and shapes too
        raise ValueError(
            f"The teacher {name} has an image processor that makes {inputs}; name a model of pictures of one "
            "size, that takes pixel_values alone."
        )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor


def _trained_scale(model: Any) -> float:
    if isinstance(model.config, ClipMiniConfig):
        return model.get_logit_scale().item()
    if not isinstance(getattr(model, "logit_scale", None), Tensor):
        raise ValueError(f"A {type(model).__name__} has no logit scale of its own; pass --logit_scale.")
    return model.logit_scale.detach().exp().item()


def _embed(
    model: Any, processor: Any, splits: Sequence[Dataset], batch_size: int, metadata: dict[bytes, str]
) -> Iterator[pa.Table]:
    """Embed up to `ROWS_PER_GROUP` pictures, and all their captions, at a time."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", DEFAULT_MAX_TOKENS)
    # SigLIP was trained on captions padded to the full length, without a mask.
    is_siglip = "siglip" in model.config.model_type
    padding = {"padding": "max_length", "return_attention_mask": False} if is_siglip else {"padding": True}
    max_length = min(processor.tokenizer.model_max_length, longest)
    prepare_texts: Any = partial(processor, truncation=True, max_length=max_length, return_tensors="pt", **padding)
    prepare_images: Any = partial(processor, return_tensors="pt")

    def embed_images(pixel_values: Tensor) -> Tensor:
        return normalise(_features(model.get_image_features(pixel_values=pixel_values.to(model.device))))

    def embed_texts(inputs: Any) -> Tensor:
        return normalise(_features(model.get_text_features(**inputs.to(model.device))))

    with tqdm(total=sum(map(len, splits)), desc="teacher", unit="picture") as progress:
        for rows in itertools.chain.from_iterable(map(_in_groups, splits)):
            ids, captions = rows["image_id"][:], rows["captions"][:]
            pictures = (
                read_named(image, f"image_id {image_id}") for image, image_id in zip(rows["image"], ids, strict=True)
            )
            images = run_images(prepare_images, pictures, embed_images, batch_size)
            texts = run_texts(prepare_texts, list(itertools.chain(*captions)), embed_texts, 8 * batch_size)
            if images.shape[1] != texts.shape[1]:
                raise ValueError(
                    f"A {type(model).__name__} embeds pictures in {images.shape[1]} and captions in {texts.shape[1]} "
                    "dimensions; a teacher must put them into one space."
                )
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


def _features(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output  # transformers before 5, and from 5 on


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
    rows_of = defaultdict(list)  # several, where copies of a picture share an id
    for row, image_id in enumerate(stored["image_id"].to_pylist()):
        rows_of[image_id].append(row)
    places: dict[int, int] = {}
    ids = pairs[OWN_ID if OWN_ID in pairs.column_names else "image_id"]
    for place, (image_id, captions) in enumerate(zip(ids, pairs["captions"], strict=True)):
        own_hash = _hash(captions)
        rows = [row for row in rows_of[image_id] if hashes[row] == own_hash and row not in places]
        if not rows:
            fault = "was made from other captions of" if rows_of[image_id] else "has no embeddings of"
            raise ValueError(f"{path} {fault} image_id {image_id}; make it anew from this data with `clipmini teach`.")
        places[rows[0]] = place
    return places
