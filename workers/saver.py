"""Saves training states beside the training: each worker uploads its own file, then rank 0 commits them all by one manifest."""

import logging
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from mae_core.checkpoint import Group, SavesBeside, State, gather, write_state
from mae_core.world import World
from workers.contract import EventType, FileEntry, TrainingStateManifest, WorkOrder
from workers.objects import ObjectStore, state_folder
from workers.reporter import Reporter

logger = logging.getLogger(__name__)


class Saver:
    """One worker's part in saving. All of them begin a save at the same step, when `is_ready` on all; a failed one never ends a training.

    `reporter` is rank 0's. `incarnation` is the same for all, and another after going back, so that no two saves share a folder.
    """

    def __init__(
        self, order: WorkOrder, store: ObjectStore, world: World, group: Group, *, incarnation: int, reporter: Reporter | None
    ) -> None:
        self._order, self._store, self._world, self._group = order, store, world, group
        self._incarnation, self._reporter = incarnation, reporter
        self._beside = SavesBeside(world, self._write)
        self.is_ready = self._beside.is_ready
        self.wait = self._beside.wait

    def save(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Stages `state` and returns; the rest is done beside the training."""
        self._beside.save(step, state)

    def _write(self, step: int, staged: State) -> None:
        prefix = state_folder(self._order.prefix, step=step, attempt=self._order.attempt, incarnation=self._incarnation)
        try:
            files = self._upload(prefix, staged)
            if self._world.rank == 0:
                self._commit(step, prefix, files)
        except Exception as error:
            logger.exception("training state of step %d could not be saved; training goes on", step)
            if self._reporter is not None:
                self._reporter.event(EventType.SAVE_FAILED, step=step, message=str(error)[:500])

    def _upload(self, prefix: str, staged: State) -> dict[str, FileEntry]:
        """All workers' files, once they are uploaded. Raises OSError on all workers where one has failed."""
        with tempfile.TemporaryDirectory(prefix="maestro-state-") as folder:
            write_state(staged, Path(folder), self._group)
            told = gather(self._upload_own(prefix, Path(folder)), self._group)
        if faults := [f"worker {rank}: {said}" for rank, said in enumerate(told) if isinstance(said, str)]:
            raise OSError("; ".join(faults))
        return {name: entry for files in told if not isinstance(files, str) for name, entry in files.items()}

    def _upload_own(self, prefix: str, folder: Path) -> dict[str, FileEntry] | str:
        """What this worker uploaded, or why it could not: that is told to the others, who would wait for it otherwise."""
        try:
            return {path.name: self._store.put_file(prefix + path.name, path) for path in sorted(folder.iterdir())}
        except Exception as error:
            logger.exception("upload to %s", prefix)
            return f"{type(error).__name__}: {error}"

    def _commit(self, step: int, prefix: str, files: dict[str, FileEntry]) -> None:
        manifest = TrainingStateManifest(
            job=self._order.job,
            attempt=self._order.attempt,
            incarnation=self._incarnation,
            step=step,
            files=files,
            created_at=datetime.now(UTC),
        )
        if self._store.commit(prefix, manifest) and self._reporter is not None:
            num_bytes = sum(entry.bytes for entry in files.values())
            self._reporter.event(EventType.TRAINING_STATE_COMMITTED, step=step, key=prefix, bytes=num_bytes)
        self._store.prune_training_states(self._order.prefix)
