"""What the one opener of images takes: memory for the largest of each format, and nothing else for 10,000 broken ones.

    python benchmarks/images.py --count 10000 --seed 0

First every format is read at the most pixels that it is let in with, and its `pixel_values` are made, in a process of
its own. Then images of every format are broken at random, and read by processes that note what each took; whatever is
neither an image nor an `ImageError`, or takes over `LIMIT_S`, counts as a crash. Only Linux tells memory this way.
"""

import io
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import pillow_heif
import typer
from PIL import Image
from transformers import CLIPImageProcessor

from modeling_clipmini.images_clipmini import (
    BYTES_PER_PIXEL,
    MAX_MEMORY,
    MAX_PIXELS,
    MAX_WHOLE_PIXELS,
    READ_WHOLE,
    ImageError,
    read_image,
)

pillow_heif.register_heif_opener()
LIMIT_S, TOO_SLOW = 20, "takes too long"
CHUNK = 1000  # images that a process reads
SMALL = (64, 48)
SHOWN = ("compression", "progressive", "lossless")
# Modes and options of every format that the installed Pillow can write.
KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("JPEG", "RGB", {}),
    ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
    ("JPEG", "CMYK", {"progressive": True}),
    ("JPEG", "L", {}),
    *(("PNG", mode, {"compress_level": 1}) for mode in ("RGB", "RGBA", "LA", "L", "P", "I;16", "1")),
    ("WEBP", "RGB", {"method": 0}),
    ("WEBP", "RGBA", {"lossless": True, "method": 0}),
    ("GIF", "P", {}),
    ("BMP", "RGB", {}),
    ("TIFF", "RGB", {}),
    *(("TIFF", "RGBA", {"compression": kind}) for kind in ("tiff_lzw", "tiff_deflate")),
    ("TIFF", "RGB", {"compression": "jpeg"}),
    ("TIFF", "I;16", {}),
    ("AVIF", "RGB", {"speed": 10}),
    ("AVIF", "RGBA", {"speed": 10}),
    *(("HEIF", mode, {"enc_params": {"preset": "ultrafast"}}) for mode in ("RGB", "RGBA", "L", "I;16")),
    ("JPEG2000", "RGB", {}),
    ("JPEG2000", "RGBA", {}),
    ("PPM", "RGB", {}),
    ("PPM", "L", {}),
    ("ICO", "RGBA", {}),
]


def main(
    count: Annotated[int, typer.Option(help="How many images to break.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Another seed breaks others.")] = 0,
    largest: Annotated[bool, typer.Option(help="Read the largest images too.")] = True,
) -> None:
    """Measure both, print what was found, and fail where there was a crash or a limit did not hold."""
    failed = [*(measure_largest() if largest else []), *read_broken(count, seed)]
    sys.exit("\n".join(failed) or None)


