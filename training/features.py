"""What frozen parts of the towers make of a data set, computed once and kept on disk.

A frozen tower in eval mode gives the same output for the same image or caption in every epoch. Computing it once turns
an hour of training into minutes. The rest then trains on exactly the vectors it would have seen; augmentation becomes
a fixed number of views of each image.

The arrays are memory-mapped and resumable. The folder of each is named by a hash of what it depends on, so that other
data, weights or transforms find another folder: nothing has to be invalidated, and nothing is ever overwritten.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from numpy.typing import DTypeLike
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BatchEncoding, PretrainedConfig

from clipmini.data.augment import ImageAugmenter
from clipmini.data.pairs import PairDataset
from clipmini.files import cache_root
from clipmini.inference.encode import run_texts
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.encoding_clipmini import eval_mode
from modeling_clipmini.images_clipmini import read_named

from .arguments import ClipMiniTrainingArguments
from .batches import draw_seed
from .stages import FrozenStages, num_stages

logger = logging.getLogger(__name__)

ROWS_PER_BATCH = 1000
MAX_COMBINED_BYTES = 2**30  # arrow's usual offsets end at 2**31


def cached_array(
    folder: Path,
    key: Mapping[str, str],
    shape: tuple[int, ...],
    dtype: DTypeLike,
    compute: Callable[[int, int], np.ndarray],
    chunk_rows: int,
    description: str,
) -> np.ndarray:
    """Open an array from the cache; compute what is not there yet.

    The array lies in a subfolder of `folder` that the key, the shape and the dtype name. A run that is killed at any
    moment loses the chunk it was at, and the next run goes on from there. Of several processes that want the same
    array one computes it, and the others wait. An array that is truncated, or whose header or progress marker cannot
    be read, is computed anew, with a warning; changed numbers inside it are not noticed.

    Args:
        folder: the cache; made if it does not exist.
        key: everything that the numbers depend on, as names and values: hashes of data and weights, settings.
        shape: of the whole array; no side is 0.
        dtype: what the rows are stored as.
        compute: `compute(start, stop)` returns rows [start, stop), of shape (stop - start, *shape[1:]).
        chunk_rows: rows to compute and to store at once, at least 1. It is no part of the key.
        description: what the array is, for the progress bar and the log.

    Returns:
        The array, read-only and memory-mapped: its pages are read when they are used.

    Raises:
        ValueError: the folder cannot be written, or the disk has too little room.
    """
    assert min(shape) > 0, f"{description}: an array of shape {shape} has nothing to cache"
    dtype = np.dtype(dtype)
    identity = {"key": dict(key), "shape": list(shape), "dtype": dtype.str}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    store = _Store(folder / hashlib.sha256(canonical.encode()).hexdigest()[:20], shape, dtype, description)
    # without the lock, so that an array that is complete can also be used where nothing may be written
    if store.is_complete():
        logger.info("%s: reused from %s", description, store.place)
        return store.open()
    store.make_folder()
    lock = FileLock(store.place / "lock")  # the system releases it when its owner is killed
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        logger.info("%s: another process is computing it; waiting for %s", description, store.place)
        held = lock.acquire()
    with held:
        done = store.rows_done()
        if done == 0:
            store.delete()
        store.check_room(done)
        if done == 0:
            store.create(json.dumps(identity, indent=2, sort_keys=True) + "\n")
        action = {0: "computing into", shape[0]: "reused from"}.get(done, f"resumed at row {done} in")
        logger.info("%s: %s %s", description, action, store.place)
        _fill(store, done, compute, chunk_rows)
    return store.open()


@dataclass(frozen=True)
class _Store:
    """An array on disk: `array.npy`, `key.json` for people to read, and `progress.json` that counts the rows done."""

    place: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    description: str

    @property
    def data(self) -> Path:
        return self.place / "array.npy"

    @property
    def marker(self) -> Path:
        return self.place / "progress.json"

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def open(self) -> np.memmap:
        """Map the array for reading; a file that is too short is a ValueError."""
        array = np.lib.format.open_memmap(self.data, mode="r")
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(f"it holds {array.dtype} {array.shape}, not {self.dtype} {self.shape}")
        return array

    def is_complete(self) -> bool:
        try:
            return self._read_progress() == self.shape[0]
        except Exception:
            return False  # whoever holds the lock looks closer, and warns

    def rows_done(self) -> int:
        """Count the rows that need no computing; what is damaged is reported, and counts for nothing."""
        if not self.marker.exists() and not self.data.exists():
            return 0
        try:
            return self._read_progress()
        except Exception as error:  # numpy raises nearly anything for a damaged header
            logger.warning(
                "%s: %s is incomplete or damaged (%s: %s); it is computed anew",
                *(self.description, self.place, type(error).__name__, error),
            )
            return 0

    def _read_progress(self) -> int:
        done = json.loads(self.marker.read_text(encoding="utf-8"))["rows"]
        if type(done) is not int or not 0 <= done <= self.shape[0]:
            raise ValueError(f"{done!r} rows of {self.shape[0]} are said to be done")
        if done:  # 0 is written before the array is created
            self.open()
        return done

    def make_folder(self) -> None:
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.place, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            raise ValueError(
                f"{self.description}: cannot write to {self.place}: "
                "set the environment variable CLIPMINI_CACHE to a folder that can be written."
            )

    def check_room(self, done: int) -> None:
        """Refuse to begin what the disk cannot hold: the file is sparse, so that creating it would not fail."""
        needed = (self.shape[0] - done) * self.row_bytes
        free = shutil.disk_usage(self.place).free
        if needed > free:
            raise ValueError(
                f"{self.description}: the cache needs {tqdm.format_sizeof(needed, 'B')} in {self.place}, and "
                f"{tqdm.format_sizeof(free, 'B')} are free: make room, or set the environment variable "
                "CLIPMINI_CACHE to a folder on a larger disk."
            )

    def delete(self) -> None:
        """Make way for a new array; the old one is not overwritten, since another process may be reading it."""
        self.marker.unlink(missing_ok=True)
        self.data.unlink(missing_ok=True)

    def create(self, readable_key: str) -> None:
        _replace(self.place / "key.json", readable_key)
        self.mark_done(0)
        np.lib.format.open_memmap(self.data, mode="w+", dtype=self.dtype, shape=self.shape)

    def write(self, start: int, rows: np.ndarray) -> None:
        """Store rows, and return once they are on the disk.

        By file, not through the map: a disk that fills up is an OSError this way, and would kill the process that way.
        """
        with self.data.open("r+b") as file:
            file.seek(self.open().offset + start * self.row_bytes)
            file.write(rows.data)
            file.flush()
            os.fsync(file.fileno())

    def mark_done(self, rows: int) -> None:
        _replace(self.marker, json.dumps({"rows": rows}))


def _replace(path: Path, text: str) -> None:
    """Write a small file so that it holds the old text or the new one, whatever happens."""
    beside = path.with_suffix(".partial")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _fill(store: _Store, done: int, compute: Callable[[int, int], np.ndarray], chunk_rows: int) -> None:
    assert chunk_rows > 0
    num_rows = store.shape[0]
    if done == num_rows:
        return
    with tqdm(total=num_rows, initial=done, desc=store.description, unit="row", leave=False) as progress:
        for start in range(done, num_rows, chunk_rows):
            stop = min(start + chunk_rows, num_rows)
            rows = np.ascontiguousarray(compute(start, stop), dtype=store.dtype)
            assert rows.shape == (stop - start, *store.shape[1:]), f"rows {start} to {stop} have shape {rows.shape}"
            store.write(start, rows)
            store.mark_done(stop)
            progress.update(stop - start)


def hash_weights(module: nn.Module) -> str:
    """Hash a module's state: names, shapes, dtypes and values of parameters and buffers.

    What is in no state dict, such as strides and activation functions, has no part in it: the architecture's name
    belongs in the key too. Device and memory format do not matter.

    Args:
        module: the module.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_rows(pairs: Dataset, columns: Sequence[str] = ("image", "captions", "image_id")) -> str:
    """Hash the content of a pair data set, row by row in its order.

    Selected, shuffled and sorted data sets differ where their rows do; where the rows lie, and in what pieces, does
    not matter. Of an image that is given as bytes, the bytes are hashed. Of one that is given as a path, the path and
    the file's size and time of change are: reading every file at every start would cost as much as what the cache
    saves. What stands at a URL is taken not to change.

    Args:
        pairs: the data set, as `load_pairs` gives it.
        columns: the columns that matter.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        ValueError: a column is missing or of a kind that cannot be hashed, or an image's file cannot be read.
    """
    hashers: defaultdict[str, Any] = defaultdict(hashlib.sha256)
    for table in pairs.select_columns(list(columns)).with_format("arrow").iter(ROWS_PER_BATCH):
        if table.nbytes < MAX_COMBINED_BYTES:
            table = table.combine_chunks()  # of a shuffled data set every row is a chunk
        for name in columns:
            for chunk in table[name].chunks:
                if pa.types.is_struct(chunk.type) and {field.name for field in chunk.type} == {"bytes", "path"}:
                    _hash_images(hashers, name, chunk)
                else:
                    _hash_array(hashers, name, chunk)
    summary = {name: hasher.hexdigest() for name, hasher in hashers.items()}
    return hashlib.sha256(json.dumps([len(pairs), summary], sort_keys=True).encode()).hexdigest()


