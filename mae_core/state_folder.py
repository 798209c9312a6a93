"""Training states of a run without the service, in folders that are committed by renaming: what has no such name does not exist."""

import os
import shutil
import sys
from pathlib import Path

from mae_core.checkpoint import SavesBeside, State, read_state, write_state
from mae_core.errors import EncoderError
from mae_core.run import Run
from mae_core.world import World

_KEPT = 2  # the newest is what a run goes on from; the other, where that one is damaged
_SPEC = "spec.json"


class StateFolder:
    """The states below `folder`, of one run on one worker, whose spec is `spec`: a text that another run's differs from."""

    def __init__(self, folder: Path, spec: str) -> None:
        self._folder, self._spec = folder, spec
        self._beside = SavesBeside(World(), self._write)
        self.is_ready = self._beside.is_ready
        self.save = self._beside.save
        self.wait = self._beside.wait

    def take_up(self, run: Run) -> int:
        """Brings `run` to the newest state that can be read; its step, 0 where there is no state.

        Raises EncoderError where none of them can be read, or one is of another spec.
        """
        committed = self._committed()
        for place in committed:
            if not (place / _SPEC).exists() or (place / _SPEC).read_text() != self._spec:
                raise EncoderError(f"{place} is the training state of another spec; choose another --output, or delete it to start over")
        for place in committed:
            try:
                return self._take_up(run, place)
            except EncoderError as error:
                if place is committed[-1]:
                    raise
                print(f"{error}; going back to the one before", file=sys.stderr)
        return 0

    def remove(self) -> None:
        """Deletes all states, of a run that has ended."""
        self.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _take_up(self, run: Run, place: Path) -> int:
        state = run.training_state()
        try:
            read_state(state, place, None)
        except EncoderError as error:
            raise EncoderError(f"{error}; delete {self._folder} to start over") from error
        run.load_training_state(state)
        return int(state["step"])

    def _committed(self) -> list[Path]:
        """The newest first."""
        return sorted((place for place in self._folder.glob("step=*") if not place.suffix), reverse=True)

    def _write(self, step: int, staged: State) -> None:
        place = self._folder / f"step={step:010d}"
        unfinished = place.with_suffix(".unfinished")
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            write_state(staged, unfinished, None)
            (unfinished / _SPEC).write_text(self._spec)
            for file in unfinished.iterdir():
                _sync(file)
            if place.exists():  # of a run that went back behind it
                shutil.rmtree(place)
            unfinished.rename(place)
            _sync(self._folder)
            for old in self._committed()[_KEPT:]:
                shutil.rmtree(old)
        except OSError as error:
            print(f"the training state of step {step} could not be saved; training goes on: {error}", file=sys.stderr)


def _sync(path: Path) -> None:
    """Has the disk hold what was written, before a name says so."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
