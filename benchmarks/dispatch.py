"""`python -m benchmarks.dispatch`: from a job's submission until Ray has accepted its run, while 1,000 jobs wait that do not fit.

Ray is the stand-in of its Jobs API (`tests/stand_in`). Jobs that fit come one by one, each when the one before has ended. The time of
each is that from its row to the stand-in's acceptance: the claim, and all that comes before and after it. Prints one JSON line for each
database.
"""

import argparse
import json
import statistics

from benchmarks.reattach import PATIENCE_SECONDS, count, spec, submit_all
from benchmarks.waiting import wait
from service.client import Json
from service.db import Database
from service.models import AttemptRow, JobRow
from tests.stand_in.script import Script
from tests.stand_in.stage import Stage, own_servers, stage
from workers.contract import Reason

GOAL_SECONDS = 1.0
NUM_CPUS = 16
_SHORT = Script(num_steps=1, step_seconds=0.05, start_seconds=0.05)


def measure(made: Stage, *, num_waiting: int, num_jobs: int) -> Json:
    """The JSON line."""
    made.dispatchers[0].start()
    database = Database(made.database_url)
    submit_all(made, [spec(_SHORT, num_workers=2 * NUM_CPUS) for _ in range(num_waiting)])
    wait(
        lambda: count(database, JobRow.reason == Reason.WAITING_FOR_RESOURCES) == num_waiting,
        what="a reason of every job that waits",
        seconds=PATIENCE_SECONDS,
    )
    jobs = []
    with made.client() as client:
        for number in range(1, num_jobs + 1):
            jobs.append(client.submit(spec(_SHORT))["id"])
            _wait_for_ends(database, number)
    accepted = {life["metadata"]["job"]: life["began_at"] for life in made.ray.history()}
    with database.read() as session:
        queued = [session.get_one(JobRow, job).created_at for job in jobs]
        decided = [session.get_one(AttemptRow, (job, 1)).created_at for job in jobs]
    database.close()
    of_all, of_launch = ([accepted[job] - at.timestamp() for job, at in zip(jobs, times, strict=True)] for times in (queued, decided))
    return {
        "name": "dispatch",
        "unit": "s",
        "value": _percentile(of_all, 95),
        "goal": GOAL_SECONDS,
        "p50": _percentile(of_all, 50),
        "from_attempt_created": {"p50": _percentile(of_launch, 50), "p95": _percentile(of_launch, 95)},
        "num_jobs": num_jobs,
        "num_waiting": num_waiting,
        "device": "cpu",
        "database": made.database,
    }


def _wait_for_ends(database: Database, number: int) -> None:
    wait(lambda: count(database, JobRow.finished_at.is_not(None)) == number, what="the end of a job", seconds=PATIENCE_SECONDS)


def _percentile(values: list[float], percent: int) -> float:
    return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1], 3)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dispatch", description=__doc__)
    parser.add_argument("--databases", nargs="*", choices=["sqlite", "postgresql"], default=["sqlite", "postgresql"])
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=100)
    given = parser.parse_args()
    for name in given.databases:
        with (
            own_servers(database=name) as (folder, run, storage, postgres),
            stage(folder, storage=storage, postgres=postgres, run=run, num_cpus=NUM_CPUS) as made,
        ):
            print(json.dumps(measure(made, num_waiting=given.waiting, num_jobs=given.jobs)), flush=True)


if __name__ == "__main__":
    main()
