"""What a failure means: exception → reason, message and rank. Runs in the driver and in Ray's controller."""

from collections.abc import Mapping

import ray.exceptions
import torch
from botocore.exceptions import ClientError

from mae_core.errors import DataError, DivergedError, EncoderError, MaeError, SpecError
from workers.contract import REASON_RULES, Reason

_MAX_MESSAGE = 2000
_WRAPPED = ("_base_exc", "health_check_failure", "cause")  # where Ray keeps the exception inside its own


class StaleAttemptError(Exception):
    """A newer attempt has taken over the job: this one stops."""


class StorageError(Exception):
    """Object storage did not answer for minutes."""


class RunFailedError(Exception):
    """A run has failed for a reason that another start of the workers would meet again."""

    def __init__(self, reason: Reason, message: str, rank: int) -> None:
        super().__init__(reason, message, rank)
        self.reason, self.message, self.rank = reason, message, rank


_REASONS: dict[type[BaseException], Reason] = {
    DataError: Reason.DATA_ERROR,
    EncoderError: Reason.ENCODER_ERROR,
    SpecError: Reason.SPEC_ERROR,
    DivergedError: Reason.DIVERGED,
    MaeError: Reason.SPEC_ERROR,
    torch.OutOfMemoryError: Reason.OUT_OF_MEMORY,
    MemoryError: Reason.OUT_OF_MEMORY,
    ray.exceptions.OutOfMemoryError: Reason.OUT_OF_MEMORY,
    ClientError: Reason.STORAGE_REFUSED,
    StaleAttemptError: Reason.STALE_ATTEMPT,
    StorageError: Reason.STORAGE_UNREACHABLE,
}


def classify(worker_errors: Mapping[int, BaseException]) -> RunFailedError:
    """The failure behind the workers' errors, by rank.

    When one worker fails, its peers' collectives fail too; so an error that explains itself goes before one that does not. A killed
    process and a broken connection (torch raises RuntimeError, Ray its own) count as a worker that died; what no rule knows is ours.
    """
    failures = [_failure(_original(error), rank) for rank, error in sorted(worker_errors.items())]
    return min(failures, key=lambda failure: failure.reason is Reason.WORKER_DIED)


def _failure(error: BaseException, rank: int) -> RunFailedError:
    for kind, reason in _REASONS.items():
        if isinstance(error, kind):
            return RunFailedError(reason, str(error)[:_MAX_MESSAGE], rank)
    message = f"{type(error).__name__}: {error}"[:_MAX_MESSAGE]
    if isinstance(error, RuntimeError) and "allocate memory" in str(error):
        return RunFailedError(Reason.OUT_OF_MEMORY, message, rank)
    died = isinstance(error, RuntimeError | OSError) or type(error).__module__.startswith("ray.")
    return RunFailedError(Reason.WORKER_DIED if died else Reason.INTERNAL_ERROR, message, rank)


def may_restart(failure: RunFailedError) -> bool:
    """Whether another start of the workers inside the same attempt can help."""
    return REASON_RULES[failure.reason].retryable and failure.reason is not Reason.STALE_ATTEMPT


def _original(error: BaseException) -> BaseException:
    """The exception as it was raised: Ray wraps it with its traceback, tasks with their cause, health checks with what they met."""
    while (inner := next((inner for name in _WRAPPED if (inner := getattr(error, name, None)) is not None), None)) is not None:
        error = inner
    return error
