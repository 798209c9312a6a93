"""One body for the real object store and for the fake that unit tests use."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from service.errors import StorageRefuses, StorageUnreachable
from service.local import REGION, Seaweedfs
from service.processes import free_ports
from service.startup import require_rights
from service.storage import PAGE, ObjectNotFound, S3Storage, Storage, StoredObject, Upload, UploadsPage
from tests.unit.fake_storage import FakeStorage


@pytest.fixture
def credentials(seaweedfs: Seaweedfs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweedfs.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweedfs.secret_key)


def real(endpoint: str, bucket: str, public: str | None = None) -> S3Storage:
    return S3Storage(bucket=bucket, endpoint=endpoint, public_endpoint=public or endpoint, region=REGION)


@pytest.fixture(params=["real", "fake"])
def storage(request: pytest.FixtureRequest) -> Storage:
    if request.param == "fake":
        return FakeStorage()
    request.getfixturevalue("credentials")
    return real(request.getfixturevalue("seaweedfs").endpoint, request.getfixturevalue("bucket"))


def test_the_contract(storage: Storage) -> None:
    storage.check()
    assert storage.list("jobs/") == []
    with pytest.raises(ObjectNotFound):
        storage.read_text("jobs/a/logs/attempt-1.txt")
    storage.put_bytes("jobs/a/logs/attempt-1.txt", "hällo\n".encode())
    storage.put_bytes("jobs/a/x", b"")
    storage.put_bytes("other", b"x")
    assert storage.read_text("jobs/a/logs/attempt-1.txt") == "hällo\n"
    assert storage.read_text("other", bucket=storage.bucket) == "x"
    assert storage.list("jobs/") == [StoredObject("jobs/a/logs/attempt-1.txt", 7), StoredObject("jobs/a/x", 0)]
    assert storage.list("oth", bucket=storage.bucket) == [StoredObject("other", 1)]
    storage.put_bytes("other", b"y")
    assert storage.read_text("other") == "y"
    with pytest.raises(ObjectNotFound):
        storage.read_text("other", bucket="nowhere-to-be-found")
    assert "other" in storage.presign("other")
    storage.put_bytes("log", b"0123456789")
    parts = [(0, 3, b"012"), (3, 100, b"3456789"), (9, 1, b"9"), (10, 5, b"")]
    assert [storage.read_bytes("log", start=start, length=length) for start, length, _ in parts] == [part for *_, part in parts]
    with pytest.raises(ObjectNotFound):
        storage.read_bytes("none", start=0, length=1)


def test_pages_are_listed_and_deleted(storage: Storage) -> None:
    keys = [f"jobs/a/{number:04d}" for number in range(12)]
    for key in [*keys, "jobs/b/x"]:
        storage.put_bytes(key, b"x")
    assert [item.key for item in storage.list("jobs/a/", limit=5)] == keys[:5]
    assert [item.key for item in storage.list("jobs/", limit=3, after=keys[9])] == [*keys[10:], "jobs/b/x"]
    assert storage.list("jobs/a/", after="jobs/a/~") == []
    storage.delete([*keys[:5], "jobs/a/none"])
    storage.delete(keys[:5])
    assert [item.key for item in storage.list("jobs/", limit=PAGE)] == [*keys[5:], "jobs/b/x"]
    storage.delete([item.key for item in storage.list("jobs/a/")])
    assert [item.key for item in storage.list("jobs/")] == ["jobs/b/x"]


def begin_upload(storage: Storage, key: str) -> None:
    """An upload of which one part is there, and whose owner dies."""
    if isinstance(storage, FakeStorage):
        storage.uploads.add(Upload(key, f"id-{len(storage.uploads)}", datetime.now(UTC)))
        return
    assert isinstance(storage, S3Storage)
    client = storage._client(storage._endpoint)
    upload = client.create_multipart_upload(Bucket=storage.bucket, Key=key)["UploadId"]
    client.upload_part(Bucket=storage.bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"x")


def test_unfinished_uploads_are_listed_by_pages_and_aborted(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.storage.PAGE", 2)
    monkeypatch.setattr("tests.unit.fake_storage.PAGE", 2)
    assert storage.list_uploads("jobs/") == UploadsPage([], None)
    begun = ["jobs/a/x", "jobs/a/y", "jobs/a/y", "jobs/b/z", "other"]
    for key in begun:
        begin_upload(storage, key)
    found, page = list[Upload](), storage.list_uploads("jobs/")
    while page.next is not None:
        assert len(page.uploads) == 2
        found += page.uploads
        page = storage.list_uploads("jobs/", after=page.next)
    found += page.uploads
    assert sorted(upload.key for upload in found) == begun[:4]
    assert all(abs(datetime.now(UTC) - upload.begun_at) < timedelta(minutes=10) for upload in found)
    assert len({upload.id for upload in found}) == 4
    for upload in [*found[:3], found[0]]:
        storage.abort_upload(upload)
    assert storage.list_uploads("jobs/").uploads == found[3:]
    assert storage.list("jobs/") == []


@pytest.mark.usefixtures("credentials")
def test_presigned_addresses_give_the_object_to_anybody(seaweedfs: Seaweedfs, bucket: str) -> None:
    storage = real(seaweedfs.endpoint, bucket)
    storage.put_bytes("jobs/a/step=1 b.txt", b"text")
    url = storage.presign("jobs/a/step=1 b.txt")
    assert httpx.get(url, trust_env=False).text == "text"
    assert httpx.get(url.replace("step", "stop"), trust_env=False).status_code == 403
    assert httpx.get(url.partition("?")[0], trust_env=False).status_code == 403


@pytest.mark.usefixtures("credentials")
def test_presigned_addresses_are_of_the_public_name(seaweedfs: Seaweedfs, bucket: str) -> None:
    """Signed for the name that users reach: `localhost` here, which the store answers as well."""
    public = seaweedfs.endpoint.replace("127.0.0.1", "localhost")
    storage = real(seaweedfs.endpoint, bucket, public)
    storage.put_bytes("x", b"text")
    url = storage.presign("x")
    assert url.startswith(public)
    assert httpx.get(url, trust_env=False).text == "text"


@pytest.mark.usefixtures("credentials")
def test_a_missing_bucket_and_a_missing_server(seaweedfs: Seaweedfs) -> None:
    with pytest.raises(StorageUnreachable, match="no bucket 'not-made': create it"):
        real(seaweedfs.endpoint, "not-made").check()
    away = real(f"http://127.0.0.1:{free_ports(1)[0]}", "maestro")
    calls: list[Callable[[], object]] = [away.check, lambda: away.read_text("x"), lambda: away.put_bytes("x", b""), lambda: away.list("")]
    calls += [lambda: away.delete(["x"]), lambda: away.list_uploads("")]
    for call in calls:
        with pytest.raises(StorageUnreachable, match="does not answer"):
            call()


@pytest.mark.usefixtures("credentials")
def test_what_a_process_makes_sure_of(seaweedfs: Seaweedfs, bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    require_rights(real(seaweedfs.endpoint, bucket))
    assert real(seaweedfs.endpoint, bucket).list("") == []
    with pytest.raises(SystemExit):
        require_rights(real(seaweedfs.endpoint, "not-made"))
    assert "there is no bucket 'not-made'" in capsys.readouterr().err


def test_wrong_and_missing_credentials(
    seaweedfs: Seaweedfs, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweedfs.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageRefuses, match="refuses us"):
        real(seaweedfs.endpoint, bucket).read_text("x")
    with pytest.raises(SystemExit) as exit_:
        require_rights(real(seaweedfs.endpoint, bucket))
    assert exit_.value.code == 2
    assert f"we may not write in the bucket '{bucket}'" in capsys.readouterr().err
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(StorageUnreachable, match="set AWS_ACCESS_KEY_ID"):
        real(seaweedfs.endpoint, bucket).check()
