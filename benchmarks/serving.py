"""Does `clipmini serve` stay right, quick, alive and small, whatever its clients do?

    python benchmarks/serving.py runs/demo/model --seconds 600

Starts the server in a process of its own, with its default limits, and measures one thing after the other:

1. Requests a second of 1, 8 and 64 clients that send one request after the other, a text or a small image (JPEG, 640
   x 480).
2. Seconds that one such image takes alone, and beside 20 slow clients: half of them send a byte every half second,
   half of them half of their 1 MB and then as slowly. Who is turned away comes again.
3. All of 200 clients at the same moment: images of 4 MB (noise, so that they do not compress), as base64 in JSON or as
   they are; and among them, one in five, broken JSON, a truncated image, a body over the limit, a decompression bomb,
   and an image of as many pixels as are allowed.
4. The same mixture from 8 clients for `--seconds`, beside 8 that send texts, 4 slow ones and 2 that hang up.

Every answer is compared with that of the handler run directly; a client that is told that the server is busy comes
again. Resident memory is Linux's own count.
"""

import base64
import contextlib
import http.client
import io
import itertools
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
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
TEXTS = ["a dog on a beach", "two people sit at a table and look at a map of the city", "a red car", "soup"]
SLOW_BYTES = 1_000_000  # that a slow client promises
MEASURED_S = 15  # for each rate and each time


@dataclass(frozen=True)
class Call:
    """A request, and the answer that is right."""

    body: bytes
    status: int
    scores: dict[str, float] | None = None  # of labels
    vector: list[float] | None = None  # of a text