def _hash_images(hashers: Mapping[str, Any], name: str, images: pa.StructArray) -> None:
    data, paths = (pc.struct_field(images, part) for part in ("bytes", "path"))
    _hash_array(hashers, f"{name}.bytes", data)
    for path in paths.filter(data.is_null()).to_pylist():
        hashers[f"{name}.files"].update(json.dumps([path, *_file_stamp(path)]).encode())


def _file_stamp(path: str | None) -> tuple[int, ...]:
    if path is None or "://" in path:
        return ()
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(
            f"The image {path} cannot be read ({error.strerror}): load the data again, it will be left out."
        ) from None
    return status.st_size, status.st_mtime_ns


def _hash_array(hashers: Mapping[str, Any], name: str, array: pa.Array) -> None:
    """Add an array to the running hashes of its lengths and of its values.

    They are kept apart because each is a plain stream then, which does not depend on where the column was cut.
    """
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        _hash_array(hashers, f"{name}.length", pc.list_value_length(array).cast(pa.int64()))
        _hash_array(hashers, f"{name}.item", array.flatten())
    elif pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind):
        _hash_array(hashers, name, array.cast(pa.large_binary()))
    elif pa.types.is_large_binary(kind):
        _hash_array(hashers, f"{name}.length", pc.binary_length(array))
        present = array.drop_null()  # what stands under a null is undefined
        _, offsets, data = present.buffers()
        if data is not None:  # else all are empty
            bounds = np.frombuffer(offsets, np.int64)[present.offset : present.offset + len(present) + 1]
            hashers[name].update(memoryview(data)[bounds[0] : bounds[-1]])
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        hashers[f"{name}.valid"].update(array.is_valid().to_numpy(zero_copy_only=False))
        hashers[name].update(array.drop_null().to_numpy())
    else:
        raise ValueError(f"Column {name!r} is {kind}, which cannot be hashed; leave it out of `columns`.")


