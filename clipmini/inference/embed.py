"""Embed images and captions with a model, whatever library it comes from: images of a data set, files, captions."""

import ctypes
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import platform
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from clipmini.conversion import resolve_model
from clipmini.data.augment import describe_processor
from clipmini.data.images import Skipped
from clipmini.names import expand, first_sentence
from clipmini.store import digest
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.encoding_clipmini import by_length, embed_in_batches
from modeling_clipmini.images_clipmini import ImageError, read_image, read_named
from modeling_clipmini.modeling_clipmini import normalize

from .bank import Bank

logger = logging.getLogger(__name__)

NUM_THREADS = min(4, os.cpu_count() or 1)  # reading an image takes a tenth of the time that embedding it takes
NUM_AHEAD = 32  # images that threads prepare before the tower asks for them
# From glibc's malloc.h; mallopt(3) describes them.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
MIB = 2**20
# Workers take a tenth of a second to start. What they pass on lies in shared memory, of which a container may have no
# more than 64 MB.
MAX_WORKERS, NUM_PER_MESSAGE, MANY_IMAGES = 16, 4, 256


class DualEncoder:
    """Embed images and captions with a model and report progress; the model's mode stays.

    Args:
        model: a `ClipMiniModel` or `OnnxModel` with its processor.
        name: what results call it; see `load_encoder`.

    Attributes:
        bank: training captions and images to score without hubs; None where the model has none.
        weights_sha256: digest of the weights in the model's folder; None for a model that is loaded already.
        min_edge: pixels of an image's shorter edge that the processor needs, as in `read_image`; None for all.
    """

    bank: Bank | None = None

    def __init__(self, model: Any, name: str = "model") -> None:
        self.model, self.name = model, name
        self.weights_sha256: str | None = getattr(model, "weights_sha256", None)  # graphs say what weights they are of
        self.min_edge: int | None = model.processor.min_edge

    @property
    def device(self) -> torch.device:
        """Return the device that the model computes on."""
        return self.model.device

    @property
    def tokenizer(self) -> Any:
        """Return transformers' tokenizer of the model, which tells what texts it can read."""
        return self.model.processor.tokenizer

    @property
    def logit_scale(self) -> float:
        """Return the factor on similarities before a softmax, the inverse of the temperature."""
        return self.model.get_logit_scale().item()

    def describe(self) -> str:
        """Describe what embeddings depend on besides the weights: how images and captions are prepared."""
        processor = self.model.processor
        described = describe_processors(processor.image_processor, processor.tokenizer)
        return described + getattr(self.model, "quantization", "")

    def about(self) -> dict[str, str]:
        """Return the model's name, kind and, if known, the digest of its weights, as results record them."""
        digest = {"weights_sha256": self.weights_sha256} if self.weights_sha256 else {}
        return {"name": self.name, "kind": type(self.model).__name__, **digest}

    def encode_images(self, images: Iterable[Any], batch_size: int = 16) -> Tensor:
        """Embed images.

        Args:
            images: anything that `read_image` takes; read a few ahead.
            batch_size: images per forward pass.

        Returns:
            (I, D) float32 on the CPU, rows of length 1.

        Raises:
            ImageError: an image cannot be read; the message names it. `encode_files` leaves such images out.
            ValueError: the model does not embed images.
        """
        total = len(images) if isinstance(images, Sized) else None

        def prepare(index: int, image: Any) -> Any:
            return self.prepare_image(read_named(image, f"image {index + 1}", min_edge=self.min_edge))

        def prepared_images() -> Iterator[Any]:
            for prepared in prepare_ahead(prepare, images, self.device):
                if isinstance(prepared, ImageError):
                    raise prepared
                yield prepared

        return self._run(prepared_images(), self.model.embed_pixels, batch_size, total, "image")

    def encode_files(
        self, images: Sequence[str | Path | Image.Image], skipped: Skipped | None = None, batch_size: int = 16
    ) -> tuple[list[Path | Image.Image], Tensor]:
        """Embed image files or Pillow images, leaving out those that cannot be read.

        Args:
            images: read a few ahead.
            skipped: collects the files left out, a summary of which is logged at the end.
            batch_size: images per forward pass.

        Returns:
            The I images that could be read, in the order given, and their embeddings: (I, D) float32 on the CPU, rows
            of length 1.

        Raises:
            ValueError: none of the files can be read, or one cannot and `skipped` is strict.
        """
        skipped = Skipped() if skipped is None else skipped
        kept: list[Path | Image.Image] = []
        sources = list(images)  # a column of a table is no sequence, and may begin with any number

        def prepared_files() -> Iterator[Any]:
            reason = "there is none"
            ahead = prepare_ahead(lambda _, image: self.prepare(image), sources, self.device)
            for index, (source, prepared) in enumerate(zip(sources, ahead, strict=True)):
                if isinstance(prepared, ImageError):
                    name = f"image {index + 1}" if isinstance(source, Image.Image) else str(source)
                    reason = f"{name} {prepared}"
                    skipped.add(name, str(prepared))
                else:
                    kept.append(source if isinstance(source, Image.Image) else Path(source))
                    yield prepared
            if not kept:
                raise ValueError(f"No image can be read: {reason}.")

        embeds = self._run(prepared_files(), self.model.embed_pixels, batch_size, len(images), "image")
        skipped.log_summary()
        return kept, embeds

    def encode_texts(self, texts: Sequence[str], batch_size: int = 128) -> Tensor:
        """Embed captions.

        Args:
            texts: captions; truncated to the length that the model takes.
            batch_size: captions per forward pass.

        Returns:
            (T, D) float32 on the CPU, rows of length 1, in the order of `texts`.

        Raises:
            ValueError: the model does not embed captions.
        """
        return self._run(texts, self.model.embed_captions, batch_size, len(texts), "caption", order=by_length)

    def prepare_image(self, image: Image.Image) -> Tensor:
        """Return what the model takes of an image of mode "RGB": (1, 3, height, width)."""
        return self.model.processor(images=[image])["pixel_values"]

    def prepare(self, source: Any) -> Any:
        """Read an image from anything that `read_image` takes, and prepare it.

        Raises:
            ImageError: it cannot be read.
        """
        return self.prepare_image(read_image(source, min_edge=self.min_edge))

    def _run(
        self,
        inputs: Iterable[Any],
        embed: Callable[[list[Any]], Tensor],
        batch_size: int,
        total: int | None,
        unit: str,
        order: Callable[[Any], int] | None = None,
    ) -> Tensor:
        # Of one batch, such as a query, there is no progress to see. Whoever says `disable` overrides TQDM_DISABLE.
        options: Any = {"disable": True} if total is not None and total <= batch_size else {}
        with tqdm(total=total, desc=f"{unit}s", unit=unit, leave=False, **options) as bar:
            return normalize(embed_in_batches(inputs, embed, batch_size, order, bar.update))


