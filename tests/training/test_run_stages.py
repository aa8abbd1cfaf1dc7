"""Recipes in stages, and runs that are killed."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clipmini.files import sole_run
from clipmini.publishing.checks import list_files
from clipmini.recipe_files import parse_changes
from clipmini.training import run as run_module
from clipmini.training.recipes import load_recipe
from clipmini.training.run import plan_run, train

RECIPE = """
model: tiny
training:
  per_device_train_batch_size: 4
  use_cpu: true
stages:
  heads:
    freeze_vision: true
    num_train_epochs: 2
  towers:
    vision_stages: 3
    num_train_epochs: 2
    save_strategy: steps
    eval_strategy: steps
    save_steps: 2
    eval_steps: 2
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    lines = ["file_name,caption,split"]
    for index in range(16):
        Image.new("RGB", (48, 40), (12 * index, 250 - 12 * index, 90)).save(folder / f"{index}.png")
        split = "validation" if index % 4 == 0 else "train"
        lines += [f"{index}.png,image number {index},{split}", f"{index}.png,a {index}th color,{split}"]
    (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "staged.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def make_in(photos, recipe_file):
    def load(folder, *overrides):
        return load_recipe(str(recipe_file), {"source": photos, "output_dir": folder, **parse_changes(overrides)})

    return load


@pytest.fixture
def make(make_in, tmp_path):
    return lambda folder, *overrides: make_in(tmp_path / folder, *overrides)


@pytest.fixture(scope="module")
def whole(make_in, tmp_path_factory):
    """A run of both stages. Read only."""
    return train(make_in(tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture
def run(whole, tmp_path):
    """The folder of a run of `make("run")`, which may be changed."""
    shutil.copytree(whole.folder, tmp_path / "run")
    recipe_as_run = tmp_path / "run" / "recipe_as_run.yaml"
    recipe_as_run.write_text(recipe_as_run.read_text().replace(str(whole.folder), str(tmp_path / "run")))
    return tmp_path / "run"


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_both_stages_run_and_leave_one_model(make, whole, run):
    assert whole.results["stages"] == ["heads", "towers"]
    assert whole.results["duplicates"]["num_images"] == 16
    assert whole.results["versions"].keys() >= {"torch", "transformers", "timm"}
    for stage in ("heads", "towers"):
        logged = json.loads((run / stage / "stage.json").read_text())["log_history"]
        assert any("loss" in entry for entry in logged)
    assert_same_weights(run, run / "towers")
    final, heads = weights(run), weights(run / "heads")
    assert any(name.startswith("vision_model") and not torch.equal(final[name], heads[name]) for name in final)
    with pytest.raises(ValueError, match="holds a finished run"):
        train(make("run"))
    assert whole.results["train_s"] > 0
    (run / "results.json").unlink()
    (run / "towers" / "stage.json").unlink()
    assert train(make("run")).results["train_s"] is None  # it went on from a checkpoint


def test_stages_run_one_at_a_time_end_where_one_run_ends(make, whole, tmp_path):
    first = train(make("parts"), stage="heads")
    assert first.results["stages"] == ["heads"]
    second = train(make("parts"), stage="towers")
    assert second.results["stages"] == ["heads", "towers"]
    times = [
        json.loads((tmp_path / "parts" / name / "stage.json").read_text())["train_s"] for name in ("heads", "towers")
    ]
    assert second.results["train_s"] == pytest.approx(sum(times))
    assert_same_weights(whole.folder, tmp_path / "parts")


def test_to_overwrite_a_stage_takes_those_after_it_away(make, run):
    again = train(make("run"), stage="heads", overwrite=True)
    assert again.results["stages"] == ["heads"]
    assert not (run / "towers" / "stage.json").exists()
    assert not list((run / "towers").glob("checkpoint-*"))


def test_a_stage_with_lora_begins_alike_alone_and_in_a_whole_run(make, tmp_path):
    pytest.importorskip("peft")
    changes = ["vision_stages=null", "lora={parts: text}", "num_train_epochs=1"]
    lora = [f"stages.towers.{change}" for change in changes] + ["stages.heads.num_train_epochs=1"]
    train(make("whole", *lora))
    train(make("parts", *lora), stage="heads")
    torch.rand(3)  # what came before must not matter
    train(make("parts", *lora), stage="towers")
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_stage_without_the_one_before_begins_with_the_recipes_model(make, caplog):
    assert train(make("run"), stage="towers").results["stages"] == ["towers"]
    assert "stage heads has not been run" in caplog.text


def test_a_stage_alone_does_not_count_one_that_it_does_not_build_on(photos, tmp_path):
    file = tmp_path / "gap.yaml"
    file.write_text(f"{RECIPE}  last:\n    max_steps: 1\n", encoding="utf-8")
    changes = {"source": photos, "output_dir": tmp_path / "run", "stages.heads.num_train_epochs": 1}
    for stage in ("heads", "last"):
        results = train(load_recipe(str(file), changes), stage=stage).results
        assert results["stages"] == [stage]


def test_a_stage_that_is_not_there_is_named(make):
    with pytest.raises(ValueError, match="no stage 'head'; it has heads, towers"):
        train(make("run"), stage="head")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_train_epochs=3", r"is ambiguous; use .*stages\.heads\.num_train_epochs or stages\.towers"),
        ("stages.head.num_train_epochs=3", "no such stage; it has heads, towers"),
        ("stages.heads.num_train_epoch=3", "num_train_epochs"),
        ("stages.heads.output_dir=x", "one value serves all stages"),
    ],
)
def test_a_wrong_key_of_a_stage_is_explained(make, override, message):
    with pytest.raises(ValueError, match=message):
        make("run", override)


def test_a_key_of_one_stage_can_be_changed(make):
    recipe = make("run", "stages.heads.learning_rate=0.5", "seed=3")
    assert recipe.stages["heads"].learning_rate == 0.5
    assert recipe.stages["towers"].learning_rate != 0.5
    assert {args.seed for args in recipe.stages.values()} == {3}


def train_and_die(recipe, moment, options):
    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(run_module, moment, die)  # the child's own copy of the module
    train(recipe, **options)


@pytest.mark.parametrize("moment", ["_claim_output_dir", "_recipe_text"])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}], ids=["plain", "overwrite"])
def test_a_run_killed_at_any_moment_goes_on(make, whole, tmp_path, moment, options):
    child = multiprocessing.get_context("fork").Process(target=train_and_die, args=(make("run"), moment, options))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    train(make("run"), **options)
    assert_same_weights(whole.folder, tmp_path / "run")
    assert not list((tmp_path / "run").rglob(".*"))


