"""Any model that puts images and captions into one space, behind one interface: to compare with, to learn from."""

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from clipmini.data.images import first_sentence
from clipmini.files import weights_sha256
from modeling_clipmini import ClipMiniConfig
from modeling_clipmini.images_clipmini import read_named
from modeling_clipmini.modeling_clipmini import normalize
from modeling_clipmini.processing_clipmini import DEFAULT_MAX_TOKENS

from .encode import encode_images, encode_texts, load_model, run_images, run_texts
from .trust import read_json, refuse_code

OPEN_CLIP_PREFIX = "open_clip:"
OPEN_CLIP_PLACES = ("hf-hub:", "local-dir:")  # open_clip's own prefixes; what follows them may hold slashes
CONFIG_FILE, SENTENCE_TRANSFORMERS_FILE = "config.json", "modules.json"


class DualEncoder(ABC):
    """A model of two towers that share a space.

    Attributes:
        name: what to call it: a folder's name, or that of the run that a folder "model" is of, or the id that it was
            loaded by.
        kind: the class or library that it is of.
        logit_scale: what similarities are multiplied by before a softmax, the inverse of the temperature; None where
            the model does not tell.
    """

    def __init__(self, name: str, kind: str, logit_scale: float | None) -> None:
        path = Path(name)
        if path.exists():
            path = path.resolve()
            name = path.parent.name if path.name == "model" else path.name  # training calls every model folder so
        self.name = name
        self.kind, self.logit_scale = kind, logit_scale

    def about(self) -> dict[str, str]:
        """Give name and kind, as results name a model, and of a clipmini folder the digest of its weights."""
        return {"name": self.name, "kind": self.kind}

    @abstractmethod
    def encode_images(self, images: Iterable[Any], batch_size: int = 16) -> Tensor:
        """Embed images.

        Args:
            images: whatever `read_image` takes; read one batch at a time.
            batch_size: images per forward.

        Returns:
            (I, D) float32 on the CPU, each of length 1.

        Raises:
            ImageError: an image cannot be read; the message names it.
        """

    @abstractmethod
    def encode_texts(self, texts: Sequence[str], batch_size: int = 128) -> Tensor:
        """Embed captions.

        Args:
            texts: captions; cut to the length that the model takes.
            batch_size: captions per forward.

        Returns:
            (T, D) float32 on the CPU, each of length 1, in the order of `texts`.
        """


def load_encoder(name_or_path: str | Path) -> DualEncoder:
    """Load any dual encoder that needs no code of its own.

    Args:
        name_or_path: a folder or Hub id of a clipmini model, of one of transformers' own models with
            `get_image_features` and `get_text_features` (CLIP, SigLIP, ...), or of a sentence-transformers CLIP; or
            `open_clip:NAME/PRETRAINED`, such as `open_clip:ViT-B-32/laion2b_s34b_b79k`, where open_clip is installed.

    Returns:
        The encoder, in eval mode, on the GPU if there is one.

    Raises:
        ValueError: it cannot be loaded, or does not embed both images and captions.
    """
    name = str(name_or_path)
    if name.startswith(OPEN_CLIP_PREFIX):
        return _OpenClip(name)
    folder = refuse_code(name)
    config = read_json(folder / CONFIG_FILE)
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type == ClipMiniConfig.model_type:
        return _ClipMini(name)
    # A folder of sentence-transformers may hold a transformers model too, without what comes behind it.
    return _SentenceTransformer(name) if (folder / SENTENCE_TRANSFORMERS_FILE).exists() else _Transformers(name)


def load_encoders(*names: str | Path) -> list[DualEncoder]:
    """Load several, to be compared: as `load_encoder`, but no two are called alike unless they are the same."""
    encoders = [load_encoder(name) for name in names]
    if len({encoder.name for encoder in encoders}) < len(encoders):
        for encoder, name in zip(encoders, names, strict=True):
            encoder.name = str(name)
    return encoders


class _ClipMini(DualEncoder):
    """A model of this package."""

    def __init__(self, name: str) -> None:
        self.model, self.processor = load_model(name)
        super().__init__(name, type(self.model).__name__, self.model.get_logit_scale().item())
        self.weights_sha256 = weights_sha256(Path(name))

    def about(self) -> dict[str, str]:
        return {**super().about(), **({"weights_sha256": self.weights_sha256} if self.weights_sha256 else {})}

    def encode_images(self, images: Iterable[Any], batch_size: int = 16) -> Tensor:
        return encode_images(self.model, self.processor, images, batch_size)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 128) -> Tensor:
        return encode_texts(self.model, self.processor, texts, batch_size)


