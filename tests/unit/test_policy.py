from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service import policy
from service.admission import Admission, Budget, Needs
from service.lifecycle import ALLOWED
from service.models import AttemptRow, JobRow
from service.ray_jobs import ClusterResources, RayJob, RayStatus
from workers.contract import REASON_RULES, DesiredState, JobStatus, Reason, Retry

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def job(
    status: JobStatus,
    *,
    cancel: float | None = None,
    pause: float | None = None,
    num_workers: int = 1,
    max_failures: int = 3,
    num_failures: int = 0,
    max_user_failures: int = 0,
    num_user_failures: int = 0,
    time_limit_hours: float | None = None,
) -> JobRow:
    """`cancel`, `pause`: seconds since it was asked for."""
    since = pause if cancel is None else cancel
    return JobRow(
        id="j",
        status=status,
        reason={JobStatus.STOPPING: Reason.CANCELLED_BY_USER, JobStatus.PAUSING: Reason.PAUSED_BY_USER}.get(status),
        desired_state=DesiredState.CANCEL if cancel is not None else DesiredState.RUN if pause is None else DesiredState.PAUSE,
        desired_since=None if since is None else NOW - timedelta(seconds=since),
        num_failures=num_failures,
        num_user_failures=num_user_failures,
        run_seconds=1800.0,
        num_cpus=2 * num_workers,
        num_gpus=num_workers,
        spec={
            "retry": {"max_failures": max_failures, "max_user_failures": max_user_failures, "forgive_after_hours": 2.0},
            "time_limit_hours": time_limit_hours,
        },
    )


def attempt(number: int = 1, **columns: Any) -> AttemptRow:
    return AttemptRow(job_id="j", number=number, submission_id=f"j-a{number}", **columns)


def ray(status: RayStatus, message: str | None = None) -> RayJob:
    return RayJob("j-a1", status, message)


CANCELLED = policy.End(JobStatus.CANCELLED, Reason.CANCELLED_BY_USER, None)


@pytest.mark.parametrize("status", [status for status in JobStatus if not status.is_terminal])
def test_without_a_wish_nothing_is_done(status: JobStatus) -> None:
    assert policy.heed_wish(job(status), attempt()) is None


@pytest.mark.parametrize(
    ("status", "attempt", "decision"),
    [
        (JobStatus.QUEUED, None, CANCELLED),
        (JobStatus.STARTING, attempt(), policy.BeginStop(JobStatus.STOPPING, Reason.CANCELLED_BY_USER)),
        (JobStatus.RUNNING, attempt(), policy.BeginStop(JobStatus.STOPPING, Reason.CANCELLED_BY_USER)),
        (JobStatus.FINALIZING, attempt(), policy.BeginStop(JobStatus.STOPPING, Reason.CANCELLED_BY_USER)),
        (JobStatus.RECOVERING, attempt(ended_at=NOW), policy.BeginStop(JobStatus.STOPPING, Reason.CANCELLED_BY_USER)),
        (JobStatus.STOPPING, attempt(ended_at=NOW), CANCELLED),
        (JobStatus.STOPPING, attempt(), None),
    ],
)
def test_a_wish_to_cancel(status: JobStatus, attempt: AttemptRow | None, decision: policy.Decision | None) -> None:
    assert policy.heed_wish(job(status, cancel=1), attempt) == decision


PAUSED = policy.End(JobStatus.PAUSED, Reason.PAUSED_BY_USER, None)
BEGIN_PAUSE = policy.BeginStop(JobStatus.PAUSING, Reason.PAUSED_BY_USER)


@pytest.mark.parametrize(
    ("status", "decision"),
    [
        (JobStatus.QUEUED, PAUSED),
        (JobStatus.RECOVERING, PAUSED),
        (JobStatus.STARTING, BEGIN_PAUSE),
        (JobStatus.RUNNING, BEGIN_PAUSE),
        (JobStatus.PAUSING, None),
        (JobStatus.FINALIZING, None),  # its last step is taken: it ends
    ],
)
def test_a_wish_to_pause(status: JobStatus, decision: policy.Decision | None) -> None:
    assert policy.heed_wish(job(status, pause=1), attempt()) == decision


