"""The blocks of our documents, run as their readers would, on one service. The tutorial has a test of its own."""

from pathlib import Path

import pytest

from service.local import storage_environment
from service.processes import free_ports
from tests.blocks import PAGES, PROJECT, run_page, runs
from tests.conftest import LiveService
from tests.postgres import Postgres

TUTORIAL, OWN_SERVICE = PROJECT / "docs" / "tutorial.md", PROJECT / "docs" / "how-to" / "postgresql.md"
ON_A_SERVICE = [page for page in PAGES if runs(page) and page not in (TUTORIAL, OWN_SERVICE)]


@pytest.mark.parametrize("page", ON_A_SERVICE, ids=lambda page: page.stem)
def test_a_page_runs(page: Path, live_service: LiveService, tmp_path: Path) -> None:
    """For a reader who has a service and an object store."""
    own = live_service.installation.api.child.environment
    stored = {name: value for name, value in own.items() if name.startswith(("MAESTRO_S3_", "AWS_"))}
    run_page(page, tmp_path, stored | {"MAESTRO_URL": live_service.url, "MAESTRO_TOKEN": live_service.home.secrets().api_token})


def test_the_service_runs_on_postgresql(live_service: LiveService, postgres: Postgres, tmp_path: Path) -> None:
    """Another service, on the same object store and Ray cluster."""
    [port] = free_ports(1)
    settings = {name: value for name, value in live_service.installation.api.child.environment.items() if name.startswith("MAESTRO_")}
    own = {
        "MAESTRO_DATABASE_URL": postgres.url(postgres.create()),
        "MAESTRO_SECRET_KEY": "of-another-service" * 3,
        "MAESTRO_PORT": str(port),
        "MAESTRO_SERVICE_URL": f"http://127.0.0.1:{port}",
    }
    told = run_page(OWN_SERVICE, tmp_path, settings | storage_environment(live_service.installation.storage) | own)
    assert '"ready":true' in told
