"""Load any model that embeds images and captions into one space: to search with, to compare with, to learn from."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from clipmini.files import weights_sha256
from clipmini.names import (
    CONFIG_FILE,
    MODEL_TYPE,
    ONNX_ENGINES,
    ONNX_INT8,
    OPEN_CLIP_PREFIX,
    SENTENCE_TRANSFORMERS_FILE,
    expand,
    first_sentence,
    locate_any_model,
)
from modeling_clipmini import ClipMiniModel
from modeling_clipmini.encoding_clipmini import channels_last
from modeling_clipmini.processing_clipmini import DEFAULT_MAX_TOKENS

from .bank import load_bank
from .embed import DualEncoder, as_encoder, choose_device, describe_processors, keep_freed_memory, load_model
from .trust import read_json, refuse_code

if TYPE_CHECKING:
    from .onnx_model import OnnxModel

logger = logging.getLogger(__name__)

OPEN_CLIP_SCHEMES = ("hf-hub:", "local-dir:")  # open_clip's own prefixes; what follows them may contain slashes


def load_clipmini(
    name: str | Path, device: str | torch.device | None = None, engine: str = "auto"
) -> "ClipMiniModel | OnnxModel":
    """Load a clipmini model for an engine; `clipmini.load` says more."""
    if engine not in ONNX_ENGINES:
        return load_model(name, device)
    if device is not None and torch.device(device).type != "cpu":
        raise ValueError(f"device={device!r} cannot be used with engine={engine!r}, which computes on the CPU.")
    from .onnx_model import load_onnx_model  # onnxruntime is an extra

    return load_onnx_model(name, engine == ONNX_INT8)


def load_encoder(model: "str | Path | ClipMiniModel | OnnxModel | DualEncoder", engine: str = "auto") -> DualEncoder:
    """Load any dual encoder that needs no code of its own.

    Args:
        model: the folder or Hub id of a clipmini model, of one of transformers' own models with `get_image_features`
            and `get_text_features` (CLIP, SigLIP, ...), or of a sentence-transformers CLIP; or
            `open_clip:NAME/PRETRAINED`, such as `open_clip:ViT-B-32/laion2b_s34b_b79k`, if open_clip is installed. A
            clipmini model that is loaded already is put in eval mode, and an encoder returned as it is.
        engine: one of `ENGINES`; of models of other libraries, torch alone.

    Returns:
        The encoder, on the best device unless it was loaded already. It is named by its Hub id or folder; a folder
        called "model", as in every training run, by the folder above it. A clipmini model has its bank, unless that is
        damaged or of other weights, which is logged. Loading one makes the process keep freed memory.

    Raises:
        ValueError: the model cannot be loaded, for this engine, or does not embed both images and captions.
    """
    located = locate_any_model(model, engine)
    if isinstance(model, DualEncoder):
        return model
    if not isinstance(model, (str, Path)):
        return as_encoder(model.eval(), _short_name(model.name_or_path or "model"))
    keep_freed_memory()
    name = str(located)
    is_open_clip = name.startswith(OPEN_CLIP_PREFIX)
    folder = Path() if is_open_clip else refuse_code(name)
    config = {} if is_open_clip else read_json(folder / CONFIG_FILE)
    if isinstance(config, dict) and config.get("model_type") == MODEL_TYPE:
        encoder = as_encoder(load_clipmini(name, engine=engine), name)
        encoder.weights_sha256 = encoder.weights_sha256 or weights_sha256(Path(name))
        try:
            encoder.bank = load_bank(name, encoder.weights_sha256)
        except ValueError as error:  # the model works without it, and by cosine as the literature has it
            logger.warning("Scores are cosines: %s", error)
    elif engine in ONNX_ENGINES:
        raise ValueError(f"engine={engine!r} is for clipmini's own models, and {model} is another; leave it out.")
    elif is_open_clip:
        encoder = _load_open_clip(name)
    # Before transformers: its model may be in the same folder, but is only the first module of this one.
    elif (folder / SENTENCE_TRANSFORMERS_FILE).exists():
        encoder = _load_sentence_transformer(name)
    else:
        encoder = _load_transformers(name)
    encoder.name = _short_name(expand(model))
    return encoder


def _short_name(name: str) -> str:
    path = Path(name).resolve()
    if not path.exists():
        return name
    return path.parent.name if path.name == "model" else path.name


def load_encoders(*names: str | Path | ClipMiniModel | DualEncoder, engine: str = "auto") -> list[DualEncoder]:
    """Load a model for an engine, and others to compare it with.

    Where two would have the same name, each is named by its full path or id.
    """
    encoders = [load_encoder(name, "auto" if number else engine) for number, name in enumerate(names)]
    if len({encoder.name for encoder in encoders}) < len(encoders):
        for encoder, name in zip(encoders, names, strict=True):
            encoder.name = str(name)
    return encoders


def _load_transformers(name: str) -> DualEncoder:
    with _loading(name):
        loaded: Any = AutoModel.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    model, info = loaded
    kind = type(model).__name__
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(
            f"The model {name} is a {kind}, which does not embed both images and captions; name a dual encoder, "
            "such as CLIP, SigLIP or clipmini."
        )
    if info["missing_keys"]:
        raise ValueError(f"The model {name} lacks weights, among them {sorted(info['missing_keys'])[0]!r}.")
    inputs = getattr(getattr(processor, "image_processor", None), "model_input_names", None)
    if inputs != ["pixel_values"]:  # SigLIP 2 with free aspect ratios also needs masks and shapes
        raise ValueError(
            f"The model {name} has an image processor that returns {inputs}; name a model with a fixed image size, "
            "which takes pixel_values alone."
        )
    scale = getattr(model, "logit_scale", None)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", DEFAULT_MAX_TOKENS)
    max_length = min(processor.tokenizer.model_max_length, longest)
    # SigLIP was trained on captions padded to the full length, without a mask.
    is_siglip = "siglip" in model.config.model_type
    padding = {"padding": "max_length", "return_attention_mask": False} if is_siglip else {"padding": True}

    model.eval().to(choose_device())

    def embed_images(batch: list[Tensor]) -> Tensor:
        return model.get_image_features(channels_last(torch.cat(batch).to(model.device))).pooler_output

    def embed_texts(batch: list[str]) -> Tensor:
        inputs = processor(text=batch, truncation=True, max_length=max_length, return_tensors="pt", **padding)
        return model.get_text_features(**inputs.to(model.device)).pooler_output

    return DualEncoder(
        name,
        kind,
        model,
        logit_scale=scale.detach().exp().item() if isinstance(scale, Tensor) else None,
        prepare_image=lambda image: processor(images=[image], return_tensors="pt")["pixel_values"],
        embed_images=embed_images,
        embed_texts=embed_texts,
        describe=lambda: describe_processors(
            processor.image_processor, processor.tokenizer, max_length=max_length, **padding
        ),
        tokenizer=processor.tokenizer,
    )


def _load_open_clip(name: str) -> DualEncoder:
    try:
        import open_clip
    except ImportError:
        raise ValueError(f"{name} needs open_clip: pip install open_clip_torch.") from None
    architecture, pretrained = name.removeprefix(OPEN_CLIP_PREFIX), None
    if architecture.startswith(OPEN_CLIP_SCHEMES):
        refuse_code(architecture.partition(":")[2])
    else:
        architecture, _, pretrained = architecture.partition("/")
        if not pretrained:
            raise ValueError(f"{name} names no weights; write {OPEN_CLIP_PREFIX}NAME/PRETRAINED.")
    device = choose_device()
    with _loading(name):
        model, transform = open_clip.create_model_from_pretrained(architecture, pretrained, device=device)
        tokenizer = open_clip.get_tokenizer(architecture)
    model.eval()

    def embed_images(batch: list[Tensor]) -> Tensor:
        return model.encode_image(channels_last(torch.stack(batch).to(device)))

    def embed_texts(batch: list[str]) -> Tensor:
        return model.encode_text(tokenizer(batch).to(device))

    logit_scale = model.logit_scale.detach().exp().item()
    preparation = f"{transform} {type(tokenizer).__name__} {getattr(tokenizer, 'context_length', None)}"
    return DualEncoder(
        name, "open_clip", model, logit_scale, transform, embed_images, embed_texts, lambda: preparation
    )


def _load_sentence_transformer(name: str) -> DualEncoder:
    """Load a CLIP of sentence-transformers, which does not record its temperature."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(f"{name} needs sentence-transformers: pip install sentence-transformers.") from None
    with _loading(name):
        model = SentenceTransformer(
            name, trust_remote_code=False, device=str(choose_device()), model_kwargs={"use_safetensors": True}
        )

    def encode(batch: list[Any]) -> Tensor:
        """Prepare and embed in one step, as the library does."""
        try:
            return model.encode(batch, batch_size=len(batch), convert_to_tensor=True, show_progress_bar=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The model {name} does not embed both images and captions: {error}.") from error

    kind = "sentence-transformers"
    return DualEncoder(name, kind, model, None, lambda image: image, encode, encode, lambda: repr(model))


def check_widths(encoder: DualEncoder, image_embeds: Tensor, text_embeds: Tensor) -> None:
    """Check that a model embeds images and captions into one space: (I, D) and (T, D).

    Raises:
        ValueError: the embeddings differ in width.
    """
    widths = image_embeds.shape[1], text_embeds.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(
            f"The {encoder.kind} {encoder.name} embeds images in {widths[0]} and captions in {widths[1]} "
            "dimensions; a dual encoder must embed both into one space."
        )


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Raise any error of a library that loads a model as a one-sentence ValueError."""
    try:
        yield
    except Exception as error:  # libraries raise nearly anything for a configuration with a wrong value in it
        raise ValueError(f"The model {name} cannot be loaded: {first_sentence(error)}.") from error
