"""clipmini beside other libraries: what training, encoding and loading cost with the same towers and files.

    python benchmarks/peers.py              # about ten minutes on two cores; writes the table in README.md
    python benchmarks/peers.py --small      # one short round, to see that it runs; writes nothing
    python benchmarks/peers.py --json FILE  # keeps every single measurement too

How each library is used stands in `contenders.py`. Every measurement runs in a process of its own, on one thread, and
counts CPU time, since others may use the machine. Rounds alternate, A B C then C B A, and a ratio is taken between
measurements of one round; the table shows the median ratio with the smallest and the largest.

Training is real steps of each library's own loop or Trainer, with reading and preparing the images; the first step is
left out. glibc gives freed memory back to the system and takes it again at every step unless it is told not to;
`clipmini train` and `clipmini.load` tell it, and so does the training loop of the bare towers. Anybody can, with three
environment variables: the column "memory kept" shows the others with them, in one more round.
"""

import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from measuring import (
    cpu_ms,
    cpu_s,
    machine,
    make_files,
    median_and_range,
    peak_gib,
    run_alone,
    versions,
    write_between,
)

CLIPMINI, BARE = "clipmini", "bare towers"
NAMES = (CLIPMINI, BARE, "sentence-transformers", "open_clip", "VisionTextDualEncoder", "the tutorial's loop")
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(512 * 2**20),
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
MARK = "peers"
NUM_ENCODED = 64
USE = ("image", "captions", "one_image", "one_caption", "load")


def measure_one(part: str, name: str, root: Path, batch_size: int, num_calls: int) -> dict[str, Any]:
    """Measure one library in this process: "save", "train" or "use"; times are in CPU milliseconds."""
    if part == "use":  # before anything is imported that not every library imports
        return _use(name, root, num_calls)
    import torch

    from contenders import CONTENDERS

    torch.set_num_threads(1)
    contender = CONTENDERS[name]
    folder = root / name.replace(" ", "-")
    if part == "save":
        contender.save(root / "towers", folder)
        return {}
    files, captions = _pairs(root)
    model = contender(folder)
    ends = [cpu_s()]
    with tempfile.TemporaryDirectory() as scratch:
        model.train(files, captions, batch_size, lambda: ends.append(cpu_s()), Path(scratch))
    steps = [1000 * (end - start) / batch_size for start, end in itertools.pairwise(ends)]
    return {"train": steps[1:], "gib": peak_gib()}


def _use(name: str, root: Path, num_calls: int) -> dict[str, Any]:
    import torch

    from contenders import CONTENDERS

    torch.set_num_threads(1)
    files, captions = (rows[:NUM_ENCODED] for rows in _pairs(root))
    model = CONTENDERS[name](root / name.replace(" ", "-"))
    result: dict[str, Any] = {"load": [1000 * cpu_s()]}
    sizes = model.batch_sizes or (0,)
    model.embed_images(files[:4], 4), model.embed_texts(captions[:4], 4)  # warm up
    times = {size: cpu_ms(lambda size=size: model.embed_images(files, size)) for size in sizes}
    result["image"] = [min(times.values()) / len(files)]
    times = {size: cpu_ms(lambda size=size: model.embed_texts(captions, size)) for size in sizes}
    result["captions"] = [min(times.values()) / len(captions)]
    rows = range(min(num_calls, len(files)))
    one_image = [cpu_ms(lambda row=row: model.embed_images(files[row : row + 1], 1)) for row in rows]
    one_caption = [cpu_ms(lambda row=row: model.embed_texts(captions[row : row + 1], 1)) for row in rows]
    result |= {"one_image": [statistics.median(one_image)], "one_caption": [statistics.median(one_caption)]}
    result["vectors"] = [
        rows[:4].tolist() for rows in (model.embed_images(files[:4], 4), model.embed_texts(captions[:4], 4))
    ]
    return result


def _pairs(root: Path) -> tuple[list[Path], list[str]]:
    captions = json.loads((root / "captions.json").read_text())
    return [root / "files" / f"{number}.jpg" for number in range(len(captions))], captions


def agreement(results: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Return the smallest cosine of each library's embeddings with those of the bare towers, if they are as wide."""
    import numpy as np

    first = {name: [np.array(rows) for rows in rounds[0]["vectors"]] for name, rounds in results.items()}
    return {
        name: min(float((ours * theirs).sum(1).min()) for ours, theirs in zip(both, first[BARE], strict=True))
        for name, both in first.items()
        if both[0].shape == first[BARE][0].shape
    }


def ratios(rounds: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], key: str) -> list[float]:
    """Divide what was measured by what clipmini took in the same round, step by step."""
    return [
        one / other
        for ours, theirs in zip(rounds, others, strict=True)
        for one, other in zip(ours[key], theirs[key], strict=True)
    ]


