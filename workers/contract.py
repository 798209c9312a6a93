"""What the service and the workers say to each other. Pydantic and mae_core.config only, so that both sides can load it.

Service → worker: one `WorkOrder` at launch, then a `ReportAnswer` to every report. Worker → service: `Report`s, each with some
points of the metric series, some events and the newest progress, sent in order and known by (attempt, incarnation, sequence), so that
a repeat changes nothing.
"""

import hashlib
import hmac
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, NamedTuple, Self

from pydantic import AfterValidator, AwareDatetime, ConfigDict, FailFast, Field, StringConstraints, model_validator

from mae_core.config import RunSpec
from mae_core.options import Strict
from workers.names import JobStatus as JobStatus

CONTRACT_VERSION = 4
ORDER_VARIABLE = "MAESTRO_ORDER"  # the environment variable in which the driver finds its order, as JSON
STALE_ATTEMPT_TYPE = "urn:maestro:stale-attempt"  # the problem type of a 409 that ends an attempt
MAX_INTEGER = 2**63 - 1  # what a database column holds
MAX_POINTS = 1000  # steps in one report
MAX_SERIES = 64  # in one report
MAX_EVENTS = 100  # events in one report
STORAGE_PATIENCE_SECONDS = 24 * 3600.0  # so long a result, and the state of a run that pauses, wait for storage that is away


def _in_utc(time: datetime) -> datetime:
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise ValueError("in UTC it lies outside of the years 1 to 9999") from None


Time = Annotated[AwareDatetime, AfterValidator(_in_utc)]  # given in any zone


