"""A Hub on loopback, for the real `huggingface_hub` client; import as `loopback_hub`.

It keeps models and data sets in memory, speaks the Hub's HTTP API and its LFS protocol (not Xet), and fails when it is
told to. Requests that it does not know are answered with 404 and listed in `unknown`.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repositories import HubError, Repository, goes_through_lfs
from hub_schema import metadata_faults

TOKEN = "hf_tokenOfTheLoopbackHub"
USER = "org"
CHUNK_SIZE = 65_536


@dataclass
class Fault:
    """What goes wrong with the next requests that fit.

    Attributes:
        request: a pattern of "METHOD /path".
        status: the answer's, where there is one.
        times: of how many requests.
        headers: of the answer.
        cut_after: bytes of the request's body after which the connection is cut, without an answer.
    """

    request: str
    status: int = 500
    times: int = 1
    headers: dict = field(default_factory=dict)
    cut_after: int | None = None


class LoopbackHub:
    """The repositories, and what was asked of them.

    Attributes:
        user: who is logged in, and may create repositories.
        models: repositories by id.
        datasets: likewise.
        spaces: likewise.
        requests: "METHOD /path" of every request, in order.
        unknown: those of them that no Hub API answers.
        reached: set once a request is held; see `hold`.
    """

    def __init__(self):
        self.user = USER
        self.models, self.datasets, self.spaces = {}, {}, {}
        self.uploaded = {}  # by SHA-256
        self.requests, self.unknown, self.faults = [], [], []
        self.reached, self.released, self.held = threading.Event(), threading.Event(), None
        self.url = ""

    def fail(self, request, **options):
        """Let the next requests that fit go wrong; see `Fault`."""
        self.faults.append(Fault(request, **options))

    def hold(self, request):
        """Stop in the middle of the body of the next request that fits, until its client is gone or `released`."""
        self.held = request

    def environment(self, **more):
        """Give what a client in another process needs to find this Hub, and no other."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            **more,
        }

    def repositories(self, kind):
        return getattr(self, kind)

    def fault_for(self, request):
        for fault in self.faults:
            if fault.times and re.search(fault.request, request):
                fault.times -= 1
                return fault
        return None


@contextmanager
def running_hub():
    """Run a Hub in threads of this process."""
    hub = LoopbackHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()


class _CutError(Exception):
    """The connection ends here, without an answer."""


