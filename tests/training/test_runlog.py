import json
import platform
from datetime import datetime, timedelta

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState

from clipmini import files
from clipmini.files import versions
from clipmini.training.runlog import MetricsLog, NonFiniteLossError, check_finite


class Run:
    """Logs as `Trainer` does: first into its state, then to the callback."""

    def __init__(self, file, **state):
        self.log_file = MetricsLog(file)
        self.state = TrainerState(**{"epoch": 0.0, "is_world_process_zero": True, **state})
        self.log_file.on_train_begin(None, self.state, TrainerControl())

    def log(self, step, **logs):
        self.state.global_step, self.state.epoch = step, step / 4
        self.state.log_history.append({**logs, "step": step})
        self.log_file.on_log(None, self.state, TrainerControl(), logs=logs)


def strictly(constant):
    raise AssertionError(f"{constant} is not JSON")


def lines_of(file):
    return [json.loads(line, parse_constant=strictly) for line in file.read_text().splitlines()]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def test_each_log_is_a_line(file):
    run = Run(file)
    run.log(1, loss=2.5, grad_norm=1.0)
    run.log(2, eval_mean_recall=0.5)
    first, second = lines_of(file)
    assert list(first) == ["step", "epoch", "time", "loss", "grad_norm"]
    assert (first["step"], first["epoch"], first["loss"]) == (1, 0.25, 2.5)
    assert (second["step"], second["eval_mean_recall"]) == (2, 0.5)
    assert datetime.fromisoformat(first["time"]).utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (float("nan"), None),
        (float("inf"), None),
        (np.float32("nan"), None),
        (torch.tensor(-float("inf")), None),
        (torch.tensor(0.5), 0.5),
        (np.int64(3), 3),
        (3, 3),
        (True, True),
        ("text", "text"),
        (None, None),
    ],
)
def test_every_line_is_valid_json(value, written, file):
    Run(file).log(1, value=value)
    (line,) = lines_of(file)
    assert line["value"] == written
    assert type(line["value"]) in (type(written), float)


def test_a_resumed_run_holds_no_step_twice(file):
    first = Run(file)
    for step in (1, 2):
        first.log(step, loss=float(step))
    first.log(2, eval_mean_recall=0.5)
    checkpoint = list(first.state.log_history)
    first.log(3, loss=3.0)
    first.log(4, loss=4.0)
    before = file.read_text().splitlines()
    resumed = Run(file, global_step=2, log_history=checkpoint)
    assert file.read_text().splitlines() == before[:3]  # to the letter, times included
    resumed.log(3, loss=3.5)
    assert [(line["step"], line.get("loss")) for line in lines_of(file)] == [(1, 1.0), (2, 2.0), (2, None), (3, 3.5)]
    assert [path.name for path in file.parent.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_was_killed_after_its_last_step_holds_its_end_once(file):
    first = Run(file)
    first.log(2, loss=2.0)
    checkpoint = list(first.state.log_history)
    first.log(2, train_runtime=9.0)
    Run(file, global_step=2, log_history=checkpoint).log(2, train_runtime=1.0)
    assert [line.get("train_runtime") for line in lines_of(file)] == [None, 1.0]


@pytest.mark.parametrize("torn", ['{"step": 3, "epo', '{"step": 3, "epoch": 0.75, "loss": 3.0', "\x00\x00"])
def test_a_torn_last_line_goes(torn, file):
    first = Run(file)
    first.log(1, loss=1.0)
    with file.open("a") as log:
        log.write(torn)
    history = [*first.state.log_history, {"step": 3, "loss": 3.0}]
    Run(file, global_step=3, log_history=history).log(4, loss=4.0)
    assert [line["step"] for line in lines_of(file)] == [1, 4]


def test_a_gap_does_not_let_in_what_came_after_the_checkpoint(file):
    first = Run(file)
    for step in (1, 2, 3):
        first.log(step, loss=1.0)
    file.write_text(file.read_text().replace('{"step": 1', "{"))  # as on a full disk
    Run(file, global_step=2, log_history=first.state.log_history[:2])
    assert [line["step"] for line in lines_of(file)] == [2]


def test_a_last_line_without_its_end_is_kept(file):
    first = Run(file)
    first.log(1, loss=1.0)
    file.write_text(file.read_text().rstrip("\n"))
    Run(file, global_step=1, log_history=first.state.log_history).log(2, loss=2.0)
    assert [line["step"] for line in lines_of(file)] == [1, 2]


def test_a_new_run_empties_the_file(file):
    Run(file).log(1, loss=1.0)
    Run(file).log(1, loss=2.0)
    assert [line["loss"] for line in lines_of(file)] == [2.0]


def test_one_process_of_several_writes(file):
    Run(file, is_world_process_zero=False).log(1, loss=1.0)
    assert not file.exists()


@pytest.mark.parametrize("loss", [0.0, -1e30, torch.tensor(2.5), torch.tensor(2.5, dtype=torch.bfloat16)])
def test_a_finite_loss_passes(loss):
    check_finite(loss, 1, ["a.jpg"])


@pytest.mark.parametrize("loss", [float("nan"), float("-inf"), torch.tensor(float("inf"))])
def test_a_loss_that_is_not_finite_names_the_step_and_the_pictures(loss):
    with pytest.raises(NonFiniteLossError) as error:
        check_finite(loss, 7, [f"{number}.jpg" for number in range(8)])
    message = str(error.value)
    assert message.startswith(f"the loss is {float(loss)} at step 7, on the pictures 0.jpg, 1.jpg, ")
    assert "7.jpg; lower learning_rate" in message
    assert "max_grad_norm" in message
    assert "fp16" in message
    assert isinstance(error.value, ValueError)  # one sentence of the command


def test_of_many_pictures_the_first_are_named():
    with pytest.raises(NonFiniteLossError, match=r"6\.jpg, 7\.jpg and 3 more; lower"):
        check_finite(float("nan"), 7, [f"{number}.jpg" for number in range(11)])
    with pytest.raises(NonFiniteLossError, match="at step 7; lower"):
        check_finite(float("nan"), 7, [])


def test_versions_are_those_that_are_installed(monkeypatch):
    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["python"] == platform.python_version()
    assert {"clipmini", "torchvision", "transformers", "timm", "datasets", "accelerate"} <= set(found)
    assert found["cpu_threads"] == str(torch.get_num_threads())
    assert all(isinstance(value, str) for value in found.values())
    assert not any(platform.node() in value for value in found.values() if platform.node())
    monkeypatch.setattr(files, "PACKAGES", ("torch", "surely-not-installed"))
    assert "surely-not-installed" not in versions()
