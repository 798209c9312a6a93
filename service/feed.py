"""One look at the database for all open streams of a process, many times a second; none where there are none.

A stream that takes its messages too slowly is cut off, and comes back with the last id that it saw: no client costs more than its queue.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi.sse import format_sse_event

from service.db import Database
from service.tail import Batch, State, Tail, Told

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
ERROR_SECONDS = 5.0
MAX_WAITING = 1000  # messages of one stream


class Subscription:
    """What one stream has yet to send."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._progress = b""
        self._known_progress = ""
        self._end: bytes | None = None
        self._news = asyncio.Event()

    def know(self, progress: str) -> None:
        """What the stream has told of progress by itself."""
        if self._known_progress == progress:
            self._progress = b""
        elif not self._progress:
            self._known_progress = progress

    def add(self, number: int, message: bytes) -> None:
        if self._end is not None:
            return
        self._waiting.append((number, message))
        if len(self._waiting) > MAX_WAITING:
            self.finish(b"")
        self._news.set()

    def follow(self, state: State | None) -> None:
        """Where its job is now; None: there is no such job any more."""
        if state is None:
            self.finish(b"")
            return
        if state.progress != self._known_progress:
            self._known_progress = state.progress
            self._progress = format_sse_event(data_str=state.progress, event="progress")  # an older one that waits is of no use
            self._news.set()
        if state.status.is_terminal:
            self.finish(end_of(state))

    def finish(self, message: bytes) -> None:
        """Nothing comes after this; empty: the connection ends without a word, and the client opens another."""
        self._end = message if self._end is None else self._end
        self._news.set()

    def take(self, *, after: int) -> tuple[bytes, int, bool]:
        """All messages that wait, with ids above `after`; the last id; whether those were the last ones."""
        self._news.clear()
        fresh = [message for number, message in self._waiting if number > after]
        after = max(after, self._waiting[-1][0]) if self._waiting else after
        chunk = b"".join([*fresh, self._progress, self._end or b""])
        self._waiting.clear()
        self._progress = b""
        return chunk, after, self._end is not None

    async def wait(self, seconds: float) -> None:
        """Until there is something to take, or so long."""
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                await self._news.wait()
        except TimeoutError:
            pass


class Feed:
    """The streams of one process. All but the look itself happens on the event loop."""

    def __init__(self, database: Database, *, poll_seconds: float = POLL_SECONDS) -> None:
        self.database = database
        self._poll_seconds = poll_seconds
        self._of_job: dict[str, set[Subscription]] = {}
        self._of_all: dict[Subscription, str | None] = {}  # with the project that it is of
        self._tail = Tail(database)
        self._started = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def num_clients(self) -> int:
        return len(self._of_all) + sum(map(len, self._of_job.values()))

    @property
    def horizon(self) -> int:
        """All events up to this id have been given to the streams of all jobs."""
        return self._tail.horizon

    @contextmanager
    def of_job(self, job_id: str) -> Iterator[Subscription]:
        """From now on: its events, its progress, its end."""
        subscription = Subscription()
        self._of_job.setdefault(job_id, set()).add(subscription)
        self._start()
        try:
            yield subscription
        finally:
            self._of_job[job_id].discard(subscription)
            if not self._of_job[job_id]:
                del self._of_job[job_id]

    @contextmanager
    def of_all(self, project: str | None) -> Iterator[Subscription]:
        """From the horizon on: the events of all jobs of a project (None: of all), in the order of their ids."""
        subscription = Subscription()
        self._of_all[subscription] = project
        self._start()
        try:
            yield subscription
        finally:
            del self._of_all[subscription]

    async def started(self) -> None:
        """Until the horizon is known. While a stream is open."""
        await self._started.wait()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _start(self) -> None:
        if self._task is None:
            self._tail, self._started = Tail(self.database), asyncio.Event()
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._of_job or self._of_all:
                pause = self._poll_seconds
                try:
                    # in a thread of its own kind: those of requests may all be busy
                    job_ids = list(self._of_job)
                    self._give(job_ids, await asyncio.to_thread(self._tail.read, job_ids))
                    if self._tail.has_begun:
                        self._started.set()
                except Exception:
                    pause = ERROR_SECONDS
                    log.exception("streams: a look at the database failed; the next one comes in %.0f s", pause)
                await asyncio.sleep(pause)
        finally:
            self._task = None

    def _give(self, job_ids: list[str], batch: Batch) -> None:
        for told in batch.seen:
            for subscription in self._of_job.get(told.view.job_id, ()):
                subscription.add(told.id, told.of_job)
        for told in batch.settled:
            self._give_to_all(told)
        for job_id in job_ids:  # of others, whose streams were opened meanwhile, nothing is known yet
            for subscription in self._of_job.get(job_id, ()):
                subscription.follow(batch.states.get(job_id))

    def _give_to_all(self, told: Told) -> None:
        for subscription, project in self._of_all.items():
            if project in (None, told.view.project):
                subscription.add(told.id, told.of_all)


def end_of(state: State) -> bytes:
    return format_sse_event(data_str=f'{{"status":"{state.status}"}}', event="end")
