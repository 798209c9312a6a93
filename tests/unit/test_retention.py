"""Which training states stay: a union, the newest always, and what has gone changes nothing of it."""

import math
import random
from collections.abc import Iterable
from typing import Any

import pytest

from mae_core.options import KeepConfig
from service.retention import State, Why, decide


def states(steps: Iterable[int], *, start: tuple[int, int] = (1, 10), values: dict[int, float] | None = None) -> list[State]:
    return [State(f"{step}-{start[0]}-{start[1]}", start, step, value=(values or {}).get(step)) for step in steps]


def kept(found: list[State], **policy: Any) -> dict[int, list[str]]:
    """By step, what keeps it; of those that stay."""
    why = decide(found, KeepConfig.model_validate(policy))
    assert list(why) == [state.name for state in found]
    return {state.step: [str(reason) for reason in why[state.name]] for state in found if why[state.name]}


def test_the_newest_stay() -> None:
    assert kept(states([200, 400, 600])) == {400: ["last"], 600: ["last"]}
    assert kept(states([600, 200, 400]), last=1) == {600: ["last"]}
    assert kept([]) == {}


def test_of_every_so_many_steps_the_first_stays() -> None:
    saved = [200, 400, 1000, 1200, 2200, 2400, 3000, 3200, 3400]
    assert kept(states(saved), last=1, every_steps=1000) == {1000: ["every"], 2200: ["every"], 3000: ["every"], 3400: ["last"]}
    assert kept(states([100, 200]), last=1, every_steps=200) == {200: ["last", "every"]}


@pytest.mark.parametrize(
    ("mode", "number", "expected"), [("max", 1, [4]), ("max", 2, [2, 4]), ("min", 1, [1]), ("min", 2, [1, 3]), ("max", 9, [1, 2, 3, 4])]
)
def test_the_best_stay(mode: str, number: int, expected: list[int]) -> None:
    values = {1: 0.1, 2: 0.7, 3: 0.2, 4: 0.9, 5: math.nan, 6: math.inf, 7: -math.inf}
    why = kept(states(range(1, 10), values=values), last=1, best={"metric": "val_accuracy", "mode": mode, "number": number})
    assert [step for step, reasons in why.items() if "best" in reasons] == expected
    assert why[9] == ["last"]


def test_of_equal_ones_the_first_is_best() -> None:
    values = {1: 0.5, 2: 0.9, 3: 0.9, 4: 0.9}
    assert kept(states(range(1, 5), values=values), last=1, best={"metric": "x", "mode": "max"}) == {2: ["best"], 4: ["last"]}


def test_what_is_pinned_stays_whatever_the_policy() -> None:
    found = [state._replace(is_pinned=state.step in (1, 3)) for state in states(range(1, 4))]
    assert kept(found, last=1) == {1: ["pinned"], 3: ["last", "pinned"]}


def test_a_state_that_the_run_has_gone_back_behind_is_none_of_its_line() -> None:
    """The second start took the run up at 400; what the first one saved after that is kept for being new alone."""
    values = {200: 0.1, 400: 0.5, 600: 0.3, 800: 0.9, 1000: 0.9}
    found = states([200, 400, 600, 800, 1000], values=values) + states([600, 700], start=(1, 20), values={600: 0.3, 700: 0.4})
    assert [state.name for state in found if decide(found, KeepConfig(last=3))[state.name]] == ["1000-1-10", "600-1-20", "700-1-20"]
    policy = KeepConfig.model_validate({"last": 1, "every_steps": 400, "best": {"metric": "x", "mode": "max"}})
    why = {name: reasons for name, reasons in decide(found, policy).items() if reasons}
    assert why == {"400-1-10": [Why.EVERY, Why.BEST], "700-1-20": [Why.LAST]}


def test_a_run_that_began_anew_is_newer_than_all_before() -> None:
    found = states([800, 900]) + states([3, 6], start=(2, 1))
    assert [name for name, reasons in decide(found, KeepConfig()).items() if reasons] == ["3-2-1", "6-2-1"]


@pytest.mark.parametrize("seed", range(20))
def test_as_states_come_one_by_one_what_stays_is_that_of_all_at_once(seed: int) -> None:
    """Pruned after each save, or once at the end: the same is left."""
    draw = random.Random(seed)
    policy = KeepConfig.model_validate(
        {
            "last": draw.randint(1, 3),
            "every_steps": draw.choice([None, 3, 5]),
            "best": draw.choice([None, {"metric": "x", "mode": "max", "number": 2}]),
        }
    )
    saved = states(sorted(draw.sample(range(1, 60), 20)))
    saved = [state._replace(value=draw.choice([None, math.nan, draw.random()]), is_pinned=draw.random() < 0.1) for state in saved]
    there: list[State] = []
    for state in saved:
        there.append(state)
        why = decide(there, policy)
        there = [state for state in there if why[state.name]]
        assert there[-1] is state
        assert {name: reasons for name, reasons in why.items() if reasons} == decide(there, policy), "a second look changes nothing"
    assert there == [state for state in saved if decide(saved, policy)[state.name]]
