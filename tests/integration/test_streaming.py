"""Images in a real S3 server: packed there, streamed from there through faults, and below a raw prefix."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mae_core.data import listing
from mae_core.data.cache import FileCache
from mae_core.data.listing import FolderImages, list_images
from mae_core.data.pack import Packing, pack
from mae_core.data.packed_source import PackedSource
from mae_core.data.remote import Remote
from mae_core.data.source import FolderSource, ImageSource, open_source
from mae_core.errors import DataError
from mae_core.packed import PackedIndex
from mae_core.run import Run, training_loader
from mae_core.runs import open_run
from mae_core.stores import FolderParts
from mae_core.world import World
from service.local import Seaweedfs, storage_environment
from tests.faults.proxy import ChaosProxy, Faults
from tests.unit.core_fixtures import image_folder, losses, opened, pretrain_spec, spec_of
from workers import objects
from workers import remote as workers_remote
from workers.contract import StorageRef
from workers.data import S3Place, main
from workers.failures import StorageError
from workers.objects import ObjectStore

HOW = Packing(shard_bytes=20_000)


@pytest.fixture(autouse=True)
def on_this_machine(seaweedfs: Seaweedfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in storage_environment(seaweedfs).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(objects, "_RETRY_SECONDS", (0.1,))
    monkeypatch.setattr(workers_remote, "user_folder", lambda: tmp_path / "machine")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "raw", per_class=20)


@pytest.fixture
def index(folder: Path, bucket: str, tmp_path: Path) -> PackedIndex:
    """The folder's images, packed into `s3://bucket/packed/` and into `packed`: the same files in both."""
    images = FolderImages(folder)
    for store in (FolderParts(tmp_path / "packed"), S3Place(f"s3://{bucket}/packed", tmp_path / "scratch")):
        made = pack(images, list_images(images, None), store, HOW, num_processes=1, tell=lambda _: None)
    return made


@pytest.fixture
def proxy(seaweedfs: Seaweedfs) -> Iterator[ChaosProxy]:
    proxy = ChaosProxy(int(seaweedfs.endpoint.rpartition(":")[2]), seed=3)
    yield proxy
    proxy.close()


def reading(bucket: str, *, endpoint: str | None = None, seconds: float = 60, prefix: str = "jobs/job1/") -> Remote:
    return workers_remote.remote_of(ObjectStore(StorageRef(endpoint=endpoint, bucket=bucket)).patient(seconds), prefix)


def in_storage(bucket: str, **given: object) -> ImageSource:
    return open_source(f"s3://{bucket}/packed", in_chans=3, remote=reading(bucket, **given))  # type: ignore[arg-type]


def same_images(found: ImageSource, expected: ImageSource) -> bool:
    return list(found.keys) == list(expected.keys) and all(
        np.array_equal(np.asarray(found.read(place)), np.asarray(expected.read(place))) for place in range(len(expected.keys))
    )


