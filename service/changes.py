"""What a user may change of a job at any time: its name, labels, priority, notes, and which training states stay."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import Field
from sqlalchemy.orm import Session

from mae_core.options import KeepConfig, Strict
from service import checkpoints, etags, events, jobs, search
from service.errors import PreconditionFailed, PreconditionRequired
from service.models import JobRow
from workers.contract import EventType

MAX_NOTES = 20_000


class JobChange(Strict):
    """What is to be different; what is left out stays. `labels` and `keep` are replaced as a whole. The spec, which workers have, stays."""

    name: str = Field(default_factory=str, min_length=1, max_length=200)  # a factory: there is no default to be described
    labels: dict[Annotated[str, Field(max_length=63)], Annotated[str, Field(max_length=200)]] = Field(default_factory=dict, max_length=32)
    priority: int = Field(default_factory=int, ge=-1000, le=1000, description="of a job that waits: at once its place in the line")
    keep: KeepConfig = Field(default_factory=KeepConfig, description="which training states stay, as a whole; the others are deleted soon")
    notes: str | None = Field(default=None, max_length=MAX_NOTES, description="free text; null: none")


def change(session: Session, job_id: str, wanted: JobChange, *, if_match: str | None, by: str, now: datetime) -> JobRow:
    """Raises PreconditionRequired without, and PreconditionFailed with an old `if_match`. Where nothing differs there is no event."""
    if if_match is None:
        raise PreconditionRequired(
            "Send the header `If-Match` with the ETag of the job as you read it, or `*`, so that nobody's change is lost."
        )
    row = jobs.find(session, job_id, lock=True)
    tag = etags.of_job(row, now=now)
    if etags.is_edited_since(if_match, tag):
        raise PreconditionFailed(f"Job {job_id} was changed since you read it; read it again, and send its new ETag, {tag}.")
    if "keep" in wanted.model_fields_set:
        checkpoints.check(row, wanted.keep, field="keep")
    given = wanted.model_dump(mode="json")
    new = {name: given[name] for name in etags.EDITABLE if name in wanted.model_fields_set}
    changes = {name: (getattr(row, name), value) for name, value in new.items() if getattr(row, name) != value}
    if not changes:
        return row
    for name, (_, value) in changes.items():
        setattr(row, name, value)
    row.version += 1
    if "keep" in changes:
        row.prune_at = now
    if changes.keys() & {"name", "labels"}:
        search.forget(session, job_id)
        search.index(session, row)
    told = {name: {"from": _told(name, before), "to": _told(name, after)} for name, (before, after) in changes.items()}
    events.append(session, job_id, EventType.JOB_CHANGED, {"by": by, "changes": told}, at=now, attempt=row.attempt or None)
    session.flush()
    return row


def _told(name: str, value: Any) -> Any:
    """Notes are free text that may be taken away again: events keep no more than their length."""
    return f"{len(value or '')} characters" if name == "notes" else value
