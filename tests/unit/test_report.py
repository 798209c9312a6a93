import csv
import json
from pathlib import Path

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from mae_core.errors import DataError, EncoderError
from mae_core.report import ClassificationReport, Tally
from mae_core.world import World
from tests.unit.threaded_world import by_workers

CLASSES = list("abcdefgh")


def random_guesses(num: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(8, (num,), generator=generator)
    scores = torch.randn(num, 8, generator=generator) + torch.nn.functional.one_hot(labels, 8)
    return scores, labels


def report_of(scores: torch.Tensor, labels: torch.Tensor, classes: list[str] = CLASSES) -> ClassificationReport:
    tally = Tally(classes, torch.device("cpu"))
    for part in torch.arange(len(labels)).split(7):
        tally.add(scores[part], labels[part])
    return tally.report(World())


def test_the_figures_are_those_of_scikit_learn() -> None:
    scores, labels = random_guesses()
    report, guesses = report_of(scores, labels), scores.argmax(dim=1)
    assert report.confusion_KK == confusion_matrix(labels, guesses).tolist()
    assert report.metrics() == pytest.approx(
        {
            "top1": (guesses == labels).double().mean().item(),
            "top5": top_k_accuracy_score(labels, scores, k=5),
            "mean_per_class": balanced_accuracy_score(labels, guesses),
        }
    )
    assert report.per_class["c"] == {"images": int((labels == 2).sum()), "top1": (guesses[labels == 2] == 2).double().mean().item()}


def test_workers_count_together() -> None:
    scores, labels = random_guesses()

    def counted(world: World) -> ClassificationReport:
        tally = Tally(CLASSES, world.device)
        tally.add(scores[world.rank :: world.size], labels[world.rank :: world.size])
        return tally.report(world)

    assert by_workers(3, counted) == [report_of(scores, labels)] * 3


def test_a_class_without_images_does_not_count() -> None:
    report = report_of(torch.eye(8)[[0, 0, 3]], torch.tensor([0, 1, 3]))
    assert list(report.per_class) == ["a", "b", "d"]
    assert report.mean_per_class == pytest.approx(2 / 3)


def test_five_classes_have_no_top5() -> None:
    assert report_of(torch.eye(5), torch.arange(5), CLASSES[:5]).metrics() == {"top1": 1.0, "mean_per_class": 1.0}


def test_equal_scores_go_to_the_first_classes() -> None:
    report = report_of(torch.zeros(8, 8), torch.arange(8))
    assert report.metrics() == {"top1": 1 / 8, "top5": 5 / 8, "mean_per_class": 1 / 8}
    assert [row[0] for row in report.confusion_KK] == [1] * 8


def test_what_is_no_guess_is_no_hit() -> None:
    scores = torch.full((2, 8), -torch.inf)
    scores[:, 7] = 1.0
    assert report_of(scores, torch.tensor([7, 0])).metrics()["top5"] == 0.5


def test_outputs_that_are_no_numbers() -> None:
    scores, labels = random_guesses(6)
    scores[2, 3] = float("nan")
    with pytest.raises(EncoderError, match=r"outputs for 1 image\(s\) are not numbers; its weights are damaged"):
        report_of(scores, labels)


def test_no_images() -> None:
    with pytest.raises(DataError, match="none of the images to measure on can be read"):
        report_of(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))


def test_what_is_written(tmp_path: Path) -> None:
    report = report_of(torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 2, 2]), ["ant", "bee, wild", "cat"])
    report.write(tmp_path, classifier="head", num_unreadable=1)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {
        "classifier": "head",
        "num_unreadable": 1,
        "num_images": 4,
        "top1": 0.75,
        "mean_per_class": pytest.approx(2.5 / 3),
        "classes": ["ant", "bee, wild", "cat"],
        "per_class": {"ant": {"images": 1, "top1": 1.0}, "bee, wild": {"images": 1, "top1": 1.0}, "cat": {"images": 2, "top1": 0.5}},
        "confusion": [[1, 0, 0], [0, 1, 0], [0, 1, 1]],
    }
    with (tmp_path / "confusion.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["true \\ predicted", "ant", "bee, wild", "cat"],
            ["ant", "1", "0", "0"],
            ["bee, wild", "0", "1", "0"],
            ["cat", "0", "1", "1"],
        ]
