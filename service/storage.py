"""Object storage, over boto3: what the service itself reads and writes there, and presigned addresses for users."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from service.errors import StorageRefuses, StorageUnreachable
from service.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ObjectIdentifierTypeDef, PaginatorConfigTypeDef

PAGE = 1000  # objects that S3 lists, and deletes, at once
PRESIGNED_SECONDS = 3600
MAX_TEXT_BYTES = 16 * 2**20
_REFUSED = {
    "AccessDenied",
    "AllAccessDisabled",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "RequestTimeTooSkewed",
    "InvalidToken",
    "ExpiredToken",
    "403",
}
_MISSING = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}


class ObjectNotFound(Exception):
    """There is no such object (or bucket)."""


class StoredObject(NamedTuple):
    """An object of a listing."""

    key: str
    bytes: int


class Upload(NamedTuple):
    """An object that is being uploaded in parts, or was when whoever did it died."""

    key: str
    id: str
    begun_at: datetime


class UploadsPlace(NamedTuple):
    """Where in a listing of uploads a page ends, in the store's own words."""

    key: str
    id: str


START = UploadsPlace("", "")


class UploadsPage(NamedTuple):
    """next: None: there are no more."""

    uploads: list[Upload]
    next: UploadsPlace | None


class Storage(Protocol):
    """What the service asks of object storage. Keys are whole keys, in our own bucket where no other is named.

    Raises ObjectNotFound, and StorageUnreachable for all that a later try may mend.
    """

    bucket: str

    def check(self) -> None: ...
    def read_text(self, key: str, *, bucket: str | None = None) -> str: ...
    def read_bytes(self, key: str, *, start: int, length: int) -> bytes: ...
    def put_bytes(self, key: str, body: bytes) -> None: ...
    def list(self, prefix: str, *, bucket: str | None = None, limit: int | None = None, after: str = "") -> list[StoredObject]:
        """In the order of their keys; all, or the first `limit` (at most PAGE); with `after` those behind that key."""

    def delete(self, keys: Sequence[str]) -> None:
        """At most PAGE keys. Those that are not there are no error."""

    def presign(self, key: str) -> str: ...

    def list_uploads(self, prefix: str, *, after: UploadsPlace = START) -> UploadsPage:
        """Uploads in parts that nobody has completed or aborted, up to PAGE of them."""

    def abort_upload(self, upload: Upload) -> None:
        """Delete the parts that it has. One that is not there is no error."""


