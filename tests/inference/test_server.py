"""The server over real sockets: good requests, malformed ones, and too many or too large ones."""

import asyncio
import contextlib
import gzip
import http.client
import io
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub.constants
import pytest
import yaml
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from typer.testing import CliRunner

from clipmini import cli
from clipmini.inference import server
from clipmini.inference.embed import load_model
from clipmini.inference.server import FREE_BYTES, Limits, bind, create_app, make_server
from modeling_clipmini.handler import PARAMETERS, RequestHandler
from serving import serve_command

LARGE = "a" * (FREE_BYTES + 100_000)  # so that the body needs a slot
LABELS = ["a red square", "a blue disc", "nothing at all"]


@contextlib.contextmanager
def serving(handler, **limits):
    """Serve from a thread; yield the address and the server."""
    sock = bind("127.0.0.1", 0)
    sock.listen()
    running = make_server(create_app(handler, Limits(**limits)))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield sock.getsockname(), running
    finally:
        running.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def ask(address, body, path="/", method="POST", timeout=30, **options):
    """Send one request; return status, JSON and headers of the response."""
    connection = http.client.HTTPConnection(*address, timeout=timeout)
    with contextlib.closing(connection):
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body).encode(), **options)
        response = connection.getresponse()
        assert response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(response.read()), response.headers


def connect_until_refused(address):
    while True:
        socket.create_connection(address, timeout=30).close()
        time.sleep(0.01)


def send_bytes_until_refused(client):
    while True:
        client.sendall(b"P")
        time.sleep(0.1)


class Gate:
    """A handler that answers once `open` is set."""

    def __init__(self):
        self.entered, self.open = threading.Semaphore(0), threading.Event()

    def __call__(self, data):
        self.entered.release()
        assert self.open.wait(30)
        return [data["inputs"]]

    def wait_entered(self):
        assert self.entered.acquire(timeout=30)


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open.set()


def png(size=(60, 40), color="red"):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def handler(tiny_folder):
    return RequestHandler(load_model(tiny_folder))


@pytest.fixture(scope="module")
def address(handler):
    with serving(handler) as (address, _):
        yield address


