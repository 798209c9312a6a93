"""What is amiss with a job that goes on all the same: raised and cleared by what its workers tell, or seen in their silence."""

from datetime import datetime, timedelta

from sqlalchemy.orm import object_session

from service.models import AttemptRow, JobRow
from workers.contract import CONDITION_MESSAGES, Condition, Event, EventType, JobStatus

REPORTS_DELAYED_AFTER = timedelta(seconds=60)  # workers tell something at least every ten seconds
_CLEARED_BY = {EventType.UPLOAD_RECOVERED, EventType.TRAINING_STATE_COMMITTED, EventType.RESULT_COMMITTED}
_HEARD_IN = {JobStatus.RUNNING, JobStatus.FINALIZING, JobStatus.PAUSING, JobStatus.STOPPING}


def follow(job: JobRow, event: Event) -> None:
    """What a worker's event means for the job's conditions."""
    known = dict(job.conditions or {})
    if event.type is EventType.UPLOAD_DELAYED:
        since = known.get(Condition.UPLOAD_DELAYED, {}).get("since", event.at.isoformat())
        job.conditions = known | {Condition.UPLOAD_DELAYED: {"since": since, "detail": str(event.data.get("message", ""))[:500]}}
    elif event.type in _CLEARED_BY and Condition.UPLOAD_DELAYED in known:
        job.conditions = {name: told for name, told in known.items() if name != Condition.UPLOAD_DELAYED} or None


def read(job: JobRow, *, now: datetime) -> dict[Condition, dict[str, object]]:
    """The conditions of a job, a row of an open session; none of one that has ended."""
    if JobStatus(job.status).is_terminal:
        return {}
    found = {Condition(name): told for name, told in (job.conditions or {}).items()}
    if (heard_at := _heard_at(job)) is not None and now - heard_at > REPORTS_DELAYED_AFTER:
        found[Condition.REPORTS_DELAYED] = {"since": heard_at, "detail": f"nothing was heard for {(now - heard_at).total_seconds():.0f} s"}
    return {name: {**told, "message": CONDITION_MESSAGES[name]} for name, told in found.items()}


def _heard_at(job: JobRow) -> datetime | None:
    """When the workers that are at work now were last heard; None where there are none."""
    session = object_session(job)
    attempt = session.get(AttemptRow, (job.id, job.attempt)) if session is not None and job.status in _HEARD_IN else None
    return None if attempt is None or attempt.ended_at is not None else attempt.last_report_at or attempt.started_at
