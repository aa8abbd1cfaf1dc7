"""How much memory does a training step of 4,096 pairs take, with and without the gradient cache?

    python benchmarks/memory.py

One optimizer step of the real offline towers, nothing frozen but the BatchNorm statistics, on the CPU. Each figure is
the peak resident memory of a process of its own. Without the cache the batch does not fit: smaller batches are
measured, and the line through them says what it would take. The photographs of `examples/photos` are repeated under
new image ids: for memory, what they show does not matter.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

PHOTOS = Path(__file__).parent.parent / "examples" / "photos"
GIB = 2**30
PLAIN_BATCHES = (32, 64, 128)


def step(batch_size: int, chunk: int | None) -> dict[str, float]:
    """Train for one step, and give its peak resident memory in GiB and its time in seconds."""
    from datasets import concatenate_datasets

    from clipmini.data.pairs import load_pairs
    from clipmini.inference.embed import keep_freed_memory
    from clipmini.training.arguments import ClipMiniTrainingArguments
    from clipmini.training.build import build_model
    from clipmini.training.recipes import load_recipe
    from clipmini.training.trainer import ClipMiniTrainer

    keep_freed_memory()
    photos = load_pairs(str(PHOTOS))["train"]
    num_pairs = 2 * batch_size  # the next batch is read while one is trained on
    pairs = concatenate_datasets([photos] * (num_pairs // len(photos) + 1)).select(range(num_pairs))
    pairs = pairs.remove_columns("image_id").add_column("image_id", list(range(num_pairs)))
    preset = load_recipe("demo", {"source": PHOTOS}).model
    model = build_model(preset)
    with tempfile.TemporaryDirectory() as folder:
        args = ClipMiniTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            gradient_cache_chunk=chunk,
            length_groups=4,
            max_steps=1,
            eval_strategy="no",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = ClipMiniTrainer(model=model, args=args, train_dataset=pairs)
        start_s = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start_s
    return {"gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, "seconds": seconds}


def measure(batch_size: int, chunk: int | None) -> dict[str, float]:
    """Run `step` in a process of its own."""
    options = ["--batch-size", str(batch_size), *(["--chunk", str(chunk)] if chunk else [])]
    done = subprocess.run([sys.executable, __file__, "--one", *options], check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"batch {batch_size}, chunk {chunk}: {result['gib']:.2f} GiB, {result['seconds']:.0f} s", flush=True)
    return result


def main(
    batch_size: Annotated[int, typer.Option(help="Pairs in the batch.")] = 4096,
    chunk: Annotated[int, typer.Option(help="gradient_cache_chunk; 0 for none.")] = 0,
    one: Annotated[bool, typer.Option("--one", help="Measure this process alone.")] = False,
) -> None:
    """Measure the batch with the cache, and smaller ones without."""
    if one:
        print(json.dumps(step(batch_size, chunk or None)))
        return
    measure(batch_size, chunk or 16)
    plain = [measure(size, None)["gib"] for size in PLAIN_BATCHES]
    per_pair, fixed = np.polyfit(PLAIN_BATCHES, plain, 1)
    print(f"without the cache, batch {batch_size} would take {fixed + per_pair * batch_size:.0f} GiB")


if __name__ == "__main__":
    typer.run(main)
