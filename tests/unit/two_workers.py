"""One of two worker processes: `python -m tests.unit.two_workers RANK FOLDER`. Writes what it saw of each scenario into FOLDER."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mae_core.errors import MaeError
from mae_core.options import ARCH_SIZES
from mae_core.probe import ProbeRun
from mae_core.runs import open_run
from mae_core.world import World
from tests.unit.core_fixtures import SHALLOW, Spec, finetune_spec, pretrain_spec, probe_spec

_SLOWLY = {"base_lr": 1e-3}  # AdamW makes a rounding of a tiny gradient a step of full length: not many of them


def scenarios(folder: Path, *, num_workers: int) -> dict[str, Spec]:
    """The same specs for any number of workers."""
    images = folder / "images"
    resources = {"num_workers": num_workers}
    return {
        "pretrain": pretrain_spec(images, optim=_SLOWLY, resources=resources),
        "pretrain-accumulated": pretrain_spec(images, optim=_SLOWLY | {"accumulation": 2}, resources=resources),
        "finetune": finetune_spec(images, optim=_SLOWLY, resources=resources, evaluate_every_epochs=1),
        "probe": probe_spec(images, resources=resources, num_seeds=2),
        "corrupt": pretrain_spec(folder / "corrupt", optim=_SLOWLY, resources=resources),
        "too-corrupt": pretrain_spec(folder / "corrupt", resources=resources, data={"max_corrupt_fraction": 0.05}),
        "diverged": pretrain_spec(images, optim={"base_lr": 1e30}, resources=resources),
        "stopped": finetune_spec(images, resources=resources),
    }


def outcome(spec: Spec, *, world: World, stop_asked_by: int | None) -> dict[str, Any]:
    """What one worker sees of one run; only the worker `stop_asked_by` wants it to stop."""
    seen: dict[str, Any] = {"losses": {}, "evaluated": [], "skipped": [], "error": None, "stopped": False}
    run = open_run(spec, world=world, encoder_folder=None)
    try:
        for progress in run.progress(lambda: world.rank == stop_asked_by):
            seen["losses"] |= {step: values["loss"] for step, values in progress.points}
            seen["evaluated"] += [progress.evaluated] if progress.evaluated else []
            seen["skipped"] += progress.skipped
            seen["stopped"] = progress.stop_agreed
    except MaeError as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    if spec.kind == "probe":
        assert isinstance(run, ProbeRun)
        assert run._probe._features is not None
        seen["weights"] = {str(place): head[1].weight.detach() for place, head in enumerate(run._probe.heads)}  # type: ignore[operator, union-attr]
        seen["weights"] |= {f"features-{place}": tensor for place, tensor in enumerate(run._probe._features)}
    else:
        seen["weights"] = {name: tensor for name, tensor in run.training_state().items() if name.startswith("module.")}
    return seen


def main(rank: int, folder: Path) -> None:
    ARCH_SIZES["tiny"] = SHALLOW
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name, spec in scenarios(folder, num_workers=2).items():
        seen = outcome(spec, world=World(rank, 2), stop_asked_by=1 if name == "stopped" else None)
        torch.save(seen, folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
