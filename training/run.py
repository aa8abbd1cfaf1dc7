"""One training run, top to bottom: data, features, trainer, measure, save."""

import copy
import json
import logging
import os
import re
import shutil
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import safe_open
from torch import nn
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from clipmini.data.duplicates import find_duplicates
from clipmini.data.images import Skipped, folder_of
from clipmini.data.pairs import PairDataset, load_data
from clipmini.data.scan import read_paths
from clipmini.data.sources import AUTO, Findings
from clipmini.evaluation.curves import draw_curves
from clipmini.evaluation.measure import Answers, draw_bank, measure_split
from clipmini.evaluation.results import Run, SearchExample, show_answers
from clipmini.files import (
    BANK_FILE,
    CHECKPOINTS,
    CURVES_FILE,
    MODEL_FOLDER,
    RECIPE_FILE,
    RESULTS_FILE,
    SAMPLES_FILE,
    STAGE_FILE,
    RunRecord,
    atomic_write,
    explain_full_disk,
    sole_run,
    versions,
)
from clipmini.inference.bank import Bank
from clipmini.inference.drawing import draw_examples
from clipmini.inference.embed import keep_freed_memory, load_model
from clipmini.inference.prompts import FEW, warn_of_unreadable
from clipmini.names import as_command, ask_hub, expand, first_sentence, public_name
from clipmini.publishing.folder import save_model_folder
from clipmini.publishing.kept import Task
from clipmini.publishing.push import explain_refusals, prepare_push, push, validate_card
from clipmini.recipe_files import check_stage
from modeling_clipmini import ClipMiniModel

from .arguments import ClipMiniTrainingArguments
from .build import ModelPreset, build_model
from .features import prepare_features
from .lora import merge_lora
from .offline_towers import resolve_tower
from .recipes import Recipe, render_recipe_card
from .trainer import ClipMiniTrainer

logger = logging.getLogger(__name__)

HELD_OUT = ("validation", "test")
NUM_SAMPLES = 2  # successes in the picture for the card, and as many failures
SAMPLE_COLUMNS = 2  # images in a row of it: the Hub shows it no wider than a page of text
MAX_EXAMPLES, MAX_QUERY_CHARACTERS = 100, 120  # of a caption that is an example of a search


def train(recipe: Recipe, *, overwrite: bool = False, stage: str | None = None) -> Run:
    """Run a recipe, or resume it if an earlier run of the same recipe was interrupted.

    Args:
        recipe: from `load_recipe`.
        overwrite: replace the run in the output folder: the files that runs have recorded there, and no others.
        stage: run only this stage. It starts from the model that the previous stage left in the output folder or, if
            there is none, from the recipe's model.

    Returns:
        Folders and recalls.

    Raises:
        ValueError: the output folder holds a finished run, a run of another recipe, or files that no run wrote, or
            another run is writing to it; there is no such stage; data or model cannot be used; or the Hub refuses the
            push, after the run is saved.
        OSError: a disk is full; what was there before is kept.
    """
    output_dir = Path(str(recipe.training.output_dir))
    is_main = recipe.training.process_index == 0  # the processes of torchrun are one run
    with explain_full_disk(output_dir), sole_run(output_dir) if is_main else nullcontext():
        return _train(recipe, output_dir, overwrite, _check_run(recipe, overwrite, stage))


