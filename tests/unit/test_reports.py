import threading
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.bodylimit import MAX_BODY_BYTES, MAX_REPORT_BYTES
from service.ray_jobs import RayStatus
from tests.unit.service_fixtures import Service
from workers.contract import CONTRACT_VERSION, EventType, JobStatus, attempt_token

Send = Callable[..., Any]
AT = "2026-01-01T00:00:00Z"


@pytest.fixture
def job(service: Service) -> str:
    job_id = service.submit()
    service.tick()
    return job_id


@pytest.fixture
def send(client: TestClient, service: Service, job: str) -> Send:
    def post(*, attempt: int = 1, sequence: int = 0, events: list[tuple[str, dict[str, Any]]] | None = None, **body: Any) -> Any:
        token = attempt_token(service.settings.secret_key.get_secret_value(), job, attempt)
        message = {
            "incarnation": 1,
            "sequence": sequence,
            "events": [{"type": kind, "at": AT, "data": data} for kind, data in events or []],
        }
        return client.post(f"/v1/jobs/{job}/attempts/{attempt}/reports", json=message | body, headers={"Authorization": f"Bearer {token}"})

    return post


def types(service: Service, job: str) -> list[str]:
    return [event.type for event in service.events(job)]


def test_the_answer_is_what_the_user_wants(send: Send, service: Service, job: str) -> None:
    assert send().json() == {"desired_state": "run", "may_grow": False}
    service.cancel(job)
    assert send(sequence=1).json() == {"desired_state": "cancel", "may_grow": False}
    assert send(sequence=1).json() == {"desired_state": "cancel", "may_grow": False}


def test_events_move_the_job(send: Send, service: Service, job: str) -> None:
    send(sequence=0, events=[("workers_started", {"num_workers": 2})])
    assert service.job(job).status is JobStatus.RUNNING
    assert service.attempt(job).started_at is not None
    send(sequence=1, events=[("training_ended", {})])
    assert service.job(job).status is JobStatus.FINALIZING
    send(sequence=2, events=[("workers_started", {})])  # restarted while it finalized
    assert service.job(job).status is JobStatus.FINALIZING
    told = next(event for event in service.events(job) if event.type == "workers_started")
    assert (told.attempt, told.data, told.at.isoformat()) == (1, {"num_workers": 2}, "2026-01-01T00:00:00+00:00")


def test_events_of_one_report_are_taken_in_order(send: Send, service: Service, job: str) -> None:
    send(events=[("workers_started", {}), ("training_ended", {})])
    assert service.job(job).status is JobStatus.FINALIZING
    assert [event.data["to"] for event in service.events(job) if event.type == "status_changed"] == ["starting", "running", "finalizing"]


def test_a_repeat_changes_nothing(send: Send, service: Service, job: str) -> None:
    body = {"events": [("workers_started", {}), ("evaluated", {"loss": 1.0})], "progress": {"step": 3, "num_steps": 9, "epoch": 0.5}}
    assert send(**body).status_code == 200
    before = types(service, job)
    assert send(**body).status_code == 200
    assert types(service, job) == before
    send(events=body["events"], sequence=1)
    assert len(types(service, job)) == len(before) + 2


