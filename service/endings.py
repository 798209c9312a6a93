"""The end of an attempt: what it left in object storage, and the rows that tell of it."""

from datetime import datetime

from pydantic import ValidationError
from sqlalchemy import update
from sqlalchemy.orm import Session

from service import artifacts, events, logs
from service.jsonable import jsonable
from service.leases import Claimed, LeaseLost
from service.lifecycle import Outcome, transition
from service.models import AttemptRow, JobRow
from service.policy import CommittedResult
from service.storage import ObjectNotFound, Storage, StoredObject
from workers.contract import EventType, JobStatus, Reason
from workers.stored import MANIFEST, EncoderManifest, result_artifact, result_prefix

_ROAD_TO_SUCCESS = (JobStatus.RUNNING, JobStatus.FINALIZING, JobStatus.SUCCEEDED)


class ManifestInvalid(Exception):
    """The result's manifest cannot be read."""


def read_result(storage: Storage, job_id: str, kind: str) -> CommittedResult | None:
    """The job's committed result; None where there is none. Raises StorageUnreachable, ManifestInvalid."""
    key = result_prefix(artifacts.job_prefix(job_id), kind) + MANIFEST
    try:
        text = storage.read_text(key)
    except ObjectNotFound:
        return None
    try:
        manifest = EncoderManifest.model_validate_json(text)
    except ValidationError as error:
        raise ManifestInvalid(f"{key} is not a manifest of this version: {error.errors()[0]['msg']}") from None
    if manifest.job != job_id:
        raise ManifestInvalid(f"{key} belongs to job {manifest.job}")
    return CommittedResult(manifest, len(text.encode()))


def end_attempt(
    session: Session,
    attempt: AttemptRow,
    *,
    now: datetime,
    reason: Reason | None,
    message: str | None,
    log: StoredObject | None,
    bucket: str,
) -> None:
    """Close the attempt: its reports are refused from now on."""
    row = session.get_one(AttemptRow, (attempt.job_id, attempt.number))
    if row.ended_at is not None:
        return
    row.ended_at = now
    job = session.get_one(JobRow, row.job_id)
    job.conditions = None  # of its workers: the next ones tell anew
    session.flush()
    if row.started_at is not None:
        trained = (now - row.started_at).total_seconds()
        session.execute(update(JobRow).where(JobRow.id == row.job_id).values(run_seconds=JobRow.run_seconds + trained))
    row.reason, row.message = row.reason or reason, row.message or message
    events.append(session, row.job_id, EventType.ATTEMPT_ENDED, {"reason": row.reason, "message": row.message}, at=now, attempt=row.number)
    if log is not None:
        row.log_key = log.key
        artifacts.add(session, row.job_id, key=log.key, kind="log", attempt=row.number, num_bytes=log.bytes, bucket=bucket, at=now)
        artifacts.keep_newest(session, row.job_id, kind="log", number=logs.KEPT_ATTEMPTS)


def succeed(session: Session, claimed: Claimed, result: CommittedResult, *, bucket: str, now: datetime) -> None:
    """The result's files as artifacts, and the job through all statuses that it was not in yet: reports may have been lost."""
    job, manifest = claimed.job, result.manifest
    folder = result_prefix(artifacts.job_prefix(job.id), manifest.kind)
    sizes = {name: (entry.bytes, entry.sha256) for name, entry in manifest.files.items()} | {MANIFEST: (result.num_bytes, None)}
    for name, (num_bytes, sha256) in sizes.items():
        artifacts.add(
            session,
            job.id,
            key=folder + name,
            kind=result_artifact(manifest.kind),
            attempt=manifest.attempt,
            num_bytes=num_bytes,
            sha256=sha256,
            bucket=bucket,
            at=now,
        )
    metrics = jsonable(manifest.model_dump()["metrics"])
    for status in _ROAD_TO_SUCCESS:
        changes = {"metrics": metrics, "result_uri": f"s3://{bucket}/{folder}"} if status.is_terminal else {}
        outcome = transition(session, job.id, to=status, now=now, lease=claimed.token, **changes)
        if outcome is Outcome.LOST_LEASE:
            raise LeaseLost(job.id)
    assert outcome is Outcome.DONE, outcome
