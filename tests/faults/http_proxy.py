"""A proxy of an HTTP server that holds requests or answers back, and cuts answers: what a call that timed out may have done."""

import contextlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

_PATIENCE_SECONDS = 300.0
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length", "date", "server"}


class Caught:
    """The next request that fits: held before it is forwarded, or (`answer`) with the server's answer to it, until it is let go."""

    def __init__(self, method: str, path: str, *, answer: bool) -> None:
        self.answer = answer
        self.is_cut = False
        self._method, self._path = method, path
        self._reached, self._goes_on = threading.Event(), threading.Event()

    def fits(self, method: str, path: str) -> bool:
        return method == self._method and re.search(self._path, path) is not None

    def wait(self, seconds: float = 120) -> None:
        """Until it is there; with `answer`, until the server has answered it."""
        assert self._reached.wait(seconds), f"no {self._method} {self._path} within {seconds:g} s"

    def let_go(self, *, cut: bool = False) -> None:
        """cut: who asked hears nothing more; the connection ends."""
        self.is_cut = cut
        self._goes_on.set()

    def pass_by(self) -> None:
        """The request, in its own thread."""
        self._reached.set()
        assert self._goes_on.wait(_PATIENCE_SECONDS)


class HttpProxy:
    """Listens at `url`."""

    def __init__(self, upstream: str) -> None:
        self._caught: list[Caught] = []
        self._taken: list[Caught] = []
        self._lock = threading.Lock()
        self._client = httpx.Client(base_url=upstream, timeout=60, trust_env=False)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self) -> None:
                proxy.serve(self)

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def hold(self, method: str, path: str, *, answer: bool = False) -> Caught:
        """The next request whose path and query match a pattern."""
        caught = Caught(method, path, answer=answer)
        with self._lock:
            self._caught.append(caught)
        return caught

    def cut(self, method: str, path: str) -> Caught:
        """The next request that matches does its work, and who asked never hears of it."""
        caught = self.hold(method, path, answer=True)
        caught.let_go(cut=True)
        return caught

    def _take(self, method: str, path: str) -> Caught | None:
        with self._lock:
            caught = next((caught for caught in self._caught if caught.fits(method, path)), None)
            if caught is not None:
                self._caught.remove(caught)
                self._taken.append(caught)
            return caught

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        caught = self._take(request.command, request.path)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if caught is not None and not caught.answer:
            caught.pass_by()
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in {"connection", "expect"}]
        answer = self._client.send(self._client.build_request(request.command, request.path, headers=headers, content=body), stream=True)
        content = b"".join(answer.iter_raw())
        if caught is not None and caught.answer:
            caught.pass_by()
            if caught.is_cut:
                request.close_connection = True
                return
        with contextlib.suppress(ConnectionError):  # who asked may have given up
            self._answer(request, answer, content)

    @staticmethod
    def _answer(request: BaseHTTPRequestHandler, answer: httpx.Response, content: bytes) -> None:
        request.send_response(answer.status_code)
        for name, value in answer.headers.multi_items():
            if name.lower() not in _HOP_BY_HOP:
                request.send_header(name, value)
        request.send_header("Content-Length", answer.headers.get("Content-Length", "0") if request.command == "HEAD" else str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def close(self) -> None:
        """Whatever is held is let go."""
        with self._lock:
            for caught in self._taken:
                caught.let_go(cut=caught.is_cut)
        self._server.shutdown()
        self._server.server_close()
        self._client.close()


@contextmanager
def proxy_of(upstream: str) -> Iterator[HttpProxy]:
    proxy = HttpProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()
