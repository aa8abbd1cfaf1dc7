"""Answers requests of Hugging Face's clients and widget, on Inference Endpoints and in `clipmini serve`.

Every published model folder holds a copy of this file, so it imports nothing of clipmini and opens images through the
model's own `read_image`. Nothing that a request names is fetched, opened or run: an image comes as its own bytes.
"""

import base64
import contextlib
import math
import reprlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel

ZERO_SHOT = "zero-shot-image-classification"
FEATURES = "feature-extraction"
IMAGE_FEATURES = "image-feature-extraction"
FEATURE_PARAMETERS = ("normalize", "truncate_dim", "dimensions", "truncate", "truncation_direction", "encoding_format")
PARAMETERS = {
    ZERO_SHOT: ("candidate_labels", "hypothesis_template"),
    FEATURES: FEATURE_PARAMETERS,
    IMAGE_FEATURES: FEATURE_PARAMETERS,
}
# Parameters that clients can send but that have only one possible value here; any other is refused, not ignored.
FIXED_PARAMETERS = {"truncate": True, "truncation_direction": "right", "encoding_format": "float"}
DEFAULT_TEMPLATE = "This is a photo of {}."  # the same as in transformers' pipeline

MAX_IMAGE_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000  # of all images of a request together
MANY_PIXELS = 16_000_000  # larger images are decoded one at a time: each takes up to 20 bytes per pixel
MAX_IMAGES = 32
MAX_TEXTS = 1000
MAX_CHARACTERS = 500_000  # of all texts of a request together, before they are cut to the model's tokens
MAX_TOKENS = 20_000  # of all texts together, once cut: half a minute on one core for a tower of DistilBERT's size
IMAGE_BATCH, TEXT_BATCH = 8, 32
NUM_CACHED = 8  # sets of labels whose embeddings are kept: 1000 labels take 2 MB, and their own length
# Recognized by content, whatever a request calls it. Fewer than `read_image` takes elsewhere: each is attack surface.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class RequestError(ValueError):
    """The client's request cannot be answered.

    Args:
        message: what is wrong and what to do, for the client.
        status: the HTTP status to answer with.
    """

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


