"""A TCP proxy on loopback in front of an HTTP server, which refuses, delays, cuts and loses what passes, by a seed."""

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_CHUNK_BYTES = 2**16
_WRITES = (b"PUT", b"POST")


@dataclass(frozen=True)
class Faults:
    """What happens to connections. With none of it they pass untouched."""

    refuse: bool = False  # none is taken
    chunk_seconds: float = 0.0  # the time that each 64 KiB take
    cut_within_bytes: int | None = None  # each breaks after a number of bytes below this one
    write_status: int | None = None  # what writes are answered, instead of being passed on
    lose_answers: float = 0.0  # the share of writes that are carried out, and whose answer never comes


class ChaosProxy:
    """Listens at `url`; `num_faults` counts the connections that a fault has struck."""

    def __init__(self, port: int, *, seed: int) -> None:
        self.num_faults = 0
        self._target, self._seed = port, seed
        self._faults, self._lock = Faults(), threading.Lock()
        self._num_connections = 0
        self._open: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    @contextmanager
    def having(self, faults: Faults) -> Iterator[None]:
        """With these faults for all connections, old ones are cut, until the block ends."""
        self.set(faults)
        try:
            yield
        finally:
            self.set(Faults())

    def close(self) -> None:
        self._listening.close()
        self.set(Faults(refuse=True))

    def set(self, faults: Faults) -> None:
        """These faults from now on; connections that there are are cut."""
        with self._lock:
            self._faults = faults
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _struck(self) -> None:
        with self._lock:
            self.num_faults += 1

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listening.accept()
                self._num_connections += 1
                threading.Thread(target=self._serve, args=(client, self._num_connections), daemon=True).start()

    def _serve(self, client: socket.socket, number: int) -> None:
        with self._lock:
            faults = self._faults
            self._open.add(client)
        try:
            if faults.refuse:
                self._struck()
            else:
                with socket.create_connection(("127.0.0.1", self._target), timeout=600) as server:
                    self._relay(client, server, faults, random.Random(f"{self._seed}-{number}"))
        except OSError:
            pass  # one of both has gone
        finally:
            with self._lock:
                self._open.discard(client)
            client.close()

    def _relay(self, client: socket.socket, server: socket.socket, faults: Faults, draw: random.Random) -> None:
        left = [draw.randrange(faults.cut_within_bytes) if faults.cut_within_bytes else None]
        loses = False
        if faults.write_status is not None or faults.lose_answers:
            head = _head(client)
            if head.startswith(_WRITES) and faults.write_status is not None:
                self._struck()
                client.sendall(b"HTTP/1.1 %d Full\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % faults.write_status)
                return
            loses = head.startswith(_WRITES) and draw.random() < faults.lose_answers
            server.sendall(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))  # one request for each connection

        def pump(source: socket.socket, target: socket.socket, *, is_answer: bool) -> None:
            with suppress(OSError):
                while content := source.recv(_CHUNK_BYTES):
                    if is_answer and loses and not content.startswith(b"HTTP/1.1 100"):
                        self._struck()
                        break
                    if faults.chunk_seconds:
                        threading.Event().wait(faults.chunk_seconds)
                    if left[0] is not None:
                        left[0] -= len(content)
                        if left[0] < 0:
                            self._struck()
                            break
                    target.sendall(content)
            for side in (client, server):
                with suppress(OSError):
                    side.shutdown(socket.SHUT_RDWR)

        up = threading.Thread(target=pump, args=(client, server), kwargs={"is_answer": False}, daemon=True)
        up.start()
        pump(server, client, is_answer=True)
        up.join()


def _head(client: socket.socket) -> bytes:
    """A request's head, and what came with it of the body."""
    content = b""
    while b"\r\n\r\n" not in content:
        if not (more := client.recv(_CHUNK_BYTES)):
            raise ConnectionError("it has gone")
        content += more
    return content
