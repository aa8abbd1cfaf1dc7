"""Run code as people do who have a model's folder and not this package."""

import json
import multiprocessing
import os
import sys
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

# Each stranger is forked from a process that has imported what takes longest and reads no setting of the Hub.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torchvision", "scipy.optimize"])


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("clipmini", "modeling_clipmini"):
            raise ModuleNotFoundError(name)


def become_stranger(code, folder, arguments, environment, streams):
    sys.meta_path.insert(0, Blocker())
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = ["", *environment.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv = ["-c", *arguments]
    os.chdir(folder)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    exec(code, {"__name__": "__main__", "json": json, "sys": sys})


def run_as_stranger(code, folder, *arguments, check=True, **variables):
    """Run code in a folder, where clipmini cannot be imported, with module and Hub caches of its own.

    Without a GPU: pipelines would choose it, and its cuDNN rounds to 10 bits.
    """
    own = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **own, **variables}
    with TemporaryDirectory() as outputs:
        streams = [f"{outputs}/{name}" for name in ("stdout", "stderr")]
        job = (code, folder, [*map(str, arguments)], environment, streams)
        process = PROCESSES.Process(target=become_stranger, args=job)
        process.start()
        process.join()
        out, errors = (open(path, encoding="utf-8").read() for path in streams)
    assert not check or process.exitcode == 0, errors
    return CompletedProcess(code, process.exitcode, out, errors)
