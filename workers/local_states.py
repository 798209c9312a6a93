"""Training states on a machine's own disk, where they lie until object storage has them: a run goes on from them while it is away.

<temporary folder>/maestro-<user>/states/<job>/step=0000000400-a1-<incarnation>.<rank>/{state-00000.safetensors, manifest.json}

Each worker writes a folder of its own: its file, then, when all have written theirs, the manifest of the whole state. Who starts on the
machine later reads them all. They outlive workers and attempts, and go with the job's end, or when nobody has touched them for a week.
"""

import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from mae_core.errors import EncoderError
from workers.objects import file_entry
from workers.scratch import user_folder
from workers.state_names import age, is_of_state, newest_first
from workers.stored import MANIFEST, TrainingStateManifest

_FREE_BYTES, _FREE_SHARE = 2**30, 0.05  # of the disk: with less left free, one state is kept and no second


def local_states_folder() -> Path:
    """Where this machine has its training states, a folder for each job."""
    return user_folder() / "states"


class LocalStates:
    """The states of one job on this machine, as the worker `rank` sees them. `born`: the first incarnation of this start of the workers."""

    def __init__(self, job: str, rank: int, *, born: int) -> None:
        self._rank, self._born = rank, born
        self._folder = local_states_folder() / job

    def folder(self, name: str) -> Path:
        """Where this worker's file of a state lies."""
        return self._folder / f"{name}.{self._rank}"

    def commit(self, name: str, manifest: TrainingStateManifest) -> None:
        """Makes this worker's part of a state one that can be read: by all workers once each has its own."""
        place = self.folder(name) / MANIFEST
        unfinished = place.with_suffix(".unfinished")
        unfinished.write_text(manifest.model_dump_json())
        unfinished.rename(place)

    def delete(self, name: str) -> None:
        """Deletes this worker's part of a state."""
        shutil.rmtree(self.folder(name), ignore_errors=True)

    def delete_left(self, *, but: Collection[str]) -> None:
        """Deletes what workers left that are gone, all of them but the states named."""
        for place in self._places():
            if age(place.name)[1] < self._born and place.stem not in but:
                shutil.rmtree(place, ignore_errors=True)

    def has_room(self) -> bool:
        """Whether there is room for more than one state."""
        disk = shutil.disk_usage(self._folder)
        return disk.free >= max(_FREE_BYTES, _FREE_SHARE * disk.total)

    def whole(self) -> list[str]:
        """Names of the states of which all files are on this machine, the newest first."""
        names = {place.stem for place in self._places()}
        manifests = {name: manifest for name in names if (manifest := self.manifest(name)) is not None}
        return newest_first(name for name, manifest in manifests.items() if manifest.files.keys() <= self.files(name).keys())

    def manifest(self, name: str) -> TrainingStateManifest | None:
        """What all files of a state are; None where no worker of this machine has committed it."""
        for place in self._places_of(name):
            with suppress(OSError, ValidationError):
                return TrainingStateManifest.model_validate_json((place / MANIFEST).read_bytes())
        return None

    def files(self, name: str) -> dict[str, Path]:
        """The files of a state on this machine, whichever of its workers wrote them."""
        return {path.name: path for place in self._places_of(name) for path in place.glob("*.safetensors")}

    def fetch(self, name: str, folder: Path) -> None:
        """Links all files of a state into `folder`. Raises EncoderError where one is missing or does not match the manifest."""
        manifest, files = self.manifest(name), self.files(name)
        if manifest is None:
            raise EncoderError(f"{self._folder}/{name} has no readable {MANIFEST}")
        for file, entry in manifest.files.items():
            try:
                os.link(files[file], folder / file)
            except (KeyError, OSError) as error:
                raise EncoderError(f"{self._folder}/{name}: {file} is missing ({error})") from error
            if file_entry(folder / file) != entry:
                raise EncoderError(f"{self._folder}/{name}: {file} is damaged")

    def clear(self) -> None:
        """Deletes all, of a job that needs them no more."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _places(self) -> Iterable[Path]:
        return [place for place in self._folder.glob("step=*") if is_of_state(place.name)]

    def _places_of(self, name: str) -> list[Path]:
        return sorted(self._folder.glob(f"{name}.*"))