def prepare_ahead(
    prepare: Callable[[int, Any], Any], items: Iterable[Any], device: torch.device
) -> Iterator[Any | ImageError]:
    """Prepare images ahead of the tower, which embeds those before them meanwhile.

    For a tower on the CPU a few threads do it. An accelerator waits for them, since Python runs in one thread at a
    time, so that many images for one are prepared by worker processes.

    Args:
        prepare: maps an index and an item to what is prepared.
        items: the images; a sequence of many may be given to worker processes, which inherit a copy.
        device: where the tower runs.

    Yields:
        For each item, in their order, what is prepared, or the `ImageError` that `prepare` raised.
    """

    def attempt(index: int, item: Any) -> Any:
        try:
            return prepare(index, item)
        except ImageError as error:
            return error

    # Elsewhere workers are started anew, and take neither closures nor models along.
    can_fork = sys.platform == "linux" and not multiprocessing.current_process().daemon
    if device.type != "cpu" and can_fork and isinstance(items, Sequence) and len(items) >= MANY_IMAGES:
        loader: Iterable[list[Any]] = DataLoader(
            range(len(items)),  # type: ignore[arg-type]
            batch_size=NUM_PER_MESSAGE,
            collate_fn=lambda indices: [attempt(index, items[index]) for index in indices],
            num_workers=min(len(os.sched_getaffinity(0)), MAX_WORKERS),
            prefetch_factor=1,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # else it would draw from torch's own
        )
        yield from itertools.chain.from_iterable(loader)
        return
    waiting = enumerate(items)
    ahead: deque[Future[Any]] = deque()
    pool = ThreadPoolExecutor(NUM_THREADS)
    try:
        while True:
            for index, item in itertools.islice(waiting, NUM_AHEAD - len(ahead)):
                ahead.append(pool.submit(attempt, index, item))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # whoever is interrupted reads no further


