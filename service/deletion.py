"""Deleting a finished job: it is gone for everybody at once; what it left is taken away afterwards, and again after a crash.

First the row is marked, in one transaction (`request`). Then a dispatcher takes away its objects, a page at a time and outside of any
transaction, then the rows that refer to it, some at a time, then its own (`Deleter`). Each step may be done twice, or by two at once.
"""

import logging
from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy import Table, delete, select, tuple_
from sqlalchemy.engine import CursorResult
from sqlalchemy.orm import Session

from service import jobs, search
from service.artifacts import job_prefix
from service.db import Database
from service.errors import Conflict, StorageUnreachable
from service.models import Base, JobRow
from service.storage import PAGE, ObjectNotFound, Storage
from workers.contract import JobStatus
from workers.stored import MANIFEST, result_prefix

log = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0
UNREACHABLE_SECONDS = 30.0
MAX_STEPS = 20  # pages and batches of one sweep: jobs are not to wait for it
MAX_ROWS = 500  # in one transaction


def request(session: Session, job_id: str, *, now: datetime) -> None:
    """Mark a job as gone. Conflict for one that has not ended, or whose result a job that has not ended starts from."""
    row = jobs.find(session, job_id, lock=True)
    if not JobStatus(row.status).is_terminal:
        raise Conflict(f"Job {job_id} is {row.status}; cancel it first, and delete it when it has ended.")
    child = session.scalar(select(JobRow.id).where(JobRow.encoder_job == job_id, JobRow.finished_at.is_(None)).limit(1))
    if child is not None:
        raise Conflict(f"Job {child} has not ended and starts from what job {job_id} left; delete this one when that has ended.")
    search.forget(session, job_id)
    row.deleted_at, row.idempotency_key, row.version = now, None, row.version + 1


class Deleter:
    """Takes away what deleted jobs left."""

    def __init__(self, database: Database, storage: Storage, *, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._storage = storage
        self._clock = clock
        self._due_at = clock()
        self._steps_left = 0

    def sweep_when_due(self) -> None:
        now = self._clock()
        if now < self._due_at:
            return
        self._due_at, self._steps_left = now + timedelta(seconds=SWEEP_SECONDS), MAX_STEPS
        query = select(JobRow.id, JobRow.kind).where(JobRow.deleted_at.is_not(None)).order_by(JobRow.deleted_at).limit(MAX_STEPS)
        with self._database.read() as session:
            gone = session.execute(query).all()
        try:
            for job_id, kind in gone:
                if not (self._take_objects(job_id, kind) and self._take_rows(job_id)):
                    return
                log.info("job %s is deleted", job_id)
        except (StorageUnreachable, ObjectNotFound) as error:  # not found: the bucket itself
            self._due_at = now + timedelta(seconds=UNREACHABLE_SECONDS)
            log.info("deleted jobs keep their objects for now: %s", error)

    def _step(self) -> bool:
        """Whether there may be another one in this sweep."""
        self._steps_left -= 1
        return self._steps_left >= 0

    def _take_objects(self, job_id: str, kind: str) -> bool:
        """The manifest first: a result without it does not exist, whatever is left of it. Whether all are gone."""
        prefix = job_prefix(job_id)
        while self._step():
            keys = [item.key for item in self._storage.list(prefix, limit=PAGE - 1)]
            if keys:
                self._storage.delete([result_prefix(prefix, kind) + MANIFEST, *keys])
            if len(keys) < PAGE - 1:
                return True
        return False

    def _take_rows(self, job_id: str) -> bool:
        """Whether all are gone, the job's own too."""
        while self._step():
            with self._database.write() as session:
                if _delete_rows(session, job_id, at_most=MAX_ROWS):
                    return True
        return False


def _delete_rows(session: Session, job_id: str, *, at_most: int) -> bool:
    """Rows that refer to a job, in every table, and when there are none any more its own. Whether there is nothing left to do here."""
    if session.scalar(select(JobRow.id).where(JobRow.id == job_id).with_for_update(skip_locked=True)) is None:
        return True  # another dispatcher is at it, or was
    for table in reversed(Base.metadata.sorted_tables):  # who refers to others goes before these
        if "job_id" in table.columns:
            at_most -= _delete_some(session, table, job_id, at_most=at_most)
            if at_most <= 0:
                return False
    session.execute(delete(JobRow).where(JobRow.id == job_id))
    return True


def _delete_some(session: Session, table: Table, job_id: str, *, at_most: int) -> int:
    key = tuple_(*table.primary_key.columns)
    some = select(*table.primary_key.columns).where(table.c.job_id == job_id).limit(at_most)
    result = session.execute(delete(table).where(key.in_(some)))
    assert isinstance(result, CursorResult)
    return result.rowcount
