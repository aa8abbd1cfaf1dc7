import contextlib
import functools
import json
import os
import resource
import shutil
import sys

import pytest
import torch
from PIL import Image, ImageDraw

from clipmini.data.pairs import PairDataset, load_pairs
from clipmini.evaluation import measure
from clipmini.evaluation.measure import Answer, Answers, Found, draw_bank, measure_pairs
from clipmini.evaluation.results import Evaluation
from clipmini.inference.bank import load_bank
from clipmini.inference.embed import load_model
from clipmini.recipe_files import parse_changes
from clipmini.training.recipes import load_recipe
from clipmini.training.run import _find_example, plan_run, train
from modeling_clipmini import ClipMiniModel
from modeling_clipmini.images_clipmini import ImageError

RECIPE = """
model: tiny
data:
  max_skipped: 0.1
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


@pytest.fixture(scope="module")
def make_recipe(photos, tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(RECIPE, encoding="utf-8")

    def make(output_dir, *overrides):
        return load_recipe(str(file), {"source": photos, "output_dir": output_dir, **parse_changes(overrides)})

    return make


@pytest.fixture
def recipe(make_recipe, tmp_path):
    return functools.partial(make_recipe, tmp_path / "run")


@pytest.fixture(scope="module")
def finished(make_recipe, tmp_path_factory):
    """A finished run. Read only."""
    return train(make_recipe(tmp_path_factory.mktemp("finished") / "run"))


@pytest.fixture
def small_banks(monkeypatch):
    """Draw banks of few captions and images too."""
    monkeypatch.setattr(measure, "MIN_BANK", 1)


@pytest.fixture
def finished_run(finished, tmp_path):
    """The folder of a finished run of `recipe()`, which may be changed."""
    run = shutil.copytree(finished.folder, tmp_path / "run")
    recipe_file = run / "recipe_as_run.yaml"
    recipe_file.write_text(recipe_file.read_text().replace(str(finished.folder), str(run)))
    return run


def assert_same_weights(one, other, tolerance=0):
    states = [ClipMiniModel.from_pretrained(result.model_folder).state_dict() for result in (one, other)]
    assert all(torch.allclose(tensor, states[1][name], rtol=0, atol=tolerance) for name, tensor in states[0].items())


def test_a_folder_of_images_becomes_a_model(finished):
    assert {file.name for file in finished.folder.iterdir() if not file.name.startswith("checkpoint")} == {
        "curves.png",
        "model",
        "recipe_as_run.yaml",
        "results.json",
        "samples.jpg",
        "written_files.json",
    }
    results = finished.results
    assert results == json.loads((finished.folder / "results.json").read_text())
    assert results["num_skipped"] == 2
    splits = results["splits"]
    assert set(splits) == {"validation", "test"}
    assert splits["test"]["chance"]["text_to_image_r1"] == 1 / splits["test"]["num_images"]
    assert results["num_train_images"] + sum(split["num_images"] for split in splits.values()) == 18
    model = load_model(finished.model_folder)
    batch = model.processor(images=[Image.new("RGB", (30, 30))], text=["a"]).to(model.device)
    assert model(**batch).logits_per_image.shape == (1, 1)
    card = (finished.model_folder / "README.md").read_text()
    assert "pipeline_tag: zero-shot-image-classification" in card
    assert "| text to image |" in card
    assert f"| train | {results['num_train_images']} |" in card
    assert "{{" not in card


@pytest.mark.usefixtures("small_banks")
def test_a_run_saves_a_bank_and_measures_with_it(recipe, photos):
    """Every training image has one caption, and all of them are drawn."""
    finished = train(recipe())
    results = finished.results
    assert results["bank"] == {
        "num_captions": results["num_train_captions"],
        "num_images": results["num_train_images"],
    }
    bank, model = load_bank(finished.model_folder), load_model(finished.model_folder)
    rows = load_pairs(photos, max_skipped=0.1)["train"]
    encoded = torch.from_numpy(model.encode_text([caption for captions in rows["captions"] for caption in captions]))
    cosines = bank.texts.float() @ encoded.T
    assert (cosines.max(dim=1).values > 0.999).all()  # each is one of them
    test = results["splits"]["test"]
    assert set(test["normalized"]) == set(test["after"])
    assert set(test["normalized_intervals"]) == set(test["intervals"])
    assert set(test["never_first"]) == {"cosine", "normalized"}
    table = finished.tables[0]
    assert table.columns == ["", "chance", "before", "after", "95 % interval", "normalized", "95 % interval"]
    assert {len(row) for row in table.rows} == {7}
    assert "are first for no caption" in table.note
    card = (finished.model_folder / "README.md").read_text()
    assert "| text to image, normalized |" in card
    assert (
        f"holds, as vectors, {results['num_train_captions']} captions and {results['num_train_images']} images" in card
    )


@pytest.mark.parametrize(("override", "smallest"), [("bank=false", 1), ("bank=true", 1000)])
def test_without_a_bank_nothing_of_it_is_saved_or_told(recipe, monkeypatch, override, smallest):
    """Also where there is too little data for one."""
    monkeypatch.setattr(measure, "MIN_BANK", smallest)
    run = train(recipe("max_steps=1", override))
    assert not (run.model_folder / "bank.safetensors").exists()
    assert run.results["bank"] is None
    assert "normalized" not in run.results["splits"]["test"]
    assert run.tables[0].columns == ["", "chance", "before", "after", "95 % interval"]
    assert "bank.safetensors" not in (run.model_folder / "README.md").read_text()
    assert "normalized |" not in (run.model_folder / "README.md").read_text()


def test_a_bank_that_cannot_be_drawn_does_not_cost_the_model(recipe, monkeypatch, caplog):
    def fail(*args):
        raise ImageError("cat.png does not exist")

    monkeypatch.setattr("clipmini.training.run.draw_bank", fail)
    run = train(recipe("max_steps=1"))
    assert not (run.model_folder / "bank.safetensors").exists()
    assert "bank.safetensors is not saved: cat.png does not exist" in caplog.text


@pytest.mark.usefixtures("small_banks")
@pytest.mark.parametrize(
    "overrides",
    [
        ("freeze_vision=true", "freeze_text=true"),
        ("freeze_vision=true", "augment={flip: always}"),
        ("vision_stages=1",),
    ],
)
def test_the_bank_is_that_of_the_saved_weights_with_frozen_towers_too(recipe, photos, overrides):
    """Features of frozen parts were computed before training, and serve again unless they are of augmented views."""
    run = train(recipe("max_steps=1", *overrides))
    bank, model, pairs = (
        load_bank(run.model_folder),
        load_model(run.model_folder, "cpu"),
        load_pairs(photos, max_skipped=0.1),
    )
    again = draw_bank(model, PairDataset(pairs["train"]), seed=42)
    torch.testing.assert_close(bank.texts, again.texts, atol=2e-3, rtol=0)
    torch.testing.assert_close(bank.images, again.images, atol=2e-3, rtol=0)
    assert bank.scale == pytest.approx(again.scale)


def test_samples_that_cannot_be_drawn_do_not_cost_the_model(recipe, photos, tmp_path, monkeypatch, caplog):
    def fail(groups, columns, out):
        raise ValueError("there are no results")

    train(recipe("max_steps=1"))
    assert (tmp_path / "run" / "samples.jpg").is_file()
    monkeypatch.setattr("clipmini.training.run.draw_examples", fail)
    run = train(recipe("max_steps=1"), overwrite=True)
    assert run.model_folder.is_dir()
    assert not (run.folder / "samples.jpg").exists()  # those of the earlier model
    assert "samples.jpg is not drawn: there are no results" in caplog.text


def test_the_saved_weights_are_those_that_were_measured(recipe, photos):
    result = train(recipe("freeze_vision=true", "freeze_text=true"))
    model = load_model(result.model_folder, "cpu")
    pairs = load_pairs(photos, max_skipped=0.1)
    measured = measure_pairs(model, pairs["test"])
    test = result.results["splits"]["test"]
    assert measured == pytest.approx(test["after"])
    assert set(test["intervals"]) == {name for name in test["after"] if not name.endswith("_median_rank")}
    for name, (low, high) in test["intervals"].items():
        assert low <= test["after"][name] <= high


def test_the_same_recipe_gives_the_same_weights(recipe, finished):
    assert_same_weights(finished, train(recipe()))


def test_a_run_that_was_cut_off_goes_on(recipe, finished, tmp_path, caplog, monkeypatch):
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
    assert_same_weights(finished, resumed, 1e-6)


def test_a_trained_model_can_be_trained_further(recipe, finished):
    before = train(recipe(f"model={finished.model_folder}", "max_steps=1")).results["splits"]["test"]["before"]
    assert before == pytest.approx(finished.results["splits"]["test"]["after"])
    with pytest.raises(ValueError, match="its heads are trained already"):
        train(recipe(f"model={finished.model_folder}", "projection=mlp"), overwrite=True)


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


@pytest.mark.parametrize(("caption", "is_warned_of"), [("一只狗在草地上奔跑", True), ("a dog 🐶 on the beach", False)])
def test_captions_that_the_text_tower_cannot_read_are_warned_of_once(
    recipe, photos, tmp_path, caplog, caption, is_warned_of
):
    folder = shutil.copytree(photos, tmp_path / "photos")
    lines = [f"{index}.png,{caption if index % 5 == 0 else 'a dog'}" for index in range(20) if index not in (7, 8)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]), encoding="utf-8")
    chosen = recipe(f"source={folder}", "num_train_epochs=1", "validation_fraction=0", "test_fraction=0")
    train(chosen)
    told = [message for message in caplog.messages if "cannot read" in message]
    assert len(told) == is_warned_of
    if told:
        assert "4 of 18 training captions (22%), such as '一只狗在草地上奔跑'" in told[0]
        assert "distilbert-base-multilingual-cased" in told[0]


def test_data_without_images_to_train_on(recipe, photos, tmp_path):
    (tmp_path / "metadata.csv").write_text(
        "file_name,caption,split\n" + "".join(f"{photos}/{index}.png,a dog,test\n" for index in range(4))
    )
    options = [f"source={tmp_path / 'metadata.csv'}", f"image_root={photos}"]
    with pytest.raises(ValueError, match="no images to train on, only splits for test; set split_column to null"):
        train(recipe(*options))
    assert plan_run(recipe(*options, "split_column=null"))["splits"]["train"]["num_images"] == 2


def test_a_validation_split_alone_is_drawn_from(recipe, photos, tmp_path, caplog):
    """As COCO's val2017, which people train on by itself."""
    shutil.copytree(photos, tmp_path / "images")
    (tmp_path / "images/metadata.csv").rename(tmp_path / "images/captions_val2017.csv")
    plan = plan_run(recipe(f"source={tmp_path / 'images'}"))
    assert {name: split["num_images"] for name, split in plan["splits"].items()} == {
        "train": 14,
        "validation": 2,
        "test": 2,
    }
    assert plan["num_skipped"] == 2
    assert "has only a validation split, from which all splits are drawn" in caplog.text


