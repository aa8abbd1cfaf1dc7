"""What the command prints for pasting, and what it keeps out of a log."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from clipmini import names
from clipmini.console import quiet_progress_bars
from clipmini.names import as_command

ODD_WORDS = (
    *("a dog", "it's", 'a "quoted" word', "$HOME", "`ls`", "a\nb", "", "-5 degrees", "--top", "!!", "a\\", "*", "#1"),
    *("日本", "a;b", "a|b&c", "%PATH%", "~", "\x1b[31m 'x' %d\\n", "caf\udce9", "-\u202e", "日\u3000本"),
)


@pytest.mark.skipif(shutil.which("sh") is None, reason="no POSIX shell")
@pytest.mark.parametrize("word", ODD_WORDS)
def test_a_posix_shell_takes_each_argument_as_it_is(word):
    shown = 'clipmini() { for word in "$@"; do printf "%s\\0" "$word"; done; }\n'
    script = shown + as_command("search", "my model", word)
    done = subprocess.run(["sh", "-c", script], capture_output=True, check=True)
    assert as_command("search", word).isprintable()
    words = os.fsdecode(done.stdout).split("\0")[:-1]
    assert [item for item in words if item != "--"] == ["search", "my model", word]
    assert words[1] == "--" if word.startswith("-") else "--" not in words


def test_on_windows_arguments_are_in_double_quotes_that_nothing_ends(monkeypatch):
    monkeypatch.setattr(names, "os", SimpleNamespace(name="nt"))
    command = as_command("search", "C:\\my runs\\model", "C:\\photos\\", 'a "red" $x `y` %z “q”')
    assert command == 'clipmini search "C:\\my runs\\model" "C:\\photos\\\\" "a  red   x  y   z  q "'


def test_options_come_before_arguments_that_look_like_them(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = ["--top", "3"]
    assert as_command("search", "/home/me/my run", "x", options=options) == "clipmini search ~/'my run' x --top 3"
    assert as_command("search", "-m", "x", options=options) == "clipmini search --top 3 -- -m x"


@pytest.fixture
def recipe(tmp_path):
    """A tiny training of twelve images whose captions are hard on a shell."""
    lines = ["file_name,caption"]
    for index in range(12):
        name = f"{index}.png"
        (tmp_path / "my images").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (20 * index, 90, 200)).save(tmp_path / "my images" / name)
        lines.append(f'{name},"- it\'s `image` {index}, $HOME ""quoted"""')
    (tmp_path / "my images" / "metadata.csv").write_text("\n".join(lines))
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: tiny\ndata:\n  source: my images\ntraining:\n  output_dir: my run\n  num_train_epochs: 3\n"
        "  per_device_train_batch_size: 4\n  use_cpu: true\n"
    )
    return file


def test_bars_are_drawn_on_terminals_alone(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    program = (
        "import sys; from clipmini import cli; assert 'tqdm' not in sys.modules; cli.quiet_progress_bars()\n"
        "from tqdm.auto import tqdm; list(tqdm(range(9), desc='bar'))\n"
        "from transformers.utils.logging import tqdm; list(tqdm(range(9), desc='bar'))\n"
        "from huggingface_hub.utils import tqdm; list(tqdm(range(9), desc='bar'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    terminal = program.replace("import sys;", "import sys; sys.stderr.isatty = lambda: True;")
    done = subprocess.run([sys.executable, "-c", terminal], capture_output=True, text=True, check=True)
    assert done.stderr.count("bar: 100%") == 3


def test_there_may_be_no_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setenv("TQDM_DISABLE", "")  # so that the variable is gone after the test
    monkeypatch.delenv("TQDM_DISABLE")
    quiet_progress_bars()
    assert os.environ["TQDM_DISABLE"] == "1"


@pytest.mark.slow
def test_a_log_has_a_line_per_evaluation_and_no_bars_and_the_command_printed_works(recipe, tmp_path):
    program = [sys.executable, "-m", "clipmini.cli"]
    done = subprocess.run([*program, "train", recipe], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr
    assert [line.split(",")[0] for line in done.stderr.splitlines() if line.startswith("step ")] == [
        f"step {step}/6" for step in (2, 4, 6)
    ]
    assert not [line for line in done.stderr.splitlines() if "it/s" in line or "%|" in line]
    *_, about, command = done.stdout.splitlines()
    assert about.startswith("Try it with a caption of the test split")
    assert command.startswith("clipmini search -- 'my run/model' 'my images' '- it'")
    if os.name != "nt":
        script = f'clipmini() {{ "{sys.executable}" -m clipmini.cli "$@"; }}\n{command} --json'
        script = script.replace("search --", "search --json --").removesuffix(" --json")
        found = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        answer = json.loads(found.stdout)
        assert answer["query"].startswith("- it's `image` ")
        assert len(answer["hits"]) == 9
