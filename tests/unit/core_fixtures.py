"""Small data, specs and runs for the tests of mae_core."""

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from mae_core.config import RUN_SPEC, FinetuneSpec, PretrainSpec, ProbeSpec, Spec
from mae_core.data.source import UnreadableImage
from mae_core.options import ModelConfig
from mae_core.run import Run
from mae_core.runs import open_run
from mae_core.world import World

T = TypeVar("T")

torch.set_num_threads(1)  # as a run with one CPU does; two threads on two busy cores wait for each other

TINY = ModelConfig(arch="vit_tiny_patch4", image_size=8)
SHALLOW = (64, 2, 2)  # stands for ARCH_SIZES["tiny"] where whole runs are tested: a step takes milliseconds
_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}


def picture(seed: int, *, width: int = 10, height: int = 10, mode: str = "RGB") -> Image.Image:
    """Random pixels, always the same for a seed."""
    shape = (height, width) if mode == "L" else (height, width, _CHANNELS[mode])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def image_folder(folder: Path, *, classes: Sequence[str] = ("cat", "dog"), per_class: int = 8, mode: str = "RGB") -> Path:
    """A folder with `per_class` PNG images in each class folder."""
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            picture(1000 * place + number, mode=mode).save(folder / name / f"{number:03d}.png")
    return folder


def corrupt(path: Path) -> str:
    """Makes an image unreadable; returns its key, if its folder is a class."""
    path.write_bytes(b"this is no image")
    return f"{path.parent.name}/{path.name}"


class PictureSource:
    """Random pictures in memory, of two classes in turn; the ones in `broken` cannot be read."""

    def __init__(self, num_images: int, *, broken: Sequence[int] = (), size: int = 10) -> None:
        self.keys = [f"picture-{index}" for index in range(num_images)]
        self.classes = ["even", "odd"]
        self.labels = [index % 2 for index in range(num_images)]
        self._broken = frozenset(broken)
        self._size = size

    def read(self, index: int) -> Image.Image:
        if index in self._broken:
            raise UnreadableImage(f"{self.keys[index]}: broken")
        return picture(index, width=self._size, height=self._size)


def spec_of(kind: str, source: Path | str, **changes: Any) -> Spec:
    """A spec of a tiny run; a section in `changes` replaces single fields of the one here."""
    spec: dict[str, Any] = {
        "kind": kind,
        "name": "test",
        "model": {"arch": "vit_tiny_patch4", "image_size": 8, "in_chans": 1 if source == "digits" else 3},
        "data": {"source": str(source), "max_corrupt_fraction": 0.5},
        "optim": {"epochs": 2, "batch_size": 4, "base_lr": 0.02, "warmup_epochs": 0},
        "seed": 3,
    }
    if kind == "pretrain":
        spec |= {"masking": {"ratio": 0.5}, "decoder": {"depth": 1, "width": 32}, "export": {"formats": []}}
    else:
        spec["encoder"] = {"init": "random"}
        spec["data"] |= {"validation_fraction": 0.25} if kind != "embed" else {}
    if kind == "finetune":
        spec["export"] = {"formats": []}
    if kind in ("evaluate", "embed"):
        del spec["optim"]
    for name, value in changes.items():
        spec[name] = {**spec.get(name, {}), **value} if isinstance(value, dict) and name != "encoder" else value
    return RUN_SPEC.validate_python({name: value for name, value in spec.items() if value is not None})


def pretrain_spec(source: Path | str, **changes: Any) -> PretrainSpec:
    spec = spec_of("pretrain", source, **changes)
    assert isinstance(spec, PretrainSpec)
    return spec


def finetune_spec(source: Path | str, **changes: Any) -> FinetuneSpec:
    spec = spec_of("finetune", source, **changes)
    assert isinstance(spec, FinetuneSpec)
    return spec


def probe_spec(source: Path | str, **changes: Any) -> ProbeSpec:
    spec = spec_of("probe", source, **changes)
    assert isinstance(spec, ProbeSpec)
    return spec


def opened(spec: Spec, *, encoder_folder: Path | None = None) -> Run:
    return open_run(spec, world=World(), encoder_folder=encoder_folder)


def losses(run: Run) -> dict[int, float]:
    """Runs to the end; the loss of every step taken."""
    return {step: values["loss"] for progress in run.progress(lambda: False) for step, values in progress.points}


def finished(rounds: Generator[None, None, T]) -> tuple[T, int]:
    """What a measurement in rounds finds, and after how many."""
    num_rounds = 0
    while True:
        try:
            next(rounds)
        except StopIteration as done:
            return done.value, num_rounds
        num_rounds += 1
