"""What workers tell: one short transaction for each report, in which a repeat changes nothing."""

import logging
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from mae_core.options import ResourcesConfig
from service import artifacts, conditions, events, jobs, metrics
from service.admission import Needs
from service.db import Database, utc_now
from service.errors import Conflict, Invalid, NotFound, StaleAttempt
from service.jsonable import jsonable
from service.lifecycle import transition
from service.models import AttemptRow, JobRow
from service.policy import why_it_ends
from workers.contract import (
    CONTRACT_VERSION,
    MAX_INTEGER,
    WORKER_EVENTS,
    DesiredState,
    Event,
    EventType,
    JobStatus,
    Origin,
    Reason,
    Report,
    ReportAnswer,
)
from workers.state_names import age, is_state_of
from workers.stored import result_prefix

log = logging.getLogger(__name__)

_ARTIFACT_KINDS = {EventType.RECONSTRUCTIONS_WRITTEN: artifacts.PICTURE, EventType.TRAINING_STATE_COMMITTED: artifacts.TRAINING_STATE}
# after these the run will be over soon: the dispatcher should look without delay
_LAST_WORDS = {EventType.RUN_FAILED, EventType.RUN_STOPPED, EventType.RESULT_COMMITTED}
_MAX_KEY = 1024  # characters, as S3 has it


def record(database: Database, job_id: str, attempt_number: int, report: Report, *, bucket: str) -> ReportAnswer:
    with database.write() as session:
        job = session.get(JobRow, job_id, with_for_update=True)
        attempt = session.get(AttemptRow, (job_id, attempt_number))
        if job is None or attempt is None:
            raise NotFound(f"Job {job_id} has no attempt {attempt_number}.")
        if job.attempt != attempt_number or attempt.ended_at is not None or JobStatus(job.status).is_terminal:
            raise StaleAttempt(f"Attempt {attempt_number} of job {job_id} is over; its workers should stop.")
        _check(report, attempt_number)  # only now: an attempt that is over is to stop, whatever it says
        is_elastic = (job.max_cpus, job.max_gpus) != (job.num_cpus, job.num_gpus)
        answer = ReportAnswer(desired_state=_wanted(job), may_grow=is_elastic and not _anyone_waits(session))
        attempt.last_report_at = now = utc_now()
        if report.points is None and not report.events and report.progress is None:
            return answer  # it only says that the workers live
        told_by = report.origin or Origin(attempt=attempt_number, incarnation=report.incarnation, sequence=report.sequence)
        key = told_by.model_dump()
        if not metrics.append(session, job_id, points=report.points, **key):
            return answer
        is_newest = attempt.incarnation is None or report.incarnation >= attempt.incarnation
        if is_newest:
            attempt.incarnation = report.incarnation
        if report.progress is not None and is_newest:
            job.progress = jsonable(report.progress.model_dump())
        for told in report.events:
            event = told.model_copy(update={"at": min(told.at, now)})  # by a clock that is ahead it has not happened yet
            events.append(session, job_id, event.type, event.data, at=event.at, attempt=attempt_number)
            _follow(session, job, attempt, event, bucket=bucket, now=now)
            if event.type is EventType.WORKERS_STARTED and is_newest:
                _hold(job, attempt, event.data.get("num_workers"))
        return answer


def _wanted(job: JobRow) -> DesiredState:
    """What its workers are to do: a run that has reached its time limit saves its state and ends."""
    return DesiredState.PAUSE if why_it_ends(job) is Reason.TIME_LIMIT_REACHED else DesiredState(job.desired_state)


def _check(report: Report, attempt_number: int) -> None:
    """Conflict or Invalid for a report that cannot be taken from anybody."""
    if report.contract != CONTRACT_VERSION:
        raise Conflict(
            f"The report has contract version {report.contract}, this service {CONTRACT_VERSION}: install the same on all hosts."
        )
    if report.origin is not None and (report.origin.attempt >= attempt_number or report.events or report.progress is not None):
        raise Invalid("origin", "it is for an earlier attempt's points, alone in their report")
    for event in report.events:
        if event.type not in WORKER_EVENTS:
            raise Invalid("events", f"{event.type} is not for workers to tell")


