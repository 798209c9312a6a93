"""What is on its way to webhooks: claimed under a lease, recorded, sent again, tidied away.

A delivery that fails is tried again after a pause that doubles up to an hour, for a day; then it is dead: kept, listed, and sent again on
request. Its id is the same each time: a receiver may get a message twice, and knows it by that.
"""

import json
import random
import secrets
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy import ColumnElement, and_, delete, or_, select, tuple_, update
from sqlalchemy.engine import CursorResult
from sqlalchemy.orm import Session

from service.db import db_now
from service.errors import Conflict, NotFound
from service.models import DeliveryRow, WebhookRow
from service.outbound import Answer

KEPT_TRYING = timedelta(hours=24)
PER_WEBHOOK = 4  # at once from one process, so that a slow receiver keeps nobody else waiting
LEASE_SECONDS = 120.0  # much longer than a send may take
KEPT_DELIVERED = timedelta(days=7)
KEPT_DEAD = timedelta(days=30)
DISABLED_AFTER = timedelta(days=3)  # without one success, when a delivery is given up
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 3600.0
_TIDIED_AT_ONCE = 10_000
_GONE = 410
_NO_LEASE: dict[str, None] = {"lease_token": None, "lease_expires_at": None}


class DeliveryStatus(StrEnum):
    """What has become of a delivery."""

    PENDING = "pending"
    DELIVERED = "delivered"
    DEAD = "dead"


@dataclass(frozen=True)
class Letter:
    """A claimed delivery: all that it takes to send it and to record what became of it."""

    webhook_id: str
    event_id: int
    url: str
    body: bytes
    num_tries: int
    give_up_at: datetime
    token: str

    @property
    def id(self) -> str:
        """The same at each try: receivers know a repeat by it."""
        return f"{self.webhook_id}_{self.event_id}"


def is_any_due(session: Session, now: datetime) -> bool:
    return session.scalar(select(DeliveryRow.event_id).where(_is_due(now)).limit(1)) is not None


def claim(session: Session, *, now: datetime, limit: int, under_way: Counter[str]) -> list[Letter]:
    """Due deliveries that nobody holds, those due longest first; of each webhook so many that PER_WEBHOOK are `under_way`."""
    taken, counts = list[Letter](), Counter(under_way)
    while len(taken) < limit:
        full = [webhook for webhook, number in counts.items() if number >= PER_WEBHOOK]
        rows = session.execute(
            select(DeliveryRow, WebhookRow.url)
            .join(WebhookRow, WebhookRow.id == DeliveryRow.webhook_id)
            .where(_is_due(now), WebhookRow.is_enabled, DeliveryRow.webhook_id.not_in(full))
            .order_by(DeliveryRow.due_at, DeliveryRow.event_id)
            .limit(limit - len(taken))
            .with_for_update(skip_locked=True, of=DeliveryRow)
        ).all()
        found = list[Letter]()
        for row, url in rows:
            if counts[row.webhook_id] < PER_WEBHOOK:
                counts[row.webhook_id] += 1
                found.append(_lease(session, row, url))
        session.flush()
        taken += found
        if not found:
            break
    return taken


def _lease(session: Session, row: DeliveryRow, url: str) -> Letter:
    token = secrets.token_hex(16)
    held = update(DeliveryRow).where(_is(row.webhook_id, row.event_id))
    session.execute(held.values(lease_token=token, lease_expires_at=db_now(LEASE_SECONDS)), execution_options=_AS_IT_IS)
    body = json.dumps(row.payload, separators=(",", ":")).encode()
    return Letter(row.webhook_id, row.event_id, url, body, row.num_tries, row.give_up_at, token)


def record(session: Session, letter: Letter, answer: Answer, *, now: datetime) -> DeliveryStatus | None:
    """What a try came to, and what follows for the webhook. None where another has sent it meanwhile: then that one's word counts."""
    webhook = session.get(WebhookRow, letter.webhook_id, with_for_update=True)  # first, as who deletes it does
    if answer.is_taken:
        status, due_at = DeliveryStatus.DELIVERED, None
    elif now >= letter.give_up_at or answer.status == _GONE:
        status, due_at = DeliveryStatus.DEAD, None
    else:
        status, due_at = DeliveryStatus.PENDING, now + timedelta(seconds=pause_seconds(letter.num_tries))
    values = {
        "status": status,
        "due_at": due_at,
        "finished_at": None if due_at else now,
        "num_tries": letter.num_tries + 1,
        "tried_at": now,
        "status_code": answer.status,
        "detail": None if answer.is_taken else answer.detail,
    }
    ours = and_(_is(letter.webhook_id, letter.event_id), DeliveryRow.lease_token == letter.token)
    result = session.execute(update(DeliveryRow).where(ours).values(**values, **_NO_LEASE), execution_options=_AS_IT_IS)
    assert isinstance(result, CursorResult)
    if result.rowcount == 0:
        return None
    if webhook is not None:
        _judge(webhook, answer, status, now=now)
    return status


