"""Measure what it costs to check and compare images for the first time, and once they are known.

Makes JPEGs of 640x480 from random crops of the photographs in `examples/photos`, and runs `load_pairs` and
`find_duplicates` in two processes, one after the other, with a cache of their own.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
from pathlib import Path

from PIL import Image

PHOTOS = Path(__file__).parent.parent / "examples" / "photos"


def make_images(folder: Path, num_images: int, seed: int = 0) -> None:
    """Write crops of the photographs as JPEGs of quality 85, and a table with a caption for each."""
    draw = random.Random(seed)
    photos = [Image.open(file).convert("RGB") for file in sorted(PHOTOS.glob("*/*.webp"))]
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as table:
        for number in range(num_images):
            photo = draw.choice(photos)
            scale = draw.uniform(0.4, 1.0) * min(photo.width / 4, photo.height / 3)
            width, height = 4 * scale, 3 * scale
            left, top = draw.uniform(0, photo.width - width), draw.uniform(0, photo.height - height)
            crop = photo.resize((640, 480), box=(left, top, left + width, top + height))
            crop.save(folder / f"{number}.jpg", quality=85)
            table.write(json.dumps({"file_name": f"{number}.jpg", "caption": f"photograph {number}"}) + "\n")


def measure(folder: Path, name: str) -> None:
    """Load and compare the images, and print what this took; imports are not counted."""
    from clipmini.data.duplicates import find_duplicates
    from clipmini.data.pairs import load_pairs

    def seconds() -> float:
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    before, start = seconds(), time.perf_counter()
    report = find_duplicates(load_pairs(folder))
    wall = time.perf_counter() - start
    print(f"| {name} | {seconds() - before:.2f} | {wall:.2f} | {report.num_images:,} |")


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-images", type=int, default=5000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        make_images(Path(folder), arguments.num_images)
        os.environ |= {"CLIPMINI_CACHE": cache, "HF_DATASETS_CACHE": cache}
        time.sleep(3)  # files that have just been written are read again
        print("| start | CPU seconds | seconds | images |\n|---|---|---|---|", flush=True)
        for name in ("first", "second"):
            process = multiprocessing.get_context("fork").Process(target=measure, args=(Path(folder), name))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
