"""Takes away the training states that a job's policy does not keep, and what killed saves left: the one who deletes them. Workers only add.

A job whose states have changed is looked at (`JobRow.prune_at`). First what goes is marked, in one transaction: with that it is gone for
everybody. Then its objects are taken away outside of any transaction, the manifests first, a page at a time, and last its row. Each step
may be done twice, or by two at once, and whoever dies is followed by another.
"""

import logging
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from itertools import groupby
from typing import NamedTuple

from sqlalchemy import delete, select, tuple_
from sqlalchemy.orm import Session

from service import artifacts, checkpoints
from service.artifacts import TRAINING_STATE, job_prefix
from service.counters import Count, Tally
from service.db import Database
from service.errors import StorageUnreachable
from service.models import ArtifactRow, JobRow
from service.storage import PAGE, ObjectNotFound, Storage, StoredObject
from workers.contract import JobStatus
from workers.state_names import age, is_state_of
from workers.stored import MANIFEST, training_state_prefix

log = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0
UNREACHABLE_SECONDS = 30.0
ERROR_SECONDS = 300.0  # a job that cannot be looked at is none that others wait for
MAX_JOBS = 20  # looked at in one sweep
MAX_STATES = 20  # taken away in one sweep


class _Folder(NamedTuple):
    """A training state in storage, of which the database knows nothing."""

    prefix: str
    bytes: int
    is_committed: bool


class Pruner:
    """Any number may run."""

    def __init__(self, database: Database, storage: Storage, *, tally: Tally, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._storage = storage
        self._tally = tally
        self._clock = clock
        self._due_at = clock()

    def sweep_when_due(self) -> None:
        now = self._clock()
        if now < self._due_at:
            return
        self._due_at = now + timedelta(seconds=SWEEP_SECONDS)
        changed = select(JobRow.id).where(JobRow.prune_at <= now, JobRow.deleted_at.is_(None)).order_by(JobRow.prune_at).limit(MAX_JOBS)
        with self._database.read() as session:
            due = session.scalars(changed).all()
        try:
            for job_id in due:
                self._look_at(job_id)
            self._take_away()
        except (StorageUnreachable, ObjectNotFound) as error:  # not found: the bucket itself
            self._due_at = now + timedelta(seconds=UNREACHABLE_SECONDS)
            log.info("training states stay for now: %s", error)

    def _look_at(self, job_id: str) -> None:
        try:
            with self._database.read() as session:
                job = session.get_one(JobRow, job_id)
                seen_at, known = job.prune_at, _known(session, job_id)
                states = [name for name, deleted_at in known.items() if deleted_at is None]
                has_ended = JobStatus(job.status).is_terminal
            unknown = list(self._unknown(job_id, set(known))) if has_ended or _is_first_of_its_start(states) else []
            self._clear(job_id, unknown, states, has_ended=has_ended)
            self._mark(job_id, [folder for folder in unknown if folder.is_committed], seen_at=seen_at)
        except (StorageUnreachable, ObjectNotFound):
            raise
        except Exception:
            log.exception("job %s: which training states stay could not be decided; the next look comes in %.0f s", job_id, ERROR_SECONDS)
            with self._database.write() as session:
                session.get_one(JobRow, job_id).prune_at = self._clock() + timedelta(seconds=ERROR_SECONDS)

    def _unknown(self, job_id: str, known: set[str]) -> Iterator[_Folder]:
        """What starts of the workers that were killed left: states that were committed and never told of, and parts of others."""
        prefix = job_prefix(job_id)
        for folder, found in groupby(self._objects(training_state_prefix(prefix)), key=lambda item: item.key.rpartition("/")[0] + "/"):
            items = list(found)
            if is_state_of(prefix, folder) and folder.removeprefix(prefix) not in known:
                sizes = {item.key.removeprefix(folder): item.bytes for item in items}
                yield _Folder(folder, sum(size for name, size in sizes.items() if name != MANIFEST), MANIFEST in sizes)

    def _objects(self, prefix: str) -> Iterator[StoredObject]:
        page = self._storage.list(prefix, limit=PAGE)
        while page:
            yield from page
            page = self._storage.list(prefix, limit=PAGE, after=page[-1].key) if len(page) == PAGE else []

    def _clear(self, job_id: str, unknown: list[_Folder], states: list[str], *, has_ended: bool) -> None:
        """Take away what was never committed, and will not be: of a job that has ended, and what is older than the newest state."""
        committed = [*states, *(folder.prefix for folder in unknown if folder.is_committed)]
        newest = max(map(age, committed), default=(0, 0, 0))
        for folder in unknown:
            if not folder.is_committed and (has_ended or age(folder.prefix) < newest):
                self._delete_below(folder.prefix)
                log.info("job %s: %s was never committed and is deleted", job_id, folder.prefix)

    def _mark(self, job_id: str, committed: list[_Folder], *, seen_at: datetime | None) -> None:
        now = self._clock()
        locked = select(JobRow).where(JobRow.id == job_id, JobRow.deleted_at.is_(None)).with_for_update(skip_locked=True)
        with self._database.write() as session:
            job = session.scalar(locked)
            if job is None:
                return  # another dispatcher is at it, or it is being deleted
            for prefix, num_bytes, _ in committed:
                attempt, _, step = age(prefix)
                artifacts.add(
                    session,
                    job_id,
                    key=prefix,
                    kind=TRAINING_STATE,
                    attempt=attempt,
                    num_bytes=num_bytes,
                    bucket=self._storage.bucket,
                    at=now,
                    step=step,
                )
            session.flush()
            num_marked = checkpoints.tombstone(session, job, now=now)
            if job.prune_at == seen_at:
                job.prune_at = None
        if num_marked:
            log.info("job %s: %d training states are to be deleted", job_id, num_marked)

    def _take_away(self) -> None:
        marked = select(ArtifactRow.job_id, ArtifactRow.name).where(ArtifactRow.deleted_at.is_not(None))
        with self._database.read() as session:
            going = [(job_id, name) for job_id, name in session.execute(marked.order_by(ArtifactRow.deleted_at).limit(MAX_STATES))]
        if not going:
            return
        self._storage.delete([job_prefix(job_id) + name + MANIFEST for job_id, name in going])
        for job_id, name in going:
            self._delete_below(job_prefix(job_id) + name)
        key = tuple_(ArtifactRow.job_id, ArtifactRow.name)
        with self._database.write() as session:
            session.execute(delete(ArtifactRow).where(key.in_(going), ArtifactRow.deleted_at.is_not(None)))

    def _delete_below(self, prefix: str) -> None:
        assert prefix.endswith("/"), prefix
        while page := self._storage.list(prefix, limit=PAGE):
            self._storage.delete([item.key for item in page])
            self._tally.add(Count.BYTES_FREED, sum(item.bytes for item in page))
            if len(page) < PAGE:
                return


def _known(session: Session, job_id: str) -> dict[str, datetime | None]:
    """Names of the job's states, and since when each is to be deleted."""
    table = ArtifactRow
    rows = session.execute(select(table.name, table.deleted_at).where(table.job_id == job_id, table.kind == TRAINING_STATE))
    return {row.name: row.deleted_at for row in rows}


def _is_first_of_its_start(states: list[str]) -> bool:
    """Whether the newest state is the first that a start of the workers has brought: what the start before left is looked for then."""
    starts = sorted((age(name)[:2] for name in states), reverse=True)
    return len(starts) < 2 or starts[0] != starts[1]
