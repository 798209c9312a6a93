"""`python -m benchmarks.watchers`: 1,000 open streams of events on one API process, while a writer makes events.

Half of them follow one job each, half follow all jobs. The API is a process of its own, the streams are connections to it; they are read,
and the events written, by this process. The lag of a message is the time from just before its event is written until it is read here.
Prints one JSON line for each database.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import psutil

from benchmarks.reattach import spec, submit_all
from service import events
from service.client import Json
from service.db import Database, utc_now
from service.models import JobRow
from service.processes import raise_open_files
from tests.stand_in.script import Script
from tests.stand_in.stage import Stage, own_servers, stage
from workers.contract import EventType

GOAL_SECONDS = 1.0
GOAL_BYTES = 500 * 2**20
NUM_JOBS = 20
PATIENCE_SECONDS = 300.0


def measure(made: Stage, *, num_clients: int, num_events: int, per_second: float) -> Json:
    """The JSON line."""
    ids = [job["id"] for job in submit_all(made, [spec(Script()) for _ in range(NUM_JOBS)])]
    assert made.api.pid is not None
    process, database = psutil.Process(made.api.pid), Database(made.database_url)
    alone = process.memory_info().rss
    began = process.cpu_times()
    lags, rss = asyncio.run(
        _watch(made, database, ids, num_clients=num_clients, num_events=num_events, per_second=per_second, process=process)
    )
    ended = process.cpu_times()
    database.close()
    centiles = statistics.quantiles(lags, n=100, method="inclusive")
    return {
        "name": "watchers",
        "unit": "s",
        "value": round(centiles[94], 3),
        "goal": GOAL_SECONDS,
        "p50": round(centiles[49], 3),
        "max": round(max(lags), 3),
        "rss_mib": {"value": round(rss / 2**20), "goal": GOAL_BYTES // 2**20, "without_clients": round(alone / 2**20)},
        "cpu_seconds": round(ended.user + ended.system - began.user - began.system, 1),
        "num_clients": num_clients,
        "num_messages": len(lags),
        "events_per_second": per_second,
        "device": "cpu",
        "database": made.database,
    }


async def _watch(
    made: Stage, database: Database, ids: list[str], *, num_clients: int, num_events: int, per_second: float, process: psutil.Process
) -> tuple[list[float], int]:
    """All lags, and the memory of the process at the end. Nobody is to miss a message."""
    lags: list[float] = []
    per_job = {job_id: len(range(number, num_events, len(ids))) for number, job_id in enumerate(ids)}
    wanted = [ids[number // 2 % len(ids)] if number % 2 else None for number in range(num_clients)]
    expected = sum(num_events if job_id is None else per_job[job_id] for job_id in wanted)
    clients = [asyncio.create_task(_client(made, job_id, lags)) for job_id in wanted]
    with httpx.Client(base_url=made.url, headers={"Authorization": f"Bearer {made.token}"}, trust_env=False, timeout=60) as figures:
        await _until(lambda: f"maestro_stream_clients {num_clients:.1f}" in figures.get("/metrics").text, clients, what="all streams open")
    for number in range(num_events):
        await asyncio.to_thread(_write, database, ids[number % len(ids)])
        await asyncio.sleep(1 / per_second)
    await _until(lambda: len(lags) >= expected, clients, what=f"{expected} messages")
    rss = process.memory_info().rss
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    assert len(lags) == expected
    return lags, rss


async def _client(made: Stage, job_id: str | None, lags: list[float]) -> None:
    """One connection, for ever. Only the events of this benchmark say when they were written."""
    parts = urlsplit(made.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    path = "/v1/events" if job_id is None else f"/v1/jobs/{job_id}/events"
    head = [f"GET {path} HTTP/1.1", f"Host: {parts.netloc}", f"Authorization: Bearer {made.token}", "Accept: text/event-stream", "", ""]
    writer.write("\r\n".join(head).encode())
    try:
        while line := await reader.readline():
            if line.startswith(b"data: ") and b'"written_at"' in line:
                lags.append(time.time() - json.loads(line[6:])["data"]["written_at"])
        raise ConnectionError("a stream has ended")
    finally:
        writer.close()


def _write(database: Database, job_id: str) -> None:
    with database.write() as session:
        written_at = time.time()
        session.get_one(JobRow, job_id, with_for_update=True)
        events.append(session, job_id, EventType.EVALUATED, {"written_at": written_at}, at=utc_now())


async def _until(condition: Callable[[], bool], clients: list[asyncio.Task[None]], *, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not await asyncio.to_thread(condition):
        for client in clients:
            if client.done():
                client.result()
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {PATIENCE_SECONDS:g} s: {what}")
        await asyncio.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watchers", description=__doc__)
    parser.add_argument("--databases", nargs="*", choices=["sqlite", "postgresql"], default=["sqlite", "postgresql"])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--events", type=int, default=60)
    parser.add_argument("--per-second", type=float, default=2.0)
    given = parser.parse_args()
    raise_open_files()
    for name in given.databases:
        with (
            own_servers(database=name) as (folder, run, storage, postgres),
            stage(folder, storage=storage, postgres=postgres, run=run) as made,
        ):
            line = measure(made, num_clients=given.clients, num_events=given.events, per_second=given.per_second)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
