"""`python -m benchmarks.packed`: random crops of 224 pixels of photographs that were packed at 256 pixels, against those of the photographs
themselves: images per second of a core.

Both by our own path, with the same numbers for boxes and flips, in turn, pinned to one core. Rates are of the processor's time.
`differences` are between the two ways' crops of the same boxes, in steps of 255. Prints one JSON line.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.images import TRANSFORM, unpacked
from mae_core.data.listing import FolderImages, list_images
from mae_core.data.loader import stacked
from mae_core.data.pack import Packing, pack
from mae_core.data.source import FolderSource, ImageSource, open_source
from mae_core.data.transforms import NUMBERS_PER_CROP, normalise, random_resized_crop
from mae_core.options import NormalizeConfig
from mae_core.stores import FolderParts

_SIZE = (224, 224)
_BATCH = 32
_NORMALIZE = NormalizeConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

Crops = NDArray[np.float32]


def measure(folder: Path, packed_folder: Path, *, resize: int, num_rounds: int) -> dict[str, Any]:
    """The line. `folder` has the photographs; `packed_folder` is empty."""
    images = FolderImages(folder)
    started = time.process_time()
    how = Packing(resize=resize)
    index = pack(images, list_images(images, None), FolderParts(packed_folder), how, num_processes=1, tell=lambda _: None)
    packing_seconds = time.process_time() - started
    originals, packed = FolderSource(folder, 3), open_source(str(packed_folder), in_chans=3)
    places = {key: place for place, key in enumerate(originals.keys)}
    pairs = [(places[key], place) for place, key in enumerate(packed.keys)]
    uniforms = np.random.default_rng(0).random((num_rounds + 1, len(pairs), NUMBERS_PER_CROP), dtype=np.float32)
    ways: dict[str, Callable[[Sequence[tuple[int, int]], Crops], None]] = {
        "ours": lambda chosen, drawn: _batch(packed, [place for _, place in chosen], drawn),
        "peer": lambda chosen, drawn: _batch(originals, [place for place, _ in chosen], drawn),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(num_rounds + 1):  # the first one warms up
        taken = dict.fromkeys(ways, 0.0)
        for first in range(0, len(pairs), _BATCH):
            for name, way in ways.items():
                started = time.process_time()
                way(pairs[first : first + _BATCH], uniforms[number, first : first + _BATCH])
                taken[name] += time.process_time() - started
        for name in ways if number else ():
            seconds[name].append(taken[name])
    rates = {name: len(pairs) / statistics.median(each) for name, each in seconds.items()}
    differences = [_difference(originals, packed, pair, drawn) for pair, drawn in zip(pairs, uniforms[0], strict=True)]
    return {
        "name": "packed",
        "unit": "images/s of a core",
        "ours": rates["ours"],
        "peer": rates["peer"],
        "peer_name": "our own path from the photographs",
        "ratio": rates["ours"] / rates["peer"],
        "goal": 2.2,
        "resize": resize,
        "bytes_per_image": sum(shard.bytes for shard in index.shards) / index.num_images,
        "bytes_per_photograph": sum((folder / key).stat().st_size for key in originals.keys) / len(originals.keys),
        "packed_per_second": len(pairs) / packing_seconds,
        "differences": {"mean": statistics.mean(differences), "worst": max(differences)},
        "num_images": len(pairs),
        "num_rounds": num_rounds,
        "device": "cpu",
    }


def _batch(source: ImageSource, places: Sequence[int], uniforms: Crops) -> None:
    crops = [random_resized_crop(source.read(place), _SIZE, TRANSFORM, drawn) for place, drawn in zip(places, uniforms, strict=True)]
    normalise(stacked(crops), _NORMALIZE)


def _difference(originals: ImageSource, packed: ImageSource, pair: tuple[int, int], drawn: Crops) -> float:
    """Boxes are whole pixels of each: they differ by up to one."""
    images = originals.read(pair[0]), packed.read(pair[1])
    one, other = (random_resized_crop(image, _SIZE, TRANSFORM, drawn) for image in images)
    return float(np.abs(one.astype(np.int16) - other.astype(np.int16)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packed", description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--resize", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="maestro-packed-") as place, torch.inference_mode():
        photographs = Path(place) / "photographs"
        photographs.mkdir()
        unpacked(photographs, num_images=given.images)
        print(json.dumps(measure(photographs, Path(place) / "packed", resize=given.resize, num_rounds=given.rounds)))


if __name__ == "__main__":
    main()
