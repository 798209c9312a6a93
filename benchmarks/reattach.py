"""`python -m benchmarks.reattach`: after API and dispatcher were killed, until every running job has been looked at again.

The jobs run on the stand-in of Ray's Jobs API (`tests/stand_in`), which goes on meanwhile. API and dispatcher get kill -9 and are started
again; the clock runs from that start until a dispatcher has asked Ray for every job, and written down what it heard. Prints one JSON line
for each database.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from sqlalchemy import func, select

from benchmarks.waiting import wait
from service.client import Json
from service.db import Database, utc_now
from service.models import JobRow
from tests.stand_in.script import Script
from tests.stand_in.stage import Stage, own_servers, stage
from workers.contract import JobStatus

GOAL_SECONDS = 10.0
PATIENCE_SECONDS = 600.0
_DOWN_SECONDS = 2.0  # long enough for every job to be due when the dispatcher comes back
_LONG = Script(num_steps=1000, step_seconds=20.0)


def spec(script: Script, *, num_workers: int = 1) -> Json:
    """A job for the stand-in."""
    return {
        "kind": "pretrain",
        "name": "simulated",
        "labels": script.labels(),
        "model": {"arch": "vit_tiny_patch4", "image_size": 8, "in_chans": 1},
        "data": {"source": "digits"},
        "optim": {"epochs": 1, "batch_size": 64, "warmup_epochs": 0},
        "checkpoint": {"every_steps": 1_000_000},
        "resources": {"num_workers": num_workers},
    }


def submit_all(made: Stage, specs: list[Json]) -> list[Json]:
    with made.client() as client, ThreadPoolExecutor(4) as pool:
        return list(pool.map(client.submit, specs))


def measure(made: Stage, *, num_jobs: int, repeats: int) -> Json:
    """The JSON line."""
    database = Database(made.database_url)
    made.dispatchers[0].start()
    submit_all(made, [spec(_LONG) for _ in range(num_jobs)])
    wait(lambda: count(database, JobRow.status == JobStatus.RUNNING) == num_jobs, what="all jobs running", seconds=PATIENCE_SECONDS)
    seconds = [_restart(made, database) for _ in range(repeats)]
    database.close()
    first, last = ([each[place] for each in seconds] for place in (0, 1))
    return {
        "name": "reattach",
        "unit": "s",
        "value": round(statistics.median(last), 2),
        "goal": GOAL_SECONDS,
        "first_job": round(statistics.median(first), 2),
        "repeats": [round(each, 2) for each in last],
        "num_jobs": num_jobs,
        "device": "cpu",
        "database": made.database,
    }


def _restart(made: Stage, database: Database) -> tuple[float, float]:
    """Seconds from the start of API and dispatcher until the first and until the last job has been looked at."""
    for child in (made.api, made.dispatchers[0]):
        child.kill()
    time.sleep(_DOWN_SECONDS)
    at, began = utc_now(), time.monotonic()
    num_jobs = _not_seen(database, at)
    for child in (made.api, made.dispatchers[0]):
        child.start()
    wait(lambda: _not_seen(database, at) < num_jobs, what="a first look", seconds=PATIENCE_SECONDS)
    first = time.monotonic() - began
    wait(lambda: _not_seen(database, at) == 0, what="a look at every job", seconds=PATIENCE_SECONDS)
    return first, time.monotonic() - began


def _not_seen(database: Database, at: datetime) -> int:
    """How many jobs are still due since before `at`: a look at a job makes it due again later."""
    return count(database, JobRow.due_at <= at)


def count(database: Database, condition: Any) -> int:
    """Of jobs."""
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(JobRow).where(condition)) or 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reattach", description=__doc__)
    parser.add_argument("--databases", nargs="*", choices=["sqlite", "postgresql"], default=["sqlite", "postgresql"])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    for name in given.databases:
        with (
            own_servers(database=name) as (folder, run, storage, postgres),
            stage(folder, storage=storage, postgres=postgres, run=run, num_cpus=given.jobs) as made,
        ):
            print(json.dumps(measure(made, num_jobs=given.jobs, repeats=given.repeats)), flush=True)


if __name__ == "__main__":
    main()