@pytest.fixture
def url(address, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # so that the client reaches this machine
    return "http://{}:{}".format(*address)


class TestInferenceClient:
    @pytest.mark.parametrize("form", ["bytes", "path", "name"])
    def test_classifies(self, handler, url, form, tmp_path):
        path = tmp_path / "red.png"
        path.write_bytes(png())
        image = {"bytes": png(), "path": path, "name": str(path)}[form]
        client = InferenceClient(base_url=url) if form == "bytes" else InferenceClient(model=url)
        answer = client.zero_shot_image_classification(image, LABELS, hypothesis_template="a photo of {}")
        parameters = {"candidate_labels": LABELS, "hypothesis_template": "a photo of {}"}
        expected = handler({"inputs": png(), "parameters": parameters})
        assert [(item.label, item.score) for item in answer] == [(item["label"], item["score"]) for item in expected]

    def test_embeds_texts(self, handler, url):
        client = InferenceClient(model=url)
        assert client.feature_extraction("a fish").tolist() == pytest.approx(handler({"inputs": "a fish"}), abs=1e-6)
        vectors = client.feature_extraction(["a fish", "a dog"], normalize=True, dimensions=5, truncate=True)
        assert vectors.shape == (2, 5)

    def test_gets_the_error_message(self, url):
        client = InferenceClient(model=url)
        with pytest.raises(HfHubHTTPError, match="given twice") as caught:
            client.zero_shot_image_classification(png(), ["a", "a"])
        assert caught.value.response.status_code == 422


class TestRequests:
    def test_bytes_of_an_image(self, handler, address):
        status, answer, _ = ask(address, png(), "/?candidate_labels=a%20fish,dog&hypothesis_template=%7B%7D")
        parameters = {"candidate_labels": ["a fish", "dog"], "hypothesis_template": "{}"}
        assert (status, answer) == (200, handler({"inputs": png(), "parameters": parameters}))
        repeated = "/?candidate_labels=a%20fish&candidate_labels=dog&hypothesis_template=%7B%7D"
        options = {"headers": {"Content-Type": "application/x-www-form-urlencoded"}}  # as curl sends
        assert ask(address, png(), repeated, **options)[1] == answer

    def test_features_with_parameters_in_the_query(self, address):
        whole = ask(address, png(), "/?task=feature-extraction&normalize=false")[1]
        assert ask(address, png(), "/pipeline/feature-extraction?normalize=false&truncate_dim=3")[1] == whole[:3]

    @pytest.mark.parametrize("path", ["/models/org/name", "/models/name/pipeline/{task}", "/pipeline/{task}"])
    def test_paths_of_the_hub(self, handler, address, path):
        body = {"inputs": "a fish", "normalize": False}
        assert ask(address, body, path.format(task="feature-extraction"))[:2] == (200, handler(body))

    def test_health(self, address):
        assert ask(address, b"", "/health", "GET")[:2] == (200, {"status": "ok", "waiting": 0})

    def test_many_at_once(self, handler, address):
        colors = [(40 * red, 40 * green, 90) for red in range(6) for green in range(6)]
        with ThreadPoolExecutor(36) as pool:
            answers = list(pool.map(lambda color: ask(address, png(color=color), "/?candidate_labels=a,b"), colors))
        parameters = {"candidate_labels": ["a", "b"]}
        for color, (status, answer, _) in zip(colors, answers, strict=True):
            expected = handler({"inputs": png(color=color), "parameters": parameters})
            assert status == 200
            assert [item["label"] for item in answer] == [item["label"] for item in expected]
            assert [item["score"] for item in answer] == pytest.approx([item["score"] for item in expected], abs=1e-5)


MALFORMED = [
    (b"", 422, "is empty"),
    (b"{", 400, "not JSON"),
    (b'{"inputs": "a",}', 400, "not JSON"),
    (b'{"inputs": "\xff"}', 400, "not JSON"),
    (b'{"inputs": {"image": ""}, "parameters": {"candidate_labels": ["\\ud800"]}}', 422, "UTF-8"),
    (b'{"inputs": NaN}', 422, "nan is not an image"),
    (b'{"inputs": ' + b"[" * 100_000, 400, "not JSON"),
    (b'{"inputs": ' + b"9" * 5000 + b"}", 400, "not JSON"),
    (b'{"parameters": []}', 422, "no inputs"),
    (b"{}", 422, "no inputs"),
    (b"\x00" * 1000, 422, "is not an image"),
    (b"--boundary\r\nContent-Disposition: form-data", 422, "is not an image"),
]


class TestErrors:
    @pytest.mark.parametrize(("body", "status", "words"), MALFORMED, ids=range(len(MALFORMED)))
    def test_malformed_bodies(self, address, body, status, words):
        answered_status, answer, _ = ask(address, body, "/?candidate_labels=a,b")
        assert (answered_status, set(answer)) == (status, {"error"})
        assert words in answer["error"]

    @pytest.mark.parametrize("body", [b"", b"[]", b"3"])
    def test_a_body_declared_as_json_must_be_json(self, address, body):
        status, answer, _ = ask(address, body, headers={"Content-Type": "application/json"})
        assert status in (400, 422)
        assert "JSON" in answer["error"]

    def test_compressed_bodies(self, address):
        for body in (gzip.compress(b'{"inputs": "a"}'), b"no gzip"):
            status, answer, _ = ask(address, body, headers={"Content-Encoding": "gzip"})
            assert (status, "'gzip'" in answer["error"]) == (415, True)

    def test_paths_and_methods(self, address):
        assert ask(address, b"", "/none")[:2] == (404, {"error": "Not Found"})
        status, answer, headers = ask(address, b"", "/", "GET")
        assert (status, answer, headers["Allow"]) == (405, {"error": "Method Not Allowed"}, "POST")
        assert ask(address, b"", "/health")[0] == 405
        assert ask(address, {"inputs": "a"}, "/pipeline/text-generation")[0] == 422

    def test_decompression_bombs(self, address):
        file = io.BytesIO()
        Image.new("1", (7100, 7100)).save(file, "PNG")
        assert ask(address, file.getvalue(), "/?candidate_labels=a,b")[0] == 413

    def test_many_commas(self, address, monkeypatch):
        monkeypatch.setattr(server, "MAX_COMMAS", 3)
        assert ask(address, {"inputs": ["a", "b", "c", "d"]})[0] == 200
        status, answer, _ = ask(address, {"inputs": [[], [], [], [], []]})
        assert (status, "commas" in answer["error"]) == (413, True)

    def test_a_bug_is_not_revealed(self):
        def fail(data):
            if data["inputs"] == "nan":
                return [float("nan")]
            raise RuntimeError("secret")

        with serving(fail) as (address, _):
            for text in ("secret", "nan"):
                status, answer, _ = ask(address, {"inputs": text})
                assert (status, answer) == (500, {"error": "The server failed; its log says why."})

    def test_bad_limits(self):
        with pytest.raises(ValueError, match="num_workers=0 is not allowed"):
            Limits(num_workers=0)


class TestLimits:
    def test_large_bodies(self, gate):
        gate.open.set()
        with serving(gate, max_body_bytes=1000) as (address, _):
            fits = {"inputs": "a" * (1000 - len('{"inputs": ""}'))}
            assert ask(address, fits)[0] == 200
            for body in (b"{" * 1001, b"x" * 5_000_000):
                status, answer, _ = ask(address, body)
                assert (status, "limit of 1000 bytes" in answer["error"]) == (413, True)

            def chunks():
                for _ in range(50):
                    yield b"x" * 100_000

            connection = http.client.HTTPConnection(*address, timeout=30)  # no Content-Length
            with contextlib.closing(connection):
                connection.request("POST", "/", chunks(), {"Transfer-Encoding": "chunked"}, encode_chunked=True)
                assert connection.getresponse().status == 413
            assert ask(address, fits)[0] == 200

    def test_slow_uploads(self, gate):
        gate.open.set()
        with serving(gate, upload_timeout_s=0.3, max_active=1) as (address, _):
            with socket.create_connection(address, timeout=30) as slow:
                slow.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
                answer = slow.makefile("rb").read()  # until the server closes the connection
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b'{"error":"The body took too long; 0.3 seconds are allowed' in answer
            assert ask(address, {"inputs": "a"})[0] == 200

    def test_slow_uploads_hold_nothing_that_others_need(self, gate, monkeypatch):
        """Neither those that send little, nor those that stall once they have a slot."""
        monkeypatch.setattr(server, "STALL_S", 0.1)
        monkeypatch.setattr(server, "PATIENCE_S", 0.05)
        gate.open.set()
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n"
        with serving(gate, max_active=2) as (address, _), contextlib.ExitStack() as open_sockets:
            stalled = []
            for index in range(40):
                slow = open_sockets.enter_context(socket.create_connection(address, timeout=30))
                slow.sendall(head + b"{" * (1 if index % 2 else 2 * FREE_BYTES))
                stalled += [] if index % 2 else [slow]
            for text, limit_s in (("small", 2), (LARGE, 20)):
                start_s = time.monotonic()
                assert ask(address, {"inputs": text})[:2] == (200, [text])
                assert time.monotonic() - start_s < limit_s
            assert stalled[0].recv(1000).startswith(b"HTTP/1.1 503 ")

    def test_one_that_expires_while_another_looks_for_the_slowest(self, gate):
        async def wait_for_a_slot():
            service = server._Service(gate, Limits(max_active=1))
            await service.slots.acquire()
            upload = asyncio.timeout(0)
            service.uploads[upload] = 0
            waiting = asyncio.create_task(service._acquire_slot())
            with contextlib.suppress(TimeoutError):
                async with upload:
                    await asyncio.sleep(1)
            await asyncio.sleep(2 * server.PATIENCE_S)
            service.slots.release()
            await waiting

        asyncio.run(wait_for_a_slot())

    def test_uploads_that_only_wait_are_not_slow(self, gate):
        with serving(gate, max_active=1) as (address, _), ThreadPoolExecutor(2) as pool:
            first = pool.submit(ask, address, {"inputs": LARGE})
            gate.wait_entered()
            second = pool.submit(ask, address, {"inputs": LARGE})
            time.sleep(1.5)
            gate.open.set()
            assert (first.result(30)[0], second.result(30)[0]) == (200, 200)

    def test_clients_that_disconnect(self, gate):
        gate.open.set()
        with serving(gate, max_active=1) as (address, _):
            for _ in range(3):
                with socket.create_connection(address, timeout=30) as leaving:
                    leaving.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert ask(address, {"inputs": "a"})[0] == 200

    def test_a_full_queue(self, gate):
        with serving(gate, max_active=1, max_waiting=1) as (address, _), ThreadPoolExecutor(2) as pool:
            first = pool.submit(ask, address, {"inputs": "first"})
            gate.wait_entered()
            second = pool.submit(ask, address, {"inputs": "second"})
            while ask(address, b"", "/health", "GET")[1]["waiting"] == 0:
                time.sleep(0.01)
            status, answer, headers = ask(address, {"inputs": "third"})
            assert (status, headers["Retry-After"], "busy" in answer["error"]) == (503, "1", True)
            gate.open.set()
            assert first.result(30)[:2] == (200, ["first"])
            assert second.result(30)[:2] == (200, ["second"])

    def test_a_long_queue(self, gate):
        with serving(gate, max_active=1, upload_timeout_s=0.3) as (address, _), ThreadPoolExecutor(1) as pool:
            first = pool.submit(ask, address, {"inputs": LARGE})
            gate.wait_entered()
            assert ask(address, {"inputs": LARGE})[0] == 503
            gate.open.set()
            assert first.result(30)[0] == 200

    def test_long_answers(self, gate):
        limits = {"max_active": 1, "compute_timeout_s": 0.3}
        with serving(gate, **limits) as (address, _):
            status, answer, _ = ask(address, {"inputs": "first"})
            assert (status, answer) == (504, {"error": "The answer took more than 0.3 seconds."})
            assert ask(address, {"inputs": "never begun"})[0] == 504
            assert ask(address, b"", "/health", "GET")[0] == 200
            gate.open.set()
            assert ask(address, {"inputs": "third"})[:2] == (200, ["third"])
            assert gate.entered._value == 2

    def test_a_stopping_server_answers_open_requests(self, gate):
        with serving(gate) as (address, running), ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, address, {"inputs": "last"})
            gate.wait_entered()
            running.should_exit = True
            with pytest.raises(ConnectionRefusedError):
                connect_until_refused(address)
            gate.open.set()
            assert answer.result(30)[:2] == (200, ["last"])


