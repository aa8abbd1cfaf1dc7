"""Outputs of frozen parts of the towers, computed once for a data set and kept on disk.

In eval mode, a frozen tower has the same output for an image or a caption in every epoch. Computing it once turns an
hour of training into minutes, and the rest of the model trains on exactly the vectors it would have seen. Augmentation
becomes a fixed number of views of each image.

Arrays are memory-mapped and resumable. The folder of an array is named by a hash of everything that the array depends
on, so other data, weights or transforms use another folder: nothing has to be invalidated, and nothing is overwritten.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
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
from .stages import FrozenStages, stage_parts

logger = logging.getLogger(__name__)

ROWS_PER_BATCH = 100  # hashed at once; their images are in memory


def cached_array(
    folder: Path,
    key: Mapping[str, str],
    shape: tuple[int, ...],
    dtype: DTypeLike,
    compute: Callable[[int, int], np.ndarray],
    chunk_rows: int,
    description: str,
) -> np.ndarray:
    """Open an array from the cache, and compute the rows that it lacks.

    The array lies in a subfolder of `folder` whose name depends on key, shape and dtype. A run that is killed at any
    moment loses only its current chunk; the next run continues from there. If several processes want the same array,
    one computes it and the others wait. An array that is truncated, or whose header or progress file cannot be read,
    is computed again, with a warning; changed values inside it are not noticed.

    Args:
        folder: the cache; created if it does not exist.
        key: everything that the values depend on: hashes of data and weights, settings.
        shape: shape of the whole array; no dimension is 0.
        dtype: type in which the rows are stored.
        compute: `compute(start, stop)` returns rows [start, stop), of shape (stop - start, *shape[1:]).
        chunk_rows: number of rows to compute and store at once, at least 1; not part of the key.
        description: name of the array in the log and the progress bar.

    Returns:
        The array, read-only and memory-mapped.

    Raises:
        ValueError: the folder cannot be written, or the disk has too little room.
    """
    assert min(shape) > 0, f"{description}: an array of shape {shape} has nothing to cache"
    assert chunk_rows > 0
    dtype = np.dtype(dtype)
    identity = {"key": dict(key), "shape": list(shape), "dtype": dtype.str}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    array = _StoredArray(folder / hashlib.sha256(canonical.encode()).hexdigest()[:20], shape, dtype, description)
    # First without the lock: a complete array can then be used where nothing may be written.
    with contextlib.suppress(Exception):  # damage is reported below, by the process that holds the lock
        if array.rows_done() == shape[0]:
            logger.info("%s: reused from %s", description, array.folder)
            return array.open()
    array.make_folder()
    lock = FileLock(array.folder / "lock")  # the system releases it if its owner is killed
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        logger.info("%s: another process is computing it; waiting for %s", description, array.folder)
        held = lock.acquire()
    with held:
        try:
            done = array.rows_done()
        except Exception as error:  # numpy raises nearly anything for a damaged header
            logger.warning(
                "%s: %s is incomplete or damaged (%s: %s); it is computed again",
                *(description, array.folder, type(error).__name__, error),
            )
            done = 0
        array.prepare(done, json.dumps(identity, indent=2, sort_keys=True) + "\n")
        action = {0: "computing into", shape[0]: "reused from"}.get(done, f"resumed at row {done} in")
        logger.info("%s: %s %s", description, action, array.folder)
        if done < shape[0]:
            array.fill(done, compute, chunk_rows)
    return array.open()


@dataclass(frozen=True)
class _StoredArray:
    """An array on disk: `array.npy`, `key.json` for people to read, and `progress.json`, the number of rows done."""

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    description: str

    @property
    def data(self) -> Path:
        return self.folder / "array.npy"

    @property
    def progress(self) -> Path:
        return self.folder / "progress.json"

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def open(self) -> np.memmap:
        """Map the array for reading; raise ValueError if its file is too short or holds another array."""
        array = np.lib.format.open_memmap(self.data, mode="r")
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(f"it holds {array.dtype} {array.shape}, not {self.dtype} {self.shape}")
        return array

    def rows_done(self) -> int:
        """Return the number of rows that are stored; raise any kind of error if a file is damaged."""
        if not self.progress.exists() and not self.data.exists():
            return 0
        done = json.loads(self.progress.read_text(encoding="utf-8"))["rows"]
        if type(done) is not int or not 0 <= done <= self.shape[0]:
            raise ValueError(f"{done!r} of {self.shape[0]} rows are recorded as done")
        if done:  # 0 is recorded before the array is created
            self.open()
        return done

    def make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.folder, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            raise ValueError(
                f"{self.description}: cannot write to {self.folder}: "
                "set the environment variable CLIPMINI_CACHE to a writable folder."
            )

    def prepare(self, done: int, readable_key: str) -> None:
        """Check that the missing rows fit on the disk, and create the array if it has no rows yet."""
        if done == 0:  # a new file instead of an overwritten one: another process may be reading the old one
            self.progress.unlink(missing_ok=True)
            self.data.unlink(missing_ok=True)
        needed = (self.shape[0] - done) * self.row_bytes
        free = shutil.disk_usage(self.folder).free
        if needed > free:  # the file is sparse, so creating it would not fail
            raise ValueError(
                f"{self.description}: the cache needs {tqdm.format_sizeof(needed, 'B')} in {self.folder}, and "
                f"{tqdm.format_sizeof(free, 'B')} are free: make room, or set the environment variable "
                "CLIPMINI_CACHE to a folder on a larger disk."
            )
        if done == 0:
            _replace(self.folder / "key.json", readable_key)
            _replace(self.progress, json.dumps({"rows": 0}))
            np.lib.format.open_memmap(self.data, mode="w+", dtype=self.dtype, shape=self.shape)

    def fill(self, done: int, compute: Callable[[int, int], np.ndarray], chunk_rows: int) -> None:
        """Compute and store the rows from `done` on; a row is recorded as done once it is on the disk."""
        num_rows, first_byte = self.shape[0], self.open().offset
        with tqdm(total=num_rows, initial=done, desc=self.description, unit="row", leave=False) as bar:
            for start in range(done, num_rows, chunk_rows):
                stop = min(start + chunk_rows, num_rows)
                rows = np.ascontiguousarray(compute(start, stop), dtype=self.dtype)
                assert rows.shape == (stop - start, *self.shape[1:]), f"rows {start} to {stop} have shape {rows.shape}"
                # Not written through the map: there a full disk would kill the process; here it is an OSError.
                with self.data.open("r+b") as file:
                    file.seek(first_byte + start * self.row_bytes)
                    file.write(rows.data)
                    file.flush()
                    os.fsync(file.fileno())
                _replace(self.progress, json.dumps({"rows": stop}))
                bar.update(stop - start)


def _replace(path: Path, text: str) -> None:
    """Write a small file so that, whatever happens, it holds either the old text or the new one."""
    temporary_path = path.with_suffix(".partial")
    with temporary_path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary_path.replace(path)


def hash_weights(module: nn.Module) -> str:
    """Hash the state of a module: names, shapes, dtypes and values of parameters and buffers.

    The hash does not cover what a state dict lacks, such as strides and activation functions, so a cache key needs
    the architecture too. It does not depend on device or memory format.

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


