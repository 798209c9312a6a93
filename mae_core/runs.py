"""The run that a spec describes."""

from pathlib import Path

import torch

from mae_core.augmented_probe import AugmentedProbeRun
from mae_core.config import EvaluateSpec, PretrainSpec, ProbeSpec, Spec
from mae_core.evaluate import EvaluateRun
from mae_core.finetune import FinetuneRun
from mae_core.pretrain import PretrainRun
from mae_core.probe import ProbeRun
from mae_core.run import Run
from mae_core.world import World


def open_run(spec: Spec, *, world: World, encoder_folder: Path | None) -> Run:
    """The run that `spec` describes. `encoder_folder` holds the encoder that it names, None for random weights.

    Raises DataError, EncoderError or SpecError.
    """
    torch.set_num_threads(spec.resources.cpus_per_worker)
    if isinstance(spec, PretrainSpec):
        return PretrainRun(spec, world=world)
    if isinstance(spec, ProbeSpec) and spec.data.transform is not None:
        return AugmentedProbeRun(spec, world=world, encoder_folder=encoder_folder)
    if isinstance(spec, ProbeSpec):
        return ProbeRun(spec, world=world, encoder_folder=encoder_folder)
    if isinstance(spec, EvaluateSpec):
        return EvaluateRun(spec, world=world, encoder_folder=encoder_folder)
    return FinetuneRun(spec, world=world, encoder_folder=encoder_folder)