def test_a_paused_run_has_time_to_save_then_it_is_killed() -> None:
    begun = attempt(started_at=NOW, submitted_at=NOW)
    waits = policy.Wait(Reason.PAUSED_BY_USER, None, policy.ACTIVE_SECONDS)
    running = ray(RayStatus.RUNNING)
    assert policy.during(job(JobStatus.PAUSING, pause=599), begun, running, now=NOW, grace_seconds=600) == waits
    assert policy.during(job(JobStatus.PAUSING, pause=600), begun, running, now=NOW, grace_seconds=600) == policy.Kill()
    assert policy.during(job(JobStatus.PAUSING, pause=600), begun, None, now=NOW, grace_seconds=600) == policy.Inspect()


@pytest.mark.parametrize("reason", [None, Reason.WORKER_DIED, Reason.DRIVER_DIED, Reason.WAITING_FOR_RESOURCES])
def test_a_run_that_was_to_pause_is_paused_however_it_ended(reason: Reason | None) -> None:
    """And spends no failure. What a retry could not mend fails it all the same, and a committed result is one."""
    over = ray(RayStatus.FAILED)
    assert policy.after(job(JobStatus.PAUSING, pause=9), attempt(reason=reason), over, None, now=NOW, backoff_seconds=2) == PAUSED
    failed = policy.after(job(JobStatus.PAUSING, pause=9), attempt(reason=Reason.DATA_ERROR), over, None, now=NOW, backoff_seconds=2)
    assert isinstance(failed, policy.End)
    assert failed.status is JobStatus.FAILED


def test_before_launch() -> None:
    budget = Budget(ClusterResources(8, 8), reserved=Needs(), released=Needs())
    assert policy.before_launch(job(JobStatus.QUEUED), Admission(budget, frozenset({"j"}))) == policy.Launch()
    waits = policy.before_launch(job(JobStatus.RECOVERING, num_workers=5), Admission(budget))
    assert waits == policy.Wait(
        Reason.WAITING_FOR_RESOURCES,
        "needs 10 CPUs, more than the whole cluster has (8.0); it starts when the cluster has grown",
        policy.IN_LINE_SECONDS,
    )
    away = policy.Wait(Reason.RAY_UNREACHABLE, "away", 5)
    assert policy.before_launch(job(JobStatus.QUEUED), away) == away


@pytest.mark.parametrize("status", [RayStatus.SUCCEEDED, RayStatus.FAILED, RayStatus.STOPPED, None])
def test_a_run_that_is_over(status: RayStatus | None) -> None:
    over = None if status is None else ray(status)
    for where in (JobStatus.STARTING, JobStatus.RUNNING, JobStatus.FINALIZING):
        assert policy.during(job(where), attempt(), over, now=NOW, grace_seconds=20) == policy.Inspect()
    assert policy.during(job(JobStatus.STOPPING, cancel=1), attempt(), over, now=NOW, grace_seconds=20) == CANCELLED


@pytest.mark.parametrize(
    ("cancel", "columns", "kills"),
    [
        (19, {"started_at": NOW}, False),
        (20, {"started_at": NOW}, True),
        (1, {}, True),  # nobody is there yet to stop by himself
        (60, {"started_at": NOW, "stop_requested_at": NOW - timedelta(seconds=29)}, False),
        (60, {"started_at": NOW, "stop_requested_at": NOW - timedelta(seconds=30)}, True),
    ],
)
def test_a_run_that_should_stop(cancel: float, columns: dict[str, Any], kills: bool) -> None:
    decision = policy.during(job(JobStatus.STOPPING, cancel=cancel), attempt(**columns), ray(RayStatus.RUNNING), now=NOW, grace_seconds=20)
    waits = policy.Wait(Reason.CANCELLED_BY_USER, None, policy.ACTIVE_SECONDS)
    assert decision == (policy.Kill() if kills else waits)


def test_a_run_that_goes_on_is_left_alone_and_its_trouble_forgotten() -> None:
    decision = policy.during(job(JobStatus.RUNNING), attempt(), ray(RayStatus.RUNNING), now=NOW, grace_seconds=20)
    assert decision == policy.Wait(None, None, policy.ACTIVE_SECONDS)