def test_a_finished_run_is_replaced_if_asked_and_the_rest_is_left(recipe, finished, finished_run):
    recorded = json.loads((finished_run / "written_files.json").read_text())["files"]
    there = {file.relative_to(finished_run).as_posix() for file in finished_run.rglob("*") if file.is_file()}
    assert {name for name in there if not name.startswith("checkpoint")} == {*recorded, "written_files.json"} - {
        "checkpoint-*"
    }
    mine = [finished_run / name for name in ("checkpoint-notes/a.txt", "notes/b.txt", "model.txt", ".hidden")]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    with pytest.raises(ValueError, match="holds a finished run; pass --overwrite"):
        train(recipe())
    for mistake in ("source=nowhere", "report_to=wandb"):
        with pytest.raises(ValueError, match=r"nowhere|wandb"):
            train(recipe(mistake), overwrite=True)
    assert (finished_run / "results.json").exists()  # a mistake costs nothing
    checkpoints = sorted(finished_run.glob("checkpoint-[0-9]*"))
    again = train(recipe("num_train_epochs=1"), overwrite=True)
    assert [file.read_text() for file in mine] == ["mine"] * 4
    assert len(sorted(finished_run.glob("checkpoint-[0-9]*"))) < len(checkpoints)
    assert again.results["train_s"] != finished.results["train_s"]


