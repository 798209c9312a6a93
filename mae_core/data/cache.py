"""Copies of remote files on this machine's disk: shared by its workers, bounded in bytes, fetched ahead of their use.

A copy is there whole or not at all, under a name that its content decides. Workers are processes: they agree by locks on files, which the
system drops when one of them dies. The least recently read copies are deleted when room is needed; who is reading one still has it.
"""

import fcntl
import hashlib
import logging
import os
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mae_core.errors import DataError

logger = logging.getLogger(__name__)

Fetch = Callable[[str, int, int], bytes]  # (address, start, length): what is there of these bytes. FileNotFoundError without the object

_PIECE_BYTES = 8 * 2**20
_NUM_FETCHERS = 8
_PAUSE_SECONDS = 0.01
_TRIES = 3  # for a right checksum
_NUM_LOCKS = 256
_ALL = "locks/all"
_GRANT_SHARE = 64  # a process asks for at least this part of the bound at once, so that small files are not counted each time


class RemoteFile(NamedTuple):
    """sha256: in hexadecimal digits; None where nobody knows it: then `etag` tells one content from another."""

    address: str
    bytes: int
    sha256: str | None
    etag: str = ""

    @property
    def copy_name(self) -> str:
        return self.sha256 or hashlib.sha256(f"{self.address}\0{self.bytes}\0{self.etag}".encode()).hexdigest()


class FileCache:
    """At most `max_bytes` in `folder` for all processes that use it, and a 64th of that for each of them. Threads may share one."""

    def __init__(self, folder: Path, *, fetch: Fetch, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._folder, self._fetch = folder, fetch
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "locks").mkdir(exist_ok=True)
        self._granted = 0
        self._wanted: OrderedDict[str, RemoteFile] = OrderedDict()
        self._under_way: set[str] = set()
        self._num_fetchers = 0
        self._lock = threading.Lock()

    def open(self, file: RemoteFile) -> BinaryIO:
        """The copy of a file, fetched first where it is not there. Raises DataError where it is missing, or stays damaged."""
        path = self._path(file)
        while True:
            try:
                opened = path.open("rb", buffering=0)
            except FileNotFoundError:
                self._bring(file, waits=True)
                continue
            os.utime(opened.fileno())
            return opened

    def want(self, files: Sequence[RemoteFile]) -> None:
        """Fetches these in the background, in this order. What goes wrong there is told to whoever opens the file."""
        with self._lock:
            for file in files:
                if file.copy_name not in self._under_way and not self._path(file).exists():
                    self._wanted[file.copy_name] = file
            missing = min(_NUM_FETCHERS - self._num_fetchers, len(self._wanted))
            self._num_fetchers += missing
        for _ in range(missing):
            threading.Thread(target=self._fetch_wanted, name="fetch", daemon=True).start()

    def _fetch_wanted(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._num_fetchers -= 1
                    return
                name, file = self._wanted.popitem(last=False)
                self._under_way.add(name)
            try:
                self._bring(file, waits=False)
            except Exception as error:
                logger.warning("%s could not be fetched ahead: %s", file.address, error)
            with self._lock:
                self._under_way.discard(name)

    def _path(self, file: RemoteFile) -> Path:
        name = file.copy_name
        return self._folder / name[:2] / name

    def _bring(self, file: RemoteFile, *, waits: bool) -> None:
        """Fetches a file unless another thread or process has, or, without `waits`, is about to."""
        path = self._path(file)
        with self._locked(f"locks/{zlib.crc32(path.name.encode()) % _NUM_LOCKS:03d}", waits=waits) as is_ours:
            if not is_ours or path.exists():
                return
            part = path.with_suffix(".part")
            try:
                while not self._reserve(part, file):  # all that is here is being fetched
                    if not waits:
                        return
                    time.sleep(_PAUSE_SECONDS)
                for _ in range(_TRIES):
                    found = self._download(file, part)
                    if found is None:
                        with self._locked(_ALL, waits=True):  # who counts what is there must not miss it
                            part.replace(path)
                        return
                    logger.warning("%s; it is fetched again", found)
                raise DataError(f"data: {found}, {_TRIES} times; find out with `maestro data verify`, and pack the images again")
            finally:
                part.unlink(missing_ok=True)

    def _download(self, file: RemoteFile, part: Path) -> str | None:
        """Fills `part`; what is wrong with it then, if anything."""
        sha256, start = hashlib.sha256(), 0
        with part.open("r+b", buffering=0) as writing:
            while start < file.bytes:
                try:
                    piece = self._fetch(file.address, start, min(_PIECE_BYTES, file.bytes - start))
                except FileNotFoundError as error:
                    raise DataError(f"data: {file.address} is missing; was it deleted? List or pack the images again") from error
                if not piece:
                    return f"{file.address} has {start} bytes, not {file.bytes}"
                sha256.update(piece)
                writing.write(piece)
                start += len(piece)
            os.fsync(writing.fileno())  # a copy is never looked at again: after a power cut it must not be a name without its bytes
        if file.sha256 is not None and sha256.hexdigest() != file.sha256:
            return f"{file.address} is damaged: its sha256 is {sha256.hexdigest()}, the index says {file.sha256}"
        return None

    def _reserve(self, part: Path, file: RemoteFile) -> bool:
        """Makes `part` in its full size; False where there is no room just now. Raises DataError where there never will be."""
        if file.bytes > self.max_bytes:
            raise DataError(
                f"data: {file.address} has {file.bytes} bytes, more than this machine's whole cache ({self.max_bytes}); make that larger"
            )
        with self._lock, self._locked(_ALL, waits=True):
            if file.bytes > self._granted:
                wanted = max(file.bytes, self.max_bytes // _GRANT_SHARE)
                if not self._make_room(wanted):
                    return False
                self._granted = wanted
            self._granted -= file.bytes
            part.parent.mkdir(exist_ok=True)
            try:
                with part.open("wb") as made:
                    if file.bytes:
                        os.posix_fallocate(made.fileno(), 0, file.bytes)
            except OSError as error:
                raise DataError(
                    f"data: the cache {self._folder} cannot take {file.bytes} bytes ({error.strerror}); give its disk room, or lower that"
                ) from error
        return True

    def _make_room(self, num_bytes: int) -> bool:
        """Deletes the copies that were read longest ago, until `num_bytes` more fit; whether they do."""
        copies: list[tuple[os.stat_result, Path]] = []
        for folder in os.scandir(self._folder):
            if folder.name != "locks" and folder.is_dir():
                for entry in os.scandir(folder):
                    with suppress(FileNotFoundError):  # one that could not be fetched
                        copies.append((entry.stat(), Path(entry.path)))
        copies.sort(key=lambda copy: copy[0].st_mtime_ns)
        total = sum(stat.st_size for stat, _ in copies)
        for stat, path in copies:
            if total + num_bytes <= self.max_bytes:
                break
            if path.suffix and self._is_alive(path):
                continue
            path.unlink(missing_ok=True)
            total -= stat.st_size
        return total + num_bytes <= self.max_bytes

    def _is_alive(self, part: Path) -> bool:
        """Whether somebody is fetching this one."""
        with self._locked(f"locks/{zlib.crc32(part.stem.encode()) % _NUM_LOCKS:03d}", waits=False) as is_free:
            return not is_free

    @contextmanager
    def _locked(self, name: str, *, waits: bool) -> Iterator[bool]:
        """Whether the lock is ours; without `waits` it may be another's."""
        lock = os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
        finally:
            os.close(lock)
