"""Run code as people do who have a model's folder and not this package."""

import os
import subprocess
import sys

PROLOGUE = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("clipmini", "modeling_clipmini"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
"""


def run_as_stranger(code, folder, *arguments, check=True, **variables):
    """Run code in a folder, where clipmini cannot be imported, with module and Hub caches of its own."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", **variables}
    command = [sys.executable, "-c", PROLOGUE + code, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert not check or done.returncode == 0, done.stderr
    return done
