"""A hub on this machine: what the tests of the hub, the doctor and the loaders ask."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Repositories by name, each {file: its bytes, or its size alone}, over HTTP.

    `status` answers everything, 0 nothing; `gated` repositories give files only to a token; one
    whose account is "stalls" or "dies" ends half-way through a file.
    """

    daemon_threads = True
    request_queue_size = 50

    def __init__(self, port: int = 0):
        self.repositories: dict[str, dict[str, bytes | int]] = {}
        self.commit, self.gated = COMMIT, set()
        self.status, self.requests, self.ended = 200, [], threading.Event()
        super().__init__(("127.0.0.1", port), _Handler)
        self.thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def use(self, monkeypatch, cache) -> None:
        """Let huggingface_hub ask this hub, with an empty `cache` and no token."""
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "")

    def asked(self, *names: str) -> list[str]:
        """Return the requests for the repositories `names`."""
        return [request for request in self.requests if any(name in request for name in names)]

    def close(self) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that hung up


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub  # over HTTP/1.0: no connection outlives the server

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0].removeprefix("/")
        hub.requests.append(f"{self.command} {path}")
        if hub.status == 0:  # taken, and never answered
            hub.ended.wait()
            return
        name = next((n for n in hub.repositories if f"/{n}/" in f"/{path}/"), None)
        is_file, status = not path.startswith("api/"), hub.status
        if status == 200 and name is None:
            status = 404
        if name in hub.gated and is_file and not self.headers.get("Authorization"):
            status = 403
        if status != 200:
            code = {403: "GatedRepo", 404: "RepoNotFound"}.get(status, "")
            self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})
        elif is_file:
            content = hub.repositories[name][path.partition(f"{hub.commit}/")[2]]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            headers = {"ETag": etag, "X-Repo-Commit": hub.commit}
            self._answer(200, content, headers, name.partition("/")[0])
        else:
            sizes = {
                file: content if isinstance(content, int) else len(content)
                for file, content in hub.repositories[name].items()
            }
            answer = {
                "id": name,
                "sha": hub.commit,
                "siblings": [{"rfilename": file, "size": size} for file, size in sizes.items()],
            }
            if "/tree/" in path:
                answer = [
                    {"type": "file", "path": file, "size": size, "oid": file}
                    for file, size in sizes.items()
                ]
            self._answer(200, json.dumps(answer).encode(), {})

    def _answer(self, status: int, body: bytes, headers: dict[str, str], how: str = ""):
        start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        self.send_response(206 if start else status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(body) // 2 if how in ("stalls", "dies") else len(body)
        self.wfile.write(body[start:end])
        self.wfile.flush()
        if how == "stalls":
            self.server.ended.wait()

    def log_message(self, *arguments):
        pass
