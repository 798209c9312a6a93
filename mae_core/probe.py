"""Linear probe: what a linear classifier reads from frozen features (paper, appendix A.1).

Every image is encoded once, centre-cropped, by the workers together; then each trains the same head on all the features.
"""

import statistics
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import torch

from mae_core.config import ProbeSpec
from mae_core.data.remote import Remote
from mae_core.data.skipped import SkippedImages
from mae_core.data.source import LabelledData, check_same_images
from mae_core.export import write_probe
from mae_core.features import Features, encode_features
from mae_core.head import ProbeHead, head_accuracy, steps_per_epoch, train_head
from mae_core.loop import CanSave, Progress, WantsStop, always
from mae_core.options import NormalizeConfig
from mae_core.rounds import Round, newly_skipped, stop_agreed, stop_and_wait
from mae_core.run import Run, starting_encoder
from mae_core.vit import Encoder
from mae_core.world import World


class Probe:
    """Features of all images under one encoder, and the heads trained on them. `accuracy` is that of the newest head."""

    def __init__(self, spec: ProbeSpec, encoder: Encoder, data: LabelledData, *, normalize: NormalizeConfig, world: World) -> None:
        self.heads: list[ProbeHead] = []
        self.accuracy = 0.0
        self._spec = spec
        self._data = data
        self._normalize = normalize
        self._world = world
        self._skipped = SkippedImages()
        self.use_encoder(encoder)

    def use_encoder(self, encoder: Encoder) -> None:
        """Probes another encoder from here on."""
        self._encoder = encoder.to(self._world.device)
        self._features: tuple[Features, Features] | None = None  # to train on, held back

    def train_head(self, seed: int, place: int, wants_stop: WantsStop) -> Iterator[Progress]:
        """Trains the head number `place` of the run, yielding after each part of the encoding and each epoch."""
        optim, num_seeds = self._spec.optim, self._spec.num_seeds
        if self._features is None:
            num_steps = optim.epochs * steps_per_epoch(optim, len(self._data.train))
            for skipped, data_wait, stop in self._encoded(wants_stop):
                points = [(num_steps * place, {"data_wait": data_wait})]  # of the encoding up to here
                yield Progress(num_steps * place, num_steps * num_seeds, 0.0, points, skipped, stop_agreed=stop)
                if stop:
                    return
        assert self._features is not None
        train, held_back = self._features
        num_steps = optim.epochs * steps_per_epoch(optim, len(train.labels_N))  # fewer than before, where some cannot be read
        head = ProbeHead(train.features_ND.shape[1], len(self._data.classes), torch.Generator().manual_seed(seed)).to(self._world.device)
        for epoch, last in enumerate(train_head(head, train, optim=optim, seed=seed), start=1):
            step = num_steps * place + last.step
            evaluated = {}
            if epoch == optim.epochs:
                self.accuracy = head_accuracy(head, held_back)
                evaluated = {"val_accuracy": self.accuracy}
            points, stop = [(step, {"loss": last.loss, "lr": last.lr})], stop_agreed(wants_stop, self._world)
            yield Progress(step, num_steps * num_seeds, float(epoch), points, evaluated=evaluated, stop_agreed=stop)
        self.heads.append(head)

    def _encoded(self, wants_stop: WantsStop) -> Iterator[tuple[dict[str, str], float, bool]]:
        """Fills the features. After each round: newly skipped images, the share of the time waited for images, and whether to stop."""
        started, waited = time.monotonic(), 0.0
        for told in self._encode():
            stop, waited_now = stop_and_wait(wants_stop, told.wait_seconds, self._world)
            waited += waited_now
            yield newly_skipped(self._skipped, self._world), waited / max(time.monotonic() - started, 1e-9), stop

    def _encode(self) -> Generator[Round]:
        """Fills the features, yielding after each round."""
        data, parts = self._data, []
        for source, members in ((data.train_source, data.train), (data.validation_source, data.validation)):
            part = yield from encode_features(
                self._encoder,
                source,
                members,
                pooling=self._spec.pooling,
                normalize=self._normalize,
                world=self._world,
                num_threads=self._spec.resources.cpus_per_worker,
                skipped=self._skipped,
                max_corrupt_fraction=self._spec.data.max_corrupt_fraction,
            )
            parts.append(part)
        self._features = (parts[0], parts[1])


class ProbeRun(Run):
    """A linear probe, for each of some seeds. Its result is the heads and their accuracy."""

    def __init__(self, spec: ProbeSpec, *, world: World, encoder_folder: Path | None, remote: Remote | None = None) -> None:
        self._spec = spec
        self._encoder_folder = encoder_folder
        self.metrics = {}
        encoder, self.normalize = starting_encoder(spec, encoder_folder, spec.seed)
        self.model = encoder.model
        data = LabelledData(spec.data, in_chans=self.model.in_chans, remote=remote)
        check_same_images(data.sources, world)
        self._probe = Probe(spec, encoder, data, normalize=self.normalize, world=world)

    def progress(self, wants_stop: WantsStop, can_save: CanSave = always) -> Iterator[Progress]:
        accuracies: list[float] = []
        for place in range(self._spec.num_seeds):
            seed = self._spec.seed + place
            if place and self._encoder_folder is None:  # each seed measures other random weights
                self._probe.use_encoder(starting_encoder(self._spec, None, seed)[0])
            for progress in self._probe.train_head(seed, place, wants_stop):
                yield progress
                if progress.stop_agreed:
                    return
            accuracies.append(self._probe.accuracy)
        self.metrics = {"val_accuracy": statistics.median(accuracies), "val_accuracy_seeds": accuracies}

    def write_result(self, folder: Path) -> None:
        write_probe(self._probe.heads, folder)
