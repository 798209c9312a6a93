"""What a run of any kind is: what `mae_core.train` and the workers drive.

A run yields `Progress`, can hand out and take up its training state, and at its end writes its result into a folder.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from mae_core.config import FinetuneSpec, PretrainSpec, ProbeSpec
from mae_core.data.loader import SkippedImages, TrainLoader
from mae_core.data.source import ImageSource
from mae_core.errors import SpecError
from mae_core.export import load_encoder
from mae_core.loop import Progress, Training, WantsStop, load_training_state, training_state
from mae_core.options import ModelConfig, NormalizeConfig
from mae_core.vit import Encoder, initialise
from mae_core.world import World

Metrics = dict[str, float | list[float]]


class Run(ABC):
    """A run of one kind. `metrics` are final once `progress` is exhausted."""

    model: ModelConfig
    normalize: NormalizeConfig
    metrics: Metrics

    resumes = False  # whether the kind has a training state; a probe is short enough to start over

    def is_save_due(self, progress: Progress) -> bool:
        """Whether the training state should be saved after this step."""
        return False

    @abstractmethod
    def progress(self, wants_stop: WantsStop) -> Iterator[Progress]:
        """Does the work, yielding as it goes; the same on all workers."""

    def training_state(self) -> dict[str, Tensor]:
        """What resuming needs."""
        raise NotImplementedError

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Goes on from `state`."""
        raise NotImplementedError

    @abstractmethod
    def write_result(self, folder: Path) -> None:
        """Writes what the run is for into an empty folder."""

    def write_reconstructions(self, path: Path) -> bool:
        """Writes a picture of reconstructions as PNG; False where there is none to make."""
        return False


class TrainedRun(Run):
    """What pretraining and fine-tuning share: a training with a state."""

    training: Training
    _spec: PretrainSpec | FinetuneSpec

    resumes = True

    def is_save_due(self, progress: Progress) -> bool:
        return progress.step % self._spec.checkpoint.every_steps == 0 and progress.step < progress.num_steps and not progress.evaluated

    def training_state(self) -> dict[str, Tensor]:
        return training_state(self.training)

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        load_training_state(self.training, state)

    def _keep_last(self, progress: Progress) -> None:
        if progress.points:
            self.metrics |= {"loss": progress.points[-1][1]["loss"]}


def training_loader(
    spec: PretrainSpec | FinetuneSpec, source: ImageSource, members: list[int], model: ModelConfig, world: World
) -> TrainLoader:
    return TrainLoader(
        source=source,
        members=members,
        model=model,
        transform=spec.data.transform,
        seed=spec.seed,
        batch_size=spec.optim.batch_size,
        accumulation=spec.optim.accumulation,
        world=world,
        num_threads=spec.resources.cpus_per_worker,
        skipped=SkippedImages(),
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def starting_encoder(spec: ProbeSpec | FinetuneSpec, folder: Path | None, seed: int) -> tuple[Encoder, NormalizeConfig]:
    """The encoder a probe or fine-tune starts from, and the normalisation of its images (the encoder's, unless the spec gives one)."""
    if folder is not None:
        encoder, normalize = load_encoder(folder, wanted=spec.model)
        try:
            spec.with_model(encoder.model, where=str(folder))
        except ValidationError as error:
            raise SpecError("; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())) from error
        given = spec.data.normalize
        return encoder, given if isinstance(given, NormalizeConfig) else normalize
    assert spec.model is not None, "the spec's own check"
    encoder = Encoder(spec.model)
    initialise(encoder, seeded(seed))
    return encoder, spec.data.normalize_for(spec.model.in_chans)
