"""The moments of a run at which faults strike, each known by what can be seen of it: processes, reports, objects. Nothing sleeps."""

from collections.abc import Callable

import psutil
from botocore.exceptions import ClientError

from service.up import BUCKET
from tests.conftest import LiveService
from tests.faults.checks import drivers
from tests.integration.runs import Json, events_of, pretrain_spec, train_workers, wait_for, wait_for_step
from workers.stored import MANIFEST, training_state_prefix

# 44 steps, with a save under way most of the time; its pictures only at the end.
TRAINING = pretrain_spec(
    optim={"epochs": 4, "batch_size": 128, "base_lr": 1e-3, "warmup_epochs": 1},
    evaluation={"every_epochs": 4},
)
BY_ONE_WORKER = TRAINING | {"resources": {"num_workers": 1}}  # half the start-up, and room for another one beside it
ENDLESS = BY_ONE_WORKER | {"optim": TRAINING["optim"] | {"epochs": 100_000}, "evaluation": {"every_epochs": 100_000}}


def start(service: LiveService, moment: str, spec: Json = BY_ONE_WORKER) -> str:
    """A new job, at its moment: `stopping` is a pause, which saves before it ends the run."""
    if moment == "stopping":
        spec = spec | {"checkpoint": {"every_steps": 1_000_000}}  # whatever is saved then is saved for the pause
    job: str = service.client.submit(spec | {"name": moment})["id"]
    reach(service, job, moment)
    return job


def reach(service: LiveService, job: str, moment: str) -> None:
    """Waits for a moment of a job."""
    if moment == "starting":
        wait_for(lambda: drivers(service.run, job), seconds=120, what=f"the driver of {job}")
        assert not events_of(service.client, job, "workers_started")
        return
    wait_for_step(service.client, job, 1)
    if moment == "running":
        wait_for(lambda: states(service, job)[1], seconds=120, what=f"a training state of {job}")
    elif moment == "stopping":
        service.client.pause(job)
    if moment in ("saving", "stopping"):
        wait_for(lambda: is_saving(service, job), seconds=120, what=f"a save of {job} under way")


def go_on(service: LiveService, job: str, moment: str) -> None:
    """What the user does after the fault: a job that was to pause is resumed when it has."""
    if moment == "stopping":
        wait_for(lambda: service.client.job(job)["status"] == "paused", seconds=240, what=f"{job} to be paused")
        service.client.resume(job)


def is_saving(service: LiveService, job: str) -> bool:
    """Whether files of a training state are being uploaded, or uploaded, that no manifest has committed yet."""
    steps, committed = states(service, job)
    return bool(steps) and max(steps) not in committed


def states(service: LiveService, job: str) -> tuple[set[str], set[str]]:
    """The names of training states in object storage that something is there of, and of those that are committed."""
    prefix = training_state_prefix(f"jobs/{job}/")
    client = service.installation.storage.client()
    try:
        uploads = client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", [])
        keys = [item["Key"] for item in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]
    except ClientError as error:
        raise AssertionError(f"object storage does not list: {error}") from error
    names = {key.removeprefix(prefix).split("/")[0] for key in [*keys, *(upload["Key"] for upload in uploads)]}
    return names, {key.removeprefix(prefix).split("/")[0] for key in keys if key.endswith(f"/{MANIFEST}")}


def going_on(service: LiveService, job: str, moment: str) -> Callable[[], bool]:
    """Whether the run has saved, or ended, since now: the one of a pause saves but once."""
    before = set() if moment == "stopping" else states(service, job)[1]
    return lambda: bool(states(service, job)[1] - before) or service.has_object(f"jobs/{job}/encoder/{MANIFEST}")


def worker_of_rank(service: LiveService, rank: int, *, num_workers: int = 2) -> psutil.Process:
    """Of a run that trains: rank 0 is who speaks with the service."""

    def workers() -> list[psutil.Process]:
        found = train_workers(service.run)
        speak = [_speaks_with(process, service.installation.port) for process in found]
        if len(found) == num_workers and sum(speak) == 1:
            return sorted(found, key=lambda process: not speak[found.index(process)])
        return []

    found: list[psutil.Process] = wait_for(workers, seconds=60, what="the one worker that speaks with the service")
    return found[rank]


def _speaks_with(process: psutil.Process, port: int) -> bool:
    try:
        return any(connection.raddr and connection.raddr.port == port for connection in process.net_connections(kind="tcp"))
    except psutil.Error:
        return False
