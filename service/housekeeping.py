"""What is taken away behind the jobs' backs: a thread of the dispatcher's process, so that no job waits for storage to delete."""

import logging
import threading
from collections.abc import Callable
from datetime import datetime

from service.counters import Tally
from service.db import Database, utc_now
from service.deletion import Deleter
from service.pruning import Pruner
from service.storage import Storage
from service.unfinished import UnfinishedUploads

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
ERROR_SECONDS = 30.0


class Housekeeper:
    """Training states that are not kept, what deleted jobs left, uploads that were never completed. Any number may run."""

    def __init__(self, database: Database, storage: Storage, *, tally: Tally, clock: Callable[[], datetime] = utc_now) -> None:
        self._sweeps = (
            Deleter(database, storage, tally=tally, clock=clock),
            Pruner(database, storage, tally=tally, clock=clock),
            UnfinishedUploads(storage, clock=clock),
        )
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End after the sweep at hand, which takes seconds."""
        self._stopping.set()

    def run(self) -> None:
        """Until `stop()`. The database's absence is waited out."""
        pause = POLL_SECONDS
        while not self._stopping.is_set():
            try:
                self.sweep()
                pause = POLL_SECONDS
            except Exception:
                pause = min(pause * 2, ERROR_SECONDS)
                log.exception("a sweep failed; the next one comes in %.1f s", pause)
            self._stopping.wait(pause)

    def sweep(self) -> None:
        """Whatever is due."""
        for one in self._sweeps:
            one.sweep_when_due()
