"""`python -m benchmarks.cifar10`: what pretraining is worth, through the service, on CIFAR-10 and two CPU workers.

Pretrains a ViT-Tiny/8 on the 50,000 training images without labels, then fine-tunes it on 1,000 images of each class, against the
same fine-tune from random weights; both are measured on the 10,000 test images. Uses the service that `maestro` uses (`maestro up`).
Prints a JSON line with both accuracies.
"""

import argparse
import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from service.client import Json, MaestroClient
from service.console import connect
from service.watch import watch

DATA = Path(os.environ.get("MAESTRO_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def prepare(folder: Path, *, num_train: int, num_labelled: int, num_test: int) -> dict[str, Path]:
    """Folders of the first images of each class: `train`, `labelled` (of train) and `test`."""
    with tarfile.open(DATA / "cifar10.tar") as archive:
        archive.extractall(folder, filter="data")
    [train] = folder.rglob("train")
    chosen = {"train": (train, num_train), "labelled": (train, num_labelled), "test": (train.parent / "test", num_test)}
    for name, (source, count) in chosen.items():
        for place in sorted(path for path in source.iterdir() if path.is_dir()):
            target = folder / "chosen" / name / place.name
            target.mkdir(parents=True)
            for image in sorted(place.iterdir(), key=lambda path: int(path.stem))[:count]:
                shutil.copy(image, target / image.name)
    return {name: folder / "chosen" / name for name in chosen}


def pretrain_spec(data: Path, *, epochs: int, batch_size: int = 256) -> Json:
    return {
        "kind": "pretrain",
        "name": "cifar10-pretrain",
        "model": {"arch": "vit_tiny_patch8", "image_size": 32},
        "masking": {"ratio": 0.6},
        "decoder": {"depth": 2, "width": 192},
        "data": {"source": str(data), "transform": {"crop_scale": [0.4, 1.0]}},
        "optim": {"epochs": epochs, "batch_size": batch_size, "base_lr": 1e-3, "warmup_epochs": min(1, epochs / 2)},
        "resources": {"num_workers": 2},
        "checkpoint": {"every_steps": 200},
    }


def finetune_spec(name: str, encoder: Json, labelled: Path, test: Path, *, epochs: int, batch_size: int = 128) -> Json:
    return {
        "kind": "finetune",
        "name": name,
        "encoder": encoder,
        "model": {"arch": "vit_tiny_patch8", "image_size": 32},
        "data": {"source": str(labelled), "validation": str(test), "transform": {"crop_scale": [0.4, 1.0]}},
        "optim": {"epochs": epochs, "batch_size": batch_size, "base_lr": 2e-3, "warmup_epochs": min(1, epochs / 2), "layer_decay": 0.85},
        "resources": {"num_workers": 2},
        "checkpoint": {"every_steps": 200},
    }


def compare(client: MaestroClient, folders: dict[str, Path], *, epochs: int, finetune_epochs: int, **batch: int) -> dict[str, Json]:
    """The three jobs, one after the other, each watched to its end."""
    jobs: dict[str, Json] = {}
    jobs["pretrain"] = _run(client, pretrain_spec(folders["train"], epochs=epochs, **batch))
    for name, encoder in (("finetune", {"job": jobs["pretrain"]["id"]}), ("scratch", {"init": "random"})):
        spec = finetune_spec(name, encoder, folders["labelled"], folders["test"], epochs=finetune_epochs, **batch)
        jobs[name] = _run(client, spec)
    return jobs


def line(jobs: dict[str, Json]) -> dict[str, Any]:
    """What was measured."""
    ours, peer = (jobs[name]["metrics"]["val_accuracy"] for name in ("finetune", "scratch"))
    accuracy = {"name": "cifar10", "unit": "accuracy", "ours": ours, "peer": peer, "peer_name": "same fine-tune from random weights"}
    return accuracy | {"ratio": ours / peer, "device": "cpu"}


def _run(client: MaestroClient, spec: Json) -> Json:
    [ended] = watch(client, [client.submit(spec)], console=Console(stderr=True))
    if ended["status"] != "succeeded":
        raise SystemExit(f"job {ended['id']} ({spec['name']}) {ended['status']}: {ended['reason']}: {ended['detail']}")
    return ended


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cifar10", description=__doc__)
    parser.add_argument("--epochs", type=int, default=10, help="of pretraining on the 50,000 images")
    parser.add_argument("--finetune-epochs", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="maestro-cifar10-") as folder, connect() as client:
        folders = prepare(Path(folder), num_train=5000, num_labelled=1000, num_test=1000)
        print(json.dumps(line(compare(client, folders, epochs=given.epochs, finetune_epochs=given.finetune_epochs))))


if __name__ == "__main__":
    main()
