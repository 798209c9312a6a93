"""Jobs: submit, get, list, cancel, pause, resume. Statuses change in `lifecycle` alone."""

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Select, select, tuple_, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from mae_core.config import Spec
from service import events
from service.db import Database, utc_now
from service.errors import Conflict, Invalid, NoSuchJob
from service.ids import ALPHABET, chance
from service.lifecycle import transition
from service.models import JobRow
from service.projects import DEFAULT_PROJECT
from service.settings import Settings
from service.sources import check_sources
from service.storage import Storage
from service.submission import resolve_encoder
from service.views import JobPage, JobSummary, JobView
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
) -> Submitted:
    """Keep a new job, or answer the one that this key and body made before in the project."""
    if idempotency_key is not None:
        idempotency_key = f"{project}\n{idempotency_key}"
    body_hash = hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
    if idempotency_key is not None:
        with database.read() as session:
            known = _repeat_of(session, idempotency_key, body_hash)
        if known is not None:
            return known
    _check_workers(spec, settings)
    if settings.sources_are_local:
        check_sources(spec)
    resolved = resolve_encoder(  # asks storage: in no transaction
        database, storage, spec, project=project, sources_are_local=settings.sources_are_local
    )
    try:
        with database.write() as session:
            if idempotency_key is not None and (known := _repeat_of(session, idempotency_key, body_hash)) is not None:
                return known
            row = _insert(session, resolved, project=project, idempotency_key=idempotency_key, body_hash=body_hash)
            return Submitted(row, is_new=True)
    except IntegrityError:  # where writers do not queue up, as in PostgreSQL, the same key may have won meanwhile
        if idempotency_key is None:
            raise
        with database.read() as session:
            known = _repeat_of(session, idempotency_key, body_hash)
        if known is None:
            raise
        return known


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


def _insert(session: Session, spec: Spec, *, project: str, idempotency_key: str | None, body_hash: str) -> JobView:
    now, resources = utc_now(), spec.resources
    counts = spec.worker_counts()
    row = JobRow(
        id=new_job_id(now),
        project=project,
        name=spec.name,
        kind=spec.kind,
        labels=dict(spec.labels),
        spec=spec.model_dump(mode="json"),
        idempotency_key=idempotency_key,
        body_hash=body_hash,
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
        created_at=now,
        due_at=now,
    )
    session.add(row)
    session.flush()
    events.append(session, row.id, EventType.JOB_QUEUED, {"kind": spec.kind, "name": spec.name}, at=now)
    return JobView.of(row)


def find(session: Session, job_id: str, *, lock: bool = False) -> JobRow:
    """lock: to write: whoever writes a job's events holds its row, so that their ids grow in the order in which they are seen."""
    row = session.get(JobRow, job_id, with_for_update=lock)
    if row is None:
        raise NoSuchJob(job_id)
    return row


def get(session: Session, job_id: str) -> JobView:
    return JobView.of(find(session, job_id))


def list_page(
    session: Session,
    *,
    project: str | None = None,
    status: JobStatus | None = None,
    kind: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
) -> JobPage:
    """Newest first. project None: of all."""
    query: Select[JobRow] = select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit + 1)
    if project is not None:
        query = query.where(JobRow.project == project)
    if status is not None:
        query = query.where(JobRow.status == status)
    if kind is not None:
        query = query.where(JobRow.kind == kind)
    if cursor is not None:
        query = query.where(tuple_(JobRow.created_at, JobRow.id) < tuple_(*_read_cursor(cursor)))
    rows = list(session.scalars(query).all())
    more = len(rows) > limit
    rows = rows[:limit]
    return JobPage(jobs=[JobSummary.model_validate(row) for row in rows], next_cursor=_cursor(rows[-1]) if more else None)


def _cursor(row: JobRow) -> str:
    return base64.urlsafe_b64encode(f"{row.created_at.isoformat()}|{row.id}".encode()).decode()


def _read_cursor(cursor: str) -> tuple[datetime, str]:
    try:
        created_at, _, job_id = base64.b64decode(cursor.encode(), altchars=b"-_", validate=True).decode().partition("|")
        at = datetime.fromisoformat(created_at)
        if at.tzinfo is None:
            raise ValueError("no zone")
    except (ValueError, binascii.Error):
        raise Invalid("cursor", "not a cursor of this list; use the next_cursor of an earlier answer, or leave it out") from None
    return at, job_id


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
