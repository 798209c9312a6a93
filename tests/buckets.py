"""Buckets of tests."""

import contextlib
import uuid
from collections.abc import Iterator

from botocore.exceptions import BotoCoreError, ClientError

from service.local import Seaweedfs


@contextlib.contextmanager
def fresh_bucket(storage: Seaweedfs) -> Iterator[str]:
    """The name of a bucket that lasts for the block.

    Each bucket holds a volume of SeaweedFS's, of which it has as many as the free disk has room for: tests that deleted none
    came to an end with 95 buckets on a disk with 24 GB free."""
    name = f"test-{uuid.uuid4().hex}"
    storage.create_bucket(name)
    yield name
    client = storage.client()
    with contextlib.suppress(BotoCoreError, ClientError):  # storage may be away by then, a worker left behind may write on: it stays
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
            if keys := [{"Key": entry["Key"]} for entry in page.get("Contents", ())]:
                client.delete_objects(Bucket=name, Delete={"Objects": keys, "Quiet": True})
        client.delete_bucket(Bucket=name)
