"""A Hub on the loopback interface: repositories in memory, behind the part of the Hub's HTTP API that its client uses.

Strict where the Hub is: a token for every write and for what is private, a commit on a stale parent is refused, and a
large file counts only once its bytes have arrived and match their hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.repo import LARGE, TOKEN, USER, Fault, Repo, blob_id, entry


class Hub(ThreadingHTTPServer):
    """The server; a context manager that serves in a thread.

    Attributes:
        repos: by name.
        store: large files that have arrived, by SHA-256.
        requests: "METHOD /path" of every request, in order.
        faults: what goes wrong; each counts down.
        errors: the server's own mistakes, which a client might take for a fault and get over.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.errors: list[str] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def add_repo(self, name: str, files: dict[str, bytes] | None = None) -> Repo:
        repo = self.repos[name] = Repo()
        repo.add_commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})})
        return repo

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times > 0 and re.fullmatch(fault.request, request):
                    fault.times -= 1
                    fault.also()
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    """One connection; see `ROUTES` for what is answered."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        fault = self.server.fault(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.action == "drop":
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.body = (
            self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        )
        self.lost = fault is not None and fault.action == "lose"
        if fault is not None and isinstance(fault.action, int):
            self.answer(fault.action, {"error": f"fault {fault.action}"}, fault.headers)
            return
        for method, pattern, act in ROUTES:
            match = re.fullmatch(pattern, self.path)
            if method == self.command and match is not None:
                try:
                    act(self, **match.groupdict())
                except Exception as error:
                    self.server.errors.append(f"{self.command} {self.path}: {error!r}")
                    raise
                return
        self.answer(404, {"error": "no such route"}, {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        if self.lost:
            self.close_connection = True
            self.connection.close()
            return
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    lost = False

    def _authorised(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer(401, {"error": "Invalid username or password."})
        return False

    def _repo(self, name: str, writes: bool = False) -> Repo | None:
        repo = self.server.repos.get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (not known and (writes or repo.private)):
            self.answer(404 if known else 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def whoami(self) -> None:
        if self._authorised():
            self.answer(200, {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if not self._authorised():
            return
        url = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repos:
            self.answer(409, {"error": "You already created this model repo", **url})
            return
        self.server.add_repo(name).private = asked.get("visibility") == "private"
        self.answer(200, url)

    def validate(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def info(self, repo: str, revision: str = "main") -> None:
        found = self._repo(repo)
        if found is None:
            return
        files = found.at(revision)
        if files is None:
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return
        sha = found.head if revision == "main" else revision
        listed = [{"rfilename": name} for name in files]
        self.answer(200, {"_id": "1", "id": repo, "sha": sha, "private": found.private, "siblings": listed})

    def tree(self, repo: str, revision: str, folder: str | None) -> None:
        found = self._repo(repo)
        files = found.at(revision) if found is not None else None
        if files is None:
            return
        within = (folder or "").strip("/")
        listed = [entry(name, files[name]) for name in files if name.startswith(within)]
        if within and not listed:
            self.answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
            return
        self.answer(200, listed)

    def paths(self, repo: str, revision: str) -> None:
        found = self._repo(repo)
        if found is not None:
            files = found.at(revision) or {}
            asked = parse_qs(self.body.decode())["paths"]
            self.answer(200, [entry(name, files[name]) for name in asked if name in files])

    def preupload(self, repo: str, revision: str) -> None:
        found = self._repo(repo, writes=True)
        if found is None:
            return
        answer = []
        for asked in json.loads(self.body)["files"]:
            mode = "lfs" if asked["path"].endswith(LARGE) else "regular"
            known = found.files.get(asked["path"])
            oid = None if known is None else hashlib.sha256(known).hexdigest() if mode == "lfs" else blob_id(known)
            answer.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": answer})

    def batch(self, repo: str) -> None:
        if self._repo(repo, writes=True) is None:
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.server.url}/lfs/{asked['oid']}"}
            verify = {"href": f"{self.server.url}/{repo}.git/info/lfs/objects/verify"}
            known = asked["oid"] in self.server.store
            objects.append(asked if known else {**asked, "actions": {"upload": upload, "verify": verify}})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.answer(400, {"error": "the content does not match its hash"})
            return
        self.server.store[oid] = self.body
        self.answer(200, {})

    def verify(self, repo: str) -> None:
        asked = json.loads(self.body)
        good = len(self.server.store.get(asked["oid"], b"")) == asked["size"]
        self.answer(200 if good else 404, {})

    def commit(self, repo: str, revision: str) -> None:
        found = self._repo(repo, writes=True)
        if found is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        with self.server.lock:
            if header.get("parentCommit") not in (None, found.head):
                self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
                return
            files = dict(found.files)
            for line in lines[1:]:
                kind, value = line["key"], line["value"]
                if kind == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif kind == "lfsFile" and value["oid"] in self.server.store:
                    files[value["path"]] = self.server.store[value["oid"]]
                elif kind == "deletedFile":
                    del files[value["path"]]
                else:
                    self.answer(400, {"error": f"cannot commit {kind} {value['path']}"})
                    return
            oid = found.add_commit(header["summary"], files)
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._repo(repo)
        if found is None:
            return
        files = found.at(revision) or {}
        if path not in files:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        sha = found.head if revision == "main" else revision
        self.answer(200, files[path], {"X-Repo-Commit": sha, "ETag": f'"{blob_id(files[path])}"'})


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_AT = r"(?P<revision>[\w.-]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", f"/api/models/{_REPO}", Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/{_AT}", Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/{_AT}(?P<folder>/.*)?", Handler.tree),
    ("POST", f"/api/models/{_REPO}/paths-info/{_AT}", Handler.paths),
    ("POST", f"/api/models/{_REPO}/preupload/{_AT}", Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/{_AT}", Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", Handler.verify),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.upload),
    ("GET", f"/{_REPO}/resolve/{_AT}/(?P<path>.+)", Handler.resolve),
    ("HEAD", f"/{_REPO}/resolve/{_AT}/(?P<path>.+)", Handler.resolve),
]
