"""Where files made part by part lie, by name: a local folder here, object storage in `workers.parts`."""

import hashlib
from pathlib import Path
from typing import NamedTuple, Protocol


class StoredFile(NamedTuple):
    """A file by its size and its SHA-256 in hexadecimal digits."""

    bytes: int
    sha256: str


class PartStore(Protocol):
    """Where parts and notes lie, by name. `scratch` is a folder for the part that is being written."""

    scratch: Path

    def names(self) -> list[str]:
        """All that is there."""
        ...

    def read(self, name: str) -> bytes:
        """A small file that is there."""
        ...

    def fingerprint(self, name: str) -> StoredFile | None:
        """What a file is now, by all of its bytes; None where it is not there."""
        ...

    def put(self, name: str, file: Path) -> StoredFile:
        """Moves `file` there, whole or not at all, in place of an earlier one."""
        ...

    def delete(self, name: str) -> None: ...


class FolderParts:
    """Parts in a local folder."""

    def __init__(self, folder: Path) -> None:
        self.scratch = folder

    def names(self) -> list[str]:
        return [path.name for path in self.scratch.iterdir()] if self.scratch.exists() else []

    def read(self, name: str) -> bytes:
        return (self.scratch / name).read_bytes()

    def fingerprint(self, name: str) -> StoredFile | None:
        path = self.scratch / name
        if not path.exists():
            return None
        with path.open("rb") as file:
            return StoredFile(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())

    def put(self, name: str, file: Path) -> StoredFile:
        file.replace(self.scratch / name)
        stored = self.fingerprint(name)
        assert stored is not None, name
        return stored

    def delete(self, name: str) -> None:
        (self.scratch / name).unlink(missing_ok=True)