class DesiredState(StrEnum):
    """What the user wants of a job; a column apart from its status."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


class Reason(StrEnum):
    """Why a job waits, recovers or ended."""

    # it waits
    WAITING_FOR_RESOURCES = "waiting_for_resources"
    RAY_UNREACHABLE = "ray_unreachable"
    STORAGE_UNREACHABLE = "storage_unreachable"
    WAITING_FOR_JOB = "waiting_for_job"
    # infrastructure: the run goes on from its training state
    WORKER_DIED = "worker_died"
    HUNG = "hung"
    DRIVER_DIED = "driver_died"
    RAY_JOB_LOST = "ray_job_lost"
    RUN_NOT_COMMITTED = "run_not_committed"
    # the user's to mend: a retry cannot help
    DATA_ERROR = "data_error"
    STORAGE_REFUSED = "storage_refused"
    ENCODER_ERROR = "encoder_error"
    PARENT_FAILED = "parent_failed"
    SPEC_ERROR = "spec_error"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out_of_memory"
    CONTRACT_MISMATCH = "contract_mismatch"
    INTERNAL_ERROR = "internal_error"
    STALE_ATTEMPT = "stale_attempt"
    RETRIES_EXHAUSTED = "retries_exhausted"
    TIME_LIMIT_REACHED = "time_limit_reached"
    # as wanted
    PAUSED_BY_USER = "paused_by_user"
    CANCELLED_BY_USER = "cancelled_by_user"


class Retry(StrEnum):
    """Which budget pays for another try after a failure."""

    NOBODY = "nobody"  # it was no failure
    INFRASTRUCTURE = "infrastructure"  # retry.max_failures
    USER = "user"  # retry.max_user_failures: none unless the user gives one
    NEVER = "never"  # it would fail in the same way


class Condition(StrEnum):
    """What is amiss with a job that goes on all the same."""

    UPLOAD_DELAYED = "upload_delayed"
    REPORTS_DELAYED = "reports_delayed"


CONDITION_MESSAGES: dict[Condition, str] = {
    Condition.UPLOAD_DELAYED: "Object storage does not take the run's files; training goes on, its states stay on the workers' disks.",
    Condition.REPORTS_DELAYED: "Nothing is heard of the workers; training may go on, they keep what they tell and send it later.",
}


class ReasonRule(NamedTuple):
    """What follows from a reason: where it leads in the end (None: the job goes on), whether a new attempt may help, what to tell."""

    final_status: JobStatus | None
    retry: Retry
    message: str


_FAILED, _GOES_ON = JobStatus.FAILED, "it goes on from its last training state."
_NOBODY, _INFRASTRUCTURE, _USER, _NEVER = Retry
REASON_RULES: dict[Reason, ReasonRule] = {
    Reason.WAITING_FOR_RESOURCES: ReasonRule(None, _NOBODY, "The cluster has too few free devices now; the job starts when they are free."),
    Reason.RAY_UNREACHABLE: ReasonRule(
        None, _INFRASTRUCTURE, "The Ray cluster does not answer; the job waits for it. Check its head and its token."
    ),
    Reason.STORAGE_UNREACHABLE: ReasonRule(
        None, _INFRASTRUCTURE, "Object storage does not answer; the job waits. Check its endpoint and credentials."
    ),
    Reason.WAITING_FOR_JOB: ReasonRule(
        None, _INFRASTRUCTURE, "The job whose encoder it starts from has not finished; it starts when that one succeeds."
    ),
    Reason.WORKER_DIED: ReasonRule(_FAILED, _INFRASTRUCTURE, f"A worker process of the run died; {_GOES_ON}"),
    Reason.HUNG: ReasonRule(
        _FAILED,
        _INFRASTRUCTURE,
        f"Its workers lived but took no step for much longer than before; their stacks are in its logs; {_GOES_ON}",
    ),
    Reason.DRIVER_DIED: ReasonRule(_FAILED, _INFRASTRUCTURE, f"The driver process of the run died; {_GOES_ON}"),
    Reason.RAY_JOB_LOST: ReasonRule(_FAILED, _INFRASTRUCTURE, f"Ray no longer knows the run (its head restarted); {_GOES_ON}"),
    Reason.RUN_NOT_COMMITTED: ReasonRule(_FAILED, _INFRASTRUCTURE, f"The run ended without a committed result; {_GOES_ON}"),
    Reason.DATA_ERROR: ReasonRule(_FAILED, _USER, "The data cannot be used; see the detail, mend it and submit again."),
    Reason.STORAGE_REFUSED: ReasonRule(_FAILED, _USER, "Object storage refused the workers; check their credentials and the bucket."),
    Reason.ENCODER_ERROR: ReasonRule(_FAILED, _USER, "The encoder cannot be used; see the detail and name another."),
    Reason.PARENT_FAILED: ReasonRule(
        _FAILED, _NEVER, "The job whose encoder it would start from left none; see that one, and submit both again."
    ),
    Reason.SPEC_ERROR: ReasonRule(_FAILED, _NEVER, "The spec does not fit its data; see the detail, mend it and submit again."),
    Reason.DIVERGED: ReasonRule(_FAILED, _NEVER, "Losses are not finite; lower optim.base_lr or lengthen optim.warmup_epochs."),
    Reason.OUT_OF_MEMORY: ReasonRule(_FAILED, _NEVER, "Out of memory; lower optim.batch_size, raise optim.accumulation or add workers."),
    Reason.CONTRACT_MISMATCH: ReasonRule(_FAILED, _NEVER, "Service and workers differ in version; install the same one on all hosts."),
    Reason.INTERNAL_ERROR: ReasonRule(_FAILED, _USER, "An error in MAEstro itself; see the job's logs, and report it with them."),
    Reason.STALE_ATTEMPT: ReasonRule(_FAILED, _INFRASTRUCTURE, "A newer attempt had taken over the job."),
    Reason.RETRIES_EXHAUSTED: ReasonRule(_FAILED, _NEVER, "It failed more often than its retry budget allows; see the last cause."),
    Reason.PAUSED_BY_USER: ReasonRule(None, _NEVER, f"Paused on request; it holds no device. When it is resumed {_GOES_ON}"),
    Reason.CANCELLED_BY_USER: ReasonRule(JobStatus.CANCELLED, _NEVER, "Cancelled on request."),
    Reason.TIME_LIMIT_REACHED: ReasonRule(
        _FAILED,
        _NEVER,
        "It trained for as long as time_limit_hours allows; its last state is kept. Submit it again with more time: it starts anew.",
    ),
}


class EventType(StrEnum):
    """Facts about a job, in the past tense. The first group is the service's, the second the workers'.

    Behind each: what has happened, and the fields of its data. docs/reference/events.md is made of it.
    """

    JOB_QUEUED = "job_queued"  # it was submitted; data: kind, name, retry_of
    STATUS_CHANGED = "status_changed"  # it is at another place of its way; data: from, to, reason, detail
    REASON_CHANGED = "reason_changed"  # it waits for another reason, or for none any more; data: reason, detail
    CANCEL_REQUESTED = "cancel_requested"  # somebody wants its end
    PAUSE_REQUESTED = "pause_requested"  # somebody wants it to save its state and release its devices
    RESUME_REQUESTED = "resume_requested"  # somebody wants it to go on
    JOB_CHANGED = "job_changed"  # name, labels, priority, notes or keep are others; data: by, changes
    ATTEMPT_CREATED = "attempt_created"  # it is about to be launched; data: submission_id (Ray's)
    ATTEMPT_ENDED = "attempt_ended"  # its reports are refused from now on; data: reason, message

    WORKERS_STARTED = "workers_started"  # all workers are up; data: incarnation, num_workers, device, host, resumed_from
    WORKERS_FAILED = "workers_failed"  # they start again; data: reason, message, rank, num_workers_before, restart, max_restarts
    RUN_HUNG = "run_hung"  # no step for too long; data: rank, step, seconds, stacks
    FIRST_STEP_TAKEN = "first_step_taken"  # the first of this start of the workers; data: step
    IMAGES_SKIPPED = "images_skipped"  # they cannot be read; data: count, images (the first, and why)
    TRAINING_STATE_COMMITTED = "training_state_committed"  # a failure costs no step before this one; data: step, key, bytes
    SAVE_FAILED = "save_failed"  # a training state was not saved; training goes on; data: step, message
    UPLOAD_DELAYED = "upload_delayed"  # storage does not take the run's files, training goes on; data: message, step, num_kept
    UPLOAD_RECOVERED = "upload_recovered"  # storage takes them again, and nothing waits
    STEPS_DROPPED = "steps_dropped"  # loss or gradient was not finite; data: count, steps (the first, with ranks and images)
    WENT_BACK = "went_back"  # too many steps in a row were dropped; data: step, resumed_from, message
    EVALUATED = "evaluated"  # the model was measured; data: step, metrics
    TRAINING_ENDED = "training_ended"  # the last step is taken; data: step
    RECONSTRUCTIONS_WRITTEN = "reconstructions_written"  # a picture and its arrays; data: step, key, bytes, sha256, arrays
    RESULT_COMMITTED = "result_committed"  # the run has succeeded; data: uri, metrics, left_out (formats, and why)
    RUN_STOPPED = "run_stopped"  # as its user wanted; data: step, desired_state
    RUN_FAILED = "run_failed"  # the attempt has failed; data: reason, message, rank (-1: the driver)


WORKER_EVENTS = frozenset(
    {
        EventType.WORKERS_STARTED,
        EventType.WORKERS_FAILED,
        EventType.RUN_HUNG,
        EventType.FIRST_STEP_TAKEN,
        EventType.IMAGES_SKIPPED,
        EventType.TRAINING_STATE_COMMITTED,
        EventType.SAVE_FAILED,
        EventType.UPLOAD_DELAYED,
        EventType.UPLOAD_RECOVERED,
        EventType.STEPS_DROPPED,
        EventType.WENT_BACK,
        EventType.EVALUATED,
        EventType.TRAINING_ENDED,
        EventType.RECONSTRUCTIONS_WRITTEN,
        EventType.RESULT_COMMITTED,
        EventType.RUN_STOPPED,
        EventType.RUN_FAILED,
    }
)


class StorageRef(Strict):
    """An S3 bucket as workers reach it. Credentials are the worker host's own, never part of an order."""

    endpoint: str | None = None
    region: str = "us-east-1"
    bucket: str