def middle(rounds: Sequence[dict[str, Any]], key: str) -> float:
    """Return the median over all rounds."""
    return statistics.median(value for one in rounds for value in one[key])


def table(
    train: dict[str, Any], kept: dict[str, Any], use: dict[str, Any], kept_use: dict[str, Any], batch_size: int
) -> str:
    """Lay out the two tables: training, and use."""
    lines = [
        f"| training, batch {batch_size} | CPU ms a pair | times clipmini | memory kept: ms | times | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, rounds in train.items():
        again = "the same | "
        if name in kept:
            kept_ms = middle(kept[name], "train")
            again = f"{kept_ms:.0f} | {kept_ms / middle(train[CLIPMINI], 'train'):.2f}"
        times = "1" if name == CLIPMINI else median_and_range(ratios(rounds, train[CLIPMINI], "train"))
        gib = max(one["gib"] for one in rounds)
        lines.append(f"| {name} | {middle(rounds, 'train'):.0f} | {times} | {again} | {gib:.1f} |")
    lines += [
        "",
        "| use | image, ms | times clipmini | memory kept: ms | times | caption, ms | times clipmini | one image "
        "| one caption | load, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rounds in use.items():
        cells = []
        for key in ("image", "captions"):
            cells.append(f"{middle(rounds, key):.1f}")
            cells.append("1" if name == CLIPMINI else median_and_range(ratios(rounds, use[CLIPMINI], key)))
            if key == "image" and name in kept_use:
                kept_ms = middle(kept_use[name], key)
                cells += [f"{kept_ms:.1f}", f"{kept_ms / middle(use[CLIPMINI], key):.2f}"]
            elif key == "image":
                cells += ["the same", ""]
        cells += [f"{middle(rounds, key):.1f}" for key in ("one_image", "one_caption")]
        lines.append(f"| {name} | {' | '.join(cells)} | {middle(rounds, 'load') / 1000:.1f} |")
    return "\n".join(lines)


def describe(use: dict[str, Any], rounds: int, num_pairs: int) -> str:
    """Say how and on what this was measured."""
    from contenders import CONTENDERS

    packages = [CONTENDERS[name].package for name in NAMES]
    cosines = ", ".join(f"{name} {cosine:.4f}" for name, cosine in agreement(use).items() if name != BARE)
    return "\n".join(
        [
            f"{machine()}, one thread; {versions('timm', *dict.fromkeys(packages))}. {rounds} rounds; {num_pairs} "
            f"images of 500x375 to train on, {NUM_ENCODED} to encode. Smallest cosine with the embeddings of the bare "
            f"towers: {cosines}.",
            "",
            *(f"- {name}: {CONTENDERS[name].how}." for name in NAMES),
        ]
    )


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every measurement here.")] = None,
    small: Annotated[bool, typer.Option(help="One short round, to see that it runs.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each measurement.")] = 2,
    steps: Annotated[int, typer.Option(min=2, help="Training steps a round; the first is left out.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Pairs in a batch.")] = 32,
    measure: Annotated[tuple[str, str, Path] | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure all libraries by turns, and write the table."""
    if small:
        rounds, steps, batch_size = 1, 2, 4
    num_calls = 3 if small else 12
    if measure is not None:
        print(json.dumps(measure_one(*measure, batch_size, num_calls)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        from contenders import save_towers

        save_towers(root / "towers")
        _, captions = make_files(root / "files", steps * batch_size)
        (root / "captions.json").write_text(json.dumps(captions))

        def run(part: str, name: str, **environment: str) -> dict[str, Any]:
            options = ["--batch-size", batch_size, *(["--small"] if small else [])]
            found = run_alone(__file__, *options, "--measure", part, name, root, **ONE_THREAD, **environment)
            shown = {key: [round(value, 1) for value in found[key]] for key in ("train", *USE) if key in found}
            print(f"{part} {name}: {json.dumps(shown)}", flush=True)
            return found

        for name in NAMES:
            run("save", name)
        train: dict[str, Any] = {name: [] for name in NAMES}
        use: dict[str, Any] = {name: [] for name in NAMES}
        for number in range(rounds):
            for name in NAMES if number % 2 == 0 else reversed(NAMES):
                train[name].append(run("train", name))
                use[name].append(run("use", name))
        kept = {name: [run("train", name, **KEEP_MEMORY)] for name in NAMES if name not in (CLIPMINI, BARE)}
        kept_use = {name: [run("use", name, **KEEP_MEMORY)] for name in NAMES if name != CLIPMINI}
    text = f"{table(train, kept, use, kept_use, batch_size)}\n\n{describe(use, rounds, len(captions))}"
    print(f"\n{text}")
    if json_file:
        found = {"train": train, "train_memory_kept": kept, "use": use, "use_memory_kept": kept_use, "text": text}
        json_file.write_text(json.dumps(found))
    if not small:
        write_between(MARK, text)


if __name__ == "__main__":
    typer.run(main)
