"""What a failure means, and what the driver does with it."""

import json
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from botocore.exceptions import ClientError
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

from mae_core.errors import DataError, DivergedError, EncoderError, SpecError
from tests.unit.scripted_server import Answer, scripted_server
from workers.contract import ORDER_VARIABLE, REASON_RULES, Reason, Report
from workers.failures import RunFailedError, StaleAttemptError, StorageError, classify, may_restart
from workers.main import StopOnPermanentFailure, main

COLLATERAL = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]")


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
        (WorkerHealthCheckFailedError("killed", failure=OutOfMemoryError("the node's memory")), Reason.OUT_OF_MEMORY),
        (WorkerHealthCheckFailedError("A worker health check failed.", failure=ActorDiedError()), Reason.WORKER_DIED),
        (COLLATERAL, Reason.WORKER_DIED),
    ],
)
def test_reason_of_an_error_wrapped_by_ray(error: Exception, reason: Reason) -> None:
    wrapped = pickle.loads(pickle.dumps(UserExceptionWithTraceback(error, "Traceback …")))
    assert classify({0: wrapped}).reason is reason


def test_the_error_that_explains_itself_goes_before_its_consequences() -> None:
    failure = classify({0: COLLATERAL, 1: DataError("no images below /data"), 2: COLLATERAL})
    assert (failure.reason, failure.message, failure.rank) == (Reason.DATA_ERROR, "no images below /data", 1)


def test_only_what_a_restart_can_mend_is_restarted() -> None:
    StopOnPermanentFailure().after_exception(None, {0: COLLATERAL})
    for error in (DataError("x"), StaleAttemptError("x"), MemoryError(), TypeError("x")):
        with pytest.raises(RunFailedError):
            StopOnPermanentFailure().after_exception(None, {0: COLLATERAL, 1: error})


def test_a_failure_survives_the_way_from_controller_to_driver() -> None:
    failure = pickle.loads(pickle.dumps(RunFailedError(Reason.DIVERGED, "step 3", 1)))
    assert (failure.reason, failure.message, failure.rank) == (Reason.DIVERGED, "step 3", 1)


def test_an_order_of_another_version_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scripted_server(lambda _: Answer(body=b'{"desired_state": "run"}')) as server:
        order = {"contract": 99, "job": "job1", "attempt": 3, "token": "t", "service_url": server.url, "a field of the future": 1}
        monkeypatch.setenv(ORDER_VARIABLE, json.dumps(order))
        assert main() == 1
        [request] = server.requests
    assert request.path == "/v1/jobs/job1/attempts/3/reports"
    [event] = Report.model_validate_json(request.body).events
    assert event.data["reason"] == "contract_mismatch"
    assert "version 99" in event.data["message"]


def test_every_reason_has_its_rule() -> None:
    assert set(REASON_RULES) == set(Reason)
    assert all(rule.message.endswith((".", "!")) for rule in REASON_RULES.values())
    assert not may_restart(RunFailedError(Reason.OUT_OF_MEMORY, "", 0))
