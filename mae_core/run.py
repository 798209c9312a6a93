"""What a run of any kind is: what `mae_core.train` and the workers drive.

A run yields `Progress`, can hand out and take up its training state, and at its end writes its result into a folder.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from mae_core.config import EncoderSpec, FinetuneSpec, PretrainSpec
from mae_core.data.loader import TrainLoader
from mae_core.data.skipped import SkippedImages
from mae_core.data.source import ImageSource
from mae_core.data.statistics import channel_statistics
from mae_core.encoders import load_encoder
from mae_core.errors import SpecError
from mae_core.exports.formats import Outcomes
from mae_core.loop import CanSave, Progress, Training, WantsStop, always, load_training_state, training_state
from mae_core.options import DataConfig, ModelConfig, NormalizeConfig
from mae_core.provenance import Provenance
from mae_core.stores import StoredFile
from mae_core.vit import Encoder, initialise
from mae_core.world import World

Metrics = dict[str, float | list[float]]


class Run(ABC):
    """A run of one kind. `metrics` are final once `progress` is exhausted."""

    model: ModelConfig
    normalize: NormalizeConfig
    metrics: Metrics
    stored: Mapping[str, StoredFile] = MappingProxyType({})  # files of the result that were stored as the run went

    resumes = False  # whether the kind has a training state; a probe is short enough to start over

    @abstractmethod
    def progress(self, wants_stop: WantsStop, can_save: CanSave = always) -> Iterator[Progress]:
        """Does the work, yielding as it goes; the same on all workers. `can_save`: whether this worker could save a training state now."""

    def training_state(self) -> dict[str, Tensor]:
        """What resuming needs: named tensors, the run's own and not copies."""
        raise NotImplementedError

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Goes on from `state`."""
        raise NotImplementedError

    @abstractmethod
    def write_result(self, folder: Path) -> None:
        """Writes what the run is for into an empty folder."""

    def write_exports(self, folder: Path, made_by: Provenance) -> Outcomes:
        """Writes the result in further formats below `folder`, which holds it, each tested; says what became of each.

        Raises EncoderError where the result itself fails its test.
        """
        return {}


class TrainedRun(Run):
    """What runs that are trained step by step share: evaluations on a schedule, and a training state.

    A subclass sets `training`, `_world`, `normalize` and `_evaluate_every`, in steps.
    """

    training: Training
    _world: World
    _evaluate_every: int
    _is_measured = True  # False: `normalize` only stands in until the run begins, or finds its statistics in a training state

    resumes = True

    def progress(self, wants_stop: WantsStop, can_save: CanSave = always) -> Iterator[Progress]:
        training = self.training
        if not self._is_measured:
            self.normalize, self._is_measured = self._channel_statistics(), True
        # A state is saved before its step is evaluated: who died between the two evaluates first.
        is_due = training.step > 0 and (training.step % self._evaluate_every == 0 or training.step == training.num_steps)
        if is_due and (yield from self._evaluate(wants_stop)):
            return
        for progress in training.steps(wants_stop, can_save):
            finite = [values["loss"] for _, values in progress.points if math.isfinite(values["loss"])]
            self.metrics |= {"loss": finite[-1]} if finite else {}
            yield progress
            if progress.stop_agreed:
                return
            is_due = progress.step % self._evaluate_every == 0 or progress.step == progress.num_steps
            if is_due and (yield from self._evaluate(wants_stop)):
                return
        self._finish()

    @abstractmethod
    def _evaluate(self, wants_stop: WantsStop) -> Generator[Progress, None, bool]:
        """Measures and tells; True where the workers agreed to stop before it was done."""

    def _finish(self) -> None:
        """Called on all workers behind the last evaluation, while they can still exchange tensors."""

    def training_state(self) -> dict[str, Tensor]:
        return training_state(self.training) | {"normalize": self._statistics()}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        load_training_state(self.training, {name: tensor for name, tensor in state.items() if name != "normalize"})
        mean, std = state["normalize"].tolist()
        if min(std) > 0:
            self.normalize, self._is_measured = NormalizeConfig(mean=tuple(mean), std=tuple(std)), True

    def _statistics(self) -> Tensor:
        """float64 (2, channels): mean and deviation; zeros until they are measured."""
        known = torch.tensor([self.normalize.mean, self.normalize.std], dtype=torch.float64)
        return known if self._is_measured else torch.zeros_like(known)

    def _channel_statistics(self) -> NormalizeConfig:
        loader = self.training.loader
        return channel_statistics(
            loader.source,
            loader.members,
            in_chans=loader.model.in_chans,
            world=self._world,
            num_threads=loader.num_threads,
            skipped=loader.skipped,
        )


def training_loader(
    spec: PretrainSpec | FinetuneSpec, source: ImageSource, members: Sequence[int], model: ModelConfig, world: World, *, views: int = 1
) -> TrainLoader:
    """The loader of a run that makes `views` images of a batch out of each decoded one."""
    return TrainLoader(
        source=source,
        members=members,
        model=model,
        transform=spec.data.transform,
        seed=spec.seed,
        batch_size=spec.optim.batch_size // views,
        accumulation=spec.optim.accumulation,
        world=world,
        num_threads=spec.resources.cpus_per_worker,
        skipped=SkippedImages(),
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def starting_encoder(spec: EncoderSpec, folder: Path | None, seed: int) -> tuple[Encoder, NormalizeConfig]:
    """The encoder a probe or fine-tune starts from, and the normalisation of its images (the encoder's, unless the spec gives one)."""
    if folder is not None:
        loaded = load_encoder(folder, wanted=spec.model)
        return loaded.encoder, statistics_of(spec.data, loaded.normalize)
    assert spec.model is not None, "the spec's own check"
    encoder = Encoder(spec.model)
    initialise(encoder, seeded(seed))
    return encoder, spec.data.normalize_for(spec.model.in_chans)


def statistics_of(data: DataConfig, saved: NormalizeConfig | None) -> NormalizeConfig:
    """How images of a saved encoder are normalised: as the spec says, else as the encoder's own were. Raises SpecError without either."""
    known = data.normalize if isinstance(data.normalize, NormalizeConfig) else saved
    if known is None:
        raise SpecError("data.normalize: the encoder's files say no mean and standard deviation of its channels; give them, as {mean, std}")
    return known
