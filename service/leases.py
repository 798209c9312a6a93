"""Leases: which dispatcher works on which job, by the database's clock. Whoever finds its token gone discards what it did."""

import os
import secrets
import socket
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session

from service.db import db_now
from service.models import AttemptRow, JobRow
from service.processes import ProcessId
from workers.contract import JobStatus

MAX_CLAIMED = 200  # at once
_NO_LEASE: dict[str, None] = {"lease_owner": None, "lease_token": None, "lease_expires_at": None}


class LeaseLost(Exception):
    """Another dispatcher owns the job now."""


@dataclass(frozen=True)
class Claimed:
    """A job as it was when its lease began, and its current attempt. The rows are detached: nothing is written through them."""

    job: JobRow
    attempt: AttemptRow | None
    token: str
    since: float = field(default_factory=time.monotonic)


IN_LINE = and_(JobRow.status.in_([JobStatus.QUEUED, JobStatus.RECOVERING]), JobRow.waits_for.is_(None))  # where it is due: launch it


@dataclass(frozen=True)
class Work:
    """What there is to do: jobs to look at, new ones among them that want to be launched, others that wait for devices."""

    is_due: bool
    is_new_in_line: bool
    waits_in_line: bool


def find_work(session: Session, now: datetime) -> Work:
    due, waits = and_(JobRow.due_at <= now, is_free()), and_(JobRow.waiting_since.is_not(None), is_free())
    conditions = (due, and_(due, IN_LINE, JobRow.waiting_since.is_(None)), waits)
    return Work(*(session.scalar(select(JobRow.id).where(condition).limit(1)) is not None for condition in conditions))


def claim(
    session: Session, *, owner: str, now: datetime, seconds: float, also: Collection[str] = (), limit: int = MAX_CLAIMED
) -> list[Claimed]:
    """Due jobs that nobody holds, and of `also` those, too: the longest due first."""
    token = secrets.token_hex(16)
    wanted = or_(JobRow.due_at <= now, and_(JobRow.id.in_(also), JobRow.waiting_since.is_not(None)))
    ids = select(JobRow.id).where(wanted, is_free()).order_by(JobRow.due_at, JobRow.id).limit(limit).with_for_update(skip_locked=True)
    lease = {"lease_owner": owner, "lease_token": token, "lease_expires_at": db_now(seconds)}
    session.execute(update(JobRow).where(JobRow.id.in_(ids)).values(lease), execution_options={"synchronize_session": False})
    newest = and_(AttemptRow.job_id == JobRow.id, AttemptRow.number == JobRow.attempt)
    rows = session.execute(
        select(JobRow, AttemptRow).outerjoin(AttemptRow, newest).where(JobRow.lease_token == token).order_by(JobRow.created_at, JobRow.id)
    )
    return [Claimed(job, attempt, token) for job, attempt in rows]


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
    session.execute(update(JobRow).where(JobRow.id == claimed.job.id).values(due_at=due_at, **_NO_LEASE))


def release_unchanged(session: Session, claimed: Sequence[Claimed], *, due_at: datetime, now: datetime) -> None:
    """Give back, together, leases of one claim whose jobs were only looked at. Of whom the user wants something else is due at once."""
    token, job_ids = claimed[0].token, [one.job.id for one in claimed]
    lock(session, JobRow.id.in_(job_ids))
    nothing_new = or_(*(and_(JobRow.desired_state == wish, JobRow.id.in_(ids)) for wish, ids in _by_wish(claimed).items()))
    for condition, at in ((nothing_new, due_at), (JobRow.id.in_(job_ids), now)):
        session.execute(update(JobRow).where(JobRow.lease_token == token, condition).values(due_at=at, **_NO_LEASE))


def _by_wish(claimed: Sequence[Claimed]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one in claimed:
        found.setdefault(one.job.desired_state, []).append(one.job.id)
    return found


def lock(session: Session, condition: ColumnElement[bool]) -> None:
    """Before a change of several jobs: two who change the same ones take them in the same order, and so wait, but not for each other."""
    session.execute(select(JobRow.id).where(condition).order_by(JobRow.id).with_for_update())


def release_all(session: Session, owner: str) -> None:
    session.execute(update(JobRow).where(JobRow.lease_owner == owner).values(_NO_LEASE))


def release_dead(session: Session) -> None:
    """Give back what dispatchers of this machine held that no longer live: nobody needs to wait until their leases end."""
    held = session.scalars(
        select(JobRow.lease_owner).where(JobRow.lease_owner.startswith(f"{socket.gethostname()}:", autoescape=True)).distinct()
    )
    for owner in [owner for owner in held if owner is not None and not _lives(owner)]:
        release_all(session, owner)


def owner_name(dispatcher: object) -> str:
    """Of a dispatcher of this process: the machine, the process and the object in it."""
    process = ProcessId.of(os.getpid())
    return f"{socket.gethostname()}:{process.pid}:{process.started_at!r}:{id(dispatcher):x}"


def _lives(owner: str) -> bool:
    """Whether the process of an owner on this machine lives; also where its name does not tell."""
    try:
        _, pid, started_at, _ = owner.rsplit(":", 3)
        return ProcessId(int(pid), float(started_at)).is_alive()
    except ValueError:
        return True


def is_free() -> ColumnElement[bool]:
    """Nobody holds it."""
    return or_(JobRow.lease_expires_at.is_(None), JobRow.lease_expires_at < db_now())
