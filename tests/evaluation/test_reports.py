"""The command, from a model folder and data to the four files."""

import errno
import hashlib
import html
import json
import re
import shlex
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results
from markupsafe import escape
from PIL import Image
from torch.nn.functional import normalize
from typer.testing import CliRunner

import clipmini
from clipmini.cli import app
from clipmini.evaluation.naming import format_figure
from clipmini.evaluation.request import check_folder
from clipmini.evaluation.results import Evaluation, Table
from clipmini.inference.bank import Bank, save_bank
from modeling_clipmini.images_clipmini import ImageError

FILES = ["model-index.yaml", "report.html", "results.json", "results.md", "written_files.json"]


def run(*arguments):
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def pair_folder(toy_pairs, tmp_path):
    """The toy captions with noise for images, half of them for training; a test image is one of training too."""
    lines = []
    (tmp_path / "pairs").mkdir()
    for row in toy_pairs:
        split = "test" if row["image_id"] % 2 else "train"
        name = f"{row['image_id']}.png"
        noise = np.random.default_rng(max(0, row["image_id"] - 1) if row["image_id"] < 2 else row["image_id"])
        pixels = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 48), Image.Resampling.NEAREST).save(tmp_path / "pairs" / name)
        lines += [{"file_name": name, "caption": caption, "split": split} for caption in row["captions"]]
    for number, line in enumerate(lines):
        line["caption"] += " <script>alert(1)</script>" * (number % 4 == 2)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "pairs" / "metadata.jsonl").write_text(text, encoding="utf-8")
    return tmp_path / "pairs"


