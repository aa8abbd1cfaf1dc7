"""The command in a process of its own, as a shell starts it."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from PIL import Image

from clipmini import cli

COMMAND = [sys.executable, "-m", "clipmini.cli"]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40 + 30 * index, 60), color).save(folder / f"{color}.png")
    return folder


def test_help_imports_nothing_slow():
    program = (
        "import sys; from typer.testing import CliRunner; from clipmini.cli import app\n"
        "for verb in ([], ['train'], ['evaluate'], ['search'], ['classify'], ['serve'], ['push']):\n"
        "    assert CliRunner().invoke(app, [*verb, '--help']).exit_code == 0\n"
        "assert CliRunner().invoke(app, ['--version']).exit_code == 0\n"
        "slow = {'torch', 'transformers', 'timm', 'datasets', 'matplotlib', 'numpy', 'PIL', 'uvicorn'}\n"
        "sys.exit(f'imported {slow & set(sys.modules)}' if slow & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_search(tiny_folder, images):
    (images / "bad.png").write_bytes(b"")
    if sys.platform == "linux":  # elsewhere file names are text
        odd_name = b"\xff[red] :fish:\x1b[31m.png".decode("utf-8", "surrogateescape")
        (images / "red.png").rename(images / odd_name)
    out = images.parent / "result.png"
    done = subprocess.run(
        [*COMMAND, "search", tiny_folder, images, "日本", "--out", out],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b".png") == 3
    if sys.platform == "linux":
        assert rb"\udcff[red] :fish:\x1b[31m.png" in done.stdout
    assert b"warning: 1 input skipped" in done.stderr
    assert out.stat().st_size > 1000


@pytest.mark.parametrize(
    ("failure", "code", "last_line"),
    [
        ("raise ValueError('oh')", 2, "error: oh"),
        ("raise RuntimeError('oh')", 1, "RuntimeError: oh"),
        pytest.param(
            "os.kill(os.getpid(), signal.SIGINT)",
            130,
            "interrupted",
            marks=pytest.mark.skipif(os.name == "nt", reason="no SIGINT"),
        ),
    ],
)
def test_exit_codes(failure, code, last_line):
    program = (
        "import os, signal, sys, types\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a parent in the background may ignore it
        "class Failing(types.ModuleType):\n"
        f"    def __getattr__(self, name): {failure}\n"
        "from clipmini import cli\n"
        "sys.modules['clipmini.inference.encode'] = Failing('encode')\n"  # and torch is not imported
        "cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "search", "model", "folder", "query"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (code, "", last_line)
    assert ("Traceback" in done.stderr) == (code == 1)


def test_the_console_script_is_main():
    (script,) = entry_points(group="console_scripts", name="clipmini")
    assert script.load() is cli.main


@pytest.mark.slow
def test_train_then_search(toy_pairs, tmp_path):
    names = [f"{row['image_id']}.png" for row in toy_pairs]
    for name, row in zip(names, toy_pairs, strict=True):
        (tmp_path / name).write_bytes(row["image"]["bytes"])
    rows = [
        json.dumps({"file_name": name, "text": row["captions"]}) for name, row in zip(names, toy_pairs, strict=True)
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: tiny\ndata:\n  source: {tmp_path}\ntraining:\n  output_dir: {tmp_path}/run\n"
        "  num_train_epochs: 2\n  per_device_train_batch_size: 4\n"
    )
    done = subprocess.run([*COMMAND, "train", recipe, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer["splits"]["test"]) >= {"chance", "before", "after"}
    done = subprocess.run(
        [*COMMAND, "search", answer["model_dir"], tmp_path, "a red disc", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["hits"]) == 9
