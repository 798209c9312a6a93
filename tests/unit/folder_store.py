"""Object storage in a folder: what workers.objects does for training states, without a server."""

import os
import shutil
from pathlib import Path
from typing import Any

from mae_core.errors import EncoderError
from workers.failures import StorageError
from workers.objects import file_entry
from workers.state_names import newest_first
from workers.stored import MANIFEST, FileEntry, TrainingStateManifest, training_state_prefix


def away(folder: Path) -> Path:
    """The file whose existence keeps the storage in `folder` from answering."""
    return folder.with_name(f"{folder.name}.away")


class FolderStore:
    """Keys are paths below `folder`; a commit is as atomic as the real one. It is away while there is a file `<folder>.away`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _answer(self) -> None:
        if away(self.folder).exists():
            raise StorageError("it is away")

    def patient(self, seconds: float, **_: Any) -> "FolderStore":
        return self

    def put_file(self, key: str, path: Path) -> FileEntry:
        self.upload(key, path)
        return file_entry(path)

    def upload(self, key: str, path: Path) -> None:
        self._answer()
        (self.folder / key).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, self.folder / key)

    def commit(self, prefix: str, manifest: Any) -> bool:
        self._answer()
        place = self.folder / prefix / MANIFEST
        unfinished = place.with_suffix(".unfinished")
        unfinished.write_text(manifest.model_dump_json())
        try:
            os.link(unfinished, place)
        except FileExistsError:
            return False
        return True

    def is_committed(self, prefix: str) -> bool:
        self._answer()
        return (self.folder / prefix / MANIFEST).exists()

    def training_states(self, job_prefix: str) -> list[str]:
        self._answer()
        found = (self.folder / training_state_prefix(job_prefix)).glob(f"*/{MANIFEST}")
        return newest_first(f"{path.parent.relative_to(self.folder)}/" for path in found)

    def fetch_training_state(self, state_prefix: str, folder: Path) -> None:
        self._answer()
        manifest = TrainingStateManifest.model_validate_json((self.folder / state_prefix / MANIFEST).read_text())
        for name, entry in manifest.files.items():
            if not (self.folder / state_prefix / name).exists():
                raise EncoderError(f"{state_prefix}{name} is missing")
            shutil.copy(self.folder / state_prefix / name, folder / name)
            if file_entry(folder / name) != entry:
                raise EncoderError(f"{state_prefix}{name} is damaged")
