"""`python -m tests.faults.chaos`: many small jobs under seeded faults, and whether any was lost, doubled or stuck.

On the stand-in of Ray's Jobs API (1,000 jobs, on SQLite and on PostgreSQL with two dispatchers) and on Ray itself (100). The API, the
dispatchers, the database, object storage and the runs are killed, cut off and brought back, while users pause, resume and cancel. Prints
one JSON line for each; `chaos_verdict.Verdict` says what is counted. Exit code 1 where anything was.
"""

import argparse
import itertools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from service.client import MaestroClient
from service.home import Home
from service.local import Seaweedfs
from service.processes import free_ports
from service.up import Installation, interruptible, running
from tests.faults.chaos_harm import Harmer, Rhythm, harm_to_installation, harm_to_stage, supervised
from tests.faults.chaos_plan import PlannedJob, plan
from tests.faults.chaos_users import Users
from tests.faults.chaos_verdict import Life, Verdict, judge, wrong_losses
from tests.integration.runs import losses_of, wait_for_end
from tests.postgres import Postgres
from tests.stand_in.script import loss_at
from tests.stand_in.stage import PATIENCE_SECONDS, Stage, own_servers, stage
from workers.contract import JobStatus

_QUIET_SHARE = 0.05  # of the jobs: when no more are left, the harm ends
_HARM_SECONDS = 600.0  # at most
_HARM_SECONDS_ON_RAY = 3600.0
_SETTLE_SECONDS = 240.0  # without harm and without any job's end: those that are left are stuck
_LOOK_SECONDS = 2.0
Json = dict[str, Any]
log = logging.getLogger("tests.faults.chaos")


def on_stand_in(
    folder: Path, *, num_jobs: int, seed: int, storage: Seaweedfs, postgres: Postgres | None, run: str, harm_seconds: float = _HARM_SECONDS
) -> tuple[Json, Verdict]:
    """The line and the verdict. On PostgreSQL two dispatchers share the work."""
    planned = plan(num_jobs, simulated=True, seed=seed)
    settings = {"lease_seconds": 5, "retry_backoff_seconds": 0.5, "stop_grace_seconds": 5}
    num_dispatchers = 1 if postgres is None else 2
    expected = {job.name: {step: loss_at(job.spec["seed"], step) for step in range(1, job.num_steps + 1)} for job in planned}
    with stage(folder, storage=storage, postgres=postgres, run=run, num_dispatchers=num_dispatchers, seed=seed, **settings) as made:
        for dispatcher in made.dispatchers:
            dispatcher.start()
        with supervised(made.api, *made.dispatchers), made.client() as client:
            harm = harm_to_stage(made, seed=seed)
            line, verdict = _carry_out(
                client, planned, harm, seed=seed, lives=lambda: _lives_of(made), expected=expected, harm_seconds=harm_seconds
            )
    return {"name": "chaos", "on": "stand-in", "database": made.database, **line}, verdict


def on_ray(folder: Path, *, num_jobs: int, seed: int) -> tuple[Json, Verdict]:
    planned = plan(num_jobs, simulated=False, seed=seed)
    home = Home(folder / "home")
    with (
        running(home, port=free_ports(1)[0], say=log.info, num_cpus=2) as installation,
        MaestroClient(installation.url, home.secrets().api_token, patience_seconds=PATIENCE_SECONDS) as client,
    ):
        undisturbed = client.submit(planned[0].spec | {"name": "undisturbed"})["id"]
        wait_for_end(client, undisturbed)
        losses = losses_of(client, undisturbed)
        installation.dispatcher.child.environment["MAESTRO_LEASE_SECONDS"] = "5"  # from its first restart on
        harm = harm_to_installation(installation, seed=seed)
        line, verdict = _carry_out(
            client,
            planned,
            harm,
            seed=seed,
            lives=lambda: _lives_on_ray(installation, client),
            expected={job.name: losses for job in planned},
            harm_seconds=_HARM_SECONDS_ON_RAY,
        )
    return {"name": "chaos", "on": "ray", "database": "sqlite", **line}, verdict


