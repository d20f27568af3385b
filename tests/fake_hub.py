"""A hub on this machine, and a hub's cache as huggingface_hub lays it out: what the tests of qlora_helpers.colab.hub load from."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Repositories by name, each {file: bytes}, over HTTP. `status` answers everything with that, 0 nothing; a repository whose account is
    "stalls", "dies", "restarts" or "trickles" does that half-way."""

    daemon_threads = True
    request_queue_size = 50

    def __init__(self, port: int = 0):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commit = COMMIT
        self.status, self.requests, self.ended = 200, [], threading.Event()
        super().__init__(("127.0.0.1", port), _Handler)
        self.thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, *names: str) -> list[str]:
        """The requests for the repositories `names`: huggingface_hub asks for something of its own besides."""
        return [request for request in self.requests if any(name in request for name in names)]

    def close(self) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a reader that hung up


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub  # over HTTP/1.0: no connection outlives the server

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0].removeprefix("/")
        self.server.requests.append(f"{self.command} {path}")
        if self.server.status == 0:  # taken, and never answered
            self.server.ended.wait()
            return None
        if self.server.status != 200:
            headers = (
                {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}
                if self.server.status == 403
                else {}
            )
            return self._answer(self.server.status, b"{}", headers)
        name = next((n for n in self.server.repositories if f"/{n}/" in f"/{path}/"), None)
        if name is None:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files, commit, how = (
            self.server.repositories[name],
            self.server.commit,
            name.partition("/")[0],
        )
        if path.startswith("api/"):
            listing = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
            return self._answer(
                200, json.dumps({"id": name, "sha": commit, "siblings": listing}).encode(), {}, how
            )
        content = files[path.partition(f"{commit}/")[2]]
        self._answer(
            200,
            content,
            {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit},
            how,
        )

    def _answer(self, status: int, body: bytes, headers: dict[str, str], how: str = ""):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        is_list = self.path.startswith("/api/")
        if how == "trickles" and is_list:
            for i in range(len(body)):
                self.wfile.write(body[i : i + 1])
                self.wfile.flush()
                if self.server.ended.wait(1):
                    break
        elif how in ("stalls", "dies", "restarts") and not is_list:
            if (
                how != "dies" or "Range" not in self.headers
            ):  # gone for good, where the others begin again
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
            if how == "stalls":
                self.server.ended.wait()
        else:
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def write_cache(cache: Path, kind: str, name: str, files: dict[str, bytes]) -> Path:
    """`files` of the repository `name` (its `kind` is "model" or "dataset") in the hub's `cache`: refs, blobs, a snapshot of links."""
    storage = cache / f"{kind}s--{name.replace('/', '--')}"
    snapshot = storage / "snapshots" / COMMIT
    for folder in (storage / "refs", storage / "blobs"):
        folder.mkdir(parents=True, exist_ok=True)
    (storage / "refs" / "main").write_text(COMMIT)
    for file, content in files.items():
        blob = storage / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = snapshot / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(
            Path(*[".."] * (len(link.relative_to(storage).parts) - 1)) / "blobs" / blob.name
        )
    return snapshot
