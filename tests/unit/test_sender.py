"""Deliveries to a real receiver on loopback: tried again, given up, sent again; and what happens when senders die or compete."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from service import deliveries, outbound, sender, webhooks
from service.app import create_app
from service.counters import Tally
from service.db import utc_now
from service.deliveries import DISABLED_AFTER, KEPT_DEAD, KEPT_DELIVERED, KEPT_TRYING, PER_WEBHOOK, DeliveryStatus
from service.models import DeliveryRow, WebhookRow
from service.sender import Sender
from tests.unit.scripted_server import Answer, Request, ScriptedServer, scripted_server
from tests.unit.service_fixtures import API_TOKEN, Service
from workers.contract import EventType

DAY = timedelta(days=1).total_seconds()


@dataclass
class Post:
    """A service whose webhooks may reach loopback, and a receiver that answers as it is told."""

    service: Service
    client: TestClient
    server: ScriptedServer | None = None
    tally: Tally = field(default_factory=Tally)
    reply: Callable[[Request], Answer] = field(default=lambda request: Answer(204))

    def webhook(self, **body: Any) -> dict[str, Any]:
        assert self.server is not None
        answer = self.client.post("/v1/webhooks", json={"url": f"{self.server.url}/hook", "events": "all"} | body)
        assert answer.status_code == 201, answer.text
        view: dict[str, Any] = answer.json()
        return view

    def sender(self) -> Sender:
        return Sender(self.service.database, self.service.settings, tally=self.tally, clock=lambda: self.service.now)

    def send(self, seconds: float = 0.0) -> int:
        """A round, some time later."""
        self.service.now = max(self.service.now, utc_now()) + timedelta(seconds=seconds)
        made = self.sender()
        number = made.tick()
        made.drain()
        return number

    def rows(self) -> list[DeliveryRow]:
        with self.service.database.read() as session:
            return list(session.scalars(select(DeliveryRow).order_by(DeliveryRow.event_id)))

    def shown(self, webhook_id: str) -> dict[str, Any]:
        view: dict[str, Any] = self.client.get(f"/v1/webhooks/{webhook_id}").json()
        return view

    @property
    def requests(self) -> list[Request]:
        assert self.server is not None
        return self.server.requests


@pytest.fixture
def post(service: Service) -> Iterator[Post]:
    service.settings = service.settings.model_copy(update={"webhooks_to_private_addresses": True})
    app = create_app(service.settings, storage=service.storage, ray=service.ray)
    with TestClient(app, headers={"Authorization": f"Bearer {API_TOKEN}"}) as client:
        made = Post(service, client)
        with scripted_server(lambda request: made.reply(request)) as server:
            made.server = server
            yield made


def ids(requests: list[Request]) -> list[str]:
    return [request.headers["webhook-id"] for request in requests]


def test_a_delivery_is_signed_and_arrives_once(post: Post) -> None:
    made = post.webhook()
    job_id = post.service.submit()
    assert post.send() == 1
    assert post.send(DAY) == 0
    [request] = post.requests
    [event] = post.service.events(job_id)
    body = json.loads(request.body)
    assert (body["type"], body["data"]["event"]["id"], body["data"]["job"]["id"]) == ("job_queued", event.id, job_id)
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-id"] == f"{made['id']}_{event.id}"
    sent_at = int(request.headers["webhook-timestamp"])
    assert (
        request.headers["webhook-signature"]
        == webhooks.sign([made["secret"]], f"{made['id']}_{event.id}", sent_at, request.body)["webhook-signature"]
    )
    assert abs(sent_at - utc_now().timestamp()) < 60
    [row] = post.rows()
    assert (row.status, row.num_tries, row.status_code, row.detail, row.due_at, row.lease_token) == ("delivered", 1, 204, None, None, None)


@pytest.mark.parametrize("status", [0, 302, 400, 404, 500, 503])
def test_what_fails_is_tried_again_after_growing_pauses_under_the_same_id(post: Post, status: int) -> None:
    made = post.webhook()
    post.reply = lambda request: Answer(status, body=b"no", headers={"Location": "/elsewhere"})
    post.service.submit()
    pauses = []
    for _ in range(12):
        assert post.send() == 1
        [row] = post.rows()
        assert (row.status, row.lease_token, row.status_code) == ("pending", None, status or None)
        assert row.due_at is not None
        pauses.append((row.due_at - post.service.now).total_seconds())
        assert post.send() == 0
        post.service.now = row.due_at
    assert all(0.8 * 5 * 2**number <= pause <= 1.2 * 5 * 2**number for number, pause in enumerate(pauses[:9]))
    assert all(0.8 * 3600 <= pause <= 1.2 * 3600 for pause in pauses[10:])
    assert set(ids(post.requests)) == {f"{made['id']}_{row.event_id}"}
    assert {request.path for request in post.requests} == {"/hook"}
    assert post.shown(made["id"])["failing_since"] is not None
    post.reply = lambda request: Answer(200)
    assert post.send() == 1
    assert [row.status for row in post.rows()] == ["delivered"]
    assert post.shown(made["id"])["failing_since"] is None


def test_after_a_day_it_is_dead_and_can_be_sent_again(post: Post) -> None:
    made = post.webhook()
    path = f"/v1/webhooks/{made['id']}/deliveries"
    post.reply = lambda request: Answer(500, body=b"out of order")
    post.service.submit()
    post.send()
    post.send(KEPT_TRYING.total_seconds())
    [told] = post.client.get(path, params={"status": "dead"}).json()["deliveries"]
    assert (told["num_tries"], told["status_code"], told["detail"]) == (2, 500, "500 Internal Server Error: out of order")
    assert post.send(DAY) == 0
    again = post.client.post(f"{path}/{told['event_id']}/redeliver")
    assert (again.status_code, again.json()["status"]) == (202, "pending")
    post.reply = lambda request: Answer(200)
    assert post.send() == 1
    assert [row.status for row in post.rows()] == ["delivered"]
    assert len(set(ids(post.requests))) == 1
    assert len({request.body for request in post.requests}) == 1
    assert post.client.post(f"{path}/{told['event_id']}/redeliver").status_code == 202  # also what was delivered
    assert post.send() == 1
    assert post.client.post(f"{path}/{told['event_id'] + 1}/redeliver").status_code == 404
    assert post.client.post(f"{path}/{2**63}/redeliver").status_code == 422


def test_a_dispatcher_that_was_away_for_days_still_tries(post: Post) -> None:
    post.webhook()
    post.service.submit()
    assert post.send(5 * DAY) == 1
    assert [row.status for row in post.rows()] == ["delivered"]


def test_a_webhook_that_is_dead_for_days_is_disabled(post: Post) -> None:
    made = post.webhook()
    post.reply = lambda request: Answer(500)
    post.service.submit()
    for _ in range(2):
        post.send(KEPT_TRYING.total_seconds())
    assert post.shown(made["id"])["enabled"]  # one message alone, for a day
    post.service.submit()
    post.send(DISABLED_AFTER.total_seconds())
    told = post.shown(made["id"])
    assert not told["enabled"]
    assert told["disabled_reason"].startswith("nothing was delivered since 20")
    assert "500" in told["disabled_reason"]
    post.service.submit()
    assert [row.status for row in post.rows()] == ["dead", "dead"]
    path = f"/v1/webhooks/{made['id']}"
    assert post.client.post(f"{path}/deliveries/{post.rows()[0].event_id}/redeliver").status_code == 409
    assert post.client.patch(path, json={"enabled": True}).json()["failing_since"] is None
    post.service.submit()
    assert post.send() == 1


def test_a_receiver_that_is_gone_is_asked_no_more(post: Post) -> None:
    made = post.webhook()
    post.reply = lambda request: Answer(410)
    post.service.submit()
    post.send()
    assert [row.status for row in post.rows()] == ["dead"]
    assert post.shown(made["id"])["disabled_reason"] == "the receiver answered 410 Gone"


def test_what_waits_for_a_disabled_webhook(post: Post) -> None:
    made = post.webhook()
    post.service.submit()
    path = f"/v1/webhooks/{made['id']}"
    post.client.patch(path, json={"enabled": False})
    assert post.send() == 0
    post.client.patch(path, json={"enabled": True})
    assert post.send() == 1
    post.service.submit()
    post.client.patch(path, json={"enabled": False})
    tidy(post, KEPT_TRYING)
    assert [(row.status, row.detail) for row in post.rows()] == [("delivered", None), ("dead", "the webhook is disabled")]


def tidy(post: Post, later: timedelta) -> None:
    with post.service.database.write() as session:
        deliveries.tidy(session, now=utc_now() + later)


def test_deliveries_are_kept_for_a_bounded_time(post: Post) -> None:
    post.webhook()
    post.service.submit()
    post.send()
    post.reply = lambda request: Answer(410)
    post.service.submit()
    post.send()
    post.webhook()
    post.service.submit()
    kept: list[list[str]] = []
    for later in (KEPT_DELIVERED - timedelta(hours=1), KEPT_DELIVERED + timedelta(hours=1), KEPT_DEAD + timedelta(hours=1)):
        tidy(post, later)
        kept.append([row.status for row in post.rows()])
    assert kept == [["delivered", "dead", "pending"], ["dead", "pending"], ["pending"]]


def test_what_a_deleted_webhook_leaves(post: Post) -> None:
    first, second = post.webhook(), post.webhook()
    post.service.submit()
    post.client.delete(f"/v1/webhooks/{first['id']}")
    assert [row.webhook_id for row in post.rows()] == [second["id"]]
    with post.service.database.write() as session:  # as if an event had come at that very moment
        session.execute(update(DeliveryRow).values(webhook_id="gone"))
    assert post.send() == 0
    tidy(post, timedelta(0))
    assert post.rows() == []


def test_a_sender_that_dies_after_sending(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the send and its record: another sends the same again when the lease has run out, and no sooner."""
    post.webhook()
    post.service.submit()
    with monkeypatch.context() as patch:
        patch.setattr(Sender, "_record", lambda *arguments: None)
        assert post.send() == 1
    assert post.send(DAY) == 0
    with post.service.database.write() as session:
        session.execute(update(DeliveryRow).values(lease_expires_at=utc_now() - timedelta(seconds=1)))
    assert post.send() == 1
    first, second = post.requests
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body
    assert [row.status for row in post.rows()] == ["delivered"]


