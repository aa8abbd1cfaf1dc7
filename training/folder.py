"""What a run's folder holds, and the trained model's in it, complete and never half written."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import Tensor

from modeling_clipmini import ClipMiniModel, ClipMiniProcessor

RECIPE_FILE, RESULTS_FILE, CURVES_FILE, MODEL_FOLDER = "recipe_as_run.yaml", "results.json", "curves.png", "model"
METRICS_FILE, STAGE_FILE, RECORD_FILE = "metrics.jsonl", "stage.json", "written_files.json"
OF_NOBODY = {"__pycache__", ".DS_Store"}  # what Python and systems leave anywhere
CHECKPOINTS = "checkpoint-*"  # stands in a record for all that Trainer names by a step
HANDLER = Path(__file__).parent.parent / "inference" / "handler.py"  # Inference Endpoints look for it beside the model
REQUIREMENTS_FILE, NOTICE_FILE = "requirements.txt", "NOTICE"
CODE_NOTICE = """\
The code in this folder, the files *_clipmini.py and handler.py, is clipmini's.
Licence of the code: Apache-2.0, http://www.apache.org/licenses/LICENSE-2.0
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
    with written_beside(folder) as beside:
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


class RunRecord:
    """What runs and evaluations wrote into a folder, and so may replace; whatever else is there is somebody else's.

    It is a list of relative paths, kept in the folder itself. A file is recorded before it is written, so that a run
    which is killed at any moment knows its own again.

    Args:
        folder: the run's output folder; it need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> set[str]:
        """Return the recorded paths, relative to the folder; none where no run has recorded any.

        Raises:
            ValueError: the record is damaged.
        """
        file = self.folder / RECORD_FILE
        try:
            return set(json.loads(file.read_text(encoding="utf-8"))["files"]) if file.exists() else set()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}): move {self.folder} away, or name another.") from error

    def add(self, files: Iterable[Path]) -> None:
        """Record files that are about to be written.

        Args:
            files: paths below the folder, which is made if need be.
        """
        known = self.read()
        names = known | {file.relative_to(self.folder).as_posix() for file in files}
        if names != known:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_beside(self.folder / RECORD_FILE) as beside:
                beside.write_text(json.dumps({"files": sorted(names)}, indent=2) + "\n", encoding="utf-8")

    def find_unrecorded(self, stages: Iterable[str]) -> list[str]:
        """List what a run would replace, or take for its own, though no run wrote it.

        Args:
            stages: names of the recipe's stages, each of which has a folder below the run's.

        Returns:
            Paths relative to the folder, sorted.
        """
        known = self.read()
        found = []
        for stage in ("", *stages):
            for file in self._entries(stage):
                name = file.relative_to(self.folder).as_posix()
                # Of checkpoints Trainer deletes old ones by the step, whatever else may stand behind it.
                own = re.sub(r"checkpoint-\d+$", CHECKPOINTS, name)
                if own not in known:
                    found.append(name)
        return sorted(found)

    def _entries(self, stage: str) -> Iterator[Path]:
        """List what is there of all that a run writes, of its model every file."""
        folder = self.folder / stage
        files = (METRICS_FILE, STAGE_FILE) if stage else (RECIPE_FILE, RESULTS_FILE, CURVES_FILE, METRICS_FILE)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name == MODEL_FOLDER and path.is_dir() and not path.is_symlink():
                inside = (file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
                yield from (file for file in inside if not OF_NOBODY & set(file.parts))
            elif path.name in (*files, MODEL_FOLDER) or re.match(r"checkpoint-\d", path.name):
                yield path


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
