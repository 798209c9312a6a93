"""The blocks of our documents, run as their readers would: the tutorial on an installation of its own, all others on one service."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mae_core.series import SERIES
from service.home import Home
from service.local import storage_environment
from service.processes import free_ports, sweep
from tests.conftest import LiveService
from tests.documents.blocks import PAGES, PROJECT, run_page, runs
from tests.postgres import Postgres
from workers.contract import JobStatus

TUTORIAL = PROJECT / "docs" / "tutorial.md"
POSTGRESQL = PROJECT / "docs" / "how-to" / "postgresql.md"
ON_A_SERVICE = [page for page in PAGES if runs(page) and page not in (TUTORIAL, POSTGRESQL)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A reader's home; what was started there is stopped."""
    yield tmp_path
    run = Home(tmp_path / ".maestro").read_run()
    if run is not None:
        if run.is_alive():
            os.kill(run.pid, signal.SIGKILL)
        sweep(run.run)


def test_the_tutorial_ends_with_a_model_that_knows_digits(folder: Path) -> None:
    told = run_page(TUTORIAL, folder, {}, timeout_seconds=600)
    [accuracy] = [float(line.rpartition(" ")[2].rstrip("%")) for line in told.splitlines() if "test images are classified right" in line]
    assert accuracy > 60  # 10 by chance
    assert list((folder / "pictures").glob("*.png"))
    assert Home(folder / ".maestro").read_run() is None, "it ends with everything stopped"


@pytest.fixture
def environment(live_service: LiveService) -> dict[str, str]:
    """What a reader has set who has a service, and an object store of their own."""
    own = live_service.installation.api.child.environment
    stored = {name: value for name, value in own.items() if name.startswith(("MAESTRO_S3_", "AWS_"))}
    return stored | {"MAESTRO_URL": live_service.url, "MAESTRO_TOKEN": live_service.home.secrets().api_token}


@pytest.mark.parametrize("page", ON_A_SERVICE, ids=lambda page: page.stem)
def test_a_page_runs(page: Path, folder: Path, environment: dict[str, str]) -> None:
    run_page(page, folder, environment)


def test_the_service_runs_on_postgresql(folder: Path, live_service: LiveService, postgres: Postgres) -> None:
    """Another service, on the same object store and Ray cluster."""
    [port] = free_ports(1)
    own = {
        "MAESTRO_DATABASE_URL": postgres.url(postgres.create()),
        "MAESTRO_SECRET_KEY": "of-another-service" * 3,
        "MAESTRO_PORT": str(port),
        "MAESTRO_SERVICE_URL": f"http://127.0.0.1:{port}",
    }
    settings = {name: value for name, value in live_service.installation.api.child.environment.items() if name.startswith("MAESTRO_")}
    told = run_page(POSTGRESQL, folder, settings | storage_environment(live_service.installation.storage) | own)
    assert '"ready":true' in told


def test_all_series_that_runs_told_are_in_the_reference(live_service: LiveService) -> None:
    """Behind the pages, in their order: of what their jobs told."""
    ended = list(live_service.client.jobs(status=JobStatus.SUCCEEDED))
    assert {"pretrain", "probe", "embed"} <= {job["kind"] for job in ended}
    assert {name for job in ended for name in live_service.client.metrics(job["id"], max_points=5)} <= set(SERIES)
