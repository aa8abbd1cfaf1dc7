"""Load a saved model, and turn images and captions into embeddings."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from clipmini.data.images import Skipped, first_sentence
from modeling_clipmini import ClipMiniConfig, ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.images_clipmini import ImageError, read_image, read_named
from modeling_clipmini.modeling_clipmini import normalize

from .trust import refuse_code

MAX_WAITING_PIXELS = 16_000_000  # decoded at once, 48 MB: 32 telephone photographs would be over a gigabyte


def load_model(
    name_or_path: str | Path, device: str | torch.device | None = None
) -> tuple[ClipMiniModel, ClipMiniProcessor]:
    """Load a clipmini model and its processor with this package's own code; none is taken from the folder.

    Args:
        name_or_path: a folder that `clipmini train` saved, or a Hub id.
        device: where to put the model; by default the GPU if there is one.

    Returns:
        The model in eval mode, and the processor.

    Raises:
        ValueError: it is not a clipmini model, its files are missing or damaged, or they name code of their own.
    """
    path = Path(name_or_path)
    if path.exists():
        config_file = path / "config.json"
        if not config_file.is_file():
            raise ValueError(f"{path} is not a model folder: it has no config.json. Name one that training saved.")
        try:
            model_type = json.loads(config_file.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{config_file} is not a JSON object: {error}.") from None
        if model_type != ClipMiniConfig.model_type:
            raise ValueError(f"{path} holds a model of type {model_type!r}; a clipmini model is needed.")
    elif str(name_or_path).count("/") != 1 or str(name_or_path).startswith((".", "/")):
        raise ValueError(f"{name_or_path} does not exist. Name a model folder, or a Hub id like org/name.")
    refuse_code(name_or_path)
    # Libraries raise nearly anything for a JSON file with the wrong kind of value in it.
    expected = Exception if path.exists() else (OSError, RuntimeError, ValueError, SafetensorError)
    part = "model"
    try:
        loaded: Any = ClipMiniModel.from_pretrained(name_or_path, output_loading_info=True)
        part = "processor"
        processor = ClipMiniProcessor.from_pretrained(name_or_path)
    except expected as error:
        damaged = f"is incomplete or damaged (its {part})"
        where = damaged if path.exists() else "is neither a folder here nor to be had from the Hub"
        raise ValueError(f"{name_or_path} {where}: {first_sentence(error)}.") from error
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"{name_or_path} lacks weights, among them {sorted(info['missing_keys'])[0]!r}.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().to(device), processor


def encode_images(
    model: ClipMiniModel, processor: ClipMiniProcessor, images: Iterable[Any], batch_size: int = 16
) -> Tensor:
    """Embed images.

    Args:
        model: in eval mode.
        processor: the one that came with the model.
        images: whatever `read_image` takes; read one batch at a time.
        batch_size: images per forward.

    Returns:
        (I, D) float32 on the CPU, each of length 1.

    Raises:
        ImageError: an image cannot be read; the message names it. `encode_files` leaves such out.
    """

    def embed(pixel_values: Tensor) -> Tensor:
        return normalize(model.get_image_features(pixel_values.to(model.device)).pooler_output)

    return run_images(processor, images, embed, batch_size)


def encode_files(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    paths: Sequence[str | Path],
    skipped: Skipped | None = None,
    batch_size: int = 16,
) -> tuple[list[Path], Tensor]:
    """Embed image files, leaving out those that cannot be read.

    Args:
        model: in eval mode.
        processor: the one that came with the model.
        paths: the files; one batch at most is in memory at a time.
        skipped: is told what is left out; given none, a summary is logged at the end.
        batch_size: images per forward.

    Returns:
        The paths that could be read, in the order given, and their (I, D) embeddings as `encode_images` gives them.

    Raises:
        ValueError: not one can be read, or `skipped` is strict and one cannot.
    """
    own = Skipped() if skipped is None else skipped
    images = _ReadableImages(paths, own)
    embeds = encode_images(model, processor, images, batch_size)
    if skipped is None:
        own.log_summary()
    return images.kept, embeds


def encode_texts(
    model: ClipMiniModel, processor: ClipMiniProcessor, texts: Sequence[str], batch_size: int = 256
) -> Tensor:
    """Embed captions.

    Args:
        model: in eval mode.
        processor: the one that came with the model.
        texts: captions; cut to the tokenizer's `model_max_length`.
        batch_size: captions per forward.

    Returns:
        (T, D) float32 on the CPU, each of length 1, in the order of `texts`.
    """

    def embed(inputs: Any) -> Tensor:
        return normalize(model.get_text_features(**inputs.to(model.device)).pooler_output)

    return run_texts(processor, texts, embed, batch_size)


@torch.no_grad()
def run_images(
    processor: Callable[..., Any], images: Iterable[Any], embed: Callable[[Tensor], Tensor], batch_size: int
) -> Tensor:
    """Read images, prepare them and pass them batch by batch through `embed`.

    Args:
        processor: makes `pixel_values`.
        images: whatever `read_image` takes.
        embed: (N, 3, height, width) to (N, width).
        batch_size: images per call of `embed`.

    Returns:
        (I, width) float32 on the CPU.

    Raises:
        ImageError: an image cannot be read; the message names it.
    """
    total = len(images) if isinstance(images, Sized) else None
    progress = tqdm(total=total, desc="images", unit="image", leave=False)
    results = []
    with progress:
        opened = (read_named(image, f"image {number}") for number, image in enumerate(images, start=1))
        while parts := list(_prepared(processor, itertools.islice(opened, batch_size))):
            # Convolutions run a quarter to a half faster so, on the CPU and under autocast on a GPU.
            pixel_values = torch.cat(parts).contiguous(memory_format=torch.channels_last)
            results.append(embed(pixel_values).float().cpu())
            progress.update(len(pixel_values))
    return torch.cat(results)


@torch.no_grad()
def run_texts(
    processor: Callable[..., Any],
    texts: Sequence[str],
    embed: Callable[[Any], Tensor],
    batch_size: int,
    show_progress: bool = True,
) -> Tensor:
    """Tokenize captions and pass them batch by batch through `embed`, longest first so that little is padding.

    Args:
        processor: makes `input_ids` and `attention_mask`.
        texts: captions.
        embed: a `BatchEncoding` of N captions to (N, width).
        batch_size: captions per call of `embed`.
        show_progress: whether to draw a bar; not where another counts these captions already.

    Returns:
        (T, width) float32 on the CPU, in the order of `texts`.
    """
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    progress = tqdm(total=len(texts), desc="captions", unit="caption", leave=False, disable=not show_progress)
    results = []
    for batch in _batches(order, batch_size):
        results.append(embed(processor(text=[texts[index] for index in batch])).float().cpu())
        progress.update(len(batch))
    progress.close()
    return torch.cat(results)[torch.tensor(order).argsort()]


def check_text(kind: str, text: str) -> None:
    """Refuse a text that no tokenizer takes: the halves of characters that stand for bytes that are not UTF-8.

    Args:
        kind: what the text is, for the message.
        text: a caption, or what will be part of one.

    Raises:
        ValueError: it cannot be written in UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"The {kind} {text!r} is not text in UTF-8; set the terminal or the file to UTF-8.") from None


class _ReadableImages:
    """Images read one by one as they are asked for, without those that cannot be; `kept` says which came."""

    def __init__(self, paths: Sequence[str | Path], skipped: Skipped) -> None:
        self.paths = paths
        self.skipped = skipped
        self.kept: list[Path] = []

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Image.Image]:
        fault = "there is none"
        for path in self.paths:
            try:
                image = read_image(path)
            except ImageError as error:
                fault = f"{path} {error}"
                self.skipped.add(path, str(error))
                continue
            self.kept.append(Path(path))
            yield image
        if not self.kept:
            raise ValueError(f"No image can be read: {fault}.")


def _prepared(processor: Callable[..., Any], images: Iterable[Image.Image]) -> Iterator[Tensor]:
    """Turn images into `pixel_values`, many at once as long as they are small."""
    waiting: list[Image.Image] = []
    for image in images:
        waiting.append(image)
        if sum(one.width * one.height for one in waiting) > MAX_WAITING_PIXELS:
            yield processor(images=waiting)["pixel_values"]
            waiting = []
    if waiting:
        yield processor(images=waiting)["pixel_values"]


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
