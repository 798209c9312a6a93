"""PATCH of a job: name, labels, priority and notes, and nobody's change is lost."""

import json
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from service.changes import MAX_NOTES
from service.ray_jobs import RayStatus
from service.tokens import Role
from tests.unit.access import bearer, make_token, token_id
from tests.unit.service_fixtures import Service
from workers.contract import EventType, JobStatus


def patch(client: TestClient, job_id: str, change: dict[str, Any], *, if_match: str | None = "*", **headers: str) -> httpx.Response:
    sent = headers | {"Content-Type": "application/json"} | ({} if if_match is None else {"If-Match": if_match})
    answer: httpx.Response = client.patch(f"/v1/jobs/{job_id}", content=json.dumps(change), headers=sent)
    return answer


def test_what_is_named_changes_and_nothing_else(client: TestClient, service: Service) -> None:
    job_id = service.submit(labels={"team": "cells"}, priority=3)
    before = client.get(f"/v1/jobs/{job_id}").json()
    answer = patch(client, job_id, {"name": "Renamed", "notes": "why"})
    assert answer.status_code == 200
    assert answer.json() == before | {"name": "Renamed", "notes": "why", "version": 2}
    assert client.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    answer = patch(client, job_id, {"labels": {"stage": "final"}, "priority": -5, "notes": None})
    assert answer.json() == before | {"name": "Renamed", "labels": {"stage": "final"}, "priority": -5, "version": 3}
    assert answer.json()["spec"] == before["spec"]


def test_a_changed_job_is_found_by_what_it_is_now(client: TestClient, service: Service) -> None:
    job_id = service.submit(name="old", labels={"team": "cells"})
    patch(client, job_id, {"name": "new words", "labels": {"team": "roads"}})
    for params, is_found in (
        *(({"text": "old"}, False), ({"text": "new"}, True), ({"text": job_id}, True)),
        *(({"label": "team:cells"}, False), ({"label": "team:roads"}, True), ({"label": "team"}, True)),
    ):
        assert bool(client.get("/v1/jobs", params=params).json()["jobs"]) == is_found, params


def test_an_event_says_who_changed_what(client: TestClient, service: Service) -> None:
    job_id, token = service.submit(), make_token(service, Role.SUBMITTER, "default")
    patch(client, job_id, {"priority": 4, "notes": "a secret", "name": "digits"}, **bearer(token))
    assert patch(client, job_id, {"priority": 4, "notes": "a secret"}).json()["version"] == 2  # nothing differs: no event
    [event] = [event for event in service.events(job_id) if event.type == EventType.JOB_CHANGED]
    assert event.data == {
        "by": f"mst_{token_id(token)}",
        "changes": {"priority": {"from": 0, "to": 4}, "notes": {"from": "0 characters", "to": "8 characters"}},
    }
    patch(client, job_id, {"labels": {"a": "b"}})
    assert service.events(job_id)[-1].data == {"by": "installation", "changes": {"labels": {"from": {}, "to": {"a": "b"}}}}


def test_a_change_says_what_it_is_based_on(client: TestClient, service: Service) -> None:
    job_id = service.start()
    tag = client.get(f"/v1/jobs/{job_id}").headers["etag"]
    missing = patch(client, job_id, {"name": "x"}, if_match=None)
    assert (missing.status_code, missing.json()["type"]) == (428, "urn:maestro:precondition-required")
    service.report(job_id, EventType.FIRST_STEP_TAKEN, sequence=1)
    service.pause(job_id)
    assert client.get(f"/v1/jobs/{job_id}").headers["etag"] != tag
    mine = patch(client, job_id, {"name": "mine"}, if_match=tag)
    assert mine.status_code == 200, "what can be edited is as it was: the run going on is no conflict"
    late = patch(client, job_id, {"name": "yours"}, if_match=tag)
    assert (late.status_code, late.json()["type"]) == (412, "urn:maestro:precondition-failed")
    assert mine.headers["etag"] in late.json()["detail"]
    assert service.job(job_id).name == "mine"
    for other in ('"x"', "", "W/", "\xff"):
        answer = client.patch(f"/v1/jobs/{job_id}", json={"name": "x"}, headers={"If-Match": other.encode("latin-1")})
        assert answer.status_code == 412, other
    assert patch(client, job_id, {"name": "again"}, if_match=f'"x", W/{mine.headers["etag"]}').status_code == 200


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": None}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"priority": 1001}, "priority"),
        ({"labels": {"k" * 64: "v"}}, "labels"),
        ({"labels": {str(number): "v" for number in range(33)}}, "labels"),
        ({"notes": "x" * (MAX_NOTES + 1)}, "notes"),
        ({"status": "succeeded"}, "status"),
        ({"name": "\ud800"}, "name"),
        ({"\ud800": 1}, "body"),
        ({"labels": {"\ud800": "v"}}, "labels"),
    ],
)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_change_that_cannot_be(client: TestClient, service: Service, change: dict[str, Any], field: str) -> None:
    answer = patch(client, service.submit(), change)
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:maestro:invalid-request"), answer.text
    assert answer.json()["errors"][0]["field"].startswith(field)


def test_nul_is_kept_as_the_character_for_it(client: TestClient, service: Service) -> None:
    job_id = service.submit()
    answer = patch(client, job_id, {"name": "a\0b", "labels": {"k\0": "v\0"}, "notes": "n\0"})
    assert answer.status_code == 200
    assert (service.job(job_id).name, service.job(job_id).notes) == ("a\ufffdb", "n\ufffd")
    assert client.get("/v1/jobs", params={"text": "a b"}).json()["jobs"][0]["id"] == job_id
    assert client.get("/v1/jobs", params={"label": "k\0:v\0"}).json()["jobs"][0]["id"] == job_id


def test_a_job_that_waits_is_launched_by_its_new_priority(client: TestClient, service: Service) -> None:
    running = service.start(resources={"num_workers": 8})
    first, second = (service.submit(resources={"num_workers": 8}) for _ in range(2))
    service.tick(1)
    patch(client, second, {"priority": 1})
    service.report(running, EventType.RUN_FAILED, sequence=1, reason="diverged")
    service.ray.end(f"{running}-a1", RayStatus.FAILED)
    for _ in range(3):
        service.tick(2)
    assert (service.job(first).status, service.job(second).status) == (JobStatus.QUEUED, JobStatus.STARTING)


def test_a_job_that_has_ended_is_changed_too(client: TestClient, service: Service) -> None:
    job_id = service.submit()
    service.cancel(job_id)
    assert patch(client, job_id, {"notes": "no use"}).status_code == 200
    assert patch(client, "none", {"notes": "x"}).status_code == 404
