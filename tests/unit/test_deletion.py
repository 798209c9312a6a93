"""Deleting a job: gone at once, whatever becomes of what it left; and all of that goes, whenever whoever takes it away dies."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Table, func, insert, select

from service import artifacts, deletion, jobs, metrics
from service.counters import Tally
from service.deletion import Deleter
from service.errors import Invalid
from service.housekeeping import Housekeeper
from service.models import Base, DeletedJobRow, EventRow, JobRow
from service.ray_jobs import RayStatus
from service.storage import PAGE
from tests.unit.service_fixtures import PRETRAIN, PROBE, Service
from workers.contract import EventType, JobStatus, Points


def rows_of(service: Service, job_id: str) -> dict[str, int]:
    """How many rows of each table are the job's, where there are any."""
    with service.database.read() as session:
        counts = {
            table.name: session.scalar(select(func.count()).select_from(table).where(column == job_id)) or 0 for table, column in owners()
        }
    return {name: number for name, number in counts.items() if number}


def owners() -> Iterator[tuple[Table, Any]]:
    """Every table that refers to jobs, and jobs itself."""
    yield Base.metadata.tables["jobs"], Base.metadata.tables["jobs"].c.id
    for table in Base.metadata.sorted_tables:
        for key in table.foreign_keys:
            if key.column.name in ("id", "job_id") and key.column.table.name != table.name and "job_id" in table.columns:
                yield table, table.c.job_id
                break


def finished(service: Service, *, num_objects: int = 3) -> str:
    """A failed job with rows in every table."""
    job_id = service.start(labels={"team": "cells"})
    service.report(job_id, EventType.RUN_FAILED, sequence=1, reason="diverged")
    with service.database.write() as session:
        for sequence in range(32):  # so many are merged
            points = Points(steps=[sequence], series={"loss": [1.0]})
            metrics.append(session, job_id, attempt=1, incarnation=1, sequence=2 + sequence, points=points)
        for number in range(num_objects):
            service.storage.put_bytes(key := f"jobs/{job_id}/training_state/{number:05d}", b"x")
            if number < 3:
                artifacts.add(session, job_id, key=key, kind="x", attempt=1, num_bytes=1, bucket="maestro", at=service.now)
    service.storage.put_bytes(f"jobs/{job_id}/encoder/manifest.json", b"{}")
    service.ray.end(f"{job_id}-a1", RayStatus.FAILED)
    service.tick(2)
    assert service.job(job_id).status is JobStatus.FAILED
    return job_id


def objects_of(service: Service, job_id: str) -> list[str]:
    return [item.key for item in service.storage.list(f"jobs/{job_id}/")]


def sweep(service: Service, times: int = 1) -> None:
    """As a dispatcher that has just started would."""
    deleter = Deleter(service.database, service.storage, tally=Tally(), clock=lambda: service.now)
    for _ in range(times):
        deleter.sweep_when_due()
        service.pass_time(deletion.SWEEP_SECONDS)


def test_every_table_of_jobs_is_known() -> None:
    """What refers to jobs or to what is theirs has a column job_id: that is how its rows are found."""
    referring = {table.name for table in Base.metadata.sorted_tables if any(key.column.table.name == "jobs" for key in table.foreign_keys)}
    assert referring <= {table.name for table, _ in owners()}
    assert all(len(table.primary_key.columns) for table, _ in owners())