def _judge(webhook: WebhookRow, answer: Answer, status: DeliveryStatus, *, now: datetime) -> None:
    if answer.is_taken:
        webhook.failing_since = None
        return
    webhook.failing_since = since = webhook.failing_since or now
    if answer.status == _GONE:
        _disable(webhook, "the receiver answered 410 Gone")
    elif status is DeliveryStatus.DEAD and now - since >= DISABLED_AFTER:
        _disable(webhook, f"nothing was delivered since {since:%Y-%m-%d %H:%M} UTC; last: {answer.detail}")


def _disable(webhook: WebhookRow, reason: str) -> None:
    webhook.is_enabled, webhook.disabled_reason = False, reason


def pause_seconds(num_tries: int) -> float:
    """Before the next try, when so many were made before the one that failed; not the same for all that failed together."""
    return min(_FIRST_PAUSE_SECONDS * 2.0 ** min(num_tries, 30), _LONGEST_PAUSE_SECONDS) * random.uniform(0.8, 1.2)


def list_page(session: Session, webhook_id: str, *, status: DeliveryStatus | None, before: int | None, limit: int) -> list[DeliveryRow]:
    """Newest events first."""
    query = select(DeliveryRow).where(DeliveryRow.webhook_id == webhook_id).order_by(DeliveryRow.event_id.desc()).limit(limit)
    if status is not None:
        query = query.where(DeliveryRow.status == status)
    if before is not None:
        query = query.where(DeliveryRow.event_id < before)
    return list(session.scalars(query))


def redeliver(session: Session, webhook: WebhookRow, event_id: int, *, now: datetime) -> DeliveryRow:
    """Send it (again) now, and try for another day. Raises NotFound, and Conflict where the webhook is disabled."""
    row = session.get(DeliveryRow, (webhook.id, event_id), with_for_update=True)
    if row is None:
        raise NotFound(f"The webhook {webhook.id} has no delivery {event_id}; delivered ones are kept for {KEPT_DELIVERED.days} days.")
    if not webhook.is_enabled:
        raise Conflict(f"The webhook {webhook.id} is disabled ({webhook.disabled_reason}); enable it first.")
    row.status, row.due_at, row.give_up_at, row.finished_at, row.num_tries = DeliveryStatus.PENDING, now, now + KEPT_TRYING, None, 0
    session.flush()
    return row


def tidy(session: Session, *, now: datetime) -> None:
    """Delete what was kept for long enough, and what waits for a webhook that is no more; give up what waits for a disabled one."""
    old = or_(
        and_(DeliveryRow.status == DeliveryStatus.DELIVERED, DeliveryRow.finished_at < now - KEPT_DELIVERED),
        DeliveryRow.finished_at < now - KEPT_DEAD,
    )
    forsaken = and_(DeliveryRow.due_at.is_not(None), DeliveryRow.webhook_id.not_in(select(WebhookRow.id)))
    for condition in (old, forsaken):
        some = select(DeliveryRow.webhook_id, DeliveryRow.event_id).where(condition).limit(_TIDIED_AT_ONCE)
        session.execute(
            delete(DeliveryRow).where(tuple_(DeliveryRow.webhook_id, DeliveryRow.event_id).in_(some)), execution_options=_AS_IT_IS
        )
    disabled = select(WebhookRow.id).where(WebhookRow.is_enabled.is_(False))
    waits = and_(DeliveryRow.due_at.is_not(None), DeliveryRow.give_up_at <= now, DeliveryRow.webhook_id.in_(disabled))
    given_up = {"status": DeliveryStatus.DEAD, "due_at": None, "finished_at": now, "detail": "the webhook is disabled"}
    session.execute(update(DeliveryRow).where(waits).values(given_up), execution_options=_AS_IT_IS)


_AS_IT_IS = {"synchronize_session": False}


def _is(webhook_id: str, event_id: int) -> ColumnElement[bool]:
    return and_(DeliveryRow.webhook_id == webhook_id, DeliveryRow.event_id == event_id)


def _is_due(now: datetime) -> ColumnElement[bool]:
    return and_(DeliveryRow.due_at <= now, or_(DeliveryRow.lease_expires_at.is_(None), DeliveryRow.lease_expires_at < db_now()))
