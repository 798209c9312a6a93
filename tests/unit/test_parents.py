"""Jobs that start from the encoder of a job that has not finished: they wait for it, and fail with it."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.policy import ACTIVE_SECONDS, PARENT_SECONDS
from service.ray_jobs import RayStatus
from tests.unit.service_fixtures import PRETRAIN, PROBE, Service
from workers.contract import EventType, JobStatus, Reason


def submit(client: TestClient, parent: str, **changes: Any) -> Any:
    answer = client.post("/v1/jobs", json=PROBE | {"encoder": {"job": parent}} | changes)
    assert answer.status_code == 201, answer.text
    return answer.json()


def succeed(service: Service, job_id: str) -> None:
    service.commit_result(job_id)
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick(ACTIVE_SECONDS)
    assert service.job(job_id).status is JobStatus.SUCCEEDED


@pytest.mark.parametrize("begun", [False, True])
def test_it_waits_and_starts_when_its_parent_has_succeeded(client: TestClient, service: Service, begun: bool) -> None:
    parent = service.start() if begun else service.submit()
    child = submit(client, parent)
    assert (child["spec"]["encoder"]["job"], child["spec"]["model"]["arch"]) == (parent, "vit_tiny_patch2")
    for _ in range(3):
        service.tick(PARENT_SECONDS)
    waits = service.job(child["id"])
    assert (waits.status, waits.reason) == (JobStatus.QUEUED, Reason.WAITING_FOR_JOB)
    assert waits.detail == f"job {parent} is {'running' if begun else 'starting'}"
    if not begun:
        service.ray.run(f"{parent}-a1")
        service.report(parent, EventType.WORKERS_STARTED)
    succeed(service, parent)
    for _ in range(2):
        service.tick(PARENT_SECONDS)
    started = service.job(child["id"])
    assert (started.status, started.reason) == (JobStatus.STARTING, None)
    assert started.spec["encoder"] == {"job": None, "artifact": f"s3://maestro/jobs/{parent}/encoder/", "file": None, "init": None}
    order = service.ray.submissions[f"{child['id']}-a1"].env_vars["MAESTRO_ORDER"]
    assert f'"artifact":"s3://maestro/jobs/{parent}/encoder/"' in order


def test_it_waits_without_room_for_it_and_others_pass(client: TestClient, service: Service) -> None:
    parent = service.start()
    child, other = submit(client, parent)["id"], service.submit()
    service.tick(PARENT_SECONDS)
    assert (service.job(child).status, service.job(other).status) == (JobStatus.QUEUED, JobStatus.STARTING)


@pytest.mark.parametrize("how", ["failed", "cancelled"])
def test_it_fails_with_its_parent_and_so_do_those_that_wait_for_it(client: TestClient, service: Service, how: str) -> None:
    parent = service.start()
    child = submit(client, parent, kind="finetune")["id"]
    grandchild = client.post(
        "/v1/jobs", json={"kind": "evaluate", "name": "e", "data": {"source": "digits"}, "encoder": {"job": child}}
    ).json()["id"]
    if how == "failed":
        service.report(parent, EventType.RUN_FAILED, sequence=1, reason="data_error", message="no images")
        service.ray.end(f"{parent}-a1", RayStatus.FAILED)
    else:
        service.cancel(parent)
        service.ray.end(f"{parent}-a1", RayStatus.STOPPED)
    for _ in range(4):
        service.tick(PARENT_SECONDS)
    failed = service.job(child)
    why = "data_error" if how == "failed" else "cancelled_by_user"
    assert (failed.status, failed.reason, failed.detail) == (JobStatus.FAILED, Reason.PARENT_FAILED, f"job {parent} is {how} ({why})")
    assert failed.reason_message is not None
    assert "submit both again" in failed.reason_message
    assert (service.job(grandchild).status, service.job(grandchild).reason) == (JobStatus.FAILED, Reason.PARENT_FAILED)
    assert service.ray.num_submitted == {f"{parent}-a1": 1}


def test_an_evaluation_waits_for_a_fine_tune_and_keeps_what_it_may_not_set(client: TestClient, service: Service) -> None:
    """Its pooling is the recipe's then, not the user's: taking up the parent must not take it for a setting."""
    pretrained = service.start()
    tuned = submit(client, pretrained, kind="finetune")["id"]
    evaluation = {"kind": "evaluate", "name": "e", "data": {"source": "digits"}, "encoder": {"job": tuned}}
    child = client.post("/v1/jobs", json=evaluation).json()["id"]
    succeed(service, pretrained)
    for _ in range(2):
        service.tick(PARENT_SECONDS)
    service.ray.run(f"{tuned}-a1")
    service.report(tuned, EventType.WORKERS_STARTED)
    succeed(service, tuned)
    for _ in range(2):
        service.tick(PARENT_SECONDS)
    assert service.job(child).status is JobStatus.STARTING


def test_it_can_be_paused_and_cancelled_while_it_waits(client: TestClient, service: Service) -> None:
    parent = service.start()
    paused, cancelled = submit(client, parent)["id"], submit(client, parent)["id"]
    service.tick(PARENT_SECONDS)
    assert client.post(f"/v1/jobs/{paused}/pause").json()["status"] == "paused"
    assert client.post(f"/v1/jobs/{cancelled}/cancel").json()["status"] == "cancelled"
    succeed(service, parent)
    service.tick(PARENT_SECONDS)
    assert service.job(paused).status is JobStatus.PAUSED
    client.post(f"/v1/jobs/{paused}/resume")
    for _ in range(2):
        service.tick(PARENT_SECONDS)
    assert service.job(paused).status is JobStatus.STARTING


def test_what_does_not_fit_is_refused_before_its_parent_has_finished(client: TestClient, service: Service) -> None:
    parent = service.start()
    model = {"arch": "vit_tiny_patch4", "image_size": 8, "in_chans": 1}
    answer = client.post("/v1/jobs", json=PROBE | {"encoder": {"job": parent}, "model": model})
    assert answer.status_code == 422
    assert f"model does not fit the encoder of job {parent}: arch 'vit_tiny_patch4' (encoder: 'vit_tiny_patch2')" in answer.text
    probe = submit(client, parent)["id"]
    assert "is of kind probe; name a pretrain job" in client.post("/v1/jobs", json=PROBE | {"encoder": {"job": probe}}).text


def test_a_result_that_cannot_be_read_fails_it(client: TestClient, service: Service) -> None:
    parent = service.start()
    child = submit(client, parent)["id"]
    service.tick()
    succeed(service, parent)
    service.storage.objects["maestro", f"jobs/{parent}/encoder/manifest.json"] = b"{}"
    service.tick(PARENT_SECONDS)
    assert (service.job(child).status, service.job(child).reason) == (JobStatus.FAILED, Reason.ENCODER_ERROR)


def test_storage_that_is_away_is_waited_for(client: TestClient, service: Service) -> None:
    parent = service.start()
    child = submit(client, parent)["id"]
    service.tick()
    succeed(service, parent)
    service.storage.is_down = True
    service.tick(PARENT_SECONDS)
    assert (service.job(child).status, service.job(child).reason) == (JobStatus.QUEUED, Reason.STORAGE_UNREACHABLE)
    service.storage.is_down = False
    for _ in range(2):
        service.tick(PARENT_SECONDS)
    assert service.job(child).status is JobStatus.STARTING


def test_a_pretraining_goes_on_from_one_that_has_not_finished(client: TestClient, service: Service) -> None:
    parent = service.start()
    child = client.post("/v1/jobs", json=PRETRAIN | {"encoder": {"job": parent}}).json()["id"]
    succeed(service, parent)
    for _ in range(2):
        service.tick(PARENT_SECONDS)
    assert service.job(child).status is JobStatus.STARTING