def _train(recipe: Recipe, output_dir: Path, overwrite: bool, wanted: list[str]) -> Run:
    record = RunRecord(output_dir)
    keep_freed_memory()

    skipped = Skipped(strict=recipe.data.strict)
    findings: list[Findings] = []
    pairs = load_recipe_pairs(recipe, skipped, findings)
    duplicates = find_duplicates(pairs)
    if duplicates.images or duplicates.captions:
        logger.warning("%s", duplicates.summary())
    if "validation" not in pairs:
        recipe = _without_evaluation(recipe)
    held_out = [split for split in HELD_OUT if split in pairs]

    set_seed(recipe.training.seed)  # before the heads are made
    model = _start_model(recipe, output_dir, wanted)
    captions = PairDataset(pairs["train"]).captions
    warn_of_unreadable(model.processor.tokenizer, captions, "training captions", FEW)
    keep = recipe.values.get("keep")
    kept = None if keep is None else Task.load(keep, Skipped(strict=recipe.data.strict))
    kept_before = None if kept is None else kept.measure(model)
    histories: dict[str, list[dict[str, float]]] = {}
    before: dict[str, dict[str, float]] = {}
    for name in wanted or [""]:
        args = recipe.stages[name] if name else recipe.training
        features = prepare_features(model, pairs, args)
        trainer = _make_trainer(model, args, features)
        if not histories:
            before = {split: trainer.measure(features[split]) for split in held_out}
            # Only now that everything works: a mistyped value must not cost an earlier run.
            if args.process_index == 0:
                _claim_output_dir(record, recipe, wanted, overwrite)
            trainer.accelerator.wait_for_everyone()  # checkpoints that the others look for may be gone now
        model, histories[name], train_s = _run_stage(trainer, output_dir / name, record, is_one_of_many=bool(name))
    bank = _draw_bank(model, features["train"], args) if args.bank else None
    measured, answers = {}, None
    for split in held_out:
        after, answers = measure_split(
            model, features[split], args.per_device_eval_batch_size, args.matryoshka_widths, bank
        )
        measured[split] = {"before": before[split], **after}

    skipped.log_summary()
    finished = _finished_stages(recipe, output_dir, wanted)
    times = [stage["train_s"] for stage in finished.values()] or [train_s]
    results = {
        "data": {"source": public_name(recipe.data.source), "found": findings[0].lines(is_public=True)},
        "num_train_images": len(pairs["train"]),
        "num_train_captions": int(features["train"].num_captions.sum()),
        **skipped.to_dict(),
        "duplicates": duplicates.as_dict(),
        "num_parameters": model.num_parameters(),
        "bank": None if bank is None else bank.sizes,
        "train_s": None if None in times else sum(times),
        "stages": list(finished),
        "versions": versions(),
        "splits": measured,
        "kept": kept.compare(kept_before, kept.measure(model)) if kept and kept_before else None,
    }
    model_dir = output_dir / MODEL_FOLDER
    if args.process_index == 0:
        card = render_recipe_card(recipe, model.config, results)
        save_model_folder(model, model_dir, card, bank, made_of=_folders_of_origin(recipe), record=record)
        draw_curves({name or "training": log for name, log in histories.items()}, output_dir / CURVES_FILE)
        if answers is not None:
            _draw_samples(pairs[held_out[-1]], answers, output_dir / SAMPLES_FILE)
        # Last, since a run without results counts as interrupted.
        with atomic_write(output_dir / RESULTS_FILE) as file:
            file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        if recipe.training.push_to_hub:
            _push_model(model_dir, recipe.training)
    shown = [*reversed(held_out), "train"][0]
    return Run(output_dir, results, _find_example(recipe.data.source, shown, pairs, answers))


def _draw_bank(model: ClipMiniModel, pairs: PairDataset, args: ClipMiniTrainingArguments) -> Bank | None:
    if args.augment is not None:  # the images as people search them, not the views that were trained on
        pairs = PairDataset(pairs.rows, text_features=pairs.text_features)
    try:
        return draw_bank(model, pairs, args.seed, args.per_device_eval_batch_size)
    except ValueError as error:  # an image that is gone since, or a training that diverged, must not cost the model
        logger.warning("%s is not saved: %s", BANK_FILE, error)
        return None


def _find_example(source: str, split: str, pairs: DatasetDict, answers: Answers | None) -> SearchExample | None:
    """Find a search for the images of a split: a caption that was answered right, if there is one."""
    rows = pairs[split]
    folder = folder_of(source, read_paths(rows))
    others = (path for name in pairs.keys() - {split} for path in read_paths(pairs[name]))
    root = os.path.join(Path(expand(folder or "")).absolute(), "")
    # The search ranks all images in the folder: what was first in the split need not be so among those of others.
    is_alone = folder is not None and not any(path and path.startswith(root) for path in others)
    if answers is None:  # nothing was measured
        found = [(caption, False) for captions in rows["captions"][:MAX_EXAMPLES] for caption in captions]
    else:
        found = [(answer.caption, answer.found[0].is_correct) for answer in (*answers.right, *answers.wrong)]
    for caption, is_first in found:
        query = "".join(filter(str.isprintable, " ".join(caption.split())))
        if folder is not None and 0 < len(query) <= MAX_QUERY_CHARACTERS:
            return SearchExample(folder, query, split, is_first and is_alone)
    return None


