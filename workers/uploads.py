"""Brings training states from the machines' disks to object storage, beside the training and beside the saves, however long that takes.

In rounds: all workers agree on the newest state that each of them holds, each uploads its own files of it, then rank 0 commits it. What
fails is tried again, with the newest state there is then. States wait on disk meanwhile: the newest, and the one before. Workers only add
to what storage has; which states stay there is the service's to decide.
"""

import logging
import threading
import time
from pathlib import Path
from typing import NamedTuple

from mae_core.checkpoint import Group, gather
from mae_core.world import World
from workers.contract import EventType, WorkOrder
from workers.delays import Delays
from workers.local_states import LocalStates
from workers.objects import ObjectStore
from workers.reporter import Reporter
from workers.state_names import state_prefix
from workers.stored import TrainingStateManifest

logger = logging.getLogger(__name__)

_WHAT = "training states"  # by this name their delay is known
_TRY_SECONDS = 5.0  # a failed call is repeated within a round; then all hear of it
_PAUSE_SECONDS = 5.0  # between rounds that fail
_SLOW_SECONDS = 60.0  # an upload that takes longer is told of when the next state waits for it


class Kept(NamedTuple):
    """A training state on disk. `files` are those that this worker uploads."""

    name: str
    manifest: TrainingStateManifest
    files: tuple[Path, ...]


class _Told(NamedTuple):
    """What a worker brings to a round: how many states it was given so far, which it holds, the oldest first."""

    num_added: int
    names: tuple[str, ...]
    is_closing: bool


class Uploads:
    """One worker's part. All of them are given the same states, in the same order. `group` is for these rounds alone.

    Nothing of it reaches the training but `broken`: the workers have lost each other in a round.
    """

    def __init__(
        self,
        order: WorkOrder,
        store: ObjectStore,
        world: World,
        group: Group,
        states: LocalStates,
        *,
        delays: Delays,
        reporter: Reporter | None,
    ) -> None:
        self._order, self._world, self._group, self.states = order, world, group, states
        self._store = store.patient(_TRY_SECONDS, delays=Delays())  # what becomes of a round is told by it
        self._delays, self._reporter = delays, reporter
        self._changed = threading.Condition()
        self._held: list[Kept] = []
        self._num_added = self._num_done = 0
        self._is_choosing = self._is_closing = self._has_failed = False
        self._uploading: str | None = None
        self._began_at = 0.0
        self._sent: set[Path] = set()
        self._told_of: str | None = None
        self.broken: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def add(self, kept: Kept) -> None:
        """Takes a state over, which is on disk; an older one than the last but one is deleted."""
        with self._changed:
            self._held.append(kept)
            self._num_added += 1
            self._drop()
            is_slow = self._uploading is not None and time.monotonic() - self._began_at > _SLOW_SECONDS
            self._changed.notify_all()
        if is_slow:
            self._tell_delay(kept, f"the upload of {self._uploading} takes longer than {_SLOW_SECONDS:g} s")

    def wait(self, seconds: float | None = None) -> bool:
        """Waits up to `seconds` (None: as long as it takes) until all that was added is committed; whether it is."""
        with self._changed:
            return self._changed.wait_for(self._is_done, seconds)

    def close(self, seconds: float) -> None:
        """Ends the rounds: once all workers close, and all is committed or a round has failed. Waits up to `seconds` for that."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(seconds)

    def _is_done(self) -> bool:
        return self._num_done == self._num_added or self.broken is not None

    def _work(self) -> None:
        try:
            while self._round():
                pass
        except Exception as error:
            logger.exception("the uploads of training states have ended")
            with self._changed:
                self.broken = error
                self._changed.notify_all()

    def _round(self) -> bool:
        """Waits for something to do, and does it. False when all workers close."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_done < self._num_added or self._is_closing)
            self._is_choosing = True
            told = _Told(self._num_added, tuple(kept.name for kept in self._held), self._is_closing)
        all_told = gather(told, self._group)
        num_added = min(each.num_added for each in all_told)  # whoever was given more goes on with it in the next round
        if all(each.is_closing for each in all_told) and (self._has_failed or self._num_done >= num_added):
            return False
        kept = self._choose(set[str](told.names).intersection(*(each.names for each in all_told)))
        fault = self._upload(kept) if kept is not None else None
        self._has_failed = fault is not None
        with self._changed:
            self._uploading = None
            if fault is None:
                self._num_done = num_added
                self._hold(self._held[self._held.index(kept) + 1 :] if kept in self._held else self._held)
            self._drop()
            self._changed.notify_all()
            if fault is not None:
                self._changed.wait_for(lambda: self._is_closing, _PAUSE_SECONDS)
        return True

    def _choose(self, shared: set[str]) -> Kept | None:
        """The newest state that all workers hold: the same one on all."""
        with self._changed:
            kept = next((kept for kept in reversed(self._held) if kept.name in shared), None)
            self._uploading, self._began_at = kept and kept.name, time.monotonic()
            self._is_choosing = False
            self._drop()
        return kept

    def _drop(self) -> None:
        """Keeps the newest state, and of the others the one that is being uploaded, or else the last but one where there is room."""
        if self._is_choosing:
            return
        others = self._held[:-1]
        spare = [kept for kept in others if kept.name == self._uploading] or others[-1:]
        if spare and self._uploading is None and not self.states.has_room():
            spare = []
        self._hold(spare + self._held[-1:])

    def _hold(self, held: list[Kept]) -> None:
        """Deletes what is not held any more. Not whatever else lies there: the next state is being written."""
        for kept in self._held:
            if kept not in held:
                self.states.delete(kept.name)
        self._held = held
        self.states.delete_left(but=[kept.name for kept in held])

    def _upload(self, kept: Kept) -> str | None:
        """Why it could not be brought there, on all workers alike; None where it was."""
        faults = [f"worker {rank}: {fault}" for rank, fault in enumerate(gather(self._upload_own(kept), self._group)) if fault]
        fault = "; ".join(faults) or gather(self._commit(kept) if self._world.rank == 0 else None, self._group)[0]
        if fault is None:
            self._sent.clear()
            self._delays.ended(_WHAT)
        elif kept.name != self._told_of:
            self._tell_delay(kept, fault)
        return fault

    def _tell_delay(self, kept: Kept, why: str) -> None:
        self._told_of = kept.name
        message = f"the training state of step {kept.manifest.step} stays on disk until it can be uploaded: {why}"
        self._delays.began(_WHAT, message, step=kept.manifest.step, num_kept=len(self._held))

    def _upload_own(self, kept: Kept) -> str | None:
        """What keeps this worker from uploading its files: told to the others, who would wait for it otherwise."""
        prefix = state_prefix(self._order.prefix, kept.name)
        try:
            for path in kept.files:
                if path not in self._sent:
                    self._store.upload(prefix + path.name, path)
                    self._sent.add(path)
        except Exception as error:
            logger.warning("upload to %s: %s", prefix, error)
            return f"{type(error).__name__}: {error}"
        return None

    def _commit(self, kept: Kept) -> str | None:
        prefix, manifest = state_prefix(self._order.prefix, kept.name), kept.manifest
        try:
            is_ours = self._store.commit(prefix, manifest)
        except Exception as error:
            logger.warning("commit of %s: %s", prefix, error)
            return f"{type(error).__name__}: {error}"
        if is_ours and self._reporter is not None:
            num_bytes = sum(entry.bytes for entry in manifest.files.values())
            self._reporter.event(EventType.TRAINING_STATE_COMMITTED, step=manifest.step, key=prefix, bytes=num_bytes)
        return None
