"""What an encoder is worth while its pretraining goes on: a k-NN classifier and a linear probe on its features of the moment."""

from collections.abc import Generator

import torch

from mae_core.data.skipped import SkippedImages
from mae_core.data.source import LabelledData
from mae_core.errors import DataError, DivergedError, EncoderError
from mae_core.features import Features, encode_features
from mae_core.head import ProbeHead, head_accuracy, train_head
from mae_core.knn import knn_rounds
from mae_core.options import EvaluationConfig, NormalizeConfig, ProbeOptim
from mae_core.report import Tally
from mae_core.rounds import Round
from mae_core.vit import Encoder
from mae_core.world import World

_PROBE_BATCH = 256


def online_evaluation(
    encoder: Encoder,
    data: LabelledData,
    *,
    config: EvaluationConfig,
    normalize: NormalizeConfig,
    seed: int,
    world: World,
    num_threads: int,
    skipped: SkippedImages,
) -> Generator[Round | None, None, dict[str, float]]:
    """`knn_accuracy` and `probe_accuracy` in [0, 1] on the held-back images, as `config` asks; NaN where the encoder or the probe diverged.

    All workers call it, and all get the same; it yields after each round and each epoch of the probe, on all of them. It draws no global
    random numbers and leaves no gradients; the encoder is left in eval mode. `skipped` gets the unreadable images that this worker met.
    Raises DataError where they are too many, on all workers.
    """
    assert config.labelled is not None
    names = [name for name, wanted in (("knn_accuracy", config.knn), ("probe_accuracy", config.probe_epochs)) if wanted]
    parts = []
    try:
        for source, members in ((data.train_source, data.train), (data.validation_source, data.validation)):
            part = yield from encode_features(
                encoder,
                source,
                members,
                pooling=config.pooling,
                normalize=normalize,
                world=world,
                num_threads=num_threads,
                skipped=skipped,
                max_corrupt_fraction=config.labelled.max_corrupt_fraction,
                section="evaluation.labelled",
            )
            parts.append(part)
    except EncoderError:  # whether a training has diverged is not for its evaluation to say
        return dict.fromkeys(names, float("nan"))
    train, held_back = parts
    if len(train.labels_N) < 2 or not len(held_back.labels_N):
        raise DataError("evaluation.labelled: too few images can be read: two are needed to train a probe, and one to measure it")
    found, num_classes = {}, len(data.classes)
    if config.knn:
        found["knn_accuracy"] = yield from _knn_accuracy(train, held_back, k=config.knn, classes=list(data.classes), world=world)
    if config.probe_epochs:
        probing = _probe_accuracy(train, held_back, epochs=config.probe_epochs, num_classes=num_classes, seed=seed)
        found["probe_accuracy"] = yield from probing
    return found


def _knn_accuracy(train: Features, held_back: Features, *, k: int, classes: list[str], world: World) -> Generator[None, None, float]:
    tally = Tally(classes, world.device)
    for scores_BK, labels_B in knn_rounds(train, held_back, k=k, num_classes=len(classes), world=world):
        tally.add(scores_BK, labels_B)
        yield
    return tally.report(world).top1


def _probe_accuracy(train: Features, held_back: Features, *, epochs: int, num_classes: int, seed: int) -> Generator[None, None, float]:
    optim = ProbeOptim(epochs=epochs, batch_size=min(_PROBE_BATCH, len(train.labels_N)), base_lr=0.1, warmup_epochs=epochs / 10)
    head = ProbeHead(train.features_ND.shape[1], num_classes, torch.Generator().manual_seed(seed)).to(train.features_ND.device)
    training, diverged = train_head(head, train, optim=optim, seed=seed), False
    for _ in range(epochs):  # as many on a worker whose head diverged alone: the others would wait for it
        try:
            next(training, None)
        except DivergedError:
            diverged = True
        yield
    return float("nan") if diverged else head_accuracy(head, held_back)
