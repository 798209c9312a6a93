"""The run that a spec describes."""

from pathlib import Path

import torch
from pydantic import ValidationError

from mae_core.augmented_probe import AugmentedProbeRun
from mae_core.config import EmbedSpec, EncoderSpec, EvaluateSpec, PretrainSpec, ProbeSpec, Spec
from mae_core.data.remote import Remote
from mae_core.embed import EmbedRun
from mae_core.encoders import read_model
from mae_core.errors import SpecError
from mae_core.evaluate import EvaluateRun
from mae_core.finetune import FinetuneRun
from mae_core.pretrain import PretrainRun
from mae_core.probe import ProbeRun
from mae_core.run import Run
from mae_core.stores import PartStore
from mae_core.world import World


def open_run(spec: Spec, *, world: World, encoder_folder: Path | None, parts: PartStore | None = None, remote: Remote | None = None) -> Run:
    """The run that `spec` describes. `encoder_folder` (or file) holds the encoder that it names, None for random weights;
    an embedding goes to `parts`; images in object storage come by `remote`.

    Raises DataError, EncoderError or SpecError.
    """
    torch.set_num_threads(spec.resources.cpus_per_worker)
    if isinstance(spec, PretrainSpec):
        return PretrainRun(spec, world=world, encoder_folder=encoder_folder, remote=remote)
    if spec.model is None and encoder_folder is not None:
        spec = _with_model_of(encoder_folder, spec)
    if isinstance(spec, ProbeSpec) and spec.data.transform is not None:
        return AugmentedProbeRun(spec, world=world, encoder_folder=encoder_folder, remote=remote)
    if isinstance(spec, ProbeSpec):
        return ProbeRun(spec, world=world, encoder_folder=encoder_folder, remote=remote)
    if isinstance(spec, EvaluateSpec):
        return EvaluateRun(spec, world=world, encoder_folder=encoder_folder, remote=remote)
    if isinstance(spec, EmbedSpec):
        assert parts is not None, "whoever drives the run gives them"
        return EmbedRun(spec, world=world, encoder_folder=encoder_folder, parts=parts, remote=remote)
    return FinetuneRun(spec, world=world, encoder_folder=encoder_folder, remote=remote)


def _with_model_of(folder: Path, spec: EncoderSpec) -> EncoderSpec:
    """The spec with its encoder's model, and what the recipe says for one of that size. Raises SpecError where it does not fit the data."""
    try:
        return spec.with_model(read_model(folder), where=str(folder))
    except ValidationError as error:
        raise SpecError("; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())) from error
