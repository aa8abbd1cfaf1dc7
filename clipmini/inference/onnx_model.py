"""A clipmini model in ONNX Runtime: the two graphs that `clipmini export` wrote, in the place of torch's towers."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clipmini.conversion import resolve_model
from clipmini.files import weights_sha256
from clipmini.names import ONNX_FOLDER, as_command, expand, first_sentence
from clipmini.trust import fetch
from modeling_clipmini import ClipMiniConfig, ClipMiniProcessor
from modeling_clipmini.modeling_clipmini import ClipMiniTextHalf, ClipMiniVisionHalf

from .embed import load_part, load_processor

IMAGES_AT_ONCE = 2  # on one core, EfficientNet-Lite0 takes 6.1 ms an image, and 7.5 with 16 at once
VISION_GRAPH, TEXT_GRAPH, QUANTIZED = "vision_model", "text_model", "_quantized"
INPUTS = {VISION_GRAPH: ["pixel_values"], TEXT_GRAPH: ["input_ids", "attention_mask"]}
OUTPUTS = {VISION_GRAPH: "image_embeds", TEXT_GRAPH: "text_embeds"}
PREPARATION = (  # files of a model but its weights, code and card
    *("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab*", "merges.txt", "*.model", "NOTICE*", "LICENSE*"),
)


class OnnxModel(nn.Module):
    """A model that stands where a `ClipMiniModel` in eval mode stands; ONNX Runtime computes it, on the CPU.

    It is a module without parameters, since what embeds with a model also sets its mode.

    Args:
        graphs: the folder of the graphs.
        config: the model's.
        processor: the model's.
        is_quantized: use the int8 graph of a half that has one.

    Attributes:
        weights_sha256: digest of the weights that the graphs were exported from.
        quantization: digest of the int8 graphs; "" if none is used.

    Raises:
        ValueError: a graph is missing, damaged, or not of this model.
    """

    device, dtype = torch.device("cpu"), torch.float32
    read_image = staticmethod(ClipMiniVisionHalf.read_image)
    image_size = staticmethod(ClipMiniVisionHalf.image_size)
    embed_in_batches = staticmethod(ClipMiniVisionHalf.embed_in_batches)
    encode_image = ClipMiniVisionHalf.encode_image
    embed_captions, encode_text = ClipMiniTextHalf.embed_captions, ClipMiniTextHalf.encode_text

    def __init__(
        self, graphs: Path, config: ClipMiniConfig, processor: ClipMiniProcessor, is_quantized: bool = False
    ) -> None:
        super().__init__()
        self.config, self.processor, self.name_or_path = config, processor, str(graphs.parent)
        files = [_choose_file(graphs, name, is_quantized) for name in INPUTS]
        self._vision, self._text = sessions = [_open(file, config.projection_dim) for file in files]
        self.text_model = self.text_projection = nn.Identity()  # `encode_text` sets their mode; the graph has both
        facts = [session.get_modelmeta().custom_metadata_map for session in sessions]
        try:
            (self.weights_sha256,) = {fact["weights_sha256"] for fact in facts}
            self._logit_scale = float(facts[0]["logit_scale"])
            if not 0 < self._logit_scale < float("inf"):
                raise ValueError("no scale")
        except (KeyError, ValueError):
            raise ValueError(
                f"The graphs in {graphs} do not say that they are of one model's weights; {_remedy(graphs)}"
            ) from None
        int8 = [file.read_bytes() for file in files if QUANTIZED in file.stem]
        self.quantization = hashlib.sha256(b"".join(int8)).hexdigest() if int8 else ""
        self.eval()

    def get_logit_scale(self) -> Tensor:
        """Return the logit scale, the inverse temperature: a scalar."""
        return torch.tensor(self._logit_scale)

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Embed prepared images, (I, 3, height, width): `pooler_output` is (I, D), of length 1."""
        parts = [_run(self._vision, [part]) for part in pixel_values.split(IMAGES_AT_ONCE)]
        return BaseModelOutputWithPooling(pooler_output=torch.cat(parts))

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """Embed captions, (T, L) ids and a mask; None for no padding: `pooler_output` is (T, D), of length 1."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return BaseModelOutputWithPooling(pooler_output=_run(self._text, [input_ids, mask]))

    def embed_pixels(self, batch: list[Tensor]) -> Tensor:
        """Embed n prepared images, each (1, 3, height, width), as (n, D)."""
        return self.get_image_features(torch.cat(batch))["pooler_output"]


def load_onnx_model(name_or_path: str | Path, is_quantized: bool = False) -> OnnxModel:
    """Load the graphs of a clipmini model, with its processor.

    Args:
        name_or_path: a model's folder with graphs in `onnx/`, one that `clipmini export --out` wrote, or a Hub id.
        is_quantized: as in `OnnxModel`.

    Raises:
        ValueError: there are no graphs, they are damaged or of other weights than those beside them, or the model's
            other files are missing, damaged, or name code of their own.
    """
    folder = fetch(resolve_model(name_or_path), [*PREPARATION, f"{ONNX_FOLDER}/*"])
    graphs = folder / ONNX_FOLDER
    config: ClipMiniConfig = load_part("config", ClipMiniConfig, folder)
    model = OnnxModel(graphs, config, load_processor(folder), is_quantized)
    if weights_sha256(folder) not in (None, model.weights_sha256):
        raise ValueError(f"The graphs in {graphs} are of other weights than those beside them; {_remedy(graphs)}")
    model.name_or_path = expand(name_or_path)
    return model


def _choose_file(graphs: Path, name: str, is_quantized: bool) -> Path:
    quantized = graphs / f"{name}{QUANTIZED}.onnx"
    return quantized if is_quantized and quantized.is_file() else graphs / f"{name}.onnx"


def _open(file: Path, width: int) -> onnxruntime.InferenceSession:
    """Open a graph with as many threads as torch has; check what it takes and returns."""
    if not file.is_file():
        raise ValueError(f"There is no {file}; {_remedy(file.parent)}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait without sleeping take cores from what decodes images, and nearly double the CPU time.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has a class for each status
        raise ValueError(f"{file} cannot be loaded ({first_sentence(error)}); {_remedy(file.parent)}") from error
    name = file.stem.removesuffix(QUANTIZED)
    outputs = [(output.name, output.shape[-1:]) for output in session.get_outputs()]
    if [item.name for item in session.get_inputs()] != INPUTS[name] or outputs != [(OUTPUTS[name], [width])]:
        raise ValueError(
            f"{file} is another graph than clipmini's, which turns {' and '.join(INPUTS[name])} into {OUTPUTS[name]} "
            f"of {width} dimensions; {_remedy(file.parent)}"
        )
    return session


def _remedy(graphs: Path) -> str:
    return f"write the graphs anew: {as_command('export', graphs.parent, options=['--to', 'onnx'])}"


def _run(session: onnxruntime.InferenceSession, inputs: Sequence[Tensor]) -> Tensor:
    arrays = (np.ascontiguousarray(value.numpy()) for value in inputs)
    names = (item.name for item in session.get_inputs())
    return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])
