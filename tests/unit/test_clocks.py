"""Clocks that are wrong, and times as odd as they can be written: no age is negative, nothing overflows."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service import leases
from service.db import utc_now
from tests.unit.access import bearer
from tests.unit.service_fixtures import Service
from workers.contract import attempt_token

Send = Callable[[datetime | str], Any]
BEYOND = ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"]


@pytest.fixture
def job(service: Service) -> str:
    return service.start()


@pytest.fixture
def send(client: TestClient, service: Service, job: str) -> Send:
    """Has a worker tell of an upload that waits, by its clock."""

    def post(at: datetime | str) -> Any:
        event = {"type": "upload_delayed", "at": at.isoformat() if isinstance(at, datetime) else at, "data": {}}
        headers = bearer(attempt_token(service.settings.secret_key.get_secret_value(), job, 1))
        report = {"incarnation": 1, "sequence": 1, "events": [event]}
        return client.post(f"/v1/jobs/{job}/attempts/1/reports", json=report, headers=headers)

    return post


@pytest.mark.parametrize("ahead", [timedelta(days=1), timedelta(days=-1)], ids=["ahead", "behind"])
def test_a_workers_clock_that_is_wrong_by_a_day(send: Send, client: TestClient, service: Service, job: str, ahead: timedelta) -> None:
    """What it tells of the future is of now. What is long past may be true: reports can wait for a day."""
    at = utc_now() + ahead
    assert send(at).status_code == 200
    told = client.get(f"/v1/jobs/{job}/events").json()["events"][-1]
    kept = datetime.fromisoformat(told["at"])
    assert kept == at if ahead < timedelta(0) else abs(kept - utc_now()) < timedelta(hours=1)
    view = client.get(f"/v1/jobs/{job}").json()
    assert datetime.fromisoformat(view["conditions"]["upload_delayed"]["since"]) <= utc_now()
    assert datetime.fromisoformat(view["created_at"]) <= datetime.fromisoformat(view["started_at"]) <= utc_now()


def test_a_dispatcher_whose_clock_is_ahead_by_a_day_takes_no_lease(service: Service) -> None:
    job_id = service.submit()

    def claim(owner: str, now: datetime) -> list[str]:
        with service.database.write() as session:
            return [each.job.id for each in leases.claim(session, owner=owner, now=now, seconds=30)]

    assert claim("one", utc_now()) == [job_id]
    assert claim("ahead", utc_now() + timedelta(days=1)) == []


@pytest.mark.parametrize(
    ("at", "means"),
    [
        ("2026-01-01T12:00:00+14:00", "2025-12-31T22:00:00Z"),
        ("2026-01-01T12:00:00-12:00", "2026-01-02T00:00:00Z"),
        ("2026-01-01T12:00:00.123456789Z", "2026-01-01T12:00:00.123456Z"),
        ("1767268800", "2026-01-01T12:00:00Z"),
        ("2024-02-29T23:59:59+05:45", "2024-02-29T18:14:59Z"),
    ],
)
def test_any_zone_and_form_is_read(send: Send, client: TestClient, job: str, at: str, means: str) -> None:
    assert send(at).status_code == 200
    told = client.get(f"/v1/jobs/{job}/events").json()["events"][-1]
    assert datetime.fromisoformat(told["at"]) == datetime.fromisoformat(means)


@pytest.mark.parametrize("at", [*BEYOND, "2026-01-01T12:00:00", "2026-02-30T00:00:00Z", "2026-01-01T12:00:00+99:00", "", "now", "1e300"])
def test_what_is_no_time_of_ours(send: Send, client: TestClient, service: Service, job: str, at: str) -> None:
    before = len(service.events(job))
    answers = [send(at), client.post("/v1/tokens", json={"name": "n", "role": "reader", "expires_at": at})]
    answers += [client.get("/v1/jobs", params={name: at}) for name in ("created_after", "created_before")]
    for answer in answers:
        assert (answer.status_code, answer.json()["type"]) == (422, "urn:maestro:invalid-request"), answer.text
    assert len(service.events(job)) == before


@pytest.mark.parametrize("at", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"])
def test_the_first_and_the_last_time(client: TestClient, service: Service, job: str, at: str) -> None:
    params = {"created_after" if at.startswith("0") else "created_before": at}
    assert [each["id"] for each in client.get("/v1/jobs", params=params).json()["jobs"]] == [job]
    assert client.get("/v1/jobs", params={"created_before" if at.startswith("0") else "created_after": at}).json()["jobs"] == []


def test_a_token_may_expire_at_the_end_of_time(client: TestClient) -> None:
    expires_at = datetime(9999, 12, 31, tzinfo=UTC)
    made = client.post("/v1/tokens", json={"name": "n", "role": "reader", "expires_at": expires_at.isoformat()})
    assert made.status_code == 201
    assert client.get("/v1/jobs", headers=bearer(made.json()["token"])).status_code == 200
