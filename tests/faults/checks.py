"""What must hold after every fault: no job lost, none started twice, statuses right, losses those of the undisturbed run."""

from collections import Counter
from collections.abc import Mapping
from contextlib import closing

import httpx
import psutil
import pytest

from service.processes import processes_of_run
from service.ray_jobs import HttpRayJobs
from tests.conftest import LiveService
from tests.integration.runs import Json, losses_of, train_workers, wait_for, wait_for_end
from workers.contract import ORDER_VARIABLE, submission_id

TOLERANCE = 1e-5  # of losses after a change of the number of workers


def check_job(
    service: LiveService,
    job: str,
    *,
    status: str = "succeeded",
    reason: str | None = None,
    attempts: int | None = None,
    undisturbed: Mapping[int, float] | None = None,
    exact: bool = True,
    ray_forgot: bool = False,
    seconds: float = 600,
) -> Json:
    """Waits for the job's end, and answers its view when everything is as it must be.

    `attempts`: how many there must have been (None: any number). `exact` False: the number of workers changed.
    `ray_forgot`: the Ray head was lost, and with it what it knew of earlier attempts.
    """
    view = wait_for_end(service.client, job, seconds=seconds)
    assert (view["status"], view["reason"]) == (status, reason), view["detail"]
    if attempts is not None:
        assert view["attempt"] == attempts, view["detail"]
    check_started_once(service, job, view["attempt"], ray_forgot=ray_forgot)
    if status == "succeeded":
        assert service.has_object(f"jobs/{job}/"), "nothing of it is in object storage"
    if undisturbed is not None:
        check_losses(losses_of(service.client, job), undisturbed, complete=status == "succeeded", exact=exact)
    return view


def check_started_once(service: LiveService, job: str, num_attempts: int, *, ray_forgot: bool = False) -> None:
    """Each attempt was made, submitted and begun once: its workers took their first step once in each of their starts."""
    events = service.client.events(job)
    made = [event["attempt"] for event in events if event["type"] == "attempt_created"]
    assert made == list(range(1, num_attempts + 1))
    submitted = [name for name in service.submissions() if name.startswith(f"{job}-a")]
    expected = [submission_id(job, number) for number in made]
    assert len(submitted) == len(set(submitted))
    assert set(submitted) <= set(expected) if ray_forgot else set(submitted) == set(expected)
    starts = Counter(event["attempt"] for event in events if event["type"] == "workers_started")
    first_steps = Counter(event["attempt"] for event in events if event["type"] == "first_step_taken")
    assert all(first_steps[attempt] <= starts[attempt] for attempt in first_steps), (starts, first_steps)
    incarnations = [event["data"]["incarnation"] for event in events if event["type"] == "workers_started"]
    assert len(incarnations) == len(set(incarnations))
    wait_for(lambda: not drivers(service.run, job), seconds=60, what=f"the end of the drivers of {job}")


def check_losses(found: Mapping[int, float], undisturbed: Mapping[int, float], *, complete: bool, exact: bool) -> None:
    """`complete`: every step is there; else those that are there are compared."""
    assert set(found) == set(undisturbed) if complete else set(found) <= set(undisturbed), sorted(set(found) ^ set(undisturbed))
    expected = {step: undisturbed[step] for step in found}
    assert dict(found) == (expected if exact else pytest.approx(expected, rel=TOLERANCE))


def check_nothing_left(service: LiveService, job: str) -> None:
    """For a job that was the only one: no process of it lives, and Ray has its devices back."""
    wait_for(lambda: not drivers(service.run, job), seconds=60, what=f"the end of the drivers of {job}")
    wait_for(lambda: not train_workers(service.run), seconds=60, what=f"the end of the workers of {job}")
    cluster = service.installation.cluster
    with closing(HttpRayJobs(cluster.url, token=cluster.token)) as ray:
        wait_for(lambda: _num_placement_groups(service) == 0, seconds=60, what="the end of all placement groups")
        wait_for(lambda: ray.resources().used_cpus == 0, seconds=60, what="all CPUs to be free")


def _num_placement_groups(service: LiveService) -> int:
    cluster = service.installation.cluster
    headers = {"Authorization": f"Bearer {cluster.token}"}
    answer = httpx.get(f"{cluster.url}/api/v0/placement_groups?limit=1000", headers=headers, trust_env=False, timeout=30)
    return sum(group["state"] != "REMOVED" for group in answer.json()["data"]["result"]["result"])


def drivers(run: str, job: str | None = None) -> list[psutil.Process]:
    """The processes that drive attempts: of one job, or of all."""
    return [process for process in processes_of_run(run) if _drives(process, job)]


def _drives(process: psutil.Process, job: str | None) -> bool:
    try:
        order = process.environ().get(ORDER_VARIABLE, "")
        return "workers.main" in process.cmdline() and (job is None or f'"job":"{job}"' in order)
    except psutil.Error:
        return False
