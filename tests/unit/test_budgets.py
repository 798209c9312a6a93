"""What a job may spend: time to train, and failures of each kind."""

from service import reports
from service.models import AttemptRow
from service.ray_jobs import RayStatus
from tests.unit.service_fixtures import Service
from workers.contract import DesiredState, EventType, JobStatus, Reason, Report


def heard(service: Service, job_id: str, sequence: int) -> DesiredState:
    message = Report(incarnation=1, sequence=sequence)
    return reports.record(service.database, job_id, 1, message, bucket="maestro").desired_state


def fail(service: Service, job_id: str, attempt: int, reason: Reason) -> None:
    service.report(job_id, EventType.RUN_FAILED, sequence=1, attempt=attempt, reason=reason, message="m")
    service.ray.end(f"{job_id}-a{attempt}", RayStatus.FAILED)
    service.tick(2)


def test_a_run_at_its_time_limit_saves_its_state_and_fails(service: Service) -> None:
    job_id = service.start(time_limit_hours=1.0)
    service.tick(3500)
    assert (service.job(job_id).status, heard(service, job_id, 1)) == (JobStatus.RUNNING, DesiredState.RUN)
    service.tick(200)
    assert (service.job(job_id).status, service.job(job_id).reason) == (JobStatus.STOPPING, Reason.TIME_LIMIT_REACHED)
    assert heard(service, job_id, 2) is DesiredState.PAUSE  # which is: save, and end
    service.tick(2)
    assert service.ray.stopped == []
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick(2)
    job = service.job(job_id)
    assert (job.status, job.reason, job.detail) == (JobStatus.FAILED, Reason.TIME_LIMIT_REACHED, "time_limit_hours is 1")


def test_a_run_that_does_not_end_at_its_time_limit_is_killed(service: Service) -> None:
    job_id = service.start(time_limit_hours=1.0)
    service.tick(3700)
    service.tick(service.settings.pause_grace_seconds + 1)
    service.tick(2)
    assert service.ray.stopped == [f"{job_id}-a1"]
    assert service.job(job_id).reason is Reason.TIME_LIMIT_REACHED


def test_a_result_that_is_committed_at_the_time_limit_counts(service: Service) -> None:
    job_id = service.start(time_limit_hours=1.0)
    service.tick(3700)
    assert service.job(job_id).status is JobStatus.STOPPING
    service.commit_result(job_id)
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick(2)
    assert service.job(job_id).status is JobStatus.SUCCEEDED


def test_a_user_may_cancel_what_is_at_its_time_limit(service: Service) -> None:
    job_id = service.start(time_limit_hours=1.0)
    service.tick(3700)
    service.cancel(job_id)
    assert heard(service, job_id, 2) is DesiredState.CANCEL
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick(2)
    assert service.job(job_id).status is JobStatus.CANCELLED


def test_earlier_attempts_count_and_pauses_do_not(service: Service) -> None:
    job_id = service.start(time_limit_hours=1.0)
    service.tick(2000)
    service.pause(job_id)
    service.tick()
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick(2)
    assert service.job(job_id).status is JobStatus.PAUSED
    trained = service.row(job_id).run_seconds
    assert 2000 <= trained < 2100
    service.pass_time(100_000)
    service.resume(job_id)
    service.tick()
    service.ray.run(f"{job_id}-a2")
    service.report(job_id, EventType.WORKERS_STARTED, attempt=2)
    with service.database.write() as session:  # a report's time is the machine's own
        session.get_one(AttemptRow, (job_id, 2)).started_at = service.now
    service.tick(3600 - trained - 10)
    assert service.job(job_id).status is JobStatus.RUNNING
    service.tick(20)
    assert service.job(job_id).status is JobStatus.STOPPING


def test_each_kind_of_failure_has_a_budget_of_its_own(service: Service) -> None:
    job_id = service.start(retry={"max_failures": 1, "max_user_failures": 1})
    fail(service, job_id, 1, Reason.DATA_ERROR)
    service.tick(60)
    fail(service, job_id, 2, Reason.STORAGE_UNREACHABLE)
    row = service.row(job_id)
    assert (row.status, row.num_failures, row.num_user_failures) == (JobStatus.RECOVERING, 1, 1)
    service.tick(60)
    fail(service, job_id, 3, Reason.DATA_ERROR)
    job = service.job(job_id)
    assert (job.status, job.reason, job.detail) == (JobStatus.FAILED, Reason.RETRIES_EXHAUSTED, "attempt 3 ended with data_error: m")


def test_out_of_memory_is_never_tried_again(service: Service) -> None:
    job_id = service.start(retry={"max_failures": 9, "max_user_failures": 9})
    fail(service, job_id, 1, Reason.OUT_OF_MEMORY)
    assert (service.job(job_id).status, service.job(job_id).reason) == (JobStatus.FAILED, Reason.OUT_OF_MEMORY)


def test_a_run_that_finds_no_room_stands_in_line_again_and_has_spent_nothing(service: Service) -> None:
    """Devices are free, but in pieces too small for a worker; or were lost."""
    job_id = service.submit(retry={"max_failures": 0})
    for number in (1, 2, 3):
        service.tick(60)
        assert service.job(job_id).attempt == number
        fail(service, job_id, number, Reason.WAITING_FOR_RESOURCES)
        row = service.row(job_id)
        assert (row.status, row.reason, row.num_failures) == (JobStatus.RECOVERING, Reason.WAITING_FOR_RESOURCES, 0)
    service.pause(job_id)
    assert service.job(job_id).status is JobStatus.PAUSED
