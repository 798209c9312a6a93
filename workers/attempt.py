"""One attempt in the driver: room for its workers, their start, and their next start after a failure or when more find room.

What another start cannot mend ends the attempt, and so does one failure more than `retry.max_failures`.
"""

import logging
import time
from datetime import UTC, datetime
from typing import Protocol

import psutil

from workers.contract import EventType, WorkOrder
from workers.failures import RunFailedError, may_restart
from workers.group import WorkerGroup
from workers.pulse import HungError
from workers.restarts import Restarts
from workers.room import Growth, Room, free_workers

logger = logging.getLogger("maestro.driver")

STARTED_AT = datetime.fromtimestamp(psutil.Process().create_time(), UTC)
_MAX_MESSAGE = 500  # characters of a failure that another start follows
_MAX_STACKS = 4_000  # characters of one worker's in an event; the log has all
_MAX_TOLD = 8  # workers in an event


class Tell(Protocol):
    """Tells the service an event, without waiting for it."""

    def __call__(self, kind: EventType, **data: object) -> None: ...


class Attempt:
    """The starts of one attempt's workers, one after the other."""

    def __init__(self, order: WorkOrder, tell: Tell) -> None:
        self._order, self._tell = order, tell
        self._resources, self._counts = order.spec.resources, order.spec.worker_counts()
        self._room, self._restarts = Room(self._resources), Restarts(order.spec.retry)

    def train(self) -> None:
        """Trains to the end, or raises RunFailedError."""
        try:
            self._room.find(self._counts, at_most=free_workers(self._resources) if len(self._counts) > 1 else 0)
            while self._train_once():
                pass
        finally:
            self._room.give_back()

    def _train_once(self) -> bool:
        """One start of the workers; whether another one follows."""
        workers, growth = WorkerGroup(self._resources, self._room), Growth(self._room, self._resources, self._counts)
        try:
            grows = workers.train(self._order, {"driver_started_at": STARTED_AT.isoformat()}, take_more=growth.take_more)
            logger.info("the training %s", f"goes on with {self._room.num_workers} workers" if grows else "is over")
            return grows
        except RunFailedError as failure:
            _tell_where(failure, self._tell)
            pause = self._restarts.pause_after(_trained_seconds(workers, failure)) if may_restart(failure) else None
            if pause is None:
                raise
            self._tell_failure(failure)
            num_lost, lost = self._room.lost()
        finally:
            workers.stop()
        left = self._room.num_workers - num_lost
        self._room.give_back()
        logger.warning("all workers start again in %g s", pause)
        time.sleep(pause)
        self._room.find(self._counts, at_most=left, avoid=lost)
        return True

    def _tell_failure(self, failure: RunFailedError) -> None:
        logger.warning("worker %d failed: %s", failure.rank, failure.message)
        self._tell(
            EventType.WORKERS_FAILED,
            reason=failure.reason,
            message=failure.message[:_MAX_MESSAGE],
            rank=failure.rank,
            num_workers_before=self._room.num_workers,
            restart=self._restarts.number,
            max_restarts=self._order.spec.retry.max_failures,
        )


def _trained_seconds(workers: WorkerGroup, failure: RunFailedError) -> float:
    """How long all had gone well."""
    return workers.trained_seconds() - (failure.seconds if isinstance(failure, HungError) else 0.0)


def _tell_where(failure: RunFailedError, tell: Tell) -> None:
    """Of a training that hangs: where its workers are, to the log and, shortened, to the service."""
    if not isinstance(failure, HungError):
        return
    for rank, text in failure.stacks.items():
        logger.error("worker %d hangs:\n%s", rank, text)
    shown = {str(rank): text[:_MAX_STACKS] for rank, text in list(failure.stacks.items())[:_MAX_TOLD]}
    tell(EventType.RUN_HUNG, rank=failure.rank, step=failure.step, seconds=round(failure.seconds, 1), stacks=shown)
