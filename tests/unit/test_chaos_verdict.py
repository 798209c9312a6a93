"""What a chaos run counts as lost, doubled, stuck and wrong, and that its plan is its seed's."""

from typing import Any

import pytest

from tests.faults.chaos_plan import SUCCESS, End, PlannedJob, plan
from tests.faults.chaos_verdict import Life, Verdict, doubling, judge, wrong_losses
from workers.contract import JobStatus, Reason

JOB = PlannedJob("chaos-0", {}, SUCCESS, (), num_steps=3)
BROKEN = PlannedJob("chaos-0", {}, End(JobStatus.FAILED, Reason.DATA_ERROR), (), num_steps=3)


def view(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "name": "chaos-0", "status": "succeeded", "reason": None, "detail": None, "attempt": 1} | changes


def life(attempt: int, began_at: float, ended_at: float | None, *first_steps: int, is_forgotten: bool = False) -> Life:
    return Life(f"a-a{attempt}", "a", attempt, began_at, ended_at, first_steps, is_forgotten)


def verdict_of(job: PlannedJob, views: list[dict[str, Any]], lives: list[Life] | None = None, *, cancelled: bool = False) -> Verdict:
    return judge([job], ids={job.name: "a"}, cancelled={job.name} if cancelled else set(), views=views, lives=lives or [])


@pytest.mark.parametrize(
    ("job", "views", "cancelled", "what"),
    [
        (JOB, [view()], False, None),
        (JOB, [view()], True, None),  # it ended before it heard of it
        (JOB, [view(status="cancelled", reason="cancelled_by_user")], True, None),
        (JOB, [view(status="cancelled", reason="cancelled_by_user")], False, "lost"),
        (JOB, [view(status="failed", reason="retries_exhausted")], False, "lost"),
        (JOB, [view(status="failed", reason="retries_exhausted")], True, "lost"),
        (JOB, [], False, "lost"),
        (JOB, [view(id="b")], False, "lost"),
        (JOB, [view(), view(id="b")], False, "doubled"),
        (JOB, [view(status="running")], False, "stuck"),
        (JOB, [view(status="paused")], True, "stuck"),
        (BROKEN, [view(status="failed", reason="data_error")], False, None),
        (BROKEN, [view(status="failed", reason="internal_error")], False, "lost"),
        (BROKEN, [view()], False, "lost"),
    ],
)
def test_lost_doubled_or_stuck(job: PlannedJob, views: list[dict[str, Any]], cancelled: bool, what: str | None) -> None:
    verdict = verdict_of(job, views, cancelled=cancelled)
    assert verdict.counts() == dict.fromkeys(("lost", "doubled", "stuck", "wrong"), 0) | ({what: 1} if what else {})
    assert verdict.is_good == (what is None)


def test_a_job_that_was_never_accepted_is_not_lost() -> None:
    assert judge([JOB], ids={}, cancelled=set(), views=[], lives=[]).is_good


@pytest.mark.parametrize(
    ("lives", "evidence"),
    [
        ([life(1, 0, 5, 70, 80), life(2, 6, 9, 90)], None),
        ([life(1, 0, 5, is_forgotten=True), life(1, 6, 9), life(2, 10, 11)], None),
        ([life(1, 0, 7, is_forgotten=True), life(1, 6, 9)], "a-a1 and a-a1 lived at one time"),
        ([life(1, 0, 5), life(1, 6, 9)], "runs of the attempts [1, 1]"),
        ([life(1, 0, 5), life(2, 6, 9), life(3, 10, 11)], "3 runs of 2 attempts"),
        ([life(2, 6, 9), life(1, 0, 7)], "a-a1 and a-a2 lived at one time"),
        ([life(1, 0, None), life(2, 6, 9)], "a-a1 and a-a2 lived at one time"),
        ([life(1, 0, 5, 70, 70)], "a-a1 has taken its first step twice in its starts [70]"),
    ],
)
def test_doubling(lives: list[Life], evidence: str | None) -> None:
    assert doubling(lives, num_attempts=2) == evidence
    assert (verdict_of(JOB, [view(attempt=2)], lives).doubled != {}) == (evidence is not None)


def test_wrong_losses() -> None:
    assert wrong_losses({1: 0.5, 3: 0.25}, {1: 0.5, 2: 0.4, 3: 0.25}) is None
    assert wrong_losses({1: 0.5, 2: 0.41}, {1: 0.5, 2: 0.4}) == "losses differ at the steps [2]"
    assert wrong_losses({1: 0.5, 2: 0.4}, {1: 0.5}) == "losses differ at the steps [2]"


def test_a_plan_is_its_seeds() -> None:
    assert plan(50, simulated=True, seed=1) == plan(50, simulated=True, seed=1)
    assert plan(50, simulated=True, seed=1) != plan(50, simulated=True, seed=2)
    ends = {job.end.reason for job in plan(200, simulated=True, seed=1)}
    assert ends == {None, Reason.DATA_ERROR, Reason.OUT_OF_MEMORY, Reason.RETRIES_EXHAUSTED}
