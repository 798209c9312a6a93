"""Projects, priorities, what a job needs and since when it waits for it, budgets by cause, conditions; an attempt's last report."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("project", sa.String(64), nullable=False, server_default="default"))
    for name in ("priority", "num_user_failures", "num_cpus", "num_gpus"):
        op.add_column("jobs", sa.Column(name, sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.add_column("jobs", sa.Column("waiting_since", sa.DateTime(timezone=True)))
    op.add_column("jobs", sa.Column("conditions", sa.JSON()))
    op.add_column("attempts", sa.Column("last_report_at", sa.DateTime(timezone=True)))
    op.execute("UPDATE jobs SET waiting_since = created_at WHERE reason = 'waiting_for_resources'")
    for device in ("cpus", "gpus"):
        value = {
            "sqlite": "json_extract(spec, '$.resources.{0}')",
            "postgresql": "(spec #>> '{{resources,{0}}}')::integer",
        }[op.get_bind().dialect.name]
        workers, each = value.format("num_workers"), value.format(f"{device}_per_worker")
        op.execute(f"UPDATE jobs SET num_{device} = coalesce({workers} * {each}, 0)")


def downgrade() -> None:
    op.drop_column("attempts", "last_report_at")
    for name in ("conditions", "waiting_since", "num_gpus", "num_cpus", "num_user_failures", "priority", "project"):
        op.drop_column("jobs", name)