def test_a_sender_that_comes_too_late_changes_nothing(post: Post) -> None:
    """Its lease ran out, and another has failed meanwhile: what the late one says is not recorded over that."""
    post.webhook()
    post.service.submit()
    with post.service.database.write() as session:
        [late] = deliveries.claim(session, now=utc_now(), limit=9, under_way=deliveries.Counter())
        session.execute(update(DeliveryRow).values(lease_expires_at=utc_now() - timedelta(seconds=1)))
    post.reply = lambda request: Answer(500)
    assert post.send() == 1
    with post.service.database.write() as session:
        assert deliveries.record(session, late, outbound.Answer(200, "200 OK"), now=utc_now()) is None
    assert [(row.status, row.num_tries) for row in post.rows()] == [("pending", 1)]


def test_a_slow_receiver_keeps_nobody_else_waiting(post: Post) -> None:
    slow, quick = post.webhook(project="slow"), post.webhook(project="quick")
    for _ in range(20):
        post.service.submit(project="slow")
    answers = threading.Event()
    arrived = threading.Semaphore(0)

    def reply(request: Request) -> Answer:
        if request.headers["webhook-id"].startswith(slow["id"]):
            arrived.release()
            answers.wait(60)
        return Answer(200)

    post.reply = reply
    post.service.now = utc_now()
    made = post.sender()
    assert made.tick() == PER_WEBHOOK
    for _ in range(PER_WEBHOOK):
        assert arrived.acquire(timeout=30)
    post.service.submit(project="quick")
    post.service.now = utc_now()
    assert made.tick() == 1
    answers.set()
    made.drain()
    while made.tick():
        made.drain()
    assert sorted(ids(post.requests)) == sorted(f"{row.webhook_id}_{row.event_id}" for row in post.rows())
    assert {row.status for row in post.rows()} == {"delivered"}
    assert len([row for row in post.rows() if row.webhook_id == quick["id"]]) == 1


