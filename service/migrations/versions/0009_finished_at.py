"""Jobs found by when they ended."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_INDEXES = {"ix_jobs_finished_at": ["finished_at"], "ix_jobs_project_finished_at": ["project", "finished_at"]}


def upgrade() -> None:
    where = sa.text("deleted_at IS NULL AND finished_at IS NOT NULL")
    for name, columns in _INDEXES.items():
        op.create_index(name, "jobs", columns, sqlite_where=where, postgresql_where=where)


def downgrade() -> None:
    for name in _INDEXES:
        op.drop_index(name, "jobs")
