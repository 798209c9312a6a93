"""Which job's result a job starts from, and which start from its own: pretraining, then probes and fine-tunings of it."""

from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from service.models import JobRow
from service.views import View
from workers.contract import JobStatus

MAX_LEVELS = 20  # up, and down
MAX_JOBS = 200  # that are told of those below


class Relative(View):
    """A job of the lineage. `parent`: the job whose result it starts from; `metrics`: the final ones."""

    id: str
    name: str
    kind: str
    status: JobStatus
    parent: str | None
    metrics: dict[str, Any] | None


class Lineage(View):
    """`descendants` come after their parents; `is_whole`: all of them are here."""

    ancestors: list[Relative]
    descendants: list[Relative]
    is_whole: bool


_COLUMNS = (JobRow.id, JobRow.name, JobRow.kind, JobRow.status, JobRow.encoder_job, JobRow.metrics)


def of(session: Session, job: JobRow) -> Lineage:
    """One query for each level. Deleted jobs, and those of other projects, end it."""
    there = (JobRow.deleted_at.is_(None), JobRow.project == job.project)
    ancestors: list[Relative] = []
    parent = job.encoder_job
    while parent is not None and len(ancestors) < MAX_LEVELS:
        row = session.execute(select(*_COLUMNS).where(JobRow.id == parent, *there)).one_or_none()
        if row is None:
            break
        ancestors.insert(0, _relative(row))
        parent = row.encoder_job
    descendants: list[Relative] = []
    level = [job.id]
    for _ in range(MAX_LEVELS):
        room = MAX_JOBS - len(descendants)
        query = select(*_COLUMNS).where(JobRow.encoder_job.in_(level), *there).order_by(JobRow.created_at, JobRow.id).limit(room + 1)
        rows = session.execute(query).all()
        descendants += map(_relative, rows[:room])
        if not rows or len(rows) > room:
            return Lineage(ancestors=ancestors, descendants=descendants, is_whole=not rows)
        level = [row.id for row in rows]
    return Lineage(ancestors=ancestors, descendants=descendants, is_whole=False)


def _relative(row: Row[Any]) -> Relative:
    return Relative(id=row.id, name=row.name, kind=row.kind, status=row.status, parent=row.encoder_job, metrics=row.metrics)
