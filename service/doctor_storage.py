"""What `maestro doctor` looks at in object storage: each right that service and workers need, by using it on an object of its own."""

import contextlib
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from service.doctor_checks import Check

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_TAKEN = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
_BODY = b"maestro doctor"


def s3_client(endpoint: str | None, *, region: str, access_key: str | None, secret_key: str | None) -> "S3Client":
    """Without keys those of the environment, as the service has them."""
    config = Config(connect_timeout=3, read_timeout=10, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
    return boto3.session.Session().client(
        "s3", endpoint_url=endpoint, region_name=region, aws_access_key_id=access_key, aws_secret_access_key=secret_key, config=config
    )


def rights(client: "S3Client", bucket: str) -> list[Check]:
    """Whether the bucket is there, and what may be done in it. What is written is deleted again."""
    try:
        client.head_bucket(Bucket=bucket)
    except (ClientError, BotoCoreError) as error:
        remedy = f"check MAESTRO_S3_ENDPOINT and the AWS_* credentials, and that the bucket {bucket!r} is there"
        return [Check("S3 bucket", "fail", f"{bucket}: {_said(error)}", remedy)]
    prefix = f"doctor/{secrets.token_hex(8)}/"
    key = f"{prefix}object"
    steps: dict[str, tuple[Callable[[], Any], str]] = {
        "put": (lambda: client.put_object(Bucket=bucket, Key=key, Body=_BODY), "s3:PutObject"),
        "get": (lambda: _read(client, bucket, key), "s3:GetObject"),
        "list": (lambda: _listed(client, bucket, prefix), "s3:ListBucket"),
        "conditional put": (lambda: _put_again(client, bucket, key), "s3:PutObject"),
        "multipart": (lambda: _put_in_parts(client, bucket, f"{prefix}parts"), "s3:PutObject and s3:AbortMultipartUpload"),
        "delete": (lambda: _deleted(client, bucket, [key, f"{prefix}parts"]), "s3:DeleteObject"),
    }
    checks = [Check("S3 bucket", "ok", f"{bucket} is there")]
    try:
        for name, (step, right) in steps.items():
            checks.append(_tried(f"S3 {name}", step, remedy=f"allow {right} for service and workers in the bucket {bucket!r}"))
            if name == "put" and checks[-1].status == "fail":
                break  # the others need the object
    finally:
        with contextlib.suppress(ClientError, BotoCoreError):
            client.delete_object(Bucket=bucket, Key=key)
    return checks


class _Wrong(Exception):
    """It answered, but not as S3 should; the remedy is its second argument."""


def _tried(name: str, step: Callable[[], Any], *, remedy: str) -> Check:
    try:
        step()
    except _Wrong as error:
        return Check(name, "fail", error.args[0], error.args[1])
    except (ClientError, BotoCoreError) as error:
        return Check(name, "fail", _said(error), remedy)
    return Check(name, "ok", "works")


def _read(client: "S3Client", bucket: str, key: str) -> None:
    if client.get_object(Bucket=bucket, Key=key)["Body"].read() != _BODY:
        raise _Wrong("what was written is not what is read", "something between here and the store changes objects: a proxy, a cache")


def _listed(client: "S3Client", bucket: str, prefix: str) -> None:
    if not client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents"):
        raise _Wrong("an object that was just written is not listed", "use a store whose listings are consistent")


def _put_again(client: "S3Client", bucket: str, key: str) -> None:
    """Results are committed by a manifest that must not be there yet."""
    try:
        client.put_object(Bucket=bucket, Key=key, Body=_BODY, IfNoneMatch="*")
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") in _TAKEN:
            return
        raise
    raise _Wrong("it ignores `If-None-Match: *`: two attempts could commit one result", "use an object store that has conditional writes")


def _put_in_parts(client: "S3Client", bucket: str, key: str) -> None:
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    try:
        part = client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=_BODY)
        parts = {"Parts": [{"ETag": part["ETag"], "PartNumber": 1}]}
        client.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload, MultipartUpload=parts)  # type: ignore[arg-type]
    except (ClientError, BotoCoreError):
        with contextlib.suppress(ClientError, BotoCoreError):
            client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)
        raise


def _deleted(client: "S3Client", bucket: str, keys: list[str]) -> None:
    answer = client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True})
    for error in answer.get("Errors", []):
        raise _Wrong(str(error.get("Code")), f"allow s3:DeleteObject for the service in the bucket {bucket!r}")


def _said(error: ClientError | BotoCoreError) -> str:
    if isinstance(error, ClientError):
        return f"refused ({error.response.get('Error', {}).get('Code', 'unknown')})"
    return f"no answer ({type(error).__name__})"
