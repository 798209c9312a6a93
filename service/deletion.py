"""Deleting a finished job: it is gone for everybody at once; what it left is taken away afterwards, and again after a crash.

First the row is marked, in one transaction (`request`). Then a dispatcher takes away its objects, a page at a time and outside of any
transaction, then the rows that refer to it, some at a time, then its own (`Deleter`). Each step may be done twice, or by two at once.
A day later it looks once more: a worker that was cut off may have uploaded what it had.
"""

import logging
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from sqlalchemy import Table, delete, select, tuple_
from sqlalchemy.engine import CursorResult
from sqlalchemy.orm import Session

from service import jobs, search
from service.artifacts import job_prefix
from service.counters import Count, Tally
from service.db import Database
from service.errors import Conflict, StorageUnreachable
from service.models import ArtifactRow, Base, DeletedJobRow, JobRow
from service.storage import PAGE, ObjectNotFound, Storage
from service.views import DeletionView
from workers.contract import JobStatus
from workers.stored import MANIFEST, result_prefix

log = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0
UNREACHABLE_SECONDS = 30.0
MAX_STEPS = 20  # pages and batches of one sweep: jobs are not to wait for it
MAX_ROWS = 500  # in one transaction
MAX_COUNTED = 100 * PAGE  # objects, for a look at what would go
LOOK_AGAIN_AFTER = timedelta(days=1)


def request(session: Session, job_id: str, *, now: datetime) -> None:
    """Mark a job as gone. Raises Conflict where it cannot be deleted."""
    row = jobs.find(session, job_id, lock=True)
    check(session, row)
    search.forget(session, job_id)
    row.deleted_at, row.idempotency_key, row.version = now, None, row.version + 1


def check(session: Session, row: JobRow) -> None:
    """Conflict for a job that has not ended, that another one names as where it starts from, or of which something is pinned."""
    if not JobStatus(row.status).is_terminal:
        raise Conflict(f"Job {row.id} is {row.status}; cancel it first, and delete it when it has ended.")
    child = session.scalar(select(JobRow.id).where(JobRow.encoder_job == row.id, JobRow.deleted_at.is_(None)).limit(1))
    if child is not None:
        raise Conflict(f"Job {child} starts from what job {row.id} left; delete that one first.")
    pinned = select(ArtifactRow.name).where(ArtifactRow.job_id == row.id, ArtifactRow.pinned_at.is_not(None))
    if (name := session.scalar(pinned.order_by(ArtifactRow.name).limit(1))) is not None:
        raise Conflict(f"{name} of job {row.id} is pinned; unpin it first (DELETE /v1/jobs/{row.id}/artifacts/{name.rstrip('/')}/pin).")


def count(storage: Storage, job_id: str) -> DeletionView:
    """What a deletion would take away."""
    num_objects = num_bytes = 0
    page = storage.list(prefix := job_prefix(job_id), limit=PAGE)
    while page:
        num_objects, num_bytes = num_objects + len(page), num_bytes + sum(item.bytes for item in page)
        is_whole = len(page) < PAGE
        if is_whole or num_objects >= MAX_COUNTED:
            return DeletionView(num_objects=num_objects, bytes=num_bytes, is_complete=is_whole)
        page = storage.list(prefix, limit=PAGE, after=page[-1].key)
    return DeletionView(num_objects=num_objects, bytes=num_bytes, is_complete=True)


class Deleter:
    """Takes away what deleted jobs left."""

    def __init__(self, database: Database, storage: Storage, *, tally: Tally, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._storage = storage
        self._tally = tally
        self._clock = clock
        self._due_at = clock()
        self._steps_left = 0

    def sweep_when_due(self) -> None:
        now = self._clock()
        if now < self._due_at:
            return
        self._due_at, self._steps_left = now + timedelta(seconds=SWEEP_SECONDS), MAX_STEPS
        query = select(JobRow.id, JobRow.kind).where(JobRow.deleted_at.is_not(None)).order_by(JobRow.deleted_at).limit(MAX_STEPS)
        again = select(DeletedJobRow.id).where(DeletedJobRow.look_at <= now).order_by(DeletedJobRow.look_at).limit(MAX_STEPS)
        with self._database.read() as session:
            gone, long_gone = session.execute(query).all(), session.scalars(again).all()
        try:
            for job_id, kind in gone:
                if not (self._take_objects(job_id, first=[result_prefix(job_prefix(job_id), kind) + MANIFEST]) and self._take_rows(job_id)):
                    return
                log.info("job %s is deleted", job_id)
            for job_id in long_gone:
                if not self._take_objects(job_id):
                    return
                with self._database.write() as session:
                    session.execute(delete(DeletedJobRow).where(DeletedJobRow.id == job_id))
        except (StorageUnreachable, ObjectNotFound) as error:  # not found: the bucket itself
            self._due_at = now + timedelta(seconds=UNREACHABLE_SECONDS)
            log.info("deleted jobs keep their objects for now: %s", error)

    def _step(self) -> bool:
        """Whether there may be another one in this sweep."""
        self._steps_left -= 1
        return self._steps_left >= 0

    def _take_objects(self, job_id: str, *, first: Sequence[str] = ()) -> bool:
        """`first`: the manifest: a result without it does not exist, whatever is left of it. Whether all are gone."""
        while self._step():
            page = self._storage.list(job_prefix(job_id), limit=PAGE - len(first))
            if page:
                self._storage.delete([*first, *(item.key for item in page)])
                self._tally.add(Count.BYTES_FREED, sum(item.bytes for item in page))
            if len(page) < PAGE - len(first):
                return True
        return False

    def _take_rows(self, job_id: str) -> bool:
        """Whether all are gone, the job's own too."""
        while self._step():
            with self._database.write() as session:
                if _delete_rows(session, job_id, at_most=MAX_ROWS, look_at=self._clock() + LOOK_AGAIN_AFTER):
                    return True
        return False


def _delete_rows(session: Session, job_id: str, *, at_most: int, look_at: datetime) -> bool:
    """Rows that refer to a job, in every table, and when there are none any more its own. Whether there is nothing left to do here."""
    if session.scalar(select(JobRow.id).where(JobRow.id == job_id).with_for_update(skip_locked=True)) is None:
        return True  # another dispatcher is at it, or was
    for table in reversed(Base.metadata.sorted_tables):  # who refers to others goes before these
        if "job_id" in table.columns:
            at_most -= _delete_some(session, table, job_id, at_most=at_most)
            if at_most <= 0:
                return False
    session.execute(delete(JobRow).where(JobRow.id == job_id))
    session.add(DeletedJobRow(id=job_id, look_at=look_at))
    return True


def _delete_some(session: Session, table: Table, job_id: str, *, at_most: int) -> int:
    key = tuple_(*table.primary_key.columns)
    some = select(*table.primary_key.columns).where(table.c.job_id == job_id).limit(at_most)
    result = session.execute(delete(table).where(key.in_(some)))
    assert isinstance(result, CursorResult)
    return result.rowcount
