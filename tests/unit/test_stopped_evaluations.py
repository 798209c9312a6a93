"""Evaluations in the middle of a training: they can be stopped between two rounds, by all workers alike."""

import threading
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import pytest
import torch

from mae_core import rounds
from mae_core.loop import Progress
from mae_core.options import ARCH_SIZES
from mae_core.run import Run
from mae_core.runs import open_run
from mae_core.world import World
from tests.unit.core_fixtures import SHALLOW, Spec, finetune_spec, image_folder, opened, pretrain_spec
from tests.unit.threaded_world import by_workers

DUE = 2  # the step after which the first evaluation comes
KINDS = pytest.mark.parametrize("kind", ["pretrain", "finetune"])


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCH_SIZES, "tiny", SHALLOW)
    monkeypatch.setattr(rounds, "_MAX_BATCH", 1)


@pytest.fixture
def spec(tmp_path: Path, kind: str) -> Spec:
    """A run that is evaluated in eight rounds or more, after each epoch."""
    folder = image_folder(tmp_path / "images", per_class=12)
    resources, optim = {"num_workers": 2}, {"batch_size": 8}
    if kind == "finetune":
        return finetune_spec(folder, resources=resources, optim=optim, data={"validation_fraction": 1 / 3}, evaluate_every_epochs=1)
    evaluation = {"labelled": {"source": str(folder), "validation_fraction": 1 / 3}, "knn": 3, "probe_epochs": 3, "every_epochs": 1}
    return pretrain_spec(folder, resources=resources, optim=optim, data={"validation_fraction": 1 / 3}, evaluation=evaluation)


@pytest.fixture
def state(spec: Spec) -> dict[str, torch.Tensor]:
    """The training state that was saved just before the first evaluation."""
    run = opened(spec)
    next(progress for progress in run.progress(lambda: False) if progress.step == DUE)
    return run.training_state()


def evaluated(
    spec: Spec, state: dict[str, torch.Tensor], wants_stop: Callable[[], bool], *, world: World | None = None
) -> tuple[Run, list[Progress]]:
    """A run that is taken up from `state`, and what it tells before its next step."""
    run = open_run(spec, world=world or World(), encoder_folder=None)
    run.load_training_state(state)
    return run, list(takewhile(lambda progress: progress.step == DUE, run.progress(wants_stop)))


@KINDS
def test_an_evaluation_tells_progress_by_the_round(spec: Spec, state: dict[str, torch.Tensor]) -> None:
    _, (*by_round, last) = evaluated(spec, state, lambda: False)
    assert len(by_round) >= 8
    assert by_round == [Progress(DUE, 2 * DUE, 1.0)] * len(by_round)
    assert last.evaluated


@KINDS
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_stop_that_one_worker_asks_for_ends_the_evaluation_of_all(spec: Spec, state: dict[str, torch.Tensor], num_workers: int) -> None:
    def stopped(world: World) -> tuple[list[Progress], object]:
        times_asked = iter(range(1000))
        run, told = evaluated(spec, state, lambda: world.rank == num_workers - 1 and next(times_asked) == 1, world=world)
        return told, run.metrics

    expected = [Progress(DUE, 2 * DUE, 1.0), Progress(DUE, 2 * DUE, 1.0, stop_agreed=True)]
    assert by_workers(num_workers, stopped) == [(expected, {})] * num_workers


@KINDS
def test_a_stop_in_the_last_evaluation_is_heard(spec: Spec) -> None:
    wanted, stopped = threading.Event(), []
    for progress in opened(spec).progress(wanted.is_set):
        if progress.step == 2 * DUE:  # the step is over when the stop is asked for
            wanted.set()
            stopped.append(progress.stop_agreed)
    assert stopped == [False, True]