def test_packing_to_and_from_storage(
    seaweedfs: Seaweedfs, folder: Path, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By processes of their own; from a folder, a prefix and a list, the same bytes as on a disk."""
    client = seaweedfs.client()
    for key in listing.find_files(folder, ""):
        client.upload_file(str(folder / key), bucket, f"raw/{key}")
    rows = [f"{key},{key.partition('/')[0]}" for key in listing.find_files(folder, "")]
    client.put_object(Bucket=bucket, Key="raw/all.csv", Body="\n".join(["path,label", *rows]).encode())
    assert main(["pack", str(folder), str(tmp_path / "local"), "--processes", "1"]) == 0
    expected = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    for name, source in (("a", str(folder)), ("b", f"s3://{bucket}/raw/"), ("c", f"s3://{bucket}/raw/all.csv")):
        assert main(["pack", source, f"s3://{bucket}/{name}", "--processes", "2" if name == "b" else "1"]) == 0
        keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket, Prefix=f"{name}/")["Contents"]]
        stored = {key.removeprefix(f"{name}/"): client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}
        assert stored == expected
    capsys.readouterr()
    assert main(["show", f"s3://{bucket}/a"]) == 0
    assert "40 images in 1 shards" in capsys.readouterr().out
    assert main(["verify", f"s3://{bucket}/a"]) == 0
    client.put_object(Bucket=bucket, Key="a/shard-000000.tar", Body=b"!" + expected["shard-000000.tar"][1:])
    assert main(["verify", f"s3://{bucket}/a"]) == 1
    assert "shard-000000.tar is damaged" in capsys.readouterr().out
    assert main(["show", "s3://no-such-bucket-here/a"]) == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pretrain", "finetune", "probe", "evaluate", "embed"])
def test_every_kind_of_run_finds_the_same_as_on_a_disk(kind: str, index: PackedIndex, bucket: str, tmp_path: Path) -> None:
    def run(source: str, remote: Remote | None) -> Run:
        spec = spec_of(kind, source)
        return open_run(spec, world=World(), encoder_folder=None, parts=FolderParts(tmp_path / f"parts-{remote is None}"), remote=remote)

    streamed, local = run(f"s3://{bucket}/packed/", reading(bucket)), run(str(tmp_path / "packed"), None)
    told = [
        [values.get("loss") for progress in each.progress(lambda: False) for _, values in progress.points] for each in (streamed, local)
    ]
    assert told[0] == told[1]
    assert streamed.metrics == local.metrics
    assert local.metrics


def test_a_cache_of_two_shards_is_enough(index: PackedIndex, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is deleted while it is still needed is fetched once more: it is slow, and right."""
    columns = sum(file.bytes for file in index.columns.values())
    monkeypatch.setenv(workers_remote.CACHE_VARIABLE, str((2 * max(shard.bytes for shard in index.shards) + columns) / 1e9))
    assert same_images(in_storage(bucket), open_source(str(tmp_path / "packed"), in_chans=3))


def test_what_comes_next_is_fetched_ahead(index: PackedIndex, bucket: str) -> None:
    remote = reading(bucket)
    source = open_source(f"s3://{bucket}/packed", in_chans=3, remote=remote)
    assert isinstance(source, PackedSource)
    wanted: list[str] = []
    remote.cache.want = lambda files: wanted.extend(file.address for file in files)  # type: ignore[method-assign]
    spec = pretrain_spec(f"s3://{bucket}/packed", optim={"batch_size": 8})
    loader = training_loader(spec, source, range(40), spec.model, World())
    batches = loader.from_step(0, loader.steps_per_epoch)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert set(wanted) == {f"s3://{bucket}/packed/{shard.name}" for shard in index.shards}


@pytest.mark.parametrize("faults", [Faults(cut_within_bytes=60_000), Faults(chunk_seconds=0.02)], ids=["cut", "slow"])
def test_a_failing_or_slow_storage_is_ridden_through(
    faults: Faults, proxy: ChaosProxy, index: PackedIndex, bucket: str, tmp_path: Path
) -> None:
    with proxy.having(faults):
        assert same_images(in_storage(bucket, endpoint=proxy.url), open_source(str(tmp_path / "packed"), in_chans=3))
    assert proxy.num_faults or not faults.cut_within_bytes


def test_a_storage_that_returns_is_waited_for(proxy: ChaosProxy, index: PackedIndex, bucket: str, tmp_path: Path) -> None:
    source = in_storage(bucket, endpoint=proxy.url)
    proxy.set(Faults(refuse=True))
    source.want(range(40))  # type: ignore[attr-defined]
    while proxy.num_faults < 5:
        pass
    proxy.set(Faults())
    assert same_images(source, open_source(str(tmp_path / "packed"), in_chans=3))


def test_a_storage_that_stays_away_ends_the_run(proxy: ChaosProxy, index: PackedIndex, bucket: str) -> None:
    source = in_storage(bucket, endpoint=proxy.url, seconds=0.5)
    with proxy.having(Faults(refuse=True)), pytest.raises(StorageError, match=r"read s3://.*packed/shard-"):
        source.read(39)


def test_a_shard_that_stays_damaged_or_is_missing_ends_the_run_by_name(seaweedfs: Seaweedfs, index: PackedIndex, bucket: str) -> None:
    """Through the loader: all workers are to hear of it."""
    client, name = seaweedfs.client(), f"packed/{index.shards[1].name}"
    source = in_storage(bucket)
    spec = pretrain_spec(f"s3://{bucket}/packed", optim={"batch_size": 40})
    for content, why in ((None, "is missing"), (bytes(index.shards[1].bytes), "is damaged")):
        client.delete_object(Bucket=bucket, Key=name)
        if content is not None:
            client.put_object(Bucket=bucket, Key=name, Body=content)
        loader = training_loader(spec, source, range(40), spec.model, World())
        list(loader.from_step(0, 1))
        assert loader.skipped.fatal is not None
        assert f"{name} {why}" in loader.skipped.fatal
        assert not loader.skipped.known()


def test_images_below_a_prefix(
    seaweedfs: Seaweedfs, folder: Path, bucket: str, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slower, as is said; listed once for a job, whatever machine it goes on."""
    client = seaweedfs.client()
    for key in listing.find_files(folder, ""):
        client.upload_file(str(folder / key), bucket, f"cells/{key}")
    client.put_object(Bucket=bucket, Key="cells/notes.txt", Body=b"no image")
    expected = FolderSource(folder, 3)
    with caplog.at_level(logging.WARNING):
        source = open_source(f"s3://{bucket}/cells", in_chans=3, remote=reading(bucket))
    assert "each of its 40 images is a request of its own, which is slower" in caplog.text
    assert (list(source.classes), list(source.labels)) == (expected.classes, expected.labels)
    assert same_images(source, expected)
    spec = pretrain_spec(f"s3://{bucket}/cells")
    assert losses(open_run(spec, world=World(), encoder_folder=None, remote=reading(bucket))) == losses(opened(pretrain_spec(folder)))
    client.upload_file(str(folder / expected.keys[0]), bucket, "cells/cat/new.png")
    assert len(open_source(f"s3://{bucket}/cells", in_chans=3, remote=reading(bucket)).keys) == 40
    monkeypatch.setattr(workers_remote, "user_folder", lambda: tmp_path / "another machine")
    assert len(open_source(f"s3://{bucket}/cells", in_chans=3, remote=reading(bucket)).keys) == 40
    assert len(open_source(f"s3://{bucket}/cells", in_chans=3, remote=reading(bucket, prefix="jobs/job2/")).keys) == 41
    with pytest.raises(DataError, match=r"no images below s3://.*/nothing/ .*, and no index\.json of packed ones"):
        open_source(f"s3://{bucket}/nothing", in_chans=3, remote=reading(bucket))


def test_without_workers_nobody_reads_storage() -> None:
    with pytest.raises(DataError, match=r"s3://bucket/packed is read by the service's workers alone"):
        open_source("s3://bucket/packed", in_chans=3)


def test_a_cache_bound_that_is_no_number(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(workers_remote.CACHE_VARIABLE, "plenty")
    with pytest.raises(Exception, match="MAESTRO_DATA_CACHE_GB='plenty' on this machine is no number of gigabytes"):
        reading(bucket)


def test_the_cache_lies_where_it_is_told(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(workers_remote.CACHE_FOLDER_VARIABLE, str(tmp_path / "fast"))
    assert isinstance(reading(bucket).cache, FileCache)
    assert (tmp_path / "fast" / "locks").is_dir()