def test_it_is_gone_at_once_and_then_with_all_that_it_left(client: TestClient, service: Service) -> None:
    job_id, other = finished(service), finished(service)
    assert set(rows_of(service, job_id)) == {table.name for table, _ in owners()}
    before = rows_of(service, other)
    answer = client.delete(f"/v1/jobs/{job_id}")
    assert (answer.status_code, answer.content) == (204, b"")
    for method, path in (
        *(("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/metrics"), ("GET", "/logs"), ("GET", "/artifacts")),
        *(("POST", "/cancel"), ("POST", "/pause"), ("POST", "/resume"), ("POST", "/retry"), ("GET", "/artifacts/training_state/00001")),
    ):
        assert client.request(method, f"/v1/jobs/{job_id}{path}").status_code == 404, path
    assert client.get(f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}).status_code == 404
    assert client.patch(f"/v1/jobs/{job_id}", json={}, headers={"If-Match": "*"}).status_code == 404
    for params in ({}, {"text": job_id}, {"label": "team:cells"}, {"status": "failed"}, {"kind": "pretrain"}, {"project": "default"}):
        assert [job["id"] for job in client.get("/v1/jobs", params=params).json()["jobs"]] == ([] if "text" in params else [other])
    assert objects_of(service, job_id)
    sweep(service)
    assert objects_of(service, job_id) == []
    assert rows_of(service, job_id) == {}
    assert rows_of(service, other) == before
    assert len(objects_of(service, other)) == 5


