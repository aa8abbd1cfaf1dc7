"""Ablation of the training recipe on Flickr8k: which of its parts earn their place?

    python benchmarks/recipes.py --source ../shared/data/flickr8k

Each variant trains for the same time on the same machine, from the same pretrained towers, with three seeds, and is
measured once, at the end, on the validation split (1000 images, all five captions each). How many steps fit the time
is measured before any run, so that every learning-rate schedule ends with the time; only then must the machine do
nothing else, since a run's steps are counted and not its seconds. What a variant may cache is cached before the clock
starts; those that train on cached features alone would see each pair hundreds of times, learn them by heart and come
out worse, and so stop after 30 epochs. Finished runs are kept in `recipes.jsonl` and not run again; the table in
README.md is made from it.
"""

import itertools
import json
import math
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from clipmini.evaluation.results import Run
from clipmini.training.recipes import load_recipe
from clipmini.training.run import train

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "recipes.jsonl", HERE / "README.md"
START, END = "<!-- recipes: begin -->", "<!-- recipes: end -->"
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for a 95 % interval, by the number of seeds
METRICS = ("text_to_image_r1", "image_to_text_r1", "mean_recall")
NUM_CALIBRATION_STEPS = 24

FROZEN = {"freeze_vision": True, "freeze_text": True, "per_device_train_batch_size": 1024, "learning_rate": 3e-3}
SMALL_BATCH = {"per_device_train_batch_size": 128, "learning_rate": 1e-3}
TEXT_TUNED = {
    "freeze_vision": True,
    "per_device_train_batch_size": 256,
    "learning_rate": 1e-3,
    "text_learning_rate": 1e-4,
    "length_groups": 4,
}
TUNED = {
    "vision_stages": 4,
    "augment": {"resolution": 192},
    "num_views": 4,
    "per_device_train_batch_size": 128,
    "learning_rate": 4e-4,
    "vision_learning_rate": 3e-4,
    "text_learning_rate": 1.5e-4,
    "length_groups": 4,
}
COMMON = {"lr_scheduler_type": "cosine", "warmup_steps": 20, "weight_decay": 0.1, "logging_steps": 4}
# No checkpoint is chosen: every variant is measured as its schedule leaves it.
UNCHOSEN = {"eval_strategy": "no", "save_strategy": "no", "save_total_limit": None}


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: what the row is called.
        training: the keys of `training` that it is about, those that the clock runs for.
        warm_heads: whether a stage goes before, in which the heads alone learn on cached features, as in the recipe;
            it takes half a minute, which counts as part of the time.
        max_epochs: stop there, though time is left.
        change_of: the row that this one changes in one thing. It takes as many steps, since they are the same work,
            and is compared with that row seed by seed.
        model_config: changes to the model.
        model: the preset.
    """

    name: str
    training: dict[str, Any]
    warm_heads: bool = False
    max_epochs: int | None = None
    change_of: str | None = None
    model_config: dict[str, Any] = field(default_factory=dict)
    model: str = "lite0-minilm"


HEADS, TWO_STAGES = "heads only, cached features", "heads, then both towers"
SMOOTH = f"{HEADS}, label smoothing"
LIKE_TWO_STAGES: dict[str, Any] = {"warm_heads": True, "change_of": TWO_STAGES}
VARIANTS = (
    Variant("heads only, towers run at every step", {**FROZEN, "cache_features": False, **SMALL_BATCH}),
    Variant(HEADS, FROZEN, max_epochs=30),
    Variant(f"{HEADS}, no earlier stages", FROZEN, change_of=HEADS, model_config={"vision_levels": []}),
    Variant(SMOOTH, {**FROZEN, "label_smoothing_factor": 0.2}, change_of=HEADS),
    Variant(
        f"{SMOOTH}, two vision towers",
        {**FROZEN, "label_smoothing_factor": 0.2},
        change_of=SMOOTH,
        model="lite0-lite2-minilm",
    ),
    Variant("+ text tower, cached vision features", TEXT_TUNED),
    Variant(TWO_STAGES, TUNED, warm_heads=True),
    Variant(f"{TWO_STAGES}, hard negatives", {**TUNED, "hard_negatives": {"weight": 0.3}}, **LIKE_TWO_STAGES),
    Variant(f"{TWO_STAGES}, label smoothing", {**TUNED, "label_smoothing_factor": 0.1}, **LIKE_TWO_STAGES),
    Variant(f"{TWO_STAGES}, sigmoid loss", TUNED, **LIKE_TWO_STAGES, model_config={"loss": "sigmoid"}),
)
# Measured, and removed from clipmini since they gained nothing: each row, and the one that it is compared with. The
# average of weights can be run with the commit e5e653c, the others with 5594a4c.
ALL_CAPTIONS, COPIES, SHORT = (
    f"{HEADS}, {change}" for change in ("all captions in an epoch", "each image twice", "one caption of five words")
)
REMOVED = {
    f"{TWO_STAGES}, EMA": TWO_STAGES,
    ALL_CAPTIONS: HEADS,
    f"{ALL_CAPTIONS}, each image once a batch": ALL_CAPTIONS,
    COPIES: None,
    f"{COPIES}, ids shared": COPIES,
    SHORT: None,
    f"{SHORT}, ids shared": SHORT,
    f"{TWO_STAGES}, word dropout": TWO_STAGES,
    f"{TWO_STAGES}, layer decay": TWO_STAGES,
    f"{TWO_STAGES}, color jitter": TWO_STAGES,
    f"{TWO_STAGES}, RandAugment": TWO_STAGES,
}
HEADS_STAGE = {**FROZEN, **COMMON, **UNCHOSEN, "num_train_epochs": 20}


def run(variant: Variant, source: str, seed: int, max_steps: int, folder: Path) -> Run:
    """Train one variant for a number of steps and measure it."""
    stage = {**COMMON, **UNCHOSEN, **variant.training, "max_steps": max_steps}
    stages = {"heads": HEADS_STAGE, "main": stage} if variant.warm_heads else {"main": stage}
    recipe = {
        "model": variant.model,
        "model_config": variant.model_config,
        "data": {"source": source, "test_fraction": 0.0},
        "training": {"output_dir": str(folder / "run"), "seed": seed},
        "stages": stages,
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return train(load_recipe(str(file)), overwrite=True)


def steps_in(variant: Variant, seconds: float, source: str, folder: Path) -> int:
    """Measure a variant's speed over some steps, after the first few, and say how many fit the time."""
    result = run(variant, source, 0, NUM_CALIBRATION_STEPS, folder)
    logged = json.loads((folder / "run" / "main" / "stage.json").read_text(encoding="utf-8"))["log_history"]
    rates = [entry["pairs_per_second"] for entry in logged if "pairs_per_second" in entry]
    batch_size = variant.training["per_device_train_batch_size"]
    steps = seconds * statistics.median(rates[1:]) / batch_size
    if variant.max_epochs is not None:
        steps = min(steps, variant.max_epochs * result.results["num_train_images"] // batch_size)
    return max(1, int(steps))


def interval(values: list[float], sign: str = "") -> str:
    """Give mean and half width of the 95 % interval over seeds, in percent."""
    mean = 100 * statistics.mean(values)
    if len(values) < 2:
        return f"{mean:{sign}.1f}"
    half = T_95[len(values)] * 100 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:{sign}.1f} ± {half:.1f}"


