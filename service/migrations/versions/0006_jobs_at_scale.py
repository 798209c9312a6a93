"""Jobs found by status, kind, label and word without a look at all of them; notes, deletions, retries, and whose encoder a job starts from.

What finds a job is filled in for those that are there, a thousand at a time.
"""

import re
import unicodedata
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_FILTERS: list[list[str]] = [["status"], ["project", "status"], ["kind"], ["project", "kind"]]
_BEFORE: list[list[str]] = [[], ["project"]]  # these were there, of all jobs
_BATCH = 1000
_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("jobs", sa.Column("words", sa.Text(), nullable=False, server_default=sa.text("''")))
    op.add_column("jobs", sa.Column("notes", sa.Text()))
    op.add_column("jobs", sa.Column("encoder_job", sa.String(40)))
    op.add_column("jobs", sa.Column("retry_of", sa.String(40)))
    op.add_column("jobs", sa.Column("deleted_at", _TIME))
    word = sa.String(64).with_variant(sa.String(64, collation="C"), "postgresql")
    op.create_table(
        "job_labels",
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("label", sa.String(264), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_labels_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", "label", name=op.f("pk_job_labels")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "job_words",
        sa.Column("word", word, nullable=False),
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_words_job_id_jobs")),
        sa.PrimaryKeyConstraint("word", "job_id", name=op.f("pk_job_words")),
        sqlite_with_rowid=False,
    )
    _fill_in()
    for columns in _BEFORE:
        op.drop_index(_name(columns), "jobs")
    for columns in [*_BEFORE, *_FILTERS]:
        op.create_index(_name(columns), "jobs", [*columns, "created_at", "id"], **_where("deleted_at IS NULL"))
    op.create_index("ix_jobs_deleted_at", "jobs", ["deleted_at"], **_where("deleted_at IS NOT NULL"))
    op.create_index("ix_jobs_encoder_job", "jobs", ["encoder_job"], **_where("encoder_job IS NOT NULL"))
    op.create_index("ix_job_labels_label_created_at_job_id", "job_labels", ["label", "created_at", "job_id"])
    op.create_index("ix_job_labels_project_label_created_at_job_id", "job_labels", ["project", "label", "created_at", "job_id"])
    op.create_index("ix_job_words_job_id", "job_words", ["job_id"])


def downgrade() -> None:
    """Jobs whose deletion has begun are there again, as far as they are left."""
    for name in ("ix_jobs_encoder_job", "ix_jobs_deleted_at"):
        op.drop_index(name, "jobs")
    for columns in [*_BEFORE, *_FILTERS]:
        op.drop_index(_name(columns), "jobs")
    for columns in _BEFORE:
        op.create_index(_name(columns), "jobs", [*columns, "created_at", "id"])
    op.drop_table("job_words")
    op.drop_table("job_labels")
    for name in ("deleted_at", "retry_of", "encoder_job", "notes", "words"):
        op.drop_column("jobs", name)


def _name(columns: list[str]) -> str:
    return "_".join(["ix_jobs", *columns, "created_at_id"])


def _where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def _fill_in() -> None:
    columns: list[sa.ColumnClause[Any]] = [sa.column(name, sa.String()) for name in ("id", "name", "project")]
    columns += [sa.column("labels", sa.JSON()), sa.column("spec", sa.JSON()), sa.column("created_at", _TIME)]
    jobs = sa.table("jobs", *columns, sa.column("words", sa.Text()), sa.column("encoder_job", sa.String()))
    labels = sa.table("job_labels", *(sa.column(name) for name in ("job_id", "label", "project")), sa.column("created_at", _TIME))
    words = sa.table("job_words", sa.column("word"), sa.column("job_id"), sa.column("created_at", _TIME))
    connection, last = op.get_bind(), ""
    change = sa.update(jobs).where(jobs.c.id == sa.bindparam("job")).values(words=sa.bindparam("said"), encoder_job=sa.bindparam("parent"))
    while rows := connection.execute(sa.select(*columns).where(jobs.c.id > last).order_by(jobs.c.id).limit(_BATCH)).all():
        last = rows[-1].id
        found = {row.id: _words(f"{row.name} {row.id}") for row in rows}
        connection.execute(change, [{"job": row.id, "said": _said(found[row.id]), "parent": _encoder_job(row.spec)} for row in rows])
        connection.execute(
            sa.insert(words), [{"word": word, "job_id": row.id, "created_at": row.created_at} for row in rows for word in found[row.id]]
        )
        labelled = [
            {"job_id": row.id, "label": label, "project": row.project, "created_at": row.created_at}
            for row in rows
            for label in dict.fromkeys(text for key, value in row.labels.items() for text in (key, f"{key}:{value}"))
        ]
        if labelled:
            connection.execute(sa.insert(labels), labelled)


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKC", text).casefold()
    return list(dict.fromkeys(word[:64] for word in re.findall(r"[^\W_]+", plain)))


def _said(words: list[str]) -> str:
    return "".join(f" {word}" for word in words)


def _encoder_job(spec: dict[str, Any]) -> str | None:
    """By its name, or by where its result lies, in whatever bucket: at worst it is kept for longer."""
    encoder = spec.get("encoder") or {}
    match = re.match(r"s3://[^/]+/jobs/([a-z0-9]{1,40})/", encoder.get("artifact") or "")
    job: str | None = encoder.get("job") or (match[1] if match else None)
    return job