def make_calls(model: str, count: int) -> tuple[list[Call], list[Call], list[Call]]:
    """Make the requests: a mixture of which four in five are images of `IMAGE_BYTES`, small images, and texts."""
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
    mixture = [
        harmful[index // 5 % len(harmful)] if index % 5 == 4 else images[index % len(images)] for index in range(count)
    ]
    smooth = [Image.open(io.BytesIO(noise(seed, 2000))).resize((640, 480)) for seed in range(NUM_IMAGES)]
    small = [Call(body, 200, score(body)) for body in (encoded(image, "JPEG") for image in smooth)]
    texts = [Call(json.dumps({"inputs": text}).encode(), 200, vector=handler({"inputs": text})) for text in TEXTS]
    return mixture, small, texts


def encoded(image: Image.Image, name: str = "PNG") -> bytes:
    """Write an image."""
    file = io.BytesIO()
    image.save(file, name)
    return file.getvalue()


def noise(seed: int, num_bytes: int = IMAGE_BYTES) -> bytes:
    """Make a JPEG of at least so many bytes."""
    generator = np.random.default_rng(seed)
    for width in itertools.count(100, 100):
        file = io.BytesIO()
        pixels = generator.integers(0, 256, (width * 3 // 4, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        if file.tell() >= num_bytes:
            return file.getvalue()
    raise AssertionError


class Client:
    """Sends requests over one connection, which is made again when it is closed."""

    def __init__(self, host: str, port: int) -> None:
        self.connection = http.client.HTTPConnection(host, port, timeout=600)
        self.num_busy = 0

    def send(self, call: Call) -> bool:
        """Send a request until the server is not busy; return whether the answer is right."""
        while True:
            try:
                self.connection.request("POST", QUERY if call.vector is None else "/", call.body)
                response = self.connection.getresponse()
                status, answer = response.status, json.loads(response.read())
            except (http.client.RemoteDisconnected, ConnectionError):  # an idle connection that was just closed
                self.connection.close()
                continue
            if response.headers.get("Connection") == "close":
                self.connection.close()
            if status != 503:
                return is_right(call, status, answer)
            self.num_busy += 1
            time.sleep(int(response.headers["Retry-After"]))


class Load:
    """Clients in threads, each of which acts again and again until the end of a `with` block."""

    def __init__(self, address: tuple[str, int], actions: list[Callable[["Load"], None]]) -> None:
        self.address, self.done, self.num_wrong, self.num_right = address, threading.Event(), 0, 0
        self.threads = [threading.Thread(target=action, args=[self]) for action in actions]

    def __enter__(self) -> "Load":
        self.start_s = time.perf_counter()
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        for thread in self.threads:
            thread.join()
        self.seconds = time.perf_counter() - self.start_s


def good(calls: list[Call], seed: int) -> Callable[[Load], None]:
    """Make a client that sends requests and looks at the answers."""

    def act(load: Load) -> None:
        client, generator = Client(*load.address), random.Random(seed)
        while not load.done.is_set():
            if client.send(generator.choice(calls)):
                load.num_right += 1
            else:
                load.num_wrong += 1

    return act


def slow(num_first: int) -> Callable[[Load], None]:
    """Make a client that sends so many bytes of a body, and from there on one every half second."""

    def act(load: Load) -> None:
        while not load.done.is_set():
            with contextlib.suppress(OSError), socket.create_connection(load.address, timeout=60) as client:
                head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {SLOW_BYTES}\r\n\r\n"
                client.sendall(head.encode() + b"x" * num_first)
                client.settimeout(0.5)
                answer = b""
                while not load.done.is_set() and not answer:
                    client.sendall(b"x")
                    with contextlib.suppress(TimeoutError):
                        answer = client.recv(1000)
            load.done.wait(0.1)

    return act


def hang_up(calls: list[Call]) -> Callable[[Load], None]:
    """Make a client that sends half of a request, or all of it, and does not wait for the answer."""

    def act(load: Load) -> None:
        head = f"POST {QUERY} HTTP/1.1\r\nHost: x\r\nContent-Length: "
        for call, divisor in itertools.cycle(itertools.product(calls, (1, 2))):
            if load.done.wait(0.2):
                return
            with contextlib.suppress(OSError), socket.create_connection(load.address, timeout=60) as client:
                client.sendall(f"{head}{len(call.body)}\r\n\r\n".encode())
                client.sendall(call.body[: len(call.body) // divisor])

    return act


def is_right(call: Call, status: int, answer: Any) -> bool:
    """Compare an answer with the one that is right."""
    if status != call.status:
        return False
    if call.vector is not None:
        return bool(np.abs(np.subtract(answer, call.vector)).max() < TOLERANCE)
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


@contextlib.contextmanager
def serve(model: str) -> Iterator[tuple[tuple[str, int], subprocess.Popen[str]]]:
    """Start the server; yield its address and process."""
    command = [sys.executable, "-m", "clipmini.cli", "serve", model, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = next(word for word in server.stdout.readline().split() if word.startswith("http://"))
        try:
            yield (str(urlsplit(url).hostname), int(urlsplit(url).port or 0)), server
        finally:
            server.kill()


def time_requests(address: tuple[str, int], calls: list[Call], beside: list[Callable[[Load], None]]) -> str:
    """Time one client's requests while others act: their number, and seconds of the median and of one in a hundred."""
    client, seconds = Client(*address), []
    with Load(address, beside) as load:
        time.sleep(2 if beside else 0)  # until all of them are connected
        while time.perf_counter() < load.start_s + MEASURED_S:
            start_s = time.perf_counter()
            assert client.send(calls[len(seconds) % len(calls)])
            seconds.append(time.perf_counter() - start_s)
    return f"{len(seconds)} requests, p50 {np.quantile(seconds, 0.5):.3f} s, p99 {np.quantile(seconds, 0.99):.3f} s"


def main(
    model: Annotated[str, typer.Argument(help="A model folder.")],
    count: Annotated[int, typer.Option("--requests", help="Clients at the same moment.")] = 200,
    seconds: Annotated[float, typer.Option(help="How long the mixed load lasts.")] = 60,
) -> None:
    """Start the server, send the requests, and tell what came of it."""
    mixture, small, texts = make_calls(model, count)
    with serve(model) as (address, server):

        def memory(field: str = "VmRSS") -> str:
            return f"{memory_mib(server.pid, field):.0f}"

        for call in [*mixture[:4], *small, *texts]:  # libraries set themselves up at the first calls
            assert Client(*address).send(call)
        start = memory()
        Path(f"/proc/{server.pid}/clear_refs").write_text("5", encoding="utf-8")  # reset the peak
        for name, calls in (("texts", texts), ("images", small)):
            for num_clients in (1, 8, 64):
                with Load(address, [good(calls, seed) for seed in range(num_clients)]) as load:
                    time.sleep(MEASURED_S)
                rate = load.num_right / load.seconds
                print(f"{num_clients} clients: {rate:.1f} {name} a second, {load.num_wrong} wrong answers", flush=True)
        crowd = [slow(0), slow(SLOW_BYTES // 2)] * 10
        print(f"an image alone: {time_requests(address, small, [])}", flush=True)
        print(f"beside {len(crowd)} slow clients: {time_requests(address, small, crowd)}", flush=True)

        barrier, clients = threading.Barrier(count), [Client(*address) for _ in range(count)]

        def send_with_all(client: Client, call: Call) -> bool:
            barrier.wait()
            return client.send(call)

        start_s = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            num_wrong = list(pool.map(send_with_all, clients, mixture)).count(False)
        statuses = dict(sorted(Counter(call.status for call in mixture).items()))
        megabytes = sum(len(call.body) for call in mixture) / 1e6
        print(
            f"{count} at once, {megabytes:.0f} MB, in {time.perf_counter() - start_s:.0f} s; expected {statuses};",
            end=" ",
        )
        print(f"{num_wrong} wrong answers; told to come again: {sum(client.num_busy for client in clients)}")
        print(f"resident MiB: {start} at the start, {memory('VmHWM')} at the peak, {memory()} now", flush=True)

        Path(f"/proc/{server.pid}/clear_refs").write_text("5", encoding="utf-8")
        start = memory()
        actions = [*[good(mixture, seed) for seed in range(8)], *[good(texts, seed) for seed in range(8)]]
        actions += [slow(0), slow(SLOW_BYTES // 2), slow(SLOW_BYTES // 2), slow(100), *[hang_up(mixture[:8])] * 2]
        with Load(address, actions) as load:
            time.sleep(seconds)
        print(f"mixed load of {load.seconds:.0f} s: {load.num_right} right answers, {load.num_wrong} wrong;", end=" ")
        print(f"resident MiB: {start} at the start, {memory('VmHWM')} at the peak, {memory()} at the end")
        lives = Client(*address).send(small[0])
        server.send_signal(signal.SIGTERM)
        exit_code = server.wait(60)
    if num_wrong or load.num_wrong or not lives or exit_code != 0:
        sys.exit(f"failed: {num_wrong + load.num_wrong} wrong answers, lives: {lives}, exit code {exit_code}")


if __name__ == "__main__":
    typer.run(main)
