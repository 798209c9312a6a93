import json
import threading
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from mae_core.config import RUN_SPEC
from service import jobs
from service.db import utc_now
from service.models import JobRow
from tests.unit.service_fixtures import PRETRAIN, Service
from workers.contract import DesiredState, EventType, JobStatus


def post(client: TestClient, body: dict[str, Any], key: str | None = None) -> Any:
    return client.post("/v1/jobs", json=body, headers={} if key is None else {"Idempotency-Key": key})


def test_a_new_job(client: TestClient, service: Service) -> None:
    answer = post(client, PRETRAIN | {"labels": {"team": "cells"}})
    assert answer.status_code == 201
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["status"], job["attempt"], job["desired_state"], job["version"]) == ("queued", 0, "run", 1)
    assert job["spec"]["masking"]["ratio"] == 0.6  # of the recipe for small models
    assert job["labels"] == {"team": "cells"}
    assert job["id"].isalnum()
    assert job["id"] == job["id"].lower()
    assert client.get(f"/v1/jobs/{job['id']}").json() == job
    assert [event.type for event in service.events(job["id"])] == ["job_queued"]


def test_ids_sort_by_age() -> None:
    now = utc_now()
    ids = [jobs.new_job_id(now + timedelta(seconds=second)) for second in range(5)]
    assert ids == sorted(ids)
    assert {len(one) for one in ids} == {17}


def test_a_repeat_answers_the_same_job(client: TestClient) -> None:
    first, again = post(client, PRETRAIN, "k"), post(client, PRETRAIN, "k")
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    reordered = dict(reversed(list(PRETRAIN.items()))) | {"seed": 0}
    assert post(client, reordered, "k").status_code == 200  # the same spec, written otherwise
    assert post(client, PRETRAIN, "other").json()["id"] != first.json()["id"]
    assert post(client, PRETRAIN).json()["id"] != first.json()["id"]


def test_a_key_with_another_body_is_refused(client: TestClient) -> None:
    job_id = post(client, PRETRAIN, "k").json()["id"]
    answer = post(client, PRETRAIN | {"seed": 1}, "k")
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "Idempotency-Key"
    assert job_id in answer.json()["detail"]


def test_racing_repeats_make_one_job(service: Service) -> None:
    spec = RUN_SPEC.validate_python(PRETRAIN)
    barrier = threading.Barrier(8)
    found: list[jobs.Submitted] = []

    def submit() -> None:
        barrier.wait()
        found.append(jobs.submit(service.database, service.storage, service.settings, spec, idempotency_key="k"))

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({submitted.job.id for submitted in found}) == 1
    assert [submitted.is_new for submitted in found].count(True) == 1
    assert len(found) == 8


def test_a_repeat_that_won_in_another_process_is_answered(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where writers do not queue up (PostgreSQL), the unique key alone decides: the loser answers the winner's job."""
    spec = RUN_SPEC.validate_python(PRETRAIN)
    first = jobs.submit(service.database, service.storage, service.settings, spec, idempotency_key="k")
    real, asked = jobs._repeat_of, []

    def blind_twice(*args: Any) -> Any:
        asked.append(args)
        return None if len(asked) <= 2 else real(*args)

    monkeypatch.setattr(jobs, "_repeat_of", blind_twice)
    again = jobs.submit(service.database, service.storage, service.settings, spec, idempotency_key="k")
    assert (again.job.id, again.is_new) == (first.job.id, False)


def test_too_many_workers(client: TestClient) -> None:
    optim = {"epochs": 2, "batch_size": 65, "warmup_epochs": 1}
    answer = post(client, PRETRAIN | {"resources": {"num_workers": 65}, "optim": optim})
    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {"field": "resources.num_workers", "message": "65 workers are more than this service allows; ask for 64 or fewer"}
    ]
    elastic = post(client, PRETRAIN | {"resources": {"num_workers": {"min": 1, "max": 65}}, "optim": optim})
    assert (elastic.status_code, elastic.json()["errors"]) == (422, answer.json()["errors"])


