"""What to evaluate, and the folder of the report: checked before anything slow is imported."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from clipmini.files import RECIPE_FILE, RESULTS_FILE, RunRecord
from clipmini.inference.prompts import load_templates
from clipmini.names import as_command, check_engine, expand, locate, locate_model
from clipmini.recipe_files import is_same_source, parse_changes, read_data_section

RETRIEVAL, ZERO_SHOT, PROBE = "retrieval", "zero-shot", "probe"
OPTIONS = {  # that only some tasks have
    RETRIEVAL: ("train_data", "baseline", "check_leaks"),
    ZERO_SHOT: ("template", "baseline"),
    PROBE: ("check_leaks",),
}
LABELED_KEYS = ("image_column", "label_column", "config_name", "class_names")
TABLE_FILE, INDEX_FILE, PAGE_FILE = "results.md", "model-index.yaml", "report.html"
FILES = (TABLE_FILE, INDEX_FILE, PAGE_FILE, RESULTS_FILE)


@dataclass(frozen=True)
class Request:
    """What to measure: the arguments of `clipmini.evaluate`, which describes them, checked.

    Raises:
        ValueError: there is no such task, model, data or template, or the task has no such option.
    """

    model: Any
    data: str
    task: str = RETRIEVAL
    split: str | None = None
    baseline: Any = None
    template: str | None = None
    train_data: str | None = None
    check_leaks: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "auto"

    def __post_init__(self) -> None:
        if self.task not in OPTIONS:
            raise ValueError(f"task={self.task!r} is not allowed; use one of {', '.join(OPTIONS)}.")
        for name in ("template", "train_data", "baseline", "check_leaks"):
            value, default = getattr(self, name), getattr(Request, name)
            if value is not default and name not in OPTIONS[self.task]:
                raise ValueError(f"{name}={value!r} has no meaning for the task {self.task}; leave it out.")
        if self.task == RETRIEVAL:
            sources = [str(section["source"]) for section in (self.pairs, self.train_pairs) if section]
        else:
            sources = [self.data]
            for key in self.changes:
                if key not in LABELED_KEYS:
                    raise ValueError(
                        f"{key} is not an option of labeled images; set one of {', '.join(LABELED_KEYS)}."
                    )
            if self.template is not None:
                load_templates(self.template)
        check_engine(self.engine, self.model)
        for model in self.models:
            locate_model(model)
        for source in sources:
            locate(source, "a folder or a table" if self.task == RETRIEVAL else "a folder", "dataset")

    @property
    def command(self) -> str | None:
        """The command that measures the same; None for a model that has no name but is an object of Python."""
        if not all(isinstance(model, (str, Path)) for model in self.models):
            return None
        words: list[str] = []
        task = None if self.task == RETRIEVAL else self.task
        options = {"task": task, "split": self.split, "baseline": self.baseline, "template": self.template}
        for name, value in {**options, "train-data": self.train_data}.items():
            words += [] if value is None else [f"--{name}", str(value)]
        words += ["--no-check-leaks"] * (not self.check_leaks)
        words += [] if self.engine == "auto" else ["--engine", self.engine]
        for key, value in self.changes.items():
            plain = f"{key}={value}"
            is_plain = parse_changes([plain]) == {key: value}
            words += ["--set", plain if is_plain else f"{key}={json.dumps(value, default=str)}"]
        return as_command("evaluate", self.model, self.data, options=words)

    @property
    def models(self) -> list[Any]:
        """The model and, if there is one, the baseline."""
        return [self.model] if self.baseline is None else [self.model, self.baseline]

    @cached_property
    def pairs(self) -> dict[str, Any]:
        """The data section of the pairs; for the model's own training data, the one that it was trained with."""
        wanted = read_data_section(self.data, self.changes)
        name = expand(getattr(self.model, "name_or_path", self.model))
        recipe_file = Path(name).absolute().parent / RECIPE_FILE
        if name and recipe_file.is_file():
            source = str(read_data_section(str(recipe_file), {})["source"])
            if is_same_source(source, str(wanted["source"])):
                return read_data_section(str(recipe_file), self.changes)
        return wanted

    @cached_property
    def train_pairs(self) -> dict[str, Any] | None:
        """The data section of the pairs that the model was trained on, if they are named."""
        return None if self.train_data is None else read_data_section(self.train_data, {})


def check_folder(folder: Path, overwrite: bool) -> None:
    """Check that an evaluation can be written to a folder, before hours are spent on it.

    Raises:
        ValueError: the path is not a folder, or cannot be written to; it holds a training run, or a file that no
            evaluation wrote; or it holds an evaluation and `overwrite` is not set.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"{nearest} is a file; name a folder with --out.")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"{nearest} cannot be written to ({error.strerror}); name another with --out.") from error
    if (folder / RECIPE_FILE).exists():
        raise ValueError(
            f"{folder} holds a training run, whose {RESULTS_FILE} would be lost; name another with --out."
        )
    recorded = RunRecord(folder).read()
    if others := [name for name in FILES if (folder / name).exists() and name not in recorded]:
        raise ValueError(f"{folder} holds {others[0]}, which no evaluation wrote; name another with --out.")
    if (folder / RESULTS_FILE).exists() and not overwrite:
        raise ValueError(f"{folder} holds an evaluation; pass --overwrite, or --out another folder.")
