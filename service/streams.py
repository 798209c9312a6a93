"""Server-sent events: of a job until its end, or of all jobs of a project. First what was, from the database; then what the feed brings."""

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.concurrency import run_in_threadpool

from service import events
from service.db import Database
from service.errors import Problem
from service.feed import Feed, Subscription, end_of
from service.tail import list_all_after, message_of
from service.views import JobEventView

PAGE = 200
HEARTBEAT_SECONDS = 15.0
AUTHORIZED_SECONDS = 15.0  # a token that is revoked ends its streams so much later
Authorize = Callable[[], object]


@dataclass
class _Place:
    """What a stream has told already."""

    after: int
    progress: str = ""
    is_over: bool = False


async def of_job(
    feed: Feed, job_id: str, *, after: int, authorize: Authorize, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[bytes]:
    """Until the job has ended, or `authorize`, called again and again, raises a Problem: who comes back is told which."""
    place = _Place(after)
    async for chunk in _job_until_now(feed.database, job_id, place):
        yield chunk
    if place.is_over:
        return
    with feed.of_job(job_id) as subscription:
        async for chunk in _job_until_now(feed.database, job_id, place):  # what came before the feed knew of this stream
            yield chunk
        if place.is_over:
            return
        subscription.know(place.progress)
        async for chunk in _live(subscription, place, authorize=authorize, clock=clock):
            yield chunk


async def of_all(
    feed: Feed, project: str | None, *, after: int | None, authorize: Authorize, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[bytes]:
    """After an id, or from now on (None), without an end; project None: of all."""
    with feed.of_all(project) as subscription:
        await feed.started()
        begin = feed.horizon
        place = _Place(begin if after is None else after)
        async for chunk in _all_until(feed.database, project, place, upto=begin):
            yield chunk
        async for chunk in _live(subscription, place, authorize=authorize, clock=clock):
            yield chunk


async def _job_until_now(database: Database, job_id: str, place: _Place) -> AsyncIterator[bytes]:
    while True:
        news = await run_in_threadpool(events.look, database, job_id, after=place.after, limit=PAGE)
        parts = [message_of(event) for event in news.events]
        place.after = news.events[-1].id if news.events else place.after
        is_page = len(news.events) == PAGE
        if news.state.progress != place.progress:
            place.progress = news.state.progress
            parts.append(format_sse_event(data_str=place.progress, event="progress"))
        if news.state.status.is_terminal and not is_page:
            place.is_over = True
            parts.append(end_of(news.state))
        if parts:
            yield b"".join(parts)
        if not is_page:
            return


async def _all_until(database: Database, project: str | None, place: _Place, *, upto: int) -> AsyncIterator[bytes]:
    while place.after < upto:
        page = await run_in_threadpool(_page_of_all, database, project, place.after, upto)
        place.after = page[-1].id if len(page) == PAGE else upto
        if page:
            yield b"".join(map(message_of, page))


def _page_of_all(database: Database, project: str | None, after: int, upto: int) -> list[JobEventView]:
    with database.read() as session:
        return list_all_after(session, project, after=after, limit=PAGE, upto=upto)


async def _live(subscription: Subscription, place: _Place, *, authorize: Authorize, clock: Callable[[], float]) -> AsyncIterator[bytes]:
    spoke_at = authorized_at = clock()
    while True:
        now = clock()
        if now - authorized_at >= AUTHORIZED_SECONDS:
            try:
                await run_in_threadpool(authorize)
            except Problem:
                return
            authorized_at = now
        chunk, place.after, is_over = subscription.take(after=place.after)
        if not chunk and not is_over and now - spoke_at >= HEARTBEAT_SECONDS:
            chunk = KEEPALIVE_COMMENT
        if chunk:
            yield chunk
            spoke_at = now
        if is_over:
            return
        await subscription.wait(min(spoke_at + HEARTBEAT_SECONDS, authorized_at + AUTHORIZED_SECONDS) - clock())