def hash_rows(pairs: Dataset, columns: Sequence[str] = ("image", "captions")) -> str:
    """Hash the content of a pair data set, row by row.

    The hash depends on the order of the rows, but not on where or in how many pieces they are stored. An image given
    as bytes is hashed by its bytes; one given as a path, by the path and the size and modification time of the file:
    reading every file at every start would cost as much as the cache saves. The content behind a URL is assumed not to
    change.

    Args:
        pairs: the data set, as `load_pairs` returns it.
        columns: columns of images, texts or lists of texts.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        ValueError: a column is missing or of another type, or the file of an image cannot be read.
    """
    hashers: defaultdict[str, Any] = defaultdict(hashlib.sha256)
    for table in pairs.select_columns(list(columns)).with_format("arrow").iter(ROWS_PER_BATCH):
        for name in columns:
            _hash_values(hashers, name, table[name].to_pylist())
    summary = {name: hasher.hexdigest() for name, hasher in hashers.items()}
    return hashlib.sha256(json.dumps([len(pairs), summary], sort_keys=True).encode()).hexdigest()


def _hash_values(hashers: Mapping[str, Any], name: str, values: list[Any]) -> None:
    """Add values to the running hashes of their lengths and of their content.

    The two are kept apart because each is then a plain stream, which does not depend on where the column was cut. The
    names of the streams and their order are part of every cache key.
    """
    present = [value for value in values if value is not None]
    example = present[0] if present else b""
    if isinstance(example, dict) and example.keys() == {"bytes", "path"}:
        _hash_values(hashers, f"{name}.bytes", [image and image["bytes"] for image in values])
        for image in values:
            if image is None or image["bytes"] is None:
                path = image and image["path"]
                hashers[f"{name}.files"].update(json.dumps([path, *_file_stamp(path)]).encode())
        return
    if not isinstance(example, str | bytes | list):
        raise ValueError(
            f"Column {name!r} holds {type(example).__name__}, which cannot be hashed; leave it out of `columns`."
        )
    if isinstance(example, str):
        present = [text.encode() for text in present]
    hashers[f"{name}.length.valid"].update(bytes(value is not None for value in values))
    hashers[f"{name}.length"].update(np.array([len(value) for value in present], dtype=np.int64))
    if isinstance(example, list):
        _hash_values(hashers, f"{name}.item", list(chain.from_iterable(present)))
    else:
        hashers[name].update(b"".join(present))