def test_racing_repeats_are_one(send: Send, service: Service, job: str) -> None:
    barrier = threading.Barrier(6)
    codes: list[int] = []

    def post() -> None:
        barrier.wait()
        codes.append(send(events=[("evaluated", {})]).status_code)

    threads = [threading.Thread(target=post) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [200] * 6
    assert types(service, job).count("evaluated") == 1


def test_progress_is_the_newest_incarnations(send: Send, service: Service, job: str) -> None:
    def step() -> int | None:
        progress = service.job(job).progress
        return None if progress is None else progress.step

    assert step() is None
    send(incarnation=2000, progress={"step": 7, "num_steps": 9, "epoch": 0.5, "loss": "NaN"})
    send(incarnation=1000, progress={"step": 3, "num_steps": 9, "epoch": 0.5})
    assert step() == 7
    send(incarnation=3000, progress={"step": 5, "num_steps": 9, "epoch": 0.5})
    assert step() == 5


def test_a_run_that_failed_says_why(send: Send, service: Service, job: str) -> None:
    send(events=[("run_failed", {"reason": "diverged", "message": "loss is NaN at step 3", "rank": 0})])
    assert (service.attempt(job).reason, service.attempt(job).message) == ("diverged", "loss is NaN at step 3")
    assert service.job(job).status is JobStatus.STARTING  # the dispatcher decides, when Ray says that it is over
    assert service.tick() == 1  # without waiting for the next poll


def test_a_reason_nobody_knows_is_ours_to_mend(send: Send, service: Service, job: str) -> None:
    send(events=[("run_failed", {"reason": "gremlins", "message": "?"})])
    assert service.attempt(job).reason == "internal_error"


def test_artifacts(send: Send, service: Service, job: str, client: TestClient) -> None:
    prefix = f"jobs/{job}/"
    arrays = {"key": f"{prefix}reconstructions/step=4.npz", "bytes": 11, "sha256": "b" * 64}
    picture = {"step": 4, "key": f"{prefix}reconstructions/step=4.png", "bytes": 10, "sha256": "a" * 64, "arrays": arrays}
    events: list[tuple[str, dict[str, Any]]] = [("reconstructions_written", picture)]
    states = [f"training_state/step={step:010d}-a1-5/" for step in (200, 400)]
    events += [("training_state_committed", {"step": 1, "key": f"{prefix}{name}", "bytes": 99}) for name in states]
    for key in (
        "",
        "training_state/",
        "training_state/step=1/",
        f"{states[0]}x/",
        f"{states[0]}../",
        f"x/{states[0]}",
    ):  # would be deleted whole
        events.append(("training_state_committed", {"step": 1, "key": f"{prefix}{key}", "bytes": 99}))
    send(events=events)
    found = client.get(f"/v1/jobs/{job}/artifacts").json()["artifacts"]
    assert [(item["name"], item["kind"], item["bytes"], item["sha256"], item["step"]) for item in found] == [
        ("reconstructions/step=4.npz", "reconstruction_arrays", 11, "b" * 64, 4),
        ("reconstructions/step=4.png", "reconstruction", 10, "a" * 64, 4),
        (states[0], "training_state", 99, None, 200),
        (states[1], "training_state", 99, None, 400),
    ]
    assert found[1]["uri"] == f"s3://maestro/{prefix}reconstructions/step=4.png"


@pytest.mark.parametrize(
    "data", [{}, {"key": "jobs/other/x", "bytes": 1}, {"key": 3, "bytes": 1}, {"key": "jobs/{job}/x", "bytes": "many"}]
)
def test_an_artifact_that_cannot_be_read_does_not_hold_up_the_run(
    send: Send, service: Service, job: str, data: dict[str, Any], client: TestClient
) -> None:
    data = {name: value.replace("{job}", job) if isinstance(value, str) else value for name, value in data.items()}
    assert send(events=[("reconstructions_written", data)]).status_code == 200
    assert client.get(f"/v1/jobs/{job}/artifacts").json() == {"artifacts": []}


def test_the_result_shows_as_soon_as_it_is_committed(send: Send, service: Service, job: str) -> None:
    send(events=[("result_committed", {"uri": "s3://elsewhere/x/", "metrics": {"loss": 1}})])
    assert service.job(job).result_uri is None
    uri = f"s3://maestro/jobs/{job}/encoder/"
    send(sequence=1, events=[("result_committed", {"uri": uri, "metrics": {"loss": 0.5}})])
    assert (service.job(job).result_uri, service.job(job).metrics) == (uri, {"loss": 0.5})
    assert service.tick() == 1


def test_a_stale_attempt_is_told_to_stop(send: Send, service: Service, job: str) -> None:
    service.ray.end(f"{job}-a1", RayStatus.FAILED)
    service.tick(2)
    assert service.job(job).status is JobStatus.RECOVERING
    before = types(service, job)
    answer = send(events=[("training_ended", {})])
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:maestro:stale-attempt")
    service.tick(100)
    assert service.job(job).attempt == 2
    assert send(sequence=5).status_code == 409
    for worse in ({"contract": CONTRACT_VERSION + 1}, {"events": [(EventType.STATUS_CHANGED, {})]}):
        assert send(**worse).json()["type"] == "urn:maestro:stale-attempt"  # before all else that is wrong with it
    assert send(attempt=2).status_code == 200
    assert send(attempt=3).status_code == 404
    assert "training_ended" not in types(service, job)[len(before) :]


def test_a_finished_job_hears_no_more(send: Send, service: Service, job: str) -> None:
    service.commit_result(job)
    service.ray.end(f"{job}-a1", RayStatus.SUCCEEDED)
    service.tick(2)
    answer = send(events=[("run_failed", {"reason": "diverged", "message": "?"})])
    assert answer.status_code == 409
    assert service.job(job).status is JobStatus.SUCCEEDED


@pytest.mark.parametrize("version", [CONTRACT_VERSION - 1, CONTRACT_VERSION + 1])
def test_another_contract_version(send: Send, version: int) -> None:
    """Of workers that were upgraded before the service, and after: their reports wait on their disk (test_reporter)."""
    answer = send(contract=version)
    assert answer.status_code == 409
    assert f"contract version {version}" in answer.json()["detail"]
    assert answer.json()["type"] == "urn:maestro:conflict"


def test_the_services_own_facts_are_not_for_workers(send: Send, service: Service, job: str) -> None:
    assert send(events=[(EventType.STATUS_CHANGED, {})]).status_code == 422
    assert "status_changed" not in types(service, job)[3:]


def test_bodies_are_bounded(client: TestClient, service: Service, job: str) -> None:
    token = attempt_token(service.settings.secret_key.get_secret_value(), job, 1)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    path = f"/v1/jobs/{job}/attempts/1/reports"
    body = b'{"incarnation": 1, "sequence": 0}'
    assert client.post(path, content=body + b" " * (MAX_REPORT_BYTES - len(body)), headers=headers).status_code == 200
    too_much = client.post(path, content=b" " * (MAX_REPORT_BYTES + 1), headers=headers)
    assert (too_much.status_code, too_much.json()["type"]) == (413, "urn:maestro:content-too-large")
    chunks = iter([b" " * MAX_BODY_BYTES] * 5)
    assert client.post(path, content=chunks, headers=headers).status_code == 413  # no length announced
    assert client.post("/v1/jobs", content=b" " * (MAX_BODY_BYTES + 1)).status_code == 413
