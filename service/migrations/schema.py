"""The database's schema: bring it up to date, or make sure that it is. Runs from the installed package, with no alembic.ini."""

import sys
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

from service.db import Database


def alembic_config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def upgrade(database: Database, revision: str = "head") -> None:
    with database.writer.begin() as connection:
        command.upgrade(alembic_config(connection), revision)


def downgrade(database: Database, revision: str = "base") -> None:
    with database.writer.begin() as connection:
        command.downgrade(alembic_config(connection), revision)


def head_revision() -> str | None:
    return ScriptDirectory.from_config(alembic_config()).get_current_head()


def current_revision(database: Database) -> str | None:
    with database.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def require_head(database: Database) -> None:
    """Exit 2, saying how to upgrade, unless the schema is this version's."""
    found = current_revision(database)
    if found != head_revision():
        sys.stderr.write(
            f"The database's schema is {found or 'empty'}, this version needs {head_revision()}. "
            "Upgrade it with: python -m service.migrations\n"
        )
        raise SystemExit(2)
