"""A Hugging Face Hub on loopback: a real HTTP server whose repositories are in memory.

It answers what huggingface_hub (0.36 to 2), diffusers and datasets ask, with the Hub's own refusals, and it can fail:

    with LoopbackHub() as hub:
        hub.fail("POST", "/commit/", status=500)
        subprocess.run(command, env=hub.environment(tmp_path / "home"))
        assert hub.files("tester/model")["README.md"]

Clients read `HF_ENDPOINT` when huggingface_hub is imported, and the tests' own process is offline: run them in a
process of their own with `hub.environment(...)`.
"""

import json
import os
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from hub_endpoints import Call, endpoint_for, goes_to_lfs
from hub_repositories import Commit, File, Refusal, Reply, Repo


class Request(NamedTuple):
    """A request that came in, in the order of arrival; `private` is None where it names no repository that exists."""

    method: str
    path: str
    private: bool | None


class Trouble:
    """What happens to the next `times` requests that match, or to all if None, once `after` others went well."""

    def __init__(self, method: str, pattern: str, action: str | int, times: int | None, after: int):
        self.method, self.pattern, self.action, self.times, self.after = method, pattern, action, times, after

    def strikes(self, method: str, path: str) -> bool:
        if self.method != method or not re.search(self.pattern, path) or self.times == 0:
            return False
        if self.after:
            self.after -= 1
            return False
        self.times = self.times and self.times - 1
        return True


class LoopbackHub:
    """The state of the Hub, and its server while the `with` block lasts.

    Tokens: "hf_test" writes as the user "tester", "hf_read" only reads as the same, "hf_stranger" is another user's.
    """

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}  # uploaded to LFS, whether or not a commit names them
        self.requests: list[Request] = []
        self.troubles: list[Trouble] = []
        self.crashes: list[Exception] = []  # mistakes of this server
        self.lock = threading.RLock()

    def __enter__(self) -> "LoopbackHub":
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()  # waits for the threads of the connections
        if self.crashes and error is None:
            raise self.crashes[0]

    def environment(self, home: Path, token: str | None = "hf_test") -> dict[str, str]:
        """Return the environment of a client: this one's without what concerns the Hub, caches or proxies.

        Args:
            home: folder of the client's caches, in place of ~/.cache/huggingface; hfgen's own is `hfgen` in it.
            token: None for a client that is not logged in.
        """
        dropped = re.compile(r"HF_|HUGGING|HFGEN_|.*_proxy$", re.IGNORECASE)
        environment = {name: value for name, value in os.environ.items() if not dropped.match(name)}
        environment |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home)} | ({"HF_TOKEN": token} if token else {})
        return environment | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def put(self, repo_id: str, files: dict[str, bytes], type: str = "model", private: bool = False) -> None:
        """Commit files, to a new repository if there is none; a client would do it in several requests."""
        with self.lock:
            repo = self.repos.setdefault((type, repo_id), Repo(type, repo_id, private))
            added = {path: File(content, goes_to_lfs(path, len(content))) for path, content in files.items()}
            repo.commit("main", {**repo.at("main").files, **added}, "put there by a test")

    def files(self, repo_id: str, type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Return the content of the files by path."""
        return {path: file.content for path, file in self.repos[type, repo_id].at(revision).files.items()}

    def is_private(self, repo_id: str, type: str = "model") -> bool:
        return self.repos[type, repo_id].private

    def commits(self, repo_id: str, type: str = "model") -> list[Commit]:
        """Return all commits, the oldest first; the first is the Hub's own."""
        return list(self.repos[type, repo_id].commits)

    def fail(self, method: str, path: str, status: int = 503, times: int | None = 1, after: int = 0) -> None:
        """Answer with an error, and do nothing else, where the regular expression `path` is found in the path.

        Clients ask again after some statuses of some requests (5xx of downloads and of uploads to LFS), five times
        in 23 seconds; `times=None` outlasts them.
        """
        self.troubles.append(Trouble(method, path, status, times, after))

    def cut(self, method: str, path: str, times: int | None = 1, after: int = 0, unread: bool = False) -> None:
        """Close the connection within the reply to a request that was carried out; `unread`: before it is read."""
        self.troubles.append(Trouble(method, path, "unread" if unread else "cut", times, after))

    def mend(self) -> None:
        """End all failures."""
        self.troubles.clear()


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = False, 64

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.connections: set[socket.socket] = set()

    def process_request(self, request, client_address) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the client was faster

    def handle_error(self, request, client_address) -> None:
        pass  # a client that is gone; what goes wrong here is in `crashes`


class _Handler(BaseHTTPRequestHandler):
    """Speaks HTTP on one connection; what a request means is up to `Call`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each request waits 40 ms
    hub: LoopbackHub

    def log_message(self, *arguments) -> None:
        pass

    def answer(self) -> None:
        parts = urlsplit(self.path)
        endpoint, named = endpoint_for(self.command, parts.path)
        action = self.note(named)
        if action == "unread":
            self.close_connection = True
            return
        body, query = self.read_body(), {key: values[0] for key, values in parse_qs(parts.query).items()}
        try:
            if isinstance(action, int):
                raise Refusal(action, "a failure that a test asked for")
            if endpoint is None:
                raise Refusal(404, f"this Hub does not know {self.command} {self.path}")
            with self.hub.lock:
                call = Call(self.hub.url, self.hub.repos, self.hub.objects, self.headers, query, body)
                reply = getattr(call, endpoint)(**named)
        except Refusal as refusal:
            reply = refusal.reply
        except Exception as error:
            self.hub.crashes.append(error)
            reply = Refusal(400, f"the Hub on loopback has a mistake: {error!r}").reply
        self.send(reply, cut=action == "cut")

    def note(self, named: dict[str, str | None]) -> str | int | None:
        """Add this request to the list; return what shall go wrong with it."""
        with self.hub.lock:
            repo = self.hub.repos.get((named.get("type"), named.get("repo_id")))
            self.hub.requests.append(Request(self.command, self.path, repo and repo.private))
            actions = [one.action for one in self.hub.troubles if one.strikes(self.command, self.path)]
        return actions[0] if actions else None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, reply: Reply, cut: bool) -> None:
        content, headers = reply.content, dict(reply.headers)
        if not isinstance(content, bytes):
            content, headers["Content-Type"] = json.dumps(content).encode(), "application/json"
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        if cut:
            self.close_connection = True
            if self.command == "HEAD" or len(content) < 2:
                self._headers_buffer.clear()
                return
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
