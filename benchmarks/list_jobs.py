"""`python -m benchmarks.list_jobs`: lists of jobs over HTTP, when there are a thousand jobs, and a hundred thousand.

The jobs are written in bulk (`tests/many_jobs`); the API is a process of its own, and one client asks, one question after the other. Prints
one JSON line for each number of jobs and database: `value` is the worst p95 of all questions, `bytes` the largest answer.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator

import httpx

from service.client import Json
from service.db import Database
from tests.many_jobs import APART, FIRST, TEAMS, fill
from tests.stand_in.stage import Stage, own_servers, stage

GOAL_SECONDS = 0.1
GOAL_BYTES = 100_000
SIZES = (1_000, 20_000, 100_000)
_WARM_UP = 3

Params = dict[str, str | list[str]]


def questions(num_jobs: int, chance: random.Random) -> dict[str, Callable[[], Params]]:
    """Each asks another time for something else of its sort."""

    def at() -> str:
        return (FIRST + chance.randrange(num_jobs) * APART).isoformat()

    def team() -> str:
        return chance.choice(TEAMS)

    def one() -> str:
        return f"run{chance.randrange(num_jobs)}"

    return {
        "first page": dict,
        "project": lambda: {"project": chance.choice(["default", "cells", "rare"])},
        "status": lambda: {"status": chance.choice(["succeeded", "failed", "paused"])},
        "statuses in a project": lambda: {"status": ["failed", "cancelled", "paused"], "project": "cells"},
        "kind": lambda: {"kind": chance.choice(["pretrain", "embed", "evaluate"])},
        "label": lambda: {"label": f"team:{team()}"},
        "rare label": lambda: {"label": f"sweep:{chance.randrange(max(num_jobs // 50, 1))}"},
        "labels": lambda: {"label": [f"team:{team()}", f"sweep:{chance.randrange(max(num_jobs // 50, 1))}"]},
        "before": lambda: {"created_before": at()},
        "after": lambda: {"created_after": at()},
        "text: one job": lambda: {"text": one()},
        "text: a quarter of all": lambda: {"text": team()[:3]},
        "text: two words": lambda: {"text": f"{team()} {one()}"},
        "text: none": lambda: {"text": f"zebra{chance.randrange(999)}"},
        "all together": lambda: {
            "project": "cells",
            "status": ["failed", "succeeded"],
            "kind": "probe",
            "label": f"team:{team()}",
            "text": team()[:3],
            "created_after": at(),
        },
        "four fields": lambda: {"fields": "id,name,status,created_at", "project": "default"},
    }


def measure(made: Stage, *, sizes: tuple[int, ...], repeats: int) -> Iterator[Json]:
    """A JSON line for each size; the jobs of one stay for the next."""
    database = Database(made.database_url)
    there = 0
    for size in sizes:
        fill(database, size - there, start=there)
        there = size
        headers = {"Authorization": f"Bearer {made.token}"}
        with httpx.Client(base_url=made.url, headers=headers, trust_env=False, timeout=60) as client:
            yield _line(client, size, repeats) | {"device": "cpu", "database": made.database}
    database.close()


def _line(client: httpx.Client, num_jobs: int, repeats: int) -> Json:
    seconds: dict[str, list[float]] = {}
    largest = 0
    for name, ask in questions(num_jobs, random.Random(num_jobs)).items():
        for number in range(_WARM_UP + repeats):
            answer, took = _timed(client, "/v1/jobs", ask())
            if number >= _WARM_UP:
                seconds.setdefault(name, []).append(took)
                largest = max(largest, len(answer.content))
    cursor = None
    for _ in range(repeats):
        answer, took = _timed(client, "/v1/jobs", {} if cursor is None else {"cursor": cursor})
        seconds.setdefault("next page", []).append(took)
        cursor = answer.json()["next_cursor"]
    path = f"/v1/jobs/{answer.json()['jobs'][0]['id']}"
    tag = client.get(path).headers["etag"]
    seconds["an unchanged job (304)"] = [_timed(client, path, {}, etag=tag)[1] for _ in range(repeats)]
    percentiles = {name: {"p50": _percentile(each, 50), "p95": _percentile(each, 95)} for name, each in seconds.items()}
    return {
        "name": "list_jobs",
        "unit": "s",
        "value": max(each["p95"] for each in percentiles.values()),
        "goal": GOAL_SECONDS,
        "bytes": largest,
        "goal_bytes": GOAL_BYTES,
        "num_jobs": num_jobs,
        "questions": percentiles,
    }


def _timed(client: httpx.Client, path: str, params: Params, *, etag: str | None = None) -> tuple[httpx.Response, float]:
    began = time.perf_counter()
    answer = client.get(path, params=params, headers={} if etag is None else {"If-None-Match": etag})
    took = time.perf_counter() - began
    assert answer.status_code == (200 if etag is None else 304), answer.text
    return answer, took


def _percentile(values: list[float], percent: int) -> float:
    return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1], 4)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.list_jobs", description=__doc__)
    parser.add_argument("--databases", nargs="*", choices=["sqlite", "postgresql"], default=["sqlite", "postgresql"])
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=40)
    given = parser.parse_args()
    for name in given.databases:
        with (
            own_servers(database=name) as (folder, run, storage, postgres),
            stage(folder, storage=storage, postgres=postgres, run=run) as made,
        ):
            for line in measure(made, sizes=tuple(given.sizes), repeats=given.repeats):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
