"""Does `clipmini serve` stay right, alive and small under 200 clients at once?

    python benchmarks/serving.py runs/demo/model

Starts the server in a process of its own, with its default limits. All clients send at the same moment: images of
4 MB (noise, so that they do not compress), as base64 in JSON or as they are; and among them, one in five, broken JSON,
a truncated image, a body over the limit, a decompression bomb, and an image of as many pixels as are allowed. Every
answer is compared with that of the handler run directly; a client that is told that the server is busy comes again.
Resident memory is Linux's own count.
"""

import base64
import contextlib
import http.client
import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import typer
from PIL import Image

LABELS = ["a dog on a beach", "two people", "a red car", "a bowl of soup", "noise"]
NUM_IMAGES = 8
IMAGE_BYTES = 4_000_000
TOLERANCE = 1e-5  # of a score: torch adds in another order with other numbers of threads
QUERY = "/?" + urlencode({"candidate_labels": LABELS}, doseq=True)


@dataclass(frozen=True)
class Call:
    """A request, and the answer that is right."""

    body: bytes
    status: int
    scores: dict[str, float] | None = None


def make_calls(model: str, count: int) -> list[Call]:
    """Make the requests: four in five are images of `IMAGE_BYTES`, the rest is meant to do harm."""
    from clipmini.inference.embed import load_model
    from clipmini.inference.server import Limits
    from modeling_clipmini.handler import MAX_PIXELS, RequestHandler

    handler = RequestHandler(load_model(model))

    def score(image: bytes) -> dict[str, float]:
        answer = handler({"inputs": image, "parameters": {"candidate_labels": LABELS}})
        return {item["label"]: item["score"] for item in answer}

    images = []
    for seed in range(NUM_IMAGES):
        image = noise(seed)
        scores = score(image)
        as_json = {
            "inputs": {"image": base64.b64encode(image).decode()},
            "parameters": {"candidate_labels": LABELS},
        }
        images += [Call(image, 200, scores), Call(json.dumps(as_json).encode(), 200, scores)]
    largest = encoded(Image.linear_gradient("L").resize((7000, MAX_PIXELS // 7000)).convert("RGB"))
    harmful = [
        Call(images[1].body[:-1], 400),
        Call(images[0].body[: IMAGE_BYTES // 2], 422),
        Call(b"x" * (Limits().max_body_bytes + 1), 413),
        Call(encoded(Image.new("RGB", (13_000, 13_000))), 413),  # 169 megapixels, 676 MB decoded
        Call(largest, 200, score(largest)),
    ]
    return [
        harmful[index // 5 % len(harmful)] if index % 5 == 4 else images[index % len(images)] for index in range(count)
    ]


def encoded(image: Image.Image) -> bytes:
    """Write a PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def noise(seed: int) -> bytes:
    """Make a JPEG of a little over `IMAGE_BYTES`."""
    generator = np.random.default_rng(seed)
    for width in range(1000, 10_000, 100):
        file = io.BytesIO()
        pixels = generator.integers(0, 256, (width * 3 // 4, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        if file.tell() >= IMAGE_BYTES:
            return file.getvalue()
    raise AssertionError


def send(host: str, port: int, call: Call) -> tuple[int, bool]:
    """Send a request until the server is not busy; say how often it was, and whether the answer is right."""
    num_busy = 0
    while True:
        connection = http.client.HTTPConnection(host, port, timeout=600)
        with contextlib.closing(connection):
            connection.request("POST", QUERY, call.body)
            response = connection.getresponse()
            status, answer = response.status, json.loads(response.read())
        if status != 503:
            return num_busy, is_right(call, status, answer)
        num_busy += 1
        time.sleep(int(response.headers["Retry-After"]))


def is_right(call: Call, status: int, answer: Any) -> bool:
    """Compare an answer with the one that is right."""
    if status != call.status:
        return False
    if call.scores is None:
        return set(answer) == {"error"}
    scores = {item["label"]: item["score"] for item in answer}
    return scores.keys() == call.scores.keys() and all(
        abs(score - call.scores[label]) < TOLERANCE for label, score in scores.items()
    )


def memory_mib(pid: int, field: str) -> float:
    """Read a process's resident memory: VmRSS, now, or VmHWM, the most since it was reset."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def main(
    model: Annotated[str, typer.Argument(help="A model folder.")],
    count: Annotated[int, typer.Option("--requests", help="Clients, all at once.")] = 200,
) -> None:
    """Start the server, send the requests, and tell what came of it."""
    calls = make_calls(model, count)
    command = [sys.executable, "-m", "clipmini.cli", "serve", model, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = next(word for word in server.stdout.readline().split() if word.startswith("http://"))
        host, port = str(urlsplit(url).hostname), int(urlsplit(url).port or 0)
        for call in calls[:4]:  # libraries set themselves up at the first calls
            send(host, port, call)
        before = memory_mib(server.pid, "VmRSS")
        Path(f"/proc/{server.pid}/clear_refs").write_text("5", encoding="utf-8")  # reset the peak
        barrier = threading.Barrier(count)

        def send_with_all(call: Call) -> tuple[int, bool]:
            barrier.wait()
            return send(host, port, call)

        start_s = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            results = list(pool.map(send_with_all, calls))
        seconds = time.perf_counter() - start_s
        peak, after = memory_mib(server.pid, "VmHWM"), memory_mib(server.pid, "VmRSS")
        lives = send(host, port, calls[0]) == (0, True)
        server.send_signal(signal.SIGINT)
        exit_code = server.wait(60)
    statuses = Counter(call.status for call in calls)
    megabytes = sum(len(call.body) for call in calls) / 1e6
    wrong = sum(not right for _, right in results)
    print(f"{count} clients, {megabytes:.0f} MB, in {seconds:.0f} s; expected {dict(sorted(statuses.items()))}")
    print(f"wrong answers: {wrong}; told to come again: {sum(busy for busy, _ in results)}")
    print(f"resident memory in MiB: before {before:.0f}, peak {peak:.0f}, after {after:.0f}")
    if wrong or not lives or exit_code != 0:
        sys.exit(f"failed: {wrong} wrong answers, lives: {lives}, exit code {exit_code}")


if __name__ == "__main__":
    typer.run(main)
