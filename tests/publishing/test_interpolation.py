import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import clipmini
from clipmini.data.images import Skipped
from clipmini.evaluation.intervals import Interval
from clipmini.publishing.interpolation import Point, choose, mix
from clipmini.publishing.kept import Score, Task
from clipmini.publishing.push import prepare_push

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
QUICK = {"num_train_epochs": 2, "use_cpu": True}


def test_floats_are_mixed_and_both_ends_are_exact():
    start = {"weight": torch.tensor([0.1, 1.0]), "logit_scale": torch.tensor(2.0), "count": torch.tensor(3)}
    tuned = {"weight": torch.tensor([0.7, 3.0]), "logit_scale": torch.tensor(4.0), "count": torch.tensor(5)}
    assert torch.allclose(mix(start, tuned, 0.25)["weight"], torch.tensor([0.25, 1.5]))
    assert mix(start, tuned, 0.25)["logit_scale"] == 2.5
    assert mix(start, tuned, 0.25)["count"] == 5
    for weight, end in ((0.0, start), (1.0, tuned)):
        assert all(torch.equal(mix(start, tuned, weight)[name], end[name]) for name in ("weight", "logit_scale"))


def score(correct):
    correct = torch.tensor(correct, dtype=torch.bool).numpy()
    return Score("test", "top1", Interval(correct.mean()), correct)


ALL, HALF, FEW = [1] * 40, [1] * 20 + [0] * 20, [1] * 39 + [0]


@pytest.mark.parametrize(
    ("new", "kept", "expected"),
    [
        ([HALF, FEW, ALL], [ALL, ALL, ALL], 2),
        ([HALF, FEW, ALL], [ALL, FEW, HALF], 1),  # one image of 40 may be chance, and half of them are not
        ([HALF, FEW, ALL], [ALL, HALF, HALF], 0),
        ([HALF, ALL, ALL], [ALL, ALL, ALL], 1),  # of equals, that nearest to the start
        ([ALL, HALF, HALF], [HALF, ALL, ALL], 0),
    ],
)
def test_the_best_of_those_is_chosen_that_are_not_surely_worse(new, kept, expected):
    points = [
        Point(weight, score(of_new), score(of_kept))
        for weight, (of_new, of_kept) in enumerate(zip(new, kept, strict=True))
    ]
    assert choose(points).weight == expected


@pytest.fixture(scope="module")
def concepts(tmp_path_factory):
    """Tables of the photographs of every second concept, and of the other concepts."""
    rows = [
        {**json.loads(line), "split": split}
        for split in ("train", "validation", "test")
        for line in (PHOTOS / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    names = sorted({row["concept"] for row in rows})
    tables = []
    for part in range(2):
        tables.append(tmp_path_factory.mktemp("concepts") / f"part{part}.csv")
        with tables[-1].open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "caption", "split"])
            writer.writerows(
                (PHOTOS / row["split"] / row["file_name"], row["caption"], row["split"])
                for row in rows
                if row["concept"] in names[part::2]
            )
    return tables


@pytest.fixture(scope="module")
def tuned(concepts, tmp_path_factory):
    """The model of part of the concepts, and the run that tunes it on the rest. Read only."""
    folder, recipe = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    recipe.write_text("model: tiny\nlicense: cc0-1.0")
    start = clipmini.train(recipe, source=concepts[0], output_dir=folder / "first", **QUICK)
    options = {"keep": concepts[0], "license": "cc0-1.0"}
    run = clipmini.train(concepts[1], model=start.model_folder, output_dir=folder / "second", **options)
    return start, run


@pytest.fixture(scope="module")
def chosen(tuned):
    """The model between both. Read only."""
    start, run = tuned
    return clipmini.interpolate(start.model_folder, run.model_folder)


def figures(run, split):
    return run.results["splits"][split]["after"]["mean_recall"]


