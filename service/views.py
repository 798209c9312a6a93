"""What the API answers."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json
from sqlalchemy import Row

from mae_core.options import KeepConfig
from service import conditions
from service.db import utc_now
from service.deliveries import DeliveryStatus
from service.models import ArtifactRow, DeliveryRow, EventRow, JobRow, TokenRow, WebhookRow
from service.retention import Why
from service.tokens import Role, prefix_of
from service.webhooks import WebhookEvents
from workers.contract import REASON_RULES, Condition, DesiredState, JobStatus, Reason, RunProgress


class View(BaseModel):
    """An answer. JSON has no NaN: NaN and infinity are strings."""

    model_config = ConfigDict(ser_json_inf_nan="strings", from_attributes=True)


class JobSummary(View):
    id: str
    project: str
    name: str
    kind: str
    status: JobStatus
    reason: Reason | None = Field(description="why it waits, recovers or ended")
    detail: str | None = Field(description="what the reason is about in this case")
    desired_state: DesiredState = Field(description="what its users want of it")
    labels: dict[str, str]
    priority: int
    attempt: int = Field(description="how often it was launched")
    progress: RunProgress | None = Field(description="of its newest report")
    created_at: datetime
    started_at: datetime | None = Field(description="when workers were up first")
    finished_at: datetime | None


class ConditionView(View):
    """Something amiss with a job that goes on all the same."""

    since: datetime
    detail: str | None
    message: str = Field(description="what the condition means")


class JobView(JobSummary):
    notes: str | None
    keep: KeepConfig | None = Field(description="which training states stay; null: it has none, or is of a version before")
    retry_of: str | None = Field(description="the job whose spec it was given once more")
    spec: dict[str, Any] = Field(description="resolved, as it was submitted: a PATCH does not change it")
    reason_message: str | None = Field(description="what the reason means, and what to do")
    conditions: dict[Condition, ConditionView] = Field(description="what is amiss while it goes on")
    metrics: dict[str, Any] | None = Field(description="of its end")
    result_uri: str | None = Field(description="`s3://bucket/jobs/<id>/encoder/`, once it is committed")
    version: int = Field(description="grows with each change")

    @classmethod
    def of(cls, row: JobRow) -> Self:
        message = REASON_RULES[Reason(row.reason)].message if row.reason else None
        made_here = {"reason_message": message, "conditions": conditions.read(row, now=utc_now())}
        return cls(**{name: getattr(row, name) for name in cls.model_fields if name not in made_here}, **made_here)


class JobPage(View):
    jobs: list[JobSummary]
    next_cursor: str | None = Field(description="`cursor` of the next page; null: this is the last")

    @staticmethod
    def json_of(rows: Sequence[Row[Any]], *, fields: Sequence[str], next_cursor: str | None) -> bytes:
        """Of rows that have at least the fields, each job with just these. The database's own values: nothing of them is checked again."""
        return to_json({"jobs": [_shown(row, fields) for row in rows], "next_cursor": next_cursor}, inf_nan_mode="strings")


def _shown(row: Row[Any], fields: Sequence[str]) -> dict[str, Any]:
    shown = {name: row._mapping[name] for name in fields}
    if shown.get("progress") is not None:
        shown["progress"] = RunProgress.model_validate(shown["progress"])
    return shown


class EventView(View):
    id: int = Field(description="grows within a job")
    type: str
    at: datetime
    attempt: int | None = Field(description="in which it happened")
    data: dict[str, Any] = Field(description="its fields, by type: see the events")

    @classmethod
    def of(cls, row: EventRow) -> Self:
        return cls.model_validate(row)


class JobEventView(EventView):
    """An event in a stream of all jobs'."""

    job_id: str
    project: str

    @classmethod
    def of(cls, row: EventRow, project: str) -> Self:  # type: ignore[override]
        return cls(project=project, **{name: getattr(row, name) for name in cls.model_fields if name != "project"})


class EventPage(View):
    events: list[EventView]
    next_after: int = Field(description="`after` of the next page")


class Series(View):
    steps: list[int]
    values: list[float] = Field(description="of these steps, in their order; NaN and infinity as text")


class MetricsView(View):
    series: dict[str, Series]


