"""A whole service on the stand-in: the API and any number of dispatchers as processes, with real object storage and a real database."""

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

from service.client import MaestroClient
from service.local import LOOPBACK, REGION, Seaweedfs, storage_environment
from service.processes import Child, child_environment, exempt_loopback_from_proxies, free_ports, sweep
from service.up import interruptible
from tests.buckets import fresh_bucket
from tests.postgres import Postgres
from tests.stand_in.server import StandIn

PATIENCE_SECONDS = 120.0  # of clients: whatever is killed comes back


@dataclass
class Stage:
    """Nothing restarts what is killed, until the test does. `postgres`: None on SQLite."""

    url: str
    token: str
    database_url: str
    storage: Seaweedfs
    postgres: Postgres | None
    ray: StandIn
    api: Child
    dispatchers: list[Child]

    @property
    def database(self) -> str:
        return "sqlite" if self.postgres is None else "postgresql"

    def client(self) -> MaestroClient:
        return MaestroClient(self.url, self.token, patience_seconds=PATIENCE_SECONDS)

    def start_api(self) -> None:
        self.api.start()
        self.api.wait_ready(timeout_seconds=300)


@contextlib.contextmanager
def stage(
    folder: Path,
    *,
    storage: Seaweedfs,
    postgres: Postgres | None,
    run: str,
    num_dispatchers: int = 1,
    num_cpus: int = 64,
    report_seconds: float = 1.0,
    seed: int = 0,
    **settings: object,
) -> Iterator[Stage]:
    """Everything but the dispatchers is up inside the block. `settings`: the service's, such as lease_seconds=5."""
    with fresh_bucket(storage) as bucket:
        token, port = secrets.token_hex(16), free_ports(1)[0]
        database_url = f"sqlite:///{folder / 'maestro.db'}" if postgres is None else postgres.url(postgres.create())
        keys = storage_environment(storage)
        ray = StandIn(run=run, log=folder / "stand-in.log", environment=keys, num_cpus=num_cpus, report_seconds=report_seconds, seed=seed)
        url = f"http://{LOOPBACK}:{port}"
        values = {
            "DATABASE_URL": database_url,
            "SECRET_KEY": secrets.token_hex(32),
            "API_TOKEN": token,
            "PORT": port,
            "SERVICE_URL": url,
            "RAY_URL": ray.url,
            "RAY_TOKEN": ray.token,
            "S3_ENDPOINT": storage.endpoint,
            "S3_REGION": REGION,
            "S3_BUCKET": bucket,
        } | {name.upper(): value for name, value in settings.items()}
        environment = child_environment(run, **{f"MAESTRO_{name}": str(value) for name, value in values.items()}, **keys)
        subprocess.run([sys.executable, "-m", "service.migrations"], env=environment, check=True, capture_output=True, timeout=300)
        api = Child(
            "API", [sys.executable, "-m", "service.app"], environment=environment, log=folder / "api.log", is_ready=lambda: _answers(url)
        )
        dispatchers = [
            Child(
                name,
                [sys.executable, "-m", "service.dispatcher"],
                environment=environment,
                log=folder / f"{name}.log",
                is_ready=lambda: True,
            )
            for name in (f"dispatcher-{number}" for number in range(1, num_dispatchers + 1))
        ]
        made = Stage(url, token, database_url, storage, postgres, ray, api, dispatchers)
        try:
            ray.start()
            made.start_api()
            yield made
        finally:
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda part: part.stop(), [api, ray, *dispatchers]))


@contextlib.contextmanager
def own_servers(*, database: str) -> Iterator[tuple[Path, str, Seaweedfs, Postgres | None]]:
    """For programs: a folder, a mark, object storage and, for `postgresql`, a server of it; all gone afterwards, also after SIGTERM."""
    exempt_loopback_from_proxies(os.environ)
    run = f"stage-{secrets.token_hex(8)}"
    with interruptible(), tempfile.TemporaryDirectory(prefix="maestro-stage-") as place, contextlib.ExitStack() as stack:
        folder = Path(place)
        stack.callback(sweep, run)
        storage = Seaweedfs(folder / "s3", run=run, log=folder / "s3.log", access_key="stage", secret_key=secrets.token_hex(16))
        stack.callback(storage.stop)
        storage.start()
        postgres = None
        if database == "postgresql":
            postgres = Postgres(run=run)
            stack.callback(postgres.close)
            postgres.start()
        yield folder, run, storage, postgres


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/livez", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