@pytest.mark.parametrize(
    ("columns", "over", "reason", "detail"),
    [
        ({"reason": "storage_unreachable", "message": "upload"}, ray(RayStatus.FAILED, "1"), Reason.STORAGE_UNREACHABLE, "upload"),
        ({"reason": "storage_unreachable", "message": "upload"}, None, Reason.STORAGE_UNREACHABLE, "upload"),
        ({}, ray(RayStatus.FAILED, "exit code -9"), Reason.DRIVER_DIED, "exit code -9"),
        ({}, ray(RayStatus.STOPPED), Reason.DRIVER_DIED, None),
        ({}, ray(RayStatus.SUCCEEDED), Reason.RUN_NOT_COMMITTED, None),
        ({}, None, Reason.RAY_JOB_LOST, None),
    ],
)
def test_why_a_run_ended(columns: dict[str, Any], over: RayJob | None, reason: Reason, detail: str | None) -> None:
    assert policy.cause(attempt(**columns), over) == (reason, detail)
    decision = policy.after(job(JobStatus.RUNNING), attempt(**columns), over, None, now=NOW, backoff_seconds=2)
    assert decision == policy.Recover(reason, detail, 2.0, policy.Failures(1, 0))


@pytest.mark.parametrize(
    "reason", [reason for reason, rule in REASON_RULES.items() if rule.final_status is JobStatus.FAILED and rule.retry is Retry.NEVER]
)
def test_what_a_retry_cannot_mend_is_not_retried(reason: Reason) -> None:
    decision = policy.after(
        job(JobStatus.RUNNING), attempt(reason=reason, message="m"), ray(RayStatus.FAILED), None, now=NOW, backoff_seconds=2
    )
    assert decision == policy.End(JobStatus.FAILED, reason, "m")


@pytest.mark.parametrize("reason", [Reason.WORKER_DIED, Reason.HUNG])
def test_workers_that_died_or_hung_have_spent_their_restarts_inside_the_attempt(reason: Reason) -> None:
    told = attempt(reason=reason, message="rank 1")
    decision = policy.after(job(JobStatus.RUNNING), told, ray(RayStatus.FAILED), None, now=NOW, backoff_seconds=2)
    detail = f"attempt 1 ended with {reason}: rank 1"
    assert decision == policy.End(JobStatus.FAILED, Reason.RETRIES_EXHAUSTED, detail, cause=reason)


@pytest.mark.parametrize(("seconds", "reason"), [(59, None), (61, Reason.WAITING_FOR_RESOURCES)])
def test_workers_that_ray_cannot_place_are_told(seconds: float, reason: Reason | None) -> None:
    placed = attempt(submitted_at=NOW - timedelta(seconds=seconds), started_at=None)
    decision = policy.during(job(JobStatus.STARTING), placed, ray(RayStatus.RUNNING), now=NOW, grace_seconds=20)
    assert isinstance(decision, policy.Wait)
    assert decision.reason is reason


def test_the_budget_of_attempts() -> None:
    def after(number: int, max_failures: int) -> policy.Decision:
        over = ray(RayStatus.FAILED, "exit code -9")
        failed = job(JobStatus.RUNNING, max_failures=max_failures, num_failures=number - 1)
        return policy.after(failed, attempt(number), over, None, now=NOW, backoff_seconds=2)

    assert [after(number, 3) for number in (1, 2, 3)] == [
        policy.Recover(Reason.DRIVER_DIED, "exit code -9", 2.0**number, policy.Failures(number, 0)) for number in (1, 2, 3)
    ]
    detail = "attempt 4 ended with driver_died: exit code -9"
    assert after(4, 3) == policy.End(JobStatus.FAILED, Reason.RETRIES_EXHAUSTED, detail, cause=Reason.DRIVER_DIED)
    assert isinstance(after(1, 0), policy.End)
    slow = after(900, 1000)
    assert isinstance(slow, policy.Recover)
    assert slow.seconds == policy.MAX_BACKOFF_SECONDS


USERS = [reason for reason, rule in REASON_RULES.items() if rule.retry is Retry.USER]


@pytest.mark.parametrize("reason", USERS)
def test_the_users_own_budget(reason: Reason) -> None:
    """Apart from that of the infrastructure, and empty unless they fill it."""

    def after(budget: int, spent: int) -> policy.Decision:
        failed = job(JobStatus.RUNNING, max_failures=0, max_user_failures=budget, num_user_failures=spent)
        return policy.after(failed, attempt(reason=reason, message="m"), ray(RayStatus.FAILED), None, now=NOW, backoff_seconds=2)

    assert after(0, 0) == policy.End(JobStatus.FAILED, reason, "m")
    assert after(2, 1) == policy.Recover(reason, "m", 4.0, policy.Failures(0, 2))
    assert after(2, 2) == policy.End(JobStatus.FAILED, Reason.RETRIES_EXHAUSTED, f"attempt 1 ended with {reason}: m", cause=reason)


