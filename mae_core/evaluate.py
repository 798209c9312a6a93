"""Accuracy on images that a model was not trained on, shared between the workers; and the run that measures it."""

import time
from collections.abc import Generator, Iterator
from pathlib import Path

import torch

from mae_core.classifier import Classifier
from mae_core.config import EvaluateSpec
from mae_core.data.remote import Remote
from mae_core.data.skipped import SkippedImages
from mae_core.data.source import LabelledData
from mae_core.encoders import has_head
from mae_core.errors import EncoderError
from mae_core.loop import CanSave, Progress, WantsStop, always, check_skipped
from mae_core.options import NormalizeConfig
from mae_core.report import Tally
from mae_core.rounds import measured_rounds, newly_skipped, stop_and_wait
from mae_core.run import Run
from mae_core.scorers import HeadScorer, KnnScorer, Scorer
from mae_core.world import World


def accuracy(
    classifier: Classifier, data: LabelledData, *, normalize: NormalizeConfig, world: World, num_threads: int, skipped: SkippedImages
) -> Generator[None, None, dict[str, float]]:
    """`val_accuracy` in [0, 1] of `classifier` over the readable validation images, each seen once, centre-cropped.

    All workers call it, and all get the same; it yields after each round, on all of them. The classifier is left in eval mode. `skipped`
    gets the unreadable images that this worker met. NaN where outputs are no numbers. Raises DataError where none can be read.
    """
    tally = Tally(list(data.classes), world.device)
    labels_N = torch.tensor([data.validation_source.labels[member] for member in data.validation], device=world.device)
    classifier.eval()
    for measured in measured_rounds(
        classifier,
        data.validation_source,
        data.validation,
        model=classifier.encoder.model,
        normalize=normalize,
        world=world,
        num_threads=num_threads,
        skipped=skipped,
    ):
        tally.add(measured.outputs, labels_N[measured.places_B])
        yield
    try:
        return {"val_accuracy": tally.report(world).top1}
    except EncoderError:  # outputs that are no numbers: whether a training has diverged is not for its evaluation to say
        return {"val_accuracy": float("nan")}


class EvaluateRun(Run):
    """A fine-tuned model measured by its head; an encoder without one, or random weights, by k-NN. Its result is the report.

    Raises DataError, EncoderError or SpecError.
    """

    def __init__(self, spec: EvaluateSpec, *, world: World, encoder_folder: Path | None, remote: Remote | None = None) -> None:
        self._spec = spec
        self._world = world
        self._skipped = SkippedImages()
        self.metrics = {}
        self._scorer: Scorer
        if encoder_folder is not None and has_head(encoder_folder):
            self._scorer = HeadScorer(spec, world=world, skipped=self._skipped, folder=encoder_folder, remote=remote)
        else:
            self._scorer = KnnScorer(spec, world=world, skipped=self._skipped, encoder_folder=encoder_folder, remote=remote)
        self.model, self.normalize = self._scorer.model, self._scorer.normalize

    def progress(self, wants_stop: WantsStop, can_save: CanSave = always) -> Iterator[Progress]:
        tally, num_rounds = Tally(self._scorer.classes, self._world.device), self._scorer.num_rounds
        started = time.monotonic()
        for done, told in enumerate(self._scorer.rounds(), start=1):
            if told.scored is not None:
                tally.add(*told.scored)
            skipped, (stop, waited) = newly_skipped(self._skipped, self._world), stop_and_wait(wants_stop, told.wait_seconds, self._world)
            seconds = max(time.monotonic() - started, 1e-9)
            points = [(done, {"data_wait": waited / seconds})]
            yield Progress(done, num_rounds, done / num_rounds, points, skipped, stop_agreed=stop)
            started = time.monotonic()
            if stop:
                return
        self._report = tally.report(self._world)
        self._num_unreadable = self._scorer.num_images - self._report.num_images
        limit = self._spec.data.max_corrupt_fraction
        check_skipped(self._num_unreadable, of=self._scorer.num_images, max_fraction=limit, example="see the images_skipped events")
        self.metrics |= self._report.metrics()
        yield Progress(num_rounds, num_rounds, 1.0, evaluated=self._report.metrics())

    def write_result(self, folder: Path) -> None:
        data = self._spec.data.model_dump(mode="json", include={"source", "validation", "validation_fraction"})
        self._report.write(folder, **self._scorer.settings(), data=data, num_unreadable=self._num_unreadable)
