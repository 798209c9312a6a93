"""Which training states of a job stay, and why: a pure function of the states and the policy."""

import math
from collections.abc import Collection
from enum import StrEnum
from itertools import groupby
from typing import NamedTuple

from mae_core.options import BestConfig, KeepConfig


class Why(StrEnum):
    """What keeps a state."""

    LAST = "last"
    EVERY = "every"
    BEST = "best"
    PINNED = "pinned"


class State(NamedTuple):
    """A committed training state. start: attempt and incarnation of who saved it. value: of the series that `best` goes by."""

    name: str
    start: tuple[int, int]
    step: int
    is_pinned: bool = False
    value: float | None = None

    @property
    def age(self) -> tuple[tuple[int, int], int]:
        """Larger ones are newer: what a run goes on from is the state of the newest start, however low its step."""
        return self.start, self.step


def decide(states: Collection[State], keep: KeepConfig) -> dict[str, list[Why]]:
    """By name, in the order of `states`, what keeps each; nothing: it goes. The newest always stays. The same again once they are gone."""
    found = {state.name: list[Why]() for state in states}
    newest_first = sorted(states, key=lambda state: state.age, reverse=True)
    chosen = {
        Why.LAST: newest_first[: keep.last],
        Why.EVERY: _every(_line(newest_first), keep.every_steps) if keep.every_steps is not None else [],
        Why.BEST: _best(_line(newest_first), keep.best) if keep.best is not None else [],
        Why.PINNED: [state for state in states if state.is_pinned],
    }
    for why, kept in chosen.items():
        for state in kept:
            found[state.name].append(why)
    return found


def _line(newest_first: Collection[State]) -> list[State]:
    """The states that the run has gone through, by step: not those behind which a later start took it up again."""
    line, limit = list[State](), math.inf
    for _, group in groupby(newest_first, key=lambda state: state.start):
        gone_through = [state for state in group if state.step < limit]
        line += gone_through
        limit = min([limit, *(state.step for state in gone_through)])
    return line[::-1]


def _every(line: list[State], steps: int) -> list[State]:
    """Of each `steps` steps the first state: that of just these where saving has kept time, else of the next."""
    return [next(group) for number, group in groupby(line, key=lambda state: state.step // steps) if number > 0]


def _best(line: list[State], best: BestConfig) -> list[State]:
    """Of equal ones the first: the value was measured at it, or not long before."""
    sign = -1.0 if best.mode == "max" else 1.0
    measured = [(sign * state.value, state.step, state) for state in line if state.value is not None and math.isfinite(state.value)]
    return [state for *_, state in sorted(measured)[: best.number]]
