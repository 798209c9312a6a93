"""Figures for Prometheus: what they count, what a scrape costs, who may read them."""

import re
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine, event, text

from service import counters, telemetry
from service.app import create_app
from service.counters import MEANINGS, Count, Tally
from service.db import utc_now
from service.models import JobRow
from service.tokens import Role
from tests.unit.access import bearer, make_token
from tests.unit.service_fixtures import API_TOKEN, PRETRAIN, Service
from workers.contract import WORKER_EVENTS, EventType, JobStatus, attempt_token


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "FRESH_SECONDS", 0.0)


def scrape(client: TestClient) -> dict[str, float]:
    """Each sample by its name and labels as Prometheus writes them."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(answer.text)
    return {
        sample.name + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_jobs_and_the_queue(client: TestClient, service: Service) -> None:
    empty = scrape(client)
    assert {empty[f"maestro_jobs status={status}"] for status in JobStatus} == {0}
    assert empty["maestro_queue_age_seconds"] == empty["maestro_queue_jobs"] == empty["maestro_dispatch_lag_seconds"] == 0
    service.ray.cluster = type(service.ray.cluster)(0.0, 0.0)
    service.submit()
    waits = service.submit()
    service.tick()
    with service.database.write() as session:
        session.get_one(JobRow, waits).waiting_since = utc_now() - timedelta(seconds=1000)
        session.get_one(JobRow, waits).due_at = utc_now() - timedelta(seconds=50)
    told = scrape(client)
    assert (told["maestro_jobs status=queued"], told["maestro_queue_jobs"], told["maestro_database_up"]) == (2, 2, 1)
    assert 1000 <= told["maestro_queue_age_seconds"] < 2000
    assert 50 <= told["maestro_dispatch_lag_seconds"] < 1000


def test_requests_by_route_and_not_by_job(client: TestClient, service: Service) -> None:
    job_id = service.submit()
    client.post("/v1/jobs", json=PRETRAIN)
    client.post("/v1/jobs", json={})
    for path in (f"/v1/jobs/{job_id}", "/v1/jobs/none", "/v1/nowhere", "/somewhere/else"):
        client.get(path)
    client.request("BREW", "/v1/jobs")
    told = {name: value for name, value in scrape(client).items() if name.startswith("maestro_request_seconds_count")}
    assert told == {
        "maestro_request_seconds_count method=POST route=/v1/jobs status=2xx": 1,
        "maestro_request_seconds_count method=POST route=/v1/jobs status=4xx": 1,
        "maestro_request_seconds_count method=GET route=/v1/jobs/{job_id} status=2xx": 1,
        "maestro_request_seconds_count method=GET route=/v1/jobs/{job_id} status=4xx": 1,
        "maestro_request_seconds_count method=GET route=none status=4xx": 2,
        "maestro_request_seconds_count method=other route=/v1/jobs status=4xx": 1,
    }
    assert not re.search(job_id, client.get("/metrics").text)


def test_what_workers_tell(client: TestClient, service: Service) -> None:
    before = scrape(client)
    assert {before[f"maestro_worker_events_total type={kind}"] for kind in WORKER_EVENTS} == {0}, "else a first one is no increase"
    job_id = service.start()
    headers = bearer(attempt_token(service.settings.secret_key.get_secret_value(), job_id, 1))
    points = {"steps": [1, 2], "series": {"loss": [0.5, 0.25], "lr": [0.1, 0.1], "norm": [1.0, None]}}
    at = utc_now().isoformat()
    told = [{"type": EventType.UPLOAD_DELAYED, "at": at}, {"type": EventType.SAVE_FAILED, "at": at}]
    report = {"incarnation": 1, "sequence": 1, "points": points, "events": told}
    assert client.post(f"/v1/jobs/{job_id}/attempts/1/reports", json=report, headers=headers).status_code == 200
    assert client.post(f"/v1/jobs/{job_id}/attempts/2/reports", json=report, headers=headers).status_code == 401
    found = scrape(client)
    assert (found["maestro_ingest_batches_total"], found["maestro_ingest_points_total"]) == (1, 5)
    assert found["maestro_worker_events_total type=upload_delayed"] == found["maestro_worker_events_total type=save_failed"] == 1


def test_what_dispatchers_count(client: TestClient, service: Service) -> None:
    assert set(MEANINGS) == set(Count)
    with service.database.read() as session:
        assert counters.read(session) == dict.fromkeys(Count, 0)
    service.submit()
    service.tick()
    service.ray.jobs["orphan"] = service.ray.jobs[next(iter(service.ray.jobs))].__class__(
        "orphan", next(iter(service.ray.jobs.values())).status, metadata=next(iter(service.ray.jobs.values())).metadata
    )
    for _ in range(3):
        service.dispatcher._reconciler.sweep_when_due()
        service.pass_time(60)
    service.dispatcher.tally.add(Count.LEASES_LOST, 3)
    service.dispatcher.tally.store(service.database)
    service.dispatcher.tally.store(service.database)
    found = scrape(client)
    assert found["maestro_claims_total"] == 1
    assert found["maestro_leases_lost_total"] == 3
    assert found["maestro_orphans_stopped_total"] == 1
    assert found["maestro_webhooks_delivered_total"] == 0


def test_counts_that_could_not_be_stored_are_kept(service: Service) -> None:
    tally = Tally()
    tally.add(Count.CLAIMS, 2)
    with service.database.write() as session:
        session.execute(text("ALTER TABLE counters RENAME TO hidden"))
    with pytest.raises(Exception, match="counters"):
        tally.store(service.database)
    with service.database.write() as session:
        session.execute(text("ALTER TABLE hidden RENAME TO counters"))
    tally.store(service.database)
    with service.database.read() as session:
        assert counters.read(session)[Count.CLAIMS] == 2


def test_a_database_that_is_away_is_told(client: TestClient, service: Service) -> None:
    service.submit()
    with service.database.write() as session:
        session.execute(text("ALTER TABLE counters RENAME TO hidden"))
    found = scrape(client)
    assert found["maestro_database_up"] == 0
    assert "maestro_claims_total" not in found
    assert found["process_resident_memory_bytes"] > 0


def test_a_scrape_reads_indices_alone(client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more often than every few seconds."""
    monkeypatch.setattr(telemetry, "FRESH_SECONDS", 1000.0)
    asked: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *rest: Any) -> None:
        if "tokens" not in statement:
            asked.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        scrape(client)
        number = len(asked)
        scrape(client)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    statements = [statement for statement in asked if statement.startswith("SELECT")]
    assert len(asked) == number
    assert len(statements) == 5
    if service.database.engine.dialect.name == "sqlite":
        with service.database.engine.connect() as connection:
            for statement in statements:
                plan = " ".join(row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}"))
                assert "INDEX" in plan or "counters" in plan, (statement, plan)


def test_who_may_read_them(service: Service) -> None:
    token = "prometheus-token-of-enough-length"
    service.settings = type(service.settings).model_validate(service.settings.model_dump() | {"metrics_token": token})
    with TestClient(create_app(service.settings, storage=service.storage, ray=service.ray)) as client:

        def status(path: str, token: str | None) -> int:
            return client.get(path, headers={} if token is None else bearer(token)).status_code

        assert [status("/metrics", each) for each in (None, "wrong", token, API_TOKEN)] == [401, 401, 200, 200]
        assert [status("/metrics", make_token(service, role)) for role in Role] == [403, 403, 200]
        assert [status(path, token) for path in ("/v1/jobs", "/v1/tokens")] == [401, 401]
