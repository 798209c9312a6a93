"""`python -m benchmarks.ingest`: how many points a second the API takes, by `POST …/reports` over HTTP, of four jobs at once.

A full report has 1,000 steps of five series, as after an outage; a live one 10 steps, as of a run that tells of 20 a second. Prints a JSON
line for each sort of report and each database.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks import told
from service import metrics
from service.client import Json
from service.db import Database
from tests.stand_in.stage import Stage, own_servers, stage
from workers.contract import MAX_POINTS

GOAL_POINTS_PER_SECOND = 100_000
NUM_JOBS = 4
LIVE_STEPS = 10


def measure(made: Stage, *, num_steps: int, num_reports: int) -> Json:
    """The JSON line for reports of `num_steps` steps, `num_reports` of each job."""
    database = Database(made.database_url)
    jobs = [told.running_job(database) for _ in range(NUM_JOBS)]
    bodies = [told.report(sequence, num_steps=num_steps) for sequence in range(num_reports)]
    busy, began = told.cpu_seconds(made.api.pid), time.monotonic()
    with ThreadPoolExecutor(NUM_JOBS) as pool:
        seconds = [each for of_job in pool.map(lambda job: _post(made.url, job, bodies), jobs) for each in of_job]
    wall, busy = time.monotonic() - began, told.cpu_seconds(made.api.pid) - busy
    with database.read() as session:
        newest = [metrics.read(session, job, names=["loss"])["loss"].steps[-1] for job in jobs]
    database.close()
    assert newest == [num_reports * num_steps - 1] * NUM_JOBS
    num_points = num_reports * NUM_JOBS * num_steps * len(told.SERIES)
    return {
        "name": "ingest",
        "unit": "points/s",
        "value": round(num_points / wall),
        "goal": GOAL_POINTS_PER_SECOND,
        "of_processor_second": round(num_points / busy),
        "steps_per_report": num_steps,
        "points_per_report": num_steps * len(told.SERIES),
        "bytes_per_report": len(bodies[-1]),
        "reports_per_second": round(len(seconds) / wall, 1),
        "seconds_per_report": {"p50": told.percentile(seconds, 50), "p95": told.percentile(seconds, 95)},
        "num_reports": len(seconds),
        "device": "cpu",
        "database": made.database,
    }


def _post(url: str, job: str, bodies: list[bytes]) -> list[float]:
    """Seconds of each, one after the other."""
    seconds = []
    with told.reporter(url, job) as reporter:
        for body in bodies:
            began = time.monotonic()
            reporter.post("reports", content=body).raise_for_status()
            seconds.append(time.monotonic() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ingest", description=__doc__)
    parser.add_argument("--databases", nargs="*", choices=["sqlite", "postgresql"], default=["sqlite", "postgresql"])
    parser.add_argument("--reports", type=int, default=100, help="full ones, of each job; and three times as many live ones")
    given = parser.parse_args()
    for name in given.databases:
        with (
            own_servers(database=name) as (folder, run, storage, postgres),
            stage(folder, storage=storage, postgres=postgres, run=run, secret_key=told.SECRET_KEY) as made,
        ):
            for num_steps, num_reports in ((MAX_POINTS, given.reports), (LIVE_STEPS, 3 * given.reports)):
                print(json.dumps(measure(made, num_steps=num_steps, num_reports=num_reports)), flush=True)


if __name__ == "__main__":
    main()