@pytest.mark.parametrize(
    "name", ["model/my_code.py", "checkpoint-3-best/a.txt", "checkpoint-900/a.txt", "model/sub/a.txt"]
)
def test_what_came_into_a_runs_folder_later_is_not_replaced(recipe, finished_run, name):
    if name.startswith("checkpoint-900"):
        (finished_run / "written_files.json").unlink()  # as of a run of an older clipmini
    file = finished_run / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    with pytest.raises(ValueError, match="which no run of clipmini has recorded as its own"):
        train(recipe(), overwrite=True)
    assert file.read_text() == "mine"
    assert (finished_run / "results.json").exists()


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
    (run / ".clipmini-tmp-77").mkdir(parents=True)
    (run / ".clipmini-tmp-77" / "new").write_text("x")  # of a run that was killed at its first write
    train(recipe("max_steps=1"), overwrite=True)
    leftovers = [run / name for name in (".clipmini-tmp-77/new/config.json", "model/.clipmini-tmp-78/new/vision.onnx")]
    for file in (run / "model/__pycache__/handler.pyc", run / "model/.DS_Store", *leftovers):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    plan_run(recipe("max_steps=1"), overwrite=True)
    assert all(file.exists() for file in leftovers)
    train(recipe("max_steps=1"), overwrite=True)
    assert not list(run.rglob(".*"))


