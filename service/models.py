"""The tables. Small status, rich reason; what the user wants is a column apart from where the job is."""

from datetime import date, datetime
from typing import Any, ClassVar

from sqlalchemy import BigInteger, ForeignKey, ForeignKeyConstraint, Index, Integer, MetaData, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from service.db import CleanString, CleanText, JsonValue, UtcDateTime
from service.projects import DEFAULT_PROJECT


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        datetime: UtcDateTime(),
        dict[str, Any]: JsonValue(),
        dict[str, str]: JsonValue(),
        list[str]: JsonValue(),
    }


def _where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


class JobRow(Base):
    """One job. `status` is written by `lifecycle.transition` alone; `due_at` is when a dispatcher should next look (None: never)."""

    __tablename__ = "jobs"
    __table_args__ = (
        # each filter of a list, of a project and of all: its jobs newest first
        *(
            Index("_".join(["ix_jobs", *columns, "created_at_id"]), *columns, "created_at", "id", **_where("deleted_at IS NULL"))
            for columns in ([], ["project"], ["status"], ["project", "status"], ["kind"], ["project", "kind"])
        ),
        *(
            Index(
                "_".join(["ix_jobs", *columns, "finished_at"]),
                *columns,
                "finished_at",
                **_where("deleted_at IS NULL AND finished_at IS NOT NULL"),
            )
            for columns in ([], ["project"])
        ),
        Index("ix_jobs_deleted_at", "deleted_at", **_where("deleted_at IS NOT NULL")),
        Index("ix_jobs_encoder_job", "encoder_job", **_where("encoder_job IS NOT NULL")),
        Index("ix_jobs_due_at", "due_at", **_where("due_at IS NOT NULL")),
        Index("ix_jobs_waits_for", "waits_for", **_where("waits_for IS NOT NULL")),
        Index("ix_jobs_waiting_since", "waiting_since", **_where("waiting_since IS NOT NULL")),
        Index("ix_jobs_prune_at", "prune_at", **_where("prune_at IS NOT NULL")),
    )

    id: Mapped[str] = mapped_column(CleanString(40), primary_key=True)
    name: Mapped[str] = mapped_column(CleanString(200))
    kind: Mapped[str] = mapped_column(CleanString(20))
    labels: Mapped[dict[str, str]]  # as shown; found by the rows of JobLabelRow
    words: Mapped[str] = mapped_column(CleanText, default="", server_default=text("''"))  # of name and id, each after a space: see `search`
    notes: Mapped[str | None] = mapped_column(CleanText)
    spec: Mapped[dict[str, Any]]
    # project, line feed, key: unique in its project. SQLite minds no lengths, and its column cannot be altered
    idempotency_key: Mapped[str | None] = mapped_column(CleanString(265).with_variant(CleanString(200), "sqlite"), unique=True)
    body_hash: Mapped[str] = mapped_column(CleanString(64))

    status: Mapped[str] = mapped_column(CleanString(20))
    reason: Mapped[str | None] = mapped_column(CleanString(40))
    detail: Mapped[str | None] = mapped_column(CleanText)
    desired_state: Mapped[str] = mapped_column(CleanString(20))
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    num_failures: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))  # failed attempts that another followed
    num_user_failures: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))  # those that were the user's to mend
    version: Mapped[int] = mapped_column(Integer, default=1)

    project: Mapped[str] = mapped_column(CleanString(64), default=DEFAULT_PROJECT, server_default=DEFAULT_PROJECT)
    priority: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))  # higher ones start first
    num_cpus: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))  # what it needs to start
    num_gpus: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    max_cpus: Mapped[int] = mapped_column(
        Integer, default=0, server_default=text("0")
    )  # what it takes where it finds it: an elastic one more
    max_gpus: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    waiting_since: Mapped[datetime | None]  # since when it waits in line for devices
    waits_for: Mapped[str | None] = mapped_column(CleanString(40))  # the job whose result it starts from, until it has it
    encoder_job: Mapped[str | None] = mapped_column(CleanString(40))  # the job whose result it starts from, also when it has it
    retry_of: Mapped[str | None] = mapped_column(CleanString(40))  # the job that it does again
    run_seconds: Mapped[float] = mapped_column(default=0.0, server_default=text("0"))  # of its ended attempts, while their workers were up
    conditions: Mapped[dict[str, Any] | None]  # what is amiss while it goes on, by name

    progress: Mapped[dict[str, Any] | None]
    metrics: Mapped[dict[str, Any] | None]
    result_uri: Mapped[str | None] = mapped_column(CleanString(2000))

    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    desired_since: Mapped[datetime | None]  # when the user last wanted something else
    deleted_at: Mapped[datetime | None]  # since then there is no such job; `deletion` takes away what it left

    keep: Mapped[dict[str, Any] | None]  # which training states stay, a KeepConfig; None: it has none, or is of before
    prune_at: Mapped[datetime | None]  # when to look at which of them go; None: nothing has changed since

    due_at: Mapped[datetime | None]
    lease_owner: Mapped[str | None] = mapped_column(CleanString(200))
    lease_token: Mapped[str | None] = mapped_column(CleanString(40))
    lease_expires_at: Mapped[datetime | None]


