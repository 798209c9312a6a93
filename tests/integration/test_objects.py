"""Commits, checksums and pruning on a real S3 server."""

import io
import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import boto3
import numpy as np
import pytest
import torch
from botocore.exceptions import ClientError, ConnectionClosedError, NoCredentialsError
from torch import Tensor

from mae_core.config import RUN_SPEC
from mae_core.errors import EncoderError
from mae_core.options import ModelConfig, NormalizeConfig
from mae_core.reconstruct import Reconstructions
from mae_core.state_files import read_state
from mae_core.world import World
from service.local import Seaweedfs
from tests.integration.runs import Json, pretrain_spec
from tests.unit.forked import in_workers
from tests.unit.saving import PREFIX, Told, saving, work_on
from workers import objects
from workers.causes import explain
from workers.contract import EventType, Reason, StorageRef, WorkOrder
from workers.delays import Delays
from workers.failures import StorageError, WaitEndedError
from workers.log_uploads import LogUploads
from workers.objects import ObjectStore
from workers.parts import S3Parts
from workers.reconstructions import ReconstructionUploads
from workers.reporter import Reporter
from workers.state_names import state_name, state_prefix
from workers.stored import MANIFEST, EncoderManifest, TrainingStateManifest, log_chunk, log_prefix


@pytest.fixture
def store(seaweedfs: Seaweedfs, bucket: str, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweedfs.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweedfs.secret_key)
    return ObjectStore(StorageRef(endpoint=seaweedfs.endpoint, bucket=bucket))


class Unwanted(Delays):
    """Of storage that is not to be asked a second time."""

    def began(self, what: str, message: str, **data: Any) -> None:
        pytest.fail(f"repeated: {message}")


def order(bucket: str) -> WorkOrder:
    spec = RUN_SPEC.validate_python(pretrain_spec())
    return WorkOrder(
        job="job1", attempt=1, spec=spec, token="t", service_url="http://127.0.0.1:1", storage=StorageRef(bucket=bucket), prefix=PREFIX
    )


def keys(seaweedfs: Seaweedfs, bucket: str) -> list[str]:
    return [item["Key"] for item in seaweedfs.client().list_objects_v2(Bucket=bucket).get("Contents", [])]


def test_a_log_in_real_storage(store: ObjectStore, tmp_path: Path) -> None:
    """The same as with the store of tests/unit/test_log_uploads.py."""
    out, prefix = tmp_path / "out", log_prefix(PREFIX, 1, "0")
    out.write_bytes(b"one\n")
    LogUploads(lambda: store, prefix, [out], max_bytes=10**6).look()
    uploads = LogUploads(lambda: store, prefix, [out], max_bytes=1)
    uploads.look()
    assert store.sizes(prefix) == {log_chunk(prefix, 4): 4}, "the next process goes on behind it, and what is above the quota is deleted"
    assert store.read(log_chunk(prefix, 4)) == b"one\n"


def encoder_manifest(**files: objects.FileEntry) -> EncoderManifest:
    model = ModelConfig(arch="vit_tiny_patch4", image_size=8, in_chans=1)  # type: ignore[arg-type]
    return EncoderManifest(
        job="job1",
        attempt=1,
        kind="pretrain",
        created_at=datetime.now(UTC),
        model=model,
        normalize=NormalizeConfig(mean=(0.5,), std=(0.5,)),
        spec=RUN_SPEC.validate_python(pretrain_spec()),
        metrics={},
        versions={},
        git_revision=None,
        files=files,
    )


def folder_of(step: int, incarnation: int = 5) -> str:
    return state_prefix(PREFIX, state_name(step=step, attempt=1, incarnation=incarnation))


def save_all(world: World, folder: Path, endpoint: str, bucket: str) -> tuple[list[tuple[str, Json]], list[str]]:
    """Saves three states of two workers into `bucket`; what was told, and the states that are left."""
    work_on(folder / "machine")
    store = ObjectStore(StorageRef(endpoint=endpoint, bucket=bucket))
    parts = saving(world, folder, store)
    for step in (3, 10, 200):
        parts.saver.save(step, state_of(step))
        parts.wait()
    world.gather(None)
    return parts.told.events, store.training_states(PREFIX)


