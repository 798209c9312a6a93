import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_core import online, rounds
from mae_core.data.skipped import SkippedImages
from mae_core.data.source import LabelledData
from mae_core.errors import DataError, DivergedError
from mae_core.head import HeadEpoch
from mae_core.online import online_evaluation
from mae_core.options import ARCH_SIZES, EvaluationConfig, ModelConfig, NormalizeConfig
from mae_core.vit import Encoder, initialise
from mae_core.world import World
from tests.unit.core_fixtures import SHALLOW, corrupt, finished, image_folder, picture
from tests.unit.threaded_world import by_workers

MODEL = ModelConfig(arch="vit_tiny_patch4", image_size=8)
NORMALIZE = NormalizeConfig(mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCH_SIZES, "tiny", SHALLOW)
    monkeypatch.setattr(rounds, "_MAX_BATCH", 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 pictures, half of them darker: frozen random features tell them apart."""
    image_folder(tmp_path, classes=("dark", "light"), per_class=20)
    for path in sorted((tmp_path / "dark").iterdir()):
        picture(int(path.stem)).point(lambda value: value // 3).save(path)
    return tmp_path


@pytest.fixture
def encoder() -> Encoder:
    encoder = Encoder(MODEL)
    initialise(encoder, torch.Generator().manual_seed(1))
    return encoder


def measuring(
    encoder: Encoder, folder: Path, *, world: World | None = None, limit: float = 0.5, **changes: Any
) -> Generator[None, None, dict[str, float]]:
    labelled = {"source": str(folder), "validation_fraction": 0.25, "max_corrupt_fraction": limit}
    config = EvaluationConfig.model_validate({"labelled": labelled, "knn": 5, "probe_epochs": 20} | changes)
    assert config.labelled is not None
    return online_evaluation(
        encoder,
        LabelledData(config.labelled, in_chans=3),
        config=config,
        normalize=NORMALIZE,
        seed=3,
        world=world or World(),
        num_threads=1,
        skipped=SkippedImages(),
    )


def evaluated(encoder: Encoder, folder: Path, **changes: Any) -> dict[str, float]:
    return finished(measuring(encoder, folder, **changes))[0]


def test_dark_is_told_from_light(encoder: Encoder, folder: Path) -> None:
    assert evaluated(encoder, folder) == {"knn_accuracy": 1.0, "probe_accuracy": 1.0}


def test_only_what_is_asked_for_is_measured(encoder: Encoder, folder: Path) -> None:
    assert list(evaluated(encoder, folder, knn=0, probe_epochs=1)) == ["probe_accuracy"]
    assert list(evaluated(encoder, folder, probe_epochs=0)) == ["knn_accuracy"]


def test_workers_agree_with_one(encoder: Encoder, folder: Path) -> None:
    for path in (folder / "dark").iterdir():
        picture(500 + int(path.stem)).save(path)  # nothing to be told apart: accuracies that could differ
    alone = evaluated(encoder, folder)
    assert 0 < alone["knn_accuracy"] < 1
    assert by_workers(2, lambda world: evaluated(encoder, folder, world=world)) == [alone, alone]


def test_the_training_is_not_disturbed(encoder: Encoder, folder: Path) -> None:
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    random = torch.get_rng_state()
    evaluated(encoder, folder)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert encoder.cls_token.requires_grad


def test_an_encoder_that_has_diverged_ends_no_training(encoder: Encoder, folder: Path) -> None:
    torch.nn.init.constant_(encoder.cls_token, float("nan"))
    found = evaluated(encoder, folder)
    assert list(found) == ["knn_accuracy", "probe_accuracy"]
    assert all(map(math.isnan, found.values()))


def test_unreadable_images_are_left_out_up_to_a_limit(encoder: Encoder, folder: Path) -> None:
    for number in (0, 1, 2, 3):
        corrupt(folder / "light" / f"{number:03d}.png")
    assert evaluated(encoder, folder) == {"knn_accuracy": 1.0, "probe_accuracy": 1.0}
    with pytest.raises(DataError, match=r"images cannot be read, more than evaluation\.labelled\.max_corrupt_fraction 0\.01"):
        evaluated(encoder, folder, limit=0.01)
    for path in folder.rglob("*.png"):
        corrupt(path)
    with pytest.raises(DataError, match=r"evaluation\.labelled: too few images can be read"):
        evaluated(encoder, folder, limit=1.0)


def test_a_probe_that_diverges_on_one_worker_keeps_no_other_waiting(
    encoder: Encoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*_: Any, **__: Any) -> Iterator[HeadEpoch]:
        yield HeadEpoch(1, 1.0, 0.1)
        raise DivergedError("the loss is nan")

    num_rounds = finished(measuring(encoder, folder))[1]
    monkeypatch.setattr(online, "train_head", diverging)
    found, num = finished(measuring(encoder, folder))
    assert math.isnan(found["probe_accuracy"])
    assert found["knn_accuracy"] == 1.0
    assert num == num_rounds == 8 + 3 + 1 + 20  # to train on, held back, neighbours, epochs
