"""What the benchmarks share: files to read, clocks, a process for each measurement, tables in README.md."""

import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

README = Path(__file__).parent / "README.md"
PHOTOS = Path(__file__).parent.parent / "examples" / "photos"
GIB = 2**30


def make_files(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> tuple[list[Path], list[str]]:
    """Write random crops of the photographs as JPEG files, and return them with a caption for each."""
    draw = random.Random(0)
    rows: list[dict[str, str]] = []
    for table in sorted(PHOTOS.glob("*/metadata.jsonl")):
        rows += [
            {"path": str(table.parent / row["file_name"]), "caption": row["caption"]}
            for row in map(json.loads, table.read_text(encoding="utf-8").splitlines())
        ]
    draw.shuffle(rows)
    rows = rows[:count]  # the same photograph again is another crop
    photos = [Image.open(row["path"]).convert("RGB") for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    files, captions = [], []
    for number in range(count):
        photo, row = photos[number % len(photos)], rows[number % len(photos)]
        left, top = (int(draw.uniform(0, 0.3) * edge) for edge in photo.size)
        files.append(folder / f"{number}.jpg")
        photo.crop((left, top, *photo.size)).resize(size).save(files[-1], quality=90)
        captions.append(row["caption"])
    return files, captions


def cpu_s() -> float:
    """Return the CPU seconds of this process and of its workers that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def cpu_ms(work: Callable[[], Any]) -> float:
    """Return the CPU milliseconds that some work takes."""
    start_s = cpu_s()
    work()
    return 1000 * (cpu_s() - start_s)


def wall_s(work: Callable[[], Any]) -> float:
    """Return the wall seconds that some work takes, on a GPU too."""
    import torch

    start_s = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


def peak_gib() -> float:
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def run_alone(script: str, *arguments: Any, **environment: str) -> Any:
    """Run a script in a process of its own, and return what it prints last, as JSON.

    Raises:
        RuntimeError: it failed; the message ends as its output did.
    """
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **environment},
    )
    if done.returncode:
        raise RuntimeError(f"{Path(script).name} {' '.join(map(str, arguments))} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def median_and_range(values: Sequence[float], digits: int = 2) -> str:
    """Say the median of some values and, if there are several, their smallest and largest."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def versions(*packages: str) -> str:
    """Name packages with their versions."""
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)


def machine() -> str:
    """Name the processor and its cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"


def write_between(mark: str, text: str) -> None:
    """Put text between `<!-- mark: begin -->` and `<!-- mark: end -->` in README.md."""
    start, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, _, rest = README.read_text(encoding="utf-8").partition(start)
    _, _, after = rest.partition(end)
    README.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")
