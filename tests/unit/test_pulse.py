"""Who is missed, and when a training hangs. Ray's actors and calls are stand-ins."""

from types import SimpleNamespace
from typing import Any

import pytest

from workers import pulse
from workers.contract import Reason
from workers.pulse import HungError, Pulse
from workers.signals import Sign


class Worker:
    """Stands for an actor's handle, and for its calls; `answers` is whether Ray would find their results."""

    def __init__(self, sign: Sign | None = None) -> None:
        self.answers, self.sign = True, sign
        self.answer = SimpleNamespace(remote=lambda: self)
        self.stacks = SimpleNamespace(remote=lambda: self)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)

    def wait(calls: list[Worker], *, timeout: float, num_returns: int = 1) -> tuple[list[Any], list[Any]]:
        return [call for call in calls if call.answers], [call for call in calls if not call.answers]

    monkeypatch.setattr(pulse.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(pulse.ray, "wait", wait)
    monkeypatch.setattr(pulse.ray, "get", lambda call: call.sign)
    monkeypatch.setattr(pulse, "lost_machines", lambda machines: set(machines) & clock.lost)
    clock.lost = set()
    return clock


def test_a_process_that_answers_no_more_is_told_after_minutes(clock: SimpleNamespace) -> None:
    workers = {0: Worker(), 1: Worker()}
    asked = Pulse(workers, {0: "a", 1: "b"})
    clock.now += 700.0  # the driver was held up itself: the answers are there
    assert asked.silent([0, 1]) == []
    workers[1].answers = False
    clock.now += 599.0
    assert asked.silent([0, 1]) == []
    clock.now += 2.0
    [failure] = asked.silent([0, 1])
    assert (failure.reason, failure.rank) == (Reason.WORKER_DIED, 1)
    assert asked.silent([0]) == []  # who has ended is not asked


def test_a_process_on_a_machine_that_is_lost_is_told_after_seconds(clock: SimpleNamespace) -> None:
    workers = {0: Worker(), 1: Worker()}
    asked = Pulse(workers, {0: "a", 1: "b"})
    workers[1].answers = False
    clock.lost = {"a", "b"}
    clock.now += 9.0
    assert asked.silent([0, 1]) == []
    clock.now += 2.0
    assert [failure.rank for failure in asked.silent([0, 1])] == [1]  # who answers is there, whatever a look says


def test_a_training_that_hangs_is_told_with_all_stacks(clock: SimpleNamespace) -> None:
    workers = {0: Worker(), 1: Worker(), 2: Worker()}
    asked = Pulse(workers, {0: "a", 1: "a", 2: "b"})
    asked.silent([0, 1, 2])
    asked.check_steps(60.0)  # no step is due
    workers[0].sign = Sign(5, 59.0, 0.1, 1.0, True)
    asked.silent([0, 1, 2])
    asked.check_steps(60.0)
    workers[0].sign = hanging = Sign(5, 61.0, 0.1, 1.0, True)
    asked.silent([0, 1, 2])
    workers[1].answers = False
    with pytest.raises(HungError) as caught:
        asked.check_steps(60.0)
    assert (caught.value.reason, caught.value.rank, caught.value.step, caught.value.seconds) == (Reason.HUNG, 1, 5, 61.0)
    assert caught.value.stacks == {0: hanging, 1: "it does not answer", 2: None}


def test_rank_0_that_is_stopped_does_not_hide_that_no_step_comes(clock: SimpleNamespace) -> None:
    """It was well when it last said how the training goes, and says nothing since."""
    workers = {0: Worker(Sign(5, 1.0, 0.1, 1.0, True)), 1: Worker()}
    asked = Pulse(workers, {0: "a", 1: "a"})
    asked.silent([0, 1])
    workers[0].answers = False
    clock.now += 58.0
    asked.silent([0, 1])
    asked.check_steps(60.0)
    clock.now += 2.0
    with pytest.raises(HungError) as caught:
        asked.check_steps(60.0)
    assert (caught.value.rank, caught.value.step, caught.value.seconds) == (0, 5, 61.0)
