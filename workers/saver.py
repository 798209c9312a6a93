"""Saves training states beside the training: each worker uploads its own file, then rank 0 commits them all by one manifest."""

import logging
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from mae_core.checkpoint import Group, SavesBeside, State, gather
from mae_core.world import World
from workers.contract import EventType, FileEntry, TrainingStateManifest, WorkOrder
from workers.objects import ObjectStore, state_folder
from workers.reporter import Reporter

logger = logging.getLogger(__name__)


class SavingGroupError(RuntimeError):
    """A collective of a save has failed: who is where in it is not known any more."""


class Saver:
    """One worker's part in saving. All of them begin a save at the same step, when `is_ready` on all; a failed one never ends a training.

    `reporter` is rank 0's. `incarnation` is the same for all, and another after going back, so that no two saves share a folder.
    Files lie below `scratch` until they are uploaded.
    """

    def __init__(
        self,
        order: WorkOrder,
        store: ObjectStore,
        world: World,
        group: Group,
        *,
        incarnation: int,
        scratch: Path,
        reporter: Reporter | None,
    ) -> None:
        self._order, self._store, self._world, self._group = order, store, world, group
        self._incarnation, self._scratch, self._reporter = incarnation, scratch, reporter
        self._broken: Exception | None = None
        self._beside = SavesBeside(world, self._write)
        self.is_ready = self._beside.is_ready
        self.wait = self._beside.wait

    def save(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Stages `state` and returns; the rest is done beside the training."""
        self._beside.save(step, state)

    def check(self) -> None:
        """Raises SavingGroupError where the workers lost each other in a save: then none can be made any more, and no state be read.

        To be called in the training's own thread. A new group needs all workers, the one that hangs too; a new start of the workers
        gives them one, ends what hangs, and costs the steps since the last state.
        """
        if self._broken is not None:
            raise SavingGroupError(f"the workers lost each other while they saved a training state: {self._broken}") from self._broken

    def _write(self, step: int, staged: State) -> None:
        prefix = state_folder(self._order.prefix, step=step, attempt=self._order.attempt, incarnation=self._incarnation)
        try:
            files = self._upload(prefix, staged, self._scratch / f"step={step}-{self._incarnation}")
            if self._world.rank == 0:
                self._commit(step, prefix, files)
        except Exception as error:
            logger.exception("training state of step %d could not be saved; training goes on", step)
            if self._reporter is not None:
                self._reporter.event(EventType.SAVE_FAILED, step=step, message=str(error)[:500])

    def _upload(self, prefix: str, staged: State, folder: Path) -> dict[str, FileEntry]:
        """All workers' files, once they are uploaded. Raises OSError on all workers where one has failed."""
        from mae_core.state_files import write_state  # half a second, beside the first steps

        try:
            write_state(staged, folder, self._group)  # makes the folder, too: nothing may fail on one worker before all are told
            told = gather(self._upload_own(prefix, folder), self._group)
        except OSError:  # told to all
            raise
        except Exception as error:
            self._broken = None if self._group is None else error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
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
        try:
            self._store.prune_training_states(self._order.prefix)
        except Exception:  # the state is committed all the same, and the next one prunes again
            logger.exception("old training states could not be deleted")
