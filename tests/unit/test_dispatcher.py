import json
import threading
from datetime import timedelta

import pytest
from sqlalchemy import select, update

from mae_core.memory import KEEPS_MEMORY
from service.db import utc_now
from service.launches import deployment_of
from service.models import AttemptRow, JobRow
from service.policy import LOST_SILENCE
from service.ray_jobs import ClusterResources, RayJob, RayStatus
from tests.unit.service_fixtures import PROBE, Service
from workers.contract import ORDER_VARIABLE, DesiredState, EventType, JobStatus, Reason, WorkOrder, attempt_token
from workers.stored import log_chunk

SILENCE_SECONDS = LOST_SILENCE.total_seconds() + 1  # of workers whose run Ray no longer knows


def statuses(service: Service, job_id: str) -> list[str]:
    return [event.data["to"] for event in service.events(job_id) if event.type == EventType.STATUS_CHANGED]


def reasons(service: Service, job_id: str) -> list[str | None]:
    return [event.data["reason"] for event in service.events(job_id) if event.type == EventType.REASON_CHANGED]


def held(service: Service) -> int:
    with service.database.read() as session:
        return len(session.scalars(select(JobRow.id).where(JobRow.lease_token.is_not(None))).all())


def wants(num_workers: int) -> dict[str, object]:
    return {"resources": {"num_workers": num_workers}, "optim": {"epochs": 2, "batch_size": 64 * num_workers, "warmup_epochs": 1}}


def test_the_whole_way(service: Service) -> None:
    job_id = service.submit()
    assert service.tick() == 1
    assert service.job(job_id).status is JobStatus.STARTING
    assert service.attempt(job_id).submitted_at is not None
    service.ray.run(f"{job_id}-a1")
    service.report(job_id, EventType.WORKERS_STARTED, sequence=0)
    service.tick(2)
    service.report(job_id, EventType.TRAINING_ENDED, sequence=1)
    service.tick(2)
    assert service.job(job_id).status is JobStatus.FINALIZING
    service.commit_result(job_id)
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick(2)
    job = service.job(job_id)
    assert (job.status, job.reason, job.metrics) == (JobStatus.SUCCEEDED, None, {"loss": 0.25})
    assert job.result_uri == f"s3://maestro/jobs/{job_id}/encoder/"
    assert statuses(service, job_id) == ["starting", "running", "finalizing", "succeeded"]
    assert service.attempt(job_id).ended_at is not None
    assert service.storage.read_text(log_chunk(f"jobs/{job_id}/logs/attempt-1/driver/", 0)) == f"log of {job_id}-a1\n"
    assert service.tick(1000) == 0
    assert held(service) == 0


def test_the_order(service: Service) -> None:
    job_id = service.submit()
    service.tick()
    submission = service.ray.submissions[f"{job_id}-a1"]
    order = WorkOrder.model_validate_json(submission.env_vars[ORDER_VARIABLE])
    secret = service.settings.secret_key.get_secret_value()
    assert (order.job, order.attempt, order.prefix) == (job_id, 1, f"jobs/{job_id}/")
    assert order.token == attempt_token(secret, job_id, 1)
    assert order.log_bytes == 2**20 * service.settings.log_quota_mb // 8
    assert order.spec.model_dump(mode="json") == service.job(job_id).spec
    assert (order.storage.endpoint, order.storage.bucket) == ("http://127.0.0.1:9000", "maestro")
    assert submission.entrypoint == "python -m workers.main"
    assert submission.metadata == {"job": job_id, "attempt": "1", "deployment": deployment_of(service.settings.secret_keys[0])}
    assert set(submission.env_vars) == {ORDER_VARIABLE, "RAY_JOB_STOP_WAIT_TIME_S", *KEEPS_MEMORY}
    assert secret not in json.dumps(submission.env_vars)


def test_lost_reports_do_not_lose_a_result(service: Service) -> None:
    job_id = service.submit()
    service.tick()
    service.commit_result(job_id)
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick(2)
    assert statuses(service, job_id) == ["starting", "running", "finalizing", "succeeded"]


