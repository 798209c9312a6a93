"""Saves training state and pictures beside the training: the step waits for a copy in memory, never for a disk or the network."""

import logging
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from workers.contract import EventType, TrainingStateManifest, WorkOrder, reconstructions_prefix
from workers.objects import STATE_FILE, ObjectStore, state_folder
from workers.reporter import Reporter

logger = logging.getLogger(__name__)


class Saver:
    """One thread that uploads the newest state handed to it. While one upload goes on, a newer state replaces one that still waits.

    What is saved is told to `reporter`. A failed save never reaches the training.
    """

    def __init__(self, order: WorkOrder, store: ObjectStore, reporter: Reporter, incarnation: int) -> None:
        self._order = order
        self._store = store
        self._reporter = reporter
        self._incarnation = incarnation
        self._changed = threading.Condition()
        self._waiting: tuple[int, dict[str, Tensor], Path | None] | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="saver", daemon=True)
        self._thread.start()

    def save(self, step: int, state: dict[str, Tensor], picture: Path | None = None) -> None:
        """Takes `state` and the file `picture`, neither of which may change any more, and returns at once."""
        with self._changed:
            if self._waiting is not None and self._waiting[2] is not None:
                self._waiting[2].unlink()
            self._waiting = (step, state, picture)
            self._changed.notify()

    def close(self, timeout: float) -> None:
        """Waits up to `timeout` seconds for a save that has begun, and drops what waits behind it."""
        with self._changed:
            self._closing = True
            self._waiting = None
            self._changed.notify()
        self._thread.join(timeout)

    def upload_picture(self, step: int, picture: Path) -> None:
        """Uploads a picture of reconstructions, in the thread of the caller."""
        key = f"{reconstructions_prefix(self._order.prefix)}step={step:010d}.png"
        entry = self._store.put_file(key, picture)
        picture.unlink()
        self._reporter.event(EventType.RECONSTRUCTIONS_WRITTEN, step=step, key=key, bytes=entry.bytes, sha256=entry.sha256)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                if self._waiting is None:
                    return
                (step, state, picture), self._waiting = self._waiting, None
            try:
                self._upload_state(step, state)
                if picture is not None:
                    self.upload_picture(step, picture)
            except Exception:
                logger.exception("training state of step %d could not be saved; training goes on", step)

    def _upload_state(self, step: int, state: dict[str, Tensor]) -> None:
        order = self._order
        prefix = state_folder(order.prefix, step=step, attempt=order.attempt, incarnation=self._incarnation)
        with tempfile.TemporaryDirectory(prefix="maestro-state-") as folder:
            path = Path(folder) / STATE_FILE
            save_file(state, path)
            entry = self._store.put_file(prefix + STATE_FILE, path)
        manifest = TrainingStateManifest(
            job=order.job,
            attempt=order.attempt,
            incarnation=self._incarnation,
            step=step,
            files={STATE_FILE: entry},
            created_at=datetime.now(UTC),
        )
        if self._store.commit(prefix, manifest):
            self._reporter.event(EventType.TRAINING_STATE_COMMITTED, step=step, key=prefix, bytes=entry.bytes)
        self._store.prune_training_states(order.prefix)
