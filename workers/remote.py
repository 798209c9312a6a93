"""Images in object storage, as the core reads them: by ranges, through one cache on each machine's disk."""

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path

from botocore.exceptions import ClientError

from mae_core.data.cache import FileCache, RemoteFile
from mae_core.data.remote import Remote
from mae_core.errors import SpecError
from workers.objects import ObjectStore, is_missing
from workers.scratch import user_folder

CACHE_VARIABLE = "MAESTRO_DATA_CACHE_GB"
CACHE_FOLDER_VARIABLE = "MAESTRO_DATA_CACHE"
_CACHE_GB = 20.0


def remote_of(store: ObjectStore, prefix: str) -> Remote:
    """The objects of any bucket that the host's credentials open. prefix: of the job, in `store`; what a run must find again is kept there.

    Raises SpecError where the machine's settings make no sense.
    """

    def fetch(address: str, start: int, length: int) -> bytes:
        bucket, key = split_address(address)
        try:
            return store.read_range(bucket, key, start, length)
        except ClientError as error:
            if is_missing(error):
                raise FileNotFoundError(address) from error
            raise

    folder = Path(os.environ.get(CACHE_FOLDER_VARIABLE) or user_folder() / "data")
    return Remote(
        fetch=fetch,
        listed=lambda place: _listed(store, place, prefix),
        cache=FileCache(folder, fetch=fetch, max_bytes=_cache_bytes()),
    )


def split_address(address: str) -> tuple[str, str]:
    """Bucket and key of s3://bucket/key."""
    bucket, _, key = address.removeprefix("s3://").partition("/")
    return bucket, key


def listings_folder() -> Path:
    """What this machine's runs have found below prefixes of images, a folder for each job."""
    return user_folder() / "listings"


def _cache_bytes() -> int:
    text = os.environ.get(CACHE_VARIABLE) or str(_CACHE_GB)
    try:
        return int(float(text) * 1e9)
    except (ValueError, OverflowError) as error:
        raise SpecError(f"{CACHE_VARIABLE}={text!r} on this machine is no number of gigabytes") from error


def _listed(store: ObjectStore, place: str, prefix: str) -> Sequence[RemoteFile]:
    """What lies below a place, listed once for a job: a run that starts again, on any machine, sees what its first start saw.

    One of a machine's workers fetches the list, for all of them.
    """
    folder = listings_folder() / prefix.strip("/").replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{RemoteFile(place, 0, None).copy_name}.json"
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_bytes(store.first(f"{prefix}listings/{path.name}", lambda: _list(store, place)))
            unfinished.replace(path)
    finally:
        os.close(lock)
    return [RemoteFile(*each) for each in json.loads(path.read_text())]


def _list(store: ObjectStore, place: str) -> bytes:
    bucket, key_prefix = split_address(place)
    found = [(f"s3://{bucket}/{key}", size, None, etag) for key, size, etag in store.entries(bucket, key_prefix)]
    return json.dumps(found).encode()
