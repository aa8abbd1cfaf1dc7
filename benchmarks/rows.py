"""What does a run pay for each row before it trains: CPU seconds and memory from a thousand rows to a million?

    python benchmarks/rows.py                       # ten minutes
    python benchmarks/rows.py --sizes 1000,10000

A row is an image with one caption of ten words; one in a hundred repeats the image and the caption of the row before
it. No image is decoded: the files are empty, a thousand of them seen through a thousand links, and what a scan would
find in them is drawn at random and is in the store when a step begins. Tokenizer and towers are the demo's.

Each step runs in a process of its own. CPU seconds are its user and system time, in all its threads; the memory is the
most that it held, and what it held before the step: libraries and rows.
"""

import gc
import multiprocessing
import os
import resource
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from datasets import DatasetDict, concatenate_datasets

from clipmini.data import pairs as pairs_module
from clipmini.data import scan
from clipmini.data.duplicates import find_duplicates
from clipmini.data.leaks import find_leaks
from clipmini.data.pairs import PairDataset, load_pairs
from clipmini.evaluation.measure import Answer, Answers, Found
from clipmini.store import stored_rows
from clipmini.training import features, run
from clipmini.training.arguments import ClipMiniTrainingArguments
from clipmini.training.batches import ClipMiniCollator, EpochPairs, PairSampler
from clipmini.training.build import build_model
from clipmini.training.recipes import load_recipe

PHOTOS = Path(__file__).parent.parent / "examples" / "photos"
NUM_FILES = 1000
NUM_WORDS, VOCABULARY = 10, 20_000
SPACE = {"kind": "rows of the benchmark"}
GIB = 2**30


