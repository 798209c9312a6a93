"""Open streams: of a job and of all jobs, over one feed; what they cost, when they are cut, and that none of them misses an event."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, text

from service import events, feed, streams
from service.db import utc_now
from service.errors import NotAuthenticated
from service.feed import Feed, Subscription
from service.models import JobRow
from service.tail import State, Tail
from service.tokens import Role
from tests.unit.access import bearer, make_token
from tests.unit.service_fixtures import Service
from tests.unit.test_events import Message, finish, parse, progress
from workers.contract import EventType, JobStatus


class Reader:
    """Reads a stream in the background, as a client does."""

    def __init__(self, stream: AsyncIterator[bytes]) -> None:
        self._stream = stream
        self.messages: list[Message] = []
        self.pings = 0
        self._task = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for chunk in self._stream:
            self.messages += parse(chunk.decode())
            self.pings += chunk == b": ping\n\n"

    async def until(self, is_there: Callable[["Reader"], bool]) -> None:
        async with asyncio.timeout(30):
            while not is_there(self):
                assert not self._task.done(), (self._task, self.kinds[-3:])
                await asyncio.sleep(0.005)

    async def ended(self) -> None:
        await asyncio.wait_for(self._task, 30)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def kinds(self) -> list[str]:
        return [message["event"] for message in self.messages]

    @property
    def ids(self) -> list[int]:
        return [int(message["id"]) for message in self.messages if "id" in message]


def quick(service: Service) -> Feed:
    return Feed(service.database, poll_seconds=0.01)


def add(service: Service, job_id: str, number: int = 1) -> list[int]:
    """Some events; their ids."""
    with service.database.write() as session:
        session.get(JobRow, job_id, with_for_update=True)
        for each in range(number):
            events.append(session, job_id, EventType.EVALUATED, {"n": each}, at=utc_now())
    return [row.id for row in service.events(job_id)][-number:]


def test_a_live_stream_tells_what_happens(service: Service) -> None:
    job_id = service.start()

    async def follow() -> Reader:
        reader = Reader(streams.of_job(quick(service), job_id, after=0, authorize=bool))
        for step, number in ((1, 6), (2, 7)):
            progress(service, job_id, sequence=step, step=step)
            await reader.until(lambda reader, number=number: len(reader.messages) == number)  # type: ignore[misc]
        finish(service, job_id)
        await reader.ended()
        return reader

    reader = asyncio.run(follow())
    assert reader.kinds == ["event"] * 5 + ["progress"] * 2 + ["event"] * 3 + ["end"]
    assert reader.ids == [row.id for row in service.events(job_id)]
    assert [message["data"]["step"] for message in reader.messages if message["event"] == "progress"] == [1, 2]


def test_many_streams_cost_one_look(service: Service) -> None:
    """As many statements for a hundred streams as for one, and none when there are no streams."""
    ids = [service.submit() for _ in range(10)]
    asked: list[str] = []

    async def follow() -> None:
        made = quick(service)
        readers = [Reader(streams.of_job(made, job_id, after=0, authorize=bool)) for job_id in ids * 10]
        everybody = [Reader(streams.of_all(made, None, after=0, authorize=bool)) for _ in range(10)]
        for reader in (*readers, *everybody):
            await reader.until(lambda reader: bool(reader.messages) and made.num_clients == 110)
        last = [add(service, job_id)[0] for job_id in ids]
        for number, reader in enumerate(readers):  # all are where only the feed speaks to them
            await reader.until(lambda reader, number=number: last[number % 10] in reader.ids)  # type: ignore[misc]
        asked.clear()
        looks = _counted(made)
        [new] = add(service, ids[3])
        for reader in (*readers[3::10], *everybody):
            await reader.until(lambda reader: new in reader.ids)
        assert len([statement for statement in asked if statement.startswith("SELECT")]) <= 4 * (len(looks) + 1) + 10
        assert all(new not in reader.ids for reader in readers[4::10])
        for reader in (*readers, *everybody):
            await reader.close()
        assert made.num_clients == 0
        task = made._task
        assert task is not None
        await asyncio.wait_for(task, 30)
        asked.clear()
        await made.close()
        assert asked == []

    event.listen(service.database.engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    asyncio.run(follow())


def _counted(made: Feed) -> list[int]:
    looks: list[int] = []
    read = made._tail.read

    def counted(job_ids: Any) -> Any:
        looks.append(len(job_ids))
        return read(job_ids)

    made._tail.read = counted  # type: ignore[method-assign]
    return looks


def test_a_quiet_stream_is_kept_open_by_comments(service: Service) -> None:
    job_id = service.start()
    seconds = iter(range(0, 100_000, 6))

    async def follow() -> None:
        clock = lambda: float(next(seconds))  # noqa: E731
        for stream in (
            streams.of_job(quick(service), job_id, after=10**6, authorize=bool, clock=clock),
            streams.of_all(quick(service), None, after=None, authorize=bool, clock=clock),
        ):
            reader = Reader(stream)
            await reader.until(lambda reader: reader.pings >= 3)
            assert reader.messages == []
            await reader.close()

    asyncio.run(follow())


def test_the_stream_of_all_jobs(service: Service) -> None:
    ours, theirs = service.submit(project="ours"), service.submit(project="theirs")

    async def follow() -> tuple[Reader, ...]:
        made = quick(service)
        from_now, everything = (
            Reader(streams.of_all(made, None, after=None, authorize=bool)),
            Reader(streams.of_all(made, None, after=0, authorize=bool)),
        )
        of_ours = Reader(streams.of_all(made, "ours", after=0, authorize=bool))
        await everything.until(lambda reader: len(reader.messages) == 2)
        await of_ours.until(lambda reader: len(reader.messages) == 1)
        for job_id in (theirs, ours):
            add(service, job_id, 3)
        await everything.until(lambda reader: len(reader.messages) == 8)
        await of_ours.until(lambda reader: len(reader.messages) == 4)
        await from_now.until(lambda reader: len(reader.messages) == 6)
        later = Reader(streams.of_all(made, None, after=everything.ids[4], authorize=bool))
        await later.until(lambda reader: len(reader.messages) == 3)
        for reader in (from_now, everything, of_ours, later):
            await reader.close()
        return from_now, everything, of_ours, later

    from_now, everything, of_ours, later = asyncio.run(follow())
    ids = sorted(row.id for job_id in (ours, theirs) for row in service.events(job_id))
    assert everything.ids == ids
    assert from_now.ids == ids[2:]
    assert later.ids == ids[5:]
    assert of_ours.ids == [row.id for row in service.events(ours)]
    assert {(message["data"]["job_id"], message["data"]["project"]) for message in of_ours.messages} == {(ours, "ours")}
    assert {message["data"]["project"] for message in everything.messages} == {"ours", "theirs"}
    assert set(everything.messages[0]["data"]) == {"id", "type", "at", "attempt", "data", "job_id", "project"}


def test_a_long_past_comes_in_pages_and_the_present_after_it(service: Service) -> None:
    job_id = service.submit()
    add(service, job_id, 2 * streams.PAGE + 50)

    async def follow() -> None:
        made = quick(service)
        readers = [
            Reader(streams.of_job(made, job_id, after=0, authorize=bool)),
            Reader(streams.of_all(made, None, after=0, authorize=bool)),
        ]
        for reader in readers:
            await reader.until(lambda reader: len(reader.messages) >= 2 * streams.PAGE + 51)
        add(service, job_id, 2)
        for reader in readers:
            await reader.until(lambda reader: len(reader.messages) == 2 * streams.PAGE + 53)
            assert reader.ids == [row.id for row in service.events(job_id)]
            await reader.close()

    asyncio.run(follow())


def test_who_is_too_slow_is_cut_off_and_misses_nothing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MAX_WAITING", 5)
    job_id = service.submit()

    async def follow() -> None:
        made = quick(service)
        stream = streams.of_job(made, job_id, after=0, authorize=bool)
        told = parse((await anext(stream)).decode())
        other = Reader(streams.of_all(made, None, after=None, authorize=bool))
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.to_thread(add, service, job_id, 1)
        told += parse((await asyncio.wait_for(waiting, 30)).decode())
        for _ in range(20):  # nobody takes them
            [new] = await asyncio.to_thread(add, service, job_id, 1)
            await other.until(lambda reader, new=new: new in reader.ids)  # type: ignore[misc]
        await other.close()
        async for chunk in stream:
            told += parse(chunk.decode())
        assert made.num_clients == 0
        assert [message["event"] for message in told] == ["event"] * len(told)
        ids = [int(message["id"]) for message in told]
        everything = [row.id for row in service.events(job_id)]
        assert ids == everything[: len(ids)]
        assert len(ids) < len(everything)
        again = Reader(streams.of_job(made, job_id, after=ids[-1], authorize=bool))
        await again.until(lambda reader: len(reader.messages) == len(everything) - len(ids))
        await again.close()

    asyncio.run(follow())


def test_only_the_newest_progress_waits() -> None:
    async def take() -> bytes:
        subscription = Subscription()
        for text_ in ('{"step":1}', '{"step":2}', '{"step":2}'):
            subscription.follow(State(JobStatus.RUNNING, text_))
        chunk, after, is_over = subscription.take(after=7)
        assert (after, is_over) == (7, False)
        subscription.follow(State(JobStatus.RUNNING, '{"step":2}'))
        assert subscription.take(after=7)[0] == b""
        return chunk

    assert asyncio.run(take()) == b'event: progress\ndata: {"step":2}\n\n'


def test_a_feed_survives_the_databases_absence(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "ERROR_SECONDS", 0.01)
    job_id = service.submit()

    async def follow() -> None:
        made = quick(service)
        reader = Reader(streams.of_job(made, job_id, after=0, authorize=bool))
        await reader.until(lambda reader: len(reader.messages) == 1)
        read, failures = made._tail.read, []

        def fail(job_ids: Any) -> Any:
            failures.append(job_ids)
            if len(failures) < 4:
                raise ConnectionError
            return read(job_ids)

        await reader.until(lambda reader: made.num_clients == 1)
        monkeypatch.setattr(made._tail, "read", fail)
        await reader.until(lambda reader: len(failures) >= 4)
        add(service, job_id)
        await reader.until(lambda reader: len(reader.messages) == 2)
        await reader.close()

    asyncio.run(follow())


def test_the_stream_of_all_ends_with_its_token(service: Service) -> None:
    seconds = iter(range(0, 10_000, 10))

    def refuse() -> None:
        raise NotAuthenticated

    async def follow() -> list[bytes]:
        stream = streams.of_all(quick(service), None, after=None, authorize=refuse, clock=lambda: float(next(seconds)))
        return [chunk async for chunk in stream]

    assert asyncio.run(follow()) == []


def test_the_route_of_all_jobs(client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    async def stream(feed: Feed, project: str | None, *, after: int | None, authorize: Callable[[], object]) -> AsyncIterator[bytes]:
        made.append((project, after))
        authorize()
        yield b": ping\n\n"

    monkeypatch.setattr(streams, "of_all", stream)
    reader, accept = bearer(make_token(service, Role.READER, "ours")), {"Accept": "text/event-stream"}
    answer = client.get("/v1/events", headers=reader | accept, params={"after": 3})
    assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    client.get("/v1/events", headers=reader | accept | {"Last-Event-ID": "9"}, params={"after": 3, "project": "ours"})
    client.get("/v1/events", headers=accept)
    client.get("/v1/events", headers=accept, params={"project": "theirs"})
    assert made == [("ours", 3), ("ours", 9), (None, None), ("theirs", None)]
    assert client.get("/v1/events", headers=reader | accept, params={"project": "theirs"}).status_code == 403
    told = client.get("/v1/events", headers=reader)
    assert (told.status_code, told.json()["type"]) == (406, "urn:maestro:not-acceptable")


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_an_event_that_is_seen_late_is_passed_by_no_stream(service: Service) -> None:
    """Its id is lower than those that were seen before it. The others' own jobs tell them at once, all jobs' stream in order."""
    slow, quick_ = service.submit(), service.submit()
    tail = Tail(service.database)
    tail.read([])
    inserted, may_commit = threading.Event(), threading.Event()

    def write() -> None:
        with service.database.write() as session:
            session.get(JobRow, slow, with_for_update=True)
            events.append(session, slow, EventType.EVALUATED, {}, at=utc_now())
            session.flush()
            inserted.set()
            may_commit.wait(30)

    thread = threading.Thread(target=write)
    thread.start()
    assert inserted.wait(30)
    later = add(service, quick_, 2)
    first, second = tail.read([]), tail.read([])
    may_commit.set()
    thread.join(30)
    third = tail.read([])
    late = service.events(slow)[-1].id
    assert late < later[0]
    assert [told.id for told in first.seen] == later
    assert first.settled == second.seen == second.settled == []
    assert [told.id for told in third.seen] == [late]
    assert [told.id for told in third.settled] == [late, *later]


def test_from_now_on_is_not_before(service: Service) -> None:
    """Also where there are gaps in the ids of the past, as those of transactions that were given up."""
    job_id = service.submit()
    ids = add(service, job_id, 5)
    with service.database.write() as session:
        session.execute(text(f"DELETE FROM events WHERE id = {ids[2]}"))

    async def follow() -> list[int]:
        made = quick(service)
        reader = Reader(streams.of_all(made, None, after=None, authorize=bool))
        await reader.until(lambda reader: made._started.is_set())
        [new] = add(service, job_id)
        await reader.until(lambda reader: new in reader.ids)
        await reader.close()
        return [number - new for number in reader.ids]

    assert asyncio.run(follow()) == [0]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_gap_that_nobody_will_fill_is_passed(service: Service) -> None:
    job_id = service.submit()
    tail = Tail(service.database)
    tail.read([])
    with service.database.write() as session:
        events.append(session, job_id, EventType.EVALUATED, {}, at=utc_now())
        session.flush()
        session.rollback()
    ids = add(service, job_id, 2)
    assert ids[0] > tail.horizon + 1
    told = [told.id for _ in range(2) for told in tail.read([]).settled]
    assert told == ids


def test_no_stream_misses_an_event_of_many_writers(service: Service) -> None:
    jobs = [service.submit() for _ in range(4)]
    tail, found, stop = Tail(service.database), list[int](), threading.Event()
    tail.read([])
    begin = tail.horizon

    def write(job_id: str) -> None:
        for number in range(25):
            with service.database.write() as session:
                session.get(JobRow, job_id, with_for_update=True)
                events.append(session, job_id, EventType.EVALUATED, {"n": number}, at=utc_now())
                session.flush()
                if number % 5 == 0:
                    session.execute(text("SELECT 1"))
                    session.rollback()

    def read() -> None:
        while True:
            is_last = stop.is_set()
            found.extend(told.id for told in tail.read([]).settled)
            if is_last:
                return

    threads = [threading.Thread(target=write, args=(job_id,)) for job_id in jobs]
    reader = threading.Thread(target=read)
    for thread in (reader, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    stop.set()
    reader.join(60)
    found += [told.id for _ in range(4) for told in tail.read([]).settled]
    expected = sorted(row.id for job_id in jobs for row in service.events(job_id) if row.id > begin)
    assert found == expected
    assert len(expected) == 4 * 20


def test_an_event_of_another_project_is_not_in_the_stream(service: Service) -> None:
    mine, theirs = service.submit(project="ours"), service.submit(project="theirs")

    async def follow() -> list[Message]:
        made = quick(service)
        reader, other = (Reader(streams.of_all(made, project, after=0, authorize=bool)) for project in ("ours", None))
        await reader.until(lambda reader: len(reader.messages) == 1)
        add(service, theirs)
        [last] = add(service, mine)
        for each in (reader, other):
            await each.until(lambda reader: last in reader.ids)
            await each.close()
        return reader.messages

    assert theirs not in json.dumps(asyncio.run(follow()))
