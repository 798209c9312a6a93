"""`python -m benchmarks.hour`: the memory of the API and of the dispatcher before and after an hour's worth of load.

What an hour brings is played 20 times as fast, or as fast as it is taken: 50 jobs that report every ten seconds, six short ones that
are submitted each minute, three dashboards that poll every other second, and 20 open streams, of which one breaks off each second. Ten
minutes of the same go before the first measurement, so that what is loaded once is loaded. The jobs run on the stand-in. Prints one JSON
line for each database. Memory is a process's own (USS), without what it shares with others.
"""

import argparse
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil

from benchmarks.reattach import spec
from service.client import Json
from service.processes import Child
from tests.stand_in.script import Script
from tests.stand_in.stage import Stage, own_servers, stage
from workers.contract import JobStatus

GOAL_MIB = 32  # of growth, of each process
FASTER = 20
WARM_UP = 1 / 6  # of the load
NUM_LONG_JOBS = 50
SECONDS_PER_REPORT, STEPS_PER_SECOND = 10, 2
SECONDS_PER_SHORT_JOB = 10
NUM_DASHBOARDS, SECONDS_PER_POLL = 3, 2
NUM_STREAMS = 20
UNFINISHED = [status.value for status in JobStatus if not status.is_terminal]


def measure(made: Stage, *, seconds: int, num_long_jobs: int = NUM_LONG_JOBS) -> Json:
    """The JSON line. seconds: how much is played. The stage's jobs are to report every SECONDS_PER_REPORT / FASTER seconds."""
    made.dispatchers[0].start()
    play(made, num_long_jobs, max(int(seconds * WARM_UP), SECONDS_PER_SHORT_JOB))
    before = _mib(made.api), _mib(made.dispatchers[0])
    began = time.monotonic()
    num_requests = play(made, num_long_jobs, seconds)
    wall = time.monotonic() - began
    after = _mib(made.api), _mib(made.dispatchers[0])
    return {
        "name": "hour",
        "unit": "MiB",
        "value": round(after[0] - before[0], 1),
        "goal": GOAL_MIB,
        "api": {"before": before[0], "after": after[0]},
        "dispatcher": {"before": before[1], "after": after[1], "growth": round(after[1] - before[1], 1)},
        "seconds_played": seconds,
        "seconds": round(wall),
        "num_jobs": num_long_jobs + seconds // SECONDS_PER_SHORT_JOB,
        "num_requests_of_users": num_requests,
        "device": "cpu",
        "database": made.database,
    }


def play(made: Stage, num_long_jobs: int, seconds: int) -> int:
    """The number of the users' requests; all jobs have succeeded then."""
    long = Script(num_steps=seconds * STEPS_PER_SECOND, step_seconds=1 / STEPS_PER_SECOND / FASTER)
    with _client(made) as client:
        jobs = [_submit(client, long) for _ in range(num_long_jobs)]
    parts: list[Callable[[], int]] = [
        lambda: _short_jobs(made, seconds // SECONDS_PER_SHORT_JOB),
        *itertools.repeat(lambda: _dashboard(made, jobs, seconds // SECONDS_PER_POLL), NUM_DASHBOARDS),
        lambda: _streams(made, jobs, seconds),
    ]
    with ThreadPoolExecutor(len(parts)) as pool:
        num_requests = sum(future.result() for future in [pool.submit(part) for part in parts])
    with _client(made) as client:
        while client.get("/v1/jobs", params={"status": UNFINISHED, "limit": 1}).json()["jobs"]:
            time.sleep(0.5)
        assert {client.get(f"/v1/jobs/{job}").json()["status"] for job in jobs} == {"succeeded"}
    return num_long_jobs + num_requests


def _client(made: Stage) -> httpx.Client:
    return httpx.Client(base_url=made.url, headers={"Authorization": f"Bearer {made.token}"}, trust_env=False, timeout=60)


def _submit(client: httpx.Client, script: Script) -> str:
    answer = client.post("/v1/jobs", json=spec(script)).raise_for_status()
    return str(answer.json()["id"])


def _short_jobs(made: Stage, number: int) -> int:
    with _client(made) as client:
        for _ in _paced(number, SECONDS_PER_SHORT_JOB):
            _submit(client, Script(num_steps=2, step_seconds=0.05))
    return number


def _dashboard(made: Stage, jobs: list[str], number: int) -> int:
    """A list, the job that is looked at, and its curves; what has not changed is answered 304."""
    etags: dict[str, str] = {}
    with _client(made) as client:
        for poll in _paced(number, SECONDS_PER_POLL):
            job = jobs[poll % len(jobs)]
            for path in ("/v1/jobs?limit=50", f"/v1/jobs/{job}", f"/v1/jobs/{job}/metrics?max_points=500"):
                answer = client.get(path, headers={"If-None-Match": etags[path]} if path in etags else {})
                assert answer.status_code in (200, 304), answer.text
                etags[path] = answer.headers["ETag"]
    return 3 * number


def _streams(made: Stage, jobs: list[str], number: int) -> int:
    """NUM_STREAMS are open; each new one takes the place of the oldest, which breaks off."""
    streams: deque[httpx.Client] = deque()
    for place in _paced(number, 1):
        client = _client(made)
        path = f"/v1/jobs/{jobs[place % len(jobs)]}/events" if place % 2 else "/v1/events"
        answer = client.send(client.build_request("GET", path, headers={"Accept": "text/event-stream"}), stream=True)
        assert answer.status_code == 200
        streams.append(client)
        if len(streams) > NUM_STREAMS:
            streams.popleft().close()
    for client in streams:
        client.close()
    return number


def _paced(number: int, seconds: float) -> Iterator[int]:
    """0, 1, 2, … each at its time, or as soon as that before it is done."""
    began = time.monotonic()
    for place in range(number):
        time.sleep(max(began + place * seconds / FASTER - time.monotonic(), 0.0))
        yield place


def _mib(process: Child) -> float:
    return round(psutil.Process(process.pid).memory_full_info().uss / 2**20, 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hour", description=__doc__)
    parser.add_argument("--databases", nargs="*", choices=["sqlite", "postgresql"], default=["sqlite", "postgresql"])
    parser.add_argument("--seconds", type=int, default=3600, help="how much is played")
    given = parser.parse_args()
    for name in given.databases:
        with (
            own_servers(database=name) as (folder, run, storage, postgres),
            stage(folder, storage=storage, postgres=postgres, run=run, report_seconds=SECONDS_PER_REPORT / FASTER) as made,
        ):
            print(json.dumps(measure(made, seconds=given.seconds)), flush=True)


if __name__ == "__main__":
    main()
