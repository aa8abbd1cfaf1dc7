"""Serve a model over HTTP to Hugging Face's clients, with a limit on all that they can make large, many or slow.

A request waits for its turn before its body is read, so that what waits takes next to no memory; then it holds one of
`max_active` places until its answer is there. The model works in threads, and the event loop only moves bytes.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from modeling_clipmini.handler import RequestError

MAX_COMMAS = 1_000_000  # in JSON: 16 MiB of "[]," would become 400 MiB of lists
SHUTDOWN_S = 10  # that clients have for their answers; what the model is at is finished, as threads cannot be stopped


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Args:
        max_body_bytes: of a request; an image in base64 takes 4/3 of its bytes. More gets status 413.
        max_active: requests whose bodies are in memory at the same time, those being uploaded included.
        max_waiting: requests that wait for that; further ones get status 503.
        num_workers: threads that work with the model; each has its share of torch's threads.
        wait_timeout_s: seconds that a request may wait before it gets status 503.
        upload_timeout_s: seconds that a body may take to arrive before status 408.
        compute_timeout_s: seconds from there to the answer before status 504.

    Raises:
        ValueError: one is not positive.
    """

    max_body_bytes: int = 16 * 2**20
    max_active: int = 16
    max_waiting: int = 256
    num_workers: int = 2
    wait_timeout_s: float = 60
    upload_timeout_s: float = 60
    compute_timeout_s: float = 60

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"{field.name}={value} is not allowed; use a number above 0.")


def create_app(handler: Callable[[Any], Any], limits: Limits | None = None) -> Starlette:
    """Make the ASGI app of a model.

    POST a request to `/`; the paths `/models/NAME` and `/pipeline/TASK` that clients know from the Hub lead to the
    same model, the latter with its task. A body is JSON, or an image as it is with the parameters in the query. GET
    `/health` says that the server lives, even when it is busy. Every error is JSON, `{"error": ...}`, but for what is
    no HTTP at all.

    Args:
        handler: answers one request, in a thread; a `RequestError` of it goes to the client.
        limits: by default `Limits()`.

    Returns:
        The app, for any ASGI server.
    """
    service = _Service(handler, limits or Limits())
    paths = ("/", "/pipeline/{task}", "/models/{name:path}/pipeline/{task}", "/models/{name:path}")
    return Starlette(
        routes=[
            Route("/health", service.report_health, methods=["GET"]),
            *(Route(path, service.infer, methods=["POST"]) for path in paths),
        ],
        exception_handlers={
            RequestError: _tell_request_error,
            HTTPException: _tell_http_error,
            ClientDisconnect: _tell_nobody,
            Exception: _tell_bug,
        },
        lifespan=service.lifespan,
    )


def bind(host: str, port: int) -> socket.socket:
    """Take an address to listen at; before a model is loaded, so that one in use is known at once.

    Args:
        host: a name or address of this machine.
        port: 0 for any that is free.

    Returns:
        The bound socket, not listening yet.

    Raises:
        ValueError: it cannot be had.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a restart has to wait for a minute
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ValueError(f"Cannot listen at {host} port {port}: {error.strerror}. Choose another --port.") from None
    return sock


def make_server(app: Starlette) -> uvicorn.Server:
    """Set uvicorn up for an app: JSON and the log of errors, nothing else.

    Args:
        app: as `create_app` makes it.

    Returns:
        The server. Once it is told to stop it answers what is under way, for at most `SHUTDOWN_S` seconds.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return uvicorn.Server(config)


def run(app: Starlette, sock: socket.socket) -> None:
    """Serve until Ctrl-C.

    Args:
        app: as `create_app` makes it.
        sock: as `bind` gives it.
    """
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has shut down in order, and then passes the signal on
        make_server(app).run(sockets=[sock])


