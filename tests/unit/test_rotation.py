"""Rotating secrets: what was made with the key before goes on while it is named, and ends with it."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from service import webhooks
from service.app import create_app
from service.models import AttemptRow
from service.reconciler import SWEEP_SECONDS
from tests.unit.access import bearer
from tests.unit.service_fixtures import API_TOKEN, Service
from workers.contract import attempt_token, submission_id

OLD, NEW = "k" * 32, "n" * 32
REPORT = {"incarnation": 1, "sequence": 1}


def rotate(service: Service, **changes: Any) -> None:
    """All processes start again, with other settings."""
    service.settings = type(service.settings).model_validate(service.settings.model_dump() | changes)
    service.dispatcher = service.new_dispatcher()


def status(service: Service, job_id: str, *, attempt: int, key: str) -> int:
    with TestClient(create_app(service.settings, storage=service.storage, ray=service.ray)) as client:
        answer = client.post(
            f"/v1/jobs/{job_id}/attempts/{attempt}/reports", json=REPORT, headers=bearer(attempt_token(key, job_id, attempt))
        )
        return answer.status_code


def test_workers_of_the_key_before_are_heard_as_long_as_it_is_named(service: Service) -> None:
    job_id = service.start()
    rotate(service, secret_key=NEW, previous_secret_key=OLD)
    assert [status(service, job_id, attempt=1, key=key) for key in (OLD, NEW, "x" * 32)] == [200, 200, 401]
    rotate(service, previous_secret_key=None)
    assert [status(service, job_id, attempt=1, key=key) for key in (OLD, NEW)] == [401, 200]


def test_a_new_attempt_gets_a_token_of_the_new_key(service: Service) -> None:
    rotate(service, secret_key=NEW, previous_secret_key=OLD)
    job_id = service.submit()
    service.tick()
    [sent] = service.ray.jobs
    assert sent == submission_id(job_id, 1)
    assert attempt_token(NEW, job_id, 1) in str(service.ray.submissions[sent].env_vars)


def test_what_the_key_before_left_in_ray_is_still_ours(service: Service) -> None:
    """A run whose attempt is over is stopped, by whichever key it was started."""
    job_id = service.start()
    rotate(service, secret_key=NEW, previous_secret_key=OLD)
    with service.database.write() as session:
        session.get_one(AttemptRow, (job_id, 1)).ended_at = service.now
    for _ in range(3):
        service.dispatcher._reconciler.sweep_when_due()
        service.pass_time(SWEEP_SECONDS + 1)
    assert submission_id(job_id, 1) in service.ray.stopped


@pytest.mark.parametrize("key", [OLD, NEW])
def test_a_receiver_knows_messages_by_either_secret(key: str) -> None:
    secrets = [webhooks.secret_of(each, "w") for each in (NEW, OLD)]
    signed = webhooks.sign(secrets, "m", 1, b"{}")["webhook-signature"].split()
    alone = webhooks.sign([webhooks.secret_of(key, "w")], "m", 1, b"{}")["webhook-signature"]
    assert len(signed) == 2
    assert alone in signed


def test_the_installations_own_token_is_the_present_one_alone(service: Service) -> None:
    rotate(service, api_token="t" * 40)
    with TestClient(create_app(service.settings, storage=service.storage, ray=service.ray)) as client:
        assert [client.get("/v1/jobs", headers=bearer(token)).status_code for token in (API_TOKEN, "t" * 40)] == [401, 200]
