"""The jobs of a chaos run, how each must end, and what its user wishes meanwhile: all drawn from one seed."""

import random
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tests.integration.runs import pretrain_spec
from tests.stand_in.script import Death, Script, Way
from workers.contract import JobStatus, Reason

_MAX_FAILURES = 50  # of jobs that are to succeed: faults may befall a run any number of times
_SAVED_EVERY = 4  # steps
_TRAINED_SECONDS = 4.0  # on Ray, from the start of one job to that of the next: two at a time
_MENDABLE = (Way.DRIVER, Way.WORKER, Way.SILENT, Way.COMMITTED)
_FATAL = {Way.DATA_ERROR: Reason.DATA_ERROR, Way.OUT_OF_MEMORY: Reason.OUT_OF_MEMORY}
Verb = Literal["pause", "resume", "cancel"]


class End(NamedTuple):
    """How a job must end, if nobody cancels it."""

    status: JobStatus
    reason: Reason | None


SUCCESS = End(JobStatus.SUCCEEDED, None)


class Wish(NamedTuple):
    """Of a user, so many seconds after the job was submitted."""

    seconds: float
    verb: Verb


@dataclass(frozen=True)
class PlannedJob:
    name: str
    spec: dict[str, Any]
    end: End
    wishes: tuple[Wish, ...]
    num_steps: int


def plan(num_jobs: int, *, simulated: bool, seed: int) -> list[PlannedJob]:
    """`simulated`: for the stand-in, with scripted deaths; else small trainings on the digits."""
    drawn = random.Random(seed)
    draw = _simulated if simulated else _trained
    return [draw(number, drawn) for number in range(num_jobs)]


def _name(number: int) -> str:
    return f"chaos-{number:04}"


def _simulated(number: int, drawn: random.Random) -> PlannedJob:
    num_steps = drawn.randint(5, 20)
    deaths, end, max_failures = _deaths(num_steps, drawn)
    script = Script(
        num_steps=num_steps, step_seconds=round(drawn.uniform(0.05, 0.3), 3), start_seconds=round(drawn.uniform(0.1, 0.5), 3), deaths=deaths
    )
    spec = pretrain_spec(
        name=_name(number),
        seed=drawn.randrange(2**31),
        labels=script.labels(),
        resources={"num_workers": drawn.choice([1, 1, 1, 2, 4])},
        checkpoint={"every_steps": _SAVED_EVERY},
        retry={"max_failures": max_failures},
    )
    return PlannedJob(_name(number), spec, end, _wishes(drawn, after=0.0, span_seconds=20.0), num_steps)


def _deaths(num_steps: int, drawn: random.Random) -> tuple[tuple[Death, ...], End, int]:
    """Of ten runs six live, three die in a way that another attempt mends, one in a way that ends its job."""
    fate, step = drawn.random(), drawn.randint(1, num_steps)
    if fate < 0.6:
        return (), SUCCESS, _MAX_FAILURES
    if fate < 0.9:
        way = drawn.choice(_MENDABLE)
        late = way in (Way.SILENT, Way.COMMITTED)
        return (Death(attempt=1, step=num_steps + 1 if late else step, way=way),), SUCCESS, _MAX_FAILURES
    if fate < 0.93:
        return (Death(attempt=0, step=step, way=Way.DRIVER),), End(JobStatus.FAILED, Reason.RETRIES_EXHAUSTED), 1
    way = drawn.choice(list(_FATAL))
    return (Death(attempt=0, step=step, way=way),), End(JobStatus.FAILED, _FATAL[way]), _MAX_FAILURES


def _trained(number: int, drawn: random.Random) -> PlannedJob:
    """22 steps of some milliseconds: two epochs of the digits."""
    spec = pretrain_spec(
        name=_name(number),
        optim={"epochs": 2, "batch_size": 128, "base_lr": 1e-3, "warmup_epochs": 1},
        resources={"num_workers": 1},
        checkpoint={"every_steps": _SAVED_EVERY},
        retry={"max_failures": _MAX_FAILURES},
    )
    return PlannedJob(_name(number), spec, SUCCESS, _wishes(drawn, after=_TRAINED_SECONDS * number, span_seconds=20.0), num_steps=22)


def _wishes(drawn: random.Random, *, after: float, span_seconds: float) -> tuple[Wish, ...]:
    """Most users wish nothing; some pause and resume, some cancel, a few cancel what they paused."""
    fate, first = drawn.random(), after + drawn.uniform(0, span_seconds)
    later = first + drawn.uniform(0, span_seconds / 4)
    if fate < 0.1:
        return (Wish(first, "cancel"),)
    if fate < 0.25:
        return (Wish(first, "pause"), Wish(later, "resume"))
    if fate < 0.28:
        return (Wish(first, "pause"), Wish(later, "cancel"))
    return ()