def test_a_model_of_some_concepts_is_tuned_on_the_others_and_interpolated(tuned, chosen):
    start, run = tuned
    line = chosen.results["interpolation"]
    assert [point["weight"] for point in line["points"]] == [step / 10 for step in range(11)]
    first, last = line["points"][0], line["points"][-1]
    assert last["new"]["value"] == pytest.approx(figures(run, "validation"))
    assert first["kept"]["value"] == pytest.approx(figures(start, "validation"))
    assert (first["lost"]["value"], first["gained"]["value"]) == (0, 0)
    assert all(point["splits"] == ["validation"] * 2 for point in line["points"])
    assert all(point["splits"] == ["test"] * 2 for point in line["reported"])
    assert [point["weight"] for point in line["reported"]] == [*dict.fromkeys((0, 1, line["weight"]))]
    assert line["reported"][1]["kept"] == run.results["kept"]["after"]
    reported = next(point for point in line["reported"] if point["weight"] == line["weight"])
    # What is saved is what was measured.
    assert (
        Task.load(str(chosen.folder / "recipe_as_run.yaml"), Skipped()).measure(chosen.model()).interval.value
        == (reported["new"]["value"])
    )
    assert figures(chosen, "test") == reported["new"]["value"]
    assert chosen.results["kept"]["after"] == reported["kept"]
    assert json.loads((chosen.folder / "results.json").read_text()) == chosen.results
    with Image.open(chosen.curves) as image:
        assert image.size == (960, 660)
    assert [len(table.rows) for table in chosen.tables[-2:]] == [11, len(line["reported"])]


def test_the_interpolated_model_can_be_pushed_and_says_what_it_is(chosen):
    prepared = prepare_push(chosen.model_folder, "my-name/my-clip")
    assert {"model.safetensors", "README.md", "results.json", "curves.png", "processor_config.json"} <= set(
        prepared.files
    )
    card = (chosen.model_folder / "README.md").read_text(encoding="utf-8")
    weight = chosen.results["interpolation"]["weight"]
    assert f"The weights are {1 - weight:g} of first plus {weight:g} of second" in " ".join(card.split())
    assert "arXiv:2109.01903" in card
    assert card.count("the weights were chosen on this split") == 1
    assert "| starting model | model |" in card
    assert "| fine-tuned model | model |" in card
    assert "license: cc0-1.0" in card


def test_models_of_two_architectures_are_refused(tuned, tiny_folder, tmp_path):
    message = "are not of one architecture.*: text_config.max_position_embeddings is 128 in the first and 64"
    with pytest.raises(ValueError, match=message):
        clipmini.interpolate(tuned[0].model_folder, tiny_folder, tmp_path / "out", data=PHOTOS, keep=PHOTOS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "No run of .* says what to measure; name it with --data DATA"),
        ({"data": PHOTOS}, "name it with --keep DATA"),
        ({"data": "no/such/data"}, "no/such/data does not exist"),
        ({"data": PHOTOS, "keep": PHOTOS, "out": PHOTOS}, "exists already; name another folder with --out"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_loaded(options, message, tiny_folder, monkeypatch):
    monkeypatch.setattr("clipmini.publishing.interpolation.load_model", None)
    with pytest.raises(ValueError, match=message):
        clipmini.interpolate(tiny_folder, tiny_folder, **options)


def test_labeled_images_are_kept_by_their_accuracy(tuned, class_folder, tmp_path):
    start, run = tuned
    out = tmp_path / "between"
    results = clipmini.interpolate(start.model_folder, run.model_folder, out, keep=class_folder).results
    assert (results["kept"]["metric"], results["kept"]["num_images"], results["kept"]["split"]) == (
        "top1",
        30,
        "train",
    )
    assert results["interpolation"]["points"][0]["splits"] == ["validation", "train"]


def test_what_is_neither_pairs_nor_labeled_images_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither pairs .* nor labeled images"):
        Task.load(str(tmp_path), Skipped())
