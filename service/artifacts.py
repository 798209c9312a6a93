"""What a job left in object storage, by name: the key below the job's prefix."""

from datetime import datetime

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service.errors import NotFound
from service.models import ArtifactRow
from service.views import ArtifactView
from workers.stored import MANIFEST

JOBS_PREFIX = "jobs/"


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
) -> None:
    """Note an object (or, with a key that ends in /, a committed folder), in place of an earlier one of that name."""
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
        )
    )


def keep_newest(session: Session, job_id: str, *, kind: str, number: int) -> None:
    """Forget the others of this kind; those of one attempt have names that sort by age."""
    session.flush()
    names = select(ArtifactRow.name).where(ArtifactRow.job_id == job_id, ArtifactRow.kind == kind)
    old = session.scalars(names.order_by(ArtifactRow.attempt.desc(), ArtifactRow.name.desc()).offset(number)).all()
    session.execute(delete(ArtifactRow).where(ArtifactRow.job_id == job_id, ArtifactRow.name.in_(old)))


def list_all(session: Session, job_id: str) -> list[ArtifactView]:
    rows = session.scalars(select(ArtifactRow).where(ArtifactRow.job_id == job_id).order_by(ArtifactRow.created_at, ArtifactRow.name))
    return [ArtifactView.of(row) for row in rows]


def object_key(session: Session, job_id: str, name: str) -> str:
    """The key of the object to read; for a folder that of its manifest."""
    rows = select(ArtifactRow).where(ArtifactRow.job_id == job_id, ArtifactRow.name.in_([name, name.rstrip("/") + "/"]))
    known = session.scalars(rows.order_by(ArtifactRow.name)).first()
    if known is None:
        raise NotFound(f"Job {job_id} has no artifact {name!r}.")
    if known.kind == "log":  # many objects
        raise NotFound(f"Logs are read at /v1/jobs/{job_id}/logs?attempt={known.attempt}.")
    return job_prefix(job_id) + (known.name + MANIFEST if known.name.endswith("/") else known.name)
