"""Answers the requests of Hugging Face's clients and widget; in a model's folder, the handler of Inference Endpoints.

A copy of this file lies in every published model folder, so it imports nothing of clipmini, and opens images by the
model's own `read_image`. `clipmini serve` answers with the same class. Nothing that a request names is ever fetched,
opened or run: an image comes as its own bytes.
"""

import base64
import contextlib
import reprlib
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor

ZERO_SHOT = "zero-shot-image-classification"
FEATURES = "feature-extraction"
IMAGE_FEATURES = "image-feature-extraction"
FEATURE_PARAMETERS = ("normalize", "truncate_dim", "dimensions", "truncate", "truncation_direction", "encoding_format")
PARAMETERS = {
    ZERO_SHOT: ("candidate_labels", "hypothesis_template"),
    FEATURES: FEATURE_PARAMETERS,
    IMAGE_FEATURES: FEATURE_PARAMETERS,
}
# Clients can ask for these; there is only one answer to each, so that any other is refused rather than passed over.
FIXED = {"truncate": True, "truncation_direction": "right", "encoding_format": "float"}
DEFAULT_TEMPLATE = "This is a photo of {}."  # of transformers' pipeline

MAX_IMAGE_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000  # of all images of a request together
MANY_PIXELS = 16_000_000  # images of more are decoded one after the other: each takes up to 20 bytes a pixel
MAX_IMAGES = 32
MAX_TEXTS = 1000
MAX_CHARACTERS = 500_000  # of all texts of a request together; what a text has beyond the model's tokens is cut
MAX_TOKENS = 20_000  # of all texts together, once cut: half a minute of a core for a tower of DistilBERT's size
TEXT_BATCH = 32
NUM_CACHED = 8  # sets of labels whose embeddings are kept: of 1000 labels 2 MB each, and what the labels take
# By contents, whatever a request calls it. Of what `read_image` takes elsewhere: what strangers send needs no more.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class RequestError(ValueError):
    """A request cannot be answered, by the client's fault.

    Args:
        message: what is wrong and what to do, for the client.
        status: the HTTP status that says so.
    """

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


