"""Models on the line between a model and what was trained from it: between what one knew and the other learned.

The weights (1 - a) START + a TUNED often know nearly all that TUNED has learned, and have lost much less of what START
knew (WiSE-FT: Wortsman et al., 2022, arXiv:2109.01903).
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clipmini.data.images import Skipped
from clipmini.data.pairs import SPLITS
from clipmini.evaluation.curves import draw_tradeoff
from clipmini.evaluation.measure import measure_split
from clipmini.evaluation.results import Run
from clipmini.files import CURVES_FILE, MODEL_FOLDER, RECIPE_FILE, RESULTS_FILE, atomic_write, run_of, versions
from clipmini.inference.embed import load_model
from clipmini.names import public_name
from clipmini.recipe_files import publishable_recipe, read_yaml
from modeling_clipmini import ClipMiniModel

from .card import STARTING_MODEL, data_part, model_part, render_card
from .folder import save_model_folder
from .kept import Score, Task

TOWERS = ("vision_model.", "text_model.")
WEIGHTS = tuple(step / 10 for step in range(11))  # of TUNED
VERSION_KEYS = ("_name_or_path", "architectures", "dtype", "transformers_version")  # of configs, which may differ


@dataclass(frozen=True)
class Point:
    """A model on the line, measured on a split of either data.

    Attributes:
        weight: a, from 0 (START) to 1 (TUNED).
        new: its figure on the new data.
        kept: its figure on the data that it must not get worse on.
    """

    weight: float
    new: Score
    kept: Score

    def facts(self, start: "Point") -> dict[str, Any]:
        """Return both figures, and how they differ from those of START, ready for JSON."""
        return {
            "weight": self.weight,
            "splits": [self.new.split, self.kept.split],
            "new": asdict(self.new.interval),
            "kept": asdict(self.kept.interval),
            "gained": asdict(self.new.minus(start.new)),
            "lost": asdict(self.kept.minus(start.kept)),
        }


def interpolate(start: str, tuned: str, out: Path | None = None, data: str = "", keep: str = "") -> Run:
    """Measure models between two, choose one of them, and save it; `clipmini.interpolate` says more.

    Raises:
        ValueError: the models are not of one architecture, `out` exists, or data are neither named nor known.
    """
    run = run_of(Path(tuned))
    recipe = {} if run is None else read_yaml(run / RECIPE_FILE)
    data, keep = data or (str(run / RECIPE_FILE) if run else ""), keep or recipe.get("keep") or ""
    for name, value in {"data": data, "keep": keep}.items():
        if not value:
            raise ValueError(f"No run of {tuned} says what to measure; name it with --{name} DATA.")
    out = out or Path(f"{run or 'runs/model'}-interpolated")
    if out.exists():
        raise ValueError(f"{out} exists already; name another folder with --out.")
    first, model = load_model(start), load_model(tuned)
    check_alike(first, model)
    first_state, last_state = (
        {name: value.clone() for name, value in end.state_dict().items()} for end in (first, model)
    )
    skipped = Skipped()
    new, kept = Task.load(data, skipped), Task.load(keep, skipped)
    skipped.log_summary()
    of_towers = [name for name in last_state if name.startswith(TOWERS)]
    if model.dtype == torch.float32 and all(torch.equal(first_state[name], last_state[name]) for name in of_towers):
        new, kept = new.with_features(model), kept.with_features(model)

    def measure(weight: float, split: str) -> Point:
        model.load_state_dict(mix(first_state, last_state, weight))
        return Point(weight, new.measure(model, split), kept.measure(model, split))

    points = [measure(weight, "validation") for weight in tqdm(WEIGHTS, desc="models", unit="model", leave=False)]
    weight = choose(points).weight
    # On images that had no part in the choice, where there is a test split.
    tested = {one: measure(one, "test") for one in (0.0, 1.0, weight)}
    model.load_state_dict(mix(first_state, last_state, weight))
    results = {
        **_facts_of(run),
        "data": {"source": public_name(new.source)},
        "bank": None,
        "splits": {
            split: {"before": measure_split(first, rows)[0]["after"], **measure_split(model, rows)[0]}
            for split, rows in new.splits.items()
            if split in SPLITS[1:] and not new.names
        },
        "kept": kept.compare(tested[0.0].kept, tested[weight].kept),
        "interpolation": {
            "start": _name(start),
            "tuned": _name(tuned),
            "weight": weight,
            "new": public_name(new.source),
            "kept": public_name(kept.source),
            "points": [point.facts(points[0]) for point in points],
            "reported": [point.facts(tested[0.0]) for point in tested.values()],
        },
        "versions": versions(),
    }
    card = render_card(
        out.absolute().name,
        model.config,
        source=new.source,
        license=recipe.get("license"),
        parts=[
            model_part(STARTING_MODEL, start),
            model_part("fine-tuned model", tuned),
            data_part(new.source),
        ],
        stages=[],
        results=results,
        recipe=publishable_recipe(recipe) if recipe else "",
    )
    with atomic_write(out) as folder:
        save_model_folder(model, folder / MODEL_FOLDER, card, made_of=(start, tuned))
        if run is not None:  # it says what data belong to the model
            shutil.copyfile(run / RECIPE_FILE, folder / RECIPE_FILE)
        draw_tradeoff(results["interpolation"], folder / CURVES_FILE)
        (folder / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return Run(out, results)


def mix(start: Mapping[str, Tensor], tuned: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Return (1 - weight) start + weight tuned of all that is no integer: also the logarithm of the temperature."""
    return {
        name: torch.lerp(start[name], end, weight) if end.is_floating_point() else end for name, end in tuned.items()
    }


def choose(points: Sequence[Point]) -> Point:
    """Choose the best on the new data of those that are not surely worse than the first on the kept data.

    Surely worse is a model whose paired 95 % interval lies below 0. Of equals, the one nearest to the first is chosen.
    """
    fit = [point for point in points if not point.kept.minus(points[0].kept).high < 0]
    return max(fit, key=lambda point: point.new.interval.value)


def check_alike(first: ClipMiniModel, second: ClipMiniModel) -> None:
    """Raise a ValueError unless two models have the same config, and weights of the same names and shapes."""
    one, other = (
        {
            **dict(_settings(model.config.to_dict())),
            **{name: f"{value.dtype} {tuple(value.shape)}" for name, value in model.state_dict().items()},
        }
        for model in (first, second)
    )
    if name := next((name for name in {**one, **other} if one.get(name) != other.get(name)), None):
        raise ValueError(
            f"{first.name_or_path} and {second.name_or_path} are not of one architecture, as a model and one that was "
            f"trained from it are: {name} is {one.get(name)} in the first and {other.get(name)} in the second."
        )


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted names and the values of a config, those of its towers too, without versions."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        elif name not in VERSION_KEYS:
            yield f"{prefix}{name}", value


def _name(model: str) -> str:
    """Return what results call a model: the name of its run, if it lies in one."""
    run = run_of(Path(model))
    return run.name if run else public_name(model)


def _facts_of(run: Path | None) -> dict[str, Any]:
    """Return what the run of the tuned model has found out about its data."""
    file = None if run is None else run / RESULTS_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else {}
