"""`python -m benchmarks.cheap_pretraining`: what partial decoders save of a pretraining, and what a linear probe then reads.

A ViT-Tiny/8 is pretrained on CIFAR-10 by the recipe `small` with its full decoder, and by decoders of cross attention that predict all,
half or a quarter of the masked patches; each encoder is probed with the same labels. Seeds run side by side, one thread each, and every
one takes the ways in turn. Beside it, the processor's seconds of a ViT-B/16 step at 224 pixels with the decoder of the recipe `paper`,
whose share is larger. Prints a JSON line for each partial decoder.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cifar10 import prepare
from benchmarks.cifar10_table import CROP, MODEL
from benchmarks.train_step import our_step
from mae_core.config import RUN_SPEC
from mae_core.options import DecoderConfig, MaskingConfig, ModelConfig
from mae_core.recipes import recipe_fields
from mae_core.runs import open_run
from mae_core.world import World

Json = dict[str, Any]
FULL = "self, all"
DECODERS: dict[str, Json] = {
    FULL: {"attention": "self"},
    "cross, all": {"attention": "cross"},
    "cross, half": {"attention": "cross", "predict_fraction": 0.5},
    "cross, quarter": {"attention": "cross", "predict_fraction": 0.25},
}


def train_and_probe(folders: dict[str, Path], output: Path, way: str, seed: int, epochs: int) -> tuple[float, float]:
    """Processor seconds of the pretraining, and the probe's accuracy."""
    shared: Json = {"name": way, "recipe": "small", "seed": seed, "model": MODEL}
    optim = {"epochs": epochs, "batch_size": 128, "base_lr": 2e-3, "warmup_epochs": 0.5}
    data = {"source": str(folders["train"]), "transform": CROP}
    pretrain = {"kind": "pretrain", "data": data, "optim": optim, "decoder": DECODERS[way], "evaluation": {"every_epochs": epochs}}
    run = open_run(RUN_SPEC.validate_python(shared | pretrain), world=World(), encoder_folder=None)
    started = time.process_time()
    for _ in run.progress(lambda: False):
        pass
    seconds = time.process_time() - started
    output.mkdir(parents=True)
    run.write_result(output)
    labelled = {"source": str(folders["labelled"]), "validation": str(folders["test"])}
    probe = RUN_SPEC.validate_python(shared | {"kind": "probe", "encoder": {"file": str(output)}, "data": labelled})
    probed = open_run(probe, world=World(), encoder_folder=output)
    for _ in probed.progress(lambda: False):
        pass
    accuracy = probed.metrics["val_accuracy"]
    assert isinstance(accuracy, float)
    return seconds, accuracy


def run_seed(folders: dict[str, Path], output: Path, seed: int, epochs: int) -> dict[str, tuple[float, float]]:
    return {way: train_and_probe(folders, output / str(seed) / str(place), way, seed, epochs) for place, way in enumerate(DECODERS)}


def step_seconds(model: ModelConfig, *, batch_size: int, turns: int) -> dict[str, float]:
    """Processor seconds of a pretraining step with each decoder, in turn, after one that does not count."""
    torch.set_num_threads(1)
    fields = recipe_fields("paper", kind="pretrain", size=None)
    images_BCHW = torch.randn(batch_size, model.in_chans, *model.image_size, generator=torch.Generator().manual_seed(1))
    steps = {
        way: our_step(model, MaskingConfig(**fields["masking"]), DecoderConfig(**fields["decoder"] | decoder), images_BCHW, False)
        for way, decoder in DECODERS.items()
    }
    seconds: dict[str, list[float]] = {way: [] for way in DECODERS}
    for turn in range(turns + 1):
        for way, step in steps.items():
            started = time.process_time()
            step()
            seconds[way] += [time.process_time() - started] if turn else []
    return {way: statistics.median(each) for way, each in seconds.items()}


def measure(
    folders: dict[str, Path], output: Path, *, epochs: int, seeds: int, model: ModelConfig, batch_size: int, turns: int
) -> list[Json]:
    """The lines of all partial decoders."""
    steps = step_seconds(model, batch_size=batch_size, turns=turns)
    with multiprocessing.get_context("spawn").Pool(seeds) as pool:
        told = pool.starmap(run_seed, [(folders, output, seed, epochs) for seed in range(seeds)])
    seconds = {way: statistics.mean(seed[way][0] for seed in told) for way in DECODERS}
    accuracies = {way: [seed[way][1] for seed in told] for way in DECODERS}
    return [
        {
            "name": "cheap_pretraining",
            "way": way,
            "unit": "processor seconds",
            "ours": seconds[way],
            "peer": seconds[FULL],
            "peer_name": f"the decoder of the recipe ({FULL})",
            "ratio": seconds[way] / seconds[FULL],
            "probe": {"ours": accuracies[way], "peer": accuracies[FULL]},
            "step": {"arch": model.arch, "ours": steps[way], "peer": steps[FULL], "ratio": steps[way] / steps[FULL]},
            "epochs": epochs,
            "device": "cpu",
        }
        for way in DECODERS
        if way != FULL
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cheap_pretraining", description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--train", type=int, default=1000, help="images of each class to pretrain on")
    parser.add_argument("--labelled", type=int, default=500, help="images of each class with labels")
    parser.add_argument("--test", type=int, default=500, help="test images of each class")
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="maestro-cheap-") as folder:
        folders = prepare(Path(folder) / "data", num_train=given.train, num_labelled=given.labelled, num_test=given.test)
        model = ModelConfig(arch="vit_base_patch16", image_size=224)  # type: ignore[arg-type]
        lines = measure(folders, Path(folder) / "runs", epochs=given.epochs, seeds=given.seeds, model=model, batch_size=8, turns=3)
    for line in lines:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
