"""Load a saved model, and turn images and captions into embeddings."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from clipmini.data.images import Skipped, first_sentence
from modeling_clipmini import ClipMiniConfig, ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.images_clipmini import ImageError, read_image, read_named
from modeling_clipmini.modeling_clipmini import normalize

from .trust import refuse_code

MAX_WAITING_PIXELS = 16_000_000  # decoded at once: 48 MB, where a batch of 32 phone photos would take over a gigabyte


def load_model(
    name_or_path: str | Path, device: str | torch.device | None = None
) -> tuple[ClipMiniModel, ClipMiniProcessor]:
    """Load a clipmini model and its processor with the code of this package, never with that of the folder.

    Args:
        name_or_path: a folder that `clipmini train` saved, or a Hub id.
        device: where to put the model; by default the GPU if there is one.

    Returns:
        The model in eval mode, and the processor.

    Raises:
        ValueError: this is no clipmini model, or its files are missing, damaged, or name code of their own.
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
    part = "model"
    try:
        loaded: Any = ClipMiniModel.from_pretrained(name_or_path, output_loading_info=True)
        part = "processor"
        processor = ClipMiniProcessor.from_pretrained(name_or_path)
    except Exception as error:  # libraries raise nearly anything for a JSON file with a value of the wrong type
        damaged = f"is incomplete or damaged (its {part})"
        problem = damaged if path.exists() else "is neither a folder here nor available from the Hub"
        raise ValueError(f"{name_or_path} {problem}: {first_sentence(error)}.") from error
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"{name_or_path} lacks weights, among them {sorted(info['missing_keys'])[0]!r}.")
    # Without its file, a BERT's tokenizer loads all the same, with special tokens alone.
    if processor.tokenizer.vocab_size <= len(processor.tokenizer.all_special_ids):
        raise ValueError(f"{name_or_path} is incomplete or damaged: its tokenizer has no vocabulary; save it again.")
    return model.eval().to(device or default_device()), processor


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def encode_images(
    model: ClipMiniModel, processor: ClipMiniProcessor, images: Iterable[Any], batch_size: int = 16
) -> Tensor:
    """Embed images.

    Args:
        model: in eval mode.
        processor: the model's processor.
        images: anything that `read_image` takes; read one batch at a time.
        batch_size: images per forward.

    Returns:
        (I, D) float32 on the CPU, rows of length 1.

    Raises:
        ImageError: an image cannot be read; the message names it. `encode_files` leaves such images out.
    """
    return run_images(processor, images, partial(embed_pixels, model), batch_size)


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
        processor: the model's processor.
        paths: the image files; read one batch at a time.
        skipped: collects the files left out; if None, a summary of them is logged at the end.
        batch_size: images per forward.

    Returns:
        The I paths that could be read, in the order given, and their embeddings: (I, D) float32 on the CPU, rows of
        length 1.

    Raises:
        ValueError: none of the files can be read, or one cannot and `skipped` is strict.
    """
    collected = Skipped() if skipped is None else skipped
    kept: list[Path] = []

    def read_files() -> Iterator[Image.Image]:
        reason = "there is none"
        for path in paths:
            try:
                image = read_image(path)
            except ImageError as error:
                reason = f"{path} {error}"
                collected.add(path, str(error))
            else:
                kept.append(Path(path))
                yield image
        if not kept:
            raise ValueError(f"No image can be read: {reason}.")

    embeds = run_images(processor, read_files(), partial(embed_pixels, model), batch_size, total=len(paths))
    if skipped is None:
        collected.log_summary()
    return kept, embeds


def encode_texts(
    model: ClipMiniModel, processor: ClipMiniProcessor, texts: Sequence[str], batch_size: int = 256
) -> Tensor:
    """Embed captions.

    Args:
        model: in eval mode.
        processor: the model's processor.
        texts: captions; truncated to the tokenizer's `model_max_length`.
        batch_size: captions per forward.

    Returns:
        (T, D) float32 on the CPU, rows of length 1, in the order of `texts`.
    """
    return run_texts(processor, texts, partial(embed_tokens, model), batch_size)


def embed_pixels(model: Any, pixel_values: Tensor) -> Tensor:
    """Embed images by `get_image_features`: (N, 3, height, width), normalized, to (N, D), rows of length 1."""
    # Convolutions run 25 to 50 % faster with channels last, on the CPU and under autocast on a GPU.
    pixel_values = pixel_values.to(model.device, memory_format=torch.channels_last)
    return normalize(model.get_image_features(pixel_values=pixel_values).pooler_output)


def embed_tokens(model: Any, inputs: Any) -> Tensor:
    """Embed captions by `get_text_features`: a `BatchEncoding` of N captions to (N, D), rows of length 1."""
    return normalize(model.get_text_features(**inputs.to(model.device)).pooler_output)


@torch.no_grad()
def run_images(
    processor: Callable[..., Any],
    images: Iterable[Any],
    embed: Callable[[Tensor], Tensor],
    batch_size: int,
    total: int | None = None,
) -> Tensor:
    """Read images, prepare them and pass them through `embed`, batch by batch.

    Args:
        processor: called with `images=`, returns `pixel_values`.
        images: anything that `read_image` takes.
        embed: (N, 3, height, width) to (N, width).
        batch_size: images per call of `embed`.
        total: number of images, for the progress bar; by default the length of `images` if it has one.

    Returns:
        (I, width) float32 on the CPU.

    Raises:
        ImageError: an image cannot be read; the message names it.
    """
    if total is None and isinstance(images, Sized):
        total = len(images)
    results = []
    with tqdm(total=total, desc="images", unit="image", leave=False) as progress:
        opened = (read_named(image, f"image {number}") for number, image in enumerate(images, start=1))
        while parts := list(_prepared(processor, itertools.islice(opened, batch_size))):
            results.append(embed(torch.cat(parts)).float().cpu())
            progress.update(len(results[-1]))
    return torch.cat(results)


@torch.no_grad()
def run_texts(
    processor: Callable[..., Any],
    texts: Sequence[str],
    embed: Callable[[Any], Tensor],
    batch_size: int,
    show_progress: bool = True,
) -> Tensor:
    """Tokenize captions and pass them through `embed`, batch by batch, longest first to keep padding short.

    Args:
        processor: called with `text=`, returns `input_ids` and `attention_mask`.
        texts: captions.
        embed: a `BatchEncoding` of N captions to (N, width).
        batch_size: captions per call of `embed`.
        show_progress: whether to draw a progress bar; turn it off where the caller draws one.

    Returns:
        (T, width) float32 on the CPU, in the order of `texts`.
    """
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    results = []
    with tqdm(total=len(texts), desc="captions", unit="caption", leave=False, disable=not show_progress) as progress:
        for start in range(0, len(order), batch_size):
            batch = [texts[index] for index in order[start : start + batch_size]]
            results.append(embed(processor(text=batch)).float().cpu())
            progress.update(len(batch))
    return torch.cat(results)[torch.tensor(order).argsort()]


def check_text(kind: str, text: str) -> None:
    """Check that a text can be tokenized: that it holds no surrogates, which stand for bytes that are not UTF-8.

    Args:
        kind: noun for the text in the error message, such as "query".
        text: a caption, or part of one.

    Raises:
        ValueError: the text cannot be encoded in UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"The {kind} {text!r} is not text in UTF-8; set the terminal or the file to UTF-8.") from None


def _prepared(processor: Callable[..., Any], images: Iterable[Image.Image]) -> Iterator[Tensor]:
    """Yield `pixel_values` of as many images at once as stay below `MAX_WAITING_PIXELS`."""
    waiting: list[Image.Image] = []
    for image in images:
        waiting.append(image)
        if sum(image.width * image.height for image in waiting) > MAX_WAITING_PIXELS:
            yield processor(images=waiting)["pixel_values"]
            waiting = []
    if waiting:
        yield processor(images=waiting)["pixel_values"]
