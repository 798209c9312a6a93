"""Projects, priorities, what a job needs and since when it waits for it, budgets by cause, conditions; an attempt's last report."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def _where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def upgrade() -> None:
    op.add_column("jobs", sa.Column("project", sa.String(64), nullable=False, server_default="default"))
    for name in ("priority", "num_user_failures", "num_cpus", "num_gpus", "max_cpus", "max_gpus"):
        op.add_column("jobs", sa.Column(name, sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.add_column("jobs", sa.Column("run_seconds", sa.Double(), nullable=False, server_default=sa.text("0")))
    op.add_column("jobs", sa.Column("waits_for", sa.String(40)))
    op.add_column("jobs", sa.Column("waiting_since", sa.DateTime(timezone=True)))
    op.add_column("jobs", sa.Column("conditions", sa.JSON()))
    op.add_column("attempts", sa.Column("last_report_at", sa.DateTime(timezone=True)))
    op.execute("UPDATE jobs SET waiting_since = created_at WHERE reason = 'waiting_for_resources' AND status IN ('queued', 'recovering')")
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    for device in ("cpus", "gpus"):
        value = "json_extract(spec, '$.resources.{0}')" if is_sqlite else "(spec #>> '{{resources,{0}}}')::integer"
        workers, each = value.format("num_workers"), value.format(f"{device}_per_worker")
        op.execute(f"UPDATE jobs SET num_{device} = coalesce({workers} * {each}, 0), max_{device} = coalesce({workers} * {each}, 0)")
    parent = "json_extract(spec, '$.encoder.job')" if is_sqlite else "spec #>> '{encoder,job}'"
    op.execute(f"UPDATE jobs SET waits_for = {parent}")
    op.create_index("ix_jobs_waits_for", "jobs", ["waits_for"], **_where("waits_for IS NOT NULL"))
    op.create_index("ix_jobs_waiting_since", "jobs", ["waiting_since"], **_where("waiting_since IS NOT NULL"))


def _downgrade_specs() -> None:
    """Earlier versions refuse what they do not know: a run of some workers is one of the fewest that it might have."""
    jobs = sa.table("jobs", sa.column("id", sa.String()), sa.column("spec", sa.JSON()), sa.column("num_cpus", sa.Integer()))
    connection = op.get_bind()
    for row in connection.execute(sa.select(jobs)).all():
        spec = dict(row.spec)
        for name in ("priority", "time_limit_hours"):
            spec.pop(name, None)
        if "retry" in spec:
            spec["retry"] = {"max_failures": spec["retry"]["max_failures"]}
        if isinstance(spec.get("resources", {}).get("num_workers"), dict):
            spec["resources"] = spec["resources"] | {"num_workers": row.num_cpus // spec["resources"]["cpus_per_worker"]}
        connection.execute(sa.update(jobs).where(jobs.c.id == row.id).values(spec=spec))


def downgrade() -> None:
    _downgrade_specs()
    for table, old, new in (
        ("jobs", "hung", "worker_died"),
        ("jobs", "time_limit_reached", "retries_exhausted"),
        ("attempts", "hung", "worker_died"),
    ):
        op.execute(f"UPDATE {table} SET reason = '{new}' WHERE reason = '{old}'")
    op.execute("UPDATE jobs SET status = 'running' WHERE status = 'stopping' AND desired_state <> 'cancel'")  # by its time limit
    op.execute("UPDATE jobs SET due_at = created_at WHERE due_at IS NOT NULL")
    op.drop_index("ix_jobs_waiting_since", "jobs")
    op.drop_index("ix_jobs_waits_for", "jobs")
    op.drop_column("attempts", "last_report_at")
    for name in (
        "waits_for",
        "run_seconds",
        "conditions",
        "waiting_since",
        "max_gpus",
        "max_cpus",
        "num_gpus",
        "num_cpus",
        "num_user_failures",
        "priority",
        "project",
    ):
        op.drop_column("jobs", name)