REPO = r"(?P<name>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{REPO}"
FILES = rf"/((?P<kind>datasets|spaces)/)?{REPO}"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    (r"POST /api/repos/create", "create"),
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/validate-yaml", "validate"),
    (r"GET /api/agent-harnesses", "harnesses"),
    (rf"GET {API}(/revision/{REVISION})?", "info"),
    (rf"GET {API}/refs", "refs"),
    (rf"GET {API}/commits/{REVISION}", "commits"),
    (rf"GET {API}/tree/{REVISION}(/(?P<path>.+))?", "tree"),
    (rf"POST {API}/paths-info/{REVISION}", "paths_info"),
    (rf"POST {API}/branch/{REVISION}", "create_branch"),
    (rf"DELETE {API}/branch/{REVISION}", "delete_branch"),
    (rf"POST {API}/preupload/{REVISION}", "preupload"),
    (rf"POST {API}/commit/{REVISION}", "commit"),
    (rf"(GET|HEAD) {FILES}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
    (rf"POST {FILES}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /lfs/(?P<oid>\w+)", "lfs_upload"),
    (r"POST /lfs/(?P<oid>\w+)/verify", "lfs_verify"),
]
WRITES = {"create", "create_branch", "delete_branch", "preupload", "commit", "lfs_batch", "whoami"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub, *args):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args):
        pass

    def do_GET(self):
        address = urlsplit(self.path)
        request = f"{self.command} {address.path}"
        self.query = parse_qs(address.query)
        self.hub.requests.append(request)
        try:
            fault = self.hub.fault_for(request)
            self.body = self._read_body(request, fault)
            if fault is not None:
                self._answer({"error": "told to fail"}, fault.status, fault.headers)
                return
            self._route(request)
        except HubError as error:
            headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
            self._answer({"error": error.message}, error.status, headers)
        except (_CutError, ConnectionError):
            self.close_connection = True

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

    def _read_body(self, request, fault):
        """Read the whole body, unless the connection is to be cut, or the request held."""
        left, body = int(self.headers.get("Content-Length") or 0), bytearray()
        is_held = self.hub.held is not None and re.search(self.hub.held, request)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            raise HubError(411, "chunked bodies are not read here")
        while left:
            if fault is not None and fault.cut_after is not None and len(body) >= fault.cut_after:
                raise _CutError
            if is_held and body:
                self.hub.held = None
                self.hub.reached.set()
                self.hub.released.wait(60)
                raise _CutError
            chunk = self.rfile.read(min(left, CHUNK_SIZE))
            if not chunk:
                raise _CutError  # the client is gone
            body += chunk
            left -= len(chunk)
        return bytes(body)

    def _route(self, request):
        for pattern, name in ROUTES:
            if match := re.fullmatch(pattern, request):
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if name in WRITES:
                    self._check_token()
                getattr(self, f"_{name}")(**parts)
                return
        self.hub.unknown.append(request)
        raise HubError(404, "no such route")

    def _check_token(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "Invalid credentials in Authorization header")

    def _json(self):
        return json.loads(self.body)

    def _repository(self, name, kind="models"):
        repository = self.hub.repositories(kind).get(name)
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.is_private and not has_token):
            raise HubError(401 if not has_token else 404, "Repository not found", "RepoNotFound")
        return repository

    def _answer(self, value, status=200, headers=None):
        data = json.dumps(value).encode()
        self._send(data, status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data, status, headers):
        self.send_response(status)
        for name, text in {"Content-Length": len(data), **headers}.items():
            self.send_header(name, str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Repositories

    def _create(self):
        wanted = self._json()
        kind = f"{wanted.get('type') or 'model'}s"
        name = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        where = f"{self.hub.url}/{'' if kind == 'models' else f'{kind}/'}{name}"
        if not name.startswith(f"{self.hub.user}/"):
            raise HubError(403, f"You don't have the rights to create a model under the namespace {name}")
        if name in self.hub.repositories(kind):
            self._answer({"error": "You already created this repo", "url": where, "name": name}, 409)
            return
        is_private = wanted.get("visibility") == "private" or wanted.get("private")
        self.hub.repositories(kind)[name] = Repository(name, is_private)
        self._answer({"url": where, "name": name, "id": name})

    def _whoami(self):
        self._answer({"type": "user", "name": self.hub.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def _validate(self):
        faults = metadata_faults(self._json()["content"])
        errors = [{"message": fault} for fault in faults]
        self._answer({"errors": errors, "warnings": []}, 400 if faults else 200)

    def _harnesses(self):
        raise HubError(404, "there are none")  # what is answered would be kept in the user's cache

    def _info(self, kind, name, revision="main"):
        repository = self._repository(name, kind)
        commit = repository.at(revision)
        self._answer(
            {
                "_id": name,
                "id": name,
                "author": self.hub.user,
                "sha": commit.sha,
                "private": repository.is_private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "lastModified": "2024-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )

    def _refs(self, kind, name):
        branches = self._repository(name, kind).branches
        heads = [{"name": key, "ref": f"refs/heads/{key}", "targetCommit": sha} for key, sha in branches.items()]
        self._answer({"branches": heads, "converts": [], "tags": [], "pullRequests": []})

    def _commits(self, kind, name, revision):
        facts = {"authors": [{"user": self.hub.user}], "date": "2024-01-01T00:00:00.000Z", "message": ""}
        history = self._repository(name, kind).history(revision)
        self._answer([{"id": commit.sha, "title": commit.title, **facts} for commit in history])

    def _create_branch(self, kind, name, revision):
        repository = self._repository(name, kind)
        if revision in repository.branches:
            raise HubError(409, f"Reference already exists: {revision}")
        repository.branches[revision] = repository.at(self._json().get("startingPoint", "main")).sha
        self._answer({})

    def _delete_branch(self, kind, name, revision):
        repository = self._repository(name, kind)
        if revision == "main":
            raise HubError(403, "main cannot be deleted")
        repository.at(revision)
        del repository.branches[revision]
        self._answer({})

    # Files

    def _tree(self, kind, name, revision, path=""):
        files = self._repository(name, kind).at(revision).files
        inside = {key: file for key, file in files.items() if not path or key.startswith(f"{path}/")}
        if path and not inside:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        start = len(path) + 1 if path else 0
        folders = {key[: key.index("/", start)] for key in inside if "/" in key[start:]}
        is_deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        listed = [file.about(key) for key, file in sorted(inside.items()) if is_deep or "/" not in key[start:]]
        self._answer([{"type": "directory", "path": key, "oid": "0" * 40, "size": 0} for key in folders] + listed)

    def _paths_info(self, kind, name, revision):
        files = self._repository(name, kind).at(revision).files
        asked = parse_qs(self.body.decode())["paths"]
        folders = [key for key in asked if key not in files and any(path.startswith(f"{key}/") for path in files)]
        listed = [files[key].about(key) for key in asked if key in files]
        self._answer([{"type": "directory", "path": key, "oid": "0" * 40, "size": 0} for key in folders] + listed)

    def _resolve(self, name, revision, path, kind="models"):
        repository = self._repository(name, kind)
        file, sha = repository.file(revision, path), repository.at(revision).sha
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": len(file.content)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            self._send(file.content, 200, headers)
            return
        start, end = int(wanted[1]), int(wanted[2] or len(file.content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(file.content)}"
        self._send(file.content[start : end + 1], 206, headers)

    def _preupload(self, kind, name, revision):
        files = self._repository(name, kind).at(revision).files
        answers = []
        for asked in self._json()["files"]:
            is_lfs = goes_through_lfs(asked["path"], base64.b64decode(asked["sample"]))
            known = files.get(asked["path"])
            oid = {} if known is None else {"oid": known.etag}
            mode = "lfs" if is_lfs else "regular"
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        self._answer({"files": answers})

    def _commit(self, kind, name, revision):
        operations = [json.loads(line) for line in self.body.splitlines()]
        commit = self._repository(name, kind).change(revision, operations, self.hub.uploaded)
        self._answer({"commitUrl": f"{self.hub.url}/{name}/commit/{commit.sha}", "commitOid": commit.sha})

    # LFS

    def _lfs_batch(self, name, kind="models"):
        self._repository(name, kind)
        objects = []
        for wanted in self._json()["objects"]:
            if wanted["oid"] not in self.hub.uploaded:
                place = f"{self.hub.url}/lfs/{wanted['oid']}"
                wanted["actions"] = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
            objects.append(wanted)
        self._answer({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "the content is not that of the hash")
        self.hub.uploaded[oid] = self.body
        self._answer({})

    def _lfs_verify(self, oid):
        if len(self.hub.uploaded.get(oid, b"")) != self._json()["size"]:
            raise HubError(404, "the object is not here")
        self._answer({})
