"""Servers that tests start for themselves, on free ports, and always stop."""

import os
import secrets
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.local import RayHead, Seaweedfs, storage_environment
from service.processes import sweep

PROJECT = Path(__file__).parent.parent


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


@pytest.fixture
def bucket(seaweedfs: Seaweedfs) -> str:
    """The name of a fresh bucket."""
    name = f"test-{uuid.uuid4().hex}"
    seaweedfs.create_bucket(name)
    return name


@pytest.fixture(scope="session")
def ray_head(run_mark: str, seaweedfs: Seaweedfs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """A Ray head with SeaweedFS's keys in its workers' environment: `.url` (Jobs API), `.token`, `.address`, `.temp_dir`."""
    log = tmp_path_factory.mktemp("ray") / "ray.log"
    head = RayHead(run=run_mark, log=log, token=secrets.token_hex(32), environment=storage_environment(seaweedfs))
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
