"""Who gets which rank, and how the driver watches a training. Ray's calls are stand-ins."""

from types import SimpleNamespace
from typing import Any

import pytest

from workers import group
from workers.contract import Reason
from workers.failures import RunFailedError
from workers.group import Place, posts_of
from workers.signals import Sign

ADDRESSES = {"a": "10.0.0.1", "b": "10.0.0.2"}


def test_ranks_go_machine_by_machine_and_gpu_by_gpu() -> None:
    places = [Place("b", 5, "10"), Place("a", 6, "0"), Place("b", 7, "9"), Place("a", 8, "1"), Place("b", 9, "2")]
    posts = posts_of(places, ADDRESSES)
    assert list(posts) == [4, 2, 0, 1, 3]
    assert [post.rank for post in posts.values()] == [0, 1, 2, 3, 4]
    assert [(post.machine, post.local_rank) for post in posts.values()] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert {post.gpus for post in posts.values() if post.machine == 0} == {("2", "9", "10")}
    assert {(post.address, post.port, post.num_workers) for post in posts.values()} == {("10.0.0.2", 9, 5)}  # rank 0's


def test_workers_on_cpus_keep_their_order() -> None:
    posts = posts_of([Place("a", port, None) for port in (1, 2, 3)], ADDRESSES)
    assert [(index, post.rank, post.local_rank, post.gpus) for index, post in posts.items()] == [
        (0, 0, 0, ()),
        (1, 1, 1, ()),
        (2, 2, 2, ()),
    ]


DIED = RunFailedError(Reason.WORKER_DIED, "connection closed", 0)
BAD_DATA = RunFailedError(Reason.DATA_ERROR, "no images", 1)


class Training:
    """A watched training of two workers. `script` has, for each look of the driver, what of the calls "0" and "1" ends in it, and how."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, script: list[dict[str, RunFailedError | bool]]) -> None:
        self.script, self.ends = script, {}
        self.sign: Sign | None = Sign(5, 1.0, 0.1, 1.0, True)
        self.asked: list[str] = []
        self.silent_ones: list[RunFailedError] = []
        self.num_offers = 0

        def wait(calls: list[str], *, timeout: float, num_returns: int = 1) -> tuple[list[str], list[str]]:
            self.ends |= self.script.pop(0)
            done = [call for call in calls if call in self.ends]
            return done, [call for call in calls if call not in done]

        monkeypatch.setattr(group.ray, "wait", wait)
        monkeypatch.setattr(group.ray, "get", lambda call: self.ends[call])

    def watch(self) -> bool:
        worker: Any = SimpleNamespace(regroup=SimpleNamespace(remote=lambda: self.asked.append("regroup")))
        pulse: Any = SimpleNamespace(
            sign=self.sign,
            silent=lambda ranks: self.silent_ones,
            check_steps=lambda seconds: self.asked.append(f"steps within {seconds:g} s"),
        )
        return group._watch({"0": 0, "1": 1}, {0: worker, 1: worker}, pulse, hang_seconds=60.0, take_more=self._take_more)

    def _take_more(self, can_grow: bool) -> bool:
        self.num_offers += can_grow
        return self.num_offers == 2


def test_a_training_is_watched_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch, [{}, {"1": False}, {"0": False}])
    training.sign = None  # no step is due: what there is to grow would not go on
    assert training.watch() is False
    assert (training.asked, training.num_offers) == (["steps within 60 s"], 0)


def test_it_is_asked_once_to_make_way_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch, [{}, {}, {}, {"0": True}, {"1": True}])
    assert training.watch() is True
    assert training.asked.count("regroup") == 1
    assert training.num_offers == 2


def test_what_explains_a_failure_goes_first_though_it_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFailedError) as caught:
        Training(monkeypatch, [{}, {"0": DIED}, {"1": BAD_DATA}]).watch()
    assert caught.value is BAD_DATA


def test_who_is_silent_fails_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch, [{}, {}])
    training.silent_ones = [DIED]
    with pytest.raises(RunFailedError) as caught:
        training.watch()
    assert caught.value is DIED
