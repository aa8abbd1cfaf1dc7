"""Several processes, and a gradient cache, give what one process gives on the same global batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "support" / "training_step.py"


def start(folder, options, sizes, rank=0, world_size=1, port=0):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if world_size > 1:
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(SCRIPT), str(folder), json.dumps(options), json.dumps(sizes)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def run(folder, options, sizes, world_size):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(folder, options, sizes, rank, world_size, port) for rank in range(world_size)]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
    return [load_file(folder / f"{world_size}-{rank}.safetensors") for rank in range(world_size)]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ([4, 4], {}),
        ([5, 2], {}),
        ([5, 3], {"gradient_cache_chunk": 2}),
        ([5, 3], {"gradient_cache_chunk": 2, "length_groups": 2}),
        ([4, 4], {"length_groups": 2}),
        ([4, 4], {"matryoshka_dims": "4", "hard_negatives": {"weight": 0.5, "start": 0}}),
    ],
)
def test_two_processes_give_the_gradient_of_one(loss, sizes, options, tmp_path):
    [alone] = run(tmp_path, {"loss": loss, **{k: v for k, v in options.items() if "chunk" not in k}}, sizes, 1)
    ranks = run(tmp_path, {"loss": loss, "ddp_backend": "gloo", **options}, sizes, 2)
    assert len(alone) > 20
    assert max(value.abs().max() for name, value in alone.items() if name != "loss") > 1e-3
    for one in ranks:
        assert one.keys() == alone.keys()
        for name, value in alone.items():
            assert torch.allclose(one[name], value, atol=1e-5), name
