"""What a process prints, to object storage while it prints it, so that it is there when the machine is gone.

In chunks whose names say where they begin: a reader goes on at any byte. Storage that is away costs nothing: what was printed lies in the
files that Ray has redirected it to, and is read from there when storage is back.
"""

import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from workers.contract import WorkOrder
from workers.stored import log_chunk, log_offset, log_prefix

logger = logging.getLogger(__name__)

CHUNK_BYTES = 256 * 2**10  # the newest one is written anew as it grows
_LOOK_SECONDS = 2.0
_MAX_CHUNKS = 4  # in one look
_KEPT_FIRST = 4  # of what may be kept, one part of so many is the beginning, the others the end
_MARKS = re.compile(rb"^:(?:job_id|actor_name|task_name):.*\n", re.MULTILINE)  # Ray's own


class Store(Protocol):
    """What is asked of object storage."""

    def put(self, key: str, body: bytes) -> None: ...
    def sizes(self, prefix: str) -> dict[str, int]: ...
    def delete(self, key: str) -> None: ...


class Chunk(NamedTuple):
    """A chunk that lies in storage."""

    offset: int
    bytes: int


class Tail:
    """What is appended to a file, in whole lines."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self, most: int, *, is_last: bool) -> bytes:
        """The next lines, at most so many bytes; a line that is longer is cut, and the last one may have no end."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                read = file.read(most)
        except OSError:  # taken away with the machine's disk
            return b""
        is_whole = is_last or (len(read) == most and b"\n" not in read)
        lines = read if is_whole else read[: read.rfind(b"\n") + 1]
        self._offset += len(lines)
        return _MARKS.sub(b"", lines)


def printed_to() -> list[Path]:
    """The files that this process's output goes to; none where it goes to a terminal or a pipe."""
    files = dict.fromkeys(Path(f"/proc/self/fd/{number}").resolve() for number in (1, 2))
    return [path for path in files if path.is_file()]


class LogUploads:
    """Uploads what this process prints below `prefix`, at most `max_bytes` of it: the beginning and the end. Any exception of the store
    means that it may do it later."""

    def __init__(self, open_store: Callable[[], Store], prefix: str, files: Sequence[Path], *, max_bytes: int) -> None:
        self._open_store, self._prefix, self._max_bytes = open_store, prefix, max_bytes
        self._tails = [Tail(path) for path in files]
        self._store: Store | None = None
        self._chunk, self._offset, self._num_uploaded = bytearray(), 0, 0  # the newest one, where it begins, how much of it lies there
        self._first, self._last = list[Chunk](), deque[Chunk]()  # those that are full
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-uploads", daemon=True)

    @classmethod
    def start(cls, order: WorkOrder, worker: str, *, num_workers: int) -> "LogUploads":
        """Begins, in a thread of its own, which imports what it needs."""

        def open_store() -> Store:
            from workers.objects import ObjectStore

            return ObjectStore(order.storage).patient(0.0)

        prefix = log_prefix(order.prefix, order.attempt, worker)
        uploads = cls(open_store, prefix, printed_to(), max_bytes=order.log_bytes // (num_workers + 1))
        uploads._thread.start()
        return uploads

    def close(self, seconds: float) -> None:
        """Uploads what is left, if it takes no longer than that."""
        self._ends.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        while not self._ends.wait(_LOOK_SECONDS):
            self.look()
        self.look(is_last=True)

    def look(self, *, is_last: bool = False) -> None:
        """Uploads what was printed since."""
        try:
            if self._store is None:
                self._store = self._take_up()
            for _ in range(_MAX_CHUNKS):
                self._fill(is_last=is_last)
                if self._num_uploaded == len(self._chunk):
                    return
                self._store.put(log_chunk(self._prefix, self._offset), bytes(self._chunk))
                self._num_uploaded = len(self._chunk)
                self._forget_what_is_too_much(self._store)
        except Exception as error:  # a log is never worth a training
            logger.debug("the log is uploaded later: %s", error)

    def _take_up(self) -> Store:
        """Goes on behind what an earlier process at this place has left."""
        store = self._open_store()
        for key, num_bytes in sorted(store.sizes(self._prefix).items()):
            self._keep(Chunk(log_offset(key), num_bytes))
            self._offset = log_offset(key) + num_bytes
        return store

    def _fill(self, *, is_last: bool) -> None:
        """Into the newest chunk whatever is new; into the next one, where it is full and lies in storage."""
        if self._num_uploaded == len(self._chunk) == CHUNK_BYTES:
            self._keep(Chunk(self._offset, CHUNK_BYTES))
            self._offset, self._chunk, self._num_uploaded = self._offset + CHUNK_BYTES, bytearray(), 0
        for tail in self._tails:
            if len(self._chunk) < CHUNK_BYTES:
                self._chunk += tail.read(CHUNK_BYTES - len(self._chunk), is_last=is_last)

    def _keep(self, chunk: Chunk) -> None:
        is_beginning = not self._last and sum(kept.bytes for kept in self._first) + chunk.bytes <= self._max_bytes // _KEPT_FIRST
        (self._first if is_beginning else self._last).append(chunk)

    def _forget_what_is_too_much(self, store: Store) -> None:
        while self._last and len(self._chunk) + sum(kept.bytes for kept in (*self._first, *self._last)) > self._max_bytes:
            store.delete(log_chunk(self._prefix, self._last[0].offset))
            self._last.popleft()
