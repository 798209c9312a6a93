"""Tokens: what is kept and shown of them, how they end, when their use is noted; projects beside each other."""

import asyncio
import hashlib
import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, event, select

from mae_core.config import RUN_SPEC
from service import jobs, streams, tokens
from service.client import TokenRole
from service.db import utc_now
from service.errors import NotAuthenticated
from service.feed import Feed
from service.models import TokenRow
from service.tokens import Role
from tests.unit.access import bearer, make_token, revoked, token_id
from tests.unit.service_fixtures import API_TOKEN, PRETRAIN, PROBE, Service
from tests.unit.test_submission import error, succeed
from workers.contract import attempt_token

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def create(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/tokens", json={"name": "cells", "role": "submitter"} | body)
    assert answer.status_code == 201, answer.text
    assert answer.headers["cache-control"] == "no-store"
    view: dict[str, Any] = answer.json()
    return view


def test_a_token_is_told_once_and_kept_as_a_hash(client: TestClient, service: Service) -> None:
    made = create(client, project="cells")
    token = made.pop("token")
    assert token.startswith(made["prefix"] + "_")
    assert len(token.removeprefix(made["prefix"] + "_")) >= 43  # 256 bits
    assert made["prefix"] == f"mst_{made['id']}"
    assert (made["name"], made["role"], made["project"]) == ("cells", "submitter", "cells")
    assert (made["expires_at"], made["revoked_at"], made["last_used_at"]) == (None, None, None)
    assert client.get("/v1/tokens").json() == {"tokens": [made]}
    with service.database.read() as session:
        row = session.scalars(select(TokenRow)).one()
    assert row.sha256 == hashlib.sha256(token.encode()).hexdigest()
    assert token not in str([getattr(row, column.name) for column in TokenRow.__table__.columns])


def test_what_a_token_may_be(client: TestClient) -> None:
    assert create(client)["project"] == "default"
    assert create(client, role="admin")["project"] is None
    later = datetime.now(UTC) + timedelta(days=1)
    assert datetime.fromisoformat(create(client, expires_at=later.isoformat())["expires_at"]) == later

    def refused(**body: Any) -> str:
        return error(client.post("/v1/tokens", json={"name": "n", "role": "reader"} | body))[0]

    assert refused(role="admin", project="cells") == "project"
    assert refused(role="owner") == "role"
    assert refused(project="Cells & more") == "project"
    assert refused(expires_at="2020-01-01T00:00:00Z") == "expires_at"
    assert refused(expires_at="2100-01-01T00:00:00") == "expires_at"  # which zone's?
    assert refused(name="") == "name"
    assert refused(scope="all") == "scope"


def test_the_clients_roles_are_the_services() -> None:
    assert list(get_args(TokenRole)) == list(Role)


def test_a_revoked_token_is_worthless_at_once(client: TestClient) -> None:
    made = create(client)
    user = bearer(made["token"])
    assert client.get("/v1/jobs", headers=user).status_code == 200
    first = client.delete(f"/v1/tokens/{made['id']}")
    assert first.status_code == 200
    assert first.json()["revoked_at"] is not None
    assert client.delete(f"/v1/tokens/{made['id']}").json()["revoked_at"] == first.json()["revoked_at"]
    assert client.get("/v1/jobs", headers=user).status_code == 401
    assert client.delete("/v1/tokens/none").status_code == 404


def test_a_token_expires(service: Service) -> None:
    with service.database.write() as session:
        token = tokens.create(session, name="n", role=Role.READER, expires_at=NOW + timedelta(days=1), now=NOW)[1]
    with service.database.read() as session:
        assert tokens.recognise(session, token, now=NOW + timedelta(hours=23)).role == Role.READER
        with pytest.raises(NotAuthenticated, match=r"mst_\w+… has expired \(2026-01-02 00:00 UTC\)"):
            tokens.recognise(session, token, now=NOW + timedelta(days=1))


def test_the_last_use_is_noted_once_a_minute(service: Service) -> None:
    token = make_token(service, Role.READER)

    def use(at: datetime) -> datetime | None:
        with service.database.read() as session:
            row = tokens.recognise(session, token, now=at)
        tokens.note_use(service.database, row, now=at)
        with service.database.read() as session:
            return session.get_one(TokenRow, row.id).last_used_at

    assert use(NOW) == NOW
    assert use(NOW + timedelta(seconds=59)) == NOW
    assert use(NOW + timedelta(seconds=60)) == NOW + timedelta(seconds=60)


def test_reading_with_a_token_seldom_writes(client: TestClient, service: Service) -> None:
    user = bearer(make_token(service, Role.READER))
    engine: Engine = client.app.state.database.engine  # type: ignore[attr-defined]
    updates: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("UPDATE"):
            updates.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    for _ in range(5):
        assert client.get("/v1/jobs", headers=user).status_code == 200
    assert len(updates) == 1


def test_a_stream_ends_with_its_token(service: Service) -> None:
    """Not at once, but within seconds; who opens it again is told why."""
    job_id, allowed = service.start(), iter([True, False])
    seconds = iter(range(0, 10_000, 10))

    def authorize() -> None:
        if not next(allowed):
            raise NotAuthenticated

    async def follow() -> list[bytes]:
        stream = streams.of_job(Feed(service.database), job_id, after=0, authorize=authorize, clock=lambda: float(next(seconds)))
        return [chunk async for chunk in stream]

    [until_then, *pings] = asyncio.run(follow())
    assert until_then.startswith(b"event: event")
    assert set(pings) <= {b": ping\n\n"}
    assert list(allowed) == []


def test_the_stream_of_a_revoked_token_is_closed_by_the_route(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Callable[[], object]] = []

    async def stream(*args: Any, authorize: Callable[[], object], **options: Any) -> Any:
        made.append(authorize)
        yield b": ping\n\n"

    monkeypatch.setattr(streams, "of_job", stream)
    job_id, token = service.submit(), make_token(service, Role.READER)
    assert client.get(f"/v1/jobs/{job_id}/events", headers=bearer(token) | {"Accept": "text/event-stream"}).status_code == 200
    made[0]()
    with service.database.write() as session:
        tokens.revoke(session, token_id(token), now=utc_now())
    with pytest.raises(NotAuthenticated):
        made[0]()


def test_no_secret_is_in_a_log_line_an_event_or_an_answer(client: TestClient, service: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    made = create(client, role="submitter")
    ended = revoked(service)
    user = bearer(made["token"])
    job_id = client.post("/v1/jobs", json=PRETRAIN, headers=user).json()["id"]
    service.tick()
    worker = attempt_token(service.settings.secret_key.get_secret_value(), job_id, 1)
    seen = [client.get("/v1/tokens").text, client.delete(f"/v1/tokens/{made['id']}").text]
    callers = [user, bearer(ended), bearer(worker), bearer(API_TOKEN)]
    paths = [f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/events", "/v1/jobs", "/v1/tokens"]
    seen += [client.get(path, headers=headers).text for headers in callers for path in paths]
    seen += [repr(item.data) for item in service.events(job_id)]
    seen += [f"{record.getMessage()} {record.args!r}" for record in caplog.records]
    assert any(f"token {made['prefix']} made" in line for line in seen)
    secrets = [made["token"].removeprefix(made["prefix"]), ended.split("_", 2)[2], worker, API_TOKEN]
    assert [secret for secret in secrets if any(secret in text for text in seen)] == []


def test_an_idempotency_key_belongs_to_its_project(client: TestClient, service: Service) -> None:
    ours, theirs = (bearer(make_token(service, Role.SUBMITTER, project)) | {"Idempotency-Key": "k" * 200} for project in ("a" * 64, "b"))
    first, second = (client.post("/v1/jobs", json=PRETRAIN, headers=headers) for headers in (ours, theirs))
    other_body = client.post("/v1/jobs", json=PRETRAIN | {"seed": 1}, headers=ours)
    assert (first.status_code, second.status_code, other_body.status_code) == (201, 201, 422)
    assert first.json()["id"] != second.json()["id"]
    for headers, job in ((ours, first), (theirs, second)):
        again = client.post("/v1/jobs", json=PRETRAIN, headers=headers)
        assert (again.status_code, again.json()["id"]) == (200, job.json()["id"])


def test_racing_repeats_make_one_job_in_each_project(service: Service) -> None:
    spec, barrier, found = RUN_SPEC.validate_python(PRETRAIN), threading.Barrier(8), list[tuple[str, str]]()

    def submit(project: str) -> None:
        barrier.wait()
        made = jobs.submit(service.database, service.storage, service.settings, spec, idempotency_key="k", project=project)
        found.append((made.job.project, made.job.id))

    threads = [threading.Thread(target=submit, args=(project,)) for project in ("a", "b") * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert sorted(project for project, _ in set(found)) == ["a", "b"]


@pytest.mark.parametrize("finished", [True, False])
def test_an_encoder_of_another_projects_job_is_not_there(client: TestClient, service: Service, finished: bool) -> None:
    parent, missing = service.submit(project="theirs"), "0" * 17
    if finished:
        succeed(service, parent)
    ours, theirs = (bearer(make_token(service, Role.SUBMITTER, project)) for project in ("ours", "theirs"))
    uri = "s3://maestro/jobs/{}/encoder/"
    for headers in (ours, bearer(API_TOKEN)):  # an admin's job, too, is of one project
        for job in (parent, missing):
            assert error(probe(client, headers, job=job)) == ("encoder.job", f"there is no job {job}")
            for name in ("", "hf", "hf/model.safetensors"):
                told = error(probe(client, headers, artifact=uri.format(job) + name))
                assert told == ("encoder.artifact", f"there is no job {job}")
    assert probe(client, theirs, job=parent).status_code == 201
    if finished:
        assert probe(client, theirs, artifact=uri.format(parent)).status_code == 201


@pytest.mark.parametrize(
    "key",
    [
        *("/jobs/{}/encoder/", "jobs//{}/encoder/", "jobs/{}/encoder//", "./jobs/{}/encoder/"),
        *("x/../jobs/{}/encoder/", "jobs/x/../{}/encoder/", "../maestro/jobs/{}/encoder/"),
    ],
)
@pytest.mark.parametrize("bucket", ["maestro", "other"])
def test_no_way_of_writing_it_leads_round_the_check(client: TestClient, service: Service, key: str, bucket: str) -> None:
    parent = succeed(service, service.submit(project="theirs"))
    ours = bearer(make_token(service, Role.SUBMITTER, "ours"))
    field, message = error(probe(client, ours, artifact=f"s3://{bucket}/{key.format(parent)}"))
    assert field == "encoder.artifact"
    assert "has an empty part, or one of dots" in message


def probe(client: TestClient, headers: dict[str, str], **encoder: str) -> Any:
    return client.post("/v1/jobs", json=PROBE | {"encoder": encoder}, headers=headers)
