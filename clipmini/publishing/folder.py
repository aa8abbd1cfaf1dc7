"""What a run's folder holds, and the trained model's in it, complete and never half written."""

import json
import re
import shutil
from collections.abc import Iterable
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import Tensor

import modeling_clipmini
from clipmini.files import RunRecord, atomic_write
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor

HANDLER = Path(modeling_clipmini.__file__).parent / "handler.py"  # Inference Endpoints look for it beside the model
REQUIREMENTS_FILE, NOTICE_FILE = "requirements.txt", "NOTICE"
CODE_NOTICE = """\
The code in this folder, the files *_clipmini.py and handler.py, is clipmini's.
License of the code: Apache-2.0, http://www.apache.org/licenses/LICENSE-2.0
"""
RULE = "\n" + 72 * "-" + "\n\n"  # between the parts of a NOTICE
NEEDED_BY_THE_MODEL = ("torch", "torchvision", "transformers", "timm", "numpy", "pillow")
# How sentence-transformers, from 5.4 on, reads the same weights: its stock modules call the model's own methods.
SENTENCE_TRANSFORMERS_FILES: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
            "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
        },
        "module_output_name": "sentence_embedding",
    },
    "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
}


def save_model_folder(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    folder: Path,
    card: ModelCard | None = None,
    state_dict: dict[str, Tensor] | None = None,
    made_of: Iterable[str] = (),
    record: "RunRecord | None" = None,
) -> None:
    """Save a complete model folder: code, config, weights, processor, tokenizer and card.

    Beside what transformers reads there are the files that make it a model of sentence-transformers, the packages that
    it needs, a NOTICE, and the handler of Inference Endpoints.

    It is written beside and renamed, so that no half of it is ever found under its name; a folder that stood there
    before is replaced.

    Args:
        model: what to save.
        processor: the model's processor.
        folder: where.
        card: what becomes its README.md.
        state_dict: weights to save in place of the model's own.
        made_of: folders of the towers, or of the model that it goes on from; what their NOTICE files say stays.
        record: of the run that the folder belongs to; is told the files.
    """
    with atomic_write(folder) as beside:
        model.save_pretrained(beside, state_dict=state_dict)
        processor.save_pretrained(beside)
        shutil.copymode(beside / "config.json", beside / "model.safetensors")  # safetensors writes for its owner alone
        for name, content in SENTENCE_TRANSFORMERS_FILES.items():
            (beside / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (beside / REQUIREMENTS_FILE).write_text(_requirements(), encoding="utf-8")
        (beside / NOTICE_FILE).write_text(_notice(made_of), encoding="utf-8")
        shutil.copyfile(HANDLER, beside / HANDLER.name)
        if card is not None:
            card.save(beside / "README.md")
        if record is not None:
            record.add(folder / file.relative_to(beside) for file in beside.rglob("*") if file.is_file())


def _notice(made_of: Iterable[str]) -> str:
    """Say whose the code is, and what the NOTICE files of all that the model is made of say, each part once."""
    files = [Path(folder) / NOTICE_FILE for folder in made_of]
    parts = [CODE_NOTICE]
    for file in files:
        parts += file.read_text(encoding="utf-8").split(RULE) if file.is_file() else []
    return RULE.join(dict.fromkeys(part.strip() + "\n" for part in parts))


def _requirements() -> str:
    """Give the lowest versions that this package states of what a loaded model imports."""
    floors = {re.match(r"[\w.-]+", line)[0]: line for line in requires("clipmini") or ()}  # type: ignore[index]
    return "".join(floors[name] + "\n" for name in NEEDED_BY_THE_MODEL)
