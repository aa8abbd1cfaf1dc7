"""Text of other people's data on the terminal: it moves no cursor, and prints no line of its own."""

import io
import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from PIL import Image

from clipmini import cli
from clipmini.console import show

# What a file name may hold on Linux: to color, to go up a line, to ring, to overwrite, a C1 control, to turn the
# direction, and three ends of a line.
HOSTILE = "\x1b[31m\x1b[1A\x07\x08\r\x9b31m\u202e\u2028\x85\nerror: FAKED"
OWN_SEQUENCES = re.compile(r"\r|\x1b\[(?:[0-9;]*m|A)")  # of rich's tables and of tqdm's bars

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="file names cannot hold these characters")


class Screen(io.StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


@pytest.fixture(params=[False, True], ids=["pipe", "terminal"])
def run(request, monkeypatch):
    """Run the command, check that nothing raw comes out, and return the exit code and what is printed."""

    def run(*arguments):
        screen = Screen(request.param)
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", screen)
        with pytest.raises(SystemExit) as ended:
            cli.app([str(argument) for argument in arguments], prog_name="clipmini")
        text = screen.getvalue()
        assert not re.search(r"\x1b\[(31m|1A)", text)
        text = OWN_SEQUENCES.sub("", text)
        assert [character for character in text if character != "\n" and not character.isprintable()] == []
        assert not [line for line in text.splitlines() if line.startswith("error: FAKED")]
        return ended.value.code, text

    return run


@pytest.fixture
def images(tmp_path):
    """A folder of twelve images with captions, and of one that is none; all names are hostile."""
    folder = tmp_path / f"images{HOSTILE}"
    folder.mkdir()
    rows = []
    for index in range(12):
        name = f"{index}{HOSTILE}.png"
        Image.new("RGB", (40, 40), (20 * index, 90, 200)).save(folder / name)
        rows.append({"file_name": name, "caption": f"number {index} {HOSTILE}"})
    (folder / f"bad{HOSTILE}.png").write_bytes(b"no image")
    rows.append({"file_name": f"bad{HOSTILE}.png", "caption": "bad"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def recipe(images, tmp_path):
    training = {"output_dir": str(tmp_path / f"run{HOSTILE}"), "num_train_epochs": 1, "use_cpu": True}
    file = tmp_path / f"recipe{HOSTILE}.yaml"
    data = {"source": str(images), "max_skipped": 0.5}
    training |= {"per_device_train_batch_size": 4}
    file.write_text(yaml.safe_dump({"model": "tiny", "data": data, "training": training}))
    return file


def test_search(run, tiny_folder, images):
    code, text = run("search", tiny_folder, images, f"a{HOSTILE}", "b", "--no-index")
    assert code == 0
    assert text.count("FAKED.png") >= 18  # two queries with nine hits
    assert "warning: 1 input skipped" in text


def test_a_drawing(run, tiny_folder, images, tmp_path):
    code, text = run("search", tiny_folder, images, "b", "--no-index", "--out", tmp_path / f"drawn{HOSTILE}.png")
    assert code == 0
    assert "The results are drawn in" in text


@pytest.mark.skipif(find_spec("lancedb") is None, reason="needs the search extra")
def test_an_index(run, tiny_folder, images, tmp_path):
    code, text = run("index", tiny_folder, images, "--out", tmp_path / "index")
    assert code == 0
    code, text = run("search", tmp_path / "index", "b")
    assert code == 0
    assert "FAKED.png" in text
    code, text = run("search", tmp_path / "index", "b", "--where", f"color{HOSTILE}")
    assert code == 2


def test_classify(run, tiny_folder, images, tmp_path):
    labels = tmp_path / f"labels{HOSTILE}.txt"
    labels.write_text(f"cat{HOSTILE}\ndog\n")
    code, text = run("classify", tiny_folder, *sorted(images.glob("*.png")), "--labels", labels)
    assert code == 0
    assert "FAKED.png" in text


def test_zero_shot(run, tiny_folder, images, tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / "classes" / f"{name}{HOSTILE}"
        folder.mkdir(parents=True)
        (folder / f"0{HOSTILE}.png").write_bytes((images / f"0{HOSTILE}.png").read_bytes())
    folder = tmp_path / f"report{HOSTILE}"
    code, text = run("evaluate", tiny_folder, tmp_path / "classes", "--task", "zero-shot", "--out", folder)
    assert code == 0
    assert "The report is in" in text


def test_a_plan(run, recipe):
    code, text = run("train", recipe, "--dry-run")
    assert code == 0
    assert "The run would go to" in text


def test_training_and_the_command_that_is_shown(run, recipe):
    code, text = run("train", recipe)
    assert code == 0
    assert text.splitlines()[-1].startswith("clipmini search \"$(printf '")


@pytest.mark.parametrize(
    "values",
    [
        {f"key{HOSTILE}": 1},
        {"model": f"tiny{HOSTILE}"},
        {"model": "tiny", "data": {"source": f"owner/{HOSTILE}"}},
        {"model": "tiny", "data": {"source": "offline:photos"}, "training": {"optim": HOSTILE}},
        {"model": "tiny", "data": {"source": "offline:photos"}, "training": {"report_to": HOSTILE}},
    ],
)
def test_wrong_recipes(run, values, tmp_path):
    file = tmp_path / f"recipe{HOSTILE}.yaml"
    file.write_text(yaml.safe_dump(values))
    code, text = run("train", file, "--dry-run")
    assert code == 2
    assert len([line for line in text.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_errors_of_other_libraries_and_bugs(run, error, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise error(f"cannot{HOSTILE}")

    monkeypatch.setattr("clipmini.search_each", fail)
    code, text = run("--debug", "search", tmp_path, tmp_path, "b")
    assert code == (2 if error is ValueError else 1)
    assert "cannot\\x1b[31m" in text


def test_ordinary_text_of_any_language_stays(capsys):
    for text in ("日本\u3000語", "क्\u200dष", "à\u00a0la", "👩\u200d👧", "naïve"):
        show(text)
        assert capsys.readouterr().out == f"{text}\n"


def test_one_module_prints():
    for file in ("clipmini/cli.py", "clipmini/console.py"):
        source = (Path(__file__).parents[1] / file).read_text(encoding="utf-8")
        prints = re.findall(r"typer\.(?:secho|echo)\(|\bprint\(|\bprint_exc\(|sys\.std\w+\.write", source)
        assert len(prints) == (4 if file.endswith("console.py") else 0)
