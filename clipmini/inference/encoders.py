"""Any model that embeds images and captions into one space, behind one interface: to compare with, to learn from."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from clipmini.data.images import first_sentence
from clipmini.files import weights_sha256
from modeling_clipmini import ClipMiniConfig
from modeling_clipmini.modeling_clipmini import normalize
from modeling_clipmini.processing_clipmini import DEFAULT_MAX_TOKENS

from .encode import default_device, embed_pixels, embed_tokens, load_model, run_images, run_texts
from .trust import read_json, refuse_code

OPEN_CLIP_PREFIX = "open_clip:"
OPEN_CLIP_SCHEMES = ("hf-hub:", "local-dir:")  # open_clip's own prefixes; what follows them may contain slashes
CONFIG_FILE, SENTENCE_TRANSFORMERS_FILE = "config.json", "modules.json"


@dataclass
class DualEncoder:
    """A model with an image tower and a text tower that share one embedding space, in eval mode.

    Attributes:
        name: what results call the model; see `load_encoder`.
        kind: its class, or the library it comes from.
        logit_scale: factor on similarities before a softmax, the inverse of the temperature; None if unknown.
        processor: called with `images=`, returns `pixel_values`; with `text=`, whatever `embed_texts` takes.
        embed_images: `pixel_values` of N images to (N, D), rows of length 1.
        embed_texts: N prepared captions to (N, D), rows of length 1.
        weights_sha256: digest of the weights of a clipmini folder; None for any other model.
    """

    name: str
    kind: str
    logit_scale: float | None
    processor: Callable[..., Any]
    embed_images: Callable[[Tensor], Tensor]
    embed_texts: Callable[[Any], Tensor]
    weights_sha256: str | None = None

    def about(self) -> dict[str, str]:
        """Return the model's name, kind and, if known, the digest of its weights, as results record them."""
        digest = {"weights_sha256": self.weights_sha256} if self.weights_sha256 else {}
        return {"name": self.name, "kind": self.kind, **digest}

    def encode_images(self, images: Iterable[Any], batch_size: int = 16) -> Tensor:
        """Embed images.

        Args:
            images: anything that `read_image` takes; read one batch at a time.
            batch_size: images per forward.

        Returns:
            (I, D) float32 on the CPU, rows of length 1.

        Raises:
            ImageError: an image cannot be read; the message names it.
            ValueError: the model does not embed images.
        """
        return run_images(self.processor, images, self.embed_images, batch_size)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 128) -> Tensor:
        """Embed captions.

        Args:
            texts: captions; truncated to the length that the model takes.
            batch_size: captions per forward.

        Returns:
            (T, D) float32 on the CPU, rows of length 1, in the order of `texts`.

        Raises:
            ValueError: the model does not embed captions.
        """
        return run_texts(self.processor, texts, self.embed_texts, batch_size)


def load_encoder(name_or_path: str | Path) -> DualEncoder:
    """Load any dual encoder that needs no code of its own.

    Args:
        name_or_path: a folder or Hub id of a clipmini model, of one of transformers' own models with
            `get_image_features` and `get_text_features` (CLIP, SigLIP, ...), or of a sentence-transformers CLIP; or
            `open_clip:NAME/PRETRAINED`, such as `open_clip:ViT-B-32/laion2b_s34b_b79k`, if open_clip is installed.

    Returns:
        The encoder, on the GPU if there is one. It is named by its Hub id or folder; a folder called "model", as in
        every training run, by the folder above it.

    Raises:
        ValueError: the model cannot be loaded, or does not embed both images and captions.
    """
    name = str(name_or_path)
    if name.startswith(OPEN_CLIP_PREFIX):
        encoder = _load_open_clip(name)
    else:
        folder = refuse_code(name)
        config = read_json(folder / CONFIG_FILE)
        if isinstance(config, dict) and config.get("model_type") == ClipMiniConfig.model_type:
            encoder = _load_clipmini(name)
        # Before transformers: its model may be in the same folder, but is only the first module of this one.
        elif (folder / SENTENCE_TRANSFORMERS_FILE).exists():
            encoder = _load_sentence_transformer(name)
        else:
            encoder = _load_transformers(name)
    path = Path(name).resolve()
    if path.exists():
        encoder.name = path.parent.name if path.name == "model" else path.name
    return encoder


def load_encoders(*names: str | Path) -> list[DualEncoder]:
    """Load several encoders to compare; where two would have the same name, each is named by its full path or id."""
    encoders = [load_encoder(name) for name in names]
    if len({encoder.name for encoder in encoders}) < len(encoders):
        for encoder, name in zip(encoders, names, strict=True):
            encoder.name = str(name)
    return encoders


def _load_clipmini(name: str) -> DualEncoder:
    model, processor = load_model(name)
    return DualEncoder(
        name,
        type(model).__name__,
        model.get_logit_scale().item(),
        processor,
        partial(embed_pixels, model),
        partial(embed_tokens, model),
        weights_sha256(Path(name)),
    )


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

    def prepare(images: Any = None, text: Any = None) -> Any:
        options = {} if text is None else {"truncation": True, "max_length": max_length, **padding}
        return processor(images=images, text=text, return_tensors="pt", **options)

    model.eval().to(default_device())
    return DualEncoder(
        name,
        kind,
        scale.detach().exp().item() if isinstance(scale, Tensor) else None,
        prepare,
        partial(embed_pixels, model),
        partial(embed_tokens, model),
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
    device = default_device()
    with _loading(name):
        model, transform = open_clip.create_model_from_pretrained(architecture, pretrained, device=device)
        tokenizer = open_clip.get_tokenizer(architecture)
    model.eval()

    def prepare(images: Any = None, text: Any = None) -> Any:
        return tokenizer(text) if images is None else {"pixel_values": torch.stack([*map(transform, images)])}

    def embed_images(pixel_values: Tensor) -> Tensor:
        # Convolutions run 25 to 50 % faster with channels last.
        return model.encode_image(pixel_values.to(device, memory_format=torch.channels_last), normalize=True)

    def embed_texts(tokens: Tensor) -> Tensor:
        return model.encode_text(tokens.to(device), normalize=True)

    return DualEncoder(name, "open_clip", model.logit_scale.detach().exp().item(), prepare, embed_images, embed_texts)


def _load_sentence_transformer(name: str) -> DualEncoder:
    """Load a CLIP of sentence-transformers, which does not record its temperature."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(f"{name} needs sentence-transformers: pip install sentence-transformers.") from None
    with _loading(name):
        model = SentenceTransformer(
            name, trust_remote_code=False, device=str(default_device()), model_kwargs={"use_safetensors": True}
        )

    def encode(images: Any = None, text: Any = None) -> Any:
        """Prepare and embed in one step, as the library does; normalizing is all that is left for later."""
        inputs = text if images is None else images
        try:
            embeds = model.encode(inputs, batch_size=len(inputs), convert_to_tensor=True, show_progress_bar=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The model {name} does not embed both images and captions: {error}.") from error
        return embeds if images is None else {"pixel_values": embeds}

    def normalize_rows(embeds: Tensor) -> Tensor:
        return normalize(embeds.float())

    return DualEncoder(name, "sentence-transformers", None, encode, normalize_rows, normalize_rows)


def check_widths(encoder: DualEncoder, image_embeds: Tensor, text_embeds: Tensor) -> None:
    """Check that a model embeds images and captions into one space.

    Args:
        encoder: the model, for the message.
        image_embeds: (I, D).
        text_embeds: (T, D).

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
