"""Python as strangers have it, who can import neither `clipmini` nor `modeling_clipmini`; import as `strangers`."""

import os
import subprocess
import sys

PROLOGUE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("clipmini", "modeling_clipmini"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
"""


def run_as_stranger(code, folder, *arguments, check=True, **environment):
    """Run code in a folder, with caches of its own in there, and nobody to ask; returns the finished process."""
    variables = {**os.environ, "HF_HOME": str(folder / "hf"), **environment}
    command = [sys.executable, "-c", PROLOGUE + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert not check or done.returncode == 0, done.stderr
    return done