def test_many_webhooks_behind_one_that_is_full(post: Post) -> None:
    """What is due longest is all of one webhook's; one claim finds the others all the same."""
    first = post.webhook(project="a")
    for _ in range(30):
        post.service.submit(project="a")
    others = [post.webhook(project="b")["id"] for _ in range(3)]
    post.service.submit(project="b")
    with post.service.database.write() as session:
        letters = deliveries.claim(session, now=utc_now(), limit=sender.NUM_AT_ONCE, under_way=deliveries.Counter())
    assert sorted(letter.webhook_id for letter in letters) == sorted([first["id"]] * PER_WEBHOOK + others)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_two_dispatchers_send_nothing_twice(post: Post) -> None:
    for _ in range(4):
        post.webhook()
    for _ in range(15):
        post.service.submit()
    post.service.now = utc_now()

    def work() -> None:
        made = post.sender()
        while made.tick():
            made.drain()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    while post.send():  # what one left to another that had just stopped
        pass
    assert len(ids(post.requests)) == len(set(ids(post.requests))) == 60
    assert {row.status for row in post.rows()} == {DeliveryStatus.DELIVERED}


def test_no_transaction_is_open_while_it_sends(post: Post) -> None:
    post.webhook()
    held: list[int] = []

    def reply(request: Request) -> Answer:
        held.append(post.service.database.engine.pool.checkedout())  # type: ignore[attr-defined]
        return Answer(200)

    post.reply = reply
    post.service.submit()
    post.send()
    assert held == [0]


