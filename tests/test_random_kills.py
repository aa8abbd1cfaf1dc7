"""Runs of every kind, killed at random moments and started again by the same command, end as if nothing had happened.

`CLIPMINI_KILLS` is the number of kills of each kind, 2 by default, and `CLIPMINI_KILL_SEED` draws the moments again
that an earlier run of these tests has printed.
"""

import collections
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lancedb
import pytest
from PIL import Image

from loopback_hub import running_hub
from pair_files import write_csv

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="forks a process with threads")]

NUM_KILLS = int(os.environ.get("CLIPMINI_KILLS", 2))
SEED = os.environ.get("CLIPMINI_KILL_SEED", secrets.token_hex(4))
SERVER = Path(__file__).parent / "support" / "fork_commands.py"
TOWER = "tf_efficientnet_lite0"
RECIPE = """
model: tiny
training:
  per_device_train_batch_size: 4
  num_train_epochs: 3
  use_cpu: true
"""
STAGES = """
stages:
  heads:
    freeze_vision: true
    freeze_text: true
  towers:
    vision_stages: 3
"""
DONE = ("The model is at", "The index is in", "resolved")
OPTIONS = {  # of each kind of training
    "stages": STAGES,
    "frozen": "  freeze_vision: true\n  freeze_text: true\n",
    "full": "",
    "lora": "  lora: {parts: [vision, text], rank: 4}\n",
}


class Commands:
    """Runs commands in a folder, with a cache and a Hub of their own; see fork_commands.py."""

    def __init__(self, folder, hub):
        self.folder, self.hub, self.log = folder, hub, folder / "log"
        caches = {"CLIPMINI_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "huggingface")}
        self.server = subprocess.Popen(
            [sys.executable, SERVER, self.log],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, **hub.environment(**caches), "OMP_NUM_THREADS": "1"},
        )

    def run(self, arguments, kill_after_s=None):
        """Run a command, killed after so many seconds; gives the exit code, and when it last said something."""
        self.log.write_text("")
        self.server.stdin.write(json.dumps(arguments) + "\n")
        self.server.stdin.flush()
        process, start = int(self.server.stdout.readline()), time.time()
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            with contextlib.suppress(ProcessLookupError):  # it was faster this time
                os.kill(process, signal.SIGKILL)
        code = int(self.server.stdout.readline())
        return code, self.log.stat().st_mtime - start

    def clear(self):
        """Forget all that a command has left."""
        for name in ("out", "cache", "huggingface"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.hub.models.clear()
        self.hub.uploaded.clear()

    def left_behind(self):
        """Find what no finished command leaves: hidden files, but for those that a cache or an index is made of."""
        files = [path for name in ("out", "cache") for path in (self.folder / name).rglob("*")]
        return [path for path in files if path.name.startswith(".") or path.name in ("lock", "new", "old")]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with running_hub() as hub:
        commands = Commands(tmp_path_factory.mktemp("kills"), hub)
        yield commands
        commands.server.stdin.close()
        commands.server.wait(60)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rows = [["file_name", "caption", "split"]]
    for number in range(16):
        Image.new("RGB", (48, 40), (12 * number, 250 - 12 * number, 90)).save(folder / f"{number}.png")
        rows.append([f"{number}.png", f"image number {number}", "train" if number % 4 else "validation"])
    write_csv(folder / "metadata.csv", rows)
    return folder


def training_of(out):
    """Give the weights of a run, bit for bit, its results without times, and the names of its files."""
    results = json.loads((out / "results.json").read_text())
    del results["train_s"]
    weights = {path.relative_to(out): path.read_bytes() for path in out.glob("**/model/model.safetensors")}
    return weights, results, sorted(path.relative_to(out) for path in out.rglob("*"))


def index_of(out):
    rows = lancedb.connect(out).open_table("images").to_arrow().sort_by("key").to_pylist()
    return rows, sorted(path.name for path in out.iterdir())


def repository_of(hub):
    commit = hub.models["org/tiny"].at("main")
    return {path: file.content for path, file in commit.files.items()}, hub.models["org/tiny"].titles()


@pytest.mark.parametrize("kind", [*OPTIONS, "index", "push", "tower"])
def test_a_killed_run_ends_as_one_that_was_not(kind, commands, photos, tiny_folder, pushable_folder, tmp_path):
    out, hub = commands.folder / "out", commands.hub
    if kind in OPTIONS:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(RECIPE + OPTIONS[kind])
        arguments = ["train", str(recipe), "--set", f"source={photos}", "--set", f"output_dir={out}"]
        outcome, begun = (lambda: training_of(out)), (lambda: (out / "recipe_as_run.yaml").exists())
    elif kind == "index":
        arguments = ["index", str(tiny_folder), str(photos), "--out", str(out)]
        outcome, begun = (lambda: index_of(out)), (out / "manifest.json").exists
    elif kind == "push":
        arguments = ["push", str(pushable_folder), "org/tiny"]
        outcome, begun = (lambda: repository_of(hub)), (lambda: bool(hub.models))
    else:
        arguments = ["resolve", f"offline:{TOWER}"]
        towers = commands.folder / "cache" / "towers"
        outcome = lambda: {path.name: path.read_bytes() for path in next(towers.glob("*/")).iterdir()}  # noqa: E731
        begun = towers.exists
    for _ in range(2):  # the second takes as long as those that follow
        commands.clear()
        code, whole_s = commands.run(arguments)
        assert code == 0, commands.log.read_text()
    expected, allowed = outcome(), set(commands.left_behind())

    moments, phases = random.Random(f"{SEED} {kind}"), collections.Counter()
    while phases.total() < NUM_KILLS:
        commands.clear()
        moment_s = moments.uniform(0, 1.2 * whole_s)  # what comes then is Python's own end
        code, _ = commands.run(arguments, kill_after_s=moment_s)
        if code == 0:
            continue
        assert code == -signal.SIGKILL
        is_done = (out / "results.json").exists() or any(word in commands.log.read_text() for word in DONE)
        phases["writing" if begun() and not is_done else "ending" if is_done else "starting"] += 1
        where = f"CLIPMINI_KILL_SEED={SEED}: {kind} after {moment_s:.3f} s, kill {phases.total()}"
        code, _ = commands.run(arguments)
        if kind in OPTIONS and is_done:
            assert "holds a finished run" in commands.log.read_text(), where
        else:
            assert code == 0, f"{where}: {commands.log.read_text()}"
        assert outcome() == expected, where
        assert set(commands.left_behind()) <= allowed, where
    sys.stdout.write(f"\n{kind}: {phases.total()} kills in {whole_s:.1f} s, {dict(phases)}, seed {SEED}\n")