class ArtifactView(View):
    """step: of a training state, and of reconstructions."""

    name: str = Field(description="the key below the job's prefix; a training state's ends in /, and fetching it gives its manifest")
    kind: str = Field(description="encoder, probe, evaluation, embedding, reconstruction, reconstruction_arrays, training_state or log")
    bytes: int
    sha256: str | None
    uri: str
    created_at: datetime
    step: int | None
    pinned: bool

    @classmethod
    def of(cls, row: ArtifactRow) -> Self:
        return cls(pinned=row.pinned_at is not None, **{name: getattr(row, name) for name in cls.model_fields if name != "pinned"})


class ArtifactList(View):
    artifacts: list[ArtifactView]


class ReconstructionsView(View):
    """Of one step: the picture, and what it shows as arrays."""

    step: int
    picture: ArtifactView
    arrays: ArtifactView | None


class ReconstructionsPage(View):
    reconstructions: list[ReconstructionsView]
    next_after: int | None


class CheckpointView(View):
    """A training state. value: of the series that the policy's `best` goes by, as it was then. kept_because: nothing: it goes."""

    name: str
    step: int
    attempt: int
    bytes: int
    created_at: datetime
    uri: str
    pinned: bool
    value: float | None
    kept_because: list[Why]


class CheckpointPage(View):
    """num_deleted, bytes_deleted: of all states, what this policy would delete, or is about to delete."""

    keep: KeepConfig
    num_deleted: int
    bytes_deleted: int
    checkpoints: list[CheckpointView]
    next_cursor: str | None


class DeletionView(View):
    """What a deletion would take away; is_complete false: that, and more."""

    num_objects: int
    bytes: int
    is_complete: bool


class ArtifactLink(View):
    """A presigned address: whoever has it has the object, for an hour."""

    url: str


class LogView(View):
    """What is kept of what a process has printed: a worker's, by its rank, or the driver's."""

    worker: str = Field(description="a rank, or driver")
    bytes: int = Field(description="what is kept")


class LogList(View):
    attempt: int | None
    workers: list[LogView]


class TokenView(View):
    """What is known of a token, which is not its text: `prefix` begins it."""

    id: str
    prefix: str = Field(description="`mst_<id>`, with which its text begins")
    name: str
    role: Role
    project: str | None = Field(description="null: all")
    created_at: datetime
    expires_at: datetime | None = Field(description="null: never")
    revoked_at: datetime | None
    last_used_at: datetime | None = Field(description="to the minute")

    @classmethod
    def of(cls, row: TokenRow) -> Self:
        return cls(prefix=prefix_of(row.id), **{name: getattr(row, name) for name in TokenView.model_fields if name != "prefix"})


class NewTokenView(TokenView):
    token: str = Field(description="its text, which no other answer has")


class TokenList(View):
    tokens: list[TokenView]


class WebhookView(View):
    """project None: events of all projects. failing_since: since when no try has succeeded."""

    id: str
    url: str
    project: str | None = Field(description="null: all")
    events: WebhookEvents
    enabled: bool
    disabled_reason: str | None
    created_at: datetime
    failing_since: datetime | None = Field(description="since when no try has succeeded")

    @classmethod
    def of(cls, row: WebhookRow) -> Self:
        return cls(enabled=row.is_enabled, **{name: getattr(row, name) for name in WebhookView.model_fields if name != "enabled"})


class NewWebhookView(WebhookView):
    secret: str = Field(description="the key of signatures, which no other answer has")


class WebhookList(View):
    webhooks: list[WebhookView]


class DeliveryView(View):
    """One event for one webhook. `status_code` and `detail`: of the last try."""

    event_id: int
    job_id: str
    type: str
    status: DeliveryStatus
    created_at: datetime
    due_at: datetime | None = Field(description="when it is tried next")
    finished_at: datetime | None
    num_tries: int
    tried_at: datetime | None
    status_code: int | None = Field(description="of the last try")
    detail: str | None = Field(description="of the last try: what went wrong")

    @classmethod
    def of(cls, row: DeliveryRow) -> Self:
        return cls.model_validate(row)


class DeliveryPage(View):
    deliveries: list[DeliveryView]
    next_before: int | None = Field(description="`before` of the next page; null: this is the last")


class Readiness(View):
    ready: bool
    missing: dict[str, str] = Field(description="what does not answer, and why")


class FieldProblem(View):
    field: str
    message: str


class ProblemView(View):
    """RFC 9457: what every error answers. `type` is `urn:maestro:<kebab-case>`, `errors` is there where fields are wrong."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblem] = []
