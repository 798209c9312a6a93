"""What no sane client sends is answered by a clear 4xx, on both databases, and nothing is changed by it."""

import base64
import gzip
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
AS_JSON = {"Content-Type": "application/json"}


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


@pytest.mark.parametrize(
    ("body", "encoding", "status", "kind"),
    [
        (gzip.compress(json.dumps(PRETRAIN).encode()), "gzip", 415, "unsupported-media-type"),
        (gzip.compress(b" " * 10**8), "gzip", 415, "unsupported-media-type"),  # a bomb: 100 MB of 100 kB
        (json.dumps(PRETRAIN).encode(), "br", 415, "unsupported-media-type"),
        (gzip.compress(json.dumps(PRETRAIN).encode()), None, 400, "bad-request"),
        (json.dumps(PRETRAIN).encode("latin-1") + b"\xe4", None, 400, "bad-request"),
    ],
)
def test_bodies_in_other_clothes(client: TestClient, body: bytes, encoding: str | None, status: int, kind: str) -> None:
    headers = {"Content-Type": "application/json"} | ({} if encoding is None else {"Content-Encoding": encoding})
    answer = client.post("/v1/jobs", content=body, headers=headers)
    assert (answer.status_code, answer.json()["type"]) == (status, f"urn:maestro:{kind}"), answer.text
    assert answer.json()["detail"].startswith("POST /v1/jobs: ")
    assert client.get("/v1/jobs").json()["jobs"] == []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_in_any_unicode_is_read_as_it_was_meant(client: TestClient, encoding: str) -> None:
    body = json.dumps(PRETRAIN | {"name": "Zellen ü"}, ensure_ascii=False).encode(encoding)
    answer = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["name"]) == (201, "Zellen ü")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/xml", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""]
)
def test_bodies_of_other_kinds(client: TestClient, kind: str) -> None:
    answer = client.post("/v1/jobs", content=json.dumps(PRETRAIN), headers={"Content-Type": kind})
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:maestro:invalid-request")


def test_of_a_field_that_is_there_twice_the_last_counts(client: TestClient) -> None:
    body = json.dumps(PRETRAIN)[:-1] + ', "name": "second", "seed": 1, "seed": 2}'
    answer = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["name"], answer.json()["spec"]["seed"]) == (201, "second", 2)


def test_cursors_that_no_page_of_ours_gave(client: TestClient, service: Service) -> None:
    ids = [service.submit() for _ in range(3)]
    cursor = client.get("/v1/jobs", params={"limit": 1}).json()["next_cursor"]
    raw = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
    forged = [
        base64.urlsafe_b64encode(each).decode().rstrip("=") for each in (raw[:-30] + b"'; --", raw + b"|x", raw.replace(b"|", b"|-", 1))
    ]
    for bad in (*forged, cursor[:10], cursor[1:], cursor * 3, cursor + "A" * 10_000, "0", "=" * 9, "💥", "null"):
        answer = client.get("/v1/jobs", params={"cursor": bad})
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "cursor"), bad
        assert len(answer.content) < 1000
    page = client.get(
        "/v1/jobs", params={"cursor": cursor, "kind": "pretrain", "text": "digits"}
    )  # of another listing: a place all the same
    assert [job["id"] for job in page.json()["jobs"]] == ids[1::-1]


def test_thousands_of_query_parameters(client: TestClient, service: Service) -> None:
    job_id = service.submit()
    many = "&".join(f"x{number}=1" for number in range(5_000))
    assert [job["id"] for job in client.get(f"/v1/jobs?{many}").json()["jobs"]] == [job_id]
    answer = client.get("/v1/jobs?" + "&".join(["label=a"] * 5_000))
    assert (answer.status_code, len(answer.content) < 1000) == (422, True)


def test_numbers_that_no_column_holds(client: TestClient, service: Service) -> None:
    job_id = service.start()
    for query in ("events?after=%d", "metrics?from_step=%d", "metrics?to_step=%d", "logs?offset=%d", "logs?attempt=%d", "events?limit=%d"):
        for number in (2**63, -1, 10**400):
            answer = client.get(f"/v1/jobs/{job_id}/{query % number}")
            assert (answer.status_code, answer.json()["type"]) == (422, "urn:maestro:invalid-request"), (query, number)
    for priority in (2**31, -(2**31) - 1, 2**63, 10**400, 1.5, "1e3", [], None):
        answer = client.patch(f"/v1/jobs/{job_id}", content=json.dumps({"priority": priority}), headers={"If-Match": "*", **AS_JSON})
        assert answer.status_code == 422, priority
