import itertools
import re
from pathlib import Path

from sqlalchemy import update

from service import lifecycle
from service.db import utc_now
from service.lifecycle import ALLOWED, Outcome, set_reason, transition
from service.models import JobRow
from tests.unit.service_fixtures import Service
from workers.contract import JobStatus, Reason


def put(service: Service, job_id: str, status: JobStatus, *, lease: str | None = None) -> None:
    with service.database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(status=status, lease_token=lease))


def move(service: Service, job_id: str, to: JobStatus, *, lease: str | None = None) -> Outcome:
    with service.database.write() as session:
        return transition(session, job_id, to=to, now=utc_now(), lease=lease)


def test_only_what_the_table_allows(service: Service) -> None:
    for before, to in itertools.product(JobStatus, JobStatus):
        job_id = service.submit()
        put(service, job_id, before)
        outcome = move(service, job_id, to)
        allowed = to in ALLOWED[before]
        assert outcome is (Outcome.DONE if allowed else Outcome.ALREADY_THERE if before is to else Outcome.ILLEGAL), (before, to)
        job = service.job(job_id)
        assert (job.status, job.version) == (to if allowed else before, 1 + allowed)
        assert [event.type for event in service.events(job_id)] == ["job_queued", *(["status_changed"] if allowed else [])]


def test_terminal_statuses_lead_nowhere() -> None:
    assert {status for status, targets in ALLOWED.items() if not targets} == {status for status in JobStatus if status.is_terminal}
    assert set(ALLOWED) == set(JobStatus)


def test_the_event_says_what_changed(service: Service) -> None:
    job_id = service.submit()
    with service.database.write() as session:
        transition(session, job_id, to=JobStatus.CANCELLED, now=utc_now(), reason=Reason.CANCELLED_BY_USER, detail="why")
    assert service.events(job_id)[-1].data == {"from": "queued", "to": "cancelled", "reason": "cancelled_by_user", "detail": "why"}


def test_a_lost_lease_changes_nothing(service: Service) -> None:
    job_id = service.submit()
    put(service, job_id, JobStatus.QUEUED, lease="theirs")
    assert move(service, job_id, JobStatus.STARTING, lease="ours") is Outcome.LOST_LEASE
    assert service.job(job_id).status is JobStatus.QUEUED
    assert move(service, job_id, JobStatus.STARTING, lease="theirs") is Outcome.DONE


def test_times_are_set_once(service: Service) -> None:
    job_id = service.submit()
    for status in (JobStatus.STARTING, JobStatus.RUNNING):
        move(service, job_id, status)
    started_at = service.job(job_id).started_at
    assert started_at is not None
    for status in (JobStatus.RECOVERING, JobStatus.STARTING, JobStatus.RUNNING, JobStatus.FINALIZING, JobStatus.SUCCEEDED):
        assert service.job(job_id).finished_at is None
        move(service, job_id, status)
    job = service.job(job_id)
    assert job.started_at == started_at
    assert job.finished_at is not None
    with service.database.read() as session:
        assert session.get_one(JobRow, job_id).due_at is None


def test_a_reason_is_an_event_only_where_it_is_news(service: Service) -> None:
    job_id = service.submit()

    def say(detail: str | None, reason: Reason = Reason.WAITING_FOR_RESOURCES) -> Outcome:
        with service.database.write() as session:
            return set_reason(session, job_id, reason=reason, detail=detail, now=utc_now())

    assert [say("1 free"), say("1 free"), say("2 free")] == [Outcome.DONE, Outcome.ALREADY_THERE, Outcome.DONE]
    assert (service.job(job_id).detail, [event.type for event in service.events(job_id)]) == ("2 free", ["job_queued", "reason_changed"])
    assert say(None, Reason.RAY_UNREACHABLE) is Outcome.DONE
    assert [event.type for event in service.events(job_id)] == ["job_queued", "reason_changed", "reason_changed"]
    assert service.job(job_id).status is JobStatus.QUEUED
    move(service, job_id, JobStatus.CANCELLED)
    assert say("3 free") is Outcome.ILLEGAL


def test_nothing_else_writes_a_status() -> None:
    """`status=` is assigned in two places: the insert of a new job, and `transition`."""
    folder = Path(lifecycle.__file__).parent
    writers = {
        path.name
        for path in folder.rglob("*.py")
        if re.search(r'(row|job)\.status = |values\(status|"status": to|status=JobStatus\.QUEUED,', path.read_text())
    }
    assert writers == {"jobs.py", "lifecycle.py"}