class JobLabelRow(Base):
    """What a label filter finds a job by: `key` and `key:value`. A copy of `JobRow.labels`, written by `search.index` alone."""

    __tablename__ = "job_labels"
    __table_args__ = (
        Index("ix_job_labels_label_created_at_job_id", "label", "created_at", "job_id"),
        Index("ix_job_labels_project_label_created_at_job_id", "project", "label", "created_at", "job_id"),
        {"sqlite_with_rowid": False},
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    label: Mapped[str] = mapped_column(CleanString(264), primary_key=True)
    project: Mapped[str] = mapped_column(CleanString(64))
    created_at: Mapped[datetime]  # the job's


class JobWordRow(Base):
    """What a search finds a job by: the words of its name and id. Written by `search.index` alone."""

    __tablename__ = "job_words"
    __table_args__ = (Index("ix_job_words_job_id", "job_id"), {"sqlite_with_rowid": False})

    word: Mapped[str] = mapped_column(
        CleanString(64).with_variant(CleanString(64, collation="C"), "postgresql"), primary_key=True
    )  # in the order of code points, so that those with one beginning are a range
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    created_at: Mapped[datetime]  # the job's


class AttemptRow(Base):
    """One launch of a job. Committed before Ray hears of it; `submitted_at` is set once Ray is known to have it."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    submission_id: Mapped[str] = mapped_column(CleanString(60), unique=True)
    num_cpus: Mapped[int] = mapped_column(Integer)
    num_gpus: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime]
    submitted_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    last_report_at: Mapped[datetime | None]
    stop_requested_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None] = mapped_column(index=True)
    incarnation: Mapped[int | None] = mapped_column(BigInteger)
    reason: Mapped[str | None] = mapped_column(CleanString(40))
    message: Mapped[str | None] = mapped_column(CleanText)
    log_key: Mapped[str | None] = mapped_column(CleanString(1000))


class EventRow(Base):
    """One fact about a job. Ids only grow, so a reader goes on after the last id it saw."""

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_job_id_id", "job_id", "id"), {"sqlite_autoincrement": True})

    # SQLite counts up an INTEGER key only; AUTOINCREMENT there never gives an id a second time
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    type: Mapped[str] = mapped_column(CleanString(40))
    at: Mapped[datetime]
    attempt: Mapped[int | None] = mapped_column(Integer)
    data: Mapped[dict[str, Any]]


class MetricBatchRow(Base):
    """The points of one report (level 0: all its columns are in `points`), or of all from `first_sequence` to `sequence`, merged: then its
    columns are rows of `metric_columns`. A report without points has a row, too: its key is what makes a repeat change nothing.
    """

    __tablename__ = "metric_batches"
    __table_args__ = (ForeignKeyConstraint(["job_id", "attempt"], ["attempts.job_id", "attempts.number"]),)

    job_id: Mapped[str] = mapped_column(CleanString(40), primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    incarnation: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    first_sequence: Mapped[int] = mapped_column(BigInteger)
    level: Mapped[int] = mapped_column(Integer)
    num_points: Mapped[int] = mapped_column(Integer)  # of all its series
    first_step: Mapped[int | None] = mapped_column(BigInteger)
    points: Mapped[bytes | None]


class MetricColumnRow(Base):
    """One series of a large batch, as `service.columns` writes it."""

    __tablename__ = "metric_columns"
    __table_args__ = (ForeignKeyConstraint(["job_id", "attempt"], ["attempts.job_id", "attempts.number"]),)

    job_id: Mapped[str] = mapped_column(CleanString(40), primary_key=True)
    name: Mapped[str] = mapped_column(CleanString(100), primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    incarnation: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    first_step: Mapped[int] = mapped_column(BigInteger)
    last_step: Mapped[int] = mapped_column(BigInteger)
    data: Mapped[bytes]


class MetricSummaryRow(Base):
    """A job's series as a whole. `version` grows with each change; `is_whole` until they are thinned."""

    __tablename__ = "metric_summaries"
    __table_args__ = (Index("ix_metric_summaries_changed_on", "changed_on", **_where("is_whole")),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    names: Mapped[list[str]]
    version: Mapped[int] = mapped_column(BigInteger)
    changed_on: Mapped[date]
    is_whole: Mapped[bool]


class ArtifactRow(Base):
    """One thing a job left in object storage; `name` is its key below the job's prefix, ending in / for a folder."""

    __tablename__ = "artifacts"
    __table_args__ = (
        Index("ix_artifacts_job_id_kind_step", "job_id", "kind", "step"),
        Index("ix_artifacts_deleted_at", "deleted_at", **_where("deleted_at IS NOT NULL")),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(CleanString(900), primary_key=True)
    kind: Mapped[str] = mapped_column(CleanString(40))
    attempt: Mapped[int] = mapped_column(Integer)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str | None] = mapped_column(CleanString(64))
    uri: Mapped[str] = mapped_column(CleanString(2000))
    created_at: Mapped[datetime]
    step: Mapped[int | None] = mapped_column(BigInteger)  # of what belongs to one
    pinned_at: Mapped[datetime | None]  # since then it is not to be deleted
    deleted_at: Mapped[datetime | None]  # since then there is no such thing; `pruning` takes away its objects


class DeletedJobRow(Base):
    """A job that is gone, with all its rows, while a worker that was cut off may still upload what it had."""

    __tablename__ = "deleted_jobs"

    id: Mapped[str] = mapped_column(CleanString(40), primary_key=True)
    look_at: Mapped[datetime] = mapped_column(index=True)  # when to take away what has come since


class TokenRow(Base):
    """A user's token: `mst_<id>_<secret>`, of which only the SHA-256 is kept. project None: all of them."""

    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(CleanString(20), primary_key=True)
    name: Mapped[str] = mapped_column(CleanString(200))
    role: Mapped[str] = mapped_column(CleanString(20))
    project: Mapped[str | None] = mapped_column(CleanString(64))
    sha256: Mapped[str] = mapped_column(CleanString(64))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]  # to the minute


class WebhookRow(Base):
    """Where events are sent. Its secret is derived from its id. project None: events of all projects."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(CleanString(20), primary_key=True)
    url: Mapped[str] = mapped_column(CleanString(2000))
    project: Mapped[str | None] = mapped_column(CleanString(64))
    events: Mapped[str] = mapped_column(CleanString(20))
    is_enabled: Mapped[bool] = mapped_column(default=True)
    disabled_reason: Mapped[str | None] = mapped_column(CleanText)
    created_at: Mapped[datetime]
    failing_since: Mapped[datetime | None]  # None: the last try succeeded, or there was none


class DeliveryRow(Base):
    """One event on its way to one webhook. No foreign keys: a webhook that is deleted meanwhile must fail no job's transaction."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_due_at", "due_at", **_where("due_at IS NOT NULL")),
        Index("ix_webhook_deliveries_finished_at", "finished_at", **_where("finished_at IS NOT NULL")),
    )

    webhook_id: Mapped[str] = mapped_column(CleanString(20), primary_key=True)
    event_id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    job_id: Mapped[str] = mapped_column(CleanString(40))
    type: Mapped[str] = mapped_column(CleanString(40))
    payload: Mapped[dict[str, Any]]
    status: Mapped[str] = mapped_column(CleanString(20))
    created_at: Mapped[datetime]
    due_at: Mapped[datetime | None]  # of those that are pending
    give_up_at: Mapped[datetime]  # a try that fails after this was the last
    finished_at: Mapped[datetime | None]
    num_tries: Mapped[int] = mapped_column(Integer, default=0)
    tried_at: Mapped[datetime | None]
    status_code: Mapped[int | None] = mapped_column(Integer)
    detail: Mapped[str | None] = mapped_column(CleanText)  # why the last try failed
    lease_token: Mapped[str | None] = mapped_column(CleanString(40))
    lease_expires_at: Mapped[datetime | None]


class CounterRow(Base):
    """How often something has happened, in all dispatchers."""

    __tablename__ = "counters"

    name: Mapped[str] = mapped_column(CleanString(60), primary_key=True)
    value: Mapped[int] = mapped_column(BigInteger)
