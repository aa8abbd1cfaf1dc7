"""Fine-tune a model on few pairs: what is gained, and what is lost of what it knew.

    python benchmarks/fine_tuning.py                                     # the two halves of the photographs
    python benchmarks/fine_tuning.py --start MODEL --keep FLICKR8K

Without options, the photographs that come with clipmini are parted by what they show: all but monuments, of which
the recipe `demo` trains a model; and monuments, on which the recipe `fine-tune` trains it further. A quarter of either
part is taken for validation and another for test. `clipmini interpolate` chooses a model between both on validation,
and reports it on test.

With a model, the settings of `fine-tune` are compared: on the photographs of train and validation, of which a third is
drawn for validation, another third for each seed. The data to keep are the validation split of those that MODEL was
trained on. Each row is a mean over seeds; nothing is chosen in it. The table's MODEL is of `clipmini train flickr8k
--stage heads --set model=lite0-minilm`.
"""

import csv
import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

import clipmini
from clipmini.data.images import Skipped
from clipmini.evaluation.results import Run
from clipmini.files import RECIPE_FILE
from clipmini.inference.embed import load_model
from clipmini.publishing.interpolation import mix
from clipmini.publishing.kept import Task
from clipmini.recipe_files import find_preset, read_yaml

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"
LAYERS = {
    "num_train_epochs": 5,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-4,
    "weight_decay": 0.05,
    "warmup_steps": 2,
    "freeze_vision": False,
    "freeze_text": False,
}
TUNED = {**LAYERS, "vision_stages": 2, "vision_learning_rate": 1e-4, "text_learning_rate": 1e-4}
LORA = {**LAYERS, "lora": {"parts": ["vision", "text"]}, "vision_learning_rate": 5e-4, "text_learning_rate": 5e-4}
HEADS = {"learning_rate": 3e-4}
VARIANTS: dict[str, dict[str, Any]] = {  # changes to the recipe
    "heads, rate 1e-3: the recipe": {},
    "heads, rate 3e-4": {"training": HEADS},
    "heads, rate 3e-3": {"training": {"learning_rate": 3e-3}},
    "heads, then two stages and the text tower": {"stages": {"heads": HEADS, "layers": TUNED}},
    "heads, then LoRA on both towers": {"stages": {"heads": HEADS, "layers": LORA}},
}


def write_table(rows: list[dict[str, str]], file: Path) -> Path:
    """Write some of the photographs as a table of pairs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "caption", "split"])
        writer.writerows([PHOTOS / row["folder"] / row["file_name"], row["caption"], row["split"]] for row in rows)
    return file


def photographs() -> list[dict[str, str]]:
    """Read what is known of each photograph."""
    return [
        {**json.loads(line), "split": split, "folder": split}
        for split in ("train", "validation", "test")
        for line in (PHOTOS / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def tune_halves(folder: Path) -> Run:
    """Train on part of the concepts, fine-tune on the others, and interpolate."""
    splits = ("train", "train", "validation", "test")
    parts: dict[bool, list[dict[str, str]]] = {False: [], True: []}
    for row in photographs():
        part = parts["monuments" in row["file_name"]]
        part.append({**row, "split": splits[len(part) % len(splits)]})
    first, second = (
        write_table(parts[False], folder / "others.csv"),
        write_table(parts[True], folder / "monuments.csv"),
    )
    start = clipmini.train("demo", source=first, output_dir=folder / "start", overwrite=True)
    options = {"model": start.model_folder, "output_dir": folder / "tuned", "keep": first}
    tuned = clipmini.train(second, overwrite=True, **options)
    return clipmini.interpolate(start.model_folder, tuned.model_folder, folder / "between")


def main(
    start: Annotated[str | None, typer.Option(help="A trained model.")] = None,
    keep: Annotated[str | None, typer.Option(help="What it was trained on.")] = None,
    folder: Annotated[Path, typer.Option(help="A new folder for the runs.")] = Path("runs/fine_tuning"),
    seeds: Annotated[int, typer.Option(help="Runs of each variant.")] = 3,
    only: Annotated[str, typer.Option(help="Run only variants with this in their name.")] = "",
) -> None:
    """Print the tables."""
    if start is None or keep is None:
        for table in tune_halves(folder).tables:
            print(table.markdown())
        return
    pool = write_table([row for row in photographs() if row["split"] != "test"], folder / "pool.csv")
    skipped, first = Skipped(), load_model(start)
    kept = Task.load(keep, skipped)
    with_features = kept.with_features(first)
    before = with_features.measure(first, "validation")
    print(f"Before, kept: {100 * before.interval.value:.1f}\n")
    print("| variant | seeds | weight | new, change | kept, change |\n|---|---|---|---|---|")
    for name, changes in VARIANTS.items():
        if only not in name:
            continue
        recipe = folder / "recipe.yaml"
        values = read_yaml(find_preset("recipes", "fine-tune"))
        values["training"] |= changes.get("training", {})
        recipe.write_text(
            json.dumps({**values, "stages": changes.get("stages", {})}), encoding="utf-8"
        )  # JSON is YAML
        has_same_towers = "stages" not in changes
        task = with_features if has_same_towers else kept
        figures: dict[float, list[tuple[float, float]]] = {0.5: [], 1.0: []}
        for seed in range(seeds):
            split = {"split_column": None, "validation_fraction": 0.33, "test_fraction": 0.0, "split_seed": seed}
            run = clipmini.train(
                recipe, source=pool, model=start, output_dir=folder / "run", overwrite=True, seed=seed, **split
            )
            model = run.model()
            tuned = {key: value.clone() for key, value in model.state_dict().items()}
            new = Task.load(str(run.folder / RECIPE_FILE), skipped)
            new = new.with_features(first) if has_same_towers else new
            new_before = new.measure(first, "validation")
            for weight, points in figures.items():
                model.load_state_dict(mix(first.state_dict(), tuned, weight))
                measured = new.measure(model, "validation"), task.measure(model, "validation")
                points.append((measured[0].minus(new_before).value, measured[1].minus(before).value))
        for weight, points in figures.items():
            cells = [f"{100 * statistics.mean(values):+.1f}" for values in zip(*points, strict=True)]
            print(f"| {name} | {seeds} | {weight:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
