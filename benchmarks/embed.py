"""`python -m benchmarks.embed`: images/s of an embedding's encoder against timm's model of the same size, and of the whole way to Parquet.

Both encoders have the same weights and see the same images in memory, in turn: ours to pooled features as they are written, timm's by
`forward_features` under `inference_mode`. Figures are medians of images per second: of wall time, and in `cpu` of the process's CPU time.
`whole_path` is a run of kind `embed` over photos: read, decoded, cropped, encoded, written as Parquet; `data_wait` of its time was not the
encoder's.
"""

import argparse
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mae_core.config import EmbedSpec
from mae_core.export import write_encoder
from mae_core.features import features_of
from mae_core.options import ModelConfig
from mae_core.runs import open_run
from mae_core.stores import FolderParts
from mae_core.vit import Encoder, initialise
from mae_core.world import World, autocast
from tests.torchvision_ops import import_torchvision

import_torchvision()
import timm  # noqa: E402  (needs the line above)

DATA = Path(os.environ.get("MAESTRO_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_TOLERANCE = {"cpu": 1e-4, "cuda": 0.1}  # bfloat16 has three digits


def compare(folder: Path, *, model: ModelConfig, batch_size: int, rounds: int) -> dict[str, Any]:
    """Images per second of both encoders, in `rounds` batches each."""
    encoder = Encoder(model)
    initialise(encoder, torch.Generator().manual_seed(0))
    write_encoder(encoder, folder, normalize=EmbedSpec.model_validate(_spec(folder, model)).data.normalize_for(model.in_chans))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(_DEVICE)
    forward = features_of(encoder.eval().to(_DEVICE), "mean")
    images_BCHW = torch.randn(batch_size, model.in_chans, *model.image_size, generator=torch.Generator().manual_seed(1)).to(_DEVICE)

    def ours() -> NDArray[np.float32]:
        with torch.no_grad(), autocast(_DEVICE):
            features: NDArray[np.float32] = forward(images_BCHW).float().flatten(1).cpu().numpy()
        return features

    def peer() -> NDArray[np.float32]:
        with torch.inference_mode(), autocast(_DEVICE):
            features: NDArray[np.float32] = theirs.forward_features(images_BCHW)[:, 1:].mean(dim=1).float().cpu().numpy()
        return features

    difference = float(np.abs(ours() - peer()).max())
    assert difference < _TOLERANCE[_DEVICE.type], difference
    seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
    for number in range(rounds):
        for name, work in (("ours", ours), ("peer", peer)) if number % 2 == 0 else (("peer", peer), ("ours", ours)):
            seconds[name].append(_timed(work))
    wall, cpu = (
        {name: batch_size / statistics.median(each[place] for each in taken) for name, taken in seconds.items()} for place in (0, 1)
    )
    return {
        "name": "embed",
        "unit": "images/s",
        **wall,
        "peer_name": "timm forward_features",
        "ratio": wall["ours"] / wall["peer"],
        "device": _DEVICE.type,
        "cpu": cpu | {"ratio": cpu["ours"] / cpu["peer"]},
        "max_difference": difference,
        "arch": model.arch,
        "image_size": model.image_size,
        "batch_size": batch_size,
        "rounds": rounds,
        "num_threads": torch.get_num_threads(),
    }


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall time and of this process's processors."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def whole_path(photos: Path, folder: Path, *, model: ModelConfig, batch_size: int) -> dict[str, float]:
    """Images per second from photos to a Parquet file, both ends of the run included."""
    run = open_run(
        EmbedSpec.model_validate(_spec(photos, model) | {"batch_size": batch_size}),
        world=World(device=_DEVICE),
        encoder_folder=None,
        parts=FolderParts(folder),
    )
    waits: list[float] = []
    started = time.perf_counter()
    for progress in run.progress(lambda: False):
        waits += [values["data_wait"] for _, values in progress.points]
    seconds = time.perf_counter() - started
    num_images = run.metrics["num_images"]
    assert isinstance(num_images, int)
    return {"images_per_second": num_images / seconds, "data_wait": statistics.mean(waits), "images": num_images}


def _spec(source: Path, model: ModelConfig) -> dict[str, Any]:
    return {
        "kind": "embed",
        "name": "benchmark",
        "encoder": {"init": "random"},
        "model": model.model_dump(),
        "data": {"source": str(source.resolve())},
        "resources": {"cpus_per_worker": torch.get_num_threads()},
    }


def photos(folder: Path, number: int) -> Path:
    """The first photos of the data for tests, in a folder."""
    with tarfile.open(DATA / "imagenet-500.tar") as archive:
        members = [member for member in archive if member.name.endswith(".JPEG")][:number]
        archive.extractall(folder, members, filter="data")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embed", description=__doc__)
    parser.add_argument("--arch", default="vit_base_patch16")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--photos", type=int, default=64, help="of the whole path")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = ModelConfig(arch=given.arch, image_size=given.image_size)
    with tempfile.TemporaryDirectory(prefix="maestro-embed-") as place:
        folder = Path(place)
        images = photos(folder / "photos", given.photos)
        (folder / "encoder").mkdir()
        line = compare(folder / "encoder", model=model, batch_size=given.batch_size, rounds=given.rounds)
        line["whole_path"] = whole_path(images, folder / "parts", model=model, batch_size=given.batch_size)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
