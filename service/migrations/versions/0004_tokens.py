"""Users' tokens; an idempotency key belongs to its project.

The project and a line feed, which no header has, go before the key: SQLite can neither drop the column's UNIQUE nor make `jobs` anew.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_LINE_FEED = {"sqlite": "char(10)", "postgresql": "chr(10)"}


def upgrade() -> None:
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(20), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("project", sa.String(64)),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
        sa.Column("last_used_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
    )
    op.create_index("ix_jobs_project_created_at_id", "jobs", ["project", "created_at", "id"])
    database = op.get_bind().dialect.name
    if database == "postgresql":  # SQLite minds no lengths
        op.alter_column("jobs", "idempotency_key", type_=sa.String(265))
    op.execute(f"UPDATE jobs SET idempotency_key = project || {_LINE_FEED[database]} || idempotency_key WHERE idempotency_key IS NOT NULL")


def downgrade() -> None:
    database = op.get_bind().dialect.name
    # the schema before has one key for all projects: those of other projects than the first are given up
    op.execute("UPDATE jobs SET idempotency_key = NULL WHERE project <> 'default'")
    op.execute("UPDATE jobs SET idempotency_key = substr(idempotency_key, length(project) + 2)")
    if database == "postgresql":
        op.alter_column("jobs", "idempotency_key", type_=sa.String(200))
    op.drop_index("ix_jobs_project_created_at_id", "jobs")
    op.drop_table("tokens")
