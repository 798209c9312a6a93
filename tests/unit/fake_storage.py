"""Object storage in memory. `tests/integration/test_storage.py` holds it to the real one's behaviour."""

from collections.abc import Sequence

from service.errors import StorageUnreachable
from service.storage import PAGE, START, ObjectNotFound, StoredObject, Upload, UploadsPage, UploadsPlace


class FakeStorage:
    """One bucket that exists, and objects by bucket and key."""

    def __init__(self, bucket: str = "maestro") -> None:
        self.bucket = bucket
        self.objects: dict[tuple[str, str], bytes] = {}
        self.uploads: set[Upload] = set()
        self.is_down = False

    def _reach(self) -> None:
        if self.is_down:
            raise StorageUnreachable("Object storage does not answer (fake).")

    def check(self) -> None:
        self._reach()

    def read_text(self, key: str, *, bucket: str | None = None) -> str:
        self._reach()
        try:
            return self.objects[bucket or self.bucket, key].decode(errors="replace")
        except KeyError:
            raise ObjectNotFound(key) from None

    def read_bytes(self, key: str, *, start: int, length: int) -> bytes:
        self._reach()
        if (self.bucket, key) not in self.objects:
            raise ObjectNotFound(key)
        return self.objects[self.bucket, key][start : start + length]

    def put_bytes(self, key: str, body: bytes) -> None:
        self._reach()
        self.objects[self.bucket, key] = body

    def list(self, prefix: str, *, bucket: str | None = None, limit: int | None = None, after: str = "") -> "list[StoredObject]":
        self._reach()
        found = [(key, body) for (own, key), body in self.objects.items() if own == (bucket or self.bucket) and key.startswith(prefix)]
        return [StoredObject(key, len(body)) for key, body in sorted(found) if key > after][:limit]

    def delete(self, keys: Sequence[str]) -> None:
        self._reach()
        assert len(keys) <= PAGE
        for key in keys:
            self.objects.pop((self.bucket, key), None)

    def presign(self, key: str) -> str:
        return f"http://public.example/{self.bucket}/{key}?X-Amz-Signature=fake"

    def list_uploads(self, prefix: str, *, after: UploadsPlace = START) -> UploadsPage:
        self._reach()
        found = sorted(upload for upload in self.uploads if upload.key.startswith(prefix) and upload[:2] > after)
        page = found[:PAGE]
        return UploadsPage(page, UploadsPlace(*page[-1][:2]) if len(found) > PAGE else None)

    def abort_upload(self, upload: Upload) -> None:
        self._reach()
        self.uploads.discard(upload)
