"""Load a saved model, and turn pictures and captions into embeddings."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from modeling_clipmini import ClipMiniConfig, ClipMiniModel, ClipMiniProcessor

from .images import read_image


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
        ValueError: it is not a clipmini model.
    """
    path = Path(name_or_path)
    if path.exists():
        config_file = path / "config.json"
        if not config_file.is_file():
            raise ValueError(f"{path} is not a model folder: it has no config.json. Name one that training saved.")
        try:
            model_type = json.loads(config_file.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{config_file} is not a JSON object: {error}.") from None
        if model_type != ClipMiniConfig.model_type:
            raise ValueError(f"{path} holds a model of type {model_type!r}; a clipmini model is needed.")
    elif str(name_or_path).count("/") > 1 or str(name_or_path).startswith((".", "/")):
        raise ValueError(f"{name_or_path} does not exist. Name a model folder, or a Hub id like org/name.")
    loaded: Any = ClipMiniModel.from_pretrained(name_or_path, output_loading_info=True)
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"{name_or_path} lacks weights, among them {sorted(info['missing_keys'])[0]!r}.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().to(device), ClipMiniProcessor.from_pretrained(name_or_path)


def encode_images(
    model: ClipMiniModel, processor: ClipMiniProcessor, images: Iterable[Any], batch_size: int = 32
) -> Tensor:
    """Embed pictures.

    Args:
        model: in eval mode.
        processor: the one that came with the model.
        images: whatever `read_image` takes; read one batch at a time.
        batch_size: pictures per forward.

    Returns:
        (I, D) float32 on the CPU, each of length 1.

    Raises:
        ImageError: a picture cannot be read; leave such out beforehand where that may happen.
    """
    return run_images(
        processor, images, lambda pixels: _normalise(model.get_image_features(pixels.to(model.device))), batch_size
    )


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
    return run_texts(
        processor, texts, lambda inputs: _normalise(model.get_text_features(**inputs.to(model.device))), batch_size
    )


@torch.no_grad()
def run_images(
    processor: ClipMiniProcessor, images: Iterable[Any], embed: Callable[[Tensor], Tensor], batch_size: int
) -> Tensor:
    """Read pictures, prepare them and pass them batch by batch through `embed`.

    Args:
        processor: makes `pixel_values`.
        images: whatever `read_image` takes.
        embed: (N, 3, height, width) to (N, width).
        batch_size: pictures per call of `embed`.

    Returns:
        (I, width) float32 on the CPU.
    """
    total = len(images) if isinstance(images, Sized) else None
    progress = tqdm(total=total, desc="pictures", unit="picture", leave=False)
    results = []
    for batch in _batches(images, batch_size):
        pixel_values = processor(images=[read_image(image) for image in batch])["pixel_values"]
        results.append(embed(pixel_values).float().cpu())
        progress.update(len(batch))
    progress.close()
    return torch.cat(results)


@torch.no_grad()
def run_texts(
    processor: ClipMiniProcessor, texts: Sequence[str], embed: Callable[[Any], Tensor], batch_size: int
) -> Tensor:
    """Tokenise captions and pass them batch by batch through `embed`, longest first so that little is padding.

    Args:
        processor: makes `input_ids` and `attention_mask`.
        texts: captions.
        embed: a `BatchEncoding` of N captions to (N, width).
        batch_size: captions per call of `embed`.

    Returns:
        (T, width) float32 on the CPU, in the order of `texts`.
    """
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    progress = tqdm(total=len(texts), desc="captions", unit="caption", leave=False)
    results = []
    for batch in _batches(order, batch_size):
        results.append(embed(processor(text=[texts[index] for index in batch])).float().cpu())
        progress.update(len(batch))
    progress.close()
    return torch.cat(results)[torch.tensor(order).argsort()]


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _normalise(features: Any) -> Tensor:
    return F.normalize(features.pooler_output.float(), dim=-1)
