"""A trained model's folder, complete and never half written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import ModelCard
from torch import Tensor

from modeling_clipmini import ClipMiniModel, ClipMiniProcessor


def save_model_folder(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    folder: Path,
    card: ModelCard | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Save a complete model folder: code, config, weights, processor, tokenizer and card.

    It is written beside and renamed, so that no half of it is ever found under its name; a folder that stood there
    before is replaced.

    Args:
        model: what to save.
        processor: the model's processor.
        folder: where.
        card: what becomes its README.md.
        state_dict: weights to save in place of the model's own.
    """
    with written_beside(folder) as beside:
        model.save_pretrained(beside, state_dict=state_dict)
        processor.save_pretrained(beside)
        shutil.copymode(beside / "config.json", beside / "model.safetensors")  # safetensors writes for its owner alone
        if card is not None:
            card.save(beside / "README.md")


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """Give a path beside `target` to write to; when all is written, it takes the place of what stood there."""
    beside, old = (target.with_name(f".{target.name}.{os.getpid()}{suffix}") for suffix in ("", ".old"))
    try:
        yield beside
        if target.is_symlink():
            target.unlink()
        if target.is_dir():  # a folder cannot be replaced in one step
            target.rename(old)
        try:
            beside.replace(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        for path in (beside, old):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
