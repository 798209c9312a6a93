"""`python -m workers.data pack SOURCE DEST`, `show PLACE`, `verify PLACE`: as `python -m mae_core.data`, on `s3://bucket/prefix/` too.

Credentials and endpoint are the environment's (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, …) or a role's.
"""

import sys
import tempfile
from functools import cached_property
from pathlib import Path

from botocore.exceptions import ClientError

from mae_core.data.command import run
from mae_core.data.listing import FolderImages, ImagePlace
from mae_core.packed import is_remote
from mae_core.stores import FolderParts, PartStore, StoredFile
from workers.contract import StorageRef
from workers.failures import StorageError
from workers.objects import ObjectStore
from workers.parts import S3Parts
from workers.remote import split_address


class S3Place:
    """Files below an address. A copy in another process has a connection of its own."""

    def __init__(self, address: str, scratch: Path) -> None:
        self._address, self.scratch = f"{address.rstrip('/')}/", scratch

    def __reduce__(self) -> tuple[type["S3Place"], tuple[str, Path]]:
        return S3Place, (self._address, self.scratch)

    def names(self) -> list[str]:
        return self._parts.names()

    def read(self, name: str) -> bytes:
        """A file below the address, or the one at an address of its own. Raises OSError where it is not there."""
        bucket, key = split_address(name if is_remote(name) else self._address + name)
        try:
            return self._store.read(key, bucket=bucket)
        except ClientError as error:
            raise OSError(str(error)) from error

    def fingerprint(self, name: str) -> StoredFile | None:
        return self._parts.fingerprint(name)

    def put(self, name: str, file: Path) -> StoredFile:
        return self._parts.put(name, file)

    def delete(self, name: str) -> None:
        self._parts.delete(name)

    @cached_property
    def _store(self) -> ObjectStore:
        return ObjectStore(StorageRef(bucket=split_address(self._address)[0]))

    @cached_property
    def _parts(self) -> S3Parts:
        return S3Parts(self._store, split_address(self._address)[1], self.scratch)


def main(arguments: list[str] | None = None) -> int:
    with tempfile.TemporaryDirectory(prefix="maestro-pack-") as scratch:

        def images_at(place: str) -> ImagePlace:
            return S3Place(place, Path(scratch)) if is_remote(place) else FolderImages(Path(place))

        def store_at(place: str) -> PartStore:
            return S3Place(place, Path(scratch)) if is_remote(place) else FolderParts(Path(place))

        try:
            return run(arguments, program="python -m workers.data", images_at=images_at, store_at=store_at)
        except (ClientError, StorageError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
