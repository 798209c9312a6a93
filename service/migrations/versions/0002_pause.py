"""What the user wants has a time, whatever it is; a budget counts failures, not attempts: a job that is paused has more of these.

Plain ALTER TABLE: alembic's batches would make `jobs` anew in SQLite, which the rows that refer to it forbid.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE jobs RENAME COLUMN cancel_requested_at TO desired_since")
    op.add_column("jobs", sa.Column("num_failures", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.execute("UPDATE jobs SET num_failures = attempt - 1 WHERE attempt > 0")  # all attempts but the newest had failed


def downgrade() -> None:
    op.execute("UPDATE jobs SET status = 'recovering' WHERE status = 'pausing'")
    op.execute("UPDATE jobs SET status = 'queued', due_at = created_at WHERE status = 'paused'")
    op.execute("UPDATE jobs SET desired_state = 'run' WHERE desired_state = 'pause'")
    op.drop_column("jobs", "num_failures")
    op.execute("ALTER TABLE jobs RENAME COLUMN desired_since TO cancel_requested_at")
