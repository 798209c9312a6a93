"""Pause and resume: over REST, and what the dispatcher makes of them."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from service import jobs, policy, reports
from service.models import JobRow
from service.policy import ACTIVE_SECONDS
from service.ray_jobs import RayStatus
from tests.unit.service_fixtures import Service
from workers.contract import DesiredState, EventType, JobStatus, Reason, Report


def ask(client: TestClient, job_id: str, verb: str) -> tuple[int, Any]:
    answer = client.post(f"/v1/jobs/{job_id}/{verb}")
    return answer.status_code, answer.json()


def statuses(service: Service, job_id: str) -> list[str]:
    return [event.data["to"] for event in service.events(job_id) if event.type == EventType.STATUS_CHANGED]


def stop_by_itself(service: Service, job_id: str, number: int = 1) -> None:
    """What workers do that have heard it."""
    service.report(job_id, EventType.RUN_STOPPED, attempt=number, sequence=1)
    service.ray.end(f"{job_id}-a{number}", RayStatus.SUCCEEDED)


def pause(service: Service, client: TestClient, job_id: str) -> None:
    """A running job, to the end of its pausing."""
    assert ask(client, job_id, "pause")[0] == 202
    service.tick(ACTIVE_SECONDS)
    assert service.job(job_id).status is JobStatus.PAUSING
    stop_by_itself(service, job_id, service.job(job_id).attempt)
    service.tick(ACTIVE_SECONDS)
    assert service.job(job_id).status is JobStatus.PAUSED


def test_a_queued_job_is_paused_at_once_and_keeps_its_place(client: TestClient, service: Service) -> None:
    first, second = service.submit(), service.submit()
    code, job = ask(client, first, "pause")
    assert (code, job["status"], job["reason"], job["desired_state"]) == (202, "paused", "paused_by_user", "pause")
    assert job["reason_message"].startswith("Paused on request; it holds no device.")
    assert ask(client, first, "pause") == (200, job)
    assert service.tick(10) == 1
    assert (service.job(first).status, service.job(second).status) == (JobStatus.PAUSED, JobStatus.STARTING)
    assert [event.type for event in service.events(first)] == ["job_queued", "pause_requested", "status_changed"]
    created_at = service.job(first).created_at
    code, job = ask(client, first, "resume")
    assert (code, job["status"], job["reason"], job["desired_state"]) == (202, "queued", None, "run")
    assert service.job(first).created_at == created_at
    service.tick()
    assert service.job(first).status is JobStatus.STARTING


def test_a_running_job_stops_by_itself_and_goes_on_as_another_attempt(client: TestClient, service: Service) -> None:
    job_id = service.start()
    pause(service, client, job_id)
    job, attempt = service.job(job_id), service.attempt(job_id)
    assert (job.reason, job.finished_at) == (Reason.PAUSED_BY_USER, None)
    assert attempt.ended_at is not None
    assert service.ray.stopped == []
    assert service.tick(3600) == 0  # nobody looks at it
    assert ask(client, job_id, "resume")[0] == 202
    service.tick()
    service.ray.run(f"{job_id}-a2")
    service.report(job_id, EventType.WORKERS_STARTED, attempt=2)
    assert (service.job(job_id).status, service.job(job_id).attempt) == (JobStatus.RUNNING, 2)
    assert statuses(service, job_id) == ["starting", "running", "pausing", "paused", "queued", "starting", "running"]


def test_pausing_spends_no_failure(client: TestClient, service: Service) -> None:
    job_id = service.start(retry={"max_failures": 1})
    for number in (1, 2, 3):
        pause(service, client, job_id)
        assert ask(client, job_id, "resume")[0] == 202
        service.tick()
        service.ray.run(f"{job_id}-a{number + 1}")
        service.report(job_id, EventType.WORKERS_STARTED, attempt=number + 1)
    service.ray.end(f"{job_id}-a4", RayStatus.FAILED)
    service.tick(ACTIVE_SECONDS)
    assert service.job(job_id).status is JobStatus.RECOVERING
    service.tick(60)
    service.ray.end(f"{job_id}-a5", RayStatus.FAILED)
    service.tick(ACTIVE_SECONDS)
    assert (service.job(job_id).status, service.job(job_id).reason) == (JobStatus.FAILED, Reason.RETRIES_EXHAUSTED)


def test_a_run_that_does_not_listen_is_stopped_by_ray_in_the_end(client: TestClient, service: Service) -> None:
    job_id = service.start()
    ask(client, job_id, "pause")
    service.tick(ACTIVE_SECONDS)
    service.tick(service.settings.pause_grace_seconds - 30)
    assert service.ray.stopped == []
    service.tick(31)
    assert service.ray.stopped == [f"{job_id}-a1"]
    service.tick(ACTIVE_SECONDS)
    assert service.job(job_id).status is JobStatus.PAUSED


def test_workers_that_have_not_begun_are_not_waited_for(client: TestClient, service: Service) -> None:
    job_id = service.submit()
    service.tick()
    ask(client, job_id, "pause")
    for _ in range(3):
        service.tick(ACTIVE_SECONDS)
    assert (service.ray.stopped, service.job(job_id).status) == ([f"{job_id}-a1"], JobStatus.PAUSED)


def test_a_recovering_job_is_paused_at_once(client: TestClient, service: Service) -> None:
    job_id = service.start()
    service.ray.end(f"{job_id}-a1", RayStatus.FAILED)
    service.tick(ACTIVE_SECONDS)
    assert service.job(job_id).status is JobStatus.RECOVERING
    assert ask(client, job_id, "pause")[1]["status"] == "paused"


def test_a_result_committed_meanwhile_is_a_success(client: TestClient, service: Service) -> None:
    job_id = service.start()
    ask(client, job_id, "pause")
    service.tick(ACTIVE_SECONDS)
    service.commit_result(job_id)
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick(ACTIVE_SECONDS)
    assert service.job(job_id).status is JobStatus.SUCCEEDED


def test_a_pause_that_comes_too_late_lets_the_run_end(client: TestClient, service: Service) -> None:
    """Its last step was taken before the workers heard of it: nothing is killed, however long the result takes."""
    job_id = service.start()
    ask(client, job_id, "pause")
    service.tick(ACTIVE_SECONDS)
    service.report(job_id, EventType.TRAINING_ENDED, sequence=1)
    assert service.job(job_id).status is JobStatus.FINALIZING
    service.tick(service.settings.pause_grace_seconds + 1)
    assert service.ray.stopped == []
    service.commit_result(job_id)
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick(ACTIVE_SECONDS)
    assert service.job(job_id).status is JobStatus.SUCCEEDED


def test_a_finalizing_run_that_dies_is_paused_as_wanted(client: TestClient, service: Service) -> None:
    job_id = service.start()
    service.report(job_id, EventType.TRAINING_ENDED, sequence=1)
    ask(client, job_id, "pause")
    service.ray.end(f"{job_id}-a1", RayStatus.FAILED)
    service.tick(ACTIVE_SECONDS)
    assert (service.job(job_id).status, service.job(job_id).reason) == (JobStatus.PAUSED, Reason.PAUSED_BY_USER)


@pytest.mark.parametrize("max_failures", [0, 3])
def test_a_run_that_ended_by_a_pause_has_not_failed(service: Service, monkeypatch: pytest.MonkeyPatch, max_failures: int) -> None:
    """The pause comes behind the dispatcher's claim, and the workers, who hear it directly, are faster than its look."""
    job_id = service.start(retry={"max_failures": max_failures})
    real = service.ray.info

    def info(submission: str) -> Any:
        with service.database.write() as session:
            jobs.request_pause(session, job_id)
        service.ray.end(submission, RayStatus.SUCCEEDED)
        return real(submission)

    monkeypatch.setattr(service.ray, "info", info)
    service.tick(ACTIVE_SECONDS)
    monkeypatch.undo()
    for _ in range(2):
        service.tick(ACTIVE_SECONDS)
    assert service.job(job_id).status is JobStatus.PAUSED
    with service.database.read() as session:
        assert session.get_one(JobRow, job_id).num_failures == 0


