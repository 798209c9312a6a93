"""What a classifier's guesses are worth: top-1, top-5, per class, and which classes it confuses.

Shapes: B images, K classes.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_core.errors import DataError, EncoderError
from mae_core.world import World

REPORT, CONFUSION = "evaluation.json", "confusion.csv"


class Tally:
    """Guesses counted by one worker."""

    def __init__(self, classes: list[str], device: torch.device) -> None:
        self._classes = classes
        self._confusion_KK = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)
        self._others = torch.zeros(2, dtype=torch.int64, device=device)  # hits among the first five; scores that are not a number

    def add(self, scores_BK: Tensor, labels_B: Tensor) -> None:
        """Counts images with their scores for each class. Of equal scores the first counts as the higher one; -inf is no guess."""
        num_classes = len(self._classes)
        pairs_B = labels_B * num_classes + scores_BK.argmax(dim=1)
        self._confusion_KK += torch.bincount(pairs_B, minlength=num_classes**2).reshape(num_classes, num_classes)
        own_B1 = scores_BK.gather(1, labels_B[:, None])
        before_BK = torch.arange(num_classes, device=labels_B.device) < labels_B[:, None]
        rank_B = ((scores_BK > own_B1) | ((scores_BK == own_B1) & before_BK)).sum(dim=1)
        in_top5 = ((rank_B < 5) & (own_B1[:, 0] > -torch.inf)).sum()
        self._others += torch.stack([in_top5, scores_BK.isnan().any(dim=1).sum()])

    def report(self, world: World) -> "ClassificationReport":
        """All workers' guesses together, on every worker, who all must call.

        Raises DataError where there were no images, EncoderError where a score was not a number.
        """
        confusion_KK, (in_top5, num_nan) = world.sum(self._confusion_KK).tolist(), world.sum(self._others).tolist()
        if num_nan:
            raise EncoderError(f"the model's outputs for {num_nan} image(s) are not numbers; its weights are damaged, name another")
        if not any(map(any, confusion_KK)):
            raise DataError("data: none of the images to measure on can be read")
        return ClassificationReport(self._classes, confusion_KK, in_top5)


@dataclass(frozen=True)
class ClassificationReport:
    """confusion_KK[true][predicted]: images. Accuracies are shares in [0, 1]."""

    classes: list[str]
    confusion_KK: list[list[int]]
    num_in_top5: int

    @property
    def num_images(self) -> int:
        return sum(map(sum, self.confusion_KK))

    @property
    def top1(self) -> float:
        return sum(row[place] for place, row in enumerate(self.confusion_KK)) / self.num_images

    @property
    def per_class(self) -> dict[str, dict[str, float]]:
        """Of each class with images: how many, and the share of them that was recognised."""
        rows = enumerate(zip(self.classes, self.confusion_KK, strict=True))
        return {name: {"images": sum(row), "top1": row[place] / sum(row)} for place, (name, row) in rows if any(row)}

    @property
    def mean_per_class(self) -> float:
        """The mean of the classes' accuracies, in which rare classes count as much as frequent ones."""
        accuracies = [each["top1"] for each in self.per_class.values()]
        return sum(accuracies) / len(accuracies)

    def metrics(self) -> dict[str, float]:
        """`top1`, `mean_per_class` and, of more than five classes, `top5`: with five it would always be 1."""
        top5 = {"top5": self.num_in_top5 / self.num_images} if len(self.classes) > 5 else {}
        return {"top1": self.top1} | top5 | {"mean_per_class": self.mean_per_class}

    def write(self, folder: Path, **measured: Any) -> None:
        """`evaluation.json` with all of it and what was `measured`; `confusion.csv` has a row for each true class."""
        summary = {**measured, "num_images": self.num_images, **self.metrics(), "classes": self.classes, "per_class": self.per_class}
        (folder / REPORT).write_text(json.dumps(summary | {"confusion": self.confusion_KK}) + "\n")
        with (folder / CONFUSION).open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["true \\ predicted", *self.classes])
            writer.writerows([name, *row] for name, row in zip(self.classes, self.confusion_KK, strict=True))
