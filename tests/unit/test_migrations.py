import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect

from service.db import Database
from service.migrations.schema import current_revision, downgrade, head_revision, require_head, upgrade
from service.models import Base


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty one."""
    if request.param == "sqlite":
        yield Database(f"sqlite:///{tmp_path}/maestro.db")
        return
    server = request.getfixturevalue("postgres")
    name = server.create()
    yield Database(server.url(name))
    server.drop(name)


def test_the_migrated_schema_is_the_models(database: Database) -> None:
    upgrade(database)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
    database.close()


def test_down_and_up_again(database: Database) -> None:
    upgrade(database)
    downgrade(database)
    assert inspect(database.engine).get_table_names() == ["alembic_version"]
    upgrade(database)
    upgrade(database)
    assert current_revision(database) == head_revision() is not None
    database.close()


def test_an_old_schema_is_refused_with_the_remedy(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        require_head(database)
    assert exit_.value.code == 2
    assert "python -m service.migrations" in capsys.readouterr().err
    upgrade(database)
    require_head(database)
    database.close()


def test_the_command_runs_from_anywhere(tmp_path: Path) -> None:
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MAESTRO_DATABASE_URL": f"sqlite:///{tmp_path}/maestro.db",
        "MAESTRO_SECRET_KEY": "s" * 32,
        "MAESTRO_API_TOKEN": "t" * 20,
        "MAESTRO_SERVICE_URL": "http://127.0.0.1:1",
        "MAESTRO_RAY_URL": "http://127.0.0.1:1",
        "MAESTRO_RAY_TOKEN": "r",
        "MAESTRO_S3_BUCKET": "maestro",
    }
    subprocess.run([sys.executable, "-m", "service.migrations"], cwd=tmp_path, env=environment, check=True, timeout=60)
    database = Database(environment["MAESTRO_DATABASE_URL"])
    require_head(database)
    database.close()