class TestBatches:
    @pytest.fixture
    def model(self, handler, monkeypatch):
        """A model of which one worker's first text waits until the others' have come; it notes its batches."""
        run, sizes, entered, go_on = handler.model.get_text_features, [], threading.Event(), threading.Event()

        def run_and_note(**inputs):
            sizes.append(len(inputs["input_ids"]))
            entered.set()
            assert go_on.wait(30)
            if (inputs["input_ids"] == handler.processor.tokenizer.convert_tokens_to_ids("fails")).any():
                raise RuntimeError("no memory")
            return run(**inputs)

        monkeypatch.setattr(handler.model, "get_text_features", run_and_note)
        return sizes, entered, go_on

    def test_texts_of_several_requests_are_embedded_at_once(self, handler, model):
        sizes, entered, go_on = model
        texts = [f"number {index} of {'very ' * index}many" for index in range(7)]
        go_on.set()
        expected = [handler({"inputs": text}) for text in texts]
        sizes.clear()
        entered.clear()
        go_on.clear()
        requests = [{"inputs": text} for text in texts]
        bad = [{"inputs": ""}, {"inputs": ["a", 3]}, {"inputs": png(), "parameters": {"candidate_labels": ["a", "a"]}}]
        with serving(RequestHandler(handler.model, num_workers=1)) as (address, _), ThreadPoolExecutor(10) as pool:
            first = pool.submit(ask, address, {"inputs": "first"})
            assert entered.wait(30)
            good = [pool.submit(ask, address, request) for request in requests]
            assert [ask(address, request)[0] if index < 2 else 422 for index, request in enumerate(bad)] == [422] * 3
            time.sleep(0.3)  # until the good ones wait
            go_on.set()
            answers = [future.result(30) for future in good]
            assert first.result(30)[0] == 200
        assert sizes == [1, 7]
        for (status, vector, _), right in zip(answers, expected, strict=True):
            assert status == 200
            assert vector == pytest.approx(right, abs=1e-5)


