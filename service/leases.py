"""Leases: which dispatcher works on which job, by the database's clock. Whoever finds its token gone discards what it did."""

import secrets
import time
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session

from service.db import db_now
from service.models import AttemptRow, JobRow
from workers.contract import JobStatus, Reason


class LeaseLost(Exception):
    """Another dispatcher owns the job now."""


@dataclass(frozen=True)
class Claimed:
    """A job as it was when its lease began, and its current attempt. The rows are detached: nothing is written through them."""

    job: JobRow
    attempt: AttemptRow | None
    token: str
    since: float = field(default_factory=time.monotonic)


def is_any_due(session: Session, now: datetime) -> bool:
    return session.scalar(select(JobRow.id).where(JobRow.due_at <= now, _free()).limit(1)) is not None


def claim(session: Session, *, owner: str, now: datetime, seconds: float, limit: int = 50) -> list[Claimed]:
    """Due jobs that nobody holds, the oldest first. Those that wait for resources come along with the first that may take them away."""
    token = secrets.token_hex(16)
    _take(session, JobRow.due_at <= now, owner=owner, token=token, seconds=seconds, limit=limit)
    mine = select(JobRow).where(JobRow.lease_token == token).order_by(JobRow.created_at, JobRow.id)
    if any(job.status in (JobStatus.QUEUED, JobStatus.RECOVERING) for job in session.scalars(mine)):
        waits = and_(
            JobRow.status.in_([JobStatus.QUEUED, JobStatus.RECOVERING]),
            JobRow.reason == Reason.WAITING_FOR_RESOURCES,
            JobRow.due_at.is_not(None),
        )
        _take(session, waits, owner=owner, token=token, seconds=seconds, limit=limit)
    jobs = session.scalars(mine.execution_options(populate_existing=True)).all()
    return [Claimed(job, session.get(AttemptRow, (job.id, job.attempt)), token) for job in jobs]


def renew(session: Session, claimed: Claimed, *, seconds: float) -> None:
    """The lease from now on anew. LeaseLost where somebody has taken it."""
    hold(session, claimed)
    session.execute(update(JobRow).where(JobRow.id == claimed.job.id).values(lease_expires_at=db_now(seconds)))


def hold(session: Session, claimed: Claimed) -> None:
    """Make sure, in a writing transaction, that the lease is still ours. An expired one that nobody took still is."""
    token = session.scalar(select(JobRow.lease_token).where(JobRow.id == claimed.job.id).with_for_update())
    if token != claimed.token:
        raise LeaseLost(claimed.job.id)


def release(session: Session, claimed: Claimed, *, due_at: datetime | None, now: datetime) -> None:
    """Give the lease back. What the user has come to want meanwhile is looked at without delay."""
    hold(session, claimed)
    row = session.execute(select(JobRow.desired_state, JobRow.status).where(JobRow.id == claimed.job.id)).one()
    if row.desired_state != claimed.job.desired_state and not JobStatus(row.status).is_terminal:
        due_at = now
    values = {"due_at": due_at, "lease_owner": None, "lease_token": None, "lease_expires_at": None}
    session.execute(update(JobRow).where(JobRow.id == claimed.job.id).values(values))


def release_all(session: Session, owner: str) -> None:
    values = {"lease_owner": None, "lease_token": None, "lease_expires_at": None}
    session.execute(update(JobRow).where(JobRow.lease_owner == owner).values(values))


def _free() -> ColumnElement[bool]:
    return or_(JobRow.lease_expires_at.is_(None), JobRow.lease_expires_at < db_now())


def _take(session: Session, condition: ColumnElement[bool], *, owner: str, token: str, seconds: float, limit: int) -> None:
    ids = select(JobRow.id).where(condition, _free()).order_by(JobRow.due_at, JobRow.id).limit(limit).with_for_update(skip_locked=True)
    lease = {"lease_owner": owner, "lease_token": token, "lease_expires_at": db_now(seconds)}
    session.execute(update(JobRow).where(JobRow.id.in_(ids)).values(lease), execution_options={"synchronize_session": False})
