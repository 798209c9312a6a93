"""The pretraining run."""

import logging
from collections.abc import Generator, Sequence
from itertools import chain
from pathlib import Path

from torch import Tensor, nn

from mae_core.config import PretrainSpec
from mae_core.data.loader import MicroBatch
from mae_core.data.packed_source import PackedSource
from mae_core.data.remote import Remote
from mae_core.data.skipped import SkippedImages
from mae_core.data.source import ImageSource, LabelledData, check_same_images, check_units, open_source, split
from mae_core.data.transforms import normalise
from mae_core.encoders import load_encoder
from mae_core.errors import DataError
from mae_core.export import write_encoder
from mae_core.exports.formats import Outcomes
from mae_core.exports.trained import Sample, Trained, sample_of
from mae_core.exports.write import write_exports
from mae_core.loop import Progress, Training, WantsStop
from mae_core.mae import MaskedAutoencoder
from mae_core.online import online_evaluation
from mae_core.optim import pretrain_optimizer
from mae_core.options import DataConfig
from mae_core.parallel import load_whole, shard
from mae_core.provenance import Provenance
from mae_core.randomness import Stream, uniform
from mae_core.reconstruct import reconstructions_of
from mae_core.rounds import newly_skipped, told_in_rounds
from mae_core.run import TrainedRun, seeded, statistics_of, training_loader
from mae_core.vit import Encoder, initialise
from mae_core.world import World

logger = logging.getLogger(__name__)

_NUM_SHOWN = 8  # images in a picture of reconstructions
_EVALUATIONS = 10  # in a run that says nothing of them


