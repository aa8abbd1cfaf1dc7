"""How the costs of clipmini grow: a step with its batch, encoding with the number of images, a start with the rows.

    python benchmarks/scaling.py            # about ten minutes; draws scaling.svg, which README.md shows
    python benchmarks/scaling.py --small    # three sizes of each, to see that it runs; writes nothing
    python benchmarks/scaling.py --json FILE

All in CPU time on one thread, with the towers of `contenders.py`. A step of the bare towers stands beside that of
clipmini, each batch in a process of its own. Encoding is `encode_files` of JPEGs of 500x375, in one process. A start
is what comes before the first step, once the model is loaded: `load_pairs` of a table whose images a scan has to look
at for the first time, though they are tiny, and `ClipMiniTrainer` until its first batch of 8 is ready.
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from measuring import cpu_s, machine, make_files, run_alone, write_between
from peers import BARE, CLIPMINI, ONE_THREAD

FIGURE = Path(__file__).parent / "scaling.svg"
BATCHES, COUNTS, ROWS = (1, 2, 4, 8, 16, 32, 64), (16, 64, 256, 1024, 2048), (1000, 3000, 10_000, 30_000, 100_000)
SMALL = ((1, 2, 4), (4, 8, 16), (100, 200, 400))
NUM_STEPS = 3  # of which the first does not count
NUM_TINY = 100  # files behind the rows of a table
START_BATCH = 8


def measure_encoding(root: Path, counts: list[int]) -> dict[int, float]:
    """Measure `encode_files`: CPU milliseconds an image, by the number of images."""
    import torch

    from contenders import ClipMini

    torch.set_num_threads(1)
    model = ClipMini(root / CLIPMINI)
    files = [root / "files" / f"{number}.jpg" for number in range(max(counts))]
    model.embed_images(files[:4], 4)  # warm up
    result = {}
    for count in counts:
        start_s = cpu_s()
        model.embed_images(files[:count], 0)
        result[count] = 1000 * (cpu_s() - start_s) / count
    return result


def measure_start(root: Path, num_rows: int) -> dict[str, float]:
    """Measure what comes before the first step, in CPU seconds."""
    import torch

    from clipmini.data.pairs import load_pairs
    from clipmini.training.arguments import ClipMiniTrainingArguments
    from clipmini.training.trainer import ClipMiniTrainer
    from contenders import ClipMini, stepwise, trainer_options

    torch.set_num_threads(1)
    model = ClipMini(root / CLIPMINI).model
    with tempfile.TemporaryDirectory() as scratch:
        table = make_table(Path(scratch), root / "files", num_rows)
        start_s = cpu_s()
        pairs = load_pairs(str(table))["train"]
        loaded_s = cpu_s()
        args = ClipMiniTrainingArguments(**{**trainer_options(START_BATCH, Path(scratch)), "max_steps": 1})
        begun: list[float] = []
        callback = stepwise(lambda: None)
        callback.on_step_begin = lambda *_, **__: begun.append(cpu_s())
        ClipMiniTrainer(model, args, pairs, callbacks=[callback]).train()
    return {"load_pairs": loaded_s - start_s, "trainer": begun[0] - loaded_s}


def make_table(folder: Path, photos: Path, num_rows: int) -> Path:
    """Write tiny images, seen through many links, and a table whose rows name one each, with a caption."""
    from PIL import Image

    (folder / "tiny").mkdir()
    for number in range(NUM_TINY):
        with Image.open(photos / f"{number % 8}.jpg") as image:
            image.resize((32 + number, 32)).save(folder / "tiny" / f"{number}.jpg")
    for number in range(-(-num_rows // NUM_TINY)):
        (folder / f"{number}").symlink_to(folder / "tiny")
    lines = [f"{row // NUM_TINY}/{row % NUM_TINY}.jpg,a caption of row number {row}" for row in range(num_rows)]
    table = folder / "captions.csv"
    table.write_text("\n".join(["image,caption", *lines]) + "\n")
    return table


def draw(figures: dict[str, Any]) -> None:
    """Draw the three curves side by side."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from clipmini.evaluation.figures import BLUE, GRAY, STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.1), layout="constrained")
        step, encode, start = figure.subplots(1, 3)
        for name, color, line in ((CLIPMINI, BLUE, "o-"), (BARE, GRAY, "s--")):
            points = figures["step"][name]
            step.plot(list(map(int, points)), list(points.values()), line, color=color, label=name)
        step.set(xlabel="batch", ylabel="CPU ms a pair", ylim=(0, None), title="A training step")
        step.legend(loc="best")
        encode.plot(list(map(int, figures["encode"])), list(figures["encode"].values()), "o-", color=BLUE)
        encode.set(xlabel="images", ylabel="CPU ms an image", ylim=(0, None), title="encode_files")
        rows = list(map(int, figures["start"]))
        start.plot(
            rows, [sum(times.values()) for times in figures["start"].values()], "o-", color=BLUE, label="in all"
        )
        trainer = [times["trainer"] for times in figures["start"].values()]
        start.plot(rows, trainer, "s--", color=GRAY, label="of it ClipMiniTrainer")
        start.set(xlabel="rows", ylabel="CPU seconds", yscale="log", title="Until the first step")
        start.legend(loc="best")
        for axes in (step, encode):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        start.set_xscale("log")
        start.minorticks_off()
        start.xaxis.set_major_formatter("{x:,g}")
        title = "Cost of a training step by batch, of encoding by images, and of a start by rows."
        figure.savefig(FIGURE, facecolor="white", metadata={"Date": None, "Title": title})


