import json
import platform
import subprocess
import sys

import pytest
import torch
from PIL import Image, ImageDraw

from clipmini.data.images import Skipped
from clipmini.data.pairs import load_pairs
from clipmini.evaluation.measure import evaluate_retrieval
from clipmini.evaluation.results import Evaluation
from clipmini.inference.encode import load_model
from clipmini.training.recipes import load_recipe
from clipmini.training.run import _prepare_data, keep_freed_memory, train
from modeling_clipmini import ClipMiniModel

RECIPE = """
model: tiny
training:
  num_train_epochs: 2
  per_device_train_batch_size: 4
  use_cpu: true
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twenty images with captions in a CSV, two of them broken: no splits."""
    folder = tmp_path_factory.mktemp("photos")
    lines = ["file_name,caption"]
    for index in range(20):
        image = Image.new("RGB", (48, 40), (12 * index, 250 - 12 * index, 90))
        ImageDraw.Draw(image).rectangle((index, index, 20, 20), fill="white")
        image.save(folder / f"{index}.png")
        lines.append(f"{index}.png,image number {index}")
    (folder / "7.png").write_bytes(b"")
    (folder / "8.png").write_text("no image")
    (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def recipe(photos, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE, encoding="utf-8")

    def make(*overrides):
        return load_recipe(str(file), [f"source={photos}", f"output_dir={tmp_path / 'run'}", *overrides])

    return make


def test_a_folder_of_images_becomes_a_model(recipe, tmp_path, caplog):
    result = train(recipe())
    assert {file.name for file in result.output_dir.iterdir() if not file.name.startswith("checkpoint")} == {
        "curves.png",
        "model",
        "recipe_as_run.yaml",
        "results.json",
        "written_files.json",
    }
    assert result.results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert result.results["num_skipped"] == 2
    assert "7.png" in caplog.text
    splits = result.results["splits"]
    assert set(splits) == {"validation", "test"}
    assert splits["test"]["chance"]["text_to_image_r1"] == 1 / splits["test"]["num_images"]
    total = result.results["num_train_images"] + sum(split["num_images"] for split in splits.values())
    assert total == 18
    model, processor = load_model(result.model_dir)
    assert model(**processor(images=[Image.new("RGB", (30, 30))], text=["a"])).logits_per_image.shape == (1, 1)
    card = (result.model_dir / "README.md").read_text()
    assert "pipeline_tag: zero-shot-image-classification" in card
    assert "| text to image |" in card
    assert f"| train | {result.results['num_train_images']} |" in card
    assert "{{" not in card


def test_the_saved_weights_are_those_that_were_measured(recipe, photos):
    result = train(recipe("freeze_vision=true", "freeze_text=true"))
    model, processor = load_model(result.model_dir, "cpu")
    pairs = load_pairs(photos)
    measured = evaluate_retrieval(model, processor, pairs["test"])
    test = result.results["splits"]["test"]
    assert measured == pytest.approx(test["after"])
    assert set(test["intervals"]) == {name for name in test["after"] if not name.endswith("_median_rank")}
    for name, (low, high) in test["intervals"].items():
        assert low <= test["after"][name] <= high


def test_the_same_recipe_gives_the_same_weights(recipe, tmp_path):
    first = train(recipe())
    second = train(recipe(f"output_dir={tmp_path / 'other'}"))
    states = [ClipMiniModel.from_pretrained(result.model_dir).state_dict() for result in (first, second)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_finished_run_is_not_overwritten_unasked(recipe, tmp_path):
    train(recipe())
    note = tmp_path / "run" / "note.txt"
    note.write_text("mine")
    with pytest.raises(ValueError, match="holds a finished run; pass --overwrite"):
        train(recipe())
    for mistake in ("source=nowhere", "report_to=wandb"):
        with pytest.raises(ValueError, match=r"nowhere|wandb"):
            train(recipe(mistake), overwrite=True)
    assert (tmp_path / "run" / "results.json").exists()  # a mistake costs nothing
    train(recipe("num_train_epochs=1"), overwrite=True)
    assert note.read_text() == "mine"  # only the run's own files are replaced


def test_a_run_that_was_cut_off_goes_on(recipe, tmp_path, caplog, monkeypatch):
    whole = train(recipe(f"output_dir={tmp_path / 'whole'}"))

    class Killed(Exception):
        pass

    def kill(self, args, state, control, **kwargs):
        if state.epoch == 1:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("clipmini.training.trainer.TrainingBar.on_epoch_begin", kill)
        with pytest.raises(Killed):
            train(recipe())
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(ValueError, match="unfinished run of another recipe"):
        train(recipe("learning_rate=0.1"))
    resumed = train(recipe())
    assert "resuming from" in caplog.text
    states = [ClipMiniModel.from_pretrained(result.model_dir).state_dict() for result in (whole, resumed)]
    assert all(torch.allclose(tensor, states[1][name], atol=1e-6) for name, tensor in states[0].items())


def test_a_trained_model_can_be_trained_further(recipe, tmp_path):
    first = train(recipe())
    further = recipe(f"model={first.model_dir}", f"output_dir={tmp_path / 'further'}")
    result = train(further)
    before = result.results["splits"]["test"]["before"]
    assert before == pytest.approx(first.results["splits"]["test"]["after"])
    with pytest.raises(ValueError, match="its heads are trained already"):
        train(recipe(f"model={first.model_dir}", f"output_dir={tmp_path / 'third'}", "projection=mlp"))


def test_a_mistyped_source_does_not_take_the_folder(recipe, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        train(recipe("source=nowhere"))
    assert not (tmp_path / "run").exists()


def test_what_others_left_in_the_folder_is_not_replaced(recipe, tmp_path):
    precious = tmp_path / "run" / "model" / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"run holds model/precious\.txt, which no run of clipmini has recorded"):
            train(recipe(), overwrite=overwrite)
    assert precious.read_text() == "mine"


def test_to_overwrite_replaces_what_runs_recorded_and_leaves_the_rest(recipe, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    first = train(recipe("save_total_limit=null"))
    recorded = json.loads((run / "written_files.json").read_text())["files"]
    there = {file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()}
    assert {name for name in there if not name.startswith("checkpoint")} == {*recorded, "written_files.json"} - {
        "checkpoint-*"
    }
    mine = [run / "checkpoint-notes" / "a.txt", run / "notes" / "b.txt", run / "model.txt", run / ".hidden"]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    checkpoints = sorted(run.glob("checkpoint-[0-9]*"))
    again = train(recipe("num_train_epochs=1"), overwrite=True)
    assert [file.read_text() for file in mine] == ["mine"] * 4
    assert len(sorted(run.glob("checkpoint-[0-9]*"))) < len(checkpoints)
    assert again.results["train_s"] != first.results["train_s"]


@pytest.mark.parametrize(
    "name", ["model/my_code.py", "checkpoint-3-best/a.txt", "checkpoint-900/a.txt", "model/sub/a.txt"]
)
def test_what_came_into_a_runs_folder_later_is_not_replaced(recipe, tmp_path, name):
    train(recipe())
    if name.startswith("checkpoint-900"):
        (tmp_path / "run" / "written_files.json").unlink()  # as of a run of an older clipmini
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    with pytest.raises(ValueError, match="which no run of clipmini has recorded as its own"):
        train(recipe(), overwrite=True)
    assert file.read_text() == "mine"
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("name", ["notes.txt", "src/main.py", "results.json"])
def test_a_folder_that_no_run_made_is_not_overwritten(recipe, tmp_path, name):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(ValueError, match=rf"run holds {name.split('/')[0]}, which no run"):
        train(recipe(), overwrite=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name.split("/")[0]]
    assert file.read_text() == "mine"


def test_caches_and_leftovers_are_nobodys(recipe, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".written_files.json.77").write_text("x")  # of a run that was killed at its first write
    train(recipe(), overwrite=True)
    for name in ("model/__pycache__/handler.pyc", "model/.DS_Store", ".model.77/config.json", ".model.78.old/a"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("x")
    train(recipe(), overwrite=True)
    assert not [path for path in run.iterdir() if path.name.startswith(".model.")]


def test_an_evaluation_is_not_taken_for_a_run(recipe, tmp_path):
    Evaluation({"model_index": []}, [], "").save(tmp_path / "run")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="run holds an evaluation"):
            train(recipe(), overwrite=overwrite)
    assert (tmp_path / "run" / "report.html").exists()


def test_a_damaged_record_is_named(recipe, tmp_path):
    train(recipe())
    (tmp_path / "run" / "written_files.json").write_text("{")
    with pytest.raises(ValueError, match=r"written_files\.json is damaged"):
        train(recipe(), overwrite=True)


def test_a_checkpoint_that_was_cut_off_is_passed_over(recipe, tmp_path, caplog):
    whole = train(recipe())
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (tmp_path / "run" / "results.json").unlink()
    (checkpoints[-1] / "trainer_state.json").unlink()
    resumed = train(recipe())
    assert f"{checkpoints[-1]} was interrupted" in caplog.text
    assert f"resuming from {checkpoints[-2]}" in caplog.text
    states = [ClipMiniModel.from_pretrained(result.model_dir).state_dict() for result in (whole, resumed)]
    assert all(torch.allclose(tensor, states[1][name], atol=1e-6) for name, tensor in states[0].items())


def test_without_a_validation_split_the_last_weights_are_kept(recipe, caplog):
    result = train(recipe("validation_fraction=0"))
    assert set(result.results["splits"]) == {"test"}
    assert "no validation split" in caplog.text


def test_strict_stops_at_the_first_broken_image(recipe):
    with pytest.raises(ValueError, match=r"(7|8)\.png"):
        train(recipe("strict=true"))


def test_copies_are_named_before_training(tmp_path, caplog):
    for name, color in {"a": "black", "copy_of_a": "black", "b": "red", "c": "white", "d": "blue"}.items():
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}.png")
    lines = [f"{path.name},a thing" for path in sorted(tmp_path.glob("*.png"))]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]), encoding="utf-8")
    recipe_file = tmp_path / "mine.yaml"
    recipe_file.write_text(RECIPE, encoding="utf-8")
    _, duplicates = _prepare_data(load_recipe(str(recipe_file), [f"source={tmp_path}"]), Skipped())
    assert "Images under more than one image id: 1" in caplog.text
    assert duplicates.as_dict()["images"]["num_images"] == 2


# How often the system has to clear a page for a block that is allocated, touched and freed twenty times.
COUNT_PAGE_FAULTS = """
import resource, sys, torch
from clipmini.training.run import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
for _ in range(10):  # until the heap has grown to its size
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_used_again():
    def page_faults(*arguments):
        command = [sys.executable, "-c", COUNT_PAGE_FAULTS, *arguments]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    if platform.libc_ver()[0] == "glibc" and sys.platform == "linux":
        assert page_faults("keep") * 10 < page_faults()


def test_it_does_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