def test_retrieval_with_a_baseline(tiny_folder, clip_folder, pair_folder, tmp_path):
    out = tmp_path / "report"
    result = run(tiny_folder, pair_folder, "--baseline", clip_folder, "--out", out)
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in out.iterdir()) == FILES
    results = json.loads((out / "results.json").read_text())
    assert results["data"] == {"source": "pairs", "split": "test", "num_images": 6, "num_captions": 12}
    weights = (tiny_folder / "model.safetensors").read_bytes()
    assert results["model"]["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    recall = results["metrics"]["text_to_image_r5"]
    assert 0 <= recall["low"] <= recall["value"] <= recall["high"] <= 1
    assert results["baseline"]["model"]["name"] == clip_folder.name
    difference = results["baseline"]["differences"]["mean_recall"]
    own, other = results["metrics"]["mean_recall"], results["baseline"]["metrics"]["mean_recall"]
    assert difference["value"] == pytest.approx(own["value"] - other["value"])
    assert 0 < difference["p_value"] <= 1
    assert list(results["by_width"]) == ["16"]  # halves would be below 32
    assert list(results["by_precision"]) == ["float32", "int8", "binary"]

    index = yaml.safe_load((out / "model-index.yaml").read_text())["model-index"]
    _, entries = model_index_to_eval_results(index)
    values = {entry.metric_type: entry.metric_value for entry in entries}
    assert values["text_to_image_r5"] == pytest.approx(recall["value"], abs=1e-4)
    assert entries[0].dataset_split == "test"

    table = (out / "results.md").read_text()
    assert f"| text to image R@5 | {format_figure('text_to_image_r5', recall['value'])} |" in table


def test_a_model_with_a_bank_is_measured_both_ways(tiny_folder, pair_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    vectors = normalize(torch.randn(6, 16, generator=torch.Generator().manual_seed(0))).half()
    save_bank(Bank(vectors, vectors[:4], 14.0), folder)
    for model, name in ((folder, "with"), (tiny_folder, "without")):
        assert run(model, pair_folder, "--out", tmp_path / name).exit_code == 0
    results, without = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("with", "without"))
    assert "normalized" not in without
    assert results["metrics"] == without["metrics"]  # the headline is by cosine as before
    normalized = results["normalized"]
    assert normalized["bank"] == {"num_captions": 6, "num_images": 4}
    for name, difference in normalized["differences"].items():
        gain = normalized["metrics"][name]["value"] - results["metrics"][name]["value"]
        assert difference["value"] == pytest.approx(gain)
    assert all(0 <= share < 1 for share in normalized["never_first"].values())
    table = (tmp_path / "with" / "results.md").read_text()
    assert "**normalized against cosine**" in table
    assert "| metric | normalized | cosine | difference | 95 % interval | p |" in table
    assert "normalized against cosine" in (tmp_path / "with" / "report.html").read_text()


def test_the_page_is_self_contained_and_escapes_its_input(tiny_folder, pair_folder, tmp_path):
    run(tiny_folder, pair_folder.rename(tmp_path / "<b>pairs"), "--out", tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == 4
    assert "data:image/jpeg;base64," in page
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b>pairs" not in page
    assert "&lt;b&gt;pairs" in page
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "url(http" not in page


def test_the_page_says_how_it_was_made(tiny_folder, pair_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tmp_path / "my run" / "model"
    shutil.copytree(tiny_folder, model)
    (model.parent / "recipe_as_run.yaml").write_text(
        f"data: {{source: {tmp_path}/<elsewhere>}}\ntraining: {{output_dir: {tmp_path}/run}}\n"
    )
    Image.new("RGB", (8, 8)).save(model.parent / "curves.png")
    options = ["--no-check-leaks", "--split", "train", "--set", "caption_column=caption", "--set", "split_seed=3"]
    result = run(model, pair_folder, *options, "--json")
    results = json.loads(result.stdout)
    words = ["~/my run/model", "~/pairs", *options[1:3], "--no-check-leaks", *options[3:]]
    assert shlex.split(results["command"]) == ["clipmini", "evaluate", *words]
    assert results["command"].startswith("clipmini evaluate ~/'my run/model' ~/pairs ")  # a shell expands these
    measured = datetime.strptime(results["measured_utc"], "%Y-%m-%d %H:%M").replace(tzinfo=UTC)
    assert timedelta(0) <= datetime.now(UTC) - measured < timedelta(minutes=5)
    page = (model.parent / "evaluation-pairs-train" / "report.html").read_text()
    assert f"Measured on {results['measured_utc']} UTC" in page
    assert escape(results["command"]) in page
    assert "In the run “my run”." in page
    assert "source: &lt;elsewhere&gt;" in page
    assert "data:image/png;base64," in page
    assert str(tmp_path) not in page


def test_a_damaged_recipe_beside_the_model_costs_no_measurement(tiny_folder, class_folder, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "run" / "model")
    (model.parent / "recipe_as_run.yaml").write_text("data: {source: [")
    result = run(model, class_folder, "--task", "zero-shot", "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report" / "report.html").read_text()
    assert "In the run “run”." in page
    assert "Its recipe" not in page


def test_classes_are_called_as_a_file_says(tiny_folder, class_folder, tmp_path):
    names = tmp_path / "names.csv"
    names.write_text('folder,name\nred_fox,a fox\nsea,"water, salty"\ntree,a tree\n')
    options = ["--task", "zero-shot", "--set", f"class_names={names}", "--out", tmp_path / "report", "--json"]
    result = run(tiny_folder, class_folder, *options)
    assert result.exit_code == 0, result.output
    assert "3 of 3 classes have another name: red_fox is a fox, sea is water, salty, tree is a tree" in result.stderr
    results = json.loads(result.stdout)
    assert set(results["per_class"]) == {"a fox", "water, salty", "a tree"}
    assert f"--set class_names={names}" in (tmp_path / "report" / "report.html").read_text()


def test_images_have_names_and_descriptions(tiny_folder, pair_folder, class_folder, tmp_path):
    run(tiny_folder, pair_folder, "--out", tmp_path / "pairs-report")
    run(tiny_folder, class_folder, "--task", "zero-shot", "--out", tmp_path / "class-report")
    pairs, classes = ((tmp_path / f"{name}-report" / "report.html").read_text() for name in ("pairs", "class"))
    captions = [json.loads(line)["caption"] for line in (pair_folder / "metadata.jsonl").read_text().splitlines()]
    allowed = {html.escape(caption, quote=True) for caption in captions}
    for page, alts in ((pairs, allowed), (classes, {"red fox", "sea", "tree"})):
        images = re.findall(
            r'<img src="data:image/jpeg[^"]*" alt="([^"]*)"[^>]*>\s*<figcaption><b>.+</b><br>\d+\.png<', page
        )
        assert len(images) == page.count("data:image/jpeg")
        assert set(images) <= alts


def test_successes_stand_beside_as_many_failures(tiny_folder, class_folder, tmp_path):
    result = run(tiny_folder, class_folder, "--task", "zero-shot", "--out", tmp_path / "report", "--json")
    num_right = round(30 * json.loads(result.stdout)["metrics"]["top1"]["value"])
    page = (tmp_path / "report" / "report.html").read_text()
    assert f"Right: {num_right} of 30 images" in page
    assert f"Wrong: {30 - num_right} of 30 images" in page
    number = min(8, num_right, 30 - num_right) or 8
    assert page.count('<figure class="correct">') == (number if num_right else 0)
    assert page.count(", but is ") == (number if num_right < 30 else 0)


def test_an_image_that_is_gone_leaves_its_place(tiny_folder, pair_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("clipmini.html.read_image", Mock(side_effect=ImageError("does not exist")))
    result = run(tiny_folder, pair_folder, "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report" / "report.html").read_text()
    assert "gone or broken" in page
    assert 'src=""' not in page


def test_the_page_has_a_dark_scheme(tiny_folder, pair_folder, tmp_path):
    run(tiny_folder, pair_folder, "--out", tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "color-scheme: light dark" in page
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): (?!none|var)\S+", drawings)  # each color is a variable of the page


def test_a_model_without_a_name_has_no_command(tiny_model, pair_folder):
    evaluation = clipmini.evaluate(tiny_model, pair_folder)
    assert evaluation.results["command"] is None
    assert "from Python." in evaluation.page


def test_copies_among_the_answers_are_warned_of(tiny_model, pair_folder):
    def warnings():
        found = clipmini.evaluate(tiny_model, pair_folder).results["warnings"]
        return [warning for warning in found if "ties count against the model" in warning]

    assert warnings() == []
    shutil.copy(pair_folder / "3.png", pair_folder / "copy.png")
    with (pair_folder / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"file_name": "copy.png", "caption": "disc in blue", "split": "test"}) + "\n")
    (warning,) = warnings()
    assert "1 (2 of 7 ids). Captions of different images: 1 (2 ids)." in warning


def test_leaks_are_counted_and_metrics_without_them_reported(tiny_folder, pair_folder, tmp_path):
    out = tmp_path / "report"
    run(tiny_folder, pair_folder, "--out", out)
    leaks = json.loads((out / "results.json").read_text())["leaks"]
    assert leaks["exact_images"] == 1
    assert leaks["num_train_images"] == 6
    rest = leaks["without"]
    assert leaks["rows"] == [0]
    assert rest["num_images"] == 5
    assert "among 6 training images" in (out / "report.html").read_text()
    run(tiny_folder, pair_folder, "--out", out, "--no-check-leaks", "--overwrite")
    assert "leaks" not in json.loads((out / "results.json").read_text())
    assert "was not checked" in (out / "report.html").read_text()


def test_the_train_split_is_warned_of_and_what_is_printed_is_written(tiny_folder, pair_folder, tmp_path):
    out = tmp_path / "report"
    result = run(tiny_folder, pair_folder, "--split", "train", "--train-data", pair_folder, "--out", out, "--json")
    assert "warning: This is a train split" in result.stderr
    assert "This is a train split" in (out / "report.html").read_text()
    printed, stored = json.loads(result.stdout), json.loads((out / "results.json").read_text())
    assert stored["leaks"]["exact_images"] == 6
    assert (printed["folder"], printed["num_skipped"]) == (str(out), 0)
    assert {name: printed[name] for name in stored} == stored


def test_a_models_training_data_is_split_as_in_training(tiny_folder, pair_folder, tmp_path):
    (pair_folder / "metadata.jsonl").write_text((pair_folder / "metadata.jsonl").read_text().replace("split", "part"))
    model = tmp_path / "run" / "model"
    shutil.copytree(tiny_folder, model)
    recipe = {"model": "tiny", "data": {"source": str(pair_folder), "test_fraction": 0.25, "split_seed": 3}}
    (tmp_path / "run" / "recipe_as_run.yaml").write_text(json.dumps(recipe))
    (tmp_path / "mine.yaml").write_text(json.dumps({"model": "tiny", "data": {"source": str(pair_folder)}}))
    for name in (pair_folder, tmp_path / "mine.yaml"):  # whichever split the recipe would draw
        data = json.loads(run(model, name, "--json", "--overwrite").stdout)["data"]
        assert (data["split"], data["num_images"]) == ("test", 3)
    other = shutil.copytree(pair_folder, tmp_path / "other")
    data = json.loads(run(model, other, "--json").stdout)["data"]
    assert (data["split"], data["num_images"]) == ("train", 12)


def test_the_report_goes_beside_the_model(tiny_folder, pair_folder, tmp_path):
    model = tmp_path / "run" / "model"
    model.parent.mkdir()
    model.symlink_to(tiny_folder)
    run(model, pair_folder)
    assert (tmp_path / "run" / "evaluation-pairs" / "report.html").exists()
    run(model, pair_folder, "--split", "train")
    assert (tmp_path / "run" / "evaluation-pairs-train" / "report.html").exists()


def test_an_evaluation_is_replaced_only_on_request(tiny_folder, pair_folder, tmp_path):
    out = tmp_path / "report"
    run(tiny_folder, pair_folder, "--out", out)
    before = (out / "results.json").read_text()
    (out / "notes.txt").write_text("mine")
    result = run(tiny_folder, pair_folder, "--split", "train", "--out", out)
    assert result.exit_code == 2
    assert "holds an evaluation; pass --overwrite" in result.output
    assert (out / "results.json").read_text() == before
    run(tiny_folder, pair_folder, "--split", "train", "--out", out, "--overwrite")
    assert json.loads((out / "results.json").read_text())["data"]["split"] == "train"
    assert (out / "notes.txt").read_text() == "mine"


def test_an_evaluation_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    def write(self, text, **options):
        if text == "two":  # the page
            raise OSError("disk full")
        return original(self, text, **options)

    def save(page):
        Evaluation({"model_index": [], "page": page}, [Table(page, [], [])], page).save(tmp_path, overwrite=True)

    original = Path.write_text
    save("one")
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}
    monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(OSError, match="disk full"):
        save("two")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["results.md", "results.json"])
