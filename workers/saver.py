"""Saves training states beside the training: onto the machines' own disks first, from where `workers.uploads` brings them to storage."""

import logging
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from mae_core.checkpoint import Group, SavesBeside, State, gather
from mae_core.world import World
from workers.contract import EventType, WorkOrder
from workers.objects import file_entry
from workers.reporter import Reporter
from workers.state_names import state_name
from workers.stored import FileEntry, TrainingStateManifest
from workers.uploads import Kept, Uploads

logger = logging.getLogger(__name__)


class SavingGroupError(RuntimeError):
    """A collective of a save has failed: who is where in it is not known any more."""


class Saver:
    """One worker's part in saving. All of them begin a save at the same step, when `is_ready` on all; a failed one never ends a training.

    `reporter` is rank 0's. `incarnation` is the same for all, and another after going back, so that no two saves share a folder.
    """

    def __init__(
        self, order: WorkOrder, world: World, group: Group, uploads: Uploads, *, incarnation: int, reporter: Reporter | None
    ) -> None:
        self._order, self._world, self._group, self._uploads = order, world, group, uploads
        self._incarnation, self._reporter = incarnation, reporter
        self._broken: Exception | None = None
        self._beside = SavesBeside(world, self._write)
        self.is_ready = self._beside.is_ready
        self.wait = self._beside.wait  # until the disk has it; `Uploads.wait`: until storage has it

    def save(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Stages `state` and returns; the rest is done beside the training."""
        self._beside.save(step, state)

    def check(self) -> None:
        """Raises SavingGroupError where the workers lost each other in a save: then none can be made any more, and no state be read.

        To be called in the training's own thread. A new group needs all workers, the one that hangs too; a new start of the workers
        gives them one, ends what hangs, and costs the steps since the last state.
        """
        if (broken := self._broken or self._uploads.broken) is not None:
            raise SavingGroupError(f"the workers lost each other while they saved a training state: {broken}") from broken

    def _write(self, step: int, staged: State) -> None:
        name = state_name(step=step, attempt=self._order.attempt, incarnation=self._incarnation)
        folder = self._uploads.states.folder(name)
        if self._reporter is not None:
            self._reporter.spool()
        try:
            manifest = self._manifest(step, self._write_files(staged, folder))
        except Exception as error:
            logger.exception("training state of step %d could not be saved; training goes on", step)
            shutil.rmtree(folder, ignore_errors=True)
            if self._reporter is not None:
                self._reporter.event(EventType.SAVE_FAILED, step=step, message=str(error)[:500])
            return
        try:
            self._uploads.states.commit(name, manifest)
        except OSError:  # told to nobody, so that all workers go on alike: it can be uploaded, though no run can go on from here
            logger.exception("training state of step %d is on disk, but not its manifest", step)
        self._uploads.add(Kept(name, manifest, tuple(sorted(folder.glob("*.safetensors")))))

    def _write_files(self, staged: State, folder: Path) -> dict[str, FileEntry]:
        """All workers' files, once they are on disk. Raises OSError on all workers where one has failed."""
        from mae_core.state_files import write_state  # half a second, beside the first steps

        try:
            write_state(staged, folder, self._group)  # makes the folder, too: nothing may fail on one worker before all are told
            told = gather(_entries(folder), self._group)
        except OSError:  # told to all
            raise
        except Exception as error:
            self._broken = None if self._group is None else error
            raise
        if faults := [f"worker {rank}: {said}" for rank, said in enumerate(told) if isinstance(said, str)]:
            raise OSError("; ".join(faults))
        return {name: entry for files in told if not isinstance(files, str) for name, entry in files.items()}

    def _manifest(self, step: int, files: dict[str, FileEntry]) -> TrainingStateManifest:
        return TrainingStateManifest(
            job=self._order.job,
            attempt=self._order.attempt,
            incarnation=self._incarnation,
            step=step,
            files=files,
            created_at=datetime.now(UTC),
        )


def _entries(folder: Path) -> dict[str, FileEntry] | str:
    """What this worker wrote, or why that cannot be told."""
    try:
        return {path.name: file_entry(path) for path in sorted(folder.iterdir())}
    except OSError as error:
        return f"{type(error).__name__}: {error}"
