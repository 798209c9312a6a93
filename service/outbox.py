"""The outbox: in the transaction that writes a job's events, a row for each webhook that is to be sent them.

Not a reader that follows the events' ids: on PostgreSQL those of two jobs may be seen out of order, and one would be passed by.
"""

import json
from typing import Any, NamedTuple

from sqlalchemy import event, or_, select
from sqlalchemy.orm import Session

from service.db import utc_now
from service.deliveries import KEPT_TRYING, DeliveryStatus
from service.models import DeliveryRow, EventRow, JobRow, WebhookRow
from service.views import EventView
from service.webhooks import WebhookEvents

MAX_DATA_BYTES = 2**16  # of an event's data in a message; whoever wants more asks the API for it
_NEW_EVENTS = "new_events"


class _Pair(NamedTuple):
    """A webhook, and a job whose events it may be sent."""

    id: str
    events: str
    job_id: str
    name: str
    kind: str
    project: str


def note(session: Session, row: EventRow) -> None:
    """Have the event sent. One query for each transaction, when it is committed."""
    session.info.setdefault(_NEW_EVENTS, []).append(row)


@event.listens_for(Session, "before_commit")
def _address(session: Session) -> None:
    rows: list[EventRow] = session.info.pop(_NEW_EVENTS, [])
    if not rows:
        return
    session.flush()
    concerned = or_(WebhookRow.project.is_(None), WebhookRow.project == JobRow.project)
    pairs = session.execute(
        select(WebhookRow.id, WebhookRow.events, JobRow.id.label("job_id"), JobRow.name, JobRow.kind, JobRow.project)
        .join(JobRow, concerned)
        .where(WebhookRow.is_enabled, JobRow.id.in_({row.job_id for row in rows}))
    )
    for pair in map(_Pair._make, pairs):
        wanted = WebhookEvents(pair.events)
        session.add_all(_delivery(pair, row) for row in rows if row.job_id == pair.job_id and wanted.include(row.type, row.data))


def _delivery(pair: _Pair, row: EventRow) -> DeliveryRow:
    now = utc_now()  # the event's own time may be another machine's, and long ago
    return DeliveryRow(
        webhook_id=pair.id,
        event_id=row.id,
        job_id=row.job_id,
        type=row.type,
        payload=_payload(pair, row),
        status=DeliveryStatus.PENDING,
        created_at=now,
        due_at=now,
        give_up_at=now + KEPT_TRYING,
    )


def _payload(pair: _Pair, row: EventRow) -> dict[str, Any]:
    told = EventView.of(row).model_dump(mode="json")
    if len(json.dumps(told["data"])) > MAX_DATA_BYTES:
        told["data"] = {"left_out": f"more than {MAX_DATA_BYTES} bytes; ask for the job's events"}
    job = {"id": pair.job_id, "project": pair.project, "name": pair.name, "kind": pair.kind}
    return {"type": row.type, "timestamp": told["at"], "data": {"event": told, "job": job}}
