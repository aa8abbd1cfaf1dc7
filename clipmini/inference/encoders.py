"""Load any model that embeds images and captions into one space: to search with, to compare with, to learn from."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clipmini.conversion import resolve_model
from clipmini.files import weights_sha256
from clipmini.names import ONNX_ENGINES, ONNX_INT8, expand, locate_model
from modeling_clipmini import ClipMiniModel

from .bank import load_bank
from .embed import DualEncoder, load_model

if TYPE_CHECKING:
    from .onnx_model import OnnxModel

logger = logging.getLogger(__name__)


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
        model: the folder or Hub id of a clipmini model, or one that `clipmini.conversion.convert` takes. A model that
            is loaded already is put in eval mode, and an encoder returned as it is.
        engine: one of `ENGINES`.

    Returns:
        The encoder, on the best device unless it was loaded already. It is named by its Hub id or folder; a folder
        called "model", as in every training run, by the folder above it. A clipmini model has its bank, unless that is
        damaged or of other weights, which is logged. Loading one makes the process keep freed memory.

    Raises:
        ValueError: the model cannot be loaded, for this engine, or cannot be converted.
    """
    located = locate_model(model, engine)
    if isinstance(model, DualEncoder):
        return model
    if not isinstance(model, (str, Path)):
        return DualEncoder(model.eval(), _short_name(model.name_or_path or "model"))
    name = resolve_model(located)
    encoder = DualEncoder(load_clipmini(name, engine=engine), _short_name(expand(model)))
    encoder.weights_sha256 = encoder.weights_sha256 or weights_sha256(Path(located))  # of a converted one, its own
    try:
        encoder.bank = load_bank(name, encoder.weights_sha256)
    except ValueError as error:  # the model works without it, and by cosine as the literature has it
        logger.warning("Scores are cosines: %s", error)
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