def state_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    state = {f"module.{name}": torch.randn(500, generator=generator) for name in ("weight", "bias", "scale")}
    return state | {"step": torch.tensor(step)}


def read_back(store: ObjectStore, prefix: str, folder: Path) -> dict[str, Tensor]:
    folder.mkdir()
    store.fetch_training_state(prefix, folder)
    into = state_of(0)
    read_state(into, folder, None)
    return into


def test_saved_states_come_back_bit_for_bit(store: ObjectStore, seaweedfs: Seaweedfs, bucket: str, tmp_path: Path) -> None:
    unfinished = folder_of(4)
    seaweedfs.client().put_object(Bucket=bucket, Key=f"{unfinished}state-00000.safetensors", Body=b"of a save that was killed")
    (events, left), (_, others) = in_workers(save_all, 2, tmp_path, tmp_path, seaweedfs.endpoint, bucket)
    assert [(str(kind), data["step"]) for kind, data in events] == [("training_state_committed", step) for step in (3, 10, 200)]
    newest, before, _ = left
    assert left == others == [folder_of(200), folder_of(10), folder_of(3)], "workers delete none"
    files = {"state-00000.safetensors", "state-00001.safetensors", MANIFEST}
    assert set(keys(seaweedfs, bucket)) == {prefix + name for prefix in left for name in files} | {f"{unfinished}state-00000.safetensors"}
    found, expected = read_back(store, newest, tmp_path / "newest"), state_of(200)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    seaweedfs.client().put_object(Bucket=bucket, Key=newest + "state-00001.safetensors", Body=b"damaged")
    with pytest.raises(EncoderError, match=r"state-00001\.safetensors is damaged"):
        read_back(store, newest, tmp_path / "damaged")
    assert torch.equal(read_back(store, before, tmp_path / "before")["step"], torch.tensor(10))
    seaweedfs.client().put_object(Bucket=bucket, Key=before + MANIFEST, Body=b"{}")
    with pytest.raises(EncoderError, match=r"manifest\.json is damaged or of another version"):
        read_back(store, before, tmp_path / "manifest")
    for name in ("state-00000.safetensors", MANIFEST):
        seaweedfs.client().delete_object(Bucket=bucket, Key=newest + name)
        with pytest.raises(EncoderError, match=rf"{name} is missing"):
            read_back(store, newest, tmp_path / f"without-{name}")


def test_a_refused_upload_is_told_as_what_it_is(store: ObjectStore, seaweedfs: Seaweedfs, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"state")
    other = ObjectStore(StorageRef(endpoint=seaweedfs.endpoint, bucket="no-such-bucket"), Unwanted())
    with pytest.raises(ClientError, match="NoSuchBucket"):
        other.put_file("jobs/job1/x", tmp_path / "state")


def test_reconstructions_are_uploaded_as_picture_and_as_arrays(store: ObjectStore, seaweedfs: Seaweedfs, bucket: str) -> None:
    made = Reconstructions(*(torch.rand(2, channels, 8, 8) for channels in (3, 1, 3, 3)), keys=["a.png", "b.png"])
    told = Told()
    uploads = ReconstructionUploads(order(bucket), store, cast(Reporter, told))
    for step in (4, 8):
        uploads.add(step, made)
    uploads.close(60)
    assert [(kind, data["step"]) for kind, data in told.events] == [
        (EventType.RECONSTRUCTIONS_WRITTEN, 4),
        (EventType.RECONSTRUCTIONS_WRITTEN, 8),
    ]
    names = [f"{PREFIX}reconstructions/step={step:010d}.{kind}" for step in (4, 8) for kind in ("npz", "png")]
    assert keys(seaweedfs, bucket) == names
    data = told.events[1][1]
    body = seaweedfs.client().get_object(Bucket=bucket, Key=data["arrays"]["key"])["Body"].read()
    assert len(body) == data["arrays"]["bytes"]
    with np.load(io.BytesIO(body)) as arrays:
        assert np.array_equal(arrays["prediction"], made.prediction.numpy())