def _draw_samples(rows: Dataset, answers: Answers, out: Path) -> None:
    groups = {heading: examples[:NUM_SAMPLES] for heading, examples in show_answers(rows, answers).groups.items()}
    try:
        draw_examples(groups, SAMPLE_COLUMNS, out)
    except ValueError as error:  # a drawing must not cost the trained model
        logger.warning("%s is not drawn: %s", out.name, error)


def _check_run(recipe: Recipe, overwrite: bool, stage: str | None) -> list[str]:
    """Check that a recipe can be run in its output folder, and pushed if it says so; return the stages to run."""
    check_stage(stage, recipe.stages)
    wanted = list(recipe.stages) if stage is None else [stage]
    _check_output_dir(RunRecord(Path(str(recipe.training.output_dir))), recipe, wanted, overwrite)
    _check_push(recipe)
    return wanted


def plan_run(recipe: Recipe, *, overwrite: bool = False, stage: str | None = None) -> dict[str, Any]:
    """Find out what `train` would do, without training or writing anything; arguments and errors are the same.

    Returns:
        Ready for JSON: `recipe` as it would run, `data` as it was found, `splits` with their numbers of images and
        captions, what would be skipped, `output_dir`, and `start`: for each stage, or "" without stages, what it would
        start from.
    """
    wanted = _check_run(recipe, overwrite, stage)
    output_dir = Path(str(recipe.training.output_dir))
    skipped = Skipped(strict=recipe.data.strict)
    findings: list[Findings] = []
    pairs = load_recipe_pairs(recipe, skipped, findings)
    start = {}
    for name in wanted or [""]:
        checkpoint, _ = _last_checkpoint(output_dir / name)
        if overwrite and (output_dir / RECIPE_FILE).exists():
            start[name] = "replaces the run that is there"
        elif name and (output_dir / name / STAGE_FILE).exists():
            start[name] = "is finished already"
        else:
            start[name] = f"resumes from {checkpoint}" if checkpoint else "starts anew"
    return {
        "recipe": recipe.values,
        "data": findings[0].to_dict(),
        "splits": {
            name: {"num_images": len(rows), "num_captions": int(PairDataset(rows).num_captions.sum())}
            for name, rows in pairs.items()
        },
        **skipped.to_dict(),
        "output_dir": str(output_dir),
        "start": start,
    }


def _push_model(folder: Path, args: ClipMiniTrainingArguments) -> None:
    repo_id, branch = str(args.hub_model_id), args.hub_revision
    try:
        prepared = prepare_push(folder, repo_id)
        pushed = push(prepared, private=args.hub_private_repo, revision=branch)
    except ValueError as error:
        options = ["--private"] * bool(args.hub_private_repo) + (["--revision", branch] if branch else [])
        again = as_command("push", folder, repo_id, options=options)
        raise ValueError(f"the model is trained and saved, but not pushed: {error} To push it: {again}") from error
    logger.warning("the model is pushed: %s", pushed.url)


def load_recipe_pairs(recipe: Recipe, skipped: Skipped, findings: list[Findings] | None = None) -> DatasetDict:
    """Load the pairs of a recipe, "train" among the splits; see `load_pairs` for `skipped` and `findings`.

    Raises:
        ValueError: there is nothing to train on, or `load_pairs` raises it.
    """
    pairs = load_data(recipe.data, skipped, findings)
    if set(pairs) == {"validation"} and recipe.data.split_column == AUTO:  # such as COCO's val2017, by itself
        logger.warning(
            "%s has only a validation split, from which all splits are drawn, as with split_column=null; measure the "
            "model on the run's own test split, not on all of it",
            recipe.data.source,
        )
        skipped.items.clear()
        if findings is not None:
            findings.clear()
        return load_data(replace(recipe.data, split_column=None), skipped, findings)
    if "train" not in pairs:
        raise ValueError(
            f"{recipe.data.source} has no images to train on, only splits for {' and '.join(pairs)}; set split_column "
            "to null to draw all splits from these."
        )
    return pairs


def _without_evaluation(recipe: Recipe) -> Recipe:
    """Return a recipe that measures nothing while it trains, for data without a validation split."""
    stages = {name: copy.copy(args) for name, args in recipe.stages.items()}
    recipe = replace(recipe, training=copy.copy(recipe.training), stages=stages)
    every = [recipe.training, *stages.values()]
    if any(args.eval_strategy != "no" for args in every):
        logger.warning("there is no validation split: no checkpoint is chosen, the last weights are kept")
    for args in every:
        args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
    return recipe


