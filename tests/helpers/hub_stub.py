"""A tiny Hugging Face Hub on 127.0.0.1.

It has datasets, whose branches point to commits, each a table of files, and takes models from who has its token.
"""

import base64
import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Files = dict[str, bytes]


class Hub:
    """Serves datasets; ``url`` is for HF_ENDPOINT."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Files]] = {}  # of each dataset, by hash, the last one being main
        self.gated: set[str] = set()
        self.fetched: list[str] = []  # the paths that were downloaded
        self.models: dict[str, Files] = {}  # what was uploaded
        self.namespaces = {"owner"}
        self.token = "hf_good"
        self.refuses = ""  # what a path has to hold to be refused
        self.url = ""

    def push(self, name: str, files: Files) -> str:
        """Make ``files`` the content of a dataset's main branch; returns the commit's hash."""
        sha = hashlib.sha1(f"{name} {sorted(files.items())}".encode()).hexdigest()
        self.commits.setdefault(name, {}).pop(sha, None)
        self.commits[name][sha] = files
        return sha

    def receive(self, path: str, body: bytes, token: str) -> tuple[int, dict[str, str], bytes] | None:
        """Answer what an upload asks; None for a path of a download."""
        parts = path.strip("/").split("/")
        if self.refuses and self.refuses in path:
            return 400, {}, b'{"error": "out of order"}'
        if path == "/api/validate-yaml":
            return 200, {}, b'{"errors": [], "warnings": []}'
        if path not in ("/api/whoami-v2", "/api/repos/create") and parts[:2] != ["api", "models"]:
            return None
        if token != self.token:
            return 401, {}, b'{"error": "Invalid credentials"}'
        if path == "/api/whoami-v2":
            return 200, {}, b'{"type": "user", "name": "owner", "auth": {"accessToken": {"role": "write"}}}'
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'owner'}/{wanted['name']}"
            if name.split("/")[0] not in self.namespaces:
                return 403, {}, b'{"error": "You may not create a model under this namespace"}'
            status = 409 if name in self.models else 200
            self.models.setdefault(name, {})
            return status, {}, json.dumps({"url": f"{self.url}/{name}", "name": name, "id": name}).encode()
        name = "/".join(parts[2:4])
        if name not in self.models:
            return 404, {"X-Error-Code": "RepoNotFound"}, b'{"error": "Repository not found"}'
        if parts[4:5] == ["preupload"]:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return 200, {}, json.dumps({"files": [file | {"shouldIgnore": False} for file in files]}).encode()
        if parts[4:5] == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.models[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {}, json.dumps({"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1" * 40}).encode()
        content = {"id": name, "sha": "1" * 40, "private": False, "siblings": []}
        return 200, {}, json.dumps(content).encode()

    def answer(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and content for a request."""
        parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
        api = parts[0] == "api"
        kind, owner, name, *rest = [*parts[api:], "", ""]  # a library's telemetry is shorter
        rest = rest[:-2]
        repo = f"{owner}/{name}"
        if kind != "datasets" or repo not in self.commits:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        revision = rest[1] if len(rest) > 1 else "main"
        sha = [*self.commits[repo]][-1] if revision == "main" else revision
        if sha not in self.commits[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files, below = self.commits[repo][sha], "/".join(rest[2:])
        if not api:
            if repo in self.gated:
                return 403, {"X-Error-Code": "GatedRepo"}, b""
            if below not in files:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            self.fetched.append(below)
            etag = hashlib.sha256(files[below]).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": sha}, files[below]
        if rest == ["auth-check"]:
            return (403, {"X-Error-Code": "GatedRepo"}, b"") if repo in self.gated else (200, {}, b"{}")
        if not rest or rest[0] == "revision":
            content = {"id": repo, "sha": sha, "private": False, "siblings": [{"rfilename": path} for path in files]}
            return 200, {}, json.dumps(content).encode()
        if rest[0] == "paths-info":
            wanted = (
                json.loads(body)["paths"] if body.startswith(b"{") else urllib.parse.parse_qs(body.decode())["paths"]
            )
            return (
                200,
                {},
                json.dumps([entry for entry in self.tree(files, "", True) if entry["path"] in wanted]).encode(),
            )
        found = self.tree(files, below, query.get("recursive", ["False"])[0].lower() == "true")
        if below and not found:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {}, json.dumps(found).encode()

    def tree(self, files: Files, top: str, recursive: bool) -> list[dict]:
        """List what is below a folder."""
        found = {}
        for path, content in files.items():
            if top and not path.startswith(f"{top}/"):
                continue
            names = path.removeprefix(f"{top}/" if top else "").split("/")
            for depth in range(1, len(names) + 1) if recursive else [1]:
                where = "/".join([*([top] if top else []), *names[:depth]])
                entry = {"path": where, "oid": hashlib.sha1(where.encode()).hexdigest()}
                is_file = where == path
                found[where] = entry | (
                    {"type": "file", "size": len(content)} if is_file else {"type": "directory", "size": 0}
                )
        return list(found.values())


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Serve a hub until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            answer = hub.receive(url.path, body, token)
            status, headers, content = answer or hub.answer(url.path, urllib.parse.parse_qs(url.query), body)
            if status == 200 and (span := self.headers.get("Range")):
                start, _, end = span.removeprefix("bytes=").partition("-")
                part = content[int(start) : int(end) + 1 if end else None]
                headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"
                status, content = 206, part
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_POST = do_GET

        def log_message(self, *arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