@pytest.mark.parametrize(("hours", "counted"), [(1.9, 4), (2.0, 1)])
def test_failures_before_a_run_that_went_well_are_forgotten(hours: float, counted: int) -> None:
    began = attempt(started_at=NOW - timedelta(hours=hours))
    failed = job(JobStatus.RUNNING, max_failures=9, num_failures=3, max_user_failures=9, num_user_failures=1)
    decision = policy.after(failed, began, ray(RayStatus.FAILED), None, now=NOW, backoff_seconds=1)
    assert isinstance(decision, policy.Recover)
    assert decision.failures == policy.Failures(counted, 1 if counted == 4 else 0)


STOP = policy.BeginStop(JobStatus.STOPPING, Reason.TIME_LIMIT_REACHED)


@pytest.mark.parametrize(
    ("status", "limit", "minutes", "stops"),
    [
        (JobStatus.RUNNING, None, 10_000, False),
        (JobStatus.RUNNING, 1.0, 30, False),  # 30 minutes of earlier attempts count
        (JobStatus.RUNNING, 1.0, 31, True),
        (JobStatus.FINALIZING, 1.0, 39, False),
        (JobStatus.FINALIZING, 1.0, 41, True),  # ten minutes of grace
        (JobStatus.PAUSING, 1.0, 31, False),
    ],
)
def test_the_time_limit(status: JobStatus, limit: float | None, minutes: float, stops: bool) -> None:
    began = attempt(started_at=NOW - timedelta(minutes=minutes), submitted_at=NOW)
    pause = 1.0 if status is JobStatus.PAUSING else None
    decision = policy.during(job(status, time_limit_hours=limit, pause=pause), began, ray(RayStatus.RUNNING), now=NOW, grace_seconds=600)
    assert (decision == STOP) == stops


def test_what_was_stopped_by_its_time_limit_has_failed_unless_it_has_its_result() -> None:
    over = job(JobStatus.STOPPING, time_limit_hours=1.0)
    over.reason = Reason.TIME_LIMIT_REACHED
    assert policy.during(over, attempt(), ray(RayStatus.STOPPED), now=NOW, grace_seconds=600) == policy.Inspect()
    ended = policy.after(over, attempt(), ray(RayStatus.STOPPED), None, now=NOW, backoff_seconds=2)
    assert ended == policy.End(JobStatus.FAILED, Reason.TIME_LIMIT_REACHED, "time_limit_hours is 1")


@pytest.mark.parametrize(("silent", "lost"), [(19, False), (20, True)])
def test_a_run_that_ray_has_forgotten_is_not_lost_while_its_workers_report(silent: float, lost: bool) -> None:
    reports = attempt(last_report_at=NOW - timedelta(seconds=silent))
    decision = policy.during(job(JobStatus.RUNNING), reports, None, now=NOW, grace_seconds=600)
    assert isinstance(decision, policy.Inspect if lost else policy.Wait)


def test_a_job_of_an_earlier_version_has_the_budgets_defaults() -> None:
    old = job(JobStatus.RUNNING)
    old.spec = {"retry": {"max_failures": 3}}
    began = attempt(started_at=NOW - timedelta(hours=9), submitted_at=NOW)
    assert isinstance(policy.during(old, began, ray(RayStatus.RUNNING), now=NOW, grace_seconds=9), policy.Wait)
    recovers = policy.after(old, attempt(), ray(RayStatus.FAILED), None, now=NOW, backoff_seconds=2)
    assert recovers == policy.Recover(Reason.DRIVER_DIED, None, 2.0, policy.Failures(1, 0))


@pytest.mark.parametrize("reason", list(REASON_RULES))
@pytest.mark.parametrize("status", [JobStatus.STARTING, JobStatus.RUNNING, JobStatus.FINALIZING, JobStatus.PAUSING, JobStatus.STOPPING])
def test_every_end_of_a_run_leads_where_a_job_may_go(status: JobStatus, reason: Reason) -> None:
    for spent in (0, 9):
        over = job(status, max_failures=3, max_user_failures=3, num_failures=spent, num_user_failures=spent, time_limit_hours=1.0)
        over.desired_state = DesiredState.PAUSE if status is JobStatus.PAUSING else DesiredState.RUN
        decision = policy.after(over, attempt(reason=reason), ray(RayStatus.FAILED), None, now=NOW, backoff_seconds=2)
        to = decision.status if isinstance(decision, policy.End) else JobStatus.RECOVERING
        assert to in ALLOWED[status], decision
