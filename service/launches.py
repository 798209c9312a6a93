"""Launching an attempt so that nothing starts twice: first its row, then Ray, under an id that the row fixes."""

import hashlib
import hmac
import logging
import shlex
from datetime import datetime

from sqlalchemy.orm import Session

from mae_core.memory import KEEPS_MEMORY
from service import events, logs
from service.admission import Needs
from service.artifacts import job_prefix
from service.errors import RayUnreachable
from service.leases import Claimed, LeaseLost
from service.lifecycle import Outcome, transition
from service.models import AttemptRow, JobRow
from service.ray_jobs import AlreadyExists, RayJobs
from service.settings import Settings
from workers.contract import ORDER_VARIABLE, EventType, JobStatus, StorageRef, WorkOrder, attempt_token, submission_id

log = logging.getLogger(__name__)

DEPLOYMENT = "deployment"  # the label that says whose Ray jobs these are, where several services share a cluster
RAY_STOP_WAIT_SECONDS = 10  # from Ray's SIGTERM to its SIGKILL


def create_attempt(session: Session, claimed: Claimed, *, now: datetime) -> AttemptRow:
    """The job's next attempt, and the job in `starting`."""
    job, number = claimed.job, claimed.job.attempt + 1
    if transition(session, job.id, to=JobStatus.STARTING, now=now, lease=claimed.token, attempt=number) is not Outcome.DONE:
        raise LeaseLost(job.id)
    needs = Needs.at_most(job)
    attempt = AttemptRow(
        job_id=job.id,
        number=number,
        submission_id=submission_id(job.id, number),
        num_cpus=int(needs.num_cpus),
        num_gpus=int(needs.num_gpus),
        created_at=now,
    )
    session.add(attempt)
    events.append(session, job.id, EventType.ATTEMPT_CREATED, {"submission_id": attempt.submission_id}, at=now, attempt=number)
    return attempt


def ensure_submitted(ray: RayJobs, job: JobRow, attempt: AttemptRow, settings: Settings) -> None:
    """Ray has the attempt afterwards: found and adopted, or submitted. A submission whose answer was lost is found."""
    if ray.info(attempt.submission_id) is not None:
        log.info("adopted %s, which Ray had already", attempt.submission_id)
        return
    try:
        ray.submit(
            attempt.submission_id,
            entrypoint=f"{shlex.quote(settings.worker_python)} -m workers.main",
            env_vars={
                ORDER_VARIABLE: work_order(job, attempt, settings).model_dump_json(),
                "RAY_JOB_STOP_WAIT_TIME_S": str(RAY_STOP_WAIT_SECONDS),
                **KEEPS_MEMORY,
            },
            metadata={"job": job.id, "attempt": str(attempt.number), DEPLOYMENT: deployment_of(settings.secret_keys[0])},
        )
    except AlreadyExists:
        log.info("adopted %s, which Ray had already", attempt.submission_id)
    except RayUnreachable:
        if ray.info(attempt.submission_id) is None:
            raise


def deployment_of(secret_key: str) -> str:
    """Tells this service from others, and no secret: those of one secret key are one."""
    return hmac.new(secret_key.encode(), DEPLOYMENT.encode(), hashlib.sha256).hexdigest()[:16]


def work_order(job: JobRow, attempt: AttemptRow, settings: Settings) -> WorkOrder:
    return WorkOrder.model_validate(
        {
            "job": job.id,
            "attempt": attempt.number,
            "spec": job.spec,
            "token": attempt_token(settings.secret_key.get_secret_value(), job.id, attempt.number),
            "service_url": settings.service_url,
            "storage": StorageRef(endpoint=settings.s3_endpoint, region=settings.s3_region, bucket=settings.s3_bucket),
            "prefix": job_prefix(job.id),
            "log_bytes": settings.log_quota_mb * 2**20 // logs.KEPT_ATTEMPTS,
        }
    )
