"""What a failure means, and what the driver does with it."""

import json
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from botocore.exceptions import ClientError
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError, RayTaskError

from mae_core.errors import DataError, DivergedError, EncoderError, SpecError
from tests.unit.scripted_server import Answer, scripted_server
from workers import main as driver
from workers.causes import explain, explained
from workers.contract import CONTRACT_VERSION, ORDER_VARIABLE, REASON_RULES, Reason, Report
from workers.failures import RunFailedError, StaleAttemptError, StorageError, first_cause, may_restart, of_ray

COLLATERAL = RunFailedError(Reason.WORKER_DIED, "[gloo] Connection closed by peer [127.0.0.1]", 0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DataError("no images"), Reason.DATA_ERROR),
        (EncoderError("bad"), Reason.ENCODER_ERROR),
        (SpecError("bad"), Reason.SPEC_ERROR),
        (DivergedError("nan"), Reason.DIVERGED),
        (torch.OutOfMemoryError("CUDA"), Reason.OUT_OF_MEMORY),
        (MemoryError(), Reason.OUT_OF_MEMORY),
        (StaleAttemptError("old"), Reason.STALE_ATTEMPT),
        (StorageError("upload"), Reason.STORAGE_UNREACHABLE),
        (ClientError({"Error": {"Code": "AccessDenied"}}, "PutObject"), Reason.STORAGE_REFUSED),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), Reason.OUT_OF_MEMORY),
        (TypeError("ours"), Reason.INTERNAL_ERROR),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]"), Reason.WORKER_DIED),
        (ConnectionResetError("peer"), Reason.WORKER_DIED),
    ],
)
def test_reason_of_a_workers_error(error: Exception, reason: Reason) -> None:
    failure = pickle.loads(pickle.dumps(explain(error, 1)))  # as it travels to the driver
    assert (failure.reason, failure.rank) == (reason, 1)
    assert str(error) in failure.message


def test_a_failed_training_tells_its_failure_and_logs_where_it_was(caplog: pytest.LogCaptureFixture) -> None:
    def training() -> bool:
        raise DataError("no images below /data")

    failure = explained(2, training)
    assert isinstance(failure, RunFailedError)
    assert (failure.reason, failure.message, failure.rank) == (Reason.DATA_ERROR, "no images below /data", 2)
    assert "in training" in caplog.text  # the traceback
    assert explained(2, lambda: True) is True


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OutOfMemoryError("the node's memory"), Reason.OUT_OF_MEMORY),
        (ActorDiedError(), Reason.WORKER_DIED),
        (RayTaskError("train", "Traceback …", ImportError("no module"), "proctitle", 1, "127.0.0.1"), Reason.INTERNAL_ERROR),
    ],
)
def test_reason_of_what_ray_tells(error: RayError, reason: Reason) -> None:
    assert of_ray(error, 3).reason is reason
    assert of_ray(error, 3).rank == 3


def test_the_error_that_explains_itself_goes_before_its_consequences() -> None:
    telling = RunFailedError(Reason.DATA_ERROR, "no images below /data", 1)
    assert first_cause([COLLATERAL, telling, COLLATERAL]) is telling


@pytest.mark.parametrize("version", [CONTRACT_VERSION - 1, CONTRACT_VERSION + 1])
def test_an_order_of_another_version_is_told(version: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scripted_server(lambda _: Answer(body=b'{"desired_state": "run"}')) as server:
        order = {"contract": version, "job": "job1", "attempt": 3, "token": "t", "service_url": server.url, "a field of the future": 1}
        monkeypatch.setenv(ORDER_VARIABLE, json.dumps(order))
        assert driver.main() == 1
        [request] = server.requests
    assert request.path == "/v1/jobs/job1/attempts/3/reports"
    [event] = Report.model_validate_json(request.body).events
    assert event.data["reason"] == "contract_mismatch"
    assert f"version {version}, this worker {CONTRACT_VERSION}" in event.data["message"]


def test_every_reason_has_its_rule() -> None:
    assert set(REASON_RULES) == set(Reason)
    assert all(rule.message.endswith((".", "!")) for rule in REASON_RULES.values())
    assert not may_restart(RunFailedError(Reason.OUT_OF_MEMORY, "", 0))
    assert not may_restart(RunFailedError(Reason.STORAGE_UNREACHABLE, "", 0)), "the service waits for it"