def measure_largest() -> list[str]:
    """Read the largest images of each format, whole and halved, and print what they take; return what went wrong."""
    over = []
    print("| format | mode | megapixels | GiB | seconds |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind, mode, options in KINDS:
            if kind == "ICO":
                continue  # 256 pixels wide
            whole = min(MAX_WHOLE_PIXELS, MAX_MEMORY // BYTES_PER_PIXEL.get(kind, 1))
            most = int(0.93 * MAX_MEMORY) // BYTES_PER_PIXEL[kind] if kind in READ_WHOLE else MAX_PIXELS
            for pixels in (whole, most):  # the latter are halved
                edge = int((0.95 * pixels / 99) ** 0.5)
                file = Path(folder, "image")
                file.write_bytes(make_image(kind, mode, options, (11 * edge, 9 * edge)))
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    taken, seconds, fault = pool.apply(prepare, (str(file),))
                shown = (key if value is True else str(value) for key, value in options.items() if key in SHOWN)
                name = " ".join([mode, *shown])
                figures = f"{99 * edge**2 / 1e6:.0f} | {taken / 2**30:.2f} | {seconds:.1f}"
                print(f"| {kind} | {name} | {figures} |{fault or ''}", flush=True)
                over += [f"{kind} {mode}: {taken / 2**30:.2f} GiB"] if taken > MAX_MEMORY else []
                over += [f"{kind} {mode}: {fault}"] if fault else []
    return over


def prepare(path: str) -> tuple[int, float, str | None]:
    """Read an image and make its `pixel_values`: the memory taken in bytes, the time, and the reason if refused."""
    warnings.simplefilter("ignore")
    processor = CLIPImageProcessor()
    processor(images=[Image.new("RGB", SMALL)], return_tensors="pt")
    before, start, fault = reset_peak(), time.perf_counter(), None
    try:
        processor(images=[read_image(path)], return_tensors="pt")
    except ImageError as error:
        fault = str(error)
    return memory("VmHWM") - before, time.perf_counter() - start, fault


def read_broken(count: int, seed: int) -> list[str]:
    """Break images and read them, and print what came of it; return the crashes."""
    images = [make_image(kind, mode, options, SMALL) for kind, mode, options in KINDS]
    outcomes: Counter[str] = Counter()
    most_bytes, most_s, crashes = 0, 0.0, []
    seeds = range(seed * count, (seed + 1) * count)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # so that what is freed goes back, and each image counts alone
    for start in range(0, count, CHUNK):
        chunk = seeds[start : start + CHUNK]
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process that dies takes one chunk with it
            try:
                results = pool.apply_async(read_chunk, (images, chunk)).get(LIMIT_S * 10)
            except multiprocessing.TimeoutError:
                crashes.append(f"a process died or hung on the seeds {chunk[0]} to {chunk[-1]}")
                continue
        for number, (outcome, taken, seconds) in zip(chunk, results, strict=True):
            most_bytes, most_s = max(most_bytes, taken), max(most_s, seconds)
            outcomes[outcome] += 1
            crashes += [f"seed {number}: {outcome}"] if outcome not in ("read", "refused") else []
    print(
        f"\n{count} broken images from seed {seeds[0]} on: {dict(outcomes)}; crashes {len(crashes)}; at most "
        f"{most_bytes / 2**20:.0f} MiB and {most_s:.2f} s for one"
    )
    return crashes


def read_chunk(images: list[bytes], seeds: range) -> list[tuple[str, int, float]]:
    """Break and read an image for each seed: the outcome, the memory in bytes, and the time."""

    def end(*_: Any) -> None:
        raise TimeoutError(TOO_SLOW)

    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, end)
    results = []
    for seed in seeds:
        content = break_image(images, random.Random(seed))
        before, start, outcome = reset_peak(), time.perf_counter(), "read"
        signal.alarm(LIMIT_S)
        try:
            read_image(content)
        except ImageError as error:
            outcome = "slow" if TOO_SLOW in str(error) else "refused"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
        results.append((outcome, memory("VmHWM") - before, time.perf_counter() - start))
    return results


def break_image(images: list[bytes], chance: random.Random) -> bytes:
    """Break one of some images in one to eight places: bits, bytes, numbers, pieces, ends."""
    content = bytearray(chance.choice(images))
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        # The first bytes hold sizes and counts, and so most of what can be large.
        place = chance.randrange(chance.choice((64, len(content))) if len(content) > 64 else max(1, len(content)))
        way = chance.randrange(7)
        if way == 0:
            content[place : place + 1] = bytes([chance.randrange(256)])
        elif way == 1:
            content[place : place + 4] = chance.choice(
                (b"\xff" * 4, b"\x7f" + b"\xff" * 3, bytes(4), b"\xff\xff\xff\x7f")
            )
        elif way == 2:
            content[place : place + 2] = chance.randbytes(2)
        elif way == 3:
            del content[place : place + chance.choice((1, 4, 100))]
        elif way == 4:
            content[place:place] = content[place : place + chance.choice((1, 8, 200))]
        elif way == 5:
            del content[place:]
        else:
            other = chance.choice(images)
            content[place:place] = other[chance.randrange(len(other)) :][:200]
    return repair_checksums(content) if content[:4] == b"\x89PNG" else bytes(content)


def repair_checksums(content: bytearray) -> bytes:
    """Make the checksums of a PNG's chunks right again: with wrong ones nothing behind them would be reached."""
    start = 8
    while start + 12 <= len(content):
        end = start + 8 + int.from_bytes(content[start : start + 4], "big")
        if end + 4 > len(content):
            break
        content[end : end + 4] = zlib.crc32(content[start + 4 : end]).to_bytes(4, "big")
        start = end + 4
    return bytes(content)


def make_image(kind: str, mode: str, options: dict[str, Any], size: tuple[int, int]) -> bytes:
    """Encode an image of soft noise."""
    gray = Image.effect_noise((size[0] // 10 + 1, size[1] // 10 + 1), 60).resize(size, Image.Resampling.BILINEAR)
    image = Image.merge("RGBA", [gray] * 4) if mode in ("RGBA", "LA") else gray.convert("RGB")
    image = (
        gray.convert("I").point(lambda value: value * 257).convert("I;16") if mode == "I;16" else image.convert(mode)
    )
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def reset_peak() -> int:
    """Let the most memory that this process has had begin at what it has now; return that, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmHWM")


def memory(name: str) -> int:
    """Look up a line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


if __name__ == "__main__":
    typer.run(main)
