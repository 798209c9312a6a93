"""Floods of metrics and reports as odd as a worker gone wild sends them: a clear 4xx, and what was there is still there."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service import metrics
from tests.unit.access import bearer
from tests.unit.service_fixtures import Service
from workers.contract import MAX_INTEGER, MAX_POINTS, MAX_SERIES, EventType, attempt_token

Send = Callable[..., Any]


@pytest.fixture
def job(service: Service) -> str:
    return service.start()


@pytest.fixture
def send(client: TestClient, service: Service, job: str) -> Send:
    headers = bearer(attempt_token(service.settings.secret_key.get_secret_value(), job, 1)) | {"Content-Type": "application/json"}

    def post(sequence: int, *, content: bytes | None = None, **body: Any) -> Any:
        report = {"incarnation": 1, "sequence": sequence} | body
        return client.post(f"/v1/jobs/{job}/attempts/1/reports", content=content or json.dumps(report), headers=headers)

    return post


def points(num_steps: int, *names: str, value: float = 1.0) -> dict[str, Any]:
    return {"steps": list(range(num_steps)), "series": {name: [value] * num_steps for name in names}}


def loss(client: TestClient, job: str) -> Any:
    return client.get(f"/v1/jobs/{job}/metrics").json()["series"]["loss"]


def test_more_than_a_report_may_have_is_refused_and_nothing_is_lost(send: Send, client: TestClient, job: str) -> None:
    assert send(1, points=points(10, "loss")).status_code == 200
    before = loss(client, job)
    million = b'{"incarnation":1,"sequence":2,"points":{"steps":[0],"series":{"loss":[' + b",".join([b"1.0"] * 1_000_000) + b"]}}}"
    at = "2026-01-01T00:00:00Z"
    refused = {
        "a million floats": (422, {"content": million}),
        "six megabytes of floats": (413, {"content": million + b" " * 2**22}),
        "too many steps": (422, {"points": points(MAX_POINTS + 1, "loss")}),
        "too many series": (422, {"points": points(1, *(f"s{number}" for number in range(MAX_SERIES + 1)))}),
        "one value too few": (422, {"points": {"steps": [0, 1], "series": {"loss": [1.0]}}}),
        "a step that no column holds": (422, {"points": {"steps": [MAX_INTEGER + 1], "series": {"loss": [1.0]}}}),
        "a name as long as a book": (422, {"points": points(1, "n" * 10_000)}),
        "a name with NUL": (422, {"points": points(1, "n\0")}),
        "too many events": (422, {"events": [{"type": "evaluated", "at": at}] * 101}),
        "deep": (
            400,
            {
                "content": b'{"incarnation":1,"sequence":2,"events":[{"type":"evaluated","at":"%s","data":{"a":' % at.encode()
                + b"[" * 100_000
            },
        ),
    }
    for what, (status, body) in refused.items():
        answer = send(2, **body)
        assert answer.status_code == status, (what, answer.text[:500])
        assert answer.headers["content-type"] == "application/problem+json"
        assert len(answer.content) < 2000, what
    assert loss(client, job) == before
    assert send(2, points={"steps": [10], "series": {"loss": [0.5]}}).status_code == 200
    assert loss(client, job)["steps"] == [*range(11)]


def test_a_job_has_an_end_of_series_and_its_run_goes_on(send: Send, client: TestClient, job: str) -> None:
    for number in range(1, 1 + metrics.MAX_SERIES // MAX_SERIES):
        assert send(number, points=points(1, *(f"s{number}.{each}" for each in range(MAX_SERIES)))).status_code == 200
    answer = send(50, points=points(1, "one.more"))
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "points.series")
    assert send(51, points=points(1, "s1.0", value=2.0)).status_code == 200
    found = client.get(f"/v1/jobs/{job}/metrics", params={"names": "s1.0,one.more"}).json()["series"]
    assert found == {"s1.0": {"steps": [0], "values": [2.0]}}


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
def test_literals_that_are_no_json_are_kept_as_what_they_say(send: Send, client: TestClient, job: str, value: str) -> None:
    body = b'{"incarnation":1,"sequence":1,"points":{"steps":[0],"series":{"loss":[%s]}}}' % value.encode()
    assert send(1, content=body).status_code == 200
    assert loss(client, job)["values"] == [{"1e400": "Infinity", "-1e400": "-Infinity"}.get(value, value)]


def test_many_small_reports_are_all_there(send: Send, client: TestClient, job: str) -> None:
    for number in range(1, 101):
        assert send(number, points={"steps": [number], "series": {"loss": [float(number)]}}).status_code == 200
    assert loss(client, job)["steps"] == [*range(1, 101)]


@pytest.mark.parametrize(
    "data",
    [
        {"bytes": 2**63},
        {"bytes": -1},
        {"bytes": 10**400},
        {"bytes": True},
        {"key": "jobs/{job}/" + "k" * 5000, "bytes": 1},
        {"key": "jobs/{job}/../other", "bytes": 1, "sha256": "s" * 10_000},
    ],
)
def test_what_an_event_says_of_an_artifact_holds_up_no_run(
    send: Send, client: TestClient, service: Service, job: str, data: dict[str, Any]
) -> None:
    data = {"key": f"jobs/{job}/x"} | {
        name: value.replace("{job}", job) if isinstance(value, str) else value for name, value in data.items()
    }
    event = {"type": EventType.RECONSTRUCTIONS_WRITTEN, "at": "2026-01-01T00:00:00Z", "data": data}
    assert send(1, events=[event], points=points(3, "loss")).status_code == 200
    assert len(loss(client, job)["steps"]) == 3
    assert all(len(each["name"]) < 1000 and each["sha256"] is None for each in client.get(f"/v1/jobs/{job}/artifacts").json()["artifacts"])