def test_a_file_that_no_evaluation_wrote_is_not_replaced(name, tiny_folder, pair_folder, tmp_path):
    (tmp_path / name).write_text("mine")
    for more in ([], ["--overwrite"]):
        result = run(tiny_folder, pair_folder, "--out", tmp_path, *more)
        assert result.exit_code == 2
        assert f"holds {name}, which no evaluation wrote" in re.sub(r"\s+", " ", result.output)
    assert (tmp_path / name).read_text() == "mine"


def test_the_folder_is_checked_before_the_evaluation_begins(tiny_folder, pair_folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = run(tiny_folder, pair_folder, "--out", tmp_path / "notes.txt" / "report")
    assert result.exit_code == 2
    assert "notes.txt is a file; name a folder" in re.sub(r"\s+", " ", result.output)
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    for name in ("recipe_as_run.yaml", "results.json"):
        (run_folder / name).write_text("{}")
    result = run(tiny_folder, pair_folder, "--out", run_folder, "--overwrite")
    assert result.exit_code == 2
    assert "holds a training run" in result.output
    assert (run_folder / "results.json").read_text() == "{}"


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"cannot be written to \(Read-only file system\); name another with --out"):
        check_folder(tmp_path / "report", overwrite=False)
    assert not (tmp_path / "report").exists()


