"""Every route of the app, asked by everybody who might: what is expected follows from the table of routes itself."""

from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from service import artifacts
from service.auth import ADMINS, USERS, WEBHOOK_OWNERS, Audience, require_attempt_token
from service.db import utc_now
from service.tokens import Role
from tests.unit.access import PUBLIC, WORKERS, Route, bearer, expired, make_token, revoked, routes, routes_of, token_id
from tests.unit.service_fixtures import API_TOKEN, PRETRAIN, Service
from workers.contract import attempt_token

CHOOSE_A_PROJECT = {("GET", "/v1/jobs"), ("POST", "/v1/jobs"), ("GET", "/v1/events"), ("GET", "/v1/cluster"), ("POST", "/v1/estimates")}
OF_NO_PROJECT = {("GET", "/v1/recipes")}
ANSWERED = (200, 202, 307, 406, 409, 428)  # 406: a stream alone; 409: what this asks before has paused and cancelled the job


def ask(client: TestClient, route: Route, job_id: str, headers: dict[str, str], **options: Any) -> httpx.Response:
    if route.method == "PATCH":
        options.setdefault("json", {})
    encoded: Any = {name: value.encode("latin-1") for name, value in headers.items()}
    answer: httpx.Response = client.request(route.method, route.filled(job_id), headers=encoded, follow_redirects=False, **options)
    return answer


def job_with_all(service: Service, project: str = "default") -> str:
    """A running job of which every route has something to tell."""
    job_id = service.start(project=project)
    key = f"{artifacts.job_prefix(job_id)}encoder/a.txt"
    with service.database.write() as session:
        artifacts.add(session, job_id, key=key, kind="encoder", attempt=1, num_bytes=1, bucket="maestro", at=utc_now())
    return job_id


def test_every_route_says_whom_it_is_for(client: TestClient) -> None:
    audiences = {f"{route.method} {route.path}": route.audience for route in routes(client)}
    assert {path.partition(" ")[2] for path, audience in audiences.items() if audience is None} == PUBLIC
    assert {path for path, audience in audiences.items() if audience == WORKERS} == {"POST /v1/jobs/{job_id}/attempts/{attempt}/reports"}
    assert {path for path, audience in audiences.items() if audience is ADMINS} == {
        *("POST /v1/tokens", "GET /v1/tokens", "DELETE /v1/tokens/{token_id}"),
        "GET /metrics",
    }
    assert {path for path, audience in audiences.items() if audience is WEBHOOK_OWNERS} == {
        *("POST /v1/webhooks", "GET /v1/webhooks", "GET /v1/webhooks/{webhook_id}"),
        *("PATCH /v1/webhooks/{webhook_id}", "DELETE /v1/webhooks/{webhook_id}", "GET /v1/webhooks/{webhook_id}/deliveries"),
        "POST /v1/webhooks/{webhook_id}/deliveries/{event_id}/redeliver",
    }
    assert {audience for audience in audiences.values() if audience not in (None, WORKERS, ADMINS, WEBHOOK_OWNERS)} == {USERS}


@pytest.mark.parametrize("dependencies", [[], [Depends(require_attempt_token), Depends(USERS)], [Depends(USERS), Depends(ADMINS)]])
def test_a_route_that_does_not_say_whom_it_is_for_is_found(dependencies: list[Any]) -> None:
    app = FastAPI(openapi_url=None)
    app.add_api_route("/v1/jobs/{job_id}/attempts/{attempt}/forgotten", lambda: None, dependencies=dependencies)
    with pytest.raises(LookupError, match="forgotten"):
        list(routes_of(app.routes))


def test_nobody_may_write_who_may_only_read(client: TestClient) -> None:
    for route in routes(client):
        if isinstance(route.audience, Audience) and route.method != "GET":
            assert route.audience.role_for(route.method).includes(Role.SUBMITTER), route


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {API_TOKEN}"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer \xff"},
        {"Authorization": "Bearer mst_"},
        {"Authorization": "Bearer mst_\xff_\x7f"},
    ],
    ids=["none", "wrong", "basic", "empty", "not ascii", "half", "odd"],
)
def test_no_route_but_the_public_ones_answers_without_a_token(client: TestClient, service: Service, headers: dict[str, str]) -> None:
    del client.headers["Authorization"]
    expect_401(client, job_with_all(service), headers)


def test_no_route_answers_a_token_that_is_good_no_more(client: TestClient, service: Service) -> None:
    job_id, good = job_with_all(service), make_token(service, Role.ADMIN)
    told = expect_401(client, job_id, bearer(f"mst_{token_id(good)}_{'x' * 43}"))
    assert told == expect_401(client, job_id, bearer(f"mst_{'0' * 10}_{'x' * 43}"))  # an id that there is tells no more than another
    assert "was revoked" in expect_401(client, job_id, bearer(revoked(service)))
    assert "has expired" in expect_401(client, job_id, bearer(expired(service)))
    half_known = f"mst_{token_id(revoked(service))}_{'x' * 43}"
    assert told == expect_401(client, job_id, bearer(half_known))


def expect_401(client: TestClient, job_id: str, headers: dict[str, str]) -> str:
    """What users are told by every route that is not public."""
    details = set()
    for route in routes(client):
        answer = ask(client, route, job_id, headers)
        assert (answer.status_code == 401) != (route.audience is None), (route, answer.status_code)
        if answer.status_code == 401:
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["type"] == "urn:maestro:not-authenticated"
            details |= {answer.json()["detail"]} if route.audience != WORKERS else set()
    [detail] = details
    return str(detail)


