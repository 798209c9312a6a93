"""What no sane client sends is answered by a clear 4xx, on both databases, and nothing is changed by it."""

import json
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from tests.unit.service_fixtures import PRETRAIN, Service

IDS = [
    "\0",
    "%00",
    "a" * 10_000,
    "ünï",
    "💥",
    "\ud7ff",
    "..",
    "%2e%2e",
    "a'; DROP TABLE jobs; --",
    "%ff%fe",
    " ",
    "NULL",
    "1" * 400,
    "{}",
    "*",
]
ROUTES = [
    *(("GET", ""), ("HEAD", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/retry"), ("POST", "/cancel"), ("POST", "/pause")),
    *(("POST", "/resume"), ("GET", "/events"), ("GET", "/metrics"), ("GET", "/logs"), ("GET", "/artifacts"), ("GET", "/artifacts/x")),
]


def test_hostile_ids(client: TestClient, service: Service) -> None:
    kept = service.submit()
    for job_id in IDS:
        path = job_id if job_id.startswith("%") else quote(job_id, safe="")
        for method, rest in ROUTES:
            options: dict[str, Any] = {"json": {"name": "x"}, "headers": {"If-Match": "*"}} if method == "PATCH" else {}
            answer = client.request(method, f"/v1/jobs/{path}{rest}", **options)
            # 406: `..` is the way up, to the stream of all jobs
            assert answer.status_code in (404, 405, 406), (method, job_id, rest, answer.status_code)
            if method != "HEAD":
                assert answer.headers["content-type"] == "application/problem+json"
                assert len(answer.content) < 1000, "what is wrong is not sent back whole"
    assert service.job(kept).version == 1


def test_hostile_artifact_names(client: TestClient, service: Service) -> None:
    job_id = service.submit()
    for name in IDS:
        path = name if name.startswith("%") else quote(name, safe="")
        answer = client.get(f"/v1/jobs/{job_id}/artifacts/{path}", follow_redirects=False)
        assert answer.status_code in (404, 200), (name, answer.status_code)  # 200: `..` is the way up, to what lists
        assert len(answer.content) < 12_000


@pytest.mark.parametrize(
    "query",
    [
        *(
            "status=",
            "status=queued%00",
            "status=%ff",
            "kind=%ff",
            "kind=",
            "label=",
            "text=",
            "text=%00",
            "limit=0",
            "limit=-1",
            "limit=1e3",
        ),
        *(
            "limit=99999999999999999999",
            "limit=NaN",
            "cursor=%00",
            "cursor=%ff",
            "fields=%00",
            "fields=%ff",
            "project=%00",
            "project=..",
            "project=",
        ),
        *(
            "created_after=%00",
            "created_after=99999999999999999999",
            "created_before=2026-13-01T00:00:00Z",
            "created_before=",
        ),
        *("label=" + "a" * 265, "text=" + "a" * 201, "&".join(["label=a"] * 9), "&".join(["status=queued"] * 12), "fields=" + "a," * 600),
    ],
)
def test_hostile_filters(client: TestClient, query: str) -> None:
    answer = client.get(f"/v1/jobs?{query}")
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:maestro:invalid-request"), answer.text
    assert len(answer.content) < 3000


@pytest.mark.parametrize(
    "query", ["label=%00", "label=%ff", "label='", "text=%25%ff7", "text=x'%22", "text=a%5C", "text=%F0%9F%92%A5a", "unknown=1"]
)
def test_odd_filters_find_nothing(client: TestClient, service: Service, query: str) -> None:
    job_id = service.submit()
    answer = client.get(f"/v1/jobs?{query}")
    assert answer.status_code == 200, answer.text
    assert [job["id"] for job in answer.json()["jobs"]] == ([job_id] if query == "unknown=1" else [])


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"\xff\xfe", b"\0", b"[]", b"null", b"1", b'"x"', b"{", b'{"kind": "pretrain", "\\ud800": 1}', b'{"kind": "\\ud800"}'),
        *(b"[" * 100_000, b'{"a":' * 100_000, b'{"kind": 1e999}', b"NaN", b'{"kind": "pretrain", "seed": ' + b"9" * 5000 + b"}"),
        json.dumps(PRETRAIN | {"name": "\ud800"}).encode(),
        json.dumps(PRETRAIN | {"labels": {"\ud800": "v"}}).encode(),
        json.dumps(PRETRAIN | {"data": {"source": "/\ud800"}}).encode(),
    ],
)
def test_hostile_bodies(client: TestClient, service: Service, body: bytes) -> None:
    job_id = service.submit()
    for method, path in (("POST", "/v1/jobs"), ("PATCH", f"/v1/jobs/{job_id}")):
        answer = client.request(method, path, content=body, headers={"Content-Type": "application/json", "If-Match": "*"})
        assert 400 <= answer.status_code < 500, (method, answer.status_code)
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["type"] in ("urn:maestro:invalid-request", "urn:maestro:bad-request")
        assert len(answer.content) < 20_000
    assert len(client.get("/v1/jobs").json()["jobs"]) == 1


@pytest.mark.parametrize("key", ["\0", "\xff", "k" * 201, "", "a\tb"])
def test_odd_idempotency_keys(client: TestClient, key: str) -> None:
    answer = client.post("/v1/jobs", json=PRETRAIN, headers={"Idempotency-Key": key.encode("latin-1")})
    assert answer.status_code in (201, 422), answer.text
    again = client.post("/v1/jobs", json=PRETRAIN, headers={"Idempotency-Key": key.encode("latin-1")})
    assert again.status_code == {201: 200, 422: 422}[answer.status_code]