# Rows that a killed run may have to compute again, and steps of the progress bar: two or three seconds each.
IMAGE_CHUNK, CAPTION_CHUNK = 256, 1024
IGNORED_CONFIG_KEYS = ("_name_or_path", "architectures", "dtype", "transformers_version")


class TowerFeatures:
    """Decides what of a model can be computed once, under some training arguments, and has it computed.

    Args:
        model: with frozen what is to be frozen.
        processor: the model's processor.
        args: `freeze_vision`, `freeze_text`, `vision_stages`, `augment`, `cache_features`, ...

    Attributes:
        augmenter: makes the training views of an image; None where there is no augmentation.
        frozen_stages: the vision tower's frozen first stages, where only the last ones train and the architecture
            permits it.
    """

    def __init__(self, model: ClipMiniModel, processor: ClipMiniProcessor, args: ClipMiniTrainingArguments) -> None:
        self.model, self.processor, self.args = model, processor, args
        self.augmenter = self.frozen_stages = None
        augmentation = args.image_augmentation
        if augmentation is not None:
            self.augmenter = ImageAugmenter(processor.image_processor, augmentation)
        if args.cache_features and args.vision_stages is not None:
            timm_model = model.vision_model.timm_model
            if args.vision_stages < num_stages(timm_model):
                size = processor.image_processor.crop_size
                example = torch.rand(2, 3, size["height"], size["width"], device=model.device)
                self.frozen_stages = FrozenStages.find(timm_model, args.vision_stages, example)
                levels = model.config.vision_levels  # `find` has tried all else
                if self.frozen_stages is not None and levels and not self._resumes(self.frozen_stages, example):
                    logger.warning(
                        "vision_levels=%s needs feature maps from before the first trained stage, which are not kept: "
                        "the whole vision tower has to run at every step",
                        levels,
                    )
                    self.frozen_stages = None
        if args.num_views > 1 and not (args.cache_features and (args.freeze_vision or self.frozen_stages is not None)):
            logger.warning("num_views=%d has no effect: no part of the vision tower is cached", args.num_views)

    @torch.no_grad()
    def _resumes(self, frozen_stages: FrozenStages, example: Tensor) -> bool:
        """Tell whether activations give the pooled features that images give, `vision_levels` included."""
        with eval_mode(self.model):
            whole = self.model.pool_images(example)
            activation = frozen_stages.run(example)
            with frozen_stages.resuming():
                resumed = self.model.pool_images(activation)
        return resumed.shape == whole.shape and torch.allclose(resumed, whole, rtol=1e-5, atol=1e-5)

    def for_training(self, pairs: Dataset) -> PairDataset:
        """Give the pairs with features of the training views where the towers, or their first stages, are frozen."""
        return self._cached(pairs, self.augmenter, self.args.num_views)

    def for_evaluation(self, pairs: Dataset | PairDataset) -> PairDataset:
        """Give the pairs with features of the images as they are, where towers or their first stages are frozen."""
        return pairs if isinstance(pairs, PairDataset) else self._cached(pairs, None, 1)

    def _cached(self, pairs: Dataset, augment: ImageAugmenter | None, num_views: int) -> PairDataset:
        args = self.args
        images = texts = None
        with eval_mode(self.model):
            if args.cache_features and (args.freeze_vision or self.frozen_stages is not None):
                images = cache_image_features(
                    self.model,
                    self.processor,
                    pairs,
                    frozen_stages=self.frozen_stages,
                    augment=augment,
                    num_views=num_views,
                    batch_size=args.per_device_eval_batch_size,
                    num_workers=args.dataloader_num_workers,
                )
            if args.cache_features and args.freeze_text:
                texts = cache_text_features(
                    self.model,
                    self.processor,
                    pairs,
                    batch_size=8 * args.per_device_eval_batch_size,
                )
        return PairDataset(pairs, images, texts, frozen_stages=None if images is None else self.frozen_stages)