def _carry_out(
    client: MaestroClient,
    planned: list[PlannedJob],
    harm: list[Rhythm],
    *,
    seed: int,
    lives: Callable[[], list[Life]],
    expected: dict[str, dict[int, float]],
    harm_seconds: float = _HARM_SECONDS,
) -> tuple[Json, Verdict]:
    began, users = time.monotonic(), Users(client)
    with ThreadPoolExecutor(1) as pool, Harmer(harm, seed=seed) as harmer:
        submitting = pool.submit(users.submit_all, planned)
        _until_all_have_ended(client, planned, submitting, harmer, harm_seconds=harm_seconds)
        submitting.result()
    seconds = time.monotonic() - began
    views = _listed(client, planned)
    verdict = judge(planned, ids=users.ids, cancelled=users.cancelled, views=views, lives=lives())
    for view in views:
        if view["status"] == "succeeded" and (evidence := wrong_losses(losses_of(client, view["id"]), expected[view["name"]])):
            verdict.wrong[view["name"]] = f"{view['id']}: {evidence}"
    line = {
        "seed": seed,
        "jobs": len(planned),
        "faults": dict(sorted(harmer.done.items())),
        "wishes": users.num_wishes,
        "attempts": sum(view["attempt"] for view in views),
        "seconds": round(seconds, 1),
        **verdict.counts(),
    }
    return line, verdict


def _until_all_have_ended(
    client: MaestroClient, planned: list[PlannedJob], submitting: Future[None], harmer: Harmer, *, harm_seconds: float
) -> None:
    """Returns when all jobs have ended, or no more do. Before the last ones end there is no harm any more."""
    began, quiet_at, num_before = time.monotonic(), None, len(planned)
    while True:
        num_left = len(planned) - sum(JobStatus(view["status"]).is_terminal for view in _listed(client, planned))
        log.info("%d of %d jobs have not ended", num_left, len(planned))
        submitted, now = submitting.done(), time.monotonic()
        if quiet_at is not None and num_left < num_before:
            quiet_at = now
        num_before = num_left
        if quiet_at is None and ((submitted and num_left <= len(planned) * _QUIET_SHARE) or now - began > harm_seconds):
            harmer.stop()
            quiet_at = now
        if (num_left == 0 and submitted) or (quiet_at is not None and now - quiet_at > _SETTLE_SECONDS):
            return
        time.sleep(_LOOK_SECONDS)


def _listed(client: MaestroClient, planned: list[PlannedJob]) -> list[Json]:
    names = {job.name for job in planned}
    return [view for view in client.jobs() if view["name"] in names]


def _lives_of(made: Stage) -> list[Life]:
    return [
        Life(
            life["submission_id"],
            life["metadata"]["job"],
            int(life["metadata"]["attempt"]),
            life["began_at"],
            life["ended_at"],
            tuple(life["first_steps"]),
            life["is_forgotten"],
        )
        for life in made.ray.history()
    ]


def _lives_on_ray(installation: Installation, client: MaestroClient) -> list[Life]:
    """Ray's own list; first steps as the service was told of them, by the start of the workers before them."""
    headers = {"Authorization": f"Bearer {installation.cluster.token}"}
    listed = httpx.get(f"{installation.cluster.url}/api/jobs/", headers=headers, trust_env=False, timeout=30).json()
    lives = []
    for told in listed:
        if (metadata := told["metadata"] or {}).get("job") is None:
            continue
        job, attempt = metadata["job"], int(metadata["attempt"])
        steps, incarnation = [], 0
        for event in client.events(job):
            if event["attempt"] == attempt and event["type"] == "workers_started":
                incarnation = event["data"]["incarnation"]
            elif event["attempt"] == attempt and event["type"] == "first_step_taken":
                steps.append(incarnation)
        ended_at = told["end_time"] / 1000 if told["end_time"] else None
        lives.append(Life(told["submission_id"], job, attempt, told["start_time"] / 1000, ended_at, tuple(steps)))
    return lives


def _tell(line: Json, verdict: Verdict) -> bool:
    print(json.dumps(line), flush=True)
    for name, jobs in vars(verdict).items():
        for job, evidence in itertools.islice(jobs.items(), 20):
            log.warning("%s: %s: %s", name, job, evidence)
    return verdict.is_good


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=20260101)
    parser.add_argument("--on", nargs="*", choices=["sqlite", "postgresql", "ray"], default=["sqlite", "postgresql", "ray"])
    parser.add_argument("--jobs", type=int, default=1000, help="on the stand-in")
    parser.add_argument("--ray-jobs", type=int, default=100, help="on Ray")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("tests").setLevel(logging.INFO)
    good = True
    for on in given.on:
        if on == "ray":
            with interruptible(), tempfile.TemporaryDirectory(prefix="maestro-chaos-") as place:
                good &= _tell(*on_ray(Path(place), num_jobs=given.ray_jobs, seed=given.seed))
        else:
            with own_servers(database=on) as (folder, run, storage, postgres):
                good &= _tell(*on_stand_in(folder, num_jobs=given.jobs, seed=given.seed, storage=storage, postgres=postgres, run=run))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
