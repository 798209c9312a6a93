"""Uploads reconstructions, as picture and as arrays, beside the training."""

import logging
import queue
import tempfile
import threading
import time
from pathlib import Path

from mae_core.reconstruct import Reconstructions
from workers.contract import EventType, WorkOrder
from workers.objects import ObjectStore
from workers.reporter import Reporter
from workers.stored import FileEntry, reconstructions_prefix

logger = logging.getLogger(__name__)
_MAX_WAITING = 8


class ReconstructionUploads:
    """One thread that uploads what it is given and tells `reporter` of it. Nothing of it reaches the training: not its failures, either."""

    def __init__(self, order: WorkOrder, store: ObjectStore, reporter: Reporter) -> None:
        self._prefix, self._store, self._reporter = reconstructions_prefix(order.prefix), store, reporter
        self._waiting: queue.Queue[tuple[int, Reconstructions] | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._work, name="reconstructions", daemon=True)
        self._thread.start()

    def add(self, step: int, made: Reconstructions) -> None:
        """Takes the reconstructions of `step`, which must not change any more, and returns at once."""
        try:
            self._waiting.put_nowait((step, made))
        except queue.Full:
            logger.warning("no reconstructions of step %d: those of earlier steps are still on their way", step)

    def close(self, seconds: float) -> None:
        """Waits up to `seconds` until all are uploaded."""
        until = time.monotonic() + seconds
        if self._thread.is_alive():
            try:
                self._waiting.put(None, timeout=seconds)
            except queue.Full:
                logger.warning("%d reconstructions are still on their way and not waited for", _MAX_WAITING)
                return
            self._thread.join(max(until - time.monotonic(), 0))

    def _work(self) -> None:
        while (given := self._waiting.get()) is not None:
            step, made = given
            try:
                self._upload(step, made)
            except Exception:
                logger.exception("no reconstructions of step %d", step)

    def _upload(self, step: int, made: Reconstructions) -> None:
        key = f"{self._prefix}step={step:010d}"
        with tempfile.TemporaryDirectory(prefix="maestro-reconstructions-") as folder:
            picture, arrays = Path(folder) / "picture.png", Path(folder) / "arrays.npz"
            made.write_png(picture)
            made.write_arrays(arrays)
            told = [(f"{key}.png", self._store.put_file(f"{key}.png", picture)), (f"{key}.npz", self._store.put_file(f"{key}.npz", arrays))]
        (png, picture_entry), (npz, arrays_entry) = told
        self._reporter.event(EventType.RECONSTRUCTIONS_WRITTEN, step=step, **_told(png, picture_entry), arrays=_told(npz, arrays_entry))


def _told(key: str, entry: FileEntry) -> dict[str, str | int]:
    return {"key": key, "bytes": entry.bytes, "sha256": entry.sha256}