class PretrainRun(TrainedRun):
    """Masked-autoencoder pretraining, from random weights or on from those of `encoder_folder`. Its result is the encoder alone."""

    def __init__(self, spec: PretrainSpec, *, world: World, encoder_folder: Path | None = None, remote: Remote | None = None) -> None:
        self._spec: PretrainSpec = spec
        self._world = world
        self.model, self.metrics = spec.model, {}
        self._source = open_source(spec.data.source, in_chans=spec.model.in_chans, remote=remote)
        check_units(self._source, spec.data)
        members, held_back = split(self._source, spec.data.validation_fraction)
        if not members:
            raise DataError(f"data.validation_fraction {spec.data.validation_fraction:g} leaves no image to train on; lower it")
        choice = held_back or members
        self._shown = _shown_of(self._source, choice)
        labelled = spec.evaluation.labelled
        self._labelled = _open_labelled(labelled, spec.model.in_chans, remote) if labelled is not None else None
        self._unreadable = SkippedImages()  # of the labelled ones: each is told once
        check_same_images([self._source, *(self._labelled.sources if self._labelled is not None else ())], world)
        encoder = Encoder(spec.model, activation_checkpointing=spec.parallel.activation_checkpointing)
        self._whole = self._mae = self._new_mae(encoder)
        initialise(self._mae, seeded(spec.seed))
        self.normalize = spec.data.normalize_for(spec.model.in_chans)
        if encoder_folder is not None:
            self._go_on_from(encoder_folder)
        self._mae.to(world.device)
        if spec.parallel.strategy == "fsdp":
            shard(self._mae, world)
        loader = training_loader(spec, self._source, members, spec.model, world, views=spec.masking.num_masks)
        self._is_measured = spec.data.normalize != "auto"
        self.training = Training(
            module=self._mae,
            optimizer=pretrain_optimizer(self._mae, spec.optim),
            loader=loader,
            optim=spec.optim,
            loss=self._loss,
            world=world,
            max_skipped=spec.data.max_corrupt_fraction,
            max_dropped=spec.optim.max_dropped_steps,
            save_every=spec.checkpoint.every_steps,
        )
        self._evaluate_every = (spec.evaluation.every_epochs or max(spec.optim.epochs // _EVALUATIONS, 1)) * loader.steps_per_epoch

    def _new_mae(self, encoder: Encoder) -> MaskedAutoencoder:
        return MaskedAutoencoder(encoder, masking=self._spec.masking, decoder=self._spec.decoder, target=self._spec.target)

    def _go_on_from(self, place: Path) -> None:
        """Takes the weights of a saved encoder and, where they are there and fit, of its decoder."""
        loaded = load_encoder(place, wanted=self.model)
        self._mae.encoder.load_state_dict(loaded.encoder.state_dict())
        if self._spec.data.normalize != "auto":
            self.normalize = statistics_of(self._spec.data, loaded.normalize)
        own = {name: tensor for name, tensor in self._mae.state_dict().items() if not name.startswith("encoder.")}
        saved = loaded.decoder | {"decoder_pos_embed": own["decoder_pos_embed"]}  # fixed, and of this image size
        if saved.keys() == own.keys() and all(tensor.shape == own[name].shape for name, tensor in saved.items()):
            self._mae.load_state_dict(saved, strict=False)
            logger.info("going on from the encoder %s and its decoder", place)
        else:
            why = "does not fit" if loaded.decoder else "is not there"
            logger.info("going on from the encoder %s with a new decoder, as its own %s", place, why)

    def _loss(self, replica: nn.Module, micro: MicroBatch) -> Tensor:
        device = self._world.device
        images = normalise(micro.batch.pixels_BHWC.to(device, non_blocking=True), self.normalize)
        samples = micro.batch.samples_B.to(device, non_blocking=True)
        numbers = uniform(seed=self._spec.seed, epoch=micro.epoch, stream=Stream.MASK, samples=samples, count=self._mae.num_numbers)
        loss: Tensor = replica(images, numbers).loss
        return loss

    def _evaluate(self, wants_stop: WantsStop) -> Generator[Progress, None, bool]:
        """Reconstructions of the same images and, with labels, what a k-NN classifier and a linear probe read from the encoder now."""
        training, spec = self.training, self._spec
        pictures = reconstructions_of(self._mae, self._source, self._shown, normalize=self.normalize, seed=spec.seed)
        evaluated: dict[str, float] | None = {}
        if self._labelled is not None:
            measuring = online_evaluation(
                self._mae.encoder,
                self._labelled,
                config=spec.evaluation,
                normalize=self.normalize,
                seed=spec.seed,
                world=self._world,
                num_threads=spec.resources.cpus_per_worker,
                skipped=self._unreadable,
            )
            evaluated = yield from told_in_rounds(measuring, training, wants_stop)
        if evaluated is None:
            return True
        self._mae.train()
        self.metrics |= evaluated
        epoch = training.step / training.loader.steps_per_epoch
        skipped = newly_skipped(self._unreadable, self._world)
        yield Progress(training.step, training.num_steps, epoch, skipped=skipped, evaluated=evaluated, reconstructions=pictures)
        return False

    def _finish(self) -> None:
        if self._spec.parallel.strategy == "fsdp":
            self._whole = self._new_mae(Encoder(self.model))
            load_whole(self._whole, self._mae)

    def write_result(self, folder: Path) -> None:
        write_encoder(self._whole.encoder, folder, normalize=self.normalize)

    def write_exports(self, folder: Path, made_by: Provenance) -> Outcomes:
        trained = Trained(
            spec=self._spec,
            module=self._whole.encoder,
            mae=self._whole,
            classes=[],
            normalize=self.normalize,
            sample=self._sample(),
            num_images=len(self.training.loader.members),
            metrics=self.metrics,
        )
        return write_exports(trained, folder, made_by=made_by)

    def _sample(self) -> Sample:
        return sample_of(self._source, chain(self._shown, self.training.loader.members), model=self.model, normalize=self.normalize)


def _open_labelled(data: DataConfig, in_chans: int, remote: Remote | None) -> LabelledData:
    try:
        return LabelledData(data, in_chans=in_chans, remote=remote)
    except DataError as error:
        raise DataError(f"evaluation.labelled: {error}") from error


def _shown_of(source: ImageSource, choice: Sequence[int]) -> Sequence[int]:
    """The images of `choice` whose reconstructions are shown: spread over the classes. Packed ones lie mixed, the first in one shard."""
    every = 1 if isinstance(source, PackedSource) else max(len(choice) // _NUM_SHOWN, 1)
    return choice[::every][:_NUM_SHOWN]