def test_a_state_without_manifest_does_not_exist(store: ObjectStore, seaweedfs: Seaweedfs, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"half")
    store.put_file(folder_of(9) + "state-00000.safetensors", tmp_path / "state")
    assert store.training_states(PREFIX) == []


def test_of_many_who_commit_one_wins(store: ObjectStore, seaweedfs: Seaweedfs, bucket: str) -> None:
    won: list[bool] = []

    def commit(incarnation: int) -> None:
        manifest = TrainingStateManifest(job="job1", attempt=1, incarnation=incarnation, step=1, files={}, created_at=datetime.now(UTC))
        won.append(store.commit("jobs/job1/x/", manifest))

    threads = [threading.Thread(target=commit, args=(incarnation,)) for incarnation in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False, False, False, True]
    assert store.is_committed("jobs/job1/x/")
    assert not store.is_committed("jobs/job1/y/")


def test_a_commit_whose_answer_was_lost_is_ones_own(store: ObjectStore, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = TrainingStateManifest(job="job1", attempt=1, incarnation=1, step=1, files={}, created_at=datetime.now(UTC))
    monkeypatch.setattr(objects, "_RETRY_SECONDS", (0,))
    put, lost = store._client.put_object, [True, False]

    def put_and_lose(**given: Any) -> Any:
        answer = put(**given)
        if lost.pop(0):
            raise ConnectionClosedError(endpoint_url="http://s3")
        return answer

    monkeypatch.setattr(store._client, "put_object", put_and_lose)
    assert store.commit("jobs/job1/x/", manifest)
    assert lost == [False], "the repeat was refused, and known"
    monkeypatch.undo()
    assert not store.commit("jobs/job1/x/", manifest.model_copy(update={"incarnation": 2}))


def test_damaged_encoder_is_refused(store: ObjectStore, seaweedfs: Seaweedfs, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    entry = store.put_file("jobs/job1/encoder/model.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "other").write_bytes(b"the same in another format")
    other = store.put_file("jobs/job1/encoder/hf/model.safetensors", tmp_path / "other")
    assert store.commit("jobs/job1/encoder/", encoder_manifest(**{"model.safetensors": entry, "hf/model.safetensors": other}))
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    store.fetch_encoder(f"s3://{bucket}/jobs/job1/encoder/", fetched)
    assert [path.name for path in fetched.iterdir()] == ["model.safetensors"]
    assert (fetched / "model.safetensors").read_bytes() == b"weights"
    seaweedfs.client().put_object(Bucket=bucket, Key="jobs/job1/encoder/model.safetensors", Body=b"w3ights")
    with pytest.raises(EncoderError, match=r"model.safetensors is damaged"):
        store.fetch_encoder(f"s3://{bucket}/jobs/job1/encoder", fetched)


def test_missing_encoder_names_what_is_missing(store: ObjectStore, seaweedfs: Seaweedfs, bucket: str, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"has no manifest.json"):
        store.fetch_encoder(f"s3://{bucket}/jobs/none/encoder/", tmp_path)
    seaweedfs.client().put_object(Bucket=bucket, Key="jobs/odd/encoder/manifest.json", Body=json.dumps({"a": 1}).encode())
    with pytest.raises(EncoderError, match=r"is not an encoder's"):
        store.fetch_encoder(f"s3://{bucket}/jobs/odd/encoder/", tmp_path)


def test_encoders_of_other_libraries(store: ObjectStore, seaweedfs: Seaweedfs, bucket: str, tmp_path: Path) -> None:
    """A folder without a manifest: what their libraries read of it, and nothing else. A file: that file."""
    for key in ("hf/config.json", "hf/pytorch_model.bin", "hf/preprocessor_config.json", "hf/README.md", "mae/vit.pth"):
        seaweedfs.client().put_object(Bucket=bucket, Key=key, Body=key.encode())
    for name in ("folder", "file"):
        (tmp_path / name).mkdir()
    assert store.fetch_encoder(f"s3://{bucket}/hf", tmp_path / "folder") == tmp_path / "folder"
    fetched = {path.name: path.read_text() for path in (tmp_path / "folder").iterdir()}
    assert fetched == {name: f"hf/{name}" for name in ("config.json", "pytorch_model.bin", "preprocessor_config.json")}
    assert store.fetch_encoder(f"s3://{bucket}/mae/vit.pth", tmp_path / "file") == tmp_path / "file" / "vit.pth"
    assert (tmp_path / "file" / "vit.pth").read_text() == "mae/vit.pth"
    with pytest.raises(EncoderError, match=r"mae/none\.pth does not exist"):
        store.fetch_encoder(f"s3://{bucket}/mae/none.pth", tmp_path)
    with pytest.raises(EncoderError, match=r"has no manifest\.json .*, nor config\.json and model\.safetensors"):
        store.fetch_encoder(f"s3://{bucket}/mae/", tmp_path)


def test_storage_that_does_not_answer_is_waited_for_then_given_up(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setattr(objects, "_RETRY_SECONDS", (0.01,))
    told = Told()
    away = ObjectStore(StorageRef(endpoint="http://127.0.0.1:9", bucket=bucket), Delays(cast(Reporter, told)))
    with pytest.raises(StorageError, match=r"list jobs/job1/training_state/"):
        away.patient(0.1).training_states(PREFIX)
    assert told.kinds() == ["upload_delayed"]  # once, and it has not recovered


def test_whoever_waits_for_storage_can_be_told_to_stop(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    asked: list[None] = []

    def gives_up() -> bool:
        asked.append(None)
        return len(asked) == 3

    away = ObjectStore(StorageRef(endpoint="http://127.0.0.1:9", bucket=bucket)).patient(24 * 3600, gives_up=gives_up)
    with pytest.raises(WaitEndedError, match=r"list jobs/job1/training_state/: nobody waits for it any more"):
        away.training_states(PREFIX)


def test_a_refusal_is_not_repeated(store: ObjectStore, seaweedfs: Seaweedfs) -> None:
    other = ObjectStore(StorageRef(endpoint=seaweedfs.endpoint, bucket="no-such-bucket"), Unwanted())
    with pytest.raises(ClientError, match="NoSuchBucket"):
        other.training_states(PREFIX)


def test_without_credentials_nothing_is_repeated(seaweedfs: Seaweedfs, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"AWS_SHARED_CREDENTIALS_FILE": "/nonexistent", "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps those that another test has found
    other = ObjectStore(StorageRef(endpoint=seaweedfs.endpoint, bucket=bucket), Unwanted())
    with pytest.raises(NoCredentialsError) as told:
        other.training_states(PREFIX)
    assert explain(told.value, 0).reason is Reason.STORAGE_REFUSED


def test_of_two_who_come_first_one_wins(store: ObjectStore) -> None:
    def other() -> bytes:
        assert store.first(f"{PREFIX}listing", lambda: b"theirs") == b"theirs"
        return b"ours, too late"

    assert store.first(f"{PREFIX}listing", other) == b"theirs"
    assert store.first(f"{PREFIX}listing", lambda: b"later") == b"theirs"


def test_parts_of_an_embedding(
    store: ObjectStore, seaweedfs: Seaweedfs, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_CHUNK_BYTES", 4)
    parts = S3Parts(store, f"{PREFIX}embedding/", tmp_path)
    (tmp_path / ".part").write_bytes(b"features")
    assert (parts.names(), parts.fingerprint("part")) == ([], None)
    stored = parts.put("part", tmp_path / ".part")
    assert (stored.bytes, stored) == (8, parts.fingerprint("part"))
    assert not (tmp_path / ".part").exists()
    assert (parts.names(), parts.read("part")) == (["part"], b"features")
    seaweedfs.client().put_object(Bucket=bucket, Key=f"{PREFIX}embedding/part", Body=b"featurez")
    damaged = parts.fingerprint("part")
    assert damaged is not None
    assert damaged.bytes == 8
    assert damaged.sha256 != stored.sha256
    parts.delete("part")
    assert keys(seaweedfs, bucket) == []
