"""What to do about a job: pure decisions, returned as values. `dispatcher` carries them out."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from service.models import AttemptRow, JobRow
from service.ray_jobs import ClusterResources, RayJob, RayStatus
from workers.contract import REASON_RULES, DesiredState, EncoderManifest, JobStatus, Reason

ACTIVE_SECONDS = 1.0
WAITING_SECONDS = 2.0
PARENT_SECONDS = 5.0
UNREACHABLE_SECONDS = 5.0
MAX_BACKOFF_SECONDS = 60.0
STOP_AGAIN_SECONDS = 30.0
PLACEMENT_PATIENCE = timedelta(seconds=60)


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
class Recover:
    """The attempt is over, another one follows."""

    reason: Reason
    detail: str | None
    seconds: float


@dataclass(frozen=True)
class End:
    """The job is over, or paused: nobody looks at it any more."""

    status: JobStatus
    reason: Reason
    detail: str | None
    cause: Reason | None = None  # why its last attempt ended, where that is another reason


_WISHED = {JobStatus.STOPPING: Reason.CANCELLED_BY_USER, JobStatus.PAUSING: Reason.PAUSED_BY_USER}
_CANCELLED = End(JobStatus.CANCELLED, Reason.CANCELLED_BY_USER, None)
_PAUSED = End(JobStatus.PAUSED, Reason.PAUSED_BY_USER, None)

Decision = Wait | TakeUp | Launch | Submit | BeginStop | Kill | Inspect | Succeed | Recover | End


@dataclass(frozen=True)
class Needs:
    """Devices of a run."""

    num_cpus: float = 0.0
    num_gpus: float = 0.0

    @classmethod
    def of(cls, job: JobRow) -> "Needs":
        return cls(job.num_cpus, job.num_gpus)


class Budget:
    """What is free in the cluster, less what was launched since.

    Ray's figures are up to 5 s old. So our own unended attempts (`reserved`) count as using all they asked for, whatever Ray says,
    and what those of ours used that ended since Ray's figures were taken (`released`) counts as free.
    """

    def __init__(self, cluster: ClusterResources, *, reserved: Needs, released: Needs) -> None:
        self._total = Needs(cluster.num_cpus, cluster.num_gpus)
        used = Needs(max(cluster.used_cpus - released.num_cpus, 0.0), max(cluster.used_gpus - released.num_gpus, 0.0))
        self._free = Needs(
            max(self._total.num_cpus - max(used.num_cpus, reserved.num_cpus), 0.0),
            max(self._total.num_gpus - max(used.num_gpus, reserved.num_gpus), 0.0),
        )

    def take(self, needs: Needs) -> str | None:
        """Set the devices aside; or, where they are not free, say so."""
        for kind, need, free, total in (
            ("CPUs", needs.num_cpus, self._free.num_cpus, self._total.num_cpus),
            ("GPUs", needs.num_gpus, self._free.num_gpus, self._total.num_gpus),
        ):
            if need > total:
                return f"needs {need:g} {kind}, more than the whole cluster has ({total:.1f}); it starts when the cluster has grown"
            if need > free:
                return f"needs {need:g} {kind}, {free:.1f} of {total:.1f} free"
        self._free = Needs(self._free.num_cpus - needs.num_cpus, self._free.num_gpus - needs.num_gpus)
        return None


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


def before_launch(job: JobRow, readiness: Wait | Budget) -> Decision:
    """For a job with no attempt under way."""
    if isinstance(readiness, Wait):
        return readiness
    problem = readiness.take(Needs.of(job))
    return Launch() if problem is None else Wait(Reason.WAITING_FOR_RESOURCES, problem, WAITING_SECONDS)


def during(job: JobRow, attempt: AttemptRow, ray_job: RayJob | None, *, now: datetime, grace_seconds: float) -> Decision:
    """For an attempt that Ray was given, by what Ray says of it now (None: it does not know it).

    grace_seconds: how long a run that is to end may take to do so by itself.
    """
    if ray_job is None or ray_job.status.is_over:
        return _CANCELLED if job.status == JobStatus.STOPPING else Inspect()
    if job.status in _WISHED and _must_kill(job, attempt, now=now, grace_seconds=grace_seconds):
        return Kill()
    if job.status == JobStatus.STARTING and attempt.submitted_at is not None and now - attempt.submitted_at > PLACEMENT_PATIENCE:
        return Wait(Reason.WAITING_FOR_RESOURCES, "Ray has not started the workers yet: it looks for room for all of them", ACTIVE_SECONDS)
    return Wait(_WISHED.get(JobStatus(job.status)), None, ACTIVE_SECONDS)


def _must_kill(job: JobRow, attempt: AttemptRow, *, now: datetime, grace_seconds: float) -> bool:
    if attempt.stop_requested_at is not None:
        return now - attempt.stop_requested_at >= timedelta(seconds=STOP_AGAIN_SECONDS)
    if attempt.started_at is None or job.desired_since is None:
        return True  # its workers have not begun: they have nothing to save, and do not hear us
    return now - job.desired_since >= timedelta(seconds=grace_seconds)


def after(job: JobRow, attempt: AttemptRow, ray_job: RayJob | None, result: CommittedResult | None, *, backoff_seconds: float) -> Decision:
    """For a run that is over, by whether its result is committed. A committed result is a success, however the run ended."""
    if result is not None:
        return Succeed(result)
    reason, detail = cause(attempt, ray_job)
    if not REASON_RULES[reason].retryable:
        return End(JobStatus.FAILED, reason, detail)
    if job.desired_state == DesiredState.PAUSE:  # however it ended: it goes on from its last training state
        return _PAUSED
    if reason is not Reason.WORKER_DIED and job.num_failures < job.spec["retry"]["max_failures"]:  # the driver has spent its own on those
        return Recover(reason, detail, min(backoff_seconds * 2**job.num_failures, MAX_BACKOFF_SECONDS))
    last = f"attempt {attempt.number} ended with {reason}" + (f": {detail}" if detail else "")
    return End(JobStatus.FAILED, Reason.RETRIES_EXHAUSTED, last, cause=reason)


def cause(attempt: AttemptRow, ray_job: RayJob | None) -> tuple[Reason, str | None]:
    """Why a run ended without a result: what its workers said, else what can be told from Ray."""
    if attempt.reason is not None:
        return Reason(attempt.reason), attempt.message
    if ray_job is None:
        return Reason.RAY_JOB_LOST, None
    if ray_job.status is RayStatus.SUCCEEDED:
        return Reason.RUN_NOT_COMMITTED, None
    return Reason.DRIVER_DIED, ray_job.message
