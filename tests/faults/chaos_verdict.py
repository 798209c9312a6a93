"""What became of the jobs of a chaos run: lost, doubled, stuck, wrong."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tests.faults.chaos_plan import End, PlannedJob
from workers.contract import JobStatus

Json = dict[str, Any]
_CLOCK_SECONDS = 0.05  # ends and beginnings are told by different processes


@dataclass(frozen=True)
class Life:
    """One run, as Ray or the stand-in tells of it. Times are seconds since the epoch; None: it lives.

    is_forgotten: Ray's head was restarted, and knows it no more. When the service had not heard yet that its attempt was accepted, it
    submits that one again.
    """

    submission_id: str
    job: str
    attempt: int
    began_at: float
    ended_at: float | None
    first_steps: tuple[int, ...] = ()  # by the incarnation of the workers
    is_forgotten: bool = False


@dataclass
class Verdict:
    """The names of the jobs to which it applies, each with the evidence.

    lost: the API accepted it, and it is not there; or it has ended in a status that does not fit: its script's, or cancelled where its
        user has cancelled it.
    doubled: one key has become two jobs; or there are more runs of it than attempts, or two of one attempt (but for runs that Ray's head
        has forgotten); or two that live at one time (one ends after the next has begun), or two first steps of one start of the workers.
    stuck: not ended, and for minutes without harm no other has.
    wrong: it has succeeded, and a loss is not that of the undisturbed run. (Losses that a process died with are missing: those of its last
        second, when it was killed after it had committed its result.)
    """

    lost: dict[str, str] = field(default_factory=dict)
    doubled: dict[str, str] = field(default_factory=dict)
    stuck: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        return {name: len(getattr(self, name)) for name in ("lost", "doubled", "stuck", "wrong")}

    @property
    def is_good(self) -> bool:
        return not any(self.counts().values())


def judge(planned: Iterable[PlannedJob], *, ids: Mapping[str, str], cancelled: set[str], views: list[Json], lives: list[Life]) -> Verdict:
    """`views`: all jobs as the API lists them."""
    verdict = Verdict()
    by_name: dict[str, list[Json]] = defaultdict(list)
    for view in views:
        by_name[view["name"]].append(view)
    lives_of: dict[str, list[Life]] = defaultdict(list)
    for life in lives:
        lives_of[life.job].append(life)
    for job in planned:
        found = by_name[job.name]
        if len(found) > 1:
            verdict.doubled[job.name] = f"its key has become {len(found)} jobs"
        view = next((each for each in found if each["id"] == ids.get(job.name)), None)
        if view is None:
            if job.name in ids:
                verdict.lost[job.name] = f"{ids[job.name]} was accepted, and is not there"
            continue
        if not JobStatus(view["status"]).is_terminal:
            verdict.stuck[job.name] = f"{view['id']} is {view['status']} ({view['reason']}: {view['detail']})"
        elif not fits(view, job.end, cancelled=job.name in cancelled):
            verdict.lost[job.name] = f"{view['id']} has {view['status']} ({view['reason']}: {view['detail']}), not {job.end}"
        if evidence := doubling(lives_of[view["id"]], num_attempts=view["attempt"]):
            verdict.doubled[job.name] = f"{view['id']}: {evidence}"
    return verdict


def fits(view: Json, end: End, *, cancelled: bool) -> bool:
    """A job that was cancelled may have ended before it heard of it."""
    return (view["status"], view["reason"]) == end or (cancelled and view["status"] == JobStatus.CANCELLED)


def doubling(lives: list[Life], *, num_attempts: int) -> str | None:
    """Evidence that something of one job ran twice."""
    attempts = [life.attempt for life in lives if not life.is_forgotten]
    if len(attempts) > num_attempts:
        return f"{len(attempts)} runs of {num_attempts} attempts"
    if len(set(attempts)) < len(attempts):
        return f"runs of the attempts {attempts}"
    ordered = sorted(lives, key=lambda life: life.began_at)
    for earlier, later in pairwise(ordered):
        if earlier.ended_at is None or earlier.ended_at > later.began_at + _CLOCK_SECONDS:
            return f"{earlier.submission_id} and {later.submission_id} lived at one time"
    for life in lives:
        if twice := [incarnation for incarnation, number in Counter(life.first_steps).items() if number > 1]:
            return f"{life.submission_id} has taken its first step twice in its starts {twice}"
    return None


def wrong_losses(found: Mapping[int, float], expected: Mapping[int, float]) -> str | None:
    """Evidence that the run was not taken up where it had been."""
    differing = [step for step, loss in found.items() if loss != expected.get(step)]
    return f"losses differ at the steps {differing[:5]}" if differing else None