class RequestHandler:
    """Classifies images by labels, and embeds images and texts.

    It takes the requests that Hugging Face's clients send:

        {"inputs": IMAGE, "parameters": {"candidate_labels": ["cat", "dog"], "hypothesis_template": "a photo of {}"}}
        {"inputs": TEXT, "normalize": true, "truncate_dim": 64}
        {"inputs": {"image": BASE64}, "parameters": {"task": "feature-extraction"}}

    IMAGE is base64, a data URL, `{"image": ...}` with one of these, bytes, or a Pillow image; the Hub's widget sends
    `image` in place of `inputs`. Labels are a list or one comma-separated string. `inputs` may also be a list of
    images or texts; the answer is then a list of answers. Without a `task`, strings without labels are texts to embed,
    and anything else is classified; for the task "image-feature-extraction" strings are images.

    One handler may be shared by threads. Whichever of them gets a worker first embeds the texts of all that wait.

    Args:
        model: a `ClipMiniModel` in eval mode, with its processor.
        num_workers: threads that may decode images or run the model at the same time.
    """

    def __init__(self, model: Any, num_workers: int = 2) -> None:
        self.model, self.processor = model, model.processor
        self._workers = threading.Semaphore(num_workers)
        self._waiting: deque[tuple[Future[Tensor], list[Tensor]]] = deque()
        self._tokenizer_lock, self._memory_lock = threading.Lock(), threading.Lock()
        self._embed_labels = lru_cache(NUM_CACHED)(self._embed_texts)

    @torch.no_grad()
    def __call__(self, data: Any) -> list[Any]:
        """Answer a request.

        Args:
            data: the request, as described in the class; it is not modified.

        Returns:
            For labels, `[{"label": ..., "score": ...}, ...]`, best first, with scores that sum to 1. For features, a
            vector, by default of length 1. For a list of inputs, a list of these.

        Raises:
            RequestError: the request is malformed or too large.
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
        image_embeds = F.normalize(self._embed_images(images), dim=-1)  # (I, D)
        text_embeds = F.normalize(self._embed_labels(captions, labels), dim=-1)  # (T, D)
        # A bias would change no softmax. Embeddings are on the CPU, wherever the model is.
        logits = self.model.get_logit_scale().item() * image_embeds @ text_embeds.T
        answers = []
        for row in _check_finite(logits).softmax(dim=-1).tolist():
            scores = [{"label": label, "score": score} for label, score in zip(labels, row, strict=True)]
            answers.append(sorted(scores, key=lambda item: -item["score"]))
        return answers

    def _embed(self, items: list[Any], are_images: bool, parameters: dict[str, Any]) -> list[Any]:
        for name, only in FIXED_PARAMETERS.items():
            if parameters.get(name, only) != only:
                raise RequestError(f"{name}={reprlib.repr(parameters[name])} is not supported; leave it out.")
        normalize = parameters.get("normalize", True)
        if not isinstance(normalize, bool):
            raise RequestError(f"normalize={reprlib.repr(normalize)} is not allowed; use true or false.")
        embeds = self._embed_images(items) if are_images else self._embed_texts(_check_texts("text", items))
        width = embeds.shape[1]
        dim = parameters.get("truncate_dim", parameters.get("dimensions", width))
        if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= width:
            raise RequestError(f"truncate_dim={reprlib.repr(dim)} is not allowed; use 1 to {width}, or leave it out.")
        embeds = _check_finite(embeds[:, :dim])
        vectors: list[Any] = (F.normalize(embeds, dim=-1) if normalize else embeds).tolist()
        return vectors

    def _embed_images(self, sources: list[Any]) -> Tensor:
        """Return (I, D) float32 embeddings before normalization. Images are decoded one at a time."""
        if not 1 <= len(sources) <= MAX_IMAGES:
            raise RequestError(f"{len(sources)} images are not allowed; send 1 to {MAX_IMAGES} in a request.")
        images = [read_content(source) for source in sources]
        num_pixels = [math.prod(self._open(self.model.image_size, image)) for image in images]
        if sum(num_pixels) > MAX_PIXELS:
            megapixels = f"{sum(num_pixels) / 1e6:.1f} megapixels"
            raise RequestError(f"{megapixels} are over the limit of {MAX_PIXELS / 1e6:.0f}.", 413)
        pixels = (self._prepare_image(*item) for item in zip(images, num_pixels, strict=True))
        embeds: Tensor = self.model.embed_in_batches(pixels, self._run_images, IMAGE_BATCH)
        return embeds

    def _prepare_image(self, image: bytes | bytearray | Image.Image, num_pixels: int) -> Tensor:
        with self._memory_lock if num_pixels > MANY_PIXELS else contextlib.nullcontext(), self._workers:
            # In one expression, so that no decoded image outlives the lock.
            pixel_values: Tensor = self.processor(images=[self._open(self.model.read_image, image)])["pixel_values"]
        return pixel_values

    def _open(self, opener: Callable[..., Any], image: bytes | bytearray | Image.Image) -> Any:
        try:
            return opener(image, allow_paths=False, formats=FORMATS, max_pixels=MAX_PIXELS)
        except ValueError as error:  # an ImageError, a class that this file cannot import
            is_too_large = getattr(error, "is_too_large", False)
            raise RequestError(f"The image {error}.", 413 if is_too_large else 422) from error

    def _embed_texts(self, texts: tuple[str, ...], labels: tuple[str, ...] = ()) -> Tensor:
        """Return (T, D) float32 embeddings before normalization; refuse labels whose texts have the same tokens."""
        tokenizer = self.processor.tokenizer
        with self._tokenizer_lock:  # each call sets the padding of the tokenizer, which all threads share
            tokens = [torch.tensor(ids) for ids in tokenizer(list(texts), truncation=True)["input_ids"]]
        seen: dict[tuple[int, ...], str] = {}
        for label, ids in zip(labels, tokens, strict=False):
            if (other := seen.setdefault(tuple(ids.tolist()), label)) != label:
                both = f"{reprlib.repr(other)} and {reprlib.repr(label)}"
                raise RequestError(f"The labels {both} are one text to the model; leave one out, or use other words.")
        num_tokens = sum(map(len, tokens))
        if num_tokens > MAX_TOKENS:
            raise RequestError(f"The texts have {num_tokens} tokens, over the limit of {MAX_TOKENS}; send less.", 413)

        # Similar lengths together: less padding.
        embeds: Tensor = self.model.embed_in_batches(tokens, self._run_texts, TEXT_BATCH, len)
        return embeds

    def _run_images(self, images: list[Tensor]) -> Tensor:
        with self._workers:
            embeds: Tensor = self.model.embed_pixels(images)
        return embeds

    def _run_texts(self, texts: list[Tensor]) -> Tensor:
        """Embed token ids, each (L,), with those that other threads wait with; all of them have been checked."""
        own: Future[Tensor] = Future()
        self._waiting.append((own, texts))
        # An int8 graph scales a text by the largest values in its batch: other texts would change the answer.
        num_texts = 1 if getattr(self.model, "quantization", "") else TEXT_BATCH
        with self._workers:
            while not own.done() and self._waiting:
                taken: list[tuple[Future[Tensor], list[Tensor]]] = []
                with contextlib.suppress(IndexError):  # another worker has taken the last
                    while sum(len(texts) for _, texts in taken) < num_texts:
                        taken.append(self._waiting.popleft())
                try:
                    embeds = (
                        self._run_padded([ids for _, texts in taken for ids in texts]) if taken else torch.empty(0)
                    )
                    for (future, _), part in zip(taken, embeds.split([len(texts) for _, texts in taken]), strict=True):
                        future.set_result(part)
                except Exception as error:
                    for future, _ in taken:
                        future.set_exception(error)
        return own.result()

    def _run_padded(self, texts: list[Tensor]) -> Tensor:
        input_ids = pad_sequence(texts, batch_first=True, padding_value=self.processor.tokenizer.pad_token_id)
        mask = pad_sequence([torch.ones_like(ids) for ids in texts], batch_first=True)
        inputs = {"input_ids": input_ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
        embeds: Tensor = self.model.get_text_features(**inputs).pooler_output
        return embeds


class EndpointHandler(RequestHandler):
    """The class that Inference Endpoints look for in a model folder's `handler.py`.

    Args:
        path: the folder that holds this file.

    Raises:
        ValueError: `path` is another folder.
    """

    def __init__(self, path: str | Path) -> None:
        # The code in this folder may run because it came with this file, which runs already: whoever deployed the one
        # has trusted the other. That holds for no other folder, so no other is loaded. Folders are compared rather
        # than files, because in the Hub's cache this file itself is a link to another place.
        own_folder = Path(__file__).parent
        is_own = Path(path).resolve() == own_folder.resolve()
        if not is_own:
            raise ValueError(f"{path} is not {own_folder}, the folder of this handler, which loads no other.")
        model = AutoModel.from_pretrained(path, trust_remote_code=is_own).eval()
        super().__init__(model.to("cuda" if torch.cuda.is_available() else "cpu"))


def read_content(source: Any) -> bytes | bytearray | Image.Image:
    """Return the encoded image in a request; a Pillow image is returned as it is.

    Args:
        source: base64, a data URL, bytes, a Pillow image, or `{"image": ...}` with one of these.

    Raises:
        RequestError: it is something else, or exceeds `MAX_IMAGE_BYTES`.
    """
    if isinstance(source, dict):
        source = source.get("image")
    if isinstance(source, str):
        source = _decode_base64(source)
    if not isinstance(source, (bytes, bytearray, Image.Image)):
        raise RequestError(f"{reprlib.repr(source)} is not an image; send its bytes, in JSON as base64.")
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
    """Split a request into task, inputs and parameters, and refuse parameters that the task does not have."""
    if not isinstance(data, dict):
        raise RequestError('The request is not a JSON object; send {"inputs": ..., "parameters": {...}}.')
    parameters = data.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise RequestError(f"parameters={reprlib.repr(parameters)} is not a JSON object.")
    # For feature extraction clients send the parameters next to `inputs`; older ones send `options` for HF's servers.
    top_level = {key: value for key, value in data.items() if key not in ("inputs", "image", "parameters", "options")}
    parameters = {name: value for name, value in {**top_level, **parameters}.items() if value is not None}
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
    """Return whether inputs can only be images, not texts."""
    first = inputs[0] if isinstance(inputs, (list, tuple)) and inputs else inputs
    return isinstance(first, (dict, bytes, bytearray, Image.Image))


def _read_labels(parameters: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the labels, and the caption made from each."""
    labels = parameters.get("candidate_labels")
    if labels is None:
        raise RequestError(f'candidate_labels is missing; give a list, or "task": "{FEATURES}" for an embedding.')
    if isinstance(labels, str):
        labels = [label.strip() for label in labels.split(",")]
    template = parameters.get("hypothesis_template", DEFAULT_TEMPLATE)
    # Exactly once: with many placeholders a short request would make gigabytes of captions.
    if not isinstance(template, str) or template.count("{}") != 1:
        raise RequestError(f"hypothesis_template={reprlib.repr(template)} is not allowed; it must hold {{}} once.")
    texts = _check_texts("label", labels, extra_characters=len(template))
    if len(set(texts)) < len(texts):
        duplicate = next(text for text in texts if texts.count(text) > 1)
        raise RequestError(
            f"The label {reprlib.repr(duplicate)} is given twice; it would share its score with itself."
        )
    _check_texts("hypothesis_template", [template])
    return texts, tuple(template.replace("{}", label) for label in texts)


def _check_texts(kind: str, texts: Any, extra_characters: int = 0) -> tuple[str, ...]:
    """Return the texts as a tuple; refuse anything but a list of them, and too many, too long or invalid ones."""
    if not isinstance(texts, (list, tuple)) or not 1 <= len(texts) <= MAX_TEXTS:
        count = f"{len(texts)} of them" if isinstance(texts, (list, tuple)) else reprlib.repr(texts)
        raise RequestError(f"{kind}: {count} is not allowed; give a list of 1 to {MAX_TEXTS}.")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise RequestError(f"The {kind} {reprlib.repr(text)} is not allowed; give words.")
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a character, such as "\ud800" in JSON
            raise RequestError(f"The {kind} {text[:30]!a} is not text in UTF-8.") from None
    total = sum(map(len, texts)) + extra_characters * len(texts)
    if total > MAX_CHARACTERS:
        raise RequestError(f"{kind}: {total} characters are over the limit of {MAX_CHARACTERS}; send less.", 413)
    return tuple(texts)


def _check_finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise ValueError("The model returns NaN or infinity: its weights are damaged.")
    return values
