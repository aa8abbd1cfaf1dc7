"""One training run, top to bottom: data, model, trainer, measure, save."""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, get_last_checkpoint

from clipmini.inference.images import Skipped
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor

from .build import ModelPreset, build_model, load_for_fine_tuning
from .curves import draw_curves
from .data import load_pairs
from .evaluate import chance_level, evaluate_retrieval
from .features import CachedPairs
from .publish import render_model_card
from .recipes import Recipe
from .trainer import ClipMiniTrainer

logger = logging.getLogger(__name__)

RECIPE_FILE, RESULTS_FILE, CURVES_FILE, MODEL_FOLDER = "recipe_as_run.yaml", "results.json", "curves.png", "model"


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        output_dir: the run's folder: `recipe_as_run.yaml`, `results.json`, `curves.png`, checkpoints.
        model_dir: the trained model, complete: code, config, weights, processor.
        results: what `results.json` holds: per split the recalls by chance, before and after training, all in [0, 1].
    """

    output_dir: Path
    model_dir: Path
    results: dict[str, Any]


def train(recipe: Recipe, *, overwrite: bool = False) -> TrainResult:
    """Run a recipe; where an earlier run of the same recipe was cut off, go on from its last checkpoint.

    Args:
        recipe: as `load_recipe` gives.
        overwrite: start anew where the output folder holds a run already; only that run's files are replaced.

    Returns:
        The folders and the recalls.

    Raises:
        ValueError: the output folder holds a finished run or another recipe's, or data or model cannot be used.
    """
    args = recipe.training
    output_dir = Path(str(args.output_dir))
    if not overwrite:
        _check_output_dir(output_dir, recipe)

    skipped = Skipped(strict=recipe.data.strict)
    data_options = {name: value for name, value in vars(recipe.data).items() if name not in ("strict", "split_seed")}
    pairs = load_pairs(**data_options, seed=recipe.data.split_seed, skipped=skipped)
    if "train" not in pairs:
        raise ValueError(f"{recipe.data.source} has no pictures to train on, only {' and '.join(pairs)}.")

    set_seed(args.seed)  # before the heads are made
    if isinstance(recipe.model, ModelPreset):
        preset = ModelPreset(**{**vars(recipe.model), "config": {**recipe.model.config, **recipe.model_config}})
        model, processor = build_model(preset)
    else:
        model, processor = load_for_fine_tuning(recipe.model, recipe.model_config)

    if "validation" not in pairs and args.eval_strategy != "no":
        logger.warning("there is no validation split: no checkpoint is chosen, the last weights are kept")
        args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
    try:
        trainer = ClipMiniTrainer(
            model=model,
            args=args,
            train_dataset=pairs["train"],
            eval_dataset=pairs.get("validation"),
            processing_class=processor,
        )
    except (ImportError, RuntimeError) as error:  # an integration or an optimizer that is not installed
        raise ValueError(f"the recipe's training section cannot be used: {error}") from error
    held_out = {"validation": trainer.eval_dataset} if "validation" in pairs else {}
    if "test" in pairs:
        held_out["test"] = trainer.with_cached_features(pairs["test"])
    before = _measure(trainer, held_out)

    # Only now, when everything works: a mistyped value must not cost an earlier run.
    _claim_output_dir(output_dir, recipe, overwrite)
    checkpoint = _last_checkpoint(output_dir)
    if checkpoint:
        logger.warning("going on from %s", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    after = _measure(trainer, held_out)

    skipped.log_summary()
    results = {
        "num_train_images": len(pairs["train"]),
        "num_skipped": skipped.count,
        "skipped": [{"path": name, "reason": reason} for name, reason in skipped.items],
        "train_s": _logged(trainer.state.log_history, "train_runtime"),
        "splits": {
            name: {
                "num_images": len(pairs[name]),
                "num_captions": sum(map(len, pairs[name]["captions"])),
                "chance": chance_level(pairs[name]),
                "before": before[name],
                "after": after[name],
            }
            for name in held_out
        },
    }
    model_dir = output_dir / MODEL_FOLDER
    save_model_folder(model, processor, model_dir, card=render_model_card(recipe, model.config, results))
    draw_curves(trainer.state.log_history, output_dir / CURVES_FILE)
    # Last: a run without results is one that was cut off.
    with _written_beside(output_dir / RESULTS_FILE) as file:
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return TrainResult(output_dir=output_dir, model_dir=model_dir, results=results)


def save_model_folder(
    model: ClipMiniModel, processor: ClipMiniProcessor, folder: Path, card: ModelCard | None = None
) -> None:
    """Save a complete model folder: code, config, weights, processor, tokenizer and card.

    It is written beside and renamed, so that no half of it is ever found under its name; a folder that stood there
    before is replaced.

    Args:
        model: what to save.
        processor: the model's processor.
        folder: where.
        card: what becomes its README.md.
    """
    with _written_beside(folder) as beside:
        model.save_pretrained(beside)
        processor.save_pretrained(beside)
        shutil.copymode(beside / "config.json", beside / "model.safetensors")  # safetensors writes for its owner alone
        if card is not None:
            card.save(beside / "README.md")


def _recipe_text(recipe: Recipe) -> str:
    """Give the recipe as YAML; whether to be strict is a matter of this call, not of the run."""
    data = {name: value for name, value in recipe.values["data"].items() if name != "strict"}
    return yaml.safe_dump({**recipe.values, "data": data}, sort_keys=False, allow_unicode=True)


def _check_output_dir(output_dir: Path, recipe: Recipe) -> None:
    """Refuse a folder that holds a finished run, or what this run would replace and another left there."""
    remedy = "pass --overwrite, or --set output_dir=another/folder."
    if (output_dir / RESULTS_FILE).exists():
        raise ValueError(f"{output_dir} holds a finished run; {remedy}")
    recipe_file = output_dir / RECIPE_FILE
    is_same = recipe_file.is_file() and recipe_file.read_text(encoding="utf-8") == _recipe_text(recipe)
    others = [name for name in (RECIPE_FILE, MODEL_FOLDER) if (output_dir / name).exists()]
    others += [folder.name for folder in output_dir.glob("checkpoint-*")]
    if others and not is_same:
        raise ValueError(f"{output_dir} holds an unfinished run of another recipe ({others[0]}); {remedy}")


def _claim_output_dir(output_dir: Path, recipe: Recipe, overwrite: bool) -> None:
    """Make the output folder this run's. Of an earlier run the model stays until the new one takes its place."""
    if overwrite:
        (output_dir / RESULTS_FILE).unlink(missing_ok=True)
        for folder in output_dir.glob("checkpoint-*"):
            shutil.rmtree(folder)
    output_dir.mkdir(parents=True, exist_ok=True)
    with _written_beside(output_dir / RECIPE_FILE) as file:
        file.write_text(_recipe_text(recipe), encoding="utf-8")


def _last_checkpoint(output_dir: Path) -> str | None:
    """Find the last whole checkpoint. Trainer writes its state last, so one without was cut off, and goes."""
    while checkpoint := get_last_checkpoint(str(output_dir)):
        try:
            json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s was cut off while it was written; removed", checkpoint)
            shutil.rmtree(checkpoint)
        else:
            return checkpoint
    return None


def _measure(trainer: ClipMiniTrainer, splits: Mapping[str, Dataset | CachedPairs]) -> dict[str, dict[str, float]]:
    with trainer.autocast_smart_context_manager():
        return {
            name: evaluate_retrieval(
                trainer.model, trainer.processing_class, split, trainer.args.per_device_eval_batch_size
            )
            for name, split in splits.items()
        }


def _logged(log_history: list[dict[str, float]], key: str) -> float | None:
    return next((entry[key] for entry in reversed(log_history) if key in entry), None)


@contextmanager
def _written_beside(target: Path) -> Iterator[Path]:
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
