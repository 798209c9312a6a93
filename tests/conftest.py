"""Servers that tests start for themselves, on free ports, and always stop."""

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from service.client import MaestroClient
from service.home import Home
from service.local import RayHead, Seaweedfs, storage_environment
from service.processes import RUN_VARIABLE, free_ports, processes_of_run, sweep
from service.up import BUCKET, Installation, running
from tests.buckets import fresh_bucket
from tests.postgres import Postgres

PROJECT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/faults: they stand here because pytest reads this file first, whatever it is asked to run."""
    parser.addoption("--faults", action="store_true", help="run all of tests/faults, not only what each change must pass")
    parser.addoption("--outcome", type=Path, metavar="FILE", help="write the table of faults × moments to a file")


@pytest.fixture(scope="session")
def run_mark() -> Iterator[str]:
    """The mark of every process that this test session starts; whatever is left of them at its end is killed."""
    mark = f"tests-{secrets.token_hex(8)}"
    yield mark
    sweep(mark)


@pytest.fixture(scope="session")
def seaweedfs(run_mark: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweedfs]:
    """A SeaweedFS server: `.endpoint`, `.access_key`, `.secret_key`, `.client()`."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    server = Seaweedfs(folder / "s3", run=run_mark, log=folder / "seaweedfs.log", access_key="tests", secret_key=secrets.token_hex(16))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def postgres(run_mark: str) -> Iterator[Postgres]:
    """A PostgreSQL server: `.create()` makes a database, `.url(name)` is its address."""
    server = Postgres(run=run_mark)
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
def bucket(seaweedfs: Seaweedfs) -> Iterator[str]:
    """The name of a fresh bucket."""
    with fresh_bucket(seaweedfs) as name:
        yield name


@pytest.fixture(scope="session")
def ray_head(run_mark: str, seaweedfs: Seaweedfs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """A Ray head with SeaweedFS's keys in its workers' environment: `.url` (Jobs API), `.token`, `.address`, `.temp_dir`."""
    log = tmp_path_factory.mktemp("ray") / "ray.log"
    head = RayHead(run=run_mark, log=log, token=secrets.token_hex(32), environment=storage_environment(seaweedfs), num_cpus=2)
    try:
        head.start()
        yield head
    finally:
        head.stop()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real data: `MAESTRO_TEST_DATA`, or `../shared/data` beside the project."""
    folder = Path(os.environ.get("MAESTRO_TEST_DATA", PROJECT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"NO REAL DATA: {folder} does not exist; set MAESTRO_TEST_DATA to a folder with cifar10.tar and imagenet-500.tar")
    return folder


@dataclass
class LiveService:
    """A whole installation. Nothing restarts what a test kills, until the test does."""

    installation: Installation
    client: MaestroClient

    @property
    def url(self) -> str:
        return self.installation.url

    @property
    def home(self) -> Home:
        return self.installation.home

    @property
    def run(self) -> str:
        """The mark of the installation's processes."""
        return self.installation.api.child.environment[RUN_VARIABLE]

    def submissions(self) -> list[str]:
        """What Ray knows of, by submission id."""
        cluster = self.installation.cluster
        headers = {"Authorization": f"Bearer {cluster.token}"}
        jobs = httpx.get(f"{cluster.url}/api/jobs/", headers=headers, trust_env=False, timeout=30)
        return [job["submission_id"] for job in jobs.json() if job["submission_id"]]

    def has_object(self, key: str) -> bool:
        return bool(self.installation.storage.client().list_objects_v2(Bucket=BUCKET, Prefix=key)["KeyCount"])

    def kill_api(self) -> None:
        """kill -9."""
        self.installation.api.child.kill()

    def start_api(self) -> None:
        self.installation.api.launch()
        self.installation.api.child.wait_ready(timeout_seconds=60)

    def kill_storage(self) -> None:
        """kill -9."""
        self.installation.storage.child.kill()

    def start_storage(self) -> None:
        self.installation.storage.start()

    def kill_dispatcher(self) -> None:
        """kill -9."""
        self.installation.dispatcher.child.kill()

    def start_dispatcher(self) -> None:
        self.installation.dispatcher.launch()

    def kill_of_ray(self, program: str) -> None:
        """kill -9 to `gcs_server`, which makes a node the head, or to `raylet`; the rest of the head ends itself then."""
        [process] = [
            process for process in processes_of_run(self.run, part=self.installation.cluster.child.name) if process.name() == program
        ]
        process.kill()
        process.wait(10)

    def start_ray(self) -> None:
        """A new head: it knows nothing of what ran."""
        self.installation.cluster.start()


@pytest.fixture(scope="session")
def live_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    """SeaweedFS, Ray, the API and the dispatcher, as `maestro up` starts them, and a client."""
    home = Home(tmp_path_factory.mktemp("maestro") / "home")
    with (
        running(home, port=free_ports(1)[0], say=print, num_cpus=2) as installation,
        MaestroClient(installation.url, home.secrets().api_token, patience_seconds=30) as client,
    ):
        yield LiveService(installation, client)
