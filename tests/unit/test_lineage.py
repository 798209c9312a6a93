"""Families of jobs: whose result each starts from."""

from typing import Any

from fastapi.testclient import TestClient
from sqlalchemy import event, update

from service import artifacts, lineage
from service.db import utc_now
from service.models import JobRow
from tests.unit.service_fixtures import PRETRAIN, PROBE, Service


def family(service: Service, *parents: str, **changes: Any) -> str:
    """A job that starts from the last of `parents`."""
    job_id = service.submit(PROBE | {"encoder": {"init": "random"}, "model": PRETRAIN["model"]}, **changes)
    if parents:
        with service.database.write() as session:
            session.execute(update(JobRow).where(JobRow.id == job_id).values(encoder_job=parents[-1]))
    return job_id


def told(client: TestClient, job_id: str) -> tuple[list[str], list[str]]:
    answer = client.get(f"/v1/jobs/{job_id}/lineage").json()
    assert answer["is_whole"]
    return [job["id"] for job in answer["ancestors"]], [job["id"] for job in answer["descendants"]]


def test_a_family_is_told_from_each_of_its_members(client: TestClient, service: Service) -> None:
    first = service.submit()
    second = family(service, first)
    third, fourth = family(service, second), family(service, first)
    service.submit()
    assert told(client, first) == ([], [second, fourth, third])
    assert told(client, second) == ([first], [third])
    assert told(client, third) == ([first, second], [])
    relative = client.get(f"/v1/jobs/{third}/lineage").json()["ancestors"][1]
    assert relative == {"id": second, "name": "digits-probe", "kind": "probe", "status": "queued", "parent": first, "metrics": None}


def test_deleted_jobs_and_those_of_other_projects_are_not_told(client: TestClient, service: Service) -> None:
    first = service.submit()
    deleted, theirs = family(service, first), family(service, first, project="theirs")
    below = family(service, deleted)
    with service.database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == deleted).values(deleted_at=utc_now()))
    assert told(client, first) == ([], [])
    assert told(client, below) == told(client, theirs) == ([], [])


def test_a_large_family_costs_a_query_for_each_level(service: Service) -> None:
    first = service.submit()
    children = [family(service, first) for _ in range(3)]
    for child in children:
        family(service, child)
    statements: list[str] = []
    with service.database.read() as session:
        job = session.get_one(JobRow, first)
        event.listen(service.database.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
        found = lineage.of(session, job)
    assert len(found.descendants) == 6
    assert len(statements) == 3


def test_a_family_that_is_too_large_is_told_in_part(service: Service, monkeypatch: Any) -> None:
    monkeypatch.setattr(lineage, "MAX_JOBS", 2)
    first = service.submit()
    for _ in range(3):
        family(service, first)
    with service.database.read() as session:
        found = lineage.of(session, session.get_one(JobRow, first))
    assert (len(found.descendants), found.is_whole) == (2, False)


def test_the_address_of_an_artifact_is_told_to_pages(client: TestClient, service: Service) -> None:
    job_id = service.start()
    key = f"{artifacts.job_prefix(job_id)}reconstructions/step=1.png"
    with service.database.write() as session:
        artifacts.add(session, job_id, key=key, kind="reconstruction", attempt=1, num_bytes=1, bucket="maestro", at=utc_now())
    path = f"/v1/jobs/{job_id}/artifacts/reconstructions/step=1.png"
    answer = client.get(path, params={"redirect": "false"})
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    redirected = client.get(path, follow_redirects=False)
    assert answer.json() == {"url": redirected.headers["location"]}
    assert redirected.status_code == 307
