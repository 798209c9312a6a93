"""Takes a run up from the newest training state that all workers can read: in object storage, or on the machines' own disks."""

import logging
import tempfile
from pathlib import Path

from mae_core.checkpoint import Group
from mae_core.errors import EncoderError
from mae_core.run import Run
from workers.contract import WorkOrder
from workers.failures import StorageError
from workers.local_states import LocalStates
from workers.objects import ObjectStore
from workers.seat import Seat
from workers.state_names import age, name_of, newest_first, state_prefix
from workers.uploads import Kept, Uploads

logger = logging.getLogger(__name__)

SHORT_PATIENCE_SECONDS = 15.0  # with storage, where a run can go on without it


class Restoring:
    """One worker's part. What is called is called by all of them at once; `group` is the saving group."""

    def __init__(self, order: WorkOrder, store: ObjectStore, states: LocalStates, seat: Seat, group: Group, scratch: Path) -> None:
        self._prefix, self._store, self._states, self._seat = order.prefix, store, states, seat
        self._group, self._scratch = group, scratch

    def local(self) -> list[str]:
        """Names of the states of which every machine has all files."""
        mine = self._states.whole() if self._seat.local_rank == 0 else None
        told = [names for names in self._seat.world.gather(mine) if names is not None]
        return [name for name in told[0] if all(name in names for names in told)]

    def take_up(self, run: Run, uploads: Uploads, *, born: int) -> str | None:
        """Takes up the newest state that is whole; its prefix in storage, None where there is none.

        Where storage is away, one on disk will do; one of an incarnation before `born` that storage does not have is given to `uploads`.
        Raises StorageError where storage is away and no state on disk can be read: it may have one.
        """
        local = self.local()
        stored = self._stored(is_needed=not local)
        for name in newest_first({*local, *(stored or ())}):
            if name in local and self._read(run, name, from_disk=True):
                if name not in (stored or ()) and age(name)[1] < born:
                    self._hand_over(name, uploads)
                return state_prefix(self._prefix, name)
            if name in (stored or ()) and self._read(run, name, from_disk=False):
                return state_prefix(self._prefix, name)
        if stored is None:
            stored = self._stored(is_needed=True) or []
            return next((state_prefix(self._prefix, name) for name in stored if self._read(run, name, from_disk=False)), None)
        return None

    def _stored(self, *, is_needed: bool) -> list[str] | None:
        """Names of the committed states, the newest first. None where storage does not answer and is not needed; else StorageError."""
        found: list[str] | None = None
        if self._seat.world.rank == 0:
            store = self._store if is_needed else self._store.patient(SHORT_PATIENCE_SECONDS)
            try:
                found = [name_of(prefix) for prefix in store.training_states(self._prefix)]
            except StorageError:
                if is_needed:
                    raise
                logger.warning("storage is away; going on from a training state on disk")
        return self._seat.world.gather(found)[0]

    def _hand_over(self, name: str, uploads: Uploads) -> None:
        """All workers' files lie on rank 0's machine: it uploads them."""
        manifest = self._states.manifest(name)
        assert manifest is not None, "it was read"
        files = tuple(self._states.files(name)[file] for file in sorted(manifest.files)) if self._seat.world.rank == 0 else ()
        uploads.add(Kept(name, manifest, files))

    def _read(self, run: Run, name: str, *, from_disk: bool) -> bool:
        """Takes up one state; False, on all workers, where it is damaged. One worker of each machine fetches it."""
        from mae_core.state_files import read_state  # half a second

        with tempfile.TemporaryDirectory(prefix="maestro-state-", dir=self._scratch) as folder:
            fault = None
            if self._seat.local_rank == 0:
                try:
                    if from_disk:
                        self._states.fetch(name, Path(folder))
                    else:
                        self._store.fetch_training_state(state_prefix(self._prefix, name), Path(folder))
                except EncoderError as error:
                    fault = str(error)
            told = self._seat.world.gather((self._seat.machine, self._seat.local_rank, folder, fault))
            if faults := [fault for *_, fault in told if fault]:
                logger.warning("%s; going back to the one before", faults[0])
                return False
            [place] = [folder for machine, local_rank, folder, _ in told if (machine, local_rank) == (self._seat.machine, 0)]
            state = run.training_state()
            try:
                read_state(state, Path(place), self._group)
            except EncoderError as error:  # on all workers alike
                logger.warning("%s; going back to the one before", error)
                return False
            run.load_training_state(state)
            return True