class WorkOrder(Strict):
    """All that one attempt needs, but for the storage credentials. `token` is the attempt's own and dies with it."""

    contract: int = CONTRACT_VERSION
    job: str
    attempt: int = Field(ge=1)
    spec: RunSpec
    token: str = Field(repr=False)
    service_url: str
    storage: StorageRef
    prefix: str = Field(description="key prefix of the job in the bucket, ending in /")
    log_bytes: int = Field(default=64 * 2**20, ge=0, description="what may be kept of all that the attempt prints")


def submission_id(job: str, attempt: int) -> str:
    """Ray's id for one attempt; the same call always gives the same id, so a repeated submission is recognised."""
    return f"{job}-a{attempt}"


def attempt_token(secret_key: str, job: str, attempt: int) -> str:
    """The token of one attempt, derived from the service's key, so that it is stored nowhere."""
    return hmac.new(secret_key.encode(), f"attempt:{job}:{attempt}".encode(), hashlib.sha256).hexdigest()


SeriesName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_./:-]{1,100}$")]
SeriesValues = Annotated[list[float | None], Field(max_length=MAX_POINTS), FailFast()]  # one error is told, not one for each value


class Points(Strict):
    """Some points of the metric series, by column: `series[name][i]` belongs to `steps[i]`. NaN and infinity travel as strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=True, ser_json_inf_nan="strings")

    steps: Annotated[list[Annotated[int, Field(ge=0, le=MAX_INTEGER)]], Field(max_length=MAX_POINTS), FailFast()]
    series: dict[SeriesName, SeriesValues] = Field(max_length=MAX_SERIES)

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        for name, values in self.series.items():
            if len(values) != len(self.steps):
                raise ValueError(f"series {name!r} has {len(values)} values for {len(self.steps)} steps")
        return self


class Event(Strict):
    """One fact a worker tells."""

    type: EventType
    at: Time
    data: dict[str, Any] = Field(default={})


class RunProgress(Strict):
    """How far a run is. `eta_seconds` counts to the last step."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=True, ser_json_inf_nan="strings")

    step: int = Field(ge=0)
    num_steps: int = Field(ge=1)
    epoch: float = Field(ge=0)
    images_per_second: float | None = None
    eta_seconds: float | None = None
    loss: float | None = None