class _Views(torch.utils.data.Dataset):
    """The pixels of K views of each image: (K, 3, height, width)."""

    def __init__(
        self, pairs: Dataset, processor: ClipMiniProcessor, augment: ImageAugmenter | None, num_views: int
    ) -> None:
        self.pairs, self.processor, self.augment, self.num_views = pairs, processor, augment, num_views

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> Tensor:
        content = self.pairs[row]
        image = read_named(content["image"], f"image_id {content['image_id']}")
        if self.augment is None:
            return self.processor(images=[image])["pixel_values"]
        views = (self.augment(image, content["captions"], draw_seed(row, view)) for view in range(self.num_views))
        return torch.stack(list(views))


def cache_image_features(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    pairs: Dataset,
    *,
    frozen_stages: FrozenStages | None = None,
    augment: ImageAugmenter | None = None,
    num_views: int = 1,
    batch_size: int = 16,
    num_workers: int = 0,
) -> np.ndarray:
    """Run the vision tower, or its first stages, once over the images of a data set.

    Args:
        model: its vision tower in eval mode, as frozen towers are.
        processor: the model's processor.
        pairs: the data set, one row per image.
        frozen_stages: run these stages alone; None for the whole tower.
        augment: makes the views; None for one view, the processor's own.
        num_views: K.
        batch_size: images per forward.
        num_workers: processes that read images.

    Returns:
        (I, K, V) float32, or with `frozen_stages` (I, K, ...) float16, memory-mapped; computed now or by an earlier
        run with the same images, weights and views.
    """
    num_views = 1 if augment is None else num_views
    views = _Views(pairs, processor, augment, num_views)
    tower = model.vision_model if frozen_stages is None else nn.ModuleList(frozen_stages.modules.values())
    run: Callable[[Tensor], Tensor] = model.pool_images if frozen_stages is None else frozen_stages.run
    what = f"pooled outputs, levels {model.config.vision_levels}"
    key = {
        "what": what if frozen_stages is None else f"activations entering {frozen_stages.entry}",
        "data": hash_rows(pairs, ("image", "captions") if augment is not None else ("image",)),
        # The weights alone tell neither strides nor pooling.
        "weights": f"{_describe(model.config.vision_config)} {hash_weights(tower)}",
        "pixels": augment.describe() if augment is not None else str(processor.image_processor),
    }
    with torch.no_grad():
        example = run(views[0][:1].to(model.device))

    @torch.no_grad()
    def compute(start: int, stop: int) -> np.ndarray:
        rows = torch.utils.data.Subset(views, range(start, stop))
        loader = DataLoader(rows, batch_size=max(1, batch_size // num_views), num_workers=num_workers)
        results = []
        for batch in loader:
            # Convolutions run a quarter to a half faster so, on the CPU and under autocast on a GPU.
            pixels = batch.flatten(0, 1).to(model.device).contiguous(memory_format=torch.channels_last)
            results.append(run(pixels).float().cpu().unflatten(0, batch.shape[:2]))
        return torch.cat(results).numpy().astype(dtype)

    dtype = np.float32 if frozen_stages is None else np.float16
    shape = (len(pairs), num_views, *example.shape[1:])
    return cached_array(cache_root() / "features", key, shape, dtype, compute, IMAGE_CHUNK, "images")


def cache_text_features(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    pairs: Dataset,
    *,
    batch_size: int = 128,
) -> np.ndarray:
    """Run the text tower once over all captions of a data set.

    Args:
        model: its text tower in eval mode, as frozen towers are.
        processor: the model's processor.
        pairs: the data set, one row per image.
        batch_size: captions per forward.

    Returns:
        (T, W) float32, memory-mapped, image by image.
    """
    captions = PairDataset(pairs).captions
    key = {
        "what": f"{model.config.text_pooling}-pooled outputs",
        "tokens": _hash_tokens(processor, captions),
        "weights": f"{_describe(model.config.text_config)} {hash_weights(model.text_model)}",
    }

    def compute(start: int, stop: int) -> np.ndarray:
        def embed(inputs: BatchEncoding) -> Tensor:
            return model.pool_texts(**inputs.to(model.device))

        return run_texts(processor, captions[start:stop], embed, batch_size, show_progress=False).numpy()

    shape = (len(captions), model.config.text_config.hidden_size)
    return cached_array(cache_root() / "features", key, shape, np.float32, compute, CAPTION_CHUNK, "captions")


def _describe(config: PretrainedConfig) -> str:
    """Give a tower's config without what changes no output, such as where and by which version it was saved."""
    values = {name: value for name, value in config.to_dict().items() if name not in IGNORED_CONFIG_KEYS}
    return json.dumps(values, sort_keys=True, default=str)


def _hash_tokens(processor: ClipMiniProcessor, captions: list[str]) -> str:
    """Hash what the text tower sees, which covers captions and tokenizer at once."""
    digest = hashlib.sha256()
    for ids in processor.tokenizer(captions, truncation=True)["input_ids"]:
        digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
    return digest.hexdigest()
