"""A service with something to tell on every route: jobs in every state, with all that they may leave, webhooks, tokens."""

from dataclasses import dataclass

from service import artifacts, metrics, tokens, webhooks
from service.db import utc_now
from service.ray_jobs import ClusterResources, RayStatus
from service.tokens import Role
from service.webhooks import WebhookEvents
from tests.unit.service_fixtures import PROBE, Service
from workers.contract import EventType, JobStatus, Points, submission_id
from workers.stored import log_chunk, log_prefix

_EACH = 3  # jobs of a state: who asks may cancel, pause and delete them


@dataclass(frozen=True)
class Furnished:
    """Ids. reporting: a running job, not among the others; its workers' reports may end it."""

    jobs: list[str]
    webhooks: list[str]
    tokens: list[str]
    events: list[int]
    reporting: str


def furnish(service: Service) -> Furnished:
    with service.database.write() as session:
        addresses = [f"http://127.0.0.1:9/{number}" for number in range(4)]
        hooks = [webhooks.create(session, url=url, project=None, events=WebhookEvents.ALL, now=utc_now()).id for url in addresses]
        made = [tokens.create(session, name="Ada", role=role, now=utc_now())[0].id for role in Role for _ in range(2)]
    service.ray.cluster = ClusterResources(1000.0, 8.0)
    jobs = [each for _ in range(_EACH) for each in (_running(service), _ended(service), _failed(service), _cancelled(service))]
    jobs += [service.submit(PROBE | {"encoder": {"job": jobs[0]}}), service.submit(labels={"team": "cells"}, priority=7)]
    paused = service.submit()
    service.pause(paused)
    jobs += [paused, service.submit()]
    reporting = _running(service)
    statuses = {service.job(each).status for each in jobs}
    assert statuses >= {JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}
    return Furnished(jobs, hooks, made, [event.id for event in service.events(jobs[0])], reporting)


def _running(service: Service) -> str:
    job_id = service.start()
    service.report(job_id, EventType.UPLOAD_DELAYED, sequence=1, step=3, num_kept=2)
    with service.database.write() as session:
        points = Points(steps=list(range(100)), series={"loss": [1.0 / (step + 1) for step in range(98)] + [float("nan"), float("inf")]})
        metrics.append(session, job_id, attempt=1, incarnation=1, sequence=2, points=points)
        key = f"{artifacts.job_prefix(job_id)}reconstructions/a.png"
        artifacts.add(session, job_id, key=key, kind="reconstruction", attempt=1, num_bytes=1, bucket="maestro", at=utc_now())
    for worker in ("driver", "0"):
        service.storage.put_bytes(log_chunk(log_prefix(f"jobs/{job_id}/", 1, worker), 0), "epoch 1 ünï\n".encode())
    return job_id


def _ended(service: Service) -> str:
    job_id = _running(service)
    service.commit_result(job_id)
    return _close(service, job_id, RayStatus.SUCCEEDED)


def _failed(service: Service) -> str:
    job_id = _running(service)
    service.report(job_id, EventType.RUN_FAILED, sequence=3, reason="diverged", message="loss is NaN")
    return _close(service, job_id, RayStatus.FAILED)


def _cancelled(service: Service) -> str:
    job_id = _running(service)
    service.cancel(job_id)
    return _close(service, job_id, RayStatus.STOPPED)


def _close(service: Service, job_id: str, status: RayStatus) -> str:
    service.ray.end(submission_id(job_id, 1), status)
    service.tick(2)
    service.tick(2)
    return job_id