def test_who_dies_at_any_step_is_followed_by_another(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database and storage fail at each of their calls in turn: nothing is lost that was not to be, and in the end all is gone."""
    monkeypatch.setattr(deletion, "MAX_ROWS", 3)
    job_id, other = finished(service), finished(service)
    kept, kept_objects = rows_of(service, other), objects_of(service, other)
    with service.database.write() as session:
        deletion.request(session, job_id, now=service.now)

    num_deaths = 0
    while rows_of(service, job_id):
        with monkeypatch.context() as patch:
            calls = Calls(dies_at=num_deaths + 1)
            for place, name in ((service.storage, "delete"), (service.storage, "list"), (deletion, "_delete_some")):
                patch.setattr(place, name, calls.counted(getattr(place, name)))
            try:
                sweep(service)
            except Killed:
                num_deaths += 1
                assert rows_of(service, job_id).get("jobs") == 1, "its own row is there as long as anything is left"
    assert num_deaths > 5
    assert (rows_of(service, job_id), objects_of(service, job_id)) == ({}, [])
    assert (rows_of(service, other), objects_of(service, other)) == (kept, kept_objects)


class Killed(BaseException):
    """As by kill -9."""


class Calls:
    """Counts calls of several functions together, and dies at one of them."""

    def __init__(self, *, dies_at: int) -> None:
        self._left = dies_at

    def counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                raise Killed
            return real(*args, **options)

        return call


def test_thousands_of_objects_and_rows_go_in_pages(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sweep takes longer than its steps, and jobs that follow are not kept waiting for ever."""
    job_id = finished(service, num_objects=2 * PAGE + 5)
    with service.database.write() as session:
        session.execute(insert(EventRow), [{"job_id": job_id, "type": "t", "at": service.now, "data": {}} for _ in range(1200)])
        deletion.request(session, job_id, now=service.now)
    monkeypatch.setattr(deletion, "MAX_STEPS", 2)
    num_objects, num_events = [len(objects_of(service, job_id))], [rows_of(service, job_id)["events"]]
    while rows_of(service, job_id):
        sweep(service)
        num_objects.append(len(objects_of(service, job_id)))
        num_events.append(rows_of(service, job_id).get("events", 0))
    assert num_objects[0] - num_objects[1] in (2 * (PAGE - 1), 2 * PAGE - 1)
    assert num_events[1] == num_events[0]
    assert (num_objects[2], num_objects[-1], num_events[-1]) == (0, 0, 0)
    assert all(before - after <= 2 * deletion.MAX_ROWS for before, after in pairwise(num_events))
    assert len(num_events) > 3


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_what_another_dispatcher_is_taking_away_is_left_to_it(service: Service) -> None:
    job_id = finished(service)
    with service.database.write() as session:
        deletion.request(session, job_id, now=service.now)
    before = rows_of(service, job_id)
    with service.database.write() as session:
        session.get_one(JobRow, job_id, with_for_update=True)
        sweep(service)
        assert rows_of(service, job_id) == before
    sweep(service)
    assert rows_of(service, job_id) == {}


def test_the_manifest_goes_first(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = finished(service)
    with service.database.write() as session:
        deletion.request(session, job_id, now=service.now)
    service.storage.put_bytes(f"jobs/{job_id}/a", b"sorts before it")
    told: list[str] = []
    monkeypatch.setattr(service.storage, "delete", told.extend)
    sweep(service)
    assert told[0] == f"jobs/{job_id}/encoder/manifest.json"


def test_storage_that_is_away_is_waited_for(client: TestClient, service: Service) -> None:
    job_id = finished(service)
    service.storage.is_down = True
    assert client.delete(f"/v1/jobs/{job_id}").status_code == 204
    sweep(service, times=3)
    assert rows_of(service, job_id)["jobs"] == 1
    service.storage.is_down = False
    assert objects_of(service, job_id)
    sweep(service)
    assert (rows_of(service, job_id), objects_of(service, job_id)) == ({}, [])


def test_the_housekeeper_takes_away_what_was_deleted(service: Service) -> None:
    job_id = finished(service)
    with service.database.write() as session:
        deletion.request(session, job_id, now=service.now)
    Housekeeper(service.database, service.storage, tally=Tally(), clock=lambda: service.now).sweep()
    assert rows_of(service, job_id) == {}


def test_only_what_has_ended_is_deleted(client: TestClient, service: Service) -> None:
    for job_id in (service.submit(), service.start()):
        answer = client.delete(f"/v1/jobs/{job_id}")
        assert (answer.status_code, answer.json()["type"]) == (409, "urn:maestro:conflict")
        assert "cancel it first" in answer.json()["detail"]
        assert client.get(f"/v1/jobs/{job_id}").status_code == 200


def succeeded(service: Service) -> str:
    job_id = service.start()
    service.commit_result(job_id)
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick(2)
    assert service.job(job_id).status is JobStatus.SUCCEEDED
    return job_id


@pytest.mark.parametrize("by", ["job", "artifact"])
def test_what_another_job_starts_from_stays_as_long_as_that_is_there(client: TestClient, service: Service, by: str) -> None:
    parent = succeeded(service)
    encoder = {"job": parent} if by == "job" else {"artifact": f"s3://maestro/jobs/{parent}/encoder/"}
    child = service.submit(PROBE | {"encoder": encoder})
    answer = client.delete(f"/v1/jobs/{parent}")
    assert answer.status_code == 409
    assert child in answer.json()["detail"]
    service.cancel(child)
    assert client.delete(f"/v1/jobs/{parent}").status_code == 409, "a retry of it would start from there, too"
    assert client.delete(f"/v1/jobs/{child}").status_code == 204
    assert client.delete(f"/v1/jobs/{parent}").status_code == 204
    with pytest.raises(Invalid, match="there is no job"):
        service.submit(PROBE | {"encoder": encoder})


def test_a_job_that_is_deleted_while_another_is_submitted_from_it(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the look at its result, before the new row: the one who comes second is refused."""
    parent = succeeded(service)
    real = jobs.resolve_encoder

    def deleted_meanwhile(*args: Any, **options: Any) -> Any:
        resolved = real(*args, **options)
        with service.database.write() as session:
            deletion.request(session, parent, now=service.now)
        return resolved

    monkeypatch.setattr(jobs, "resolve_encoder", deleted_meanwhile)
    with pytest.raises(Invalid, match=f"there is no job {parent}"):
        service.submit(PROBE | {"encoder": {"job": parent}})


def test_a_job_of_which_something_is_pinned_stays(client: TestClient, service: Service) -> None:
    job_id = succeeded(service)
    path = f"/v1/jobs/{job_id}/artifacts/encoder/model.safetensors/pin"
    assert client.put(path).json()["pinned"] is True
    for params in ({}, {"dry_run": True}):
        answer = client.delete(f"/v1/jobs/{job_id}", params=params)
        assert (answer.status_code, answer.json()["type"]) == (409, "urn:maestro:conflict")
        assert f"DELETE {path}" in answer.json()["detail"]
    assert client.delete(path).json()["pinned"] is False
    assert client.delete(f"/v1/jobs/{job_id}").status_code == 204


def test_a_dry_run_says_how_much_would_go(client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = finished(service, num_objects=PAGE + 5)
    num_objects = len(objects_of(service, job_id))
    answer = client.delete(f"/v1/jobs/{job_id}", params={"dry_run": True})
    num_bytes = sum(item.bytes for item in service.storage.list(f"jobs/{job_id}/"))
    assert (answer.status_code, answer.json()) == (200, {"num_objects": num_objects, "bytes": num_bytes, "is_complete": True})
    monkeypatch.setattr(deletion, "MAX_COUNTED", PAGE)
    answer = client.delete(f"/v1/jobs/{job_id}", params={"dry_run": True})
    assert (answer.json()["num_objects"], answer.json()["is_complete"]) == (PAGE, False)
    assert (client.get(f"/v1/jobs/{job_id}").status_code, len(objects_of(service, job_id))) == (200, num_objects)
    assert client.delete(f"/v1/jobs/{service.start()}", params={"dry_run": True}).status_code == 409


def test_what_a_worker_that_was_cut_off_uploads_afterwards_goes_a_day_later(service: Service) -> None:
    job_id, other = finished(service), finished(service)
    before = objects_of(service, other)
    with service.database.write() as session:
        deletion.request(session, job_id, now=service.now)
    sweep(service)
    service.storage.put_bytes(f"jobs/{job_id}/training_state/late", b"x")
    sweep(service, times=2)
    assert objects_of(service, job_id)
    service.pass_time(deletion.LOOK_AGAIN_AFTER.total_seconds())
    sweep(service)
    assert (objects_of(service, job_id), objects_of(service, other)) == ([], before)
    with service.database.read() as session:
        assert session.scalar(select(func.count()).select_from(DeletedJobRow)) == 0


def test_the_key_of_a_deleted_job_is_free(client: TestClient) -> None:
    first = client.post("/v1/jobs", json=PRETRAIN, headers={"Idempotency-Key": "k"}).json()["id"]
    client.post(f"/v1/jobs/{first}/cancel")
    assert client.delete(f"/v1/jobs/{first}").status_code == 204
    again = client.post("/v1/jobs", json=PRETRAIN, headers={"Idempotency-Key": "k"})
    assert again.status_code == 201
    assert again.json()["id"] != first


def test_a_failed_or_cancelled_job_is_tried_again_as_a_new_one(client: TestClient, service: Service) -> None:
    failed = finished(service)
    client.patch(f"/v1/jobs/{failed}", json={"name": "again", "priority": 2, "notes": "mine"}, headers={"If-Match": "*"})
    before = client.get(f"/v1/jobs/{failed}").json()
    answer = client.post(f"/v1/jobs/{failed}/retry", headers={"Idempotency-Key": "k"})
    job = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (201, f"/v1/jobs/{job['id']}")
    assert (job["retry_of"], job["status"], job["attempt"], job["notes"], job["project"]) == (failed, "queued", 0, None, "default")
    assert (job["name"], job["priority"], job["labels"]) == ("again", 2, {"team": "cells"})
    assert job["spec"] == before["spec"] | {"name": "again", "priority": 2}
    assert service.events(job["id"])[0].data["retry_of"] == failed
    assert client.get(f"/v1/jobs/{failed}").json() == before
    again = client.post(f"/v1/jobs/{failed}/retry", headers={"Idempotency-Key": "k"})
    assert (again.status_code, again.json()["id"]) == (200, job["id"])
    assert client.post("/v1/jobs", json=job["spec"], headers={"Idempotency-Key": "k"}).status_code == 422, "that is another wish"
    answer = client.post(f"/v1/jobs/{job['id']}/retry")
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:maestro:conflict")
    assert "queued" in answer.json()["detail"]


def test_a_spec_that_is_none_any_more_is_not_tried_again(client: TestClient, service: Service) -> None:
    job_id = service.submit()
    service.cancel(job_id)
    with service.database.write() as session:
        row = session.get_one(JobRow, job_id)
        row.spec = row.spec | {"of_old": 1}
    answer = client.post(f"/v1/jobs/{job_id}/retry")
    assert answer.status_code == 409
    assert "of_old" in answer.json()["detail"]
