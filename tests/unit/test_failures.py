"""What a failure means, and what the driver does with it."""

import pickle

import pytest
import torch
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from mae_core.errors import DataError, DivergedError, EncoderError, SpecError
from workers.contract import REASON_RULES, Reason
from workers.failures import RunFailedError, StaleAttemptError, StorageError, classify, may_restart
from workers.main import StopOnPermanentFailure

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
    for error in (DataError("x"), StaleAttemptError("x"), MemoryError()):
        with pytest.raises(RunFailedError):
            StopOnPermanentFailure().after_exception(None, {0: COLLATERAL, 1: error})


def test_a_failure_survives_the_way_from_controller_to_driver() -> None:
    failure = pickle.loads(pickle.dumps(RunFailedError(Reason.DIVERGED, "step 3", 1)))
    assert (failure.reason, failure.message, failure.rank) == (Reason.DIVERGED, "step 3", 1)


def test_every_reason_has_its_rule() -> None:
    assert set(REASON_RULES) == set(Reason)
    assert all(rule.message.endswith((".", "!")) for rule in REASON_RULES.values())
    assert not may_restart(RunFailedError(Reason.OUT_OF_MEMORY, "", 0))
