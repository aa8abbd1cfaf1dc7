"""Serve a model over HTTP to Hugging Face's clients, with limits on the size, number and time of their requests.

The event loop only moves bytes; the model runs in threads. Memory holds at most `max_active` bodies of the largest
size, and 0.6 MiB for each of at most `MAX_CONNECTIONS` connections: `FREE_BYTES` and uvicorn's own buffer.
"""

import asyncio
import contextlib
import functools
import json
import signal
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from modeling_clipmini.handler import RequestError

MAX_COMMAS = 1_000_000  # in a JSON body: 16 MiB of "[]," would become 400 MiB of lists
FREE_BYTES = 2**18  # of a body that may arrive without a slot
MAX_CONNECTIONS = 1024  # or fewer, where the system allows fewer open files
SPARE_FILES = 768  # for other files, and for connections that are accepted but not counted yet
IDLE_S = 30  # for the head of a request to arrive, and for an answer to be read
STALL_S = 1  # that an upload with a slot may send nothing before it counts as slow
PATIENCE_S = 0.25  # that an upload waits for a slot before the slowest one is turned away
LINGER_S = 0.25  # that a stopping server waits for requests on their way
SHUTDOWN_S = 10  # for open requests to be answered; a thread cannot be stopped, so the model finishes its work anyway


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Args:
        max_body_bytes: bytes in the body of a request, else status 413; base64 makes an image a third larger.
        max_active: requests that are answered at the same time, and slots for bodies over `FREE_BYTES`, which are held
            from there to the answer.
        max_waiting: requests that have arrived and wait to become active; any further one gets status 503.
        num_workers: what the handler computes at the same time; each worker has its share of torch's threads.
        upload_timeout_s: seconds that a body may take to arrive, else status 408, or 503 if it waited for a slot. When
            others wait for a slot, uploads too slow for the largest body in this time get status 503 at once.
        compute_timeout_s: seconds from the arrival of the body to the answer, else status 504.

    Raises:
        ValueError: a limit is not positive.
    """

    max_body_bytes: int = 16 * 2**20
    max_active: int = 16
    max_waiting: int = 256
    num_workers: int = 2
    upload_timeout_s: float = 60
    compute_timeout_s: float = 60

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"{field.name}={value} is not allowed; use a number above 0.")


def create_app(handler: Callable[[Any], Any], limits: Limits | None = None) -> Starlette:
    """Create the ASGI app of a model.

    Requests are POSTed to `/`, or to the paths that clients know from the Hub: `/models/NAME` and `/pipeline/TASK`,
    which also sets the task. A body is JSON, or the bytes of an image with the parameters in the query string. GET
    `/health`, `/metrics` (for Prometheus) and `/docs` (in OpenAPI) answer even while the server is busy. Every error
    is JSON, `{"error": ...}`, except for requests that are not valid HTTP.

    Args:
        handler: answers one request, in a worker thread; its `RequestError`s are sent to the client.
        limits: by default `Limits()`.

    Returns:
        The app, for any ASGI server.
    """
    service = _Service(handler, limits or Limits())
    # As text, which browsers show; YAML they would save to a file.
    documentation = PlainTextResponse(Path(__file__).with_name("openapi.yaml").read_text(encoding="utf-8"))
    paths = ("/", "/pipeline/{task}", "/models/{name:path}/pipeline/{task}", "/models/{name:path}")
    return Starlette(
        routes=[
            Route("/health", service.report_health, methods=["GET"]),
            Route("/metrics", service.report_metrics, methods=["GET"]),
            Route("/docs", documentation, methods=["GET"]),
            *(Route(path, service.infer, methods=["POST"]) for path in paths),
        ],
        exception_handlers={
            RequestError: service.answer_error,
            HTTPException: service.answer_error,
            Exception: service.answer_bug,
        },
        lifespan=service.lifespan,
    )


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket; before the model is loaded, so that an address in use is reported at once.

    Args:
        host: a name or address of this machine.
        port: 0 for any free port.

    Returns:
        The bound socket, not listening yet.

    Raises:
        ValueError: the address cannot be bound.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a restart fails for a minute
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ValueError(f"Cannot listen at {host} port {port}: {error.strerror}. Choose another --port.") from None
    return sock


def make_server(app: ASGIApp) -> "_Server":
    """Create a uvicorn server that logs errors alone and keeps its connections below the limit of open files.

    Args:
        app: from `create_app`.

    Returns:
        The server. When told to stop, it goes on answering open requests for at most `SHUTDOWN_S` seconds.
    """
    num_files = MAX_CONNECTIONS + SPARE_FILES
    with contextlib.suppress(ModuleNotFoundError):  # on Windows, where files are not limited
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        num_files = max(soft, min(hard, num_files))
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, hard))
    num_spare = min(SPARE_FILES, num_files // 2)
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=_Connection,
        ws="none",
        lifespan="on",
        log_config=None,  # to the handlers that are there: the command's escapes what clients send
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=min(MAX_CONNECTIONS, num_files - num_spare),
        backlog=num_spare // 8,  # asyncio accepts as many in a round; one that gives way is closed four rounds later
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return _Server(config)


def run(app: ASGIApp, sock: socket.socket, on_stop: Callable[[], Any] = lambda: None) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        app: from `create_app`.
        sock: from `bind`.
        on_stop: called then, to end connections that would stay open.
    """
    server = make_server(app)
    server.on_stop = on_stop
    # After an orderly shutdown uvicorn raises the signal again, for whoever had handled it before.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[sock])


