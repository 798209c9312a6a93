"""Jobs: submit, retry, get, cancel, pause, resume. Statuses change in `lifecycle` alone."""

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime

from pydantic import ValidationError
from sqlalchemy import and_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, defer

from mae_core.config import RUN_SPEC, Spec, TrainingSpec
from service import etags, events, search
from service.db import Database, utc_now
from service.errors import Conflict, Invalid, NoSuchJob, spec_errors
from service.ids import ALPHABET, chance
from service.lifecycle import transition
from service.models import AttemptRow, JobRow
from service.projects import DEFAULT_PROJECT
from service.settings import Settings
from service.sources import check_sources
from service.storage import Storage
from service.submission import encoder_job, resolve_encoder
from service.views import JobView
from workers.contract import DesiredState, EventType, JobStatus, Reason


@dataclass(frozen=True)
class Submitted:
    job: JobView
    is_new: bool


def new_job_id(now: datetime) -> str:
    """Time first, so that ids sort roughly by age, then chance: 17 characters of [a-z0-9]."""
    number, digits = int(now.timestamp() * 1000), ""
    while number:
        number, digit = divmod(number, 36)
        digits = ALPHABET[digit] + digits
    return digits.rjust(9, "0") + chance(8)


def submit(
    database: Database,
    storage: Storage,
    settings: Settings,
    spec: Spec,
    *,
    idempotency_key: str | None,
    project: str = DEFAULT_PROJECT,
    retry_of: str | None = None,
) -> Submitted:
    """Keep a new job, or answer the one that this key and body made before in the project."""
    if idempotency_key is not None:
        idempotency_key = f"{project}\n{idempotency_key}"
    body = json.dumps(spec.model_dump(mode="json"), sort_keys=True) + (f"\n{retry_of}" if retry_of is not None else "")
    body_hash = hashlib.sha256(body.encode()).hexdigest()
    if idempotency_key is not None:
        with database.read() as session:
            known = _repeat_of(session, idempotency_key, body_hash)
        if known is not None:
            return known
    resolved = resolve(database, storage, settings, spec, project=project)  # asks storage: in no transaction
    try:
        with database.write() as session:
            if idempotency_key is not None and (known := _repeat_of(session, idempotency_key, body_hash)) is not None:
                return known
            parent = encoder_job(resolved, bucket=storage.bucket)
            if parent is not None:
                _keep(session, parent)
            names = {"project": project, "idempotency_key": idempotency_key, "body_hash": body_hash}
            row = _insert(session, resolved, **names, encoder_job=parent, retry_of=retry_of)
            return Submitted(JobView.of(row), is_new=True)
    except IntegrityError:  # where writers do not queue up, as in PostgreSQL, the same key may have won meanwhile
        if idempotency_key is None:
            raise
        with database.read() as session:
            known = _repeat_of(session, idempotency_key, body_hash)
        if known is None:
            raise
        return known


def retry(database: Database, storage: Storage, settings: Settings, job_id: str, *, idempotency_key: str | None) -> Submitted:
    """A new job of the spec of one that has failed or was cancelled, with what can be changed of it as it is now. It starts anew."""
    with database.read() as session:
        row = find(session, job_id)
    if row.status not in (JobStatus.FAILED, JobStatus.CANCELLED):
        raise Conflict(f"Job {job_id} is {row.status}; only one that has failed or was cancelled can be tried again.")
    try:
        kept = {} if row.keep is None else {"checkpoint": row.spec.get("checkpoint", {}) | {"keep": row.keep}}
        spec = RUN_SPEC.validate_python(row.spec | {"name": row.name, "labels": row.labels, "priority": row.priority} | kept)
    except ValidationError as error:
        raise Conflict(f"The spec of job {job_id} is not one of this version any more: {spec_errors(error.errors())[0]}") from None
    return submit(database, storage, settings, spec, idempotency_key=idempotency_key, project=row.project, retry_of=job_id)


def resolve(database: Database, storage: Storage, settings: Settings, spec: Spec, *, project: str) -> Spec:
    """The spec as a job of the project would have it; or Invalid with what to do."""
    _check_workers(spec, settings)
    check_sources(spec, storage, sources_are_local=settings.sources_are_local)
    return resolve_encoder(database, storage, spec, project=project, sources_are_local=settings.sources_are_local)


def _keep(session: Session, parent: str) -> None:
    """The job that a new one starts from is not deleted between its look at that and its own row."""
    try:
        find(session, parent, lock=True)
    except NoSuchJob:
        raise Invalid("encoder", f"there is no job {parent}") from None


def _check_workers(spec: Spec, settings: Settings) -> None:
    most = spec.resources.workers_asked[-1]
    if most > settings.max_workers_per_job:
        raise Invalid(
            "resources.num_workers",
            f"{most} workers are more than this service allows; ask for {settings.max_workers_per_job} or fewer",
        )


def _repeat_of(session: Session, key: str, body_hash: str) -> Submitted | None:
    row = session.scalar(select(JobRow).where(JobRow.idempotency_key == key))
    if row is None:
        return None
    if row.body_hash != body_hash:
        raise Invalid("Idempotency-Key", f"this key was used before with another body, for job {row.id}; use a new key for a new job")
    return Submitted(JobView.of(row), is_new=False)