@pytest.mark.parametrize("end", [RayStatus.FAILED, RayStatus.STOPPED, None])
def test_a_committed_result_is_a_success_however_the_run_ended(service: Service, end: RayStatus | None) -> None:
    job_id = service.start()
    service.commit_result(job_id)
    service.ray.forget() if end is None else service.ray.end(f"{job_id}-a1", end)
    service.tick(2 if end is not None else SILENCE_SECONDS)
    assert service.job(job_id).status is JobStatus.SUCCEEDED


def test_a_probes_result(service: Service) -> None:
    model = {"arch": "vit_tiny_patch2", "image_size": 8, "in_chans": 1}
    job_id = service.submit(PROBE | {"encoder": {"init": "random"}, "model": model})
    service.tick()
    service.commit_result(job_id, metrics={"accuracy": float("inf"), "accuracies": [0.5, 0.75]})
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick(2)
    job = service.job(job_id)
    assert job.result_uri == f"s3://maestro/jobs/{job_id}/probe/"
    assert job.metrics == {"accuracy": "Infinity", "accuracies": [0.5, 0.75]}


def test_waiting_for_resources_is_told_once_and_ends(service: Service) -> None:
    service.ray.cluster = ClusterResources(2, 0, used_cpus=1)
    job_id = service.submit(**wants(2))
    for _ in range(4):
        service.tick(3)
    job = service.job(job_id)
    assert (job.status, job.reason, job.detail) == (JobStatus.QUEUED, Reason.WAITING_FOR_RESOURCES, "needs 2 CPUs, 1.0 of 2.0 free")
    assert reasons(service, job_id) == ["waiting_for_resources"]
    service.ray.cluster = ClusterResources(2, 0)
    service.tick(3)
    assert (service.job(job_id).status, service.job(job_id).reason) == (JobStatus.STARTING, None)


def test_more_than_the_cluster_has_waits_and_says_so(service: Service) -> None:
    service.ray.cluster = ClusterResources(2, 0)
    job_id = service.submit(**wants(4))
    service.tick()
    assert "more than the whole cluster has (2.0)" in (service.job(job_id).detail or "")


def test_what_an_autoscaler_would_add_counts(service: Service) -> None:
    """It adds machines for runs that ask Ray for them: whoever waits for the machines waits for ever."""
    service.settings = service.settings.model_copy(update={"autoscaled_cpus": 6.0})
    service.dispatcher = service.new_dispatcher()
    service.ray.cluster = ClusterResources(0, 0)
    ids = [service.submit(**wants(num_cpus)) for num_cpus in (4, 4, 8)]
    service.tick()
    assert [service.job(job_id).status for job_id in ids] == [JobStatus.STARTING, JobStatus.QUEUED, JobStatus.QUEUED]
    assert "more than the whole cluster has (6.0)" in (service.job(ids[2]).detail or "")


def test_jobs_of_one_round_do_not_believe_in_the_same_cpus(service: Service) -> None:
    service.ray.cluster = ClusterResources(3, 0)
    ids = [service.submit(**wants(2)) for _ in range(3)]
    service.tick()
    assert [service.job(job_id).status for job_id in ids] == [JobStatus.STARTING, JobStatus.QUEUED, JobStatus.QUEUED]
    service.tick(3)  # Ray's figures still show nothing of the first
    assert [service.job(job_id).status for job_id in ids] == [JobStatus.STARTING, JobStatus.QUEUED, JobStatus.QUEUED]


def test_the_next_one_starts_when_one_has_ended_though_rays_figures_lag(service: Service) -> None:
    service.ray.cluster = ClusterResources(2, 0, used_cpus=2, at=utc_now())
    first = service.submit(**wants(2))
    service.ray.cluster = ClusterResources(2, 0, at=utc_now())
    service.tick()
    second = service.submit(**wants(2))
    service.tick()
    assert service.job(second).status is JobStatus.QUEUED
    service.ray.cluster = ClusterResources(2, 0, used_cpus=2, at=service.now)
    service.commit_result(first)
    service.ray.end(f"{first}-a1", RayStatus.SUCCEEDED)
    service.tick(3)
    service.tick(3)
    assert service.job(first).status is JobStatus.SUCCEEDED
    assert service.job(second).status is JobStatus.STARTING


