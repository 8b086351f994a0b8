"""A small server that speaks the Hugging Face Hub's protocol, as far as `huggingface_hub` uses it here.

Downloads: HEAD and GET of ``/OWNER/NAME/resolve/REVISION/PATH`` with ETag, X-Repo-Commit, Content-Length;
files of the large file storage (LFS) by a redirect to another origin, as the Hub's CDN, with X-Linked-ETag
and X-Linked-Size; other files by a relative redirect to ``/api/resolve-cache``; 401, 403 and 404 with
X-Error-Code. Listings: ``/api/models/OWNER/NAME``, ``.../revision/REVISION``, ``.../tree/REVISION``.
Uploads: ``/api/repos/create``, ``.../preupload/REVISION``, the LFS batch, PUT and verify,
``.../commit/BRANCH``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".onnx", ".bin")
TOKEN = "hf_granted"  # may read and write everything
OUTSIDER = "hf_outsider"  # a valid account that was granted nothing


def git_sha1(content: bytes) -> str:
    """What git, and so the Hub, calls a small file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repo:
    """A model repository: commits, each with all its files, and branches and tags that name them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Adds a commit of exactly these files; returns its hash."""
        seed = json.dumps([len(self.commits), {k: sha256(v) for k, v in files.items()}])
        commit = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[branch] = commit
        return commit

    def find(self, revision: str) -> str | None:
        revision = self.refs.get(revision, revision)
        return revision if revision in self.commits else None


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    origin: str  # "hub" or "cdn"
    status: int