def describe_processors(image_processor: Any, tokenizer: Any, **options: Any) -> str:
    """Describe a stock image processor and a tokenizer, with options of the latter's calls."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition |= {"truncation": None, "padding": None}  # these are of its latest call
    return f"{describe_processor(image_processor)} {digest(json.dumps(definition)).hex()} {options}"


def load_model(name_or_path: str | Path, device: str | torch.device | None = None) -> ClipMiniModel:
    """Load a clipmini model, or another one converted, with its `processor` and in eval mode; see `clipmini.load`.

    From here on the process keeps freed memory, since models are loaded to embed: see `keep_freed_memory`.

    Raises:
        ValueError: this is no clipmini model, or its files are missing, damaged, or name code of their own; or there
            is no such device.
    """
    keep_freed_memory()
    device = choose_device(device)  # before the seconds that loading takes
    name, name_or_path = expand(name_or_path), resolve_model(name_or_path)
    loaded: Any = load_part("model", ClipMiniModel, name_or_path, output_loading_info=True)
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"{name_or_path} lacks weights, among them {sorted(info['missing_keys'])[0]!r}.")
    model.processor = load_processor(name_or_path)
    model.name_or_path = name  # not that of a folder in the Hub's cache
    return model.eval().to(device)


def load_processor(name_or_path: str | Path) -> ClipMiniProcessor:
    """Load the processor of a clipmini model.

    Raises:
        ValueError: its files are missing or damaged.
    """
    processor: ClipMiniProcessor = load_part("processor", ClipMiniProcessor, name_or_path)
    # Without its file, a BERT's tokenizer loads all the same, with special tokens alone.
    if processor.tokenizer.vocab_size <= len(processor.tokenizer.all_special_ids):
        raise ValueError(f"{name_or_path} is incomplete or damaged: its tokenizer has no vocabulary; save it again.")
    return processor


def load_part(part: str, kind: Any, name_or_path: str | Path, **options: Any) -> Any:
    """Load a part of a clipmini model by the `from_pretrained` of its class.

    Raises:
        ValueError: its files are missing or damaged.
    """
    try:
        return kind.from_pretrained(name_or_path, **options)
    except Exception as error:  # libraries raise nearly anything for a JSON file with a value of the wrong type
        damaged = f"is incomplete or damaged (its {part})"
        problem = damaged if Path(name_or_path).exists() else "is neither a folder here nor available from the Hub"
        raise ValueError(f"{name_or_path} {problem}: {first_sentence(error)}.") from error


def describe_libraries() -> str:
    """Return the versions of the libraries that compute embeddings, a part of their key wherever they are kept."""
    return f"torch {torch.__version__}, timm {timm.__version__}, transformers {transformers.__version__}"


def hash_weights(module: nn.Module) -> str:
    """Return the SHA-256 of a module's state, in hexadecimal, whatever its device and memory format.

    It covers names, shapes, dtypes and values of parameters and buffers, but not what a state dict lacks, such as
    strides and activation functions: a key needs the architecture too.
    """
    hasher = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()


def choose_device(wanted: str | torch.device | None = None) -> torch.device:
    """Return the device to compute on: the wanted one, or the accelerator of this machine, or else the CPU.

    Torch chooses the accelerator, such as a CUDA GPU or that of a Mac (mps), here as in training.

    Raises:
        ValueError: torch has no such device, or this machine has none.
    """
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if wanted is None:
        return best
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        others = "" if best.type == "cpu" else f" or {best}"
        raise ValueError(f"device={wanted!r} cannot be used: {first_sentence(error)}. Use cpu{others}.") from None
    return device


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next allocation; without glibc, do nothing.

    Every batch allocates and frees the same activations. glibc returns large blocks to the system when they are freed,
    and the system clears every page before lending it again: for EfficientNet-Lite0 at a batch of 32 this took two
    fifths of a training step, and half of the time to embed images. From this call on, the process stays as large as
    its largest batch has made it.

    Returns:
        Whether it took effect.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_MMAP_THRESHOLD: 1024 * MIB, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 512 * MIB}
    settings[M_ARENA_MAX] = 2  # else every thread keeps memory of its own, in a server six gigabytes
    took_effect = all([mallopt(parameter, value) for parameter, value in settings.items()])
    logger.debug("freed memory is kept: %s", took_effect)
    return took_effect
