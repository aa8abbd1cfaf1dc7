"""The command in a process of its own, as a shell starts it."""

import functools
import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from PIL import Image

from clipmini import cli

SLOW = {"torch", "transformers", "timm", "datasets", "matplotlib", "numpy", "PIL", "uvicorn"}
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
        "for verb in ([], ['train'], ['evaluate'], ['search'], ['classify'], ['serve'], ['push'], ['cache']):\n"
        "    assert CliRunner().invoke(app, [*verb, '--help']).exit_code == 0\n"
        "assert CliRunner().invoke(app, ['--version']).exit_code == 0\n"
        f"slow = {SLOW}\n"
        "sys.exit(f'imported {slow & set(sys.modules)}' if slow & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WRONG = {
    "there is no 'learnin_rate'; the nearest name is 'learning_rate'": "train demo --learnin_rate 1",
    "nothing is not a recipe (article, demo, fine-tune, flickr8k, or a YAML file). If it is data:": "train nothing",
    "nothing.yaml is neither a file nor among the recipes": "train nothing.yaml",
    "IMAGES is not a recipe (article, demo": "train IMAGES --model tiny",
    "no/such/table does not exist HERE. Name a folder or a table": "train no/such/table --model MODEL",
    "no/such/classes does not exist HERE. Name a folder, a table or a recipe": "train demo --keep no/such/classes",
    "fine-tune: model=None is not allowed; use a preset, a YAML file or a model": "train fine-tune --source IMAGES",
    "no/such/start does not exist HERE. Name a model folder": "interpolate no/such/start MODEL",
    "no/such/folder does not exist HERE. Name a folder or a table": "train demo --source no/such/folder",
    "model='a//b' is neither a preset": "train demo --model a//b",
    "The recipe has no stage 'heads'": "train demo --stage heads",
    "The folder no/such/folder does not exist": "search MODEL no/such/folder x",
    "tests/photos does not exist HERE. Name a folder or a table": "train demo --source tests/photos",
    "tests/model does not exist HERE. Name a model folder": "search tests/model IMAGES x",
    "There is no offline:phtos; offline:photos names": "train demo --source offline:phtos",
    "There is no offline:photos/tests; offline:photos names": "search MODEL offline:photos/tests x",
    "There is no offline:photo/a.webp; offline:photos names": "classify MODEL offline:photo/a.webp --labels cat",
    "data.source is missing: flickr8k names no data. Add --set source=FOLDER": "train flickr8k",
    "The query is empty": "search MODEL IMAGES ''",
    "top=0 is not allowed": "search MODEL IMAGES x --top 0",
    "A drawing cannot be written to a.gif": "search MODEL IMAGES x --out a.gif",
    "no/such/model does not exist HERE. Name a model folder": "search no/such/model IMAGES x",
    "org//name does not exist HERE. Name a model folder, or a Hub id": "search org//name IMAGES x",
    "is not a model folder: it has no config.json": "search IMAGES IMAGES x",
    "Label 2 of 3 is blank": "classify MODEL a.png --labels cat,,dog",
    "The label 'cat' is given twice": "classify MODEL a.png --labels cat,cat",
    "'a photo' is not a template": "classify MODEL a.png --labels cat --template 'a photo'",
    "./model does not exist": "classify ./model a.png --labels cat",
    "No image can be read: b.png does not exist": "classify MODEL a.png b.png --labels cat",
    "task='captions' is not allowed; use one of retrieval": "evaluate MODEL IMAGES --task captions",
    "no/such/data does not exist HERE. Name a folder or a table": "evaluate MODEL no/such/data",
    "no/such/data does not exist HERE. Name a folder, or a Hub id": "evaluate MODEL no/such/data --task zero-shot",
    "no/such/baseline does not exist HERE": "evaluate MODEL IMAGES --baseline no/such/baseline",
    "there is no 'sorce'; the nearest name is 'source'": "evaluate MODEL IMAGES --set sorce=x",
    "label is not an option of labeled images": "evaluate MODEL IMAGES --task probe --set label=x",
    "MODEL/config.json is a file; name a folder": "evaluate MODEL IMAGES --out MODEL/config.json",
    "no/such/teacher does not exist": "teach no/such/teacher demo --out a.parquet",
    "no/served/model does not exist": "serve no/served/model",
    "'org//name' is not a repository on the Hub": "push MODEL org//name",
    "no/pushed/model does not exist": "push no/pushed/model org/name",
}


def test_wrong_input_is_refused_before_anything_slow_is_imported(tiny_folder, images):
    def fill(text):
        values = {"MODEL": tiny_folder, "IMAGES": images, "HERE": f"here (in {os.getcwd()})"}
        return functools.reduce(lambda result, key: result.replace(key, str(values[key])), values, text)

    cases = {fill(message): [fill(part) for part in shlex.split(command)] for message, command in WRONG.items()}
    program = (
        "import json, sys; from typer.testing import CliRunner; from clipmini.cli import app\n"
        "answers = {}\n"
        "for message, arguments in json.load(sys.stdin).items():\n"
        "    done = CliRunner().invoke(app, arguments)\n"
        f"    slow = {SLOW} & set(sys.modules)\n"
        "    if done.exit_code != 2 or message not in done.stderr or slow:\n"
        "        answers[message] = (arguments, done.exit_code, done.stderr, sorted(slow))\n"
        "print(json.dumps(answers))"
    )
    done = subprocess.run([sys.executable, "-c", program], input=json.dumps(cases), capture_output=True, text=True)
    assert json.loads(done.stdout or done.stderr) == {}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("clipmini train fl", ["flickr8k"]),
        ("clipmini train ", ["article", "demo", "fine-tune", "flickr8k"]),
        ("clipmini evaluate model demo --task z", ["zero-shot"]),
        ("clipmini cla", ["classify"]),
    ],
)
def test_bash_completes_verbs_recipes_and_tasks(words, expected):
    """As bash asks the command, through the function that `--install-completion bash` installs."""
    parts = words.split(" ")
    protocol = {"_CLIPMINI_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(parts) - 1)}
    program = "from clipmini import cli; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **protocol}
    )
    assert done.stdout.split() == expected, done.stderr


def test_search(tiny_folder, images):
    (images / "bad.png").write_bytes(b"")
    if sys.platform == "linux":  # elsewhere file names are text
        odd_name = b"\xff[red] :fish:\x1b[31m.png".decode("utf-8", "surrogateescape")
        (images / "red.png").rename(images / odd_name)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    words = ["search", tiny_folder, images, "日本", "--no-index"]  # an index holds names in UTF-8 only
    done = subprocess.run([*COMMAND, *words], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b".png") == 3
    if sys.platform == "linux":
        assert rb"\udcff[red] :fish:\x1b[31m.png" in done.stdout
    assert b"warning: 1 input skipped" in done.stderr


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
        "sys.modules['clipmini.inference.prompts'] = Failing('prompts')\n"  # and torch is not imported
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