class HubServer:
    """The server, running from `with` on; the CDN listens on a port of its own.

    Attributes:
        url: the endpoint to give to the client.
        repos: "owner/name" -> `Repo`.
        requests: what was asked so far.
        cuts: for each of the CDN's next answers, the bytes after which it cuts the connection.
        stall_after: bytes after which the CDN's answers come to a halt, connection open.
        status: answer everything with this HTTP status, as a Hub that is down.
        on_request: called with the method and path of each request, before the answer.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.storage: dict[str, bytes] = {}
        self.cuts: list[int] = []
        self.stall_after: int | None = None
        self.status: int | None = None
        self.on_request: Callable[[str, str], None] = lambda method, path: None
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._servers = [self._listen("hub"), self._listen("cdn")]
        ports = [server.server_address[1] for server in self._servers]
        # Two host names, since a client may take another port for the same host.
        self.url, self.cdn = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"

    def _listen(self, origin: str) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "origin": origin})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        return server

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, repo_id: str, files: Mapping[str, bytes], **kwargs: bool) -> Repo:
        """Makes a repository with one commit on its main branch."""
        repo = self.repos[repo_id] = Repo(**kwargs)
        repo.commit(files)
        return repo

    def asked(self, method: str = "", part: str = "") -> list[Request]:
        """The requests so far of a method and with a part in their path."""
        with self._lock:
            return [r for r in self.requests if method in ("", r.method) and part in r.path]

    def log(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def take_cut(self) -> int | None:
        with self._lock:
            return self.cuts.pop(0) if self.cuts else None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    origin: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    # --- the wire -----------------------------------------------------------------------------

    def _answer(
        self, status: int, body: bytes | dict[str, Any] | list[Any] = b"", headers: Mapping[str, str] = {}
    ) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self._log(status)
        self.send_response(status)
        length = {} if "Content-Length" in headers else {"Content-Length": str(len(body))}
        for name, value in {**headers, **length}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str, message: str = "", **headers: str) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message or code, **headers}
        self._answer(status, {"error": message or code}, named)

    def _log(self, status: int) -> None:
        self.hub.log(Request(self.command, self.path, dict(self.headers), self.origin, status))

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    # --- routes -------------------------------------------------------------------------------

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        body = self._body()
        path = urlsplit(self.path).path
        self.hub.on_request(self.command, path)
        if self.hub.status is not None:
            return self._answer(self.hub.status, b"down for maintenance")
        if self._token not in (None, TOKEN, OUTSIDER):
            return self._error(401, "", "Invalid credentials in Authorization header")
        routes = [
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            (r"/api/resolve-cache/models/([^/]+/[^/]+)/([^/]+)/(.+)", self._small_file),
            (r"/cdn/([0-9a-f]{64})", self._cdn_file),
            (r"/api/repos/create", lambda: self._create(json.loads(body))),
            (r"/api/validate-yaml", lambda: self._answer(200, {"errors": [], "warnings": []})),
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", lambda *a: self._preupload(*a, body)),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", lambda *a: self._lfs_batch(*a, body)),
            (r"/lfs/([0-9a-f]{64})", lambda oid: self._lfs_put(oid, body)),
            (r"/lfs-verify", lambda: self._lfs_verify(json.loads(body))),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", lambda *a: self._commit(*a, body)),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+).*", self._tree),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
        ]
        for pattern, action in routes:
            if match := re.fullmatch(pattern, path):
                return action(*(unquote(g) if g is not None else None for g in match.groups()))
        return self._answer(404, {"error": f"no route for {self.command} {path}"})

    def _repo(self, repo_id: str) -> Repo | None:
        """The repository, or None after the answer that the Hub gives where it may not be seen."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self._token != TOKEN):
            # Whoever is not logged in is not told whether it exists.
            self._error(401 if self._token is None else 404, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        if (repo := self._repo(repo_id)) is None:
            return None
        if repo.gated and self._token != TOKEN:
            return self._error(401 if self._token is None else 403, "GatedRepo", "Access is restricted")
        if (commit := repo.find(revision)) is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        named = {"X-Repo-Commit": commit}
        content = repo.commits[commit].get(path)
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found", **named)
        if path.endswith(LFS_SUFFIXES):
            self.hub.storage[sha256(content)] = content
            named |= {"X-Linked-ETag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
            location = f"{self.hub.cdn}/cdn/{sha256(content)}?filename={path.rsplit('/', 1)[-1]}"
            return self._answer(
                302, f"Found. Redirecting to {location}".encode(), named | {"Location": location}
            )
        location = f"/api/resolve-cache/models/{repo_id}/{commit}/{path}"
        return self._answer(307, b"", named | {"Location": location})

    def _small_file(self, repo_id: str, commit: str, path: str) -> None:
        content = self.hub.repos[repo_id].commits[commit][path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_sha1(content)}"'}
        self._answer(200, content, headers)

    def _cdn_file(self, oid: str) -> None:
        content = self.hub.storage[oid]
        start = 0
        headers = {"ETag": f'"{oid[:32]}"', "Accept-Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = self.hub.stall_after if self.hub.stall_after is not None else self.hub.take_cut()
        if cut is None:
            return self._answer(206 if asked else 200, content[start:], headers)
        self._answer(200, content[:cut], headers | {"Content-Length": str(len(content))})
        self.wfile.flush()
        if self.hub.stall_after is not None:
            self.hub.closing.wait()
        self.close_connection = True
        return self.connection.close()

    def _info(self, repo_id: str, revision: str | None) -> None:
        if (repo := self._repo(repo_id)) is None:
            return None
        if (commit := repo.find(revision or "main")) is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [{"rfilename": path} for path in repo.commits[commit]]
        return self._answer(200, {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings})

    def _tree(self, repo_id: str, revision: str) -> None:
        if (repo := self._repo(repo_id)) is None:
            return None
        if (commit := repo.find(revision)) is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        recursive = parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]
        entries: list[dict[str, Any]] = []
        for path, content in repo.commits[commit].items():
            if recursive or "/" not in path:
                entries.append({"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)})
                if path.endswith(LFS_SUFFIXES):
                    lfs = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
                    entries[-1]["lfs"] = lfs
        return self._answer(200, entries)

    # --- uploads ------------------------------------------------------------------------------

    def _may_write(self) -> bool:
        if self._token == TOKEN:
            return True
        if self._token is None:
            self._error(401, "", "Invalid username or password.")
        else:
            self._error(403, "", "You don't have the rights to write there")
        return False

    def _create(self, asked: dict[str, Any]) -> None:
        if not self._may_write():
            return None
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repos:
            return self._answer(409, {**url, "error": "You already created this model repo"})
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repos[repo_id] = Repo({"0" * 40: {}}, {"main": "0" * 40}, private=private)
        return self._answer(200, url)

    def _preupload(self, repo_id: str, revision: str, body: bytes) -> None:
        if (repo := self._repo(repo_id)) is None or not self._may_write():
            return None
        if repo.find(revision) is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return self._answer(200, {"files": files})

    def _lfs_batch(self, repo_id: str, body: bytes) -> None:
        if self._repo(repo_id) is None or not self._may_write():
            return None
        objects = []
        for asked in json.loads(body)["objects"]:
            found = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.storage:
                upload = {"href": f"{self.hub.cdn}/lfs/{asked['oid']}"}
                found["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify"}}
            objects.append(found)
        return self._answer(200, {"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str, body: bytes) -> None:
        if sha256(body) != oid:
            return self._answer(400, b"checksum differs")
        self.hub.storage[oid] = body
        return self._answer(200)

    def _lfs_verify(self, asked: dict[str, Any]) -> None:
        stored = self.hub.storage.get(asked["oid"])
        self._answer(200 if stored is not None and len(stored) == asked["size"] else 404)

    def _commit(self, repo_id: str, branch: str, body: bytes) -> None:
        if (repo := self._repo(repo_id)) is None or not self._may_write():
            return None
        files = dict(repo.commits[repo.refs[branch]])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.storage[value["oid"]]
        commit = repo.commit(files, branch)
        url = f"{self.hub.url}/{repo_id}/commit/{commit}"
        return self._answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
