"""`python -m benchmarks.series`: how long it takes to read one series of 100,000 points, shown with 1,000, over HTTP.

The job has five series, told by full reports of 1,000 steps. Also of all five at once, and of an unchanged one that is asked for with its
ETag. Prints a JSON line for each database.
"""

import argparse
import json
import time

import httpx

from benchmarks import told
from service.client import Json
from service.db import Database
from tests.stand_in.stage import Stage, own_servers, stage
from workers.contract import MAX_POINTS

GOAL_SECONDS = 0.05


def measure(made: Stage, *, num_reports: int, num_reads: int, max_points: int = 1000) -> Json:
    """The JSON line for a job that told so many full reports."""
    database = Database(made.database_url)
    job = told.running_job(database)
    database.close()
    with told.reporter(made.url, job) as reporter:
        for sequence in range(num_reports):
            reporter.post("reports", content=told.report(sequence, num_steps=MAX_POINTS)).raise_for_status()
    url, headers = f"{made.url}/v1/jobs/{job}/metrics", {"Authorization": f"Bearer {made.token}"}
    with httpx.Client(headers=headers, timeout=60, trust_env=False) as client:
        one, all_series = {"names": "loss", "max_points": max_points}, {"max_points": max_points}
        first = client.get(url, params=one)
        assert first.json()["series"]["loss"]["steps"][-1] == num_reports * MAX_POINTS - 1
        tag = {"If-None-Match": first.headers["ETag"]}
        busy = told.cpu_seconds(made.api.pid)
        seconds = _read(client, url, one, num_reads=num_reads)
        busy = told.cpu_seconds(made.api.pid) - busy
        together = _read(client, url, all_series, num_reads=max(num_reads // 4, 2))
        unchanged = _read(client, url, one, num_reads=num_reads, headers=tag)
    return {
        "name": "series",
        "unit": "s",
        "value": told.percentile(seconds, 95),
        "goal": GOAL_SECONDS,
        "p50": told.percentile(seconds, 50),
        "processor_seconds": round(busy / num_reads, 4),
        "all_series": {"p50": told.percentile(together, 50), "p95": told.percentile(together, 95)},
        "unchanged": {"p50": told.percentile(unchanged, 50), "p95": told.percentile(unchanged, 95)},
        "num_points": num_reports * MAX_POINTS,
        "max_points": max_points,
        "bytes": len(first.content),
        "num_series": len(told.SERIES),
        "num_reads": num_reads,
        "device": "cpu",
        "database": made.database,
    }


def _read(client: httpx.Client, url: str, params: Json, *, num_reads: int, headers: dict[str, str] | None = None) -> list[float]:
    """Seconds of each, one after the other."""
    seconds = []
    for _ in range(num_reads):
        began = time.monotonic()
        answer = client.get(url, params=params, headers=headers)
        seconds.append(time.monotonic() - began)
        assert answer.status_code == (200 if headers is None else 304)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.series", description=__doc__)
    parser.add_argument("--databases", nargs="*", choices=["sqlite", "postgresql"], default=["sqlite", "postgresql"])
    parser.add_argument("--reports", type=int, default=100, help="of 1,000 steps")
    parser.add_argument("--reads", type=int, default=200)
    given = parser.parse_args()
    for name in given.databases:
        with (
            own_servers(database=name) as (folder, run, storage, postgres),
            stage(folder, storage=storage, postgres=postgres, run=run, secret_key=told.SECRET_KEY) as made,
        ):
            print(json.dumps(measure(made, num_reports=given.reports, num_reads=given.reads)), flush=True)


if __name__ == "__main__":
    main()
