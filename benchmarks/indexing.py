"""What indexing costs beside the image tower alone, and what a second search in a folder takes.

    python benchmarks/indexing.py MODEL --count 512 --repeats 5

Photographs are saved as JPEGs of 640x480. In alternating runs, they are indexed from their files, and the tower embeds
the same batches, ready in memory; CPU and wall seconds of both are compared. The model is loaded before. Then the
command `clipmini search MODEL FOLDER` is run several times, beside `import torch` alone.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from PIL import ImageOps

from clipmini.data.images import Skipped, find_images
from clipmini.indexing.index import Index
from clipmini.indexing.update import BATCH_SIZE, update_index
from clipmini.inference.encoders import load_encoder
from clipmini.names import expand
from modeling_clipmini.encoding_clipmini import embed_in_batches
from modeling_clipmini.images_clipmini import read_image

SIZE = (640, 480)


def cpu_s() -> float:
    """Return the CPU seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(work: Callable[[], Any]) -> tuple[float, float]:
    """Return the CPU and the wall seconds that some work takes."""
    start, start_cpu = time.perf_counter(), cpu_s()
    work()
    return cpu_s() - start_cpu, time.perf_counter() - start


def command(*arguments: str, cache: str) -> float:
    """Return the wall seconds that Python takes with some arguments."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, env={**os.environ, "CLIPMINI_CACHE": cache}
    )
    return time.perf_counter() - start


def main(
    model: Annotated[str, typer.Argument(help="The model's folder.")],
    count: Annotated[int, typer.Option(help="How many images to index.")] = 512,
    repeats: Annotated[int, typer.Option(help="How often to index them.")] = 5,
    folder: Annotated[Path | None, typer.Option(help="Images to search. Default: those that were indexed.")] = None,
) -> None:
    """Measure indexing and searching."""
    encoder = load_encoder(model)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        photos = [ImageOps.fit(read_image(path), SIZE) for path in find_images(expand("offline:photos"))]
        (root / "images").mkdir()
        for number in range(count):
            image = photos[number % len(photos)].rotate(number // len(photos))  # no two alike
            image.save(root / "images" / f"{number}.jpg", quality=90)
        files = find_images(root / "images")
        ready = [encoder.prepare_image(read_image(file)) for file in files]
        rows = []
        for repeat in range(repeats + 1):
            index = Index.create(root / f"{repeat}.index", encoder)
            indexing = measure(lambda: update_index(index, [root / "images"], Skipped()))  # noqa: B023
            tower = measure(lambda: embed_in_batches(ready, encoder.model.embed_pixels, BATCH_SIZE))
            if repeat:  # the first warms up
                rows.append((*indexing, *tower))
        cpu, wall, tower_cpu, tower_wall = (median(column) for column in zip(*rows, strict=True))
        ratios = [row[0] / row[2] for row in rows]
        print(f"{count} images of {SIZE[0]}x{SIZE[1]}, median of {repeats} runs, milliseconds an image:")
        print(f"  indexing: {1000 * cpu / count:.1f} CPU, {1000 * wall / count:.1f} wall")
        print(f"  tower:    {1000 * tower_cpu / count:.1f} CPU, {1000 * tower_wall / count:.1f} wall")
        print(f"  CPU, indexing / tower: {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        search = ("-m", "clipmini.cli", "search", model, str(folder or root / "images"), "a dog in the snow")
        first, *others = (command(*search, cache=str(root / "cache")) for _ in range(repeats + 1))
        imports = [command("-c", "import torch", cache=name) for _ in range(repeats)]
        load = "from clipmini.inference.encoders import load_encoder; import sys; load_encoder(sys.argv[1])"
        loads = [command("-c", load, model, cache=name) for _ in range(repeats)]
        print(f"clipmini search, wall seconds: first {first:.1f}, later {median(others):.1f}")
        print(f"  import torch alone {median(imports):.1f}, loading the model {median(loads):.1f}")


if __name__ == "__main__":
    typer.run(main)