class Origin(Strict):
    """By which attempt, and as which of its reports, points were told first."""

    attempt: int = Field(ge=1, le=MAX_INTEGER)
    incarnation: int = Field(ge=0, le=MAX_INTEGER)
    sequence: int = Field(ge=0, le=MAX_INTEGER)


class Report(Strict):
    """One message from rank 0 (or the driver, when the run failed). `sequence` counts from 0 within an incarnation.

    The first step that an incarnation tells of says where it has taken up the run: what earlier ones told of later steps is taken back.
    """

    contract: int = CONTRACT_VERSION
    incarnation: int = Field(
        ge=0, le=MAX_INTEGER, description="one start of the workers inside an attempt: its time in ms, so that later ones are larger"
    )
    sequence: int = Field(ge=0, le=MAX_INTEGER)
    points: Points | None = None
    origin: Origin | None = Field(default=None, description="of points that an earlier attempt left behind; an own report has none")
    events: list[Event] = Field(default=[], max_length=MAX_EVENTS)
    progress: RunProgress | None = None


class ReportAnswer(Strict):
    """The service's answer to a report: the channel by which a cancel reaches the workers.

    `may_grow`: whether an elastic run may take what is free; not while another job waits for devices.
    """

    desired_state: DesiredState
    may_grow: bool = False
