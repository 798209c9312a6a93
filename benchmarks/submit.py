"""`python -m benchmarks.submit`: how long `POST /v1/jobs` takes at 50 a second, and up to which rate that holds.

The API is a process of its own; jobs are sent at their times, whether those before were answered or not, over connections that stay open.
A job's time counts from when it was to be sent. A rate holds while the p95 stays below ten times its goal: above, jobs pile up. Nothing is
dispatched. Prints one JSON line for each database.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from benchmarks.reattach import spec
from service.client import Json
from tests.stand_in.script import Script
from tests.stand_in.stage import Stage, own_servers, stage

GOAL_SECONDS = 0.05
RATE = 50
_CONNECTIONS = 16
_BODY = spec(Script(num_steps=1, step_seconds=1.0))


def measure(made: Stage, *, seconds: float, rates: list[int]) -> Json:
    """The JSON line. rates: those to try beside RATE, rising; the first that does not hold is the last."""
    limits = httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS)
    headers = {"Authorization": f"Bearer {made.token}"}
    with httpx.Client(base_url=made.url, headers=headers, trust_env=False, timeout=60, limits=limits) as client:
        _at_rate(client, rate=RATE, seconds=min(seconds, 1.0))  # to warm up
        times = _at_rate(client, rate=RATE, seconds=seconds)
        held, tried = 0, dict[int, float]()
        for rate in rates:
            tried[rate] = _percentile(_at_rate(client, rate=rate, seconds=min(seconds, 4.0)), 95)
            if tried[rate] > 10 * GOAL_SECONDS:
                break
            held = rate
    return {
        "name": "submit",
        "unit": "s",
        "value": _percentile(times, 95),
        "goal": GOAL_SECONDS,
        "p50": _percentile(times, 50),
        "per_second": RATE,
        "held_per_second": held,
        "p95_per_rate": tried,
        "num_jobs": len(times),
        "device": "cpu",
        "database": made.database,
    }


def _at_rate(client: httpx.Client, *, rate: int, seconds: float) -> list[float]:
    """The times of jobs that are sent so often."""
    began = time.perf_counter() + 0.1
    planned = [began + number / rate for number in range(max(int(rate * seconds), 2))]

    def send(at: float) -> float:
        time.sleep(max(at - time.perf_counter(), 0.0))
        answer = client.post("/v1/jobs", json=_BODY)
        assert answer.status_code == 201, answer.text
        return time.perf_counter() - at

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return list(pool.map(send, planned))


def _percentile(values: list[float], percent: int) -> float:
    return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1], 4)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.submit", description=__doc__)
    parser.add_argument("--databases", nargs="*", choices=["sqlite", "postgresql"], default=["sqlite", "postgresql"])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rates", nargs="*", type=int, default=[75, 100, 150, 200, 300, 400])
    given = parser.parse_args()
    for name in given.databases:
        with (
            own_servers(database=name) as (folder, run, storage, postgres),
            stage(folder, storage=storage, postgres=postgres, run=run) as made,
        ):
            print(json.dumps(measure(made, seconds=given.seconds, rates=given.rates)), flush=True)


if __name__ == "__main__":
    main()