class TestConnections:
    def test_without_a_request_they_are_closed(self, gate, monkeypatch):
        monkeypatch.setattr(server, "IDLE_S", 0.5)
        gate.open.set()
        with serving(gate) as (address, _):
            silent, dribbling, kept = (socket.create_connection(address, timeout=30) for _ in range(3))
            with silent, dribbling, kept:
                body = b'{"inputs": "a"}'
                kept.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                answer = b""
                while not answer.endswith(b'["a"]'):
                    answer += kept.recv(1000)
                kept.sendall(b"P")  # the next request, of which no more comes
                assert silent.recv(1000) == b""
                with pytest.raises(ConnectionError):
                    send_bytes_until_refused(dribbling)
                with contextlib.suppress(ConnectionResetError):
                    assert kept.recv(1000) == b""

    def test_answers_that_are_not_read_end_them(self, gate, monkeypatch):
        monkeypatch.setattr(server, "IDLE_S", 0.5)
        gate.open.set()
        with serving(gate) as (address, running), socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(address)
            client.settimeout(0.2)
            with contextlib.suppress(TimeoutError, ConnectionError):
                while True:  # until neither side takes any more
                    client.sendall(b"GET /docs HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
            for _ in range(50):
                time.sleep(0.1)
                if not running.server_state.connections:
                    break
            assert not running.server_state.connections

    def test_the_quietest_gives_way_when_there_are_too_many(self, gate, monkeypatch):
        monkeypatch.setattr(server, "MAX_CONNECTIONS", 6)  # five, and one that is being made
        with serving(gate) as (address, _), ThreadPoolExecutor(4) as pool, contextlib.ExitStack() as stack:
            answers = [pool.submit(ask, address, {"inputs": str(index)}) for index in range(4)]
            for _ in answers:
                gate.wait_entered()
            for _ in range(300):
                stack.enter_context(socket.create_connection(address, timeout=30))
            assert ask(address, b"", "/health", "GET")[0] == 200
            gate.open.set()
            assert [answer.result(30)[1] for answer in answers] == [["0"], ["1"], ["2"], ["3"]]


class TestReports:
    def test_metrics(self, gate):
        gate.open.set()
        with serving(gate) as (address, _):
            assert ask(address, {"inputs": "a"})[0] == 200
            assert ask(address, b"{")[0] == 400
            assert ask(address, {}, "/models/x%22%7Dy")[0] == 500  # the stub's own error
            connection = http.client.HTTPConnection(*address, timeout=30)
            with contextlib.closing(connection):
                connection.request("GET", "/metrics")
                response = connection.getresponse()
                text = response.read().decode()
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        for line in (
            'clipmini_answers_total{status="200"} 1.0',
            'clipmini_answers_total{status="400"} 1.0',
            'clipmini_answers_total{status="500"} 1.0',
            "clipmini_requests_in_flight 0.0",
            "clipmini_request_seconds_count 3.0",
        ):
            assert line in text.splitlines()

    def test_documentation(self, address):
        connection = http.client.HTTPConnection(*address, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/docs")
            response = connection.getresponse()
            text = response.read().decode()
        assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
        schema = yaml.safe_load(text)
        routes = create_app(print).routes
        assert {route.path.replace(":path", "") for route in routes} == set(schema["paths"])
        assert schema["components"]["schemas"]["Task"]["enum"] == list(PARAMETERS)
        documented = schema["components"]["schemas"]["Parameters"]["properties"]
        assert set(documented) == {"task", *itertools.chain.from_iterable(PARAMETERS.values())}


class TestCommand:
    def test_serves_until_ctrl_c(self, handler, tiny_folder, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        with serve_command(tiny_folder) as (url, process):
            answer = InferenceClient(base_url=url).zero_shot_image_classification(png(), LABELS)
            expected = handler({"inputs": png(), "parameters": {"candidate_labels": LABELS}})
            assert [item.label for item in answer] == [item["label"] for item in expected]
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=60)
            assert (process.returncode, rest, errors) == (0, "", "")

    @pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
    def test_stopping_cuts_no_request(self, handler, tiny_folder, stop):
        """Neither one that is computed, nor one that has begun to arrive; idle connections do not delay the end."""
        expected = handler({"inputs": "a fish"})
        body = b'{"inputs": "a fish"}'
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        with serve_command(tiny_folder) as (url, process), contextlib.ExitStack() as stack:
            address = ("127.0.0.1", int(url.rpartition(":")[2]))
            assert ask(address, {"inputs": "a fish"})[0] == 200
            whole, half, begun, _ = (
                [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(16)]
                for _ in range(4)
            )
            for client in half:
                client.sendall(head + body[:5])
            for client in begun:
                client.sendall(head[:20])
            for client in whole:
                client.sendall(head + body)
            process.send_signal(stop)
            start_s = time.monotonic()
            for client in begun:
                client.sendall(head[20:] + body)
            time.sleep(1)
            for client in half:
                client.sendall(body[5:])
            for client in whole + half + begun:
                answer = client.makefile("rb").read()
                assert answer.startswith(b"HTTP/1.1 200 ")
                assert json.loads(answer.partition(b"\r\n\r\n")[2]) == pytest.approx(expected, abs=1e-5)
            assert process.wait(30) == 0
            assert time.monotonic() - start_s < 8
            assert process.stderr.read() == ""

    @pytest.mark.skipif(sys.platform == "win32", reason="files are not limited")
    def test_more_idle_connections_than_files(self, tiny_folder):
        # A GPU's driver alone holds open more files than are left here.
        program = (
            f"ulimit -n 120; CUDA_VISIBLE_DEVICES= exec {sys.executable} -m clipmini.cli serve {tiny_folder} --port 0"
        )
        with subprocess.Popen(
            ["sh", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            address = ("127.0.0.1", int(process.stdout.readline().split(" until")[0].rpartition(":")[2]))
            try:
                with contextlib.ExitStack() as stack:
                    for _ in range(300):
                        stack.enter_context(socket.create_connection(address, timeout=30))
                    assert ask(address, {"inputs": "a fish"})[0] == 200
            finally:
                process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["{folder}", "--port", "{port}"], ["127.0.0.1 port {port}", "in use", "--port"]),
            (["{folder}", "--host", "256.0.0.1"], ["256.0.0.1"]),
            (["{folder}", "--port", "70000"], ["--port"]),
            (["{folder}", "--workers", "0"], ["num_workers=0"]),
            (["{folder}/none", "--port", "0"], ["none does not exist"]),
        ],
    )
    def test_bad_input(self, tiny_folder, options, words):
        with bind("127.0.0.1", 0) as taken:
            taken.listen()
            values = {"folder": tiny_folder, "port": taken.getsockname()[1]}
            arguments = ["serve", *(option.format(**values) for option in options)]
            result = CliRunner().invoke(cli.app, arguments, prog_name="clipmini")
        assert (result.exit_code, result.stdout) == (2, "")
        for word in words:
            assert word.format(**values) in result.stderr.splitlines()[-1]

    def test_without_the_extra(self, tiny_folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "uvicorn", None)
        monkeypatch.delitem(sys.modules, "clipmini.inference.server")
        result = CliRunner().invoke(cli.app, ["serve", str(tiny_folder)])
        assert result.exit_code == 2
        assert result.stderr == "error: serve needs uvicorn, which is not installed: pip install 'clipmini[serve]'.\n"
