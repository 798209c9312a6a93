"""`python -m benchmarks.resume_at`: memory and seconds to resume in the middle of an epoch of up to 100 million packed images.

The index is simulated: shards of 3,000 images that are not there, columns of which only the hashes are filled. A process of its own opens
it, holds back 1 % of the images, makes the loader, and asks for the samples and labels of 100 steps from the middle of the fourth epoch on.
`ours` is until the first of them. The peer is torch's DistributedSampler, advanced to the same place, up to `--peer-up-to` images. Prints a
JSON line for each size; memory is what the process grew by at most.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mae_core.packed import COLUMNS, INDEX, ChannelStatistics, PackedFile, PackedIndex, Shard

_PER_SHARD = 3_000
_BATCH = 4096
_STEPS = 100
_EPOCH = 3
_PIECE = 1_000_000


def simulate(folder: Path, num_images: int) -> None:
    """An index of images that are not there, and its columns."""
    columns = {}
    for name, dtype in COLUMNS.items():
        path = folder / f"{name}.bin"
        size = num_images * np.dtype(dtype).itemsize
        with path.open("wb") as file:
            if name == "hashes":
                for first in range(0, num_images, _PIECE):
                    places = np.arange(first, min(first + _PIECE, num_images), dtype=np.uint64)
                    file.write((places * np.uint64(2**64 // num_images)).astype(dtype).tobytes())
            file.truncate(size)
        columns[name] = PackedFile(name=path.name, bytes=size, sha256="0" * 64)
    shards = [
        Shard(name=f"shard-{first // _PER_SHARD:06d}.tar", bytes=2**26, sha256="0" * 64, num_images=min(_PER_SHARD, num_images - first))
        for first in range(0, num_images, _PER_SHARD)
    ]
    index = PackedIndex(
        made_of="",
        num_images=num_images,
        num_unreadable=0,
        channels=3,
        classes=["cat", "dog"],
        statistics=ChannelStatistics(mean=(0.5,) * 3, std=(0.25,) * 3),
        columns=columns,  # type: ignore[arg-type]
        shards=shards,
    )
    (folder / INDEX).write_text(index.model_dump_json())


def resume(folder: Path) -> dict[str, float]:
    """What it takes to find the samples of the steps, here."""
    from mae_core.data.loader import TrainLoader
    from mae_core.data.packed_source import LocalFiles, PackedSource
    from mae_core.data.skipped import SkippedImages
    from mae_core.data.source import split
    from mae_core.options import ModelConfig, TransformConfig
    from mae_core.world import World

    before, started = _reset_peak(), time.process_time()
    source = PackedSource((folder / INDEX).read_bytes(), LocalFiles(folder), in_chans=3)
    loader = TrainLoader(
        source=source,
        members=split(source, 0.01)[0],
        model=ModelConfig(arch="vit_base_patch16", image_size=224),  # type: ignore[arg-type]
        transform=TransformConfig(),
        seed=1,
        batch_size=min(_BATCH, source.index.num_images // 2),
        accumulation=1,
        world=World(),
        num_threads=1,
        skipped=SkippedImages(),
    )
    first = _EPOCH * loader.steps_per_epoch + loader.steps_per_epoch // 2
    found: list[int] = []
    seconds = []
    for step in range(first, first + _STEPS):
        found += [source.labels[sample] for sample in loader.samples(step, 0).tolist()]
        seconds.append(time.process_time() - started)
    return {"seconds": seconds[0], "seconds_of_all": seconds[-1], "bytes": _peak_bytes() - before, "samples": len(found)}


def resume_peer(num_images: int) -> dict[str, float]:
    """The same by torch's sampler."""
    from torch.utils.data import DistributedSampler

    before, started = _reset_peak(), time.process_time()
    sampler: Any = DistributedSampler(range(num_images), num_replicas=1, rank=0, shuffle=True, seed=1)  # type: ignore[arg-type]
    sampler.set_epoch(_EPOCH)
    rest = islice(sampler, num_images // 2, None)
    found = list(islice(rest, min(_BATCH, num_images // 2)))
    return {"seconds": time.process_time() - started, "bytes": _peak_bytes() - before, "samples": len(found)}


def _reset_peak() -> int:
    """The memory in use now, in bytes; the peak counts from here on."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_bytes()


def _peak_bytes() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def measure(folder: Path, num_images: int, *, peer_up_to: int) -> dict[str, Any]:
    """The line of one size, each way in a process of its own."""
    folder.mkdir()
    simulate(folder, num_images)

    def told(*arguments: str) -> dict[str, float]:
        command = [sys.executable, "-m", "benchmarks.resume_at", *arguments]
        answer: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return answer

    ours = told("--resume", str(folder))
    peer = told("--resume-peer", str(num_images)) if num_images <= peer_up_to else None
    peers = {} if peer is None else {"peer": peer["seconds"], "peer_mib": peer["bytes"] / 2**20, "ratio": peer["seconds"] / ours["seconds"]}
    return {
        "name": "resume_at",
        "unit": "s of the processor",
        "ours": ours["seconds"],
        "ours_of_100_steps": ours["seconds_of_all"],
        "mib": ours["bytes"] / 2**20,
        **peers,
        "peer_name": "torch DistributedSampler",
        "num_images": num_images,
        "index_bytes": (folder / INDEX).stat().st_size,
        "samples": ours["samples"],
        "device": "cpu",
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume_at", description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000_000, 10_000_000, 100_000_000])
    parser.add_argument("--peer-up-to", type=int, default=10_000_000)
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resume-peer", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.resume is not None:
        print(json.dumps(resume(given.resume)))
    elif given.resume_peer is not None:
        print(json.dumps(resume_peer(given.resume_peer)))
    else:
        with tempfile.TemporaryDirectory(prefix="maestro-resume-") as place:
            for num_images in given.images:
                print(json.dumps(measure(Path(place) / str(num_images), num_images, peer_up_to=given.peer_up_to)), flush=True)


if __name__ == "__main__":
    main()