class _Server(uvicorn.Server):
    on_stop: Callable[[], Any]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or []:
            sock.listen(socket.SOMAXCONN)  # more may wait than asyncio accepts in a round, else Linux drops some

    async def on_tick(self, counter: int) -> bool:
        """Close connections without a request; uvicorn closes only those that are silent after an answer."""
        for connection in list(self.server_state.connections):
            assert isinstance(connection, _Connection)
            connection.close_if_late()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, answer what has been or is being sent over open connections, and close them."""
        if hasattr(self, "on_stop"):
            self.on_stop()
        for sock in sockets or []:
            asyncio.get_running_loop().remove_reader(sock)
        await asyncio.sleep(0.01)  # closing a listener drops connections that asyncio has accepted but not set up
        for server in self.servers:
            server.close()
        self.server_state.default_headers.append((b"connection", b"close"))
        await asyncio.sleep(LINGER_S)
        await super().shutdown(sockets)


class _Connection(H11Protocol):
    """A connection that closes without a request, and makes the quietest one give way when there are too many."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.heard_s = self.loop.time()  # when it was made, last answered, or last sent a part of a body
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            others: Any = [other for other in self.connections if not other.transport.is_closing()]
            quiet = [other for other in others if not other.has_request or other.cycle.more_body]
            min(quiet, key=lambda other: other.heard_s).transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.has_request:
            self.heard_s = self.loop.time()

    def on_response_complete(self) -> None:
        self.heard_s = self.loop.time()
        super().on_response_complete()

    @property
    def has_request(self) -> bool:
        """Whether the head of a request has arrived and its answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def close_if_late(self) -> None:
        is_clients_turn = not self.has_request or self.flow.write_paused  # to read, before the next answer
        if is_clients_turn and self.loop.time() > self.heard_s + IDLE_S:
            self.transport.abort()


class _Service:
    """The route functions of one model, with the state that its requests share."""

    def __init__(self, handler: Callable[[Any], Any], limits: Limits) -> None:
        self.handler, self.limits = handler, limits
        self.registry = CollectorRegistry()  # not the process's, which may hold several apps
        self.answers = Counter("clipmini_answers", "Answers by status.", ["status"], registry=self.registry)
        self.in_flight = Gauge("clipmini_requests_in_flight", "Requests without an answer.", registry=self.registry)
        self.seconds = Histogram("clipmini_request_seconds", "From head to answer.", registry=self.registry)
        self.slots = asyncio.Semaphore(limits.max_active)
        self.uploads: dict[asyncio.Timeout, float] = {}  # those with slots, and when each will be slow
        self.num_unanswered = 0  # of those that have arrived
        # Workers with all of torch's threads each would compete for the same cores.
        num_threads = max(1, torch.get_num_threads() // limits.num_workers)
        self.threads = ThreadPoolExecutor(
            limits.max_active, "inference", initializer=torch.set_num_threads, initargs=(num_threads,)
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self.threads.shutdown(wait=False, cancel_futures=True)

    async def report_health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": max(0, self.num_unanswered - self.limits.max_active)})

    async def report_metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    async def answer_error(self, request: Request, error: Exception) -> Response:
        error.__traceback__ = None  # its frames hold the body and the image, and may hold the error in a cycle
        if isinstance(error, HTTPException):
            return self._count(JSONResponse({"error": error.detail}, error.status_code, error.headers))
        assert isinstance(error, RequestError)
        return self._count(JSONResponse({"error": str(error)}, error.status))

    async def answer_bug(self, request: Request, error: Exception) -> Response:
        """Hide the error from the client; uvicorn logs its traceback."""
        return self._count(JSONResponse({"error": "The server failed; its log says why."}, 500))

    def _count(self, response: Response) -> Response:
        self.answers.labels(response.status_code).inc()
        return response

    async def infer(self, request: Request) -> Response:
        with self.in_flight.track_inprogress(), self.seconds.time():
            return self._count(Response(await self._infer(request), media_type="application/json"))

    async def _infer(self, request: Request) -> bytes:
        slot = contextlib.ExitStack()  # empty for a small body
        try:
            body = [await self._read_body(request, slot)]
            if self.num_unanswered >= self.limits.max_active + self.limits.max_waiting:
                raise _busy()
            work = self.threads.submit(self._compute, request, body)
        except BaseException:
            slot.close()
            raise
        self.num_unanswered += 1
        answer = asyncio.wrap_future(work)
        answer.add_done_callback(functools.partial(self._end, slot))
        limit = self.limits.compute_timeout_s
        try:
            async with asyncio.timeout(limit):
                return await asyncio.shield(answer)
        except TimeoutError:
            # A thread cannot be stopped, so running work keeps its slot to the end. Work that has not begun is
            # canceled, which releases the slot; its body must not stay in the threads' queue.
            if work.cancel():
                body.clear()
            raise HTTPException(504, f"The answer took more than {limit:g} seconds.") from None
        finally:
            del answer, work  # an exception in them refers to this frame, which would keep them and the body alive

    def _end(self, slot: contextlib.ExitStack, answer: "asyncio.Future[bytes]") -> None:
        slot.close()
        self.num_unanswered -= 1
        if not answer.cancelled():
            answer.exception()  # mark it as retrieved, or asyncio would log it where the request has timed out

    async def _read_body(self, request: Request, slot: contextlib.ExitStack) -> bytearray:
        limit, timeout_s = self.limits.max_body_bytes, self.limits.upload_timeout_s
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise RequestError(f"The content encoding {encoding[:20]!r} is not supported; send it plain.", 415)
        if int(request.headers.get("content-length", 0)) > limit:
            raise _too_large(limit)
        body, timer, now_s = bytearray(), asyncio.timeout(timeout_s), asyncio.get_running_loop().time
        try:
            async with timer:
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:  # uvicorn reads and drops the rest, so that the client receives the answer
                        raise _too_large(limit)
                    if timer in self.uploads:
                        slow_at_s = self.uploads[timer] + len(chunk) * timeout_s / limit
                        self.uploads[timer] = min(slow_at_s, now_s() + STALL_S)
                    elif len(body) > FREE_BYTES:
                        await self._acquire_slot()
                        slot.callback(self.slots.release)
                        self.uploads[timer] = now_s() + STALL_S
        except TimeoutError:
            if len(body) > FREE_BYTES and timer not in self.uploads:  # it got no slot, or had to give it back
                raise _busy() from None
            message = f"The body took too long; {timeout_s:g} seconds are allowed."
            raise HTTPException(408, message, {"Connection": "close"}) from None
        except ClientDisconnect:
            raise HTTPException(400) from None  # which nobody reads
        finally:
            self.uploads.pop(timer, None)
        return body

    async def _acquire_slot(self) -> None:
        """Wait for a slot; turn away the slowest of those with one, as long as none is free."""
        now_s = asyncio.get_running_loop().time
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    await self.slots.acquire()
                    return
            slowest = min(self.uploads, key=self.uploads.__getitem__, default=None)
            # One that has expired anyway gives its slot back in a moment.
            if slowest is not None and not slowest.expired() and self.uploads[slowest] < now_s():
                del self.uploads[slowest]
                slowest.reschedule(now_s())

    def _compute(self, request: Request, body: list[bytearray]) -> bytes:
        """Answer a request, in a worker thread; the body is popped from its list so that nothing else keeps it."""
        return json.dumps(self.handler(_read_request(request, body.pop())), allow_nan=False).encode()


def _read_request(request: Request, body: bytearray) -> Any:
    """Parse a body, JSON or the bytes of an image; parameters in the body override those in the URL."""
    parameters: dict[str, Any] = {**request.path_params}
    parameters.pop("name", None)  # of the model, and there is only one
    for name, value in request.query_params.multi_items():
        if name == "candidate_labels":  # given several times, or once as a comma-separated string
            labels = request.query_params.getlist(name)
            parameters[name] = labels if len(labels) > 1 else value
        else:
            is_number = value.isascii() and value.isdecimal() and len(value) < 10
            parameters[name] = int(value) if is_number else {"true": True, "false": False}.get(value, value)
    # The content decides, since curl declares every body a form, and no image starts with a brace.
    if body[:100].lstrip()[:1] != b"{" and "json" not in request.headers.get("content-type", ""):
        return {**parameters, "inputs": body}
    if body.count(b",") > MAX_COMMAS:
        raise RequestError(f"The JSON has more than {MAX_COMMAS} commas; send less.", 413)
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is not JSON: {error}.", 400) from error
    return {**parameters, **data} if isinstance(data, dict) else data


def _busy() -> HTTPException:
    return HTTPException(503, "The server is busy; try again later.", {"Retry-After": "1"})


def _too_large(limit: int) -> RequestError:
    return RequestError(f"The body is over the limit of {limit} bytes; send a smaller image.", 413)