def _follow(session: Session, job: JobRow, attempt: AttemptRow, event: Event, *, bucket: str, now: datetime) -> None:
    """What follows from one event."""
    job_id = job.id
    conditions.follow(job, event)
    if event.type is EventType.WORKERS_STARTED:
        attempt.started_at = attempt.started_at or now
        _advance(session, job_id, JobStatus.RUNNING, expected={JobStatus.STARTING}, now=now)
    elif event.type is EventType.TRAINING_ENDED:
        _advance(session, job_id, JobStatus.FINALIZING, expected={JobStatus.RUNNING, JobStatus.PAUSING}, now=now)  # the pause came too late
    elif event.type is EventType.RUN_FAILED:
        attempt.reason, attempt.message = _reason(event.data), str(event.data.get("message", ""))[:4000]
    elif event.type in _ARTIFACT_KINDS:
        step = told if isinstance(told := event.data.get("step"), int) and 0 <= told <= MAX_INTEGER else None
        _add_artifact(session, attempt, event.data, kind=_ARTIFACT_KINDS[event.type], step=step, bucket=bucket, at=event.at)
        if event.type is EventType.RECONSTRUCTIONS_WRITTEN and isinstance(arrays := event.data.get("arrays"), dict):
            _add_artifact(session, attempt, arrays, kind=artifacts.ARRAYS, step=step, bucket=bucket, at=event.at)
        if event.type is EventType.TRAINING_STATE_COMMITTED:
            job.prune_at = now
    elif event.type is EventType.RESULT_COMMITTED:
        uri = f"s3://{bucket}/{result_prefix(artifacts.job_prefix(job_id), job.kind)}"
        if event.data.get("uri") == uri:
            job.result_uri, job.metrics = uri, jsonable(event.data.get("metrics"))
    if event.type in _LAST_WORDS:
        session.flush()
        jobs.wake(session, job_id, now)


def _anyone_waits(session: Session) -> bool:
    return session.scalar(select(JobRow.id).where(JobRow.waiting_since.is_not(None)).limit(1)) is not None


def _hold(job: JobRow, attempt: AttemptRow, num_workers: object) -> None:
    """Whose workers are more or fewer than before, as an elastic run's, holds other devices."""
    if isinstance(num_workers, int) and num_workers in ResourcesConfig.model_validate(job.spec["resources"]).workers_asked:
        needs = Needs.of_workers(job, num_workers)
        attempt.num_cpus, attempt.num_gpus = int(needs.num_cpus), int(needs.num_gpus)


def _advance(session: Session, job_id: str, to: JobStatus, *, expected: set[JobStatus], now: datetime) -> None:
    session.flush()
    if session.scalar(select(JobRow.status).where(JobRow.id == job_id)) in expected:
        transition(session, job_id, to=to, now=now)


def _reason(data: dict[str, Any]) -> Reason:
    try:
        return Reason(data.get("reason", ""))
    except ValueError:
        return Reason.INTERNAL_ERROR


def _add_artifact(
    session: Session, attempt: AttemptRow, told: dict[str, Any], *, kind: str, step: int | None, bucket: str, at: datetime
) -> None:
    """A report that cannot be read as an artifact is still a report: its training must not hang on it."""
    key, num_bytes, sha256 = told.get("key"), told.get("bytes"), told.get("sha256")
    prefix = artifacts.job_prefix(attempt.job_id)
    is_ours = isinstance(key, str) and key.startswith(prefix) and len(key) <= _MAX_KEY
    if not isinstance(key, str) or not is_ours or type(num_bytes) is not int or not 0 <= num_bytes <= MAX_INTEGER:
        log.warning("job %s: a %s without a usable key and size", attempt.job_id, kind)
        return
    if kind == artifacts.TRAINING_STATE:
        if not is_state_of(prefix, key):  # all below that key will be deleted
            log.warning("job %s: %r is not where a training state lies", attempt.job_id, key[:200])
            return
        step = age(key)[2]
    artifacts.add(
        session,
        attempt.job_id,
        key=key,
        kind=kind,
        attempt=attempt.number,
        num_bytes=num_bytes,
        sha256=sha256 if isinstance(sha256, str) and len(sha256) == 64 else None,
        bucket=bucket,
        at=at,
        step=step,
    )
