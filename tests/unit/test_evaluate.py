import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mae_core import knn, rounds
from mae_core.classifier import Classifier
from mae_core.config import EvaluateSpec
from mae_core.data.skipped import SkippedImages
from mae_core.data.source import LabelledData
from mae_core.errors import DataError, EncoderError, SpecError
from mae_core.evaluate import EvaluateRun, accuracy
from mae_core.export import write_classifier, write_encoder
from mae_core.loop import Progress
from mae_core.options import ARCH_SIZES, DataConfig, ModelConfig, NormalizeConfig
from mae_core.vit import Encoder, initialise, pool
from mae_core.world import World
from tests.unit.core_fixtures import SHALLOW, corrupt, finished, image_folder, picture, spec_of
from tests.unit.threaded_world import by_workers

MODEL = ModelConfig(arch="vit_tiny_patch4", image_size=8)
NORMALIZE = NormalizeConfig(mean=(0.5,) * 3, std=(0.25,) * 3)
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCH_SIZES, "tiny", SHALLOW)
    monkeypatch.setattr(rounds, "_MAX_BATCH", 4)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """8 green and 8 red images of 8 x 8 pixels, each a little different."""
    for name in ("green", "red"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.full((8, 8, 3), COLOURS[name], dtype=np.uint8)
            pixels[0, number] = 128
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def new_encoder() -> Encoder:
    encoder = Encoder(MODEL)
    initialise(encoder, torch.Generator().manual_seed(1))
    return encoder


def colour_classifier(classes: Sequence[str]) -> Classifier:
    """Its head is set to the features that plain images of each class have, so that it knows their colours."""
    classifier = Classifier(new_encoder(), num_classes=len(classes), pooling="mean", generator=torch.Generator())
    colours = torch.tensor([COLOURS[name] for name in classes]).reshape(-1, 3, 1, 1).expand(-1, -1, 8, 8)
    with torch.no_grad():
        features = classifier.fc_norm(pool(classifier.encoder((colours / 255 - 0.5) / 0.25), "mean"))
        classifier.head.weight.copy_(nn.functional.normalize(features - features.mean(dim=0)))
    return classifier


@pytest.fixture
def classifier_folder(tmp_path: Path) -> Path:
    """A model of three classes in an order of its own."""
    (tmp_path / "classifier").mkdir()
    classes = ["red", "blue", "green"]
    write_classifier(colour_classifier(classes), tmp_path / "classifier", classes=classes, normalize=NORMALIZE)
    return tmp_path / "classifier"


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    (tmp_path / "encoder").mkdir()
    write_encoder(new_encoder(), tmp_path / "encoder", normalize=NORMALIZE)
    return tmp_path / "encoder"


def evaluate_spec(source: Path, **changes: Any) -> EvaluateSpec:
    spec = spec_of("evaluate", source, **({"model": None, "encoder": {"file": "/encoder"}} | changes))
    assert isinstance(spec, EvaluateSpec)
    return spec


ALL: dict[str, Any] = {"data": {"validation_fraction": 0}}


def run_of(source: Path, folder: Path | None, *, world: World | None = None, **changes: Any) -> EvaluateRun:
    return EvaluateRun(evaluate_spec(source, **changes), world=world or World(), encoder_folder=folder)


def told(run: EvaluateRun) -> list[Progress]:
    return list(run.progress(lambda: False))


def written(run: EvaluateRun, folder: Path) -> dict[str, Any]:
    told(run)
    folder.mkdir()
    run.write_result(folder)
    content: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return content


def test_each_round_tells_how_long_it_waited_for_images(images: Path, classifier_folder: Path) -> None:
    *rounds_told, _ = told(run_of(images, classifier_folder, **ALL))
    points = [point for each in rounds_told for point in each.points]
    assert [step for step, _ in points] == [each.step for each in rounds_told]
    assert all(0 < values["data_wait"] < 1 for _, values in points)


def test_a_classifier_is_measured_on_all_images_by_the_names_of_their_classes(
    images: Path, classifier_folder: Path, tmp_path: Path
) -> None:
    run = run_of(images, classifier_folder, **ALL)
    report = written(run, tmp_path / "result")
    assert run.metrics == {"top1": 1.0, "mean_per_class": 1.0}
    assert report == {
        "classifier": "head",
        "pooling": "mean",
        "data": {"source": str(images), "validation": None, "validation_fraction": 0.0},
        "num_unreadable": 0,
        "num_images": 16,
        "top1": 1.0,
        "mean_per_class": 1.0,
        "classes": ["red", "blue", "green"],
        "per_class": {"red": {"images": 8, "top1": 1.0}, "green": {"images": 8, "top1": 1.0}},
        "confusion": [[8, 0, 0], [0, 0, 0], [0, 0, 8]],
    }
    with (tmp_path / "result" / "confusion.csv").open(newline="") as file:
        assert list(csv.reader(file))[1] == ["red", "8", "0", "0"]
    assert (run.model, run.normalize, run.resumes) == (MODEL, NORMALIZE, False)


def test_wrong_images_are_confused(images: Path, classifier_folder: Path, tmp_path: Path) -> None:
    for number in range(2):
        (images / "red" / f"{number}.png").write_bytes((images / "green" / f"{number}.png").read_bytes())
    report = written(run_of(images, classifier_folder, **ALL), tmp_path / "result")
    assert report["confusion"] == [[6, 0, 2], [0, 0, 0], [0, 0, 8]]
    assert (report["top1"], report["mean_per_class"]) == (14 / 16, 0.875)


def test_only_held_back_images_are_measured(images: Path, classifier_folder: Path, tmp_path: Path) -> None:
    data = LabelledData(DataConfig(source=str(images), validation_fraction=0.25), in_chans=3)
    assert written(run_of(images, classifier_folder), tmp_path / "part")["num_images"] == len(data.validation)
    other = image_folder(tmp_path / "other", classes=["blue"], per_class=3)  # one class is enough, where a head knows all
    changes = {"data": {"validation": str(other), "validation_fraction": 0}}
    report = written(run_of(images, classifier_folder, **changes), tmp_path / "folder")
    assert list(report["per_class"]) == ["blue"]
    assert report["num_images"] == 3


def test_progress_counts_the_rounds(images: Path, classifier_folder: Path) -> None:
    progress = told(run_of(images, classifier_folder, **ALL))
    assert [(each.step, each.num_steps) for each in progress] == [(1, 4), (2, 4), (3, 4), (4, 4), (4, 4)]
    assert [each.evaluated for each in progress] == [{}] * 4 + [{"top1": 1.0, "mean_per_class": 1.0}]


def test_another_image_size(images: Path, classifier_folder: Path) -> None:
    model = {"arch": "vit_tiny_patch4", "image_size": [12, 8], "in_chans": 3}
    run = run_of(images, classifier_folder, model=model, **ALL)
    told(run)
    assert run.model.image_size == (12, 8)
    assert run.metrics["top1"] == 1.0


def test_classes_that_the_model_does_not_know(images: Path, classifier_folder: Path) -> None:
    image_folder(images, classes=["zebra"], per_class=1)
    with pytest.raises(DataError, match=r"folders that are no class of the model: zebra; it knows 3, such as red, blue, green"):
        run_of(images, classifier_folder, **ALL)


def test_images_without_labels(images: Path, classifier_folder: Path) -> None:
    picture(1).save(images / "loose.png")
    with pytest.raises(DataError, match="has no labels: put the images of each class into a folder of its name"):
        run_of(images, classifier_folder, **ALL)


def test_unreadable_images_are_told_once_and_limited(images: Path, classifier_folder: Path, tmp_path: Path) -> None:
    bad = [corrupt(images / "red" / "3.png"), corrupt(images / "red" / "7.png")]
    run = run_of(images, classifier_folder, **ALL)
    report = written(run, tmp_path / "result")
    assert (report["num_images"], report["num_unreadable"]) == (14, 2)
    assert [key for each in told(run_of(images, classifier_folder, **ALL)) for key in each.skipped] == bad
    with pytest.raises(DataError, match=r"2 of 16 images cannot be read, more than data\.max_corrupt_fraction 0\.1"):
        told(run_of(images, classifier_folder, data={"validation_fraction": 0, "max_corrupt_fraction": 0.1}))


def test_damaged_weights(images: Path, tmp_path: Path) -> None:
    classifier = colour_classifier(["green", "red"])
    torch.nn.init.constant_(classifier.head.bias, float("nan"))
    write_classifier(classifier, tmp_path, classes=["green", "red"], normalize=NORMALIZE)
    with pytest.raises(EncoderError, match="are not numbers; its weights are damaged"):
        told(run_of(images, tmp_path, **ALL))


def test_an_encoder_is_measured_by_its_neighbours(images: Path, encoder_folder: Path, tmp_path: Path) -> None:
    run = run_of(images, encoder_folder, knn=3)
    report = written(run, tmp_path / "result")
    assert run.metrics == {"top1": 1.0, "mean_per_class": 1.0}
    assert (report["classifier"], report["knn"], report["temperature"], report["pooling"]) == ("knn", 3, 0.07, "mean")
    assert report["classes"] == ["green", "red"]


def test_random_weights_are_measured_too(images: Path) -> None:
    run = run_of(images, None, encoder={"init": "random"}, model=MODEL.model_dump())
    assert told(run)[-1].evaluated == run.metrics
    assert run.metrics["top1"] == 1.0


def test_neighbours_need_images_held_back(images: Path, encoder_folder: Path) -> None:
    with pytest.raises(SpecError, match=r"data: the encoder has no head.*: hold some back to measure on, with validation"):
        run_of(images, encoder_folder, **ALL)


def test_no_image_to_compare_with(images: Path, encoder_folder: Path, tmp_path: Path) -> None:
    for path in images.rglob("*.png"):
        corrupt(path)
    other = image_folder(tmp_path / "other", classes=["green", "red"], per_class=1)
    data = {"validation": str(other), "validation_fraction": 0, "max_corrupt_fraction": 1}
    with pytest.raises(DataError, match="none of the images to compare with can be read"):
        told(run_of(images, encoder_folder, data=data))


@pytest.mark.parametrize("kind", ["classifier", "encoder"])
def test_any_number_of_workers_reports_the_same(
    kind: str, images: Path, classifier_folder: Path, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "_QUERIES_PER_ROUND", 3)
    for number, path in enumerate(sorted(images.rglob("*.png"))):
        picture(500 + number).save(path)  # of no colour: hits and misses
    corrupt(images / "green" / "5.png")
    folder = classifier_folder if kind == "classifier" else encoder_folder
    alone = run_of(images, folder, data={"validation_fraction": 0.6})
    told(alone)
    assert 0 < float(str(alone.metrics["top1"])) < 1

    def measured(world: World) -> tuple[Any, list[tuple[int, dict[str, str], dict[str, float]]]]:
        run = run_of(images, folder, data={"validation_fraction": 0.6}, world=world)
        progress = [(each.step, each.skipped, each.evaluated) for each in told(run)]
        return run._report, progress

    for num_workers in (2, 3):
        seen = by_workers(num_workers, measured)
        assert all(each == seen[0] for each in seen)
        assert seen[0][0] == alone._report


@pytest.mark.parametrize("kind", ["classifier", "encoder"])
def test_a_stop_is_agreed(kind: str, images: Path, classifier_folder: Path, encoder_folder: Path) -> None:
    folder = classifier_folder if kind == "classifier" else encoder_folder

    def stops(world: World) -> list[bool]:
        run = run_of(images, folder, world=world, data={"validation_fraction": 0.6})
        progress = list(run.progress(lambda: world.rank == 1))
        assert run.metrics == {}
        return [each.stop_agreed for each in progress]

    assert by_workers(2, stops) == [[True], [True]]


def test_the_accuracy_of_a_finetuning_is_that_of_its_evaluation(images: Path, tmp_path: Path) -> None:
    for path in (images / "red").iterdir():
        picture(500 + int(path.stem)).save(path)
    classifier = colour_classifier(["green", "red"])
    write_classifier(classifier, tmp_path, classes=["green", "red"], normalize=NORMALIZE)
    run = run_of(images, tmp_path, data={"validation_fraction": 0.6})
    told(run)
    data = LabelledData(DataConfig(source=str(images), validation_fraction=0.6), in_chans=3)

    def measured(world: World) -> dict[str, float]:
        return finished(accuracy(classifier, data, normalize=NORMALIZE, world=world, num_threads=1, skipped=SkippedImages()))[0]

    assert by_workers(2, measured) == [{"val_accuracy": run.metrics["top1"]}] * 2
    assert 0 < measured(World())["val_accuracy"] < 1


def test_a_finetuning_that_has_diverged_has_no_accuracy(images: Path) -> None:
    classifier = colour_classifier(["green", "red"])
    torch.nn.init.constant_(classifier.head.bias, float("nan"))
    data = LabelledData(DataConfig(source=str(images), validation_fraction=0.6), in_chans=3)
    measuring = accuracy(classifier, data, normalize=NORMALIZE, world=World(), num_threads=1, skipped=SkippedImages())
    found, num = finished(measuring)
    assert math.isnan(found["val_accuracy"])
    assert num == rounds.num_rounds(len(data.validation), MODEL, World())
