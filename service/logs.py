"""What the processes of a run have printed, as they left it in object storage: chunks that are named by where they begin.

Offsets count the bytes that a process has printed, also those that were not kept, so a reader goes on where it was.
"""

import logging
from collections import Counter
from typing import NamedTuple

from service.artifacts import job_prefix
from service.errors import NotFound, RayUnreachable, StorageUnreachable
from service.models import AttemptRow
from service.ray_jobs import RayJobs
from service.storage import PAGE, ObjectNotFound, Storage, StoredObject
from workers.stored import DRIVER, log_chunk, log_offset, log_prefix

log = logging.getLogger(__name__)

KEPT_ATTEMPTS = 8  # the newest ones; each may have its part of the job's quota
MAX_BYTES = 2**20  # in one answer
MAX_TAIL_LINES = 10_000
MAX_LAST_BYTES = 5 * 2**20  # of what a driver had not uploaded


class LogPart(NamedTuple):
    """Some of a log, from byte `offset` on; the next begins at `next_offset`. `is_end`: nothing will follow."""

    text: bytes
    offset: int
    next_offset: int
    is_end: bool


class Log:
    """The log of one process of an attempt."""

    def __init__(self, storage: Storage, attempt: AttemptRow, worker: str = DRIVER) -> None:
        self._storage, self._has_ended = storage, attempt.ended_at is not None
        self.prefix = log_prefix(job_prefix(attempt.job_id), attempt.number, worker)
        self.chunks = [(log_offset(found.key), found) for found in storage.list(self.prefix)]  # where it begins, in order
        self.end = max((offset + found.bytes for offset, found in self.chunks), default=0)

    def read(self, offset: int) -> LogPart:
        """What begins at `offset`; where that was not kept, a line that says so, and what follows."""
        chosen = next(((begin, found) for begin, found in self.chunks if begin + found.bytes > offset), None)
        if chosen is None:
            return LogPart(b"", offset, offset, self._has_ended)
        begin, found = chosen
        gap = f"[… {begin - offset} bytes were not kept …]\n".encode() if begin > offset else b""
        text = self._storage.read_bytes(found.key, start=max(offset - begin, 0), length=MAX_BYTES)
        next_offset = max(begin, offset) + len(text)
        return LogPart(gap + text, offset, next_offset, self._has_ended and next_offset >= self.end)

    def tail(self, num_lines: int) -> LogPart:
        """The last lines, as far as one answer holds them."""
        text, begin = b"", self.end
        for offset, found in reversed(self.chunks):
            if offset + found.bytes != begin or len(text) + found.bytes > MAX_BYTES or text.count(b"\n") > num_lines:
                break
            text, begin = self._storage.read_bytes(found.key, start=0, length=found.bytes) + text, offset
        last = b"".join(text.splitlines(keepends=True)[-num_lines:])
        return LogPart(last, self.end - len(last), self.end, self._has_ended)


def read(storage: Storage, ray: RayJobs, attempt: AttemptRow, worker: str, *, offset: int, tail: int | None) -> LogPart:
    """The `tail` last lines of one process, or what begins at `offset`. NotFound for a worker that an ended attempt had not."""
    found = Log(storage, attempt, worker)
    if not found.chunks and worker != DRIVER and attempt.ended_at is not None:
        raise NotFound(
            f"Attempt {attempt.number} of job {attempt.job_id} has left no log of {worker!r}; /logs/workers names those it has left."
        )
    if not found.chunks and worker == DRIVER and attempt.submitted_at is not None and attempt.ended_at is None:  # too early for an upload
        text = (ray.logs(attempt.submission_id) or "").encode(errors="replace")
        return LogPart(text[offset : offset + MAX_BYTES], offset, min(offset + MAX_BYTES, max(len(text), offset)), is_end=False)
    return found.read(offset) if tail is None else found.tail(tail)


def list_workers(storage: Storage, attempt: AttemptRow) -> dict[str, int]:
    """The bytes kept of each process of an attempt, the driver's first, then by rank."""
    kept = Counter[str]()
    for found in storage.list(log_prefix(job_prefix(attempt.job_id), attempt.number)):
        kept[found.key.split("/")[-2]] += found.bytes
    return dict(sorted(kept.items(), key=lambda item: (item[0] != DRIVER, len(item[0]), item[0])))


def complete(ray: RayJobs, storage: Storage, attempt: AttemptRow) -> StoredObject | None:
    """What the driver printed last, which it may not have come to uploading, before Ray forgets it; then what is kept of the attempt.

    None where that cannot be had now: it changes nothing else. Logs of attempts long ago are deleted.
    """
    try:
        kept = Log(storage, attempt)
        text = (ray.logs(attempt.submission_id) or "").encode(errors="replace")
        begin = max(kept.end, len(text) - MAX_LAST_BYTES)
        if text[begin:]:
            storage.put_bytes(log_chunk(kept.prefix, begin), text[begin:])
        if attempt.number > KEPT_ATTEMPTS:
            old = storage.list(log_prefix(job_prefix(attempt.job_id), attempt.number - KEPT_ATTEMPTS), limit=PAGE)
            storage.delete([found.key for found in old])
        num_bytes = sum(list_workers(storage, attempt).values())
    except (RayUnreachable, StorageUnreachable, ObjectNotFound) as error:
        log.warning("the log of %s is not complete: %s", attempt.submission_id, error)
        return None
    return StoredObject(log_prefix(job_prefix(attempt.job_id), attempt.number), num_bytes) if num_bytes else None
