"""Webhooks: made, listed, changed, deleted. What they are sent: `outbox`; how: `deliveries`, `sender`.

A webhook's secret is an HMAC of its id: it can sign at any time, and is stored nowhere. Whoever wants another makes another webhook.
"""

import base64
import hashlib
import hmac
from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum

from sqlalchemy import delete as delete_rows
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.errors import Conflict, NoSuchWebhook
from service.ids import chance
from service.models import DeliveryRow, WebhookRow
from workers.contract import JobStatus

MAX_PER_PROJECT = 50  # each event is kept once for each of them
_ID_LENGTH = 12


class WebhookEvents(StrEnum):
    """Which events a webhook is sent."""

    ENDED = "ended"  # a job has succeeded, failed or been cancelled
    STATUS = "status"  # its status has changed
    ALL = "all"

    def include(self, type: str, data: dict[str, object]) -> bool:
        """Whether an event of this type and data is one of them."""
        if self is WebhookEvents.ALL:
            return True
        is_status = type == "status_changed"
        return is_status and (self is WebhookEvents.STATUS or JobStatus(str(data["to"])).is_terminal)


def create(session: Session, *, url: str, project: str | None, events: WebhookEvents, now: datetime) -> WebhookRow:
    """project None: of all. Raises Conflict where there are too many."""
    number = session.scalar(select(func.count()).select_from(WebhookRow).where(WebhookRow.project == project)) or 0
    if number >= MAX_PER_PROJECT:
        raise Conflict(f"There are {number} webhooks already, and no more may be; delete one that is not needed.")
    row = WebhookRow(id=chance(_ID_LENGTH), url=url, project=project, events=events, is_enabled=True, created_at=now)
    session.add(row)
    session.flush()
    return row


def list_all(session: Session, *, project: str | None) -> list[WebhookRow]:
    """Newest first. project None: of all."""
    query = select(WebhookRow).order_by(WebhookRow.created_at.desc(), WebhookRow.id)
    return list(session.scalars(query if project is None else query.where(WebhookRow.project == project)))


def find(session: Session, webhook_id: str, *, lock: bool = False) -> WebhookRow:
    row = session.get(WebhookRow, webhook_id, with_for_update=lock)
    if row is None:
        raise NoSuchWebhook(webhook_id)
    return row


def change(
    session: Session, webhook_id: str, *, url: str | None = None, events: WebhookEvents | None = None, enabled: bool | None = None
) -> WebhookRow:
    """None: as it is. What was pending when it was disabled is sent when it is enabled within a day, else dead."""
    row = find(session, webhook_id, lock=True)
    row.url = url or row.url
    row.events = events or row.events
    if enabled is not None:
        row.is_enabled = enabled
        row.disabled_reason = None if enabled else "disabled on request"
        row.failing_since = None
    session.flush()
    return row


def delete(session: Session, webhook_id: str) -> None:
    """With all that waits for it. What is added at that very moment, `deliveries.tidy` finds."""
    session.delete(find(session, webhook_id, lock=True))
    session.execute(delete_rows(DeliveryRow).where(DeliveryRow.webhook_id == webhook_id))


def secret_of(secret_key: str, webhook_id: str) -> str:
    """As Standard Webhooks writes secrets: `whsec_` and 32 bytes as base64."""
    key = hmac.new(secret_key.encode(), f"webhook:{webhook_id}".encode(), hashlib.sha256).digest()
    return f"whsec_{base64.b64encode(key).decode()}"


def sign(secrets: Iterable[str], message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers by which a receiver knows a message as ours, and as new (https://www.standardwebhooks.com).

    With several secrets it has a signature of each, and a receiver takes it that knows one of them.
    """
    keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in secrets]
    signatures = [hmac.new(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest() for key in keys]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(signature).decode()}" for signature in signatures),
    }
