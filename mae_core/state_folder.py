"""Training states of a run without the service, in folders that are committed by renaming: what has no such name does not exist."""

import hashlib
import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from mae_core.checkpoint import SavesBeside, State
from mae_core.errors import EncoderError
from mae_core.run import Run
from mae_core.state_files import read_state, write_state
from mae_core.world import World

_KEPT = 2  # the newest is what a run goes on from; the other, where that one is damaged
_MANIFEST = "manifest.json"  # {spec: of the run, files: {name: SHA-256}}


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
            if _manifest(place).get("spec", self._spec) != self._spec:
                raise EncoderError(f"{place} is the training state of another spec; choose another --output, or delete it to start over")
        for place in committed:
            try:
                return self._take_up(run, place)
            except EncoderError as error:
                if place is committed[-1]:
                    raise EncoderError(f"{error}; delete {self._folder} to start over") from error
                print(f"{error}; going back to the one before", file=sys.stderr)
        return 0

    def remove(self) -> None:
        """Deletes all states, of a run that has ended."""
        self.wait()
        with suppress(OSError):
            _delete(self._folder)

    def _take_up(self, run: Run, place: Path) -> int:
        files = _manifest(place).get("files", {})
        if not files:
            raise EncoderError(f"the training state in {place} cannot be read: its {_MANIFEST} is damaged or missing")
        for name, sha256 in files.items():
            if not (place / name).exists() or _sha256(place / name) != sha256:
                raise EncoderError(f"the training state in {place} cannot be read: {name} is damaged or missing")
        state = run.training_state()
        read_state(state, place, None)
        run.load_training_state(state)
        return int(state["step"])

    def _committed(self) -> list[Path]:
        """The newest first."""
        return sorted((place for place in self._folder.glob("step=*") if not place.suffix), reverse=True)

    def _write(self, step: int, staged: State) -> None:
        place = self._folder / f"step={step:010d}"
        unfinished = place.with_suffix(".unfinished")
        try:
            for left in self._folder.glob("step=*.*"):  # by a run that was killed
                shutil.rmtree(left)
            write_state(staged, unfinished, None)
            files = {file.name: _sha256(file) for file in unfinished.iterdir()}
            (unfinished / _MANIFEST).write_text(json.dumps({"spec": self._spec, "files": files}))
            for path in (*unfinished.iterdir(), unfinished):
                _sync(path)
            if place.exists():  # of a run that went back behind it
                _delete(place)
            unfinished.rename(place)
            _sync(self._folder)
            for old in self._committed()[_KEPT:]:
                _delete(old)
        except OSError as error:
            print(f"the training state of step {step} could not be saved; training goes on: {error}", file=sys.stderr)


def _manifest(place: Path) -> dict[str, Any]:
    """Empty where it is damaged or missing."""
    try:
        found = json.loads((place / _MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else {}


def _delete(place: Path) -> None:
    """Under another name: what a kill leaves of it is no state."""
    deleted = place.with_suffix(".deleted")
    shutil.rmtree(deleted, ignore_errors=True)
    place.rename(deleted)
    shutil.rmtree(deleted)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Has the disk hold what was written, before a name says so."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