def test_a_look_that_was_overtaken_is_made_again_at_once(service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was to begin a pause; the run has ended its training meanwhile, which a pause lets go on."""
    job_id = service.start()
    ask(client, job_id, "pause")
    real = policy.heed_wish

    def heed_wish(job: Any, attempt: Any) -> policy.Decision | None:
        service.report(job_id, EventType.TRAINING_ENDED, sequence=1)
        return real(job, attempt)

    monkeypatch.setattr(policy, "heed_wish", heed_wish)
    service.tick(ACTIVE_SECONDS)
    with service.database.read() as session:
        row = session.get_one(JobRow, job_id)
        assert (row.status, row.lease_token, row.due_at) == (JobStatus.FINALIZING, None, service.now)


def test_what_the_user_must_mend_fails_a_pausing_job(client: TestClient, service: Service) -> None:
    job_id = service.start()
    ask(client, job_id, "pause")
    service.tick(ACTIVE_SECONDS)
    service.report(job_id, EventType.RUN_FAILED, sequence=1, reason="data_error", message="no images")
    service.ray.end(f"{job_id}-a1", RayStatus.FAILED)
    service.tick(ACTIVE_SECONDS)
    assert (service.job(job_id).status, service.job(job_id).reason) == (JobStatus.FAILED, Reason.DATA_ERROR)


def test_a_paused_and_a_pausing_job_can_be_cancelled(client: TestClient, service: Service) -> None:
    paused = service.submit()
    ask(client, paused, "pause")
    pausing = service.start()
    assert ask(client, paused, "cancel")[1]["status"] == "cancelled"
    ask(client, pausing, "pause")
    service.tick(ACTIVE_SECONDS)
    assert ask(client, pausing, "cancel")[1]["status"] == "pausing"
    service.tick(ACTIVE_SECONDS)
    assert service.job(pausing).status is JobStatus.STOPPING
    stop_by_itself(service, pausing)
    service.tick(ACTIVE_SECONDS)
    assert service.job(pausing).status is JobStatus.CANCELLED


def test_a_cancel_that_comes_while_it_is_being_paused_is_not_lost(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the dispatcher's look and the end of its lease: nobody would look at a paused job again."""
    job_id = service.start()
    with service.database.write() as session:
        session.execute(update(JobRow).values(desired_state=DesiredState.PAUSE, status=JobStatus.PAUSING))
    real = service.ray.logs

    def logs(submission: str) -> str | None:
        service.cancel(job_id)
        return real(submission)

    monkeypatch.setattr(service.ray, "logs", logs)
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick(ACTIVE_SECONDS)
    assert service.job(job_id).status is JobStatus.PAUSED
    service.tick(ACTIVE_SECONDS)
    assert service.job(job_id).status is JobStatus.CANCELLED


def test_the_workers_hear_it_with_their_next_report(service: Service, client: TestClient) -> None:
    job_id = service.start()
    said = []
    for sequence, verb in enumerate((None, "pause", "cancel"), start=1):
        if verb is not None:
            ask(client, job_id, verb)
        answer = reports.record(service.database, job_id, 1, Report(incarnation=1, sequence=sequence), bucket="maestro")
        said.append(answer.desired_state)
    assert said == [DesiredState.RUN, DesiredState.PAUSE, DesiredState.CANCEL]


def test_what_cannot_be_paused_or_resumed_is_told(client: TestClient, service: Service) -> None:
    running = service.start()
    code, job = ask(client, running, "resume")
    assert (code, job["status"]) == (200, "running")
    ask(client, running, "pause")
    code, problem = ask(client, running, "resume")
    assert (code, "and not paused yet; resume it when it is" in problem["detail"]) == (409, True)
    ask(client, running, "cancel")
    assert "is being cancelled; only a job that goes on can be paused" in ask(client, running, "pause")[1]["detail"]
    assert ask(client, running, "resume")[0] == 409
    over = service.submit()
    service.cancel(over)
    for verb in ("pause", "resume"):
        code, problem = ask(client, over, verb)
        assert (code, "is cancelled already" in problem["detail"]) == (409, True)
        assert ask(client, "nope", verb)[0] == 404