def describe(figures: dict[str, Any]) -> str:
    """Show the drawing, and say its ends in words."""

    def ends(points: dict[Any, float], digits: int = 0) -> str:
        (first, *_, last) = points
        return f"{points[first]:.{digits}f} at {int(first):,} and {points[last]:.{digits}f} at {int(last):,}"

    steps = ends(figures["step"][CLIPMINI])
    encode, start = ends(figures["encode"]), ends({row: sum(t.values()) for row, t in figures["start"].items()}, 1)
    text = (
        f"CPU ms a pair by batch: {steps}; CPU ms an image by images: {encode}; seconds until the first step: {start}"
    )
    return f"![{text}.]({FIGURE.name})\n\n{text}. {machine()}, one thread."


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    small: Annotated[bool, typer.Option(help="Three small sizes of each, to see that it runs.")] = False,
    measure: Annotated[tuple[str, str, Path] | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure the three curves, and draw them."""
    batches, counts, rows = SMALL if small else (BATCHES, COUNTS, ROWS)
    if measure is not None:
        part, what, root = measure
        found: Any = measure_start(root, int(what)) if part == "start" else measure_encoding(root, json.loads(what))
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        from contenders import CONTENDERS, save_towers

        save_towers(root / "towers")
        for name in (CLIPMINI, BARE):
            CONTENDERS[name].save(root / "towers", root / name.replace(" ", "-"))
        _, captions = make_files(root / "files", max(*counts, NUM_STEPS * max(batches)))
        figures: dict[str, Any] = {"step": {CLIPMINI: {}, BARE: {}}, "start": {}}
        peers = str(Path(__file__).with_name("peers.py"))
        for batch_size in batches:
            (root / "captions.json").write_text(json.dumps(captions[: NUM_STEPS * batch_size]))
            for name in (CLIPMINI, BARE):
                options = ("--batch-size", batch_size, "--measure", "train", name, root)
                times = run_alone(peers, *options, **ONE_THREAD)["train"]
                figures["step"][name][batch_size] = min(times)
                print(f"batch {batch_size}, {name}: {min(times):.1f} ms a pair", flush=True)
        environment = {**ONE_THREAD, "CLIPMINI_CACHE": str(root / "cache")}
        figures["encode"] = run_alone(__file__, "--measure", "encode", json.dumps(counts), root, **environment)
        print({count: round(value, 1) for count, value in figures["encode"].items()}, flush=True)
        for num_rows in rows:
            figures["start"][num_rows] = run_alone(__file__, "--measure", "start", num_rows, root, **environment)
            print(f"{num_rows} rows: {json.dumps(figures['start'][num_rows])} s", flush=True)
    if json_file:
        json_file.write_text(json.dumps(figures))
    if not small:
        draw(figures)
        write_between(FIGURE.stem, describe(figures))


if __name__ == "__main__":
    typer.run(main)