def _start_model(recipe: Recipe, output_dir: Path, wanted: list[str]) -> ClipMiniModel:
    """Build the recipe's model, or load that of the previous stage if one stage is run alone."""
    names = list(recipe.stages)
    if index := names.index(wanted[0]) if wanted else 0:
        previous = output_dir / names[index - 1]
        if (previous / STAGE_FILE).exists():
            return load_model(previous / MODEL_FOLDER)
        logger.warning("stage %s has not been run: stage %s starts from its model", names[index - 1], wanted[0])
    return build_model(recipe.model) if isinstance(recipe.model, ModelPreset) else load_model(recipe.model)


def _folders_of_origin(recipe: Recipe) -> list[str]:
    """Return the folders, or Hub ids, of what the recipe's model is made of."""
    if not isinstance(recipe.model, ModelPreset):
        return [recipe.model]
    return [resolve_tower(name) for name in recipe.model.towers.values() if recipe.model.pretrained]


def _make_trainer(
    model: ClipMiniModel, args: ClipMiniTrainingArguments, features: dict[str, PairDataset]
) -> ClipMiniTrainer:
    set_seed(args.seed)  # LoRA draws weights; a stage that is run alone or again must draw the same
    try:
        return ClipMiniTrainer(
            model=model,
            args=args,
            train_dataset=features["train"],
            eval_dataset=None if args.eval_strategy == IntervalStrategy.NO else features.get("validation"),
        )
    except (ImportError, RuntimeError) as error:  # such as torchdata, for accelerator_config
        raise ValueError(f"the recipe's training section cannot be used: {error}") from error


def _run_stage(
    trainer: ClipMiniTrainer, folder: Path, record: RunRecord, *, is_one_of_many: bool
) -> tuple[ClipMiniModel, list[dict[str, float]], float | None]:
    """Train a stage, or load the model that an earlier run trained.

    Returns:
        The model, the log, and the seconds of training, which are unknown if it was interrupted.
    """
    args = trainer.args
    if is_one_of_many and (folder / STAGE_FILE).exists():
        logger.warning("%s is finished already", folder)
        logged = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
        return load_model(folder / MODEL_FOLDER), logged["log_history"], logged["train_s"]
    with args.main_process_first(local=False):
        checkpoint, broken = _last_checkpoint(folder)
        for path, reason in broken.items():
            logger.warning("%s was interrupted while being written, or is damaged (%s); removed", path, reason)
            shutil.rmtree(path)
    if checkpoint:
        logger.warning("resuming from %s", checkpoint)
    set_seed(args.seed)
    output = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    train_s = None if checkpoint else output.metrics["train_runtime"]
    model, history = trainer.model, trainer.state.log_history
    merge_lora(model)
    if is_one_of_many:
        if args.process_index == 0:
            save_model_folder(model, folder / MODEL_FOLDER, record=record)
            with atomic_write(folder / STAGE_FILE) as file:
                file.write_text(json.dumps({"log_history": history, "train_s": train_s}), encoding="utf-8")
        trainer.accelerator.wait_for_everyone()
        # Loaded again, so that a run that is interrupted here continues from the same as one that is not.
        model = load_model(folder / MODEL_FOLDER)
        nn.Module.to(model, args.device)
    return model, history, train_s


def _finished_stages(recipe: Recipe, output_dir: Path, wanted: list[str]) -> dict[str, dict[str, Any]]:
    """Return what is kept of the last stage that was run and of those that it builds on, in order."""
    names = list(recipe.stages)
    files = {name: output_dir / name / STAGE_FILE for name in names[: names.index(wanted[-1]) + 1 if wanted else 0]}
    finished = list(takewhile(lambda name: files[name].exists(), reversed(files)))
    return {name: json.loads(files[name].read_text(encoding="utf-8")) for name in reversed(finished)}


def _recipe_text(recipe: Recipe) -> str:
    """Return the recipe as YAML, without `strict`, which may differ when a run is resumed."""
    data = {name: value for name, value in recipe.values["data"].items() if name != "strict"}
    return yaml.safe_dump({**recipe.values, "data": data}, sort_keys=False, allow_unicode=True)


