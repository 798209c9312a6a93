"""Which training states stay: a policy for each job, pins and tombstones of artifacts; deleted jobs that are looked at once more.

Steps of what is there are read from its names.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)
_BATCH = 1000
_JOBS = sa.table(
    "jobs", sa.column("id", sa.String()), sa.column("kind", sa.String()), sa.column("spec", sa.JSON()), sa.column("keep", sa.JSON())
)
_ARTIFACTS = sa.table("artifacts", sa.column("kind", sa.String()), sa.column("name", sa.String()), sa.column("step", sa.BigInteger()))
_DIGITS = 10
_NAMED_BY_STEP = (
    ("training_state/step=", "-a", ["training_state"]),
    ("reconstructions/step=", ".", ["reconstruction", "reconstruction_arrays"]),
)


def upgrade() -> None:
    op.add_column("jobs", sa.Column("keep", sa.JSON()))
    op.add_column("jobs", sa.Column("prune_at", _TIME))
    for column in (sa.Column("step", sa.BigInteger()), sa.Column("pinned_at", _TIME), sa.Column("deleted_at", _TIME)):
        op.add_column("artifacts", column)
    as_before = {"last": 2, "every_steps": None, "best": None}
    op.execute(sa.update(_JOBS).where(_JOBS.c.kind.in_(["pretrain", "finetune"])).values(keep=as_before))
    for begin, end, kinds in _NAMED_BY_STEP:
        digits = sa.func.substr(_ARTIFACTS.c.name, len(begin) + 1, _DIGITS)
        is_ours = sa.and_(_ARTIFACTS.c.kind.in_(kinds), _ARTIFACTS.c.name.like(f"{begin}{'_' * _DIGITS}{end}%"))
        op.execute(sa.update(_ARTIFACTS).where(is_ours).values(step=sa.cast(digits, sa.BigInteger())))
    op.create_index("ix_jobs_prune_at", "jobs", ["prune_at"], **_where("prune_at IS NOT NULL"))
    op.create_index("ix_artifacts_job_id_kind_step", "artifacts", ["job_id", "kind", "step"])
    op.create_index("ix_artifacts_deleted_at", "artifacts", ["deleted_at"], **_where("deleted_at IS NOT NULL"))
    op.create_table(
        "deleted_jobs",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("look_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deleted_jobs")),
    )
    op.create_index("ix_deleted_jobs_look_at", "deleted_jobs", ["look_at"])
    op.execute(sa.text("INSERT INTO counters (name, value) VALUES ('bytes_freed', 0)"))


def downgrade() -> None:
    """What was to be deleted is not listed any more; workers of that version take it away from storage. They know no `checkpoint.keep`."""
    _downgrade_specs()
    op.execute(sa.text("DELETE FROM counters WHERE name = 'bytes_freed'"))
    op.drop_table("deleted_jobs")
    op.execute(sa.text("DELETE FROM artifacts WHERE deleted_at IS NOT NULL"))
    for name in ("ix_artifacts_deleted_at", "ix_artifacts_job_id_kind_step"):
        op.drop_index(name, "artifacts")
    op.drop_index("ix_jobs_prune_at", "jobs")
    for name in ("deleted_at", "pinned_at", "step"):
        op.drop_column("artifacts", name)
    for name in ("prune_at", "keep"):
        op.drop_column("jobs", name)


def _downgrade_specs() -> None:
    connection, last = op.get_bind(), ""
    change = sa.update(_JOBS).where(_JOBS.c.id == sa.bindparam("job")).values(spec=sa.bindparam("without"))
    while rows := connection.execute(sa.select(_JOBS).where(_JOBS.c.id > last).order_by(_JOBS.c.id).limit(_BATCH)).all():
        last = rows[-1].id
        changed = [
            {"job": row.id, "without": row.spec | {"checkpoint": {name: value for name, value in checkpoint.items() if name != "keep"}}}
            for row in rows
            if "keep" in (checkpoint := row.spec.get("checkpoint") or {})
        ]
        if changed:
            connection.execute(change, changed)


def _where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}