class RequestHandler:
    """Classifies images by labels, and embeds images and texts, as requests ask.

    A request is what Hugging Face's clients send:

        {"inputs": IMAGE, "parameters": {"candidate_labels": ["cat", "dog"], "hypothesis_template": "a photo of {}"}}
        {"inputs": TEXT, "normalize": true, "truncate_dim": 64}
        {"inputs": {"image": BASE64}, "parameters": {"task": "feature-extraction"}}

    IMAGE is base64, a data URL, `{"image": ...}` with one of these, bytes, or a Pillow image; the Hub's widget sends
    `image` in place of `inputs`. Labels are a list, or one string with commas between them. In place of one image or
    text a list may stand, and then the answer is a list of answers. Where no `task` is given, strings without labels
    are texts to embed, and all else is to be classified; the task "image-feature-extraction" takes strings for
    images.

    Threads may share it.

    Args:
        model: a `ClipMiniModel` in eval mode.
        processor: the one that came with it.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self._tokenizer_lock, self._memory_lock = threading.Lock(), threading.Lock()
        self._embed_labels = lru_cache(NUM_CACHED)(self._embed_texts)

    @torch.no_grad()
    def __call__(self, data: Any) -> list[Any]:
        """Answer a request.

        Args:
            data: the request; see the class. It is left as it is.

        Returns:
            For labels, `[{"label": ..., "score": ...}, ...]`, the best first, with scores that sum to 1; for features
            a vector, by default of length 1. Of a list of inputs, a list of these.

        Raises:
            RequestError: the request is wrong, or too large.
            ValueError: the model's weights are damaged.
        """
        task, inputs, parameters = _read_request(data)
        is_list = isinstance(inputs, (list, tuple))
        items = list(inputs) if is_list else [inputs]
        if task == ZERO_SHOT:
            answers = self._classify(items, parameters)
        else:
            answers = self._embed(items, task == IMAGE_FEATURES or _is_image(inputs), parameters)
        return answers if is_list else answers[0]

    def _classify(self, images: list[Any], parameters: dict[str, Any]) -> list[Any]:
        labels, captions = _read_labels(parameters)
        image_embeds = F.normalize(self._embed_images(images), dim=-1)
        text_embeds = F.normalize(self._embed_labels(captions), dim=-1)
        logits = self.model.get_logit_scale().float() * image_embeds @ text_embeds.T
        if self.model.logit_bias is not None:
            logits = logits + self.model.logit_bias.float()
        answers = []
        for row in _finite(logits).softmax(dim=-1).tolist():
            scores = [{"label": label, "score": score} for label, score in zip(labels, row, strict=True)]
            answers.append(sorted(scores, key=lambda item: -item["score"]))
        return answers

    def _embed(self, items: list[Any], are_images: bool, parameters: dict[str, Any]) -> list[Any]:
        for name, only in FIXED.items():
            if parameters.get(name, only) != only:
                raise RequestError(f"{name}={reprlib.repr(parameters[name])} is not supported; leave it out.")
        normalize = parameters.get("normalize", True)
        if not isinstance(normalize, bool):
            raise RequestError(f"normalize={reprlib.repr(normalize)} is not allowed; use true or false.")
        embeds = self._embed_images(items) if are_images else self._embed_texts(_check_texts("text", items))
        dim = parameters.get("truncate_dim", parameters.get("dimensions", embeds.shape[1]))
        if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= embeds.shape[1]:
            most = embeds.shape[1]
            raise RequestError(f"truncate_dim={reprlib.repr(dim)} is not allowed; use 1 to {most}, or leave it out.")
        embeds = _finite(embeds[:, :dim])
        vectors: list[Any] = (F.normalize(embeds, dim=-1) if normalize else embeds).tolist()
        return vectors

    def _embed_images(self, sources: list[Any]) -> Tensor:
        """Embed images, before normalization: to (I, D) float32. One at a time is decoded, whatever their number."""
        if not 1 <= len(sources) <= MAX_IMAGES:
            raise RequestError(f"{len(sources)} images are not allowed; send 1 to {MAX_IMAGES} in a request.")
        images = [read_content(source) for source in sources]
        sizes = [self._open(self.model.image_size, image) for image in images]
        num_pixels = [width * height for width, height in sizes]
        if sum(num_pixels) > MAX_PIXELS:
            megapixels = f"{sum(num_pixels) / 1e6:.1f} megapixels"
            raise RequestError(f"{megapixels} are over the limit of {MAX_PIXELS / 1e6:.0f}.", 413)
        embeds = []
        while images:
            embeds.append(self._embed_image(images.pop(0), num_pixels.pop(0)))
        return torch.cat(embeds)

    def _embed_image(self, image: bytes | bytearray | Image.Image, num_pixels: int) -> Tensor:
        with self._memory_lock if num_pixels > MANY_PIXELS else contextlib.nullcontext():
            # Nothing holds the decoded image when another large one is decoded.
            pixel_values = self.processor(images=[self._open(self.model.read_image, image)])["pixel_values"]
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        embeds: Tensor = self.model.get_image_features(pixel_values).pooler_output
        return embeds.float()

    def _open(self, opener: Callable[..., Any], image: bytes | bytearray | Image.Image) -> Any:
        try:
            return opener(image, allow_paths=False, formats=FORMATS, max_pixels=MAX_PIXELS)
        except ValueError as error:  # an ImageError, whose class a lone file cannot import
            is_too_large = getattr(error, "is_too_large", False)
            raise RequestError(f"The image {error}.", 413 if is_too_large else 422) from error

    def _embed_texts(self, texts: tuple[str, ...]) -> Tensor:
        """Embed texts, before normalization: to (T, D) float32."""
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # texts of like length share their padding
        batches = []
        for start in range(0, len(texts), TEXT_BATCH):
            with self._tokenizer_lock:  # a call sets its padding in a tokenizer that all threads share
                batches.append(self.processor(text=[texts[row] for row in order[start : start + TEXT_BATCH]]))
        num_tokens = sum(batch["input_ids"].numel() for batch in batches)
        if num_tokens > MAX_TOKENS:
            raise RequestError(f"The texts have {num_tokens} tokens, over the limit of {MAX_TOKENS}; send less.", 413)
        embeds = [
            self.model.get_text_features(**batch.to(self.model.device)).pooler_output.float() for batch in batches
        ]
        result = torch.empty(len(texts), embeds[0].shape[1], device=embeds[0].device)
        result[order] = torch.cat(embeds)
        return result


class EndpointHandler(RequestHandler):
    """What Inference Endpoints start: `handler.py` in a model's folder, given that folder.

    Args:
        path: the folder that this file lies in.

    Raises:
        ValueError: `path` is another folder.
    """

    def __init__(self, path: str | Path) -> None:
        # The model's code in this folder may run because it came with this file, which runs already: whoever deployed
        # the one has trusted the other. That holds for no other folder, so no other is loaded. (Folders are compared,
        # since in the Hub's cache this file itself is a link to elsewhere.)
        own_folder = Path(__file__).parent
        is_own = Path(path).resolve() == own_folder.resolve()
        if not is_own:
            raise ValueError(f"{path} is not {own_folder}, the folder of this handler, which loads no other.")
        model = AutoModel.from_pretrained(path, trust_remote_code=is_own).eval()
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=is_own)
        super().__init__(model.to("cuda" if torch.cuda.is_available() else "cpu"), processor)


def read_content(source: Any) -> bytes | bytearray | Image.Image:
    """Take an image out of a request.

    Args:
        source: base64, a data URL, bytes, a Pillow image, or `{"image": ...}` with one of these.

    Returns:
        The encoded image; a Pillow image as it is.

    Raises:
        RequestError: it is something else, or of over `MAX_IMAGE_BYTES`.
    """
    if isinstance(source, dict):
        source = source.get("image")
    if isinstance(source, str):
        source = _decode_base64(source)
    if not isinstance(source, (bytes, bytearray, Image.Image)):
        raise RequestError(f"{reprlib.repr(source)} is no image; send its bytes, in JSON as base64.")
    if not isinstance(source, Image.Image) and len(source) > MAX_IMAGE_BYTES:
        raise RequestError(f"The image has {len(source)} bytes, over the limit of {MAX_IMAGE_BYTES}.", 413)
    return source


def _decode_base64(text: str) -> bytes:
    if text.startswith(("http://", "https://")):
        raise RequestError("Web addresses are not fetched; send the image itself, as base64.")
    if text.startswith("data:"):
        header, _, text = text.partition(",")
        if not header.endswith(";base64"):
            raise RequestError(f"The data URL {reprlib.repr(header)} is not in base64.")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise RequestError(f"{reprlib.repr(text)} is neither an image's base64 nor a data URL ({error}).") from error


def _read_request(data: Any) -> tuple[str, Any, dict[str, Any]]:
    """Take a request apart: task, inputs, and the parameters of that task, each known."""
    if not isinstance(data, dict):
        raise RequestError('The request is no JSON object; send {"inputs": ..., "parameters": {...}}.')
    parameters = data.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise RequestError(f"parameters={reprlib.repr(parameters)} is no JSON object.")
    # Clients send the parameters of feature extraction beside `inputs`, and older ones `options` for HF's own servers.
    beside = {name: value for name, value in data.items() if name not in ("inputs", "image", "parameters", "options")}
    parameters = {name: value for name, value in {**beside, **parameters}.items() if value is not None}
    inputs = data.get("inputs")
    if inputs is None and data.get("image") is not None:
        inputs = {"image": data["image"]}
    if inputs is None:
        raise RequestError("The request has no inputs; send an image or texts as `inputs`.")
    is_zero_shot = "candidate_labels" in parameters or _is_image(inputs)
    task = parameters.pop("task", ZERO_SHOT if is_zero_shot else FEATURES)
    if not isinstance(task, str) or task not in PARAMETERS:
        raise RequestError(f"task={reprlib.repr(task)} is not allowed; use one of {', '.join(PARAMETERS)}.")
    if unknown := parameters.keys() - set(PARAMETERS[task]):
        raise RequestError(
            f"The task {task} has no parameter {reprlib.repr(min(unknown))}; it has {', '.join(PARAMETERS[task])}."
        )
    return task, inputs, parameters


def _is_image(inputs: Any) -> bool:
    """Say whether inputs cannot be texts."""
    first = inputs[0] if isinstance(inputs, (list, tuple)) and inputs else inputs
    return isinstance(first, (dict, bytes, bytearray, Image.Image))


def _read_labels(parameters: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Give labels and the caption made of each."""
    labels = parameters.get("candidate_labels")
    if labels is None:
        raise RequestError(f'candidate_labels is missing; give a list, or "task": "{FEATURES}" for an embedding.')
    if isinstance(labels, str):
        labels = [label.strip() for label in labels.split(",")]
    template = parameters.get("hypothesis_template", DEFAULT_TEMPLATE)
    # Once and no more: with many, a short request would make captions of gigabytes.
    if not isinstance(template, str) or template.count("{}") != 1:
        raise RequestError(f"hypothesis_template={reprlib.repr(template)} is not allowed; it must hold {{}} once.")
    texts = _check_texts("label", labels, extra_characters=len(template))
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise RequestError(f"The label {reprlib.repr(twice)} is given twice, and would share its score with itself.")
    _check_texts("hypothesis_template", [template])
    return texts, tuple(template.replace("{}", label) for label in texts)


def _check_texts(kind: str, texts: Any, extra_characters: int = 0) -> tuple[str, ...]:
    """Refuse what is no list of texts, or too many, too long, or not in UTF-8."""
    if not isinstance(texts, (list, tuple)) or not 1 <= len(texts) <= MAX_TEXTS:
        count = f"{len(texts)} of them" if isinstance(texts, (list, tuple)) else reprlib.repr(texts)
        raise RequestError(f"{kind}: {count} is not allowed; give a list of 1 to {MAX_TEXTS}.")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise RequestError(f"The {kind} {reprlib.repr(text)} is not allowed; give words.")
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a character, as "\ud800" in JSON
            raise RequestError(f"The {kind} {text[:30]!a} is not text in UTF-8.") from None
    total = sum(map(len, texts)) + extra_characters * len(texts)
    if total > MAX_CHARACTERS:
        raise RequestError(f"{kind}: {total} characters are over the limit of {MAX_CHARACTERS}; send less.", 413)
    return tuple(texts)


def _finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise ValueError("The model gives values that are no numbers: its weights are damaged.")
    return values