def _check_push(recipe: Recipe) -> None:
    """Raise before training if the push at its end would be refused."""
    args = recipe.training
    if not args.push_to_hub:
        return
    if "/" not in (args.hub_model_id or ""):
        raise ValueError(f"push_to_hub with hub_model_id={args.hub_model_id!r}: name the repository as owner/name.")
    if not recipe.license:
        raise ValueError("push_to_hub needs the model's license: set it in the recipe, such as `license: apache-2.0`.")
    reason = None
    with suppress(RepositoryNotFoundError):  # it will be made
        reason = ask_hub(str(args.hub_model_id))
    if reason:
        raise ValueError(
            f"push_to_hub needs the Hub, which cannot be reached ({reason}): leave it out, and `clipmini push` later."
        )
    with explain_refusals(str(args.hub_model_id)):
        validate_card(f"---\nlicense: {recipe.license}\n---\n")


def _check_output_dir(record: RunRecord, recipe: Recipe, wanted: list[str], overwrite: bool) -> None:
    """Raise if the folder holds anything but an unfinished run of the recipe or, to overwrite, files of runs."""
    folder, recorded, found = record.folder, record.read(), record.find_outputs(recipe.stages)
    others = [name for name in found if re.sub(r"checkpoint-\d+$", CHECKPOINTS, name) not in recorded]
    if recorded and RECIPE_FILE not in recorded:
        raise ValueError(f"{folder} holds an evaluation; --set output_dir=another/folder.")
    if overwrite and not others and not recorded and folder.is_dir():  # empty folders are nobody's: Trainer makes them
        files = (path for path in folder.iterdir() if not path.is_dir() or any(path.iterdir()))
        others = sorted(path.name for path in files if not path.name.startswith("."))
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(
            f"{folder} holds {others[0]}{more}, which no run of clipmini has recorded as its own (older "
            "versions kept no record): move it away, or --set output_dir=another/folder."
        )
    if overwrite or not found:
        return
    remedy = "pass --overwrite, or --set output_dir=another/folder."
    recipe_file = folder / RECIPE_FILE
    is_same = recipe_file.is_file() and recipe_file.read_text(encoding="utf-8") == _recipe_text(recipe)
    is_done = all((folder / name / STAGE_FILE).exists() for name in wanted)
    if (folder / RESULTS_FILE).exists() and (is_done or not is_same):
        raise ValueError(f"{folder} holds a finished run; {remedy}")
    if not is_same:
        raise ValueError(f"{folder} holds an unfinished run of another recipe ({found[0]}); {remedy}")


def _claim_output_dir(record: RunRecord, recipe: Recipe, wanted: list[str], overwrite: bool) -> None:
    """Record the output folder as this run's, and remove an earlier run; its model stays until it is replaced."""
    output_dir = record.folder
    files = [output_dir / name for name in (RECIPE_FILE, RESULTS_FILE, CURVES_FILE, SAMPLES_FILE)]
    for stage in wanted or [""]:
        files += [output_dir / stage / name for name in (CHECKPOINTS, *([STAGE_FILE] if stage else []))]
    record.add(files)
    for name in (RESULTS_FILE, SAMPLES_FILE):  # of an earlier run, or of the stages before
        (output_dir / name).unlink(missing_ok=True)
    if overwrite:
        names = list(recipe.stages)
        later = names[names.index(wanted[0]) :] if wanted else [""]  # each starts from the one before it
        for stage in later:
            if stage:
                (output_dir / stage / STAGE_FILE).unlink(missing_ok=True)
            for checkpoint in _checkpoints(output_dir / stage):
                shutil.rmtree(checkpoint)
    with atomic_write(output_dir / RECIPE_FILE) as file:
        file.write_text(_recipe_text(recipe), encoding="utf-8")


def _checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run by step; `checkpoint-notes` is not one."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob(CHECKPOINTS)}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: int(steps[path]))


def _last_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the last whole checkpoint, and later ones with what is wrong with them."""
    broken = {}
    for path in reversed(_checkpoints(folder)):
        try:
            state = json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # which Trainer writes last
            best = path.with_name(Path(state["best_model_checkpoint"] or path).name)  # loaded at the end of training
            for checkpoint in {path, best}:
                _check_files(checkpoint)
        except Exception as error:  # a damaged file raises nearly anything
            broken[path] = first_sentence(error)
        else:
            return path, broken
    return None, broken


def _check_files(checkpoint: Path) -> None:
    """Raise if a file of a checkpoint is damaged, as far as its format tells."""
    for file in checkpoint.glob("*"):
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            safe_open(file, "pt")
        elif file.suffix in (".pt", ".pth") and (part := zipfile.ZipFile(file).testzip()):  # torch's, with checksums
            raise ValueError(f"{part} in {file.name} is damaged")