def table(entries: list[dict[str, Any]]) -> str:
    """Lay out what has been measured, variant by variant."""
    lines = [
        "| variant | seeds | steps | minutes | R@1 text to image | R@1 image to text | mean recall | paired |",
        "|---|---|---|---|---|---|---|---|",
    ]
    change_of = {variant.name: variant.change_of for variant in VARIANTS} | REMOVED
    for name, other in change_of.items():
        runs = {entry["seed"]: entry for entry in entries if entry["variant"] == name}
        if runs:
            minutes = min(entry["train_s"] for entry in runs.values()) / 60  # of a run that had the machine to itself
            cells = [interval([entry[metric] for entry in runs.values()]) for metric in METRICS]
            others = {entry["seed"]: entry for entry in entries if entry["variant"] == other}
            changes = [runs[seed]["mean_recall"] - others[seed]["mean_recall"] for seed in runs.keys() & others.keys()]
            cells.append(interval(changes, "+") if changes else "")
            steps = next(iter(runs.values()))["steps"]
            lines.append(f"| {name} | {len(runs)} | {steps} | {minutes:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table(entries: list[dict[str, Any]]) -> None:
    """Put the table between its marks in README.md."""
    before, _, rest = TABLE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    TABLE.write_text(f"{before}{START}\n{table(entries)}\n{END}{after}", encoding="utf-8")


def main(
    source: Annotated[str, typer.Option(help="Folder with Flickr8k's train.parquet and validation.parquet.")],
    minutes: Annotated[float, typer.Option(help="Training time of each run.")] = 5.0,
    seeds: Annotated[int, typer.Option(min=1, max=5, help="Runs of each variant.")] = 3,
    only: Annotated[str | None, typer.Option(help="Run only variants with this in their name.")] = None,
) -> None:
    """Run what is missing, seed by seed over all variants, and write the table."""
    entries = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    variants = [variant for variant in VARIANTS if not only or only in variant.name]
    steps = {entry["variant"]: entry["steps"] for entry in entries}
    measured = {variant.change_of or variant.name for variant in variants}
    for variant in VARIANTS:
        if variant.name in measured - steps.keys():
            with tempfile.TemporaryDirectory(prefix="clipmini-recipes-") as folder:
                steps[variant.name] = steps_in(variant, 60 * minutes - 30 * variant.warm_heads, source, Path(folder))
            print(f"{variant.name}: {steps[variant.name]} steps")
    done = {(entry["variant"], entry["seed"]) for entry in entries}
    for seed, variant in itertools.product(range(seeds), variants):
        if (variant.name, seed) in done:
            continue
        max_steps = steps[variant.change_of or variant.name]
        with tempfile.TemporaryDirectory(prefix="clipmini-recipes-") as folder:
            result = run(variant, source, seed, max_steps, Path(folder))
        entry = {"variant": variant.name, "seed": seed, "steps": max_steps}
        entry["train_s"] = result.results["train_s"]
        entry |= {name: result.results["splits"]["validation"]["after"][name] for name in METRICS}
        entry["versions"] = result.results["versions"]
        entries.append(entry)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        write_table(entries)
        print(json.dumps(entry))


if __name__ == "__main__":
    typer.run(main)
