"""What a job left in object storage, by name: the key below the job's prefix."""

from datetime import datetime

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service.errors import Conflict, NotFound
from service.models import ArtifactRow, JobRow
from service.views import ArtifactView, ReconstructionsView
from workers.stored import MANIFEST

JOBS_PREFIX = "jobs/"
TRAINING_STATE, PICTURE, ARRAYS = "training_state", "reconstruction", "reconstruction_arrays"  # kinds


def job_prefix(job_id: str) -> str:
    return f"{JOBS_PREFIX}{job_id}/"


def add(
    session: Session,
    job_id: str,
    *,
    key: str,
    kind: str,
    attempt: int,
    num_bytes: int,
    bucket: str,
    at: datetime,
    sha256: str | None = None,
    step: int | None = None,
) -> None:
    """Note an object (or, with a key that ends in /, a committed folder), in place of one of that name; a pin and a deletion stay."""
    prefix = job_prefix(job_id)
    assert key.startswith(prefix), key
    session.merge(
        ArtifactRow(
            job_id=job_id,
            name=key.removeprefix(prefix),
            kind=kind,
            attempt=attempt,
            bytes=num_bytes,
            sha256=sha256,
            uri=f"s3://{bucket}/{key}",
            created_at=at,
            step=step,
        )
    )


def keep_newest(session: Session, job_id: str, *, kind: str, number: int) -> None:
    """Forget the others of this kind; those of one attempt have names that sort by age."""
    session.flush()
    names = select(ArtifactRow.name).where(ArtifactRow.job_id == job_id, ArtifactRow.kind == kind)
    old = session.scalars(names.order_by(ArtifactRow.attempt.desc(), ArtifactRow.name.desc()).offset(number)).all()
    session.execute(delete(ArtifactRow).where(ArtifactRow.job_id == job_id, ArtifactRow.name.in_(old)))


def list_all(session: Session, job_id: str) -> list[ArtifactView]:
    there = (ArtifactRow.job_id == job_id, ArtifactRow.deleted_at.is_(None))
    return [
        ArtifactView.of(row)
        for row in session.scalars(select(ArtifactRow).where(*there).order_by(ArtifactRow.created_at, ArtifactRow.name))
    ]


def list_reconstructions(session: Session, job_id: str, *, after: int, limit: int) -> list[ReconstructionsView]:
    """Of the `limit` steps after one, the lowest first."""
    table = ArtifactRow
    stepped = (table.job_id == job_id, table.step > after)
    steps = select(table.step).where(*stepped, table.kind == PICTURE).distinct().order_by(table.step).limit(limit)
    here = (*stepped, table.kind.in_([PICTURE, ARRAYS]), table.step.in_(session.scalars(steps).all()))
    found: dict[int, dict[str, ArtifactView]] = {}
    for row in session.scalars(select(table).where(*here).order_by(table.step)):
        assert row.step is not None
        found.setdefault(row.step, {})[row.kind] = ArtifactView.of(row)
    return [ReconstructionsView(step=step, picture=views[PICTURE], arrays=views.get(ARRAYS)) for step, views in found.items()]


def find(session: Session, job_id: str, name: str) -> ArtifactRow:
    """By its name, a folder's with or without its last /. Raises NotFound."""
    rows = select(ArtifactRow).where(ArtifactRow.job_id == job_id, ArtifactRow.name.in_([name, name.rstrip("/") + "/"]))
    known = session.scalars(rows.where(ArtifactRow.deleted_at.is_(None)).order_by(ArtifactRow.name)).first()
    if known is None:
        raise NotFound(f"Job {job_id} has no artifact {name!r}.")
    return known


def pin(session: Session, job: JobRow, name: str, *, now: datetime) -> ArtifactView:
    """Keep an artifact of a job, whose row is locked, from being deleted. Conflict for a log: the newest ones stay."""
    row = find(session, job.id, name)
    if row.kind == "log":
        raise Conflict(f"{row.name} is a log: those of the newest attempts stay, whatever is pinned.")
    row.pinned_at = row.pinned_at or now
    session.flush()
    return ArtifactView.of(row)


def unpin(session: Session, job: JobRow, name: str, *, now: datetime) -> ArtifactView:
    """Have an artifact of a job, whose row is locked, be as all others."""
    row = find(session, job.id, name)
    if row.pinned_at is not None and row.kind == TRAINING_STATE:
        job.prune_at = now
    row.pinned_at = None
    session.flush()
    return ArtifactView.of(row)


def object_key(session: Session, job_id: str, name: str) -> str:
    """The key of the object to read; for a folder that of its manifest."""
    known = find(session, job_id, name)
    if known.kind == "log":  # many objects
        raise NotFound(f"Logs are read at /v1/jobs/{job_id}/logs?attempt={known.attempt}.")
    return job_prefix(job_id) + (known.name + MANIFEST if known.name.endswith("/") else known.name)
