"""An embedding's parts in object storage."""

from pathlib import Path

from mae_core.stores import StoredFile
from workers.objects import ObjectStore


class S3Parts:
    """Parts and notes below `prefix`; `scratch` is a local folder."""

    def __init__(self, store: ObjectStore, prefix: str, scratch: Path) -> None:
        self.scratch = scratch
        self._store, self._prefix = store, prefix

    def names(self) -> list[str]:
        return [key.removeprefix(self._prefix) for key in self._store.keys(self._prefix)]

    def read(self, name: str) -> bytes:
        return self._store.read(self._prefix + name)

    def fingerprint(self, name: str) -> StoredFile | None:
        entry = self._store.entry(self._prefix + name)
        return None if entry is None else StoredFile(entry.bytes, entry.sha256)

    def put(self, name: str, file: Path) -> StoredFile:
        entry = self._store.put_file(self._prefix + name, file)
        file.unlink()
        return StoredFile(entry.bytes, entry.sha256)

    def delete(self, name: str) -> None:
        self._store.delete(self._prefix + name)