def make_table(folder: Path, num_rows: int) -> Path:
    """Make empty files, and a parquet table of their absolute paths with a caption for each."""
    files = folder / "files"
    files.mkdir()
    for number in range(NUM_FILES):
        (files / f"{number}.jpg").touch()
    for number in range(-(-num_rows // NUM_FILES)):
        (folder / f"{number}").symlink_to(files)
    words = np.random.default_rng(0).zipf(1.3, (num_rows, NUM_WORDS)) % VOCABULARY
    captions = [" ".join(f"word{word}" for word in row).capitalize() + "." for row in words.tolist()]
    captions[100::100] = captions[99::100][: len(captions[100::100])]
    paths = [f"{folder}/{row // NUM_FILES}/{row % NUM_FILES}.jpg" for row in range(num_rows)]
    pq.write_table(pa.table({"image": paths, "caption": captions}), folder / "rows.parquet")
    return folder / "rows.parquet"


def draw_facts(keys: np.ndarray) -> np.ndarray:
    """Draw a scan's facts for each key of an image; a tenth of the looks are nearly those of others."""
    draw = np.random.default_rng(int.from_bytes(keys[0].tobytes(), "little"))
    facts = draw.integers(1, 256, (len(keys), scan.KEY_BYTES + scan.HASH_BITS // 8), dtype=np.uint8)
    facts[100::100] = facts[99::100][: len(facts[100::100])]
    alike = facts[1::10, -scan.HASH_BITS // 8 :]
    alike[:] = facts[::10, -scan.HASH_BITS // 8 :][: len(alike)] ^ np.eye(8, dtype=np.uint8)[0]
    return facts


def look_at_nothing(images: Any, rows: list[int], num_workers: int) -> list[Any]:
    """Return what a scan finds, in place of `_look_at_all`."""
    keys = [scan._key_of(images[row]["image"]) for row in rows]
    facts = draw_facts(np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)) if keys else ()
    return [scan._Look(None, fact.tobytes(), key) for fact, key in zip(facts, keys, strict=True)]


def assume_readable(rows: Any) -> scan.ImageFacts:
    """Return facts that cost nothing, in place of `scan_images`."""
    return scan.ImageFacts([None] * len(rows), [None] * len(rows), np.empty((len(rows), 16)), np.empty((0, 64)))


def usage_of(step: Callable[[], Any]) -> tuple[float, float, float]:
    """Run a step in a process of its own; return its CPU seconds, and GiB before and at most."""

    def work(answer: Connection) -> None:
        def seconds() -> float:
            usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
            return sum(usage.ru_utime + usage.ru_stime for usage in usages)

        gc.freeze()  # else what the libraries have made is looked through, and copied, at any moment
        before_s, before = seconds(), resident()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        step()
        answer.send((seconds() - before_s, before, resident("VmHWM")))

    def resident(figure: str = "VmRSS") -> float:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(figure))
        return int(line.split()[1]) * 1024 / GIB

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(there,))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def draw_batch(rows: PairDataset, collator: ClipMiniCollator) -> None:
    """Set training up and draw its first batch."""
    with mock.patch("clipmini.training.batches.read_named", return_value=None):
        items = EpochPairs(rows, augment=mock.Mock(draw=lambda *_: torch.zeros(3, 2, 2)))
        sampler = iter(PairSampler(len(items)))
        collator([items[next(sampler)] for _ in range(64)])


def make_keys(model: Any, splits: DatasetDict, folder: str) -> None:
    """Find the keys of the features of four views of each training image, and of the captions."""
    args = ClipMiniTrainingArguments(
        output_dir=folder, freeze_vision=True, freeze_text=True, augment={}, num_views=4, use_cpu=True
    )
    with mock.patch.object(features, "stored_rows", return_value=None):
        features.prepare_features(model, splits, args)


def steps_of(folder: Path, num_rows: int) -> dict[str, Callable[[], Any]]:
    """Make rows, and list the steps to measure by name; each is a function without arguments."""
    table = make_table(folder, num_rows)
    splits = load_pairs(table)
    whole = concatenate_datasets(list(splits.values()))
    keys = np.random.default_rng(0).integers(0, 256, (num_rows, 16), dtype=np.uint8)

    def keep_rows() -> None:
        stored_rows(SPACE, keys, lambda rows: keys[rows, :8], dtype=np.uint8, chunk_rows=1024, description="benchmark")

    keep_rows()
    model = build_model(load_recipe("demo", {"source": PHOTOS}).model)
    collator = ClipMiniCollator(model.processor)
    found = [Answer("a caption", [Found(0, 1, 0.5, True)])]
    answers = Answers(1, 1, found, [], [])

    def load_unchecked() -> None:
        with mock.patch.object(pairs_module, "scan_images", assume_readable):
            load_pairs(table)

    return {
        "`load_pairs`, images not looked at": load_unchecked,
        "`load_pairs`": lambda: load_pairs(table),
        "`scan_images`": lambda: scan.scan_images(whole),
        "`stored_rows`": keep_rows,
        "`find_duplicates`": lambda: find_duplicates(splits),
        "`find_leaks`, of the test split": lambda: find_leaks(splits["train"], splits["test"]),
        "`PairDataset`": lambda: PairDataset(whole),
        "`PairDataset.captions`": lambda: PairDataset(whole).captions,
        "`EpochPairs`, sampler and first batch": lambda: draw_batch(PairDataset(whole), collator),
        "`prepare_features`, keys only": lambda: make_keys(model, splits, str(folder)),
        "`_find_example`": lambda: run._find_example(str(folder), "test", splits, answers),
    }


def main(
    sizes: Annotated[str, typer.Option(help="Numbers of rows.")] = "1000,10000,100000,1000000",
    only: Annotated[str, typer.Option(help="Measure the steps with this in their names.")] = "",
) -> None:
    """Measure every step at every size, and print a table."""
    datasets.disable_progress_bars()
    print("| step | rows | CPU seconds | GiB before | GiB at most |\n|---|---|---|---|---|")
    for num_rows in map(int, sizes.split(",")):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
            os.environ["CLIPMINI_CACHE"] = cache
            with (
                mock.patch.object(scan, "DOUBTFUL_NS", -(10**18)),  # the files are new, but do not change
                mock.patch.object(scan, "_look_at_all", look_at_nothing),
            ):
                steps = steps_of(Path(folder), num_rows)
                for name, step in steps.items():
                    if only in name:
                        cpu_s, before, peak = usage_of(step)
                        print(f"| {name} | {num_rows:,} | {cpu_s:.2f} | {before:.2f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
