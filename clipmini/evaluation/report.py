"""Evaluate a model on data, by whatever names a user gives them."""

from collections.abc import Sequence
from pathlib import Path

from clipmini.data.images import Skipped
from clipmini.data.pairs import DataArguments
from clipmini.data.recipe_files import load_data_arguments
from clipmini.files import RECIPE_FILE
from clipmini.inference.zero_shot import DEFAULT_TEMPLATE

from .classification_report import report_probe, report_zero_shot
from .results import Evaluation
from .retrieval_report import report_retrieval

RETRIEVAL, ZERO_SHOT, PROBE = "retrieval", "zero-shot", "probe"
OPTIONS = {RETRIEVAL: ("train_data", "baseline"), ZERO_SHOT: ("template", "baseline"), PROBE: ()}  # not of all tasks
LABELED_KEYS = ("image_column", "label_column", "config_name")


def evaluate(
    model: str,
    data: str,
    task: str = RETRIEVAL,
    *,
    split: str | None = None,
    baseline: str | None = None,
    template: str | None = None,
    train_data: str | None = None,
    check_leaks: bool = True,
    overrides: Sequence[str] = (),
    skipped: Skipped | None = None,
) -> Evaluation:
    """Measure a model, and lay out the report.

    Args:
        model: whatever `load_encoder` takes.
        data: for retrieval, a recipe, whose data section is taken, or a source of pairs; of the source that the model
            was trained on, splits are those of its training, whichever names it. For the other tasks, whatever
            `load_labeled` takes.
        task: "retrieval", "zero-shot" or "probe".
        split: which split; by default test, else validation, else train.
        baseline: another model to compare with; not for a probe.
        template: of zero-shot classification alone; see `load_templates`.
        train_data: of retrieval alone: what the model was trained on, as in `data`, to look for leaks.
        check_leaks: of retrieval, and of a probe between its own train split and the measured one.
        overrides: "key=value" strings: keys of the data section, or for labeled images `image_column`,
            `label_column` and `config_name`.
        skipped: takes what cannot be read.

    Returns:
        The evaluation, not yet written.

    Raises:
        ValueError: a model, the data, or an option that the task does not have.
    """
    if task not in OPTIONS:
        raise ValueError(f"task={task!r} is not allowed; use one of {', '.join(OPTIONS)}.")
    given = {"template": template, "train_data": train_data, "baseline": baseline}
    for name, value in given.items():
        if value is not None and name not in OPTIONS[task]:
            raise ValueError(f"{name}={value!r} has no meaning for the task {task}; leave it out.")
    if task == ZERO_SHOT and not check_leaks:
        raise ValueError(
            "check_leaks=False has no meaning for the task zero-shot, which looks for none; leave it out."
        )
    if task == RETRIEVAL:
        return report_retrieval(
            model,
            _pairs_of(model, data, overrides),
            split=split,
            baseline=baseline,
            train_data=None if train_data is None else load_data_arguments(train_data),
            check_leaks=check_leaks,
            skipped=skipped,
        )
    columns = dict(_labeled_key(override) for override in overrides)
    if task == ZERO_SHOT:
        template = template or DEFAULT_TEMPLATE
        return report_zero_shot(
            model, data, split=split, baseline=baseline, template=template, skipped=skipped, columns=columns
        )
    return report_probe(model, data, split=split, check_leaks=check_leaks, skipped=skipped, columns=columns)


def _pairs_of(model: str, data: str, overrides: Sequence[str]) -> DataArguments:
    """Read which pairs are meant; of what the model was trained on, split as it was then."""
    wanted = load_data_arguments(data, overrides)
    recipe_file = Path(model).absolute().parent / RECIPE_FILE
    if recipe_file.is_file():
        source = load_data_arguments(str(recipe_file)).source
        is_file = Path(source).exists() and Path(wanted.source).exists()
        if source == wanted.source or (is_file and Path(source).samefile(wanted.source)):
            return load_data_arguments(str(recipe_file), overrides)
    return wanted


def _labeled_key(override: str) -> tuple[str, str]:
    key, separator, value = override.partition("=")
    if not separator or key not in LABELED_KEYS:
        raise ValueError(f"--set {override!r}: for labeled images, set one of {', '.join(LABELED_KEYS)}.")
    return key, value