class _Service:
    """One model's requests, on their way from the socket to the handler and back."""

    def __init__(self, handler: Callable[[Any], Any], limits: Limits) -> None:
        self.handler, self.limits = handler, limits
        self.places = asyncio.Semaphore(limits.max_active)
        self.num_waiting = 0
        # Two workers with all threads each would take turns on the same cores.
        num_threads = max(1, torch.get_num_threads() // limits.num_workers)
        self.workers = ThreadPoolExecutor(
            limits.num_workers, "inference", initializer=torch.set_num_threads, initargs=(num_threads,)
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self.workers.shutdown(wait=False, cancel_futures=True)

    async def report_health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": self.num_waiting})

    async def infer(self, request: Request) -> Response:
        await self._take_place()
        try:
            body = [await self._read_body(request)]
            work = self.workers.submit(self._answer, request, body)
        except BaseException:
            self.places.release()
            raise
        answer = asyncio.wrap_future(work)
        answer.add_done_callback(self._give_place_back)
        try:
            async with asyncio.timeout(self.limits.compute_timeout_s):
                content = await asyncio.shield(answer)
        except TimeoutError:
            # A thread cannot be stopped, and holds its place to the end. What has not begun gives it back, and so must
            # not keep its body in the workers' queue.
            if work.cancel():
                body.clear()
            raise _timeout(504, "The answer took", self.limits.compute_timeout_s) from None
        finally:
            del answer, work  # an error in them holds this frame, which holds them, and what the request took
        return Response(content, media_type="application/json")

    async def _take_place(self) -> None:
        """Wait for a place among the active requests."""
        busy = HTTPException(503, "The server is busy; try again later.", {"Retry-After": "1"})
        if self.places.locked() and self.num_waiting >= self.limits.max_waiting:
            raise busy
        self.num_waiting += 1
        try:
            async with asyncio.timeout(self.limits.wait_timeout_s):
                await self.places.acquire()
        except TimeoutError:
            raise busy from None
        finally:
            self.num_waiting -= 1

    def _give_place_back(self, answer: "asyncio.Future[bytes]") -> None:
        self.places.release()
        if not answer.cancelled():
            answer.exception()  # has been seen, even where nobody waits for it any more

    async def _read_body(self, request: Request) -> bytes:
        limit = self.limits.max_body_bytes
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise RequestError(f"The content encoding {encoding[:20]!r} is not supported; send it plain.", 415)
        if int(request.headers.get("content-length", 0)) > limit:
            raise _too_large(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.upload_timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:  # uvicorn reads on and drops the rest, so that the client gets to the answer
                        raise _too_large(limit)
        except TimeoutError:
            raise _timeout(408, "The body took", self.limits.upload_timeout_s, {"Connection": "close"}) from None
        return bytes(body)

    def _answer(self, request: Request, body: list[bytes]) -> bytes:
        """Answer a request, in a worker's thread; its body is taken out of the list, so that nobody else keeps it."""
        return json.dumps(self.handler(_read_request(request, body.pop())), allow_nan=False).encode()


def _read_request(request: Request, body: bytes) -> Any:
    """Read what a client sent: JSON, or an image as it is. Parameters in the body come before those in the URL."""
    parameters: dict[str, Any] = {**request.path_params}
    parameters.pop("name", None)  # there is one model
    for name, value in request.query_params.multi_items():
        if name == "candidate_labels":  # repeated, or one string with commas between
            labels = request.query_params.getlist(name)
            parameters[name] = labels if len(labels) > 1 else value
        else:
            is_number = value.isascii() and value.isdecimal() and len(value) < 10
            parameters[name] = int(value) if is_number else {"true": True, "false": False}.get(value, value)
    # By contents first: curl calls everything a form, and no image begins with a brace.
    if body[:100].lstrip()[:1] != b"{" and "json" not in request.headers.get("content-type", ""):
        return {**parameters, "inputs": body}
    if body.count(b",") > MAX_COMMAS:
        raise RequestError(f"The JSON has more than {MAX_COMMAS} commas; send less.", 413)
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is not JSON: {error}.", 400) from error
    return {**parameters, **data} if isinstance(data, dict) else data


def _too_large(limit: int) -> RequestError:
    return RequestError(f"The body is over the limit of {limit} bytes; send a smaller image.", 413)


def _timeout(status: int, what: str, seconds: float, headers: dict[str, str] | None = None) -> HTTPException:
    return HTTPException(status, f"{what} more than {seconds:g} seconds.", headers)


async def _tell_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    error.__traceback__ = None  # its frames hold the body and the image, and may hold the error
    return JSONResponse({"error": str(error)}, error.status)


async def _tell_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _tell_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=400)


async def _tell_bug(request: Request, error: Exception) -> Response:
    """The traceback goes to the log, by uvicorn, and not to the client."""
    return JSONResponse({"error": "The server failed; its log says why."}, 500)