def test_a_recipe_names_its_data(tiny_folder, pair_folder, tmp_path):
    recipe = {"model": "tiny", "data": {"source": str(pair_folder)}}
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe))
    result = run(tiny_folder, tmp_path / "mine.yaml", "--out", tmp_path / "report", "--split", "validation", "--json")
    assert json.loads(result.stdout)["data"]["num_images"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "dev"], "has no split 'dev'; it has train, test"),
        (["--set", "caption_column=none"], "none"),
        (["--set", "learning_rate=1"], "learning_rate"),
        (["--baseline", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["--train-data", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--task", "captioning"], "captioning"),
        (["--template", "a {}"], "template='a {}' has no meaning for the task retrieval"),
        (["--task", "zero-shot", "--no-check-leaks"], "check_leaks=False has no meaning for the task zero-shot"),
    ],
)
def test_bad_input_is_named_and_leaves_no_folder(tiny_folder, pair_folder, tmp_path, options, message):
    result = run(tiny_folder, pair_folder, "--out", tmp_path / "report", *options)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "report").exists()


def test_zero_shot_with_a_baseline(tiny_folder, clip_folder, class_folder, tmp_path):
    out = tmp_path / "report"
    result = run(tiny_folder, class_folder, "--task", "zero-shot", "--baseline", clip_folder, "--out", out)
    assert result.exit_code == 0, result.output
    results = json.loads((out / "results.json").read_text())
    assert results["data"] == {"source": "classes", "split": "train", "num_images": 30, "num_classes": 3}
    assert set(results["metrics"]) == {"top1", "mean_per_class"}
    assert set(results["per_class"]) == {"red fox", "sea", "tree"}
    assert sum(number for _, _, number in results["confusion"]) == 30
    assert results["templates"] == ["This is a photo of {}."]
    assert "top1" in results["baseline"]["differences"]
    page = (out / "report.html").read_text()
    assert "red fox" in page
    assert page.count("<svg") == 1