def test_an_evaluation_is_not_taken_for_a_run(recipe, tmp_path):
    Evaluation({"model_index": []}, [], "").save(tmp_path / "run")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="run holds an evaluation"):
            train(recipe(), overwrite=overwrite)
    assert (tmp_path / "run" / "report.html").exists()


def test_a_damaged_record_is_named(recipe, finished_run):
    (finished_run / "written_files.json").write_text("{")
    with pytest.raises(ValueError, match=r"written_files\.json is damaged"):
        train(recipe(), overwrite=True)


def test_a_checkpoint_that_was_cut_off_is_passed_over(recipe, finished, finished_run, caplog):
    checkpoints = sorted(finished_run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (finished_run / "results.json").unlink()
    (checkpoints[-1] / "trainer_state.json").unlink()
    resumed = train(recipe())
    assert f"{checkpoints[-1]} was interrupted" in caplog.text
    assert f"resuming from {checkpoints[-2]}" in caplog.text
    assert_same_weights(finished, resumed, 1e-6)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("config.json", lambda file: file.write_text("{")),
        ("model.safetensors", lambda file: os.truncate(file, file.stat().st_size - 1)),
        ("optimizer.pt", lambda file: os.truncate(file, 1000)),
        ("optimizer.pt", flip_a_bit),
        ("rng_state.pth", lambda file: file.write_bytes(b"")),
        ("scheduler.pt", flip_a_bit),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(recipe, finished, finished_run, caplog, name, damage):
    earlier, last = sorted(finished_run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (finished_run / "results.json").unlink()
    damage(last / name)
    assert plan_run(recipe())["start"] == {"": f"resumes from {earlier}"}
    if name == "config.json":
        resumed = train(recipe())
        assert f"{last} was interrupted while being written, or is damaged (Expecting property" in caplog.text
        assert f"resuming from {earlier}" in caplog.text
        assert_same_weights(finished, resumed, 1e-6)


def test_a_checkpoint_whose_best_is_damaged_is_passed_over(recipe, finished, finished_run):
    """It would be loaded at the end, and no run would ever come there."""
    earlier, last = sorted(finished_run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (finished_run / "results.json").unlink()
    state = json.loads((last / "trainer_state.json").read_text())
    (last / "trainer_state.json").write_text(json.dumps({**state, "best_model_checkpoint": str(earlier)}))
    (earlier / "model.safetensors").write_bytes(b"")
    assert plan_run(recipe())["start"] == {"": "starts anew"}


@contextlib.contextmanager
def file_size_limit(num_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on the size of files")
@pytest.mark.parametrize(
    ("limit", "message"),
    [(1_000_000, "File too large;"), (3_000_000, "No space left on device;"), (9, "written to")],
)
def test_a_full_disk_ends_a_run_in_one_sentence_and_costs_no_model(recipe, finished, finished_run, limit, message):
    """The limits are met by the weights of a checkpoint, by its optimizer, and before anything else."""
    training = recipe()
    with pytest.raises((OSError, ValueError)) as refusal, file_size_limit(limit):
        train(training, overwrite=True)
    assert message in str(refusal.value)
    assert str(finished_run) in str(refusal.value)
    saved = (finished_run / "model" / "model.safetensors").read_bytes()
    assert saved == (finished.model_folder / "model.safetensors").read_bytes()
    assert (finished_run / "results.json").exists() == (limit == 9)
    assert not list(finished_run.rglob(".*"))


def test_without_a_validation_split_the_last_weights_are_kept(recipe, caplog):
    result = train(recipe("validation_fraction=0", "max_steps=1"))
    assert set(result.results["splits"]) == {"test"}
    assert "no validation split" in caplog.text
    assert "7.png" in caplog.text  # an image that cannot be read


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
    result = train(load_recipe(str(recipe_file), {"source": tmp_path, "output_dir": tmp_path / "run", "max_steps": 1}))
    assert "Images under more than one image id: 1" in caplog.text
    assert result.results["duplicates"]["images"]["num_images"] == 2


@pytest.mark.parametrize("has_folders", [True, False])
def test_an_image_is_said_to_be_first_only_where_the_search_ranks_its_split_alone(has_folders, tmp_path):
    rows = []
    for number, split in enumerate(("train", "train", "test")):
        image = tmp_path / (split if has_folders else "all") / f"{number}.png"
        image.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(image)
        rows.append(f"{image.relative_to(tmp_path)},image {number},{split}\n")
    (tmp_path / "metadata.csv").write_text("file_name,caption,split\n" + "".join(rows))
    pairs = load_pairs(tmp_path)
    answers = Answers(1, 1, [Answer("image 2", [Found(0, 1, 1.0, True)])], [], [])
    example = _find_example(str(tmp_path), "test", pairs, answers)
    assert (example.query, example.is_first) == ("image 2", has_folders)


def test_what_is_to_be_kept_is_measured_before_and_after(recipe, finished, class_folder):
    start = f"model={finished.model_folder}"
    run = train(recipe(start, f"keep={class_folder}", "max_steps=3", "learning_rate=0.1"))
    kept = run.results["kept"]
    assert (kept["source"], kept["split"], kept["num_images"], kept["metric"]) == ("classes", "train", 30, "top1")
    assert kept["change"]["value"] == pytest.approx(kept["after"]["value"] - kept["before"]["value"])
    assert run.tables[-1].title == "kept: classes, train, 30 images"
    assert "**kept: classes, train, 30 images**" in (run.model_folder / "README.md").read_text(encoding="utf-8")
    run = train(recipe(start, "keep=offline:photos/test", "max_steps=1", "learning_rate=0"), overwrite=True)
    assert run.results["kept"]["metric"] == "mean_recall"
    assert run.results["kept"]["num_images"] == 32
    assert run.results["kept"]["change"] == {"value": 0, "low": 0, "high": 0, "p_value": 1}


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_any_model_is_fine_tuned_on_fewer_pairs_than_a_batch(loss, tiny_config, tiny_processor, photos, tmp_path):
    torch.manual_seed(0)
    model = ClipMiniModel(tiny_config(loss=loss))
    model.save_pretrained(tmp_path / "start")
    tiny_processor.save_pretrained(tmp_path / "start")
    options = {"model": tmp_path / "start", "max_skipped": 0.1, "use_cpu": True, "output_dir": tmp_path / "run"}
    run = train(load_recipe(str(photos), options))
    assert run.results["num_train_images"] < 64
    moved = load_model(run.model_folder, "cpu").state_dict()
    assert not torch.equal(moved["visual_projection.weight"], model.state_dict()["visual_projection.weight"])
