"""What an error in a worker means: exception → reason. Loads torch, and so not in the driver."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from botocore.exceptions import ClientError, NoCredentialsError

from mae_core.errors import DataError, DivergedError, EncoderError, MaeError, SpecError
from workers.contract import Reason
from workers.failures import MAX_MESSAGE, RunFailedError, StaleAttemptError, StorageError

T = TypeVar("T")

logger = logging.getLogger(__name__)

_REASONS: dict[type[BaseException], Reason] = {
    DataError: Reason.DATA_ERROR,
    EncoderError: Reason.ENCODER_ERROR,
    SpecError: Reason.SPEC_ERROR,
    DivergedError: Reason.DIVERGED,
    MaeError: Reason.SPEC_ERROR,
    torch.OutOfMemoryError: Reason.OUT_OF_MEMORY,
    MemoryError: Reason.OUT_OF_MEMORY,
    ClientError: Reason.STORAGE_REFUSED,
    NoCredentialsError: Reason.STORAGE_REFUSED,
    StaleAttemptError: Reason.STALE_ATTEMPT,
    StorageError: Reason.STORAGE_UNREACHABLE,
}


def explained(rank: int, training: Callable[[], T]) -> T | RunFailedError:
    """What `training` returns; its failure, if it fails. The traceback goes to the log."""
    try:
        return training()
    except Exception as error:
        logger.exception("the training failed")
        return explain(error, rank)


def explain(error: Exception, rank: int) -> RunFailedError:
    """What `error` is. A broken connection (torch raises RuntimeError) counts as a worker that died; what no rule knows is ours."""
    for kind, reason in _REASONS.items():
        if isinstance(error, kind):
            return RunFailedError(reason, str(error)[:MAX_MESSAGE], rank)
    message = f"{type(error).__name__}: {error}"[:MAX_MESSAGE]
    if isinstance(error, RuntimeError) and "allocate memory" in str(error):
        return RunFailedError(Reason.OUT_OF_MEMORY, message, rank)
    died = isinstance(error, RuntimeError | OSError)
    return RunFailedError(Reason.WORKER_DIED if died else Reason.INTERNAL_ERROR, message, rank)