def test_zero_shot_with_a_list_of_templates(tiny_folder, class_folder, tmp_path):
    options = ["--task", "zero-shot", "--template", "simple", "--out", tmp_path / "report"]
    run(tiny_folder, class_folder, *options)
    assert len(json.loads((tmp_path / "report" / "results.json").read_text())["templates"]) == 7


def test_probe_holds_images_out(tiny_folder, class_folder, tmp_path):
    result = run(tiny_folder, class_folder, "--task", "probe", "--out", tmp_path / "report", "--json")
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)
    assert (results["num_train_images"], results["data"]["num_images"]) == (24, 6)
    assert results["metrics"]["top1"]["value"] == 1  # colors are easy, even at random
    assert results["neighbors"]["num_neighbors"] == 20
    assert results["data"]["split"] == "a held-out fifth of train"
    assert results["leaks"]["exact_images"] == 0
    assert "a fifth of each class was held out" in (tmp_path / "report" / "report.html").read_text()


def test_leaks_of_a_probe_are_counted_and_metrics_without_them_reported(tiny_folder, class_folder, tmp_path):
    for name in ("sea", "tree"):
        (class_folder / "train" / name).mkdir(parents=True)
        (class_folder / "test" / name).mkdir(parents=True)
        for number in range(12):
            split = "train" if number < 8 else "test"
            source = (class_folder / "train" / name / "7.png") if number == 11 else None
            pixels = np.random.default_rng(number + 100 * (name == "sea")).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            image = Image.open(source) if source else Image.fromarray(pixels).resize((64, 48), 0)
            image.save(class_folder / split / name / f"{number}.png")
        shutil.rmtree(class_folder / name)
    shutil.rmtree(class_folder / "red_fox")
    result = run(tiny_folder, class_folder, "--task", "probe", "--out", tmp_path / "report", "--json")
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)
    assert (results["data"]["split"], results["data"]["num_images"]) == ("test", 8)
    assert results["leaks"]["exact_images"] == 2
    assert results["leaks"]["without"]["num_images"] == 6
    assert "2 of these images are among 16 training images" in (tmp_path / "report" / "results.md").read_text()
    assert any("2 of these images" in warning for warning in results["warnings"])


def test_a_probe_is_not_measured_on_its_training_images(tiny_folder, class_folder, tmp_path):
    result = run(tiny_folder, class_folder, "--task", "probe", "--split", "train", "--out", tmp_path / "report")
    assert result.exit_code == 2
    assert "name another split" in result.output
