"""A job's log for who reads it from outside: whole, or as it grows. An answer that breaks off is asked for again from where it was."""

import codecs
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from workers.names import DRIVER, JobStatus

if TYPE_CHECKING:
    from service.client import MaestroClient

_PAUSE_SECONDS = 1.0


class LogPart(NamedTuple):
    """Some of a log. `attempt` 0: there is none yet. The next part begins at byte `next_offset`; `is_end`: nothing will follow."""

    text: bytes
    attempt: int
    next_offset: int
    is_end: bool


def follow(
    client: "MaestroClient",
    job: str,
    *,
    attempt: int | None = None,
    worker: str = DRIVER,
    tail: int | None = None,
    waits: bool = True,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """What a process has printed (the last `tail` lines first) and, where `waits`, prints until its attempt has ended; without
    `attempt` until the job has, attempt by attempt."""
    number, offset, decoder = attempt, 0, _decoder()
    while True:
        view = client.job(job)
        part = client.log_part(job, attempt=number, worker=worker, offset=offset, tail=tail)
        number, offset, tail = part.attempt or None, part.next_offset, None
        yield decoder.decode(part.text, final=part.is_end)
        job_is_over = JobStatus(view["status"]).is_terminal
        if (part.is_end and (attempt is not None or job_is_over)) or (not part.text and (job_is_over or not waits)):
            return
        if waits and part.is_end and view["attempt"] > part.attempt:
            number, offset, decoder = view["attempt"], 0, _decoder()
        elif not part.text:
            sleep(_PAUSE_SECONDS)


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")(errors="replace")
