"""What a training shows of itself to the driver."""

import threading

import pytest

from workers import signals
from workers.signals import Sign, Signals, stacks


@pytest.mark.parametrize(
    ("seconds", "median", "longest", "hangs"),
    [
        (899.0, 0.1, 1.0, False),
        (901.0, 0.1, 1.0, True),
        (901.0, 9.1, 20.0, False),  # slow steps
        (911.0, 9.1, 20.0, True),
        (901.0, 0.1, 301.0, False),  # an evaluation took as long
        (904.0, 0.1, 301.0, True),
    ],
)
def test_when_a_training_hangs(seconds: float, median: float, longest: float, hangs: bool) -> None:
    assert Sign(5, seconds, median, longest, True).hangs(900.0) is hangs


def test_the_sign_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    training = Signals()
    assert training.sign() is None  # it has not begun: what it waits for has other limits
    training.can_regroup = True
    for step, seconds in enumerate((0.0, 2.0, 7.0, 1.0), start=1):
        now += seconds
        training.stepped(step)
    now += 3.0
    assert training.sign() == Sign(4, 3.0, 2.0, 7.0, True)
    training.rested()
    assert training.sign() is None
    now += 1000.0
    training.stepped(5)  # the pause before was none between two steps
    assert training.sign() == Sign(5, 0.0, 2.0, 7.0, True)


def test_stacks_say_where_each_thread_is() -> None:
    begun, ended = threading.Event(), threading.Event()

    def train_worker() -> None:
        begun.set()
        ended.wait()

    threads = [threading.Thread(target=target, name=name) for name, target in (("another", ended.wait), ("trainer", train_worker))]
    for thread in threads:
        thread.start()
    begun.wait()
    told = stacks()
    ended.set()
    for thread in threads:
        thread.join()
    assert told.startswith("thread trainer:\n")  # it goes first, so that no bound cuts it off
    assert "in train_worker\n    ended.wait()" in told
    assert "thread another:\n" in told
    assert len(told) <= signals.MAX_STACKS
