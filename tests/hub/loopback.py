"""
The Hub's HTTP interface on a loopback port, for tests with the real client: enough of it to create, push, list and load
model repositories, with tokens, private repositories, branches, and faults on demand.

Only what the client of huggingface_hub sends was built; a request that is unknown gets a 404 and is kept in `requests`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_write"
READ_TOKEN = "hf_read"
EXPIRED_TOKEN = "hf_expired"
USER = "me"

# What the Hub stores as large files: by default everything binary.
_TEXT_ENDINGS = (".json", ".md", ".txt", ".py", ".jinja", ".gitattributes")


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit."""

    content: bytes
    is_large: bool

    @property
    def etag(self) -> str:
        if self.is_large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """Commits by their sha, and branches that point to them."""

    private: bool
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, StoredFile], message: str) -> str:
        parent = self.branches.get(branch, "")
        description = repr((parent, message, sorted((path, file.etag) for path, file in files.items())))
        sha = hashlib.sha1(description.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """What to do instead of answering a request: a status, or a connection that breaks."""

    method: str
    path: re.Pattern[str]
    status: int | None
    times: int
    message: str = ""


@dataclass(frozen=True)
class Request:
    """A request that the server answered."""

    method: str
    path: str
    status: int


class Refused(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, message: str = "", code: str | None = None, **body: object) -> None:
        self.status, self.code, self.body = status, code, {"error": message, **body}


class LoopbackHub:
    """
    A Hub on a port of 127.0.0.1, used as a context manager.

    `client_environment(home)` gives the environment in which huggingface_hub talks to it; the client reads it when it
    is imported, so it belongs to a process of its own.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.read_only: set[str] = set()
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def client_environment(self, home: object, token: str | None = TOKEN) -> dict[str, str]:
        """Environment variables for a client process with a cache of its own."""
        environment = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
        }
        return environment | ({"HF_TOKEN": token} if token else {})

    def fail(self, method: str, path: str, status: int | None, times: int = 1, message: str = "") -> None:
        """Answer the next requests that match with a status, or break the connection where it is None."""
        self._faults.append(Fault(method, re.compile(path), status, times, message))

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a repository at a revision."""
        repository = self.repositories[name]
        return {path: file.content for path, file in repository.commits[repository.resolve(revision)].items()}

    def answer(self, method: str, target: str, headers, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The status, headers and body for a request; None as the status breaks the connection."""
        parts = urlsplit(target)
        path, query = unquote(parts.path), parse_qs(parts.query)
        with self._lock:
            fault = next((f for f in self._faults if f.times and f.method == method and f.path.search(path)), None)
            if fault is not None:
                fault.times -= 1
                if fault.status is None:
                    return 0, {}, b""
                raise Refused(fault.status, fault.message or f"injected {fault.status}")
            for methods, pattern, route in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method in methods:
                    return route(self, _Call(method, match, query, headers, body))
        raise Refused(404, f"no route for {method} {path}")

    # What the routes share.

    def require_writer(self, headers, name: str | None = None) -> None:
        user = self._token(headers)
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if user == READ_TOKEN or name in self.read_only:
            raise Refused(403, "Forbidden: you need write access to this repository")

    def repository(self, name: str, headers) -> Repository:
        repository, token = self.repositories.get(name), self._token(headers)
        # The Hub does not tell a private repository from one that does not exist.
        if repository is None or (repository.private and token is None):
            raise Refused(404 if token else 401, "Repository not found", "RepoNotFound")
        return repository

    def _token(self, headers) -> str | None:
        token = (headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == EXPIRED_TOKEN:
            raise Refused(401, "Invalid credentials in Authorization header")
        return token if token in (TOKEN, READ_TOKEN) else None


@dataclass(frozen=True)
class _Call:
    method: str
    match: re.Match[str]
    query: dict[str, list[str]]
    headers: object
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


def _json(value: object, status: int = 200, **headers: str):
    return status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode()


def _who_am_i(hub: LoopbackHub, call: _Call):
    hub.require_writer(call.headers)
    return _json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})


def _create(hub: LoopbackHub, call: _Call):
    hub.require_writer(call.headers)
    wanted = call.json
    name = f"{wanted.get('organization') or USER}/{wanted['name']}"
    answer = {"url": f"{hub.url}/{name}", "name": name, "id": name}
    if name in hub.repositories:
        raise Refused(409, "You already created this model repo", **answer)
    private = bool(wanted.get("private") or wanted.get("visibility") == "private")
    repository = hub.repositories[name] = Repository(private)
    attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
    repository.commit("main", {".gitattributes": StoredFile(attributes, False)}, "initial commit")
    return _json(answer)


def _validate_yaml(hub: LoopbackHub, call: _Call):
    return _json({"errors": [], "warnings": []})


def _preupload(hub: LoopbackHub, call: _Call):
    hub.require_writer(call.headers, call.match[1])
    hub.repository(call.match[1], call.headers)
    return _json(
        {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "regular" if file["path"].endswith(_TEXT_ENDINGS) else "lfs",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in call.json["files"]
            ]
        }
    )


def _large_file_batch(hub: LoopbackHub, call: _Call):
    hub.require_writer(call.headers, call.match[1])
    objects = []
    for wanted in call.json["objects"]:
        upload = {"actions": {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}}
        known = wanted["oid"] in hub.large_files
        objects.append({"oid": wanted["oid"], "size": wanted["size"], **({} if known else upload)})
    return _json({"transfer": "basic", "objects": objects})


def _put_large_file(hub: LoopbackHub, call: _Call):
    if hashlib.sha256(call.body).hexdigest() != call.match[1]:
        raise Refused(400, "the content does not match its sha256")
    hub.large_files[call.match[1]] = call.body
    return 200, {}, b""


def _commit(hub: LoopbackHub, call: _Call):
    name, branch = call.match[1], call.match[2]
    hub.require_writer(call.headers, name)
    repository = hub.repository(name, call.headers)
    if branch not in repository.branches:
        raise Refused(404, "Invalid rev id", "RevisionNotFound")
    files = dict(repository.commits[repository.branches[branch]])
    message = ""
    for line in call.body.splitlines():
        operation = json.loads(line)
        value = operation["value"]
        if operation["key"] == "header":
            message = value["summary"]
        elif operation["key"] == "file":
            files[value["path"]] = StoredFile(base64.b64decode(value["content"]), False)
        elif operation["key"] == "lfsFile":
            if value["oid"] not in hub.large_files:
                raise Refused(400, "a large file was not uploaded")
            files[value["path"]] = StoredFile(hub.large_files[value["oid"]], True)
        elif operation["key"] == "deletedFile":
            files.pop(value["path"], None)
    sha = repository.commit(branch, files, message)
    return _json({"success": True, "commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha, "hookOutput": ""})


def _branch(hub: LoopbackHub, call: _Call):
    hub.require_writer(call.headers, call.match[1])
    repository = hub.repository(call.match[1], call.headers)
    if call.match[2] in repository.branches:
        raise Refused(409, "Reference already exists")
    start = (json.loads(call.body) if call.body else {}).get("startingPoint") or "main"
    repository.branches[call.match[2]] = repository.resolve(start)
    return 200, {}, b""


def _info(hub: LoopbackHub, call: _Call):
    repository = hub.repository(call.match[1], call.headers)
    sha = repository.resolve(call.match[2] or "main")
    if sha is None:
        raise Refused(404, "Invalid rev id", "RevisionNotFound")
    return _json(
        {
            "id": call.match[1],
            "modelId": call.match[1],
            "_id": "0" * 24,
            "sha": sha,
            "private": repository.private,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": path} for path in repository.commits[sha]],
        }
    )


def _tree(hub: LoopbackHub, call: _Call):
    repository = hub.repository(call.match[1], call.headers)
    sha = repository.resolve(call.match[2])
    if sha is None:
        raise Refused(404, "Invalid rev id", "RevisionNotFound")
    folder = f"{call.match[3].strip('/')}/" if call.match[3] else ""
    recursive = call.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    entries: dict[str, dict] = {}
    for path, file in repository.commits[sha].items():
        if not path.startswith(folder):
            continue
        below = path[len(folder) :]
        if "/" in below and not recursive:
            directory = folder + below.split("/")[0]
            entries[directory] = {"type": "directory", "path": directory, "oid": "0" * 40, "size": 0}
            continue
        entries[path] = {"type": "file", "path": path, "size": len(file.content), "oid": file.etag}
        if file.is_large:
            entries[path]["lfs"] = {"oid": file.etag, "size": len(file.content), "pointerSize": 134}
    if folder and not entries:
        raise Refused(404, "Entry not found", "EntryNotFound")
    return _json(list(entries.values()))


def _resolve(hub: LoopbackHub, call: _Call):
    repository = hub.repository(call.match[1], call.headers)
    sha = repository.resolve(call.match[2])
    if sha is None:
        raise Refused(404, "Invalid rev id", "RevisionNotFound")
    file = repository.commits[sha].get(call.match[3])
    if file is None:
        raise Refused(404, "Entry not found", "EntryNotFound")
    headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
    if file.is_large:
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
    if call.method == "HEAD":
        return 200, {**headers, "Content-Length": str(len(file.content))}, b""
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range") or "")
    if wanted is None:
        return 200, headers, file.content
    first, last = int(wanted[1]), min(int(wanted[2] or len(file.content)), len(file.content) - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(file.content)}"
    return 206, headers, file.content[first : last + 1]


_NAME = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[tuple[str, ...], str, Callable]] = [
    (("GET",), r"/api/whoami-v2", _who_am_i),
    (("POST",), r"/api/repos/create", _create),
    (("POST",), r"/api/validate-yaml", _validate_yaml),
    (("POST",), rf"/api/models/{_NAME}/preupload/(.+)", _preupload),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", _large_file_batch),
    (("PUT",), r"/lfs/([0-9a-f]{64})", _put_large_file),
    (("POST",), rf"/api/models/{_NAME}/commit/(.+)", _commit),
    (("POST",), rf"/api/models/{_NAME}/branch/(.+)", _branch),
    (("GET", "HEAD"), rf"/api/models/{_NAME}/tree/([^/]+)(?:/(.*))?", _tree),
    (("GET", "HEAD"), rf"/api/models/{_NAME}(?:/revision/([^/]+))?", _info),
    (("GET", "HEAD"), rf"/{_NAME}/(?:resolve|raw)/([^/]+)/(.+)", _resolve),
]


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, asks the hub, writes the answer."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def _serve(self) -> None:
        body = self._body()
        try:
            status, headers, content = self.hub.answer(self.command, self.path, self.headers, body)
        except Refused as refused:
            status, headers, content = _json(refused.body, refused.status)
            if refused.code:
                headers["X-Error-Code"] = refused.code
            headers["X-Error-Message"] = str(refused.body["error"])
        self.hub.requests.append(Request(self.command, self.path, status))
        if status == 0:
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve


def main() -> None:
    """Serve until interrupted; prints the address, for the use by hand: `python -m tests.hub.loopback`."""
    with LoopbackHub() as hub:
        print(hub.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
