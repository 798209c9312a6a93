"""`python -m benchmarks.images`: photographs in JPEG files → random crops of 224 pixels, flipped, normalised: images per second of a core.

Ours against the ways of other libraries, all with the same files, boxes and flips, in turn, pinned to one core. Rates are of the
processor's time. Prints one JSON line. `peer` is the fastest way that is antialiased. `differences` are from Pillow's bicubic filter
behind a whole decode, in steps of 255: their mean, and the mean of the image that differs most.
"""

import argparse
import json
import os
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mae_core.data.decode import read_image
from mae_core.data.loader import stacked
from mae_core.data.transforms import NUMBERS_PER_CROP, crop_box, normalise, random_resized_crop
from mae_core.options import NormalizeConfig, TransformConfig

DATA = Path(os.environ.get("MAESTRO_TEST_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
PEER = "simplejpeg (fast DCT) + torch bilinear, antialiased"

_SIZE = (224, 224)
_BATCH = 32
TRANSFORM = TransformConfig()
_NORMALIZE = NormalizeConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

Uniform = NDArray[np.float32]
Crop = NDArray[np.uint8]  # (H, W, 3)
Way = Callable[[Path, Uniform], Crop]


def ours(path: Path, uniform: Uniform) -> Crop:
    return random_resized_crop(read_image(path, 3), _SIZE, TRANSFORM, uniform)  # type: ignore[return-value]  # JPEGs are uint8


def by_pillow(path: Path, uniform: Uniform) -> Crop:
    with Image.open(path) as image:
        crop = image.convert("RGB").crop(_box(image.width, image.height, uniform)).resize(_SIZE, Image.Resampling.BICUBIC)
    return np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if _is_flipped(uniform) else crop)


def by_torch(decode: Callable[[bytes], Crop], mode: str) -> Way:
    def way(path: Path, uniform: Uniform) -> Crop:
        crop_1CHW = torch.from_numpy(np.ascontiguousarray(_cut(decode(path.read_bytes()), uniform))).permute(2, 0, 1)[None]
        resized_1CHW = torch.nn.functional.interpolate(crop_1CHW, _SIZE, mode=mode, antialias=True)
        return (resized_1CHW.flip(3) if _is_flipped(uniform) else resized_1CHW)[0].permute(1, 2, 0).numpy()

    return way


def by_cv2(decode: Callable[[bytes], Crop], interpolation: int) -> Way:
    def way(path: Path, uniform: Uniform) -> Crop:
        resized = cv2.resize(_cut(decode(path.read_bytes()), uniform), _SIZE, interpolation=interpolation)
        return cv2.flip(resized, 1) if _is_flipped(uniform) else resized  # type: ignore[return-value]

    return way


def _fast(data: bytes) -> Crop:
    return simplejpeg.decode_jpeg(data, fastdct=True)  # type: ignore[no-any-return]


def _exact(data: bytes) -> Crop:
    return simplejpeg.decode_jpeg(data)  # type: ignore[no-any-return]


def _decode_by_cv2(data: bytes) -> Crop:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)  # type: ignore[return-value]


def _box(width: int, height: int, uniform: Uniform) -> tuple[int, int, int, int]:
    return crop_box(width, height, TRANSFORM, uniform)


def _cut(pixels: Crop, uniform: Uniform) -> Crop:
    left, top, right, bottom = _box(pixels.shape[1], pixels.shape[0], uniform)
    return pixels[top:bottom, left:right]


def _is_flipped(uniform: Uniform) -> bool:
    return bool(uniform[-1] < 0.5)


WAYS: dict[str, Way] = {
    "ours": ours,
    PEER: by_torch(_fast, "bilinear"),
    "simplejpeg (fast DCT) + torch bicubic, antialiased": by_torch(_fast, "bicubic"),
    "simplejpeg + torch bicubic, antialiased": by_torch(_exact, "bicubic"),
    "simplejpeg (fast DCT) + cv2 area": by_cv2(_fast, cv2.INTER_AREA),
    "simplejpeg (fast DCT) + cv2 linear, not antialiased": by_cv2(_fast, cv2.INTER_LINEAR),
    "cv2 linear, not antialiased": by_cv2(_decode_by_cv2, cv2.INTER_LINEAR),
    "PIL": by_pillow,
}


def measure(paths: list[Path], *, num_rounds: int) -> dict[str, Any]:
    """The JSON line of `num_rounds` times all `paths` by each way, batch by batch in changing turns, behind a round that does not count."""
    uniforms = np.random.default_rng(0).random((len(paths), NUMBERS_PER_CROP), dtype=np.float32)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(1 + num_rounds):
        taken = dict.fromkeys(WAYS, 0.0)
        for first in range(0, len(paths), _BATCH):
            chosen, names = slice(first, first + _BATCH), list(WAYS)
            random.shuffle(names)  # what ran before leaves its mark on caches and memory
            for name in names:
                started = time.process_time()
                _batch(WAYS[name], paths[chosen], uniforms[chosen])
                taken[name] += time.process_time() - started
        if number:
            for name in WAYS:
                seconds[name].append(taken[name])
    rates = {name: len(paths) / statistics.median(each) for name, each in seconds.items()}
    return {
        "name": "images",
        "unit": "images/s of a core",
        "ours": rates["ours"],
        "peer": rates[PEER],
        "peer_name": PEER,
        "ratio": rates["ours"] / rates[PEER],
        "device": "cpu",
        "others": {name: rate for name, rate in rates.items() if name not in ("ours", PEER)},
        "differences": {
            name: {"mean": statistics.mean(each), "worst": max(each)}
            for name, each in differences(paths, uniforms, [name for name in WAYS if name != "PIL"]).items()
        },
        "num_images": len(paths),
        "num_rounds": num_rounds,
    }


def _batch(way: Way, paths: list[Path], uniforms: Uniform) -> Tensor:
    return normalise(stacked([way(path, uniform) for path, uniform in zip(paths, uniforms, strict=True)]), _NORMALIZE)


def differences(paths: list[Path], uniforms: Uniform, names: Iterable[str]) -> dict[str, list[float]]:
    """The mean difference of each image from PIL's, by each of the named ways."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for path, uniform in zip(paths, uniforms, strict=True):
        expected = by_pillow(path, uniform).astype(np.int16)
        for name, each in found.items():
            each.append(float(np.abs(WAYS[name](path, uniform) - expected).mean()))
    return found


def unpacked(folder: Path, *, num_images: int) -> list[Path]:
    """The first photographs of the data, as files in `folder`."""
    with tarfile.open(DATA / "imagenet-500.tar") as tar:
        members = [member for member in tar if member.isfile()][:num_images]
        for member in members:
            member.name = Path(member.name).name
        tar.extractall(folder, members, filter="data")
    return [folder / member.name for member in members]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images", description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory(prefix="maestro-images-") as place, torch.inference_mode():
        print(json.dumps(measure(unpacked(Path(place), num_images=given.images), num_rounds=given.rounds)))


if __name__ == "__main__":
    main()