def test_a_stage_that_is_stopped_before_its_results_are_written_goes_on(make, whole, tmp_path, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    train(make("run"), stage="heads")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "versions", stop)
        with pytest.raises(KeyboardInterrupt):
            train(make("run"), stage="towers")
    assert train(make("run"), stage="towers").results["stages"] == ["heads", "towers"]
    assert_same_weights(whole.folder, tmp_path / "run")


def test_a_second_run_is_refused_and_what_reads_a_run_is_not(make, run):
    with sole_run(run):
        with pytest.raises(ValueError, match=r"run is being written by another run \(process \d+ on "):
            train(make("run"), overwrite=True)
        assert plan_run(make("run"), overwrite=True)["start"]["heads"] == "replaces the run that is there"
        assert list_files(run / "model")  # as a push does


@pytest.mark.slow
def test_a_run_killed_three_times_ends_with_the_weights_of_one_never_killed(recipe_file, tmp_path, photos):
    options = ["--set", "stages.towers.num_train_epochs=12", "--set", f"source={photos}", "--set"]
    command = [sys.executable, "-m", "clipmini.cli", "train", str(recipe_file), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CLIPMINI_CACHE": str(tmp_path / "cache")}
    subprocess.run([*command, f"output_dir={tmp_path / 'whole'}"], env=env, check=True, capture_output=True)

    kills = 0
    for wanted in ("heads/checkpoint-*", "towers/checkpoint-4", "towers/checkpoint-14"):
        process = subprocess.Popen(
            [*command, f"output_dir={tmp_path / 'killed'}"],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not list((tmp_path / "killed").glob(wanted)):
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
    assert kills == 3
    subprocess.run([*command, f"output_dir={tmp_path / 'killed'}"], env=env, check=True, capture_output=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_run_a_recipe_and_leave_one_model(recipe_file, tmp_path, photos):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    options = ["--set", f"source={photos}", "--set", f"output_dir={tmp_path / 'two'}", "--json"]
    command = [*launch, "clipmini.cli", "train", str(recipe_file), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CLIPMINI_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*command, "--overwrite"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["stages"] == ["heads", "towers"]
    assert json.loads(done.stdout)["splits"] == results["splits"]  # printed once, not by every process
    assert_same_weights(tmp_path / "two", tmp_path / "two" / "towers")
