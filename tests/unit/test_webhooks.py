"""Webhooks over REST, their secrets, and the outbox that each transaction fills."""

import base64
import hmac
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, select, update

from service import events, webhooks
from service.db import utc_now
from service.models import DeliveryRow, EventRow, WebhookRow
from service.outbox import MAX_DATA_BYTES
from service.tokens import Role
from tests.unit.access import bearer, make_token
from tests.unit.service_fixtures import Service
from workers.contract import EventType

URL = "https://hooks.example.com/maestro"


def create(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/webhooks", json={"url": URL} | body)
    assert answer.status_code == 201, answer.text
    view: dict[str, Any] = answer.json()
    return view


def outbox(service: Service, webhook_id: str) -> list[DeliveryRow]:
    with service.database.read() as session:
        return list(session.scalars(select(DeliveryRow).where(DeliveryRow.webhook_id == webhook_id).order_by(DeliveryRow.event_id)))


def test_a_webhook_is_made_shown_changed_and_deleted(client: TestClient) -> None:
    answer = client.post("/v1/webhooks", json={"url": URL, "project": "cells"})
    assert (answer.status_code, answer.headers["cache-control"]) == (201, "no-store")
    made = answer.json()
    path = answer.headers["location"]
    secret = made.pop("secret")
    assert len(base64.b64decode(secret.removeprefix("whsec_"))) == 32
    assert (made["url"], made["project"], made["events"], made["enabled"]) == (URL, "cells", "ended", True)
    assert client.get(path).json() == made
    assert client.get("/v1/webhooks").json() == {"webhooks": [made]}
    assert client.get("/v1/webhooks", params={"project": "other"}).json() == {"webhooks": []}
    changed = client.patch(path, json={"events": "all", "enabled": False}).json()
    assert changed == made | {"events": "all", "enabled": False, "disabled_reason": "disabled on request"}
    assert client.patch(path, json={"enabled": True}).json() == made | {"events": "all"}
    assert client.patch(path, json={}).json() == made | {"events": "all"}
    assert client.delete(path).status_code == 204
    for method in ("GET", "PATCH", "DELETE"):
        assert client.request(method, path, json={} if method == "PATCH" else None).json()["type"] == "urn:maestro:not-found"


@pytest.mark.parametrize(
    "body",
    [
        {"url": "https://127.0.0.1/"},
        {"url": "https://2130706433/"},
        {"url": "http://example.com/"},
        {"url": "ftp://example.com/"},
        {"url": "https://example.com/" + "x" * 3000},
        {"url": "not an address"},
        {"url": URL, "events": "some"},
        {"url": URL, "project": "No Name"},
        {"url": URL, "secret": "mine"},
        {},
    ],
    ids=str,
)
def test_what_no_webhook_is_made_of(client: TestClient, body: dict[str, Any]) -> None:
    assert client.post("/v1/webhooks", json=body).status_code == 422
    made = create(client)
    if body:
        assert client.patch(f"/v1/webhooks/{made['id']}", json=body).status_code == 422


def test_there_is_an_end_to_webhooks(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "MAX_PER_PROJECT", 2)
    for project in ("a", "a", "b", None, None):
        create(client, project=project)
    for project in ("a", None):
        assert client.post("/v1/webhooks", json={"url": URL, "project": project}).status_code == 409


def test_the_webhooks_of_another_project_are_as_those_that_do_not_exist(client: TestClient, service: Service) -> None:
    theirs, everybodys, ours = create(client, project="theirs"), create(client), create(client, project="ours")
    submitter = bearer(make_token(service, Role.SUBMITTER, "ours"))
    assert [each["id"] for each in client.get("/v1/webhooks", headers=submitter).json()["webhooks"]] == [ours["id"]]
    assert client.post("/v1/webhooks", json={"url": URL}, headers=submitter).json()["project"] == "ours"
    assert client.post("/v1/webhooks", json={"url": URL, "project": "theirs"}, headers=submitter).status_code == 403
    for method, rest in (("GET", ""), ("PATCH", ""), ("DELETE", ""), ("GET", "/deliveries"), ("POST", "/deliveries/1/redeliver")):
        for webhook_id in (theirs["id"], everybodys["id"], "none"):
            answer = client.request(method, f"/v1/webhooks/{webhook_id}{rest}", headers=submitter, json={})
            assert (answer.status_code, answer.json()["detail"]) == (404, f"There is no webhook {webhook_id}.")
    assert client.get(f"/v1/webhooks/{ours['id']}", headers=submitter).status_code == 200


def test_signatures_are_those_of_the_standard() -> None:
    """The example of Standard Webhooks' own libraries."""
    headers = webhooks.sign(["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_each_webhook_and_each_service_has_its_own_secret() -> None:
    made = {webhooks.secret_of(key, webhook) for key in ("k" * 32, "l" * 32) for webhook in ("a", "b")}
    assert len(made) == 4
    assert not any(hmac.compare_digest(one, "k" * 32) for one in made)


def test_the_outbox_has_what_each_webhook_asked_for(client: TestClient, service: Service) -> None:
    ours = {kind: create(client, events=kind, project="ours")["id"] for kind in ("ended", "status", "all")}
    others = create(client, events="all", project="others")["id"]
    everybodys = create(client, events="all")["id"]
    disabled = create(client, events="all", project="ours")["id"]
    client.patch(f"/v1/webhooks/{disabled}", json={"enabled": False})
    job_id = service.submit(project="ours", name="cells")
    service.tick()
    service.cancel(job_id)
    service.ray.end(f"{job_id}-a1", service.ray.info(f"{job_id}-a1").status.STOPPED)  # type: ignore[union-attr]
    service.tick(2)
    service.tick(2)
    told = {row.id: row for row in service.events(job_id)}
    assert service.job(job_id).status == "cancelled"
    ids = {name: [row.event_id for row in outbox(service, webhook)] for name, webhook in ours.items()}
    assert ids["all"] == [row.event_id for row in outbox(service, everybodys)] == list(told)
    assert ids["status"] == [row.id for row in told.values() if row.type == "status_changed"]
    assert ids["ended"] == [ids["status"][-1]]
    assert outbox(service, others) == outbox(service, disabled) == []
    [delivery] = outbox(service, ours["ended"])
    page = client.get(f"/v1/jobs/{job_id}/events").json()["events"]
    assert delivery.payload == {
        "type": "status_changed",
        "timestamp": page[-1]["at"],
        "data": {"event": page[-1], "job": {"id": job_id, "project": "ours", "name": "cells", "kind": "pretrain"}},
    }


def test_an_event_that_is_not_kept_is_not_sent(client: TestClient, service: Service) -> None:
    webhook = create(client, events="all")["id"]
    job_id = service.submit()
    before = [row.event_id for row in outbox(service, webhook)]

    def fail() -> None:
        with service.database.write() as session:
            events.append(session, job_id, EventType.EVALUATED, {}, at=utc_now())
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [row.event_id for row in outbox(service, webhook)] == before == [row.id for row in service.events(job_id)]


def test_many_events_of_one_transaction_cost_one_query(client: TestClient, service: Service) -> None:
    job_id = service.submit()
    asked: list[str] = []

    def note(*arguments: Any) -> None:
        if "webhooks" in arguments[2]:
            asked.append(arguments[2])

    event.listen(service.database.engine, "before_cursor_execute", note)
    with service.database.write() as session:
        for _ in range(20):
            events.append(session, job_id, EventType.EVALUATED, {}, at=utc_now())
    assert len(asked) == 1
    with service.database.write() as session:
        session.execute(update(WebhookRow).values(events="all"))
    assert len(asked) == 2  # that update alone: no events, no question


def test_large_data_is_left_out(client: TestClient, service: Service) -> None:
    webhook = create(client, events="all")["id"]
    job_id = service.submit()
    with service.database.write() as session:
        events.append(session, job_id, EventType.EVALUATED, {"a": "x" * MAX_DATA_BYTES}, at=utc_now())
        events.append(session, job_id, EventType.EVALUATED, {"a": "x" * 1000}, at=utc_now())
    large, small = [row.payload["data"]["event"]["data"] for row in outbox(service, webhook)[-2:]]
    assert list(large) == ["left_out"]
    assert small == {"a": "x" * 1000}
    with service.database.read() as session:
        assert session.scalars(select(EventRow.data).order_by(EventRow.id.desc()).offset(1)).first() == {"a": "x" * MAX_DATA_BYTES}
