"""The folder of a trained model, saved completely or not at all."""

import json
import re
import shutil
from collections.abc import Iterable
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

import modeling_clipmini
from clipmini.files import WEIGHTS_FILE, RunRecord, atomic_write
from clipmini.inference.bank import Bank, save_bank
from modeling_clipmini import ClipMiniModel

HANDLER = Path(modeling_clipmini.__file__).parent / "handler.py"  # Inference Endpoints look for it in the folder
NOTICE_FILE = "NOTICE"
CODE_NOTICE = """\
The code in this folder, the files *_clipmini.py and handler.py, is clipmini's.
License of the code: Apache-2.0, http://www.apache.org/licenses/LICENSE-2.0
"""
RULE = "\n" + 72 * "-" + "\n\n"  # separates the parts of a NOTICE
NEEDED_BY_THE_MODEL = ("torch", "torchvision", "transformers", "timm", "numpy", "pillow")
# From 5.4 on, sentence-transformers loads the same weights by these: its stock modules call the model's own methods.
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
    folder: Path,
    card: ModelCard | None = None,
    bank: Bank | None = None,
    made_of: Iterable[str] = (),
    record: RunRecord | None = None,
) -> None:
    """Save a model with all that belongs to it: code, config, weights, processor, tokenizer and card.

    The folder also holds what makes it a model of sentence-transformers, the list of packages it needs, a NOTICE, and
    the handler for Inference Endpoints. It is written under another name and renamed when complete, so it is never
    found half written; it replaces a folder of the same name.

    Args:
        model: the model to save, with its processor.
        folder: where to save it.
        card: saved as README.md.
        bank: the model's, saved beside the weights; without one, none is left from an earlier model.
        made_of: folders of the towers, or of the model that training started from; their NOTICE files are kept.
        record: the record of the run that the folder belongs to; the saved files are added to it.
    """
    with atomic_write(folder) as temporary:
        model.save_pretrained(temporary)
        model.processor.save_pretrained(temporary)
        # safetensors makes a file that only its owner can read.
        shutil.copymode(temporary / "config.json", temporary / WEIGHTS_FILE)
        if bank is not None:
            save_bank(bank, temporary)
        for name, content in SENTENCE_TRANSFORMERS_FILES.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (temporary / "requirements.txt").write_text(_requirements(), encoding="utf-8")
        (temporary / NOTICE_FILE).write_text(_notice(made_of), encoding="utf-8")
        shutil.copyfile(HANDLER, temporary / HANDLER.name)
        if card is not None:
            card.save(temporary / "README.md")
        if record is not None:
            record.add(folder / file.relative_to(temporary) for file in temporary.rglob("*") if file.is_file())


def _notice(made_of: Iterable[str]) -> str:
    """Join the notice about the code and those in the given folders, each part once."""
    parts = [CODE_NOTICE]
    for folder in made_of:
        file = Path(folder) / NOTICE_FILE
        parts += file.read_text(encoding="utf-8").split(RULE) if file.is_file() else []
    return RULE.join(dict.fromkeys(part.strip() + "\n" for part in parts))


def _requirements() -> str:
    """List the packages that a loaded model imports, with the lowest versions that this package allows."""
    floors = {re.match(r"[\w.-]+", line)[0]: line for line in requires("clipmini") or ()}  # type: ignore[index]
    return "".join(floors[name] + "\n" for name in NEEDED_BY_THE_MODEL)