class S3Storage:
    """Storage on any S3. Credentials are boto3's own business: the AWS_* environment or a role."""

    def __init__(self, *, bucket: str, endpoint: str | None, public_endpoint: str | None, region: str) -> None:
        self.bucket = bucket
        self._endpoint = endpoint
        self._public_endpoint = public_endpoint
        self._region = region
        self._clients: dict[str | None, S3Client] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(
            bucket=settings.s3_bucket,
            endpoint=settings.s3_endpoint,
            public_endpoint=settings.s3_public_endpoint,
            region=settings.s3_region,
        )

    def check(self) -> None:
        """The bucket is there and answers us."""
        with self._errors("the bucket cannot be used"):
            try:
                self._client(self._endpoint).head_bucket(Bucket=self.bucket)
            except ClientError as error:
                if _code(error) in _MISSING:
                    raise StorageUnreachable(f"Object storage {self._place} has no bucket {self.bucket!r}: create it.") from None
                raise

    def read_text(self, key: str, *, bucket: str | None = None) -> str:
        """A small text object."""
        with self._errors(f"{key} cannot be read"):
            answer = self._client(self._endpoint).get_object(Bucket=bucket or self.bucket, Key=key)
            return answer["Body"].read(MAX_TEXT_BYTES).decode(errors="replace")

    def read_bytes(self, key: str, *, start: int, length: int) -> bytes:
        """Part of an object; nothing behind its end."""
        with self._errors(f"{key} cannot be read"):
            try:
                answer = self._client(self._endpoint).get_object(Bucket=self.bucket, Key=key, Range=f"bytes={start}-{start + length - 1}")
            except ClientError as error:
                if _code(error) in ("InvalidRange", "416"):
                    return b""
                raise
            return answer["Body"].read()

    def put_bytes(self, key: str, body: bytes) -> None:
        with self._errors(f"{key} cannot be written"):
            self._client(self._endpoint).put_object(Bucket=self.bucket, Key=key, Body=body)

    def list(self, prefix: str, *, bucket: str | None = None, limit: int | None = None, after: str = "") -> "list[StoredObject]":
        with self._errors(f"{prefix} cannot be listed"):
            paginator = self._client(self._endpoint).get_paginator("list_objects_v2")
            config: PaginatorConfigTypeDef = {} if limit is None else {"MaxItems": limit, "PageSize": limit}
            pages = paginator.paginate(Bucket=bucket or self.bucket, Prefix=prefix, StartAfter=after, PaginationConfig=config)
            return [StoredObject(item["Key"], item["Size"]) for page in pages for item in page.get("Contents", [])]

    def delete(self, keys: Sequence[str]) -> None:
        with self._errors(f"{len(keys)} objects cannot be deleted"):
            wanted: list[ObjectIdentifierTypeDef] = [{"Key": key} for key in keys]
            answer = self._client(self._endpoint).delete_objects(Bucket=self.bucket, Delete={"Objects": wanted, "Quiet": True})
        for error in answer.get("Errors", []):
            if error.get("Code") not in _MISSING:
                raise StorageUnreachable(f"Object storage {self._place} does not delete {error.get('Key')}: {error.get('Code')}.")

    def presign(self, key: str) -> str:
        """An address that gives the object to whoever has it, for an hour; of the name by which users reach the store."""
        with self._errors(f"{key} cannot be presigned"):
            return self._client(self._public_endpoint).generate_presigned_url(
                "get_object", Params={"Bucket": self.bucket, "Key": key}, ExpiresIn=PRESIGNED_SECONDS
            )

    def list_uploads(self, prefix: str, *, after: UploadsPlace = START) -> UploadsPage:
        with self._errors(f"uploads below {prefix} cannot be listed"):
            answer = self._client(self._endpoint).list_multipart_uploads(
                Bucket=self.bucket, Prefix=prefix, KeyMarker=after.key, UploadIdMarker=after.id, MaxUploads=PAGE
            )
        uploads = [Upload(item["Key"], item["UploadId"], item["Initiated"]) for item in answer.get("Uploads", [])]
        following = UploadsPlace(answer.get("NextKeyMarker", ""), answer.get("NextUploadIdMarker", ""))
        return UploadsPage(uploads, following if answer.get("IsTruncated") and following not in (START, after) else None)

    def abort_upload(self, upload: Upload) -> None:
        with self._errors(f"the upload of {upload.key} cannot be aborted"):
            try:
                self._client(self._endpoint).abort_multipart_upload(Bucket=self.bucket, Key=upload.key, UploadId=upload.id)
            except ClientError as error:
                if _code(error) != "NoSuchUpload":
                    raise

    @property
    def _place(self) -> str:
        return f"at {self._endpoint}" if self._endpoint else f"in {self._region}"

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            if _code(error) in _MISSING:
                raise ObjectNotFound(what) from None
            kind = StorageRefuses if _code(error) in _REFUSED else StorageUnreachable
            raise kind(f"Object storage {self._place} refuses us ({_code(error)}): {what}.") from None
        except NoCredentialsError:
            raise StorageRefuses("There are no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.") from None
        except (BotoCoreError, OSError) as error:
            raise StorageUnreachable(f"Object storage {self._place} does not answer ({type(error).__name__}): {what}.") from None

    def _client(self, endpoint: str | None) -> "S3Client":
        # made when first needed: that takes a while, and a client is safe between threads while its making is not
        with self._lock:
            if endpoint not in self._clients:
                config = Config(
                    connect_timeout=3,
                    read_timeout=10,
                    retries={"total_max_attempts": 2, "mode": "standard"},
                    signature_version="s3v4",
                    s3={"addressing_style": "path"},
                    max_pool_connections=20,
                )
                self._clients[endpoint] = boto3.session.Session().client(
                    "s3", endpoint_url=endpoint, region_name=self._region, config=config
                )
            return self._clients[endpoint]


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _code(error: ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "unknown")
