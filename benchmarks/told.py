"""Jobs that are told of as rank 0 tells: their rows, their tokens, and full reports."""

import json
import math
import statistics

import httpx
import psutil

from service.db import Database, utc_now
from service.ids import chance
from service.models import AttemptRow, JobRow
from workers.contract import DesiredState, JobStatus, attempt_token, submission_id

SECRET_KEY = "benchmark" * 4  # of the service that is measured
SERIES = ("loss", "lr", "grad_norm", "images_per_second", "data_wait")  # of a pretraining


def running_job(database: Database) -> str:
    """The id of a job whose first attempt is under way, as far as the database knows; nothing runs."""
    job_id, at = chance(12), utc_now()
    with database.write() as session:
        states = {"status": JobStatus.RUNNING, "desired_state": DesiredState.RUN, "attempt": 1}
        session.add(JobRow(id=job_id, name="told", kind="pretrain", labels={}, spec={}, body_hash="", created_at=at, **states))
        session.flush()
        times = dict.fromkeys(("created_at", "submitted_at", "started_at"), at)
        session.add(AttemptRow(job_id=job_id, number=1, submission_id=submission_id(job_id, 1), num_cpus=1, num_gpus=0, **times))
    return job_id


def reporter(url: str, job_id: str) -> httpx.Client:
    """Whose base is the job's first attempt: post to `reports`."""
    headers = {"Authorization": f"Bearer {attempt_token(SECRET_KEY, job_id, 1)}", "Content-Type": "application/json"}
    return httpx.Client(base_url=f"{url}/v1/jobs/{job_id}/attempts/1/", headers=headers, timeout=60, trust_env=False)


def report(sequence: int, *, num_steps: int) -> bytes:
    """The points of `num_steps` steps that follow those of the reports before."""
    steps = list(range(sequence * num_steps, (sequence + 1) * num_steps))
    series = {name: [round(place + math.exp(-step / 1e4) + math.sin(step) / 10, 12) for step in steps] for place, name in enumerate(SERIES)}
    progress = {"step": steps[-1], "num_steps": 2**30, "epoch": 1.0, "loss": series["loss"][-1]}
    return json.dumps({"incarnation": 1, "sequence": sequence, "points": {"steps": steps, "series": series}, "progress": progress}).encode()


def cpu_seconds(pid: int | None) -> float:
    """What a process has used of the processor."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def percentile(values: list[float], percent: int) -> float:
    return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1], 4)
