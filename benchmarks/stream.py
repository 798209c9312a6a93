"""`python -m benchmarks.stream`: an epoch of training batches from shards in S3, the cache empty, against WebDataset from the same shards.

Both decode and crop by the same code, in as many threads (ours) or processes (WebDataset's DataLoader), and read from a SeaweedFS on this
machine. In turn; rates are by the clock, from the first request to the last batch. `local` is ours from the same shards on disk, `warm`
with the cache of an epoch before. Prints one JSON line.
"""

import argparse
import json
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray

from benchmarks.images import TRANSFORM, unpacked
from mae_core.data.decode import decode_image
from mae_core.data.listing import FolderImages, list_images
from mae_core.data.loader import TrainLoader
from mae_core.data.pack import Packing, pack
from mae_core.data.skipped import SkippedImages
from mae_core.data.source import ImageSource, open_source
from mae_core.data.transforms import NUMBERS_PER_CROP, random_resized_crop
from mae_core.options import ModelConfig
from mae_core.packed import PackedIndex
from mae_core.stores import FolderParts
from mae_core.world import World
from service.local import Seaweedfs, storage_environment
from service.processes import sweep
from workers.contract import StorageRef
from workers.data import S3Place
from workers.objects import ObjectStore
from workers.remote import CACHE_FOLDER_VARIABLE, remote_of

_BUCKET = "stream"
_BATCH = 64
_SIZE = (224, 224)
_MODEL = ModelConfig(arch="vit_base_patch16", image_size=224)  # type: ignore[arg-type]


def measure(
    folder: Path, server: Seaweedfs, bucket: str, *, num_photographs: int, copies: int, threads: int, num_rounds: int
) -> dict[str, Any]:
    """The line. `folder` is empty."""
    os.environ |= storage_environment(server)
    photographs = folder / "photographs"
    photographs.mkdir(parents=True)
    unpacked(photographs, num_images=num_photographs)
    for path in list(photographs.iterdir()):
        for copy in range(1, copies):
            (photographs / f"{copy}-{path.name}").hardlink_to(path)
    images = FolderImages(photographs)
    for store in (FolderParts(folder / "packed"), S3Place(f"s3://{bucket}/packed", folder / "scratch")):
        how = Packing(resize=256, shard_bytes=2**20)
        index = pack(images, list_images(images, None), store, how, num_processes=1, tell=lambda _: None)
    batch_size = min(_BATCH, index.num_images)
    number = iter(range(1000))

    def streamed(cache: str) -> float:
        os.environ[CACHE_FOLDER_VARIABLE] = str(folder / "caches" / cache)
        (folder / "caches").mkdir(exist_ok=True)
        started = time.monotonic()
        remote = remote_of(ObjectStore(StorageRef(endpoint=server.endpoint, bucket=bucket)), "benchmark/")
        source = open_source(f"s3://{bucket}/packed", in_chans=3, remote=remote)
        return _rate(_ours(source, batch_size=batch_size, threads=threads), started)

    def local() -> float:
        started = time.monotonic()
        return _rate(_ours(open_source(str(folder / "packed"), in_chans=3), batch_size=batch_size, threads=threads), started)

    def peer() -> float:
        started = time.monotonic()
        return _rate(_by_webdataset(_urls(server, bucket, index), batch_size=batch_size, processes=threads), started)

    ways: dict[str, Callable[[], float]] = {
        "ours": lambda: streamed(f"cold-{next(number)}"),
        "warm": lambda: streamed("cold-0"),
        "local": local,
        "peer": peer,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(num_rounds):
        for name, way in ways.items():
            rates[name].append(way())
    found = {name: statistics.median(each) for name, each in rates.items()}
    return {
        "name": "stream",
        "unit": "images/s",
        **found,
        "peer_name": "WebDataset through curl, as many processes as our threads",
        "ratio": found["ours"] / found["peer"],
        "of_local": found["ours"] / found["local"],
        "num_images": index.num_images,
        "num_shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "threads": threads,
        "num_rounds": num_rounds,
        "device": "cpu",
    }


def _ours(source: ImageSource, *, batch_size: int, threads: int) -> Iterator[int]:
    loader = TrainLoader(
        source=source,
        members=range(len(source.keys)),
        model=_MODEL,
        transform=TRANSFORM,
        seed=0,
        batch_size=batch_size,
        accumulation=1,
        world=World(),
        num_threads=threads,
        skipped=SkippedImages(),
    )
    return (len(micro.batch.samples_B) for micro in loader.from_step(0, loader.steps_per_epoch))


def _by_webdataset(urls: list[str], *, batch_size: int, processes: int) -> Iterator[int]:
    dataset = webdataset.WebDataset(urls, shardshuffle=16, nodesplitter=webdataset.split_by_node, empty_check=False)
    batches = dataset.shuffle(1000).map(_cropped).batched(batch_size, partial=False)
    loader = webdataset.WebLoader(batches, batch_size=None, num_workers=min(processes, len(urls)))
    return (len(batch) for batch in loader)


def _cropped(sample: dict[str, Any]) -> NDArray[Any]:
    [data] = [sample[name] for name in ("jpg", "jpeg") if name in sample]  # as the photograph's own name ends
    drawn = np.random.default_rng().random(NUMBERS_PER_CROP, dtype=np.float32)
    return random_resized_crop(decode_image(data, 3, name=sample["__key__"]), _SIZE, TRANSFORM, drawn)


def _urls(server: Seaweedfs, bucket: str, index: PackedIndex) -> list[str]:
    client = server.client()
    return [client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": f"packed/{shard.name}"}) for shard in index.shards]


def _rate(batches: Iterator[int], started: float) -> float:
    num_images = sum(batches)
    return num_images / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=__doc__)
    parser.add_argument("--photographs", type=int, default=500)
    parser.add_argument("--copies", type=int, default=4, help="of each, so that there are more shards")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    mark = f"stream-{secrets.token_hex(8)}"
    with tempfile.TemporaryDirectory(prefix="maestro-stream-") as place:
        folder = Path(place)
        server = Seaweedfs(folder / "s3", run=mark, log=folder / "seaweedfs.log", access_key="stream", secret_key=secrets.token_hex(16))
        try:
            server.start()
            server.create_bucket(_BUCKET)
            how = {"num_photographs": given.photographs, "copies": given.copies, "threads": given.threads, "num_rounds": given.rounds}
            print(json.dumps(measure(folder / "data", server, _BUCKET, **how)))
        finally:
            server.stop()
            sweep(mark)


if __name__ == "__main__":
    main()
