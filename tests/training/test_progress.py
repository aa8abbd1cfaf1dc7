import io
import logging
import re
import sys

import pytest
from tqdm import tqdm
from transformers import TrainerControl, TrainerState

from clipmini.training import progress
from clipmini.training.progress import LiveTable

LOGS = {"loss": 1.23456, "grad_norm": 2.5, "learning_rate": 1e-3, "logit_scale": 20.0, "pairs_per_second": 511.7}
RECALLS = {
    "eval_text_to_image_r1": 0.123,
    "eval_text_to_image_r5": 0.3,
    "eval_image_to_text_r1": 0.2,
    "eval_image_to_text_r5": 0.45,
}


class Stream(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal

    def screen(self):
        """What a terminal shows in the end: just enough of one to follow Rich."""
        rows, row, column = [""], 0, 0
        for letter, control, text in re.findall(r"\x1b\[[?\d;]*([A-Za-z])|([\r\n])|([^\x1b\r\n]+)", self.getvalue()):
            if letter == "A":
                row -= 1
            elif letter == "K":
                rows[row] = ""
            elif control == "\r":
                column = 0
            elif control == "\n":
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            elif text:
                rows[row] = rows[row][:column].ljust(column) + text + rows[row][column + len(text) :]
                column += len(text)
        return [line.rstrip() for line in rows]


@pytest.fixture
def stderr(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": "110", "LINES": "40"}.items():
        monkeypatch.setenv(name, value)

    def replace(is_terminal):
        stream = Stream(is_terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return replace


class Run:
    """Calls a callback as `Trainer` does."""

    def __init__(self, table, **state):
        self.table = table
        self.state = TrainerState(**{"max_steps": 100, "epoch": 0.0, "is_world_process_zero": True, **state})
        self.control = TrainerControl()

    def __call__(self, event, **kwargs):
        getattr(self.table, f"on_{event}")(None, self.state, self.control, **kwargs)

    def steps(self, number):
        for _ in range(number):
            self.state.global_step += 1
            self.state.epoch = self.state.global_step / 10
            self("step_end")

    def evaluate(self, recalls):
        self("log", logs=dict(recalls))
        self("evaluate", metrics=dict(recalls))


@pytest.fixture
def run(request):
    table = LiveTable()
    yield Run(table)
    table.close()


def shown(stream, *parts):
    """The last line that holds all parts."""
    found = [line for line in stream.screen() if all(part in line for part in parts)]
    assert found, f"{parts} is not in {stream.screen()}"
    return found[-1]


def test_the_table_shows_all_that_is_asked_of_it(run, stderr, capsys):
    stream = stderr(True)
    run("train_begin")
    run.steps(40)
    run("log", logs=dict(LOGS))
    run.evaluate(RECALLS)
    run.evaluate({**RECALLS, "eval_text_to_image_r1": 0.1, "eval_image_to_text_r5": 0.5})
    run("train_end")
    assert "40/100" in shown(stream, "step", "left")
    lines = stream.screen()
    header = lines.index(shown(stream, "temperature", "gradient norm"))
    assert lines[header].split() == ["loss", "temperature", "gradient", "norm", "pairs/s"]
    assert lines[header + 1].split() == ["1.235", "0.0500", "2.50", "512"]
    assert shown(stream, "validation").split() == ["validation,", "%", "R@1", "R@5"]
    assert re.split(r" {2,}", shown(stream, "text to image")) == ["text to image", "10.0 (best 12.3)", "30.0 (best)"]
    assert re.split(r" {2,}", shown(stream, "image to text")) == ["image to text", "20.0 (best)", "50.0 (best)"]
    assert capsys.readouterr().out == ""


def test_the_table_is_drawn_in_one_place_and_leaves_the_terminal_as_it_was(run, stderr):
    stream = stderr(True)
    run("train_begin")
    for _ in range(5):
        run.steps(10)
        run("log", logs=dict(LOGS))
        run.table.screen.live.refresh()
    run("train_end")
    assert sum("step" in line for line in stream.screen()) == 1
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1  # the cursor
    assert sys.stderr is stream


def test_what_is_logged_or_warned_stands_above_the_table(run, stderr):
    stream = stderr(True)
    logger = logging.getLogger("somewhere.deep")
    handler = logging.StreamHandler()  # holds on to the stream that it finds
    logger.addHandler(handler)
    try:
        run("train_begin")
        run("log", logs=dict(LOGS))
        for number in range(3):
            run.steps(1)
            logger.warning("careful [/b] %d", number)
            sys.stderr.write("be")  # as Python's own warnings are written
            sys.stderr.write("ware\n")
            run.table.screen.live.refresh()
        run("train_end")
        logger.warning("after")
    finally:
        logger.removeHandler(handler)
    lines = stream.screen()
    table = lines.index(shown(stream, "step"))
    assert [line for line in lines if "careful" in line] == [f"careful [/b] {number}" for number in range(3)]
    assert lines.index("careful [/b] 2") < table
    assert sum("beware" in line for line in lines[:table]) == 3
    assert sum("temperature" in line for line in lines) == 1
    assert lines.index("after") > table
    assert handler.stream is stream


def test_bars_do_not_show_beside_the_table(run, stderr):
    stream = stderr(True)
    run("train_begin")
    for _ in tqdm(range(2), desc="pictures", mininterval=0):
        for _ in tqdm(range(5), desc="captions", mininterval=0, leave=False):
            tqdm.write("a line", file=sys.stderr)
    run("train_end")
    assert stream.screen()[:10] == ["a line"] * 10  # and no empty lines, where bars ended
    assert "step" in stream.screen()[10]


def test_close_gives_the_terminal_back_when_training_raises(run, stderr):
    stream = stderr(True)
    run("train_begin")
    run.steps(3)
    run.table.close()
    run.table.close()
    assert sys.stderr is stream
    assert stream.getvalue().count("\x1b[?25h") == 1
    before = stream.getvalue()
    run("step_end")
    run("evaluate", metrics={})
    assert stream.getvalue() == before


def test_a_log_file_gets_a_line_per_evaluation_and_one_per_30_seconds(run, stderr, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    stream = stderr(False)
    run("train_begin")
    run("log", logs=dict(LOGS))
    for _ in range(8):
        now += 10
        run.steps(1)
    run.evaluate(RECALLS)
    run.state.global_step, run.state.epoch = 9, 0.9
    now += 29
    run("step_end")
    run("train_end")
    assert sys.stderr is stream
    lines = [re.sub(r", \d+:\d\d:\d\d left", "", line) for line in stream.getvalue().splitlines()]
    numbers = "loss 1.235, temperature 0.0500, gradient norm 2.50, pairs/s 512"
    assert lines == [
        f"step 3/100, epoch 0.3, {numbers}",
        f"step 6/100, epoch 0.6, {numbers}",
        f"step 8/100, epoch 0.8, {numbers}, text to image R@1 12.3 (best), text to image R@5 30.0 (best), "
        "image to text R@1 20.0 (best), image to text R@5 45.0 (best)",
    ]
    assert re.search(r", \d+:\d\d:\d\d left", stream.getvalue())
    assert stream.getvalue().replace("\n", "").isprintable()


@pytest.mark.parametrize("environment", [{"FORCE_COLOR": "1"}, {}])
def test_a_log_file_holds_no_control_characters_whatever_the_environment(environment, run, stderr, monkeypatch):
    stream = stderr(False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run("train_begin")
    run.steps(2)
    run.evaluate(RECALLS)
    run("train_end")
    assert "12.3" in stream.getvalue()
    assert stream.getvalue().replace("\n", "").isprintable()


def test_a_resumed_run_knows_its_best(stderr):
    stream = stderr(False)
    history = [{**RECALLS, "eval_text_to_image_r1": 0.4, "epoch": 1.0, "step": 10}]
    run = Run(LiveTable(), log_history=history, global_step=10)
    run("train_begin")
    run.evaluate(RECALLS)
    run("train_end")
    assert "text to image R@1 12.3 (best 40.0)" in stream.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_one_process_of_several_shows(is_terminal, stderr):
    stream = stderr(is_terminal)
    run = Run(LiveTable(), is_world_process_zero=False)
    run("train_begin")
    run.steps(3)
    run.evaluate(RECALLS)
    run("train_end")
    assert stream.getvalue() == ""