@pytest.mark.parametrize(("part", "reason"), [("storage", Reason.STORAGE_UNREACHABLE), ("ray", Reason.RAY_UNREACHABLE)])
def test_a_job_waits_for_what_is_away(service: Service, part: str, reason: Reason) -> None:
    job_id = service.submit()
    away = getattr(service, part)
    away.is_down = True
    service.tick()
    service.tick(10)
    assert (service.job(job_id).status, service.job(job_id).reason) == (JobStatus.QUEUED, reason)
    assert reasons(service, job_id) == [reason]
    away.is_down = False
    service.tick(10)
    assert (service.job(job_id).status, service.job(job_id).reason) == (JobStatus.STARTING, None)


def test_what_is_away_is_asked_once_a_round(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [service.start() for _ in range(5)]
    service.ray.is_down = True
    asked = []
    real = service.ray.info
    monkeypatch.setattr(service.ray, "info", lambda name: (asked.append(name), real(name))[1])
    service.tick(2)
    assert len(asked) == 1
    assert {service.job(job_id).reason for job_id in ids} == {Reason.RAY_UNREACHABLE}


def test_ray_away_never_relaunches(service: Service) -> None:
    job_id = service.start()
    service.ray.is_down = True
    for _ in range(20):
        service.tick(60)
    job = service.job(job_id)
    assert (job.status, job.reason, job.attempt) == (JobStatus.RUNNING, Reason.RAY_UNREACHABLE, 1)
    service.ray.is_down = False
    service.tick(10)
    assert (service.job(job_id).status, service.job(job_id).reason) == (JobStatus.RUNNING, None)
    assert service.ray.num_submitted == {f"{job_id}-a1": 1}
    assert reasons(service, job_id) == ["ray_unreachable", None]


def test_storage_away_at_the_end_is_waited_for(service: Service) -> None:
    job_id = service.start()
    service.commit_result(job_id)
    service.ray.end(f"{job_id}-a1", RayStatus.FAILED)
    service.storage.is_down = True
    for _ in range(3):
        service.tick(10)
    assert (service.job(job_id).status, service.job(job_id).reason) == (JobStatus.RUNNING, Reason.STORAGE_UNREACHABLE)
    service.storage.is_down = False
    service.tick(10)
    assert (service.job(job_id).status, service.job(job_id).reason) == (JobStatus.SUCCEEDED, None)


@pytest.mark.parametrize(
    ("end", "reported", "reason"),
    [
        (RayStatus.FAILED, None, Reason.DRIVER_DIED),
        (RayStatus.FAILED, Reason.STORAGE_UNREACHABLE, Reason.STORAGE_UNREACHABLE),
        (RayStatus.SUCCEEDED, None, Reason.RUN_NOT_COMMITTED),
        (None, None, Reason.RAY_JOB_LOST),
    ],
)
def test_a_run_that_died_is_tried_again_after_a_pause(
    service: Service, end: RayStatus | None, reported: Reason | None, reason: Reason
) -> None:
    job_id = service.start()
    if reported is not None:
        service.report(job_id, EventType.RUN_FAILED, sequence=1, reason=reported, message="rank 1 was killed")
    service.ray.forget() if end is None else service.ray.end(f"{job_id}-a1", end)
    service.tick(2 if end is not None else SILENCE_SECONDS)
    assert (service.job(job_id).status, service.job(job_id).reason) == (JobStatus.RECOVERING, reason)
    first = service.attempt(job_id)
    assert (first.reason, first.ended_at is not None) == (reason, True)
    assert service.tick(1) == 0  # the pause
    service.tick(2)
    job = service.job(job_id)
    assert (job.status, job.reason, job.attempt) == (JobStatus.STARTING, None, 2)
    assert f"{job_id}-a2" in service.ray.jobs
    service.report(job_id, EventType.WORKERS_STARTED, attempt=2)
    assert service.job(job_id).status is JobStatus.RUNNING


def test_the_budget_of_attempts_ends(service: Service) -> None:
    job_id = service.submit(retry={"max_failures": 2})
    for number in (1, 2, 3):
        service.tick(100)
        assert service.job(job_id).attempt == number
        service.ray.end(f"{job_id}-a{number}", RayStatus.FAILED, message="exit code -9")
        service.tick(2)
    job = service.job(job_id)
    assert (job.status, job.reason) == (JobStatus.FAILED, Reason.RETRIES_EXHAUSTED)
    assert job.detail == "attempt 3 ended with driver_died: exit code -9"
    assert service.attempt(job_id, 3).reason == Reason.DRIVER_DIED
    assert service.tick(1000) == 0
    assert len(service.ray.num_submitted) == 3


def test_what_the_user_must_mend_fails_at_once(service: Service) -> None:
    job_id = service.start()
    service.report(job_id, EventType.RUN_FAILED, sequence=1, reason="data_error", message="/data/x.png is not an image")
    service.ray.end(f"{job_id}-a1", RayStatus.FAILED)
    service.tick(0)
    job = service.job(job_id)
    assert (job.status, job.reason, job.detail) == (JobStatus.FAILED, Reason.DATA_ERROR, "/data/x.png is not an image")
    assert (job.reason_message or "").startswith("The data cannot be used")


def test_a_manifest_that_cannot_be_read(service: Service) -> None:
    job_id = service.start()
    service.storage.put_bytes(f"jobs/{job_id}/encoder/manifest.json", b"{}")
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick(2)
    assert (service.job(job_id).status, service.job(job_id).reason) == (JobStatus.FAILED, Reason.CONTRACT_MISMATCH)


def test_a_job_that_ray_refuses(service: Service) -> None:
    service.ray.refuses = "ValueError: no such entrypoint"
    job_id = service.submit()
    service.tick()
    job = service.job(job_id)
    assert (job.status, job.reason) == (JobStatus.FAILED, Reason.INTERNAL_ERROR)
    assert "no such entrypoint" in (job.detail or "")
    assert service.attempt(job_id).ended_at is not None


def test_a_submission_whose_answer_was_lost_is_adopted(service: Service) -> None:
    service.ray.loses_answers = True
    job_id = service.submit()
    service.tick()
    assert service.attempt(job_id).submitted_at is not None
    assert service.ray.num_submitted == {f"{job_id}-a1": 1}


def test_what_ray_has_already_is_not_submitted_again(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = service.submit()
    service.tick()
    with service.database.write() as session:  # as if killed before it noted the answer
        session.get_one(AttemptRow, (job_id, 1)).submitted_at = None

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("submitted again")

    monkeypatch.setattr(service.ray, "submit", fail)
    service.tick(2)
    assert service.attempt(job_id).submitted_at is not None


def test_what_came_to_ray_since_we_looked_is_adopted(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The submission of a killed dispatcher may still be on its way when its successor looks."""
    job_id = service.submit()
    service.ray.submit(f"{job_id}-a1", entrypoint="x", env_vars={}, metadata={})
    monkeypatch.setattr(service.ray, "info", lambda submission_id: None)
    service.tick()
    assert service.attempt(job_id).submitted_at is not None
    assert service.ray.num_submitted == {f"{job_id}-a1": 1}


def test_last_words_that_come_while_it_looks_are_heard(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = service.start()
    service.ray.end(f"{job_id}-a1", RayStatus.FAILED)
    real = service.ray.info

    def info(submission_id: str) -> RayJob | None:
        service.report(job_id, EventType.RUN_FAILED, sequence=1, reason="diverged", message="loss is NaN")
        return real(submission_id)

    monkeypatch.setattr(service.ray, "info", info)
    service.tick(2)
    assert (service.job(job_id).status, service.job(job_id).reason) == (JobStatus.FAILED, Reason.DIVERGED)


def test_a_submission_that_never_arrived_is_repeated(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = service.submit()
    real = service.ray.submit

    def fail(*args: object, **kwargs: object) -> None:
        service.ray.is_down = True
        service.ray._reach()

    monkeypatch.setattr(service.ray, "submit", fail)
    service.tick()
    job = service.job(job_id)
    assert (job.status, job.reason, service.attempt(job_id).submitted_at) == (JobStatus.STARTING, Reason.RAY_UNREACHABLE, None)
    service.ray.is_down = False
    monkeypatch.setattr(service.ray, "submit", real)
    service.tick(10)
    assert service.ray.num_submitted == {f"{job_id}-a1": 1}
    assert (service.job(job_id).status, service.job(job_id).reason, service.job(job_id).attempt) == (JobStatus.STARTING, None, 1)


def test_logs_that_cannot_be_kept_change_nothing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = service.start()
    service.commit_result(job_id)

    def fail(key: str, body: bytes) -> None:
        service.storage.is_down = True
        service.storage._reach()

    monkeypatch.setattr(service.storage, "put_bytes", fail)
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick(2)
    assert service.job(job_id).status is JobStatus.SUCCEEDED
    assert service.attempt(job_id).log_key is None


# cancel, in every state


def cancelled(service: Service, job_id: str) -> bool:
    job = service.job(job_id)
    return (job.status, job.reason) == (JobStatus.CANCELLED, Reason.CANCELLED_BY_USER)


def test_cancel_queued_while_nothing_answers(service: Service) -> None:
    job_id = service.submit()
    with service.database.write() as session:
        session.execute(update(JobRow).values(desired_state=DesiredState.CANCEL))
    service.ray.is_down = service.storage.is_down = True
    service.tick()
    assert cancelled(service, job_id)


def test_cancel_starting_before_ray_knew(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(service.ray, "submit", die)
    job_id = service.submit()
    with pytest.raises(KeyboardInterrupt):
        service.tick()
    monkeypatch.undo()
    service.expire_leases()
    service.cancel(job_id)
    for _ in range(3):
        service.tick(1)
    assert cancelled(service, job_id)
    assert service.ray.num_submitted == {}


def test_cancel_starting(service: Service) -> None:
    job_id = service.submit()
    service.tick()
    service.cancel(job_id)
    for _ in range(4):
        service.tick(1)
    assert cancelled(service, job_id)
    assert service.ray.stopped == [f"{job_id}-a1"]
    assert service.attempt(job_id).ended_at is not None
    assert service.attempt(job_id).reason == Reason.CANCELLED_BY_USER


def test_cancel_running_gives_it_time_to_stop_by_itself(service: Service) -> None:
    job_id = service.start()
    service.cancel(job_id)
    service.tick()
    assert service.job(job_id).status is JobStatus.STOPPING
    service.tick(5)
    assert service.ray.stopped == []
    service.report(job_id, EventType.RUN_STOPPED, sequence=1)
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick(0)
    assert cancelled(service, job_id)
    assert service.ray.stopped == []


def test_cancel_running_that_does_not_listen(service: Service) -> None:
    job_id = service.start()
    service.cancel(job_id)
    service.tick()
    service.tick(19)
    assert service.ray.stopped == []
    service.tick(2)
    assert service.ray.stopped == [f"{job_id}-a1"]
    service.tick(2)
    assert cancelled(service, job_id)


def test_cancel_running_while_ray_is_away_waits(service: Service) -> None:
    job_id = service.start()
    service.cancel(job_id)
    service.ray.is_down = True
    for _ in range(5):
        service.tick(30)
    assert (service.job(job_id).status, service.job(job_id).reason) == (JobStatus.STOPPING, Reason.RAY_UNREACHABLE)
    service.ray.is_down = False
    for _ in range(3):
        service.tick(10)
    assert cancelled(service, job_id)


def test_cancel_finalizing_even_with_a_result(service: Service) -> None:
    job_id = service.start()
    service.report(job_id, EventType.TRAINING_ENDED, sequence=1)
    service.cancel(job_id)
    service.commit_result(job_id)
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick()
    service.tick(1)
    assert cancelled(service, job_id)


def test_cancel_recovering(service: Service) -> None:
    job_id = service.start()
    service.ray.end(f"{job_id}-a1", RayStatus.FAILED)
    service.tick(2)
    assert service.job(job_id).status is JobStatus.RECOVERING
    service.cancel(job_id)
    service.tick()
    service.tick(1)
    assert cancelled(service, job_id)
    assert statuses(service, job_id)[-2:] == ["stopping", "cancelled"]
    assert len(service.ray.num_submitted) == 1


def test_cancel_of_a_lost_ray_job(service: Service) -> None:
    job_id = service.start()
    service.cancel(job_id)
    service.ray.forget()
    service.tick()
    service.tick(1)
    assert not cancelled(service, job_id), "its workers have just reported"
    service.tick(SILENCE_SECONDS)
    assert cancelled(service, job_id)


# leases and rounds


def test_a_lost_lease_discards_what_was_done(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """While this dispatcher asks Ray, its lease expires and another one drives the job on."""
    job_id = service.start()
    service.ray.end(f"{job_id}-a1", RayStatus.FAILED)
    other = service.new_dispatcher()
    real = service.ray.logs

    def slow(submission_id: str) -> str | None:
        monkeypatch.setattr(service.ray, "logs", real)
        service.expire_leases()
        assert other.tick() == 1
        return real(submission_id)

    monkeypatch.setattr(service.ray, "logs", slow)
    service.tick(2)
    assert statuses(service, job_id) == ["starting", "running", "recovering"]
    assert [event.type for event in service.events(job_id)].count(EventType.ATTEMPT_ENDED) == 1
    assert held(service) == 0


def test_two_dispatchers_over_many_jobs(service: Service) -> None:
    service.ray.cluster = ClusterResources(100, 0)
    ids = [service.submit() for _ in range(12)]
    service.pass_time(5)
    dispatchers = [service.new_dispatcher() for _ in range(3)]
    threads = [threading.Thread(target=dispatcher.tick) for dispatcher in dispatchers for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert service.ray.num_submitted == {f"{job_id}-a1": 1 for job_id in ids}
    assert {service.job(job_id).attempt for job_id in ids} == {1}


def test_one_jobs_trouble_does_not_stop_the_others(service: Service) -> None:
    bad, good = service.submit(), service.submit()
    with service.database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == bad).values(spec={"nothing": "known"}))
    service.tick()
    assert service.job(good).status is JobStatus.STARTING
    assert list(service.ray.num_submitted) == [f"{good}-a1"]
    assert service.tick(2) == 1  # the good one; the bad one waits for a while
    assert held(service) == 0


def test_sigterm_ends_the_loop_and_releases_its_leases(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        service.submit()
    real = service.ray.submit

    def submit(submission_id: str, **rest: object) -> None:
        service.dispatcher.stop()
        real(submission_id, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(service.ray, "submit", submit)
    service.now = utc_now() + timedelta(seconds=1)
    service.dispatcher.run()
    assert len(service.ray.num_submitted) == 1  # it ended after the job at hand
    assert held(service) == 0
    service.new_dispatcher().tick()
    assert len(service.ray.num_submitted) == 3


def test_a_round_that_fails_is_not_the_end(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.submit()
    rounds = []

    def tick() -> int:
        rounds.append(1)
        if len(rounds) == 1:
            raise RuntimeError("database is locked")
        service.dispatcher.stop()
        return 0

    monkeypatch.setattr(service.dispatcher, "tick", tick)
    service.dispatcher.run()
    assert len(rounds) == 2