def _file_stamp(path: str | None) -> tuple[int, ...]:
    if path is None or "://" in path:
        return ()
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(
            f"The image {path} cannot be read ({error.strerror}): load the data again, and it will be left out."
        ) from None
    return status.st_size, status.st_mtime_ns


# Rows that a killed run may have to compute again, and steps of the progress bar: two or three seconds each.
IMAGE_CHUNK, CAPTION_CHUNK = 256, 1024
IGNORED_CONFIG_KEYS = ("_name_or_path", "architectures", "dtype", "transformers_version")


class TowerFeatures:
    """Find out which outputs of a model's towers can be cached under some training arguments, and cache them.

    Args:
        model: the model, with its frozen parts already frozen.
        processor: the model's processor.
        args: `freeze_vision`, `freeze_text`, `vision_stages`, `augment`, `cache_features`, ...

    Attributes:
        augmenter: makes the training views of an image; None without augmentation.
        frozen_stages: the frozen first stages of the vision tower, if only its last stages train and the architecture
            can be split; else None.
    """

    def __init__(self, model: ClipMiniModel, processor: ClipMiniProcessor, args: ClipMiniTrainingArguments) -> None:
        self.model, self.processor, self.args = model, processor, args
        augmentation = args.image_augmentation
        self.augmenter = None if augmentation is None else ImageAugmenter(processor.image_processor, augmentation)
        self.frozen_stages = None
        if args.cache_features and args.vision_stages is not None:
            self.frozen_stages = self._find_frozen_stages(args.vision_stages)
        self._caches_images = args.cache_features and (args.freeze_vision or self.frozen_stages is not None)
        if args.num_views > 1 and not self._caches_images:
            logger.warning("num_views=%d has no effect: no part of the vision tower is cached", args.num_views)

    @torch.no_grad()
    def _find_frozen_stages(self, num_trainable_stages: int) -> FrozenStages | None:
        timm_model, levels = self.model.vision_model.timm_model, self.model.config.vision_levels
        if num_trainable_stages >= len(stage_parts(timm_model)):
            return None
        size = self.processor.image_processor.crop_size
        example = torch.rand(2, 3, size["height"], size["width"], device=self.model.device)
        frozen_stages = FrozenStages.find(timm_model, num_trainable_stages, example)
        if frozen_stages is None or not levels:
            return frozen_stages
        # `find` has compared the output of the timm model, but not the feature maps that `vision_levels` pools.
        with eval_mode(self.model):
            whole = self.model.pool_images(example)
            activation = frozen_stages.run(example)
            with frozen_stages.resuming():
                resumed = self.model.pool_images(activation)
        if resumed.shape == whole.shape and torch.allclose(resumed, whole, rtol=1e-5, atol=1e-5):
            return frozen_stages
        logger.warning(
            "vision_levels=%s needs feature maps from before the first trained stage, which are not kept: "
            "the whole vision tower has to run at every step",
            levels,
        )
        return None

    def for_training(self, pairs: Dataset) -> PairDataset:
        """Return the pairs, with cached features of their training views where towers or first stages are frozen."""
        return self._cache(pairs, self.augmenter, self.args.num_views)

    def for_evaluation(self, pairs: Dataset | PairDataset) -> PairDataset:
        """Return the pairs, with cached features of the unchanged images where towers or first stages are frozen."""
        return pairs if isinstance(pairs, PairDataset) else self._cache(pairs, None, 1)

    def _cache(self, pairs: Dataset, augment: ImageAugmenter | None, num_views: int) -> PairDataset:
        images = texts = None
        with eval_mode(self.model):
            if self._caches_images:
                images = self._image_features(pairs, augment, num_views)
            if self.args.cache_features and self.args.freeze_text:
                texts = self._text_features(pairs)
        return PairDataset(pairs, images, texts, self.frozen_stages)

    @torch.no_grad()
    def _image_features(self, pairs: Dataset, augment: ImageAugmenter | None, num_views: int) -> np.ndarray:
        """Run the vision tower, or its frozen stages, over K views of each image.

        Returns:
            (I, K, V) float32 pooled outputs, or (I, K, ...) float16 activations; memory-mapped.
        """
        model, args, stages = self.model, self.args, self.frozen_stages
        views = _Views(pairs, self.processor, augment, num_views)
        tower = model.vision_model if stages is None else nn.ModuleList(stages.modules.values())
        run: Callable[[Tensor], Tensor] = model.pool_images if stages is None else stages.run
        dtype = np.float32 if stages is None else np.float16
        outputs = f"pooled outputs, levels {model.config.vision_levels}"
        key = {
            "what": outputs if stages is None else f"activations entering {stages.entry}",
            "data": hash_rows(pairs, ("image",) if augment is None else ("image", "captions")),
            # The weights alone say nothing about strides and pooling.
            "weights": f"{_describe(model.config.vision_config)} {hash_weights(tower)}",
            "pixels": str(self.processor.image_processor) if augment is None else augment.describe(),
        }
        example = run(views[0][:1].to(model.device))

        def compute(start: int, stop: int) -> np.ndarray:
            loader = DataLoader(
                torch.utils.data.Subset(views, range(start, stop)),
                batch_size=max(1, args.per_device_eval_batch_size // num_views),
                num_workers=args.dataloader_num_workers,
            )
            results = []
            for batch in loader:
                # Convolutions run 25 to 50 % faster in this format, on the CPU and under autocast on a GPU.
                pixels = batch.flatten(0, 1).to(model.device).contiguous(memory_format=torch.channels_last)
                results.append(run(pixels).float().cpu().unflatten(0, batch.shape[:2]))
            return torch.cat(results).numpy().astype(dtype)

        shape = (len(pairs), num_views, *example.shape[1:])
        return cached_array(cache_root() / "features", key, shape, dtype, compute, IMAGE_CHUNK, "images")

    def _text_features(self, pairs: Dataset) -> np.ndarray:
        """Run the text tower over all captions; return (T, W) float32, memory-mapped, image by image."""
        model, processor = self.model, self.processor
        captions = PairDataset(pairs).captions
        key = {
            "what": f"{model.config.text_pooling}-pooled outputs",
            "tokens": _hash_tokens(processor, captions),
            "weights": f"{_describe(model.config.text_config)} {hash_weights(model.text_model)}",
        }

        def embed(inputs: BatchEncoding) -> Tensor:
            return model.pool_texts(**inputs.to(model.device))

        def compute(start: int, stop: int) -> np.ndarray:
            batch_size = 8 * self.args.per_device_eval_batch_size
            return run_texts(processor, captions[start:stop], embed, batch_size, show_progress=False).numpy()

        shape = (len(captions), model.config.text_config.hidden_size)
        return cached_array(cache_root() / "features", key, shape, np.float32, compute, CAPTION_CHUNK, "captions")


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


def _describe(config: PretrainedConfig) -> str:
    """Return a tower's config without keys that change no output, such as the version that saved it."""
    values = {name: value for name, value in config.to_dict().items() if name not in IGNORED_CONFIG_KEYS}
    return json.dumps(values, sort_keys=True, default=str)


def _hash_tokens(processor: ClipMiniProcessor, captions: list[str]) -> str:
    """Hash the tokens that the text tower sees, which covers captions and tokenizer at once."""
    digest = hashlib.sha256()
    for ids in processor.tokenizer(captions, truncation=True)["input_ids"]:
        digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
    return digest.hexdigest()
