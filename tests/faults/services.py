"""Other services on a live installation's Ray and object storage: dispatchers with other settings, and a whole one on PostgreSQL."""

import copy
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from service.client import MaestroClient
from service.local import LOOPBACK
from service.processes import Child, free_ports
from service.up import Server
from tests.conftest import LiveService
from tests.postgres import Postgres
from tests.unit.service_fixtures import migrate

LEASE_SECONDS = 5


def dispatcher_of(service: LiveService, name: str, **settings: str) -> Server:
    """One more dispatcher, not started yet. Settings are named as in `service.settings`."""
    own = service.installation.dispatcher.child
    environment = own.environment | {f"MAESTRO_{key.upper()}": value for key, value in settings.items()}
    return Server(Child(name, own.command, environment=environment, log=service.home.log(name), is_ready=lambda: True))


@contextmanager
def dispatched_by(service: LiveService, name: str = "stand-in", **settings: str) -> Iterator[Server]:
    """Another dispatcher instead of the service's own, which does its work again afterwards."""
    other = dispatcher_of(service, name, **settings)
    service.installation.dispatcher.stop()
    other.launch()
    try:
        yield other
    finally:
        other.stop()
        service.start_dispatcher()


@contextmanager
def also_dispatched_by(service: LiveService, name: str, **settings: str) -> Iterator[Server]:
    """Another dispatcher beside those there are."""
    other = dispatcher_of(service, name, **settings)
    other.launch()
    try:
        yield other
    finally:
        other.stop()


@dataclass
class OnPostgres(LiveService):
    """A service whose database is on a server of its own."""

    server: Postgres


@contextmanager
def on_postgres(live: LiveService, server: Postgres) -> Iterator[OnPostgres]:
    """An API and a dispatcher of their own on a new database, with a key of their own: whose Ray jobs are whose is told by that."""
    url = server.url(server.create())
    migrate(url)
    installation = copy.copy(live.installation)
    installation.port = free_ports(1)[0]
    installation.url = f"http://{LOOPBACK}:{installation.port}"
    own = {
        "MAESTRO_DATABASE_URL": url,
        "MAESTRO_SECRET_KEY": secrets.token_hex(32),
        "MAESTRO_PORT": str(installation.port),
        "MAESTRO_SERVICE_URL": installation.url,
        "MAESTRO_LEASE_SECONDS": str(LEASE_SECONDS),
    }
    installation.api = _moved(live, live.installation.api, own, is_ready=lambda: _answers(installation.url))
    installation.dispatcher = _moved(live, live.installation.dispatcher, own, is_ready=lambda: True)
    with MaestroClient(installation.url, live.home.secrets().api_token, patience_seconds=30) as client:
        service = OnPostgres(installation, client, server)
        try:
            service.start_api()
            service.start_dispatcher()
            yield service
        finally:
            installation.dispatcher.stop()
            installation.api.stop()


def _moved(live: LiveService, server: Server, own: dict[str, str], *, is_ready: Callable[[], bool]) -> Server:
    """One more of a server, with settings of its own."""
    child, name = server.child, f"{server.child.name} on PostgreSQL"
    return Server(Child(name, child.command, environment=child.environment | own, log=live.home.log(name), is_ready=is_ready))


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/livez", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
