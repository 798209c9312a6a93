"""What to do about a job: pure decisions, returned as values. `dispatcher` carries them out."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from mae_core.options import RetryConfig
from service.admission import Admission
from service.models import AttemptRow, JobRow
from service.ray_jobs import RayJob, RayStatus
from workers.contract import REASON_RULES, DesiredState, JobStatus, Reason, Retry
from workers.stored import EncoderManifest

ACTIVE_SECONDS = 1.0
PARENT_SECONDS = 60.0  # its end wakes those that wait for it
IN_LINE_SECONDS = 30.0  # whose turn it is, is looked at beside this
UNREACHABLE_SECONDS = 5.0
MAX_BACKOFF_SECONDS = 60.0
STOP_AGAIN_SECONDS = 30.0
PLACEMENT_PATIENCE = timedelta(seconds=60)
LOST_SILENCE = timedelta(seconds=20)  # of workers whose run Ray no longer knows


@dataclass(frozen=True)
class Wait:
    """Leave the job where it is and look again later."""

    reason: Reason | None
    detail: str | None
    seconds: float


@dataclass(frozen=True)
class TakeUp:
    """The job that it waited for has succeeded: freeze its result into the spec."""

    result_uri: str


@dataclass(frozen=True)
class Launch:
    """Create the next attempt and submit it."""


@dataclass(frozen=True)
class Submit:
    """The attempt exists, but Ray is not known to have it: adopt or submit it."""


@dataclass(frozen=True)
class BeginStop:
    """Move to stopping or pausing: the workers hear it with their next report's answer."""

    status: JobStatus
    reason: Reason


@dataclass(frozen=True)
class Kill:
    """Have Ray stop the run."""


@dataclass(frozen=True)
class Inspect:
    """The run is over: see in object storage whether it committed its result."""


@dataclass(frozen=True)
class CommittedResult:
    """What a run committed: its manifest, and the manifest's own size."""

    manifest: EncoderManifest
    num_bytes: int


@dataclass(frozen=True)
class Succeed:
    """The result is committed."""

    result: CommittedResult


@dataclass(frozen=True)
class Failures:
    """Failed attempts that count, by who pays for another one."""

    num_failures: int
    num_user_failures: int


@dataclass(frozen=True)
class Recover:
    """The attempt is over, another one follows."""

    reason: Reason
    detail: str | None
    seconds: float
    failures: Failures


@dataclass(frozen=True)
class End:
    """The job is over, or paused: nobody looks at it any more."""

    status: JobStatus
    reason: Reason
    detail: str | None
    cause: Reason | None = None  # why its last attempt ended, where that is another reason


_CANCELLED = End(JobStatus.CANCELLED, Reason.CANCELLED_BY_USER, None)
_PAUSED = End(JobStatus.PAUSED, Reason.PAUSED_BY_USER, None)

Decision = Wait | TakeUp | Launch | Submit | BeginStop | Kill | Inspect | Succeed | Recover | End


def heed_wish(job: JobRow, attempt: AttemptRow | None) -> Decision | None:
    """What a wish to pause or cancel means now; None where it means nothing (yet)."""
    if job.desired_state == DesiredState.PAUSE:
        return _heed_pause(job)
    if job.desired_state != DesiredState.CANCEL:
        return None
    if job.status in (JobStatus.QUEUED, JobStatus.PAUSED):
        return _CANCELLED
    if job.status != JobStatus.STOPPING:
        return BeginStop(JobStatus.STOPPING, Reason.CANCELLED_BY_USER)
    return _CANCELLED if attempt is None or attempt.ended_at is not None else None


def _heed_pause(job: JobRow) -> Decision | None:
    """A run that is finalizing has taken its last step: it ends."""
    if job.status in (JobStatus.QUEUED, JobStatus.RECOVERING):
        return _PAUSED
    if job.status in (JobStatus.STARTING, JobStatus.RUNNING):
        return BeginStop(JobStatus.PAUSING, Reason.PAUSED_BY_USER)
    return None


def await_parent(parent: JobRow) -> Decision:
    """For a job that starts from the encoder of `parent`."""
    if not JobStatus(parent.status).is_terminal:
        return Wait(Reason.WAITING_FOR_JOB, f"job {parent.id} is {parent.status}", PARENT_SECONDS)
    if parent.status == JobStatus.SUCCEEDED and parent.result_uri is not None:
        return TakeUp(parent.result_uri)
    why = f" ({parent.reason})" if parent.reason else ""
    return End(JobStatus.FAILED, Reason.PARENT_FAILED, f"job {parent.id} is {parent.status}{why}")


def before_launch(job: JobRow, admission: Wait | Admission) -> Decision:
    """For a job with no attempt under way."""
    if isinstance(admission, Wait):
        return admission
    if job.id in admission.admitted:
        return Launch()
    return Wait(Reason.WAITING_FOR_RESOURCES, admission.why_not(job), IN_LINE_SECONDS)


