"""Scores of labelled images for each class: by the head of a fine-tuned model, or by k-NN on the features of an encoder.

Shapes: B images, K classes, N all images that are measured.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mae_core.config import EvaluateSpec
from mae_core.data.remote import Remote
from mae_core.data.skipped import SkippedImages
from mae_core.data.source import ImageSource, LabelledData, check_same_images, open_source, split
from mae_core.encoders import load_classifier
from mae_core.errors import DataError, SpecError
from mae_core.features import Features, encode_features
from mae_core.knn import TEMPERATURE, knn_rounds, num_knn_rounds
from mae_core.options import ModelConfig, NormalizeConfig
from mae_core.rounds import Round, measured_rounds, num_rounds
from mae_core.run import starting_encoder, statistics_of
from mae_core.world import World


class Scorer(ABC):
    """num_images: that are to be measured, readable or not. num_rounds: at most so many are made."""

    model: ModelConfig
    normalize: NormalizeConfig
    classes: list[str]
    num_images: int
    num_rounds: int

    def __init__(self, spec: EvaluateSpec, *, world: World, skipped: SkippedImages) -> None:
        self._spec = spec
        self._world = world
        self._skipped = skipped

    @abstractmethod
    def rounds(self) -> Iterator[Round]:
        """Scores of this worker's images, a round at a time; none after a round that only prepares. Raises DataError, EncoderError."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """How it was measured, for the report."""


class HeadScorer(Scorer):
    """A fine-tuned model, by its own head, on the validation images or, where none are held back, on all of the source."""

    def __init__(self, spec: EvaluateSpec, *, world: World, skipped: SkippedImages, folder: Path, remote: Remote | None) -> None:
        super().__init__(spec, world=world, skipped=skipped)
        loaded = load_classifier(folder, wanted=spec.model)
        self._classifier, self.classes = loaded.classifier.to(world.device).eval(), loaded.classes
        self.model = loaded.classifier.encoder.model
        self.normalize = statistics_of(spec.data, loaded.normalize)
        self._source = open_source(spec.data.validation or spec.data.source, in_chans=self.model.in_chans, remote=remote)
        check_same_images([self._source], world)
        held_back = spec.data.validation_fraction
        self._members = split(self._source, held_back)[1] if held_back else list(range(len(self._source.keys)))
        if not self._members:
            raise DataError(f"data.validation_fraction {held_back:g} leaves no image to measure on; raise it")
        self._labels_N = torch.tensor(_labels(self._source, self._members, self.classes, place=spec.data.validation or spec.data.source))
        self.num_images = len(self._members)
        self.num_rounds = num_rounds(self.num_images, self.model, world)

    def rounds(self) -> Iterator[Round]:
        labels_N = self._labels_N.to(self._world.device)
        for measured in measured_rounds(
            self._classifier,
            self._source,
            self._members,
            model=self.model,
            normalize=self.normalize,
            world=self._world,
            num_threads=self._spec.resources.cpus_per_worker,
            skipped=self._skipped,
        ):
            yield Round(measured.wait_seconds, (measured.outputs, labels_N[measured.places_B]))

    def settings(self) -> dict[str, Any]:
        return {"classifier": "head", "pooling": self._classifier.pooling}


def _labels(source: ImageSource, members: Sequence[int], classes: list[str], *, place: str) -> list[int]:
    """Of each member, the model's number for its class: found by the name of its folder."""
    if not source.classes:
        raise DataError(f"data: {place} has no labels: put the images of each class into a folder of its name")
    known = {name: number for number, name in enumerate(classes)}
    unknown = sorted({source.classes[source.labels[member]] for member in members} - known.keys())
    if unknown:
        names, knows = ", ".join(unknown[:5]), ", ".join(classes[:10])
        raise DataError(f"data: {place} has folders that are no class of the model: {names}; it knows {len(classes)}, such as {knows}")
    return [known[source.classes[source.labels[member]]] for member in members]


class KnnScorer(Scorer):
    """An encoder without a head: its nearest training images vote for the class of each validation image."""

    def __init__(
        self, spec: EvaluateSpec, *, world: World, skipped: SkippedImages, encoder_folder: Path | None, remote: Remote | None = None
    ) -> None:
        super().__init__(spec, world=world, skipped=skipped)
        if spec.data.validation is None and not spec.data.validation_fraction:
            raise SpecError(
                "data: the encoder has no head, so images are compared with labelled ones by k-NN: hold some back to measure on, "
                "with validation (a folder) or validation_fraction (such as 0.2)"
            )
        encoder, self.normalize = starting_encoder(spec, encoder_folder, spec.seed)
        self._encoder = encoder.to(world.device)
        self.model = encoder.model
        self._data = LabelledData(spec.data, in_chans=self.model.in_chans, remote=remote)
        check_same_images(self._data.sources, world)
        self.classes = list(self._data.classes)
        self.num_images = len(self._data.validation)
        parts = (len(self._data.train), self.num_images)
        self.num_rounds = sum(num_rounds(part, self.model, world) for part in parts) + num_knn_rounds(self.num_images, world)

    def rounds(self) -> Iterator[Round]:
        train = yield from self._encode(self._data.train_source, self._data.train)
        held_back = yield from self._encode(self._data.validation_source, self._data.validation)
        if not len(train.labels_N):
            raise DataError("data: none of the images to compare with can be read")
        for scored in knn_rounds(train, held_back, k=self._spec.knn, num_classes=len(self.classes), world=self._world):
            yield Round(0.0, scored)

    def _encode(self, source: ImageSource, members: Sequence[int]) -> Generator[Round, None, Features]:
        return encode_features(
            self._encoder,
            source,
            members,
            pooling=self._spec.pooling,
            normalize=self.normalize,
            world=self._world,
            num_threads=self._spec.resources.cpus_per_worker,
            skipped=self._skipped,
            max_corrupt_fraction=self._spec.data.max_corrupt_fraction,
        )

    def settings(self) -> dict[str, Any]:
        k = min(self._spec.knn, len(self._data.train))
        return {"classifier": "knn", "pooling": self._spec.pooling, "knn": k, "temperature": TEMPERATURE}
