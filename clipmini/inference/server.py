"""Serve a model over HTTP to Hugging Face's clients, with limits on the size, number and time of their requests.

A request waits for one of `max_active` slots before its body is read, so that waiting requests take almost no memory,
and keeps its slot until it is answered. The model runs in worker threads; the event loop only moves bytes.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from types import FrameType
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from modeling_clipmini.handler import RequestError

MAX_COMMAS = 1_000_000  # in a JSON body: 16 MiB of "[]," would become 400 MiB of lists
SHUTDOWN_S = 10  # for open requests to be answered; a thread cannot be stopped, so the model finishes its work anyway


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Args:
        max_body_bytes: bytes in the body of a request, else status 413; base64 makes an image a third larger.
        max_active: requests whose bodies are in memory at the same time, including those still being uploaded.
        max_waiting: requests that wait to become active; any further one gets status 503.
        num_workers: threads that run the model; they divide torch's threads among them.
        wait_timeout_s: seconds that a request may wait to become active, else status 503.
        upload_timeout_s: seconds that a body may take to arrive, else status 408.
        compute_timeout_s: seconds from the arrival of the body to the answer, else status 504.

    Raises:
        ValueError: a limit is not positive.
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
    """Create the ASGI app of a model.

    Requests are POSTed to `/`, or to the paths that clients know from the Hub: `/models/NAME` and `/pipeline/TASK`,
    which also sets the task. A body is JSON, or the bytes of an image with the parameters in the query string. GET
    `/health` answers even while the server is busy. Every error is JSON, `{"error": ...}`, except for requests that
    are not valid HTTP.

    Args:
        handler: answers one request, in a worker thread; its `RequestError`s are sent to the client.
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
            RequestError: _answer_request_error,
            HTTPException: _answer_http_error,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_bug,
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


def make_server(app: Starlette) -> uvicorn.Server:
    """Create a uvicorn server that logs errors alone.

    Args:
        app: from `create_app`.

    Returns:
        The server. When told to stop, it goes on answering open requests for at most `SHUTDOWN_S` seconds.
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


def run(app: Starlette, sock: socket.socket, on_stop: Callable[[], Any] | None = None) -> None:
    """Serve until Ctrl-C.

    Args:
        app: from `create_app`.
        sock: from `bind`.
        on_stop: called at Ctrl-C, to end connections that would stay open.
    """
    server = make_server(app)
    if on_stop is not None:

        def stop(sig: int, frame: FrameType | None) -> None:
            on_stop()
            uvicorn.Server.handle_exit(server, sig, frame)

        server.handle_exit = stop  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again after an orderly shutdown
        server.run(sockets=[sock])


class _Service:
    """The route functions of one model, with the state that its requests share."""

    def __init__(self, handler: Callable[[Any], Any], limits: Limits) -> None:
        self.handler, self.limits = handler, limits
        self.slots = asyncio.Semaphore(limits.max_active)
        self.num_waiting = 0
        # Workers with all of torch's threads each would compete for the same cores.
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
        await self._acquire_slot()
        try:
            body = [await self._read_body(request)]
            work = self.workers.submit(self._answer, request, body)
        except BaseException:
            self.slots.release()
            raise
        answer = asyncio.wrap_future(work)
        answer.add_done_callback(self._release_slot)
        limit = self.limits.compute_timeout_s
        try:
            async with asyncio.timeout(limit):
                content = await asyncio.shield(answer)
        except TimeoutError:
            # A thread cannot be stopped, so running work keeps its slot to the end. Work that has not begun is
            # canceled, which releases the slot; its body must not stay in the workers' queue.
            if work.cancel():
                body.clear()
            raise HTTPException(504, f"The answer took more than {limit:g} seconds.") from None
        finally:
            del answer, work  # an exception in them refers to this frame, which would keep them and the body alive
        return Response(content, media_type="application/json")

    async def _acquire_slot(self) -> None:
        """Wait for a slot among the active requests."""
        busy = HTTPException(503, "The server is busy; try again later.", {"Retry-After": "1"})
        if self.slots.locked() and self.num_waiting >= self.limits.max_waiting:
            raise busy
        self.num_waiting += 1
        try:
            async with asyncio.timeout(self.limits.wait_timeout_s):
                await self.slots.acquire()
        except TimeoutError:
            raise busy from None
        finally:
            self.num_waiting -= 1

    def _release_slot(self, answer: "asyncio.Future[bytes]") -> None:
        self.slots.release()
        if not answer.cancelled():
            answer.exception()  # mark it as retrieved, or asyncio would log it where the request has timed out

    async def _read_body(self, request: Request) -> bytes:
        limit, timeout_s = self.limits.max_body_bytes, self.limits.upload_timeout_s
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise RequestError(f"The content encoding {encoding[:20]!r} is not supported; send it plain.", 415)
        if int(request.headers.get("content-length", 0)) > limit:
            raise _too_large(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:  # uvicorn reads and drops the rest, so that the client receives the answer
                        raise _too_large(limit)
        except TimeoutError:
            message = f"The body took more than {timeout_s:g} seconds."
            raise HTTPException(408, message, {"Connection": "close"}) from None
        return bytes(body)

    def _answer(self, request: Request, body: list[bytes]) -> bytes:
        """Answer a request, in a worker thread; the body is popped from its list so that nothing else keeps it."""
        return json.dumps(self.handler(_read_request(request, body.pop())), allow_nan=False).encode()


def _read_request(request: Request, body: bytes) -> Any:
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


def _too_large(limit: int) -> RequestError:
    return RequestError(f"The body is over the limit of {limit} bytes; send a smaller image.", 413)


async def _answer_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    error.__traceback__ = None  # its frames hold the body and the image, and may hold the error in a cycle
    return JSONResponse({"error": str(error)}, error.status)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=400)


async def _answer_bug(request: Request, error: Exception) -> Response:
    """Hide the error from the client; uvicorn logs its traceback."""
    return JSONResponse({"error": "The server failed; its log says why."}, 500)
