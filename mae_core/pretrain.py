"""The pretraining run."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from mae_core.config import PretrainSpec
from mae_core.data.loader import MicroBatch
from mae_core.data.source import open_source, split
from mae_core.data.transforms import normalise
from mae_core.errors import DataError
from mae_core.export import write_encoder
from mae_core.loop import Progress, Training, WantsStop
from mae_core.mae import MaskedAutoencoder
from mae_core.optim import pretrain_optimizer
from mae_core.randomness import Stream, uniform
from mae_core.reconstruct import reconstruction_grid
from mae_core.run import TrainedRun, seeded, training_loader
from mae_core.vit import Encoder, initialise
from mae_core.world import World

_NUM_SHOWN = 8  # images in a picture of reconstructions


class PretrainRun(TrainedRun):
    """Masked-autoencoder pretraining. Its result is the encoder alone."""

    def __init__(self, spec: PretrainSpec, *, world: World) -> None:
        self._spec: PretrainSpec = spec
        self._world = world
        self.model, self.metrics = spec.model, {}
        self.normalize = spec.data.normalize_for(spec.model.in_chans)
        self._source = open_source(spec.data.source, in_chans=spec.model.in_chans)
        members, held_back = split(self._source, spec.data.validation_fraction)
        if not members:
            raise DataError(f"data.validation_fraction {spec.data.validation_fraction:g} leaves no image to train on; lower it")
        choice = held_back or members
        self._shown = choice[:: max(len(choice) // _NUM_SHOWN, 1)][:_NUM_SHOWN]  # spread over the classes
        self._mae = MaskedAutoencoder(Encoder(spec.model), masking=spec.masking, decoder=spec.decoder, target=spec.target)
        initialise(self._mae, seeded(spec.seed))
        self._mae.to(world.device)
        self.training = Training(
            module=self._mae,
            optimizer=pretrain_optimizer(self._mae, spec.optim),
            loader=training_loader(spec, self._source, members, spec.model, world),
            optim=spec.optim,
            loss=self._loss,
            world=world,
            max_skipped=spec.data.max_corrupt_fraction,
            save_every=spec.checkpoint.every_steps,
        )

    def _loss(self, replica: nn.Module, micro: MicroBatch) -> Tensor:
        device = self._world.device
        images = normalise(micro.batch.pixels_BHWC.to(device, non_blocking=True), self.normalize)
        samples = micro.batch.samples_B.to(device, non_blocking=True)
        noise = uniform(seed=self._spec.seed, epoch=micro.epoch, stream=Stream.MASK, samples=samples, count=self.model.num_patches)
        loss: Tensor = replica(images, noise).loss
        return loss

    def progress(self, wants_stop: WantsStop) -> Iterator[Progress]:
        for progress in self.training.steps(wants_stop):
            self._keep_last(progress)
            yield progress

    def write_result(self, folder: Path) -> None:
        write_encoder(self._mae.encoder, folder, normalize=self.normalize)

    def write_reconstructions(self, path: Path) -> bool:
        picture = reconstruction_grid(self._mae, self._source, self._shown, normalize=self.normalize, seed=self._spec.seed)
        if picture is not None:
            picture.save(path)
        return picture is not None
