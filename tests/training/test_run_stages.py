"""Recipes in stages, and runs that are killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clipmini.training.recipes import load_recipe
from clipmini.training.run import train

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
    num_train_epochs: 3
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


@pytest.fixture
def make(photos, tmp_path):
    file = tmp_path / "staged.yaml"
    file.write_text(RECIPE, encoding="utf-8")

    def load(folder, *overrides):
        return load_recipe(str(file), [f"source={photos}", f"output_dir={tmp_path / folder}", *overrides])

    return load


def test_both_stages_run_and_leave_one_model(make, tmp_path):
    result = train(make("run"))
    run = tmp_path / "run"
    assert result.results["stages"] == ["heads", "towers"]
    assert result.results["duplicates"]["num_images"] == 16
    assert result.results["versions"].keys() >= {"torch", "transformers", "timm"}
    for stage in ("heads", "towers"):
        logged = json.loads((run / stage / "stage.json").read_text())["log_history"]
        assert any("loss" in entry for entry in logged)
    final = load_file(run / "model" / "model.safetensors")
    heads = load_file(run / "heads" / "model" / "model.safetensors")
    last = load_file(run / "towers" / "model" / "model.safetensors")
    assert all(torch.equal(final[name], last[name]) for name in final)
    tower = [name for name in final if name.startswith("vision_model") and not torch.equal(final[name], heads[name])]
    assert tower
    with pytest.raises(ValueError, match="holds a finished run"):
        train(make("run"))
    assert result.results["train_s"] > 0
    (run / "results.json").unlink()
    (run / "towers" / "stage.json").unlink()
    assert train(make("run")).results["train_s"] is None  # it went on from a checkpoint


def test_stages_run_one_at_a_time_end_where_one_run_ends(make, tmp_path):
    train(make("whole"))
    first = train(make("parts"), stage="heads")
    assert first.results["stages"] == ["heads"]
    second = train(make("parts"), stage="towers")
    assert second.results["stages"] == ["heads", "towers"]
    times = [
        json.loads((tmp_path / "parts" / name / "stage.json").read_text())["train_s"] for name in ("heads", "towers")
    ]
    assert second.results["train_s"] == pytest.approx(sum(times))
    whole = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    parts = load_file(tmp_path / "parts" / "model" / "model.safetensors")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_to_overwrite_a_stage_takes_those_after_it_away(make, tmp_path):
    train(make("run"))
    again = train(make("run"), stage="heads", overwrite=True)
    assert again.results["stages"] == ["heads"]
    assert not (tmp_path / "run" / "towers" / "stage.json").exists()
    assert not list((tmp_path / "run" / "towers").glob("checkpoint-*"))


def test_a_stage_with_lora_begins_alike_alone_and_in_a_whole_run(make, tmp_path):
    pytest.importorskip("peft")
    lora = ["stages.towers.vision_stages=null", "stages.towers.lora={parts: text}"]
    train(make("whole", *lora))
    train(make("parts", *lora), stage="heads")
    torch.rand(3)  # what came before must not matter
    train(make("parts", *lora), stage="towers")
    whole, parts = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_stage_without_the_one_before_begins_with_the_recipes_model(make, caplog):
    assert train(make("run"), stage="towers").results["stages"] == ["towers"]
    assert "stage heads has not been run" in caplog.text


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


@pytest.mark.slow
def test_a_run_killed_three_times_ends_with_the_weights_of_one_never_killed(make, tmp_path, photos):
    options = ["--set", "stages.towers.num_train_epochs=12", "--set", f"source={photos}", "--set"]
    command = [sys.executable, "-m", "clipmini.cli", "train", str(tmp_path / "staged.yaml"), *options]
    make("run")  # writes the recipe
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
    whole, killed = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_run_a_recipe_and_leave_one_model(make, tmp_path, photos):
    make("run")  # writes the recipe
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    options = ["--set", f"source={photos}", "--set", f"output_dir={tmp_path / 'two'}", "--json"]
    command = [*launch, "clipmini.cli", "train", str(tmp_path / "staged.yaml"), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CLIPMINI_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*command, "--overwrite"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["stages"] == ["heads", "towers"]
    assert json.loads(done.stdout)["splits"] == results["splits"]  # printed once, not by every process
    last, final = (load_file(tmp_path / "two" / part / "model.safetensors") for part in ("towers/model", "model"))
    assert all(torch.equal(last[name], final[name]) for name in final)
