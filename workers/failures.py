"""What a failure means: exception → reason, message and rank. Runs in the driver and in Ray's controller."""

from collections.abc import Mapping

import torch

from mae_core.errors import DataError, DivergedError, EncoderError, MaeError, SpecError
from workers.contract import REASON_RULES, Reason

_MAX_MESSAGE = 2000


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
    StaleAttemptError: Reason.STALE_ATTEMPT,
    StorageError: Reason.STORAGE_UNREACHABLE,
}


def classify(worker_errors: Mapping[int, BaseException]) -> RunFailedError:
    """The failure behind the workers' errors, by rank.

    When one worker fails, its peers' collectives fail too; so an error that explains itself goes before one that does not. What no rule
    knows (a killed process, a broken connection) counts as a worker that died.
    """
    errors = {rank: _original(error) for rank, error in sorted(worker_errors.items())}
    for rank, error in errors.items():
        for kind, reason in _REASONS.items():
            if isinstance(error, kind):
                return RunFailedError(reason, str(error)[:_MAX_MESSAGE], rank)
    rank, error = next(iter(errors.items()))
    return RunFailedError(Reason.WORKER_DIED, f"{type(error).__name__}: {error}"[:_MAX_MESSAGE], rank)


def may_restart(failure: RunFailedError) -> bool:
    """Whether another start of the workers inside the same attempt can help."""
    return REASON_RULES[failure.reason].retryable and failure.reason is not Reason.STALE_ATTEMPT


def _original(error: BaseException) -> BaseException:
    """The exception as it was raised: Ray wraps it with its traceback, tasks with their cause."""
    while (inner := getattr(error, "_base_exc", None) or getattr(error, "cause", None)) is not None:
        error = inner
    return error