def _insert(session: Session, spec: Spec, *, retry_of: str | None, **columns: str | None) -> JobRow:
    now, resources = utc_now(), spec.resources
    counts = spec.worker_counts()
    row = JobRow(
        id=new_job_id(now),
        name=spec.name,
        kind=spec.kind,
        labels=dict(spec.labels),
        spec=spec.model_dump(mode="json"),
        status=JobStatus.QUEUED,
        desired_state=DesiredState.RUN,
        attempt=0,
        version=1,
        priority=spec.priority,
        waits_for=spec.encoder.job if spec.encoder is not None else None,
        num_cpus=counts[0] * resources.cpus_per_worker,
        num_gpus=counts[0] * resources.gpus_per_worker,
        max_cpus=counts[-1] * resources.cpus_per_worker,
        max_gpus=counts[-1] * resources.gpus_per_worker,
        keep=spec.checkpoint.keep.model_dump(mode="json") if isinstance(spec, TrainingSpec) and spec.ranked_by() else None,
        created_at=now,
        due_at=now,
        retry_of=retry_of,
        **columns,
    )
    session.add(row)
    session.flush()
    search.index(session, row)
    told = {"kind": spec.kind, "name": spec.name} | ({"retry_of": retry_of} if retry_of is not None else {})
    events.append(session, row.id, EventType.JOB_QUEUED, told, at=now)
    return row


def find(session: Session, job_id: str, *, lock: bool = False) -> JobRow:
    """lock: to write: whoever writes a job's events holds its row, so that their ids grow in the order in which they are seen."""
    row = session.get(JobRow, job_id, with_for_update=lock)
    if row is None or row.deleted_at is not None:
        raise NoSuchJob(job_id)
    return row


def get(session: Session, job_id: str) -> JobView:
    return JobView.of(find(session, job_id))


def get_if_changed(session: Session, job_id: str, *, known: str | None) -> tuple[JobView | None, str]:
    """The job and its tag; None for the job where `known`, a header If-None-Match, has that tag. That takes one query without the spec."""
    newest = and_(AttemptRow.job_id == JobRow.id, AttemptRow.number == JobRow.attempt)
    query = select(JobRow, AttemptRow).outerjoin(AttemptRow, newest).where(JobRow.id == job_id, JobRow.deleted_at.is_(None))
    found = session.execute(query.options(defer(JobRow.spec))).one_or_none()
    if found is None:
        raise NoSuchJob(job_id)
    row, _attempt = found  # the conditions look at it
    tag = etags.of_job(row, now=utc_now())
    return (None if etags.has(known, tag) else JobView.of(row)), tag


def request_cancel(session: Session, job_id: str) -> tuple[JobView, bool]:
    """Note that the user wants the job cancelled; whether it is already. Needs no dispatcher: it acts, or workers hear, when they can."""
    row = find(session, job_id, lock=True)
    if row.status == JobStatus.CANCELLED:
        return JobView.of(row), True
    if JobStatus(row.status).is_terminal:
        raise Conflict(f"Job {job_id} has {row.status} already; only a job that has not ended can be cancelled.")
    if row.desired_state != DesiredState.CANCEL:
        now = utc_now()
        _want(session, row, DesiredState.CANCEL, EventType.CANCEL_REQUESTED, now=now)
        if row.status in (JobStatus.QUEUED, JobStatus.PAUSED) and row.lease_token is None:
            transition(session, job_id, to=JobStatus.CANCELLED, now=now, reason=Reason.CANCELLED_BY_USER)
        session.refresh(row)
    return JobView.of(row), False


def request_pause(session: Session, job_id: str) -> tuple[JobView, bool]:
    """Note that the user wants the job to release its devices and keep its place; whether it has already."""
    row = find(session, job_id, lock=True)
    status = JobStatus(row.status)
    if status is JobStatus.PAUSED and row.desired_state == DesiredState.PAUSE:
        return JobView.of(row), True
    if status.is_terminal or row.desired_state == DesiredState.CANCEL:
        has = f"is {status} already" if status.is_terminal else "is being cancelled"
        raise Conflict(f"Job {job_id} {has}; only a job that goes on can be paused.")
    if row.desired_state != DesiredState.PAUSE:
        now = utc_now()
        _want(session, row, DesiredState.PAUSE, EventType.PAUSE_REQUESTED, now=now)
        if status in (JobStatus.QUEUED, JobStatus.RECOVERING) and row.lease_token is None:
            transition(session, job_id, to=JobStatus.PAUSED, now=now, reason=Reason.PAUSED_BY_USER, due_at=None)
        session.refresh(row)
    return JobView.of(row), False


def request_resume(session: Session, job_id: str) -> tuple[JobView, bool]:
    """Queue a paused job again, at its old place; whether it was not paused at all. Conflict while it is still being paused, or over."""
    row = find(session, job_id, lock=True)
    status = JobStatus(row.status)
    if status.is_terminal or row.desired_state == DesiredState.CANCEL:
        has = f"is {status} already" if status.is_terminal else "is being cancelled"
        raise Conflict(f"Job {job_id} {has}; submit it again to train anew.")
    if row.desired_state == DesiredState.RUN:
        return JobView.of(row), True
    if status is not JobStatus.PAUSED:
        raise Conflict(f"Job {job_id} is {status}, and not paused yet; resume it when it is.")
    now = utc_now()
    _want(session, row, DesiredState.RUN, EventType.RESUME_REQUESTED, now=now)
    transition(session, job_id, to=JobStatus.QUEUED, now=now, due_at=now)
    session.refresh(row)
    return JobView.of(row), False


def _want(session: Session, row: JobRow, wish: DesiredState, event: EventType, *, now: datetime) -> None:
    row.desired_state, row.desired_since, row.due_at = wish, now, now
    row.version += 1
    events.append(session, row.id, event, {}, at=now, attempt=row.attempt or None)
    session.flush()


def wake(session: Session, job_id: str, now: datetime) -> None:
    """Have a dispatcher look at the job at once."""
    session.execute(update(JobRow).where(JobRow.id == job_id, JobRow.due_at.is_not(None)).values(due_at=now))
