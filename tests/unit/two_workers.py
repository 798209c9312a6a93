"""One of two worker processes: `python -m tests.unit.two_workers RANK FOLDER`. Writes what it saw of each scenario into FOLDER."""

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mae_core import reconstruct
from mae_core.config import PretrainSpec
from mae_core.errors import MaeError
from mae_core.exports.hf import read_hf
from mae_core.options import ARCH_SIZES
from mae_core.probe import ProbeRun
from mae_core.provenance import provenance
from mae_core.run import Run, TrainedRun
from mae_core.runs import open_run
from mae_core.world import World
from tests.unit.core_fixtures import SHALLOW, Spec, finetune_spec, pretrain_spec, probe_spec

_SLOWLY = {"base_lr": 1e-3}  # AdamW makes a rounding of a tiny gradient a step of full length: not many of them
_SHARDED = {"strategy": "fsdp", "activation_checkpointing": True}
_CROSS = {"attention": "cross", "predict_fraction": 0.5}
_AUGMENTED: dict[str, Any] = {
    "mix": {"mixup": 0.8, "cutmix": 1.0},
    "data": {"transform": {"rand_augment": {"magnitude": 9}, "erase_probability": 0.5}},
}
_LARS = {"optimizer": "lars", "accumulation": 2}


def _evaluation(images: Path) -> dict[str, Any]:
    labelled = {"source": str(images), "validation_fraction": 0.25, "max_corrupt_fraction": 0.5}
    return {"every_epochs": 1, "labelled": labelled, "knn": 3, "probe_epochs": 2}


def scenarios(folder: Path, *, num_workers: int) -> dict[str, Spec]:
    """The same specs for any number of workers."""
    images = folder / "images"
    resources = {"num_workers": num_workers}
    return {
        "pretrain": pretrain_spec(images, optim=_SLOWLY, resources=resources),
        "pretrain-accumulated": pretrain_spec(images, optim=_SLOWLY | {"accumulation": 2}, resources=resources),
        "pretrain-sharded": pretrain_spec(
            images, optim=_SLOWLY | {"accumulation": 2}, resources=resources, parallel=_SHARDED, export={"formats": ["hf-mae"]}
        ),
        "pretrain-cheap": pretrain_spec(images, optim=_SLOWLY, resources=resources, masking={"num_masks": 2}, decoder=_CROSS),
        "pretrain-evaluated": pretrain_spec(images, optim=_SLOWLY, resources=resources, evaluation=_evaluation(images), parallel=_SHARDED),
        "finetune-augmented": finetune_spec(images, optim=_SLOWLY | {"drop_path": 0.5}, resources=resources, **_AUGMENTED),
        "finetune-sharded": finetune_spec(images, optim=_SLOWLY, resources=resources, parallel=_SHARDED, evaluate_every_epochs=1),
        "finetune-last": finetune_spec(images, optim=_SLOWLY, resources=resources, trainable_blocks=1.5),
        "finetune": finetune_spec(images, optim=_SLOWLY, resources=resources, evaluate_every_epochs=1),
        "probe": probe_spec(images, resources=resources, num_seeds=2),
        "probe-augmented": probe_spec(images, optim=_LARS, data={"transform": {"crop": "clamped"}}, resources=resources),
        "corrupt": pretrain_spec(folder / "corrupt", optim=_SLOWLY, resources=resources),
        "too-corrupt": pretrain_spec(folder / "corrupt", resources=resources, data={"max_corrupt_fraction": 0.05}),
        "diverged": pretrain_spec(images, optim={"base_lr": 1e30, "max_dropped_steps": 1}, resources=resources),
        "stopped": finetune_spec(images, resources=resources),
        "blind-sharded": pretrain_spec(images, optim=_SLOWLY, resources=resources, parallel=_SHARDED),
        "poisoned": pretrain_spec(images, optim=_SLOWLY, resources=resources),
        "poisoned-sharded": pretrain_spec(images, optim=_SLOWLY, resources=resources, parallel=_SHARDED),
    }


def outcome(spec: Spec, *, world: World, stop_asked_by: int | None, poisoned_step: int | None = None) -> dict[str, Any]:
    """What one worker sees of one run; only the worker `stop_asked_by` wants it to stop."""
    seen: dict[str, Any] = {"losses": {}, "evaluated": [], "skipped": [], "dropped": [], "error": None, "stopped": False}
    run = open_run(spec, world=world, encoder_folder=None)
    if poisoned_step is not None:
        _poison(run, poisoned_step)
    try:
        for progress in run.progress(lambda: world.rank == stop_asked_by):
            seen["losses"] |= {step: values["loss"] for step, values in progress.points if "loss" in values}
            seen["evaluated"] += [progress.evaluated] if progress.evaluated else []
            seen["skipped"] += progress.skipped
            seen["dropped"] += [(dropped.step, dropped.rank) for dropped in progress.dropped]
            seen["stopped"] = progress.stop_agreed
    except MaeError as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    if isinstance(run, ProbeRun):
        assert run._probe._features is not None
        seen["weights"] = {str(place): head[1].weight.detach() for place, head in enumerate(run._probe.heads)}  # type: ignore[operator, union-attr]
        seen["weights"] |= {f"features-{place}": features.features_ND for place, features in enumerate(run._probe._features)}
    else:
        state = {name: tensor for name, tensor in run.training_state().items() if name.startswith("module.")}
        seen["sharded"] = any(isinstance(tensor, DTensor) for tensor in state.values())
        seen["weights"] = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}
    if isinstance(spec, PretrainSpec) and spec.export.formats and world.rank == 0:  # alone, when the others may have gone
        seen["exported"] = _decoder_exported(run)
    return seen


def _decoder_exported(run: Run) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        run.write_result(Path(folder))
        outcomes = run.write_exports(Path(folder), provenance())
        assert outcomes["hf-mae"].difference == 0, outcomes
        return read_hf(Path(folder) / "hf-mae")


def _poison(run: Run, step: int) -> None:
    """This worker's loss of one step is not a number."""
    assert isinstance(run, TrainedRun)
    training, loss = run.training, run.training._loss
    training._loss = lambda module, micro: loss(module, micro) * (math.nan if training.step + 1 == step else 1.0)


def main(rank: int, folder: Path) -> None:
    ARCH_SIZES["tiny"] = SHALLOW
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name, spec in scenarios(folder, num_workers=2).items():
        if name == "blind-sharded" and rank == 1:  # a worker that cannot read the images to be shown
            reconstruct.measured_batches = lambda *_, **__: iter(())  # type: ignore[assignment]
        poisoned_step = 3 if name.startswith("poisoned") and rank == 1 else None
        seen = outcome(spec, world=World(rank, 2), stop_asked_by=1 if name == "stopped" else None, poisoned_step=poisoned_step)
        torch.save(seen, folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