def during(job: JobRow, attempt: AttemptRow, ray_job: RayJob | None, *, now: datetime, grace_seconds: float) -> Decision:
    """For an attempt that Ray was given, by what Ray says of it now (None: it does not know it).

    grace_seconds: how long a run that is to end may take to do so by itself.
    """
    if ray_job is None and attempt.last_report_at is not None and now - attempt.last_report_at < LOST_SILENCE:
        return Wait(why_it_ends(job), "Ray does not know the run, but its workers report", ACTIVE_SECONDS)
    if ray_job is None or ray_job.status.is_over:
        return _CANCELLED if why_it_ends(job) is Reason.CANCELLED_BY_USER else Inspect()
    if job.status in (JobStatus.STOPPING, JobStatus.PAUSING) and _must_kill(job, attempt, now=now, grace_seconds=grace_seconds):
        return Kill()
    if _is_over_time(job, attempt, now=now, grace_seconds=grace_seconds):
        return BeginStop(JobStatus.STOPPING, Reason.TIME_LIMIT_REACHED)
    if job.status == JobStatus.STARTING and attempt.submitted_at is not None and now - attempt.submitted_at > PLACEMENT_PATIENCE:
        return Wait(Reason.WAITING_FOR_RESOURCES, "Ray has not started the workers yet: it looks for room for all of them", ACTIVE_SECONDS)
    return Wait(why_it_ends(job), None, ACTIVE_SECONDS)


def why_it_ends(job: JobRow) -> Reason | None:
    """Why the job is to stop or pause, whatever it waits for meanwhile; None where it is not."""
    if job.status == JobStatus.PAUSING:
        return Reason.PAUSED_BY_USER
    if job.status == JobStatus.STOPPING:
        return Reason.CANCELLED_BY_USER if job.desired_state == DesiredState.CANCEL else Reason.TIME_LIMIT_REACHED
    return None


def _is_over_time(job: JobRow, attempt: AttemptRow, *, now: datetime, grace_seconds: float) -> bool:
    """Whether it has trained for too long. A run that has taken its last step may write its result, unless it hangs in that."""
    limit = job.spec.get("time_limit_hours")  # a job of an earlier version has none
    if limit is None or attempt.started_at is None or job.status not in (JobStatus.RUNNING, JobStatus.FINALIZING):
        return False
    trained = job.run_seconds + (now - attempt.started_at).total_seconds()
    return bool(trained > limit * 3600 + (grace_seconds if job.status == JobStatus.FINALIZING else 0.0))


def _must_kill(job: JobRow, attempt: AttemptRow, *, now: datetime, grace_seconds: float) -> bool:
    if attempt.stop_requested_at is not None:
        return now - attempt.stop_requested_at >= timedelta(seconds=STOP_AGAIN_SECONDS)
    if attempt.started_at is None or job.desired_since is None:
        return True  # its workers have not begun: they have nothing to save, and do not hear us
    return now - job.desired_since >= timedelta(seconds=grace_seconds)


def after(
    job: JobRow, attempt: AttemptRow, ray_job: RayJob | None, result: CommittedResult | None, *, now: datetime, backoff_seconds: float
) -> Decision:
    """For a run that is over, by whether its result is committed. A committed result is a success, however the run ended."""
    if result is not None:
        return Succeed(result)
    if job.status == JobStatus.STOPPING:
        return End(JobStatus.FAILED, Reason.TIME_LIMIT_REACHED, f"time_limit_hours is {job.spec['time_limit_hours']:g}")
    reason, detail = cause(attempt, ray_job)
    retry = REASON_RULES[reason].retry
    if retry is Retry.NEVER:
        return End(JobStatus.FAILED, reason, detail)
    if job.desired_state == DesiredState.PAUSE and retry is not Retry.USER:  # it goes on from its last training state
        return _PAUSED
    budget = RetryConfig.model_validate(job.spec["retry"])
    failures = _failures(job, attempt, retry, budget, now=now)
    if (
        reason not in (Reason.WORKER_DIED, Reason.HUNG)  # the driver has spent its own on those
        and failures.num_failures <= budget.max_failures
        and failures.num_user_failures <= budget.max_user_failures
    ):
        num_before = max(failures.num_failures + failures.num_user_failures - 1, 0)
        return Recover(reason, detail, min(backoff_seconds * 2**num_before, MAX_BACKOFF_SECONDS), failures)
    if retry is Retry.USER and failures.num_user_failures == 1:
        return End(JobStatus.FAILED, reason, detail)
    last = f"attempt {attempt.number} ended with {reason}" + (f": {detail}" if detail else "")
    return End(JobStatus.FAILED, Reason.RETRIES_EXHAUSTED, last, cause=reason)


def _failures(job: JobRow, attempt: AttemptRow, retry: Retry, budget: RetryConfig, *, now: datetime) -> Failures:
    """With this one; those before a run that went well for long are forgotten."""
    forgiven = timedelta(hours=budget.forgive_after_hours)
    went_well = attempt.started_at is not None and now - attempt.started_at >= forgiven
    before = Failures(0, 0) if went_well else Failures(job.num_failures, job.num_user_failures)
    return Failures(before.num_failures + (retry is Retry.INFRASTRUCTURE), before.num_user_failures + (retry is Retry.USER))


def cause(attempt: AttemptRow, ray_job: RayJob | None) -> tuple[Reason, str | None]:
    """Why a run ended without a result: what its workers said, else what can be told from Ray."""
    if attempt.reason is not None:
        return Reason(attempt.reason), attempt.message
    if ray_job is None:
        return Reason.RAY_JOB_LOST, None
    if ray_job.status is RayStatus.SUCCEEDED:
        return Reason.RUN_NOT_COMMITTED, None
    return Reason.DRIVER_DIED, ray_job.message