class _Transformers(DualEncoder):
    """One of transformers' own models."""

    def __init__(self, name: str) -> None:
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
        if inputs != ["pixel_values"]:  # SigLIP 2 with free aspect ratios wants masks and shapes too
            raise ValueError(
                f"The model {name} has an image processor that makes {inputs}; name a model of images of one size, "
                "that takes pixel_values alone."
            )
        scale = getattr(model, "logit_scale", None)
        super().__init__(name, kind, scale.detach().exp().item() if isinstance(scale, Tensor) else None)
        self.model = model.eval().to(_device())
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", DEFAULT_MAX_TOKENS)
        max_length = min(processor.tokenizer.model_max_length, longest)
        # SigLIP was trained on captions padded to the full length, without a mask.
        is_siglip = "siglip" in model.config.model_type
        padding = {"padding": "max_length", "return_attention_mask": False} if is_siglip else {"padding": True}
        self.prepare_images: Any = partial(processor, return_tensors="pt")
        self.prepare_texts: Any = partial(
            processor, truncation=True, max_length=max_length, return_tensors="pt", **padding
        )

    def encode_images(self, images: Iterable[Any], batch_size: int = 16) -> Tensor:
        def embed(pixel_values: Tensor) -> Tensor:
            pixel_values = pixel_values.to(self.model.device)
            return normalize(_features(self.model.get_image_features(pixel_values=pixel_values)))

        return run_images(self.prepare_images, images, embed, batch_size)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 128) -> Tensor:
        def embed(inputs: Any) -> Tensor:
            return normalize(_features(self.model.get_text_features(**inputs.to(self.model.device))))

        return run_texts(self.prepare_texts, texts, embed, batch_size)


class _OpenClip(DualEncoder):
    """A model of open_clip."""

    def __init__(self, name: str) -> None:
        try:
            import open_clip
        except ImportError:
            raise ValueError(f"{name} needs open_clip: pip install open_clip_torch.") from None
        architecture, pretrained = name.removeprefix(OPEN_CLIP_PREFIX), None
        if architecture.startswith(OPEN_CLIP_PLACES):
            refuse_code(architecture.partition(":")[2])
        else:
            architecture, _, pretrained = architecture.partition("/")
            if not pretrained:
                raise ValueError(f"{name} names no weights; write {OPEN_CLIP_PREFIX}NAME/PRETRAINED.")
        with _loading(name):
            model, self.transform = open_clip.create_model_from_pretrained(architecture, pretrained, device=_device())
            self.tokenizer = open_clip.get_tokenizer(architecture)
        self.model = model.eval()
        super().__init__(name, "open_clip", self.model.logit_scale.detach().exp().item())

    def encode_images(self, images: Iterable[Any], batch_size: int = 16) -> Tensor:
        def prepare(images: list[Image.Image]) -> dict[str, Tensor]:
            return {"pixel_values": torch.stack([self.transform(image) for image in images])}

        def embed(pixel_values: Tensor) -> Tensor:
            return self.model.encode_image(pixel_values.to(_device()), normalize=True)

        return run_images(prepare, images, embed, batch_size)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 128) -> Tensor:
        def prepare(text: list[str]) -> Tensor:
            return self.tokenizer(text)

        def embed(inputs: Tensor) -> Tensor:
            return self.model.encode_text(inputs.to(_device()), normalize=True)

        return run_texts(prepare, texts, embed, batch_size)


class _SentenceTransformer(DualEncoder):
    """A CLIP of sentence-transformers, which tells no temperature."""

    def __init__(self, name: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise ValueError(f"{name} needs sentence-transformers: pip install sentence-transformers.") from None
        with _loading(name):
            self.model = SentenceTransformer(
                name, trust_remote_code=False, device=str(_device()), model_kwargs={"use_safetensors": True}
            )
        super().__init__(name, "sentence-transformers", None)

    def encode_images(self, images: Iterable[Any], batch_size: int = 16) -> Tensor:
        opened = (read_named(image, f"image {number}") for number, image in enumerate(images, start=1))
        results = []
        with tqdm(desc="images", unit="image", leave=False) as progress:
            while batch := list(itertools.islice(opened, batch_size)):
                results.append(self._encode(batch, batch_size))
                progress.update(len(batch))
        return torch.cat(results)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 128) -> Tensor:
        return self._encode(list(texts), batch_size)

    def _encode(self, inputs: list[Any], batch_size: int) -> Tensor:
        try:
            embeds = self.model.encode(inputs, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=None)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The model {self.name} does not embed both images and captions: {error}.") from error
        return normalize(embeds.float().cpu())


def check_widths(encoder: DualEncoder, image_embeds: Tensor, text_embeds: Tensor) -> None:
    """Refuse a model that does not put images and captions into one space.

    Raises:
        ValueError: their embeddings differ in width.
    """
    widths = image_embeds.shape[1], text_embeds.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(
            f"The {encoder.kind} {encoder.name} embeds images in {widths[0]} and captions in {widths[1]} "
            "dimensions; a dual encoder must put them into one space."
        )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Say in a sentence why a library could not load a model."""
    try:
        yield
    except Exception as error:  # libraries raise nearly anything for a configuration with a wrong value in it
        raise ValueError(f"The model {name} cannot be loaded: {first_sentence(error)}.") from error


def _features(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output  # transformers before 5, and from 5 on