@pytest.mark.parametrize("role", Role)
def test_a_role_may_do_what_its_routes_say_and_no_more(client: TestClient, service: Service, role: Role) -> None:
    job_id, headers = job_with_all(service), bearer(make_token(service, role))
    for route in routes(client):
        answer = ask(client, route, job_id, headers)
        if route.audience == WORKERS:
            assert answer.status_code == 401, route  # not even an admin reports for a worker
        elif isinstance(route.audience, Audience) and not role.includes(route.audience.role_for(route.method)):
            assert answer.status_code == 403, route
            assert answer.headers["content-type"] == "application/problem+json"
            needed = route.audience.role_for(route.method)
            assert f"takes a token of the role {needed}" in answer.json()["detail"]
            assert f"is a {role}'s" in answer.json()["detail"]
        else:
            assert answer.status_code in (*ANSWERED, 404, 422, 503), (route, answer.status_code)
            assert answer.status_code != 404 or "{token_id}" in route.path or "{webhook_id}" in route.path, route


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_the_jobs_of_another_project_are_as_those_that_do_not_exist(client: TestClient, service: Service, accept: str) -> None:
    job_id, missing = job_with_all(service, "theirs"), "0" * 17
    for role in (Role.READER, Role.SUBMITTER):
        headers = bearer(make_token(service, role, "ours")) | {"Accept": accept}
        for route in of_one_job(client):
            if not role.includes(route.audience.role_for(route.method)):  # type: ignore[union-attr]
                continue
            for options in ({}, {"params": {"limit": "x", "attempt": "0"}}):
                theirs, none = ask(client, route, job_id, headers, **options), ask(client, route, missing, headers, **options)
                assert theirs.status_code == none.status_code == 404, route
                assert theirs.text.replace(job_id, missing) == none.text
                assert theirs.headers["content-type"] == none.headers["content-type"] == "application/problem+json"
    assert service.job(job_id).desired_state == "run"
    owner = bearer(make_token(service, Role.SUBMITTER, "theirs"))
    for route in of_one_job(client):
        assert ask(client, route, job_id, owner).status_code in ANSWERED, route


def of_one_job(client: TestClient) -> list[Route]:
    return [route for route in routes(client) if isinstance(route.audience, Audience) and "{job_id}" in route.path]


def test_routes_on_no_one_job_keep_to_the_project(client: TestClient, service: Service) -> None:
    """What lists or makes is to be known here: nothing in its path says whose it is."""
    assert {
        (route.method, route.path) for route in routes(client) if route.audience is USERS and "{job_id}" not in route.path
    } == CHOOSE_A_PROJECT | OF_NO_PROJECT
    ours, theirs = bearer(make_token(service, Role.SUBMITTER, "ours")), bearer(make_token(service, Role.SUBMITTER, "theirs"))

    def submit(headers: dict[str, str], **params: str) -> dict[str, Any]:
        answer = client.post("/v1/jobs", json=PRETRAIN, headers=headers, params=params)
        assert answer.status_code == 201
        view: dict[str, Any] = answer.json()
        return view

    def listed(headers: dict[str, str], **params: str) -> list[str]:
        return [job["id"] for job in client.get("/v1/jobs", headers=headers, params=params).json()["jobs"]]

    first, second = submit(ours), submit(theirs, project="theirs")
    third, fourth = submit(bearer(API_TOKEN), project="ours"), submit(bearer(API_TOKEN))
    assert [job["project"] for job in (first, second, third, fourth)] == ["ours", "theirs", "ours", "default"]
    assert listed(ours) == listed(ours, project="ours") == [third["id"], first["id"]]
    assert listed(theirs) == [second["id"]]
    assert listed(bearer(API_TOKEN)) == [job["id"] for job in (fourth, third, second, first)]
    assert listed(bearer(API_TOKEN), project="theirs") == [second["id"]]
    for method, path in CHOOSE_A_PROJECT:
        answer = client.request(method, path, params={"project": "theirs"}, headers=ours, json=PRETRAIN if method == "POST" else None)
        assert (answer.status_code, answer.json()["type"]) == (403, "urn:maestro:forbidden")
        assert "good for the project ours alone" in answer.json()["detail"]
        assert client.request(method, path, params={"project": "No Name"}, json=PRETRAIN).status_code == 422


def test_a_workers_token_is_good_for_its_own_attempts_reports_alone(client: TestClient, service: Service) -> None:
    job_id = job_with_all(service)
    secret = service.settings.secret_key.get_secret_value()
    headers = bearer(attempt_token(secret, job_id, 1))
    for route in routes(client):
        answer = ask(client, route, job_id, headers, json={"incarnation": 1, "sequence": 9})
        expected = {None: (200, 503), WORKERS: (200,)}.get(route.audience if not isinstance(route.audience, Audience) else "user", (401,))
        assert answer.status_code in expected, (route, answer.status_code)
    reports = f"/v1/jobs/{job_id}/attempts/1/reports"
    for token in (API_TOKEN, attempt_token(secret, job_id, 2), attempt_token(secret, "other", 1)):
        assert client.post(reports, json={"incarnation": 1, "sequence": 0}, headers=bearer(token)).status_code == 401
