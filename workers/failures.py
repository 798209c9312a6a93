"""What a failure means to the driver. Whatever goes wrong in a worker, it tells as a RunFailedError; a dead one is told of by Ray."""

from collections.abc import Sequence

from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from workers.contract import REASON_RULES, Reason, Retry

MAX_MESSAGE = 2000


class StaleAttemptError(Exception):
    """A newer attempt has taken over the job: this one stops."""


class StorageError(Exception):
    """Object storage did not answer for as long as was to be waited."""


class WaitEndedError(StorageError):
    """Nobody wants what was waited for any more: the job is cancelled, or another attempt has taken it over."""


class RunFailedError(Exception):
    """A run has failed, on the worker `rank` (-1: on none of them)."""

    def __init__(self, reason: Reason, message: str, rank: int) -> None:
        super().__init__(reason, message, rank)
        self.reason, self.message, self.rank = reason, message, rank


def first_cause(failures: Sequence[RunFailedError]) -> RunFailedError:
    """The failure behind those of several workers.

    When one worker fails, its peers' collectives fail too, which looks as if a worker had died; so what explains itself goes first.
    """
    return min(failures, key=lambda failure: (failure.reason is Reason.WORKER_DIED, failure.rank))


def of_ray(error: RayError, rank: int) -> RunFailedError:
    """What Ray says of a worker that could tell nothing itself."""
    message = f"{type(error).__name__}: {error}"[:MAX_MESSAGE]
    if isinstance(error, OutOfMemoryError):  # Ray kills whoever fills its machine's memory
        return RunFailedError(Reason.OUT_OF_MEMORY, message, rank)
    is_ours = isinstance(error, RayTaskError)  # raised beside the training
    return RunFailedError(Reason.INTERNAL_ERROR if is_ours else Reason.WORKER_DIED, message, rank)


def may_restart(failure: RunFailedError) -> bool:
    """Whether another start of the workers inside the same attempt can help. For storage the service waits, and holds no device."""
    elsewhere = (Reason.STALE_ATTEMPT, Reason.STORAGE_UNREACHABLE)
    return REASON_RULES[failure.reason].retry is Retry.INFRASTRUCTURE and failure.reason not in elsewhere