def test_numbers_are_finite(client: TestClient) -> None:
    body = json.dumps(PRETRAIN | {"optim": {"epochs": 2, "batch_size": 64, "warmup_epochs": 1, "base_lr": 1e999}})
    answer = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"field": "optim.base_lr", "message": "Input should be a finite number"}]


def test_pages_cover_all_jobs_once_newest_first(client: TestClient, service: Service) -> None:
    ids = [service.submit() for _ in range(7)]
    with service.database.write() as session:  # ties in time are told apart by id
        session.execute(update(JobRow).where(JobRow.id.in_(ids[2:5])).values(created_at=service.job(ids[2]).created_at))
    seen: list[str] = []
    cursor = None
    for _ in range(4):
        page = client.get("/v1/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [job["id"] for job in page["jobs"]]
        cursor = page["next_cursor"]
    assert cursor is None
    assert len(seen) == len(set(seen)) == 7
    assert seen == [job["id"] for job in client.get("/v1/jobs").json()["jobs"]]
    assert seen[0] == ids[-1]
    assert seen[-1] == ids[0]
    assert "spec" not in page["jobs"][0]


def test_a_page_is_stable_while_jobs_come_in(client: TestClient, service: Service) -> None:
    ids = [service.submit() for _ in range(4)]
    page = client.get("/v1/jobs", params={"limit": 2}).json()
    service.submit()
    rest = client.get("/v1/jobs", params={"limit": 2, "cursor": page["next_cursor"]}).json()
    assert [job["id"] for job in page["jobs"] + rest["jobs"]] == ids[::-1]


def test_filters(client: TestClient, service: Service) -> None:
    kept, cancelled = service.submit(), service.submit()
    service.cancel(cancelled)
    assert [job["id"] for job in client.get("/v1/jobs", params={"status": "queued"}).json()["jobs"]] == [kept]
    assert [job["id"] for job in client.get("/v1/jobs", params={"status": "cancelled"}).json()["jobs"]] == [cancelled]
    assert client.get("/v1/jobs", params={"kind": "probe"}).json()["jobs"] == []
    assert len(client.get("/v1/jobs", params={"kind": "pretrain"}).json()["jobs"]) == 2
    assert client.get("/v1/jobs", params={"status": "done"}).status_code == 422


def test_cancel_a_queued_job(client: TestClient, service: Service) -> None:
    job_id = service.submit()
    answer = client.post(f"/v1/jobs/{job_id}/cancel")
    assert answer.status_code == 202
    job = answer.json()
    assert (job["status"], job["reason"], job["desired_state"]) == ("cancelled", "cancelled_by_user", "cancel")
    assert job["reason_message"] == "Cancelled on request."
    again = client.post(f"/v1/jobs/{job_id}/cancel")
    assert (again.status_code, again.json()) == (200, job)
    assert [event.type for event in service.events(job_id)] == ["job_queued", "cancel_requested", "status_changed"]


def test_cancel_a_queued_job_that_a_dispatcher_holds(service: Service) -> None:
    job_id = service.submit()
    with service.database.write() as session:
        session.execute(update(JobRow).values(lease_token="held"))
    assert service.cancel(job_id).status is JobStatus.QUEUED
    assert service.job(job_id).desired_state is DesiredState.CANCEL


def test_cancel_of_a_running_job_is_a_wish_noted_once(client: TestClient, service: Service) -> None:
    job_id = service.start()
    for _ in range(2):
        answer = client.post(f"/v1/jobs/{job_id}/cancel")
        assert (answer.status_code, answer.json()["status"], answer.json()["desired_state"]) == (202, "running", "cancel")
    assert [event.type for event in service.events(job_id)].count(EventType.CANCEL_REQUESTED) == 1


def test_cancel_after_the_end_is_409(client: TestClient, service: Service) -> None:
    job_id = service.submit()
    with service.database.write() as session:
        session.execute(update(JobRow).values(status=JobStatus.SUCCEEDED))
    answer = client.post(f"/v1/jobs/{job_id}/cancel")
    assert answer.status_code == 409
    assert "succeeded" in answer.json()["detail"]
    assert service.job(job_id).desired_state is DesiredState.RUN
