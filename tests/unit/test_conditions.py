"""What is amiss with a job that goes on: told by its workers, or seen in their silence."""

from datetime import timedelta

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from service import reports
from service.conditions import REPORTS_DELAYED_AFTER
from service.db import utc_now
from service.models import AttemptRow, MetricBatchRow
from service.policy import ACTIVE_SECONDS
from service.ray_jobs import RayStatus
from tests.unit.service_fixtures import Service
from workers.contract import STORAGE_PATIENCE_SECONDS, Condition, EventType, JobStatus, Report


def names(service: Service, job_id: str) -> list[Condition]:
    return list(service.job(job_id).conditions)


@pytest.mark.parametrize("end", [EventType.UPLOAD_RECOVERED, EventType.TRAINING_STATE_COMMITTED, EventType.RESULT_COMMITTED])
def test_uploads_that_wait_are_a_condition_until_one_succeeds(client: TestClient, service: Service, end: EventType) -> None:
    job_id = service.start()
    assert client.get(f"/v1/jobs/{job_id}").json()["conditions"] == {}
    service.report(job_id, EventType.UPLOAD_DELAYED, sequence=1, message="no answer", step=3)
    first = service.job(job_id).conditions[Condition.UPLOAD_DELAYED].since
    service.report(job_id, EventType.UPLOAD_DELAYED, sequence=2, message="still no answer", step=6)
    condition = client.get(f"/v1/jobs/{job_id}").json()["conditions"]["upload_delayed"]
    assert condition["detail"] == "still no answer"
    assert service.job(job_id).conditions[Condition.UPLOAD_DELAYED].since == first, "it is the same outage"
    assert condition["message"].startswith("Object storage does not take")
    assert service.job(job_id).status is JobStatus.RUNNING
    service.report(job_id, end, sequence=3)
    assert names(service, job_id) == []


def test_a_job_that_has_ended_has_none(service: Service) -> None:
    job_id = service.start()
    service.report(job_id, EventType.UPLOAD_DELAYED, sequence=1, message="no answer")
    service.report(job_id, EventType.RUN_FAILED, sequence=2, reason="diverged")
    service.ray.end(f"{job_id}-a1", RayStatus.FAILED)
    service.tick(ACTIVE_SECONDS)
    assert (service.job(job_id).status, names(service, job_id)) == (JobStatus.FAILED, [])


def test_what_one_attempt_said_is_not_true_of_the_next(service: Service) -> None:
    job_id = service.start()
    service.report(job_id, EventType.UPLOAD_DELAYED, sequence=1, message="no answer")
    service.ray.end(f"{job_id}-a1", RayStatus.FAILED)
    service.tick(ACTIVE_SECONDS)
    assert (service.job(job_id).status, names(service, job_id)) == (JobStatus.RECOVERING, [])


def last_heard(service: Service, job_id: str, *, before: timedelta) -> None:
    with service.database.write() as session:
        session.execute(update(AttemptRow).where(AttemptRow.job_id == job_id).values(last_report_at=utc_now() - before))


def test_workers_that_are_not_heard_are_one(service: Service) -> None:
    job_id = service.start()
    assert service.attempt(job_id).last_report_at is not None
    last_heard(service, job_id, before=REPORTS_DELAYED_AFTER - timedelta(seconds=30))
    assert names(service, job_id) == []
    last_heard(service, job_id, before=REPORTS_DELAYED_AFTER + timedelta(seconds=30))
    condition = service.job(job_id).conditions[Condition.REPORTS_DELAYED]
    assert condition.since == service.attempt(job_id).last_report_at
    assert condition.detail == "nothing was heard for 90 s"
    reports.record(service.database, job_id, 1, Report(incarnation=1, sequence=1), bucket="maestro")
    assert names(service, job_id) == [], "an empty report says that they live"


def test_a_job_without_workers_is_not_waited_for(service: Service) -> None:
    queued, job_id = service.submit(), service.start()
    last_heard(service, job_id, before=timedelta(hours=1))
    service.ray.end(f"{job_id}-a1", RayStatus.FAILED)
    service.tick(ACTIVE_SECONDS)
    assert service.job(job_id).status is JobStatus.RECOVERING
    assert names(service, job_id) == names(service, queued) == []


def test_an_empty_report_leaves_nothing_but_its_time(service: Service) -> None:
    job_id = service.start()
    for _ in range(3):
        reports.record(service.database, job_id, 1, Report(incarnation=1, sequence=1), bucket="maestro")
    service.report(job_id, EventType.EVALUATED, sequence=1)
    assert [event.type for event in service.events(job_id)][-1] == EventType.EVALUATED, "its number was still free"
    with service.database.read() as session:
        assert session.query(MetricBatchRow).filter(MetricBatchRow.job_id == job_id).count() == 2


def test_a_pause_that_waits_for_storage_is_given_a_day(client: TestClient, service: Service) -> None:
    job_id = service.start()
    service.report(job_id, EventType.UPLOAD_DELAYED, sequence=1, message="no answer")
    client.post(f"/v1/jobs/{job_id}/pause")
    service.tick(ACTIVE_SECONDS)
    service.tick(STORAGE_PATIENCE_SECONDS)
    assert service.ray.stopped == []
    service.tick(service.settings.pause_grace_seconds)
    assert service.ray.stopped == [f"{job_id}-a1"]
