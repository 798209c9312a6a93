"""Webhooks: make, list, show, change, delete; their deliveries. For submitters in their project, for admins in all."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field, HttpUrl

from service import deliveries, webhooks
from service.auth import WEBHOOK_OWNERS, Caller
from service.db import utc_now
from service.deliveries import DeliveryStatus
from service.outbound import check_url
from service.projects import ProjectName
from service.routes.answers import PROBLEMS, answer, problems
from service.routes.state import DatabaseDep, SettingsDep
from service.views import DeliveryPage, DeliveryView, NewWebhookView, WebhookList, WebhookView
from service.webhooks import WebhookEvents
from workers.contract import MAX_INTEGER

router = APIRouter(prefix="/webhooks", tags=["webhooks"], responses=PROBLEMS)
CallerDep = Annotated[Caller, Depends(WEBHOOK_OWNERS)]
Url = Annotated[HttpUrl, Field(description="where messages are sent, by POST")]


class NewWebhook(BaseModel):
    """Where to send which events."""

    model_config = ConfigDict(extra="forbid")

    url: Url
    events: WebhookEvents = WebhookEvents.ENDED
    project: Annotated[ProjectName | None, Field(description="of an admin: of this project alone, else of all; else the token's own")] = (
        None
    )


class WebhookChange(BaseModel):
    """What is left out stays as it is."""

    model_config = ConfigDict(extra="forbid")

    url: Url | None = None
    events: WebhookEvents | None = None
    enabled: bool | None = None


@router.post("", response_model=NewWebhookView, status_code=201, responses=problems(409))
def create_webhook(new: NewWebhook, caller: CallerDep, database: DatabaseDep, settings: SettingsDep) -> Response:
    """Make a webhook. The secret, with which its messages are signed, is in this answer and nowhere else."""
    check_url(str(new.url), allow_private=settings.webhooks_to_private_addresses)
    project = caller.project_of(new.project)
    with database.write() as session:
        row = webhooks.create(session, url=str(new.url), project=project, events=new.events, now=utc_now())
        secret = webhooks.secret_of(settings.secret_key.get_secret_value(), row.id)
        view = NewWebhookView(**WebhookView.of(row).model_dump(), secret=secret)
    return answer(view, status_code=201, headers={"Cache-Control": "no-store", "Location": f"/v1/webhooks/{view.id}"})


@router.get("", response_model=WebhookList)
def list_webhooks(
    caller: CallerDep,
    database: DatabaseDep,
    project: Annotated[ProjectName | None, Query(description="of an admin: of this project alone")] = None,
) -> Response:
    """Webhooks of the token's project, of an admin all, newest first."""
    with database.read() as session:
        return answer(WebhookList(webhooks=[WebhookView.of(row) for row in webhooks.list_all(session, project=caller.project_of(project))]))


@router.get("/{webhook_id}", response_model=WebhookView)
def get_webhook(webhook_id: str, database: DatabaseDep) -> Response:
    """One webhook, without its secret."""
    with database.read() as session:
        return answer(WebhookView.of(webhooks.find(session, webhook_id)))


@router.patch("/{webhook_id}", response_model=WebhookView)
def change_webhook(webhook_id: str, change: WebhookChange, database: DatabaseDep, settings: SettingsDep) -> Response:
    """Change it. Enabling one that was disabled sends what it has missed for less than a day."""
    url = None if change.url is None else str(change.url)
    if url is not None:
        check_url(url, allow_private=settings.webhooks_to_private_addresses)
    with database.write() as session:
        return answer(WebhookView.of(webhooks.change(session, webhook_id, url=url, events=change.events, enabled=change.enabled)))


@router.delete("/{webhook_id}", status_code=204)
def delete_webhook(webhook_id: str, database: DatabaseDep) -> None:
    """Delete it, with its deliveries."""
    with database.write() as session:
        webhooks.delete(session, webhook_id)


@router.get("/{webhook_id}/deliveries", response_model=DeliveryPage)
def list_deliveries(
    webhook_id: str,
    database: DatabaseDep,
    status: DeliveryStatus | None = None,
    before: Annotated[int | None, Query(ge=0, le=MAX_INTEGER, description="the next_before of an earlier answer")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Response:
    """Newest events first. Delivered ones are kept for 7 days, dead ones for 30."""
    with database.read() as session:
        webhooks.find(session, webhook_id)
        rows = deliveries.list_page(session, webhook_id, status=status, before=before, limit=limit)
    views = [DeliveryView.of(row) for row in rows]
    return answer(DeliveryPage(deliveries=views, next_before=views[-1].event_id if len(views) == limit else None))


@router.post("/{webhook_id}/deliveries/{event_id}/redeliver", response_model=DeliveryView, status_code=202, responses=problems(409))
def redeliver(webhook_id: str, event_id: Annotated[int, Path(ge=0, le=MAX_INTEGER)], database: DatabaseDep) -> Response:
    """Send an event again, under the same id. 409: the webhook is disabled."""
    with database.write() as session:
        row = deliveries.redeliver(session, webhooks.find(session, webhook_id), event_id, now=utc_now())
        return answer(DeliveryView.of(row), status_code=202)
