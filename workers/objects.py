"""Folders in S3 that are committed by a manifest, written last with `If-None-Match: *`: without it they do not exist.

Credentials are the host's own (environment or role). Everything is checked by SHA-256 on the way back.
"""

import copy
import hashlib
import time
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeVar

import boto3
from boto3.exceptions import Boto3Error
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from pydantic import ValidationError

from mae_core.errors import EncoderError
from mae_core.saved_config import CONFIG, IMAGE_PROCESSOR, WEIGHT_SUFFIXES, WEIGHTS, WEIGHTS_OF_TORCH
from workers.contract import StorageRef
from workers.delays import Delays
from workers.failures import StorageError, WaitEndedError
from workers.state_names import is_of_state, newest_first
from workers.stored import MANIFEST, EncoderManifest, FileEntry, TrainingStateManifest, training_state_prefix

T = TypeVar("T")

_CHUNK_BYTES = 2**20
_RETRY_SECONDS = (1, 2, 4, 8, 15, 30)  # and so on
_PATIENCE_SECONDS = 300.0  # after the first failure of a call
_LOOK_SECONDS = 0.5
_MISSING_CODES = ("NoSuchKey", "404")
_TAKEN_CODES = ("PreconditionFailed", "ConditionalRequestConflict", "412")  # to `If-None-Match: *`
_PERMANENT_CODES = ("AccessDenied", "NoSuchBucket", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403", *_MISSING_CODES)


class ObjectStore:
    """One job's objects. A call is repeated for five minutes while storage does not answer, and `delays` told of it."""

    def __init__(self, storage: StorageRef, delays: Delays | None = None) -> None:
        self._bucket = storage.bucket
        self._delays = delays or Delays()
        self._patience_seconds = _PATIENCE_SECONDS
        self._gives_up: Callable[[], bool] = lambda: False
        self._client = boto3.client(
            "s3",
            endpoint_url=storage.endpoint,
            region_name=storage.region,
            config=Config(
                connect_timeout=5,
                read_timeout=60,
                retries={"mode": "standard", "max_attempts": 3},
                s3={"addressing_style": "path" if storage.endpoint else "auto"},
            ),
        )

    def patient(self, seconds: float, *, gives_up: Callable[[], bool] | None = None, delays: Delays | None = None) -> "ObjectStore":
        """The same, but its calls are repeated for `seconds`; they raise WaitEndedError once `gives_up`, which is asked all the while."""
        other = copy.copy(self)
        other._patience_seconds = seconds
        other._gives_up = gives_up or self._gives_up
        other._delays = delays or self._delays
        return other

    def put_file(self, key: str, path: Path) -> FileEntry:
        """Uploads one file; what it is."""
        self.upload(key, path)
        return file_entry(path)

    def upload(self, key: str, path: Path) -> None:
        """Uploads one file, in parts where it is large."""

        def send() -> None:
            with path.open("rb") as file:  # upload_file would hide the error's code
                self._client.upload_fileobj(file, self._bucket, key)

        self._persist(f"upload {key}", send)

    def put(self, key: str, body: bytes) -> None:
        """Writes a small object."""
        self._persist(f"upload {key}", lambda: self._client.put_object(Bucket=self._bucket, Key=key, Body=body))

    def first(self, key: str, make: Callable[[], bytes]) -> bytes:
        """What is at `key`; where nothing is yet, what `make` makes, which all others find from then on: of two at once, one wins."""

        def read() -> bytes | None:
            try:
                body: bytes = self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
            except ClientError as error:
                if _code(error) in _MISSING_CODES:
                    return None
                raise
            return body

        def put(body: bytes) -> None:
            try:
                self._client.put_object(Bucket=self._bucket, Key=key, Body=body, IfNoneMatch="*")
            except ClientError as error:
                if _code(error) not in _TAKEN_CODES:
                    raise

        found = self._persist(f"read {key}", read)
        if found is None:
            made = make()
            self._persist(f"upload {key}", lambda: put(made))
            found = self._persist(f"read {key}", read)
        assert found is not None, f"{key} was deleted"
        return found

    def commit(self, prefix: str, manifest: EncoderManifest | TrainingStateManifest) -> bool:
        """Writes the manifest of `prefix`. False where another one is there already: somebody committed first, and that one counts."""
        body = manifest.model_dump_json(indent=2).encode()

        def put() -> bool:
            try:
                self._client.put_object(
                    Bucket=self._bucket, Key=prefix + MANIFEST, Body=body, IfNoneMatch="*", ContentType="application/json"
                )
            except ClientError as error:
                if _code(error) in _TAKEN_CODES:
                    # It may be our own: storage had committed, but its answer was lost, and the call was repeated.
                    return bool(self._client.get_object(Bucket=self._bucket, Key=prefix + MANIFEST)["Body"].read() == body)
                raise
            return True

        return self._persist(f"commit {prefix}", put)

    def is_committed(self, prefix: str) -> bool:
        """Whether `prefix` has its manifest."""
        key = prefix + MANIFEST
        found = self._persist(f"look for {key}", lambda: self._client.list_objects_v2(Bucket=self._bucket, Prefix=key, MaxKeys=1))
        return bool(found["KeyCount"])

    def training_states(self, job_prefix: str) -> list[str]:
        """Prefixes of the committed training states, the newest first."""
        return _committed(self.keys(training_state_prefix(job_prefix)))

    def fetch_training_state(self, state_prefix: str, folder: Path) -> None:
        """Downloads all files of a committed training state. Raises EncoderError where one is missing or does not match its manifest."""
        try:
            manifest = TrainingStateManifest.model_validate_json(self.read(state_prefix + MANIFEST))
        except ClientError as error:
            raise _told(error, missing=state_prefix + MANIFEST) from error
        except ValidationError as error:
            raise EncoderError(f"{state_prefix}{MANIFEST} is damaged or of another version ({error.error_count()} fields)") from error
        self._fetch_files(state_prefix, manifest.files, folder)

    def fetch_encoder(self, uri: str, folder: Path) -> Path:
        """Downloads the encoder at `uri` into `folder`; where it lies then: a file of weights, or the folder.

        s3://bucket/prefix/ is one that a job has committed, or a folder of timm or Hugging Face. Raises EncoderError where it is missing,
        and where one of ours is damaged.
        """
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        if key.endswith(WEIGHT_SUFFIXES):
            if not self._fetch(key, folder / Path(key).name, bucket=bucket):
                raise EncoderError(f"encoder {uri} does not exist")
            return folder / Path(key).name
        prefix = key if key.endswith("/") else f"{key}/"
        try:
            manifest = EncoderManifest.model_validate_json(self.read(prefix + MANIFEST, bucket=bucket))
        except ClientError as error:
            if _code(error) not in _MISSING_CODES or not self._fetch_foreign(prefix, folder, bucket=bucket):
                raise EncoderError(
                    f"encoder {uri} has no {MANIFEST} ({_code(error)}), nor {CONFIG} and {WEIGHTS}; name the encoder/ folder of a job that "
                    "succeeded, or one of timm or Hugging Face"
                ) from error
            return folder
        except ValidationError as error:
            raise EncoderError(f"encoder {uri}: {MANIFEST} is not an encoder's ({error.error_count()} fields differ)") from error
        own = {name: entry for name, entry in manifest.files.items() if "/" not in name}  # other formats lie in folders
        self._fetch_files(prefix, own, folder, bucket=bucket)
        return folder

    def _fetch_foreign(self, prefix: str, folder: Path, *, bucket: str) -> bool:
        """What another library left in a folder: its config, its image processor where there is one, and the first weights there are."""
        self._fetch(prefix + IMAGE_PROCESSOR, folder / IMAGE_PROCESSOR, bucket=bucket)
        return self._fetch(prefix + CONFIG, folder / CONFIG, bucket=bucket) and any(
            self._fetch(prefix + name, folder / name, bucket=bucket) for name in (WEIGHTS, WEIGHTS_OF_TORCH)
        )

    def _fetch(self, key: str, path: Path, *, bucket: str) -> bool:
        """Downloads one object; False where it is not there."""
        try:
            self._persist(f"download {key}", partial(self._client.download_file, bucket, key, str(path)))
        except ClientError as error:
            if _code(error) in _MISSING_CODES:
                return False
            raise
        return True

    def _fetch_files(self, prefix: str, files: dict[str, FileEntry], folder: Path, *, bucket: str | None = None) -> None:
        for name, entry in files.items():
            path = folder / Path(name).name
            if not self._fetch(prefix + name, path, bucket=bucket or self._bucket):
                raise EncoderError(f"{prefix}{name} is missing, though its manifest names it")
            if (found := file_entry(path)) != entry:
                raise EncoderError(f"{prefix}{name} is damaged: it has {found}, its manifest says {entry}")

    def keys(self, prefix: str) -> list[str]:
        """All keys that begin with `prefix`."""
        return list(self.sizes(prefix))

    def sizes(self, prefix: str) -> dict[str, int]:
        """The bytes of all objects whose keys begin with `prefix`."""

        def list_objects() -> dict[str, int]:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
            return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}

        return self._persist(f"list {prefix}", list_objects)

    def entries(self, bucket: str, prefix: str) -> list[tuple[str, int, str]]:
        """Key, bytes and ETag of all objects of any bucket whose keys begin with `prefix`."""

        def list_objects() -> list[tuple[str, int, str]]:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            return [(item["Key"], item["Size"], item["ETag"]) for page in pages for item in page.get("Contents", [])]

        return self._persist(f"list s3://{bucket}/{prefix}", list_objects)

    def read_range(self, bucket: str, key: str, start: int, length: int) -> bytes:
        """Part of an object of any bucket; nothing behind its end. Raises ClientError where it is not there."""

        def get() -> bytes:
            try:
                answer = self._client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{start + length - 1}")
                body: bytes = answer["Body"].read()
            except ClientError as error:
                if _code(error) in ("InvalidRange", "416"):
                    return b""
                raise
            return body

        return self._persist(f"read s3://{bucket}/{key}", get)

    def entry(self, key: str) -> FileEntry | None:
        """What an object is now, by all of its bytes; None where it is not there."""

        def read_through() -> FileEntry:
            sha256, num_bytes = hashlib.sha256(), 0
            for chunk in self._client.get_object(Bucket=self._bucket, Key=key)["Body"].iter_chunks(_CHUNK_BYTES):
                sha256.update(chunk)
                num_bytes += len(chunk)
            return FileEntry(bytes=num_bytes, sha256=sha256.hexdigest())

        try:
            return self._persist(f"read {key}", read_through)
        except ClientError as error:
            if _code(error) in _MISSING_CODES:
                return None
            raise

    def delete(self, key: str) -> None:
        self._persist(f"delete {key}", lambda: self._client.delete_object(Bucket=self._bucket, Key=key))

    def read(self, key: str, *, bucket: str | None = None) -> bytes:
        """A small object. Raises ClientError where it is not there."""

        def get() -> bytes:
            body: bytes = self._client.get_object(Bucket=bucket or self._bucket, Key=key)["Body"].read()
            return body

        return self._persist(f"read {key}", get)

    def _persist(self, what: str, call: Callable[[], T]) -> T:
        """Repeats `call` while storage does not answer.

        Raises ClientError or NoCredentialsError for what no repeat can mend, StorageError in the end.
        """
        give_up_at: float | None = None
        for seconds in chain(_RETRY_SECONDS, repeat(_RETRY_SECONDS[-1])):
            try:
                answer = call()
            except (BotoCoreError, Boto3Error, ClientError, OSError) as error:
                now = time.monotonic()
                give_up_at = now + self._patience_seconds if give_up_at is None else give_up_at
                is_permanent = isinstance(error, NoCredentialsError) or (
                    isinstance(error, ClientError) and _code(error) in _PERMANENT_CODES
                )
                if is_permanent or now + seconds > give_up_at:
                    self._delays.ended(what, works=False)
                    if is_permanent:
                        raise
                    raise StorageError(f"{what}: {error}") from error
                self._delays.began(what, f"{what}: {error}; trying again")
                self._sleep(what, seconds)
                continue
            self._delays.ended(what)
            return answer
        raise AssertionError("unreachable")

    def _sleep(self, what: str, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self._gives_up():
                self._delays.ended(what, works=False)
                raise WaitEndedError(f"{what}: nobody waits for it any more")
            time.sleep(min(left, _LOOK_SECONDS))


def _committed(keys: list[str]) -> list[str]:
    return newest_first(key.removesuffix(MANIFEST) for key in keys if key.endswith(f"/{MANIFEST}") and is_of_state(key))


def file_entry(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return FileEntry(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def is_missing(error: ClientError) -> bool:
    """Whether it says that there is no such object, or no such bucket."""
    return _code(error) in (*_MISSING_CODES, "NoSuchBucket")


def _told(error: ClientError, *, missing: str) -> Exception:
    """What a refused download means: a committed folder without one of its files is damaged."""
    return EncoderError(f"{missing} is missing ({_code(error)})") if _code(error) in _MISSING_CODES else error


def _code(error: ClientError) -> str:
    response: dict[str, Any] = error.response  # type: ignore[assignment]
    return str(response.get("Error", {}).get("Code", ""))