def test_private_addresses_are_refused_when_the_setting_is_taken_back(post: Post) -> None:
    post.webhook()
    post.service.submit()
    post.service.settings = post.service.settings.model_copy(update={"webhooks_to_private_addresses": False})
    post.send()
    assert post.requests == []
    [row] = post.rows()
    assert row.status == "pending"
    assert row.detail is not None
    assert "127.0.0.1 is no address of the internet" in row.detail


def test_the_loop_begins_and_ends(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "POLL_SECONDS", 0.01)
    post.webhook()
    arrived = threading.Event()

    def reply(request: Request) -> Answer:
        arrived.set()
        return Answer(200)

    post.reply = reply
    made = Sender(post.service.database, post.service.settings, tally=post.tally)
    thread = threading.Thread(target=made.run)
    thread.start()
    post.service.submit()
    assert arrived.wait(30)
    made.stop()
    thread.join(30)
    assert not thread.is_alive()
    assert [row.status for row in post.rows()] == ["delivered"]


def test_pages_of_deliveries(post: Post) -> None:
    made = post.webhook()
    path = f"/v1/webhooks/{made['id']}/deliveries"
    for _ in range(5):
        post.service.submit()
    expected = [row.event_id for row in reversed(post.rows())]
    first = post.client.get(path, params={"limit": 3}).json()
    rest = post.client.get(path, params={"limit": 3, "before": first["next_before"]}).json()
    assert [each["event_id"] for each in first["deliveries"] + rest["deliveries"]] == expected
    assert rest["next_before"] is None
    assert first["deliveries"][0]["type"] == EventType.JOB_QUEUED
    with post.service.database.read() as session:
        secret = webhooks.secret_of(post.service.settings.secret_key.get_secret_value(), made["id"])
        assert base64.b64decode(secret[6:]) == base64.b64decode(made["secret"][6:])
        assert secret not in str(vars(session.get_one(WebhookRow, made["id"])))
