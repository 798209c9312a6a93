"""A service spread over machines: object storage, API and dispatcher, a Ray head and two more machines with workers, each on its own."""

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from service.client import MaestroClient
from service.local import REGION, Seaweedfs, storage_environment
from service.processes import Child, child_environment, sweep
from tests.multihost.hosts import Host

BUCKET = "multihost"
PORT = 8470
WORKERS = ("worker-1", "worker-2")


@dataclass
class Cluster:
    """This process is on the machine of the service. `nodes`: the workers' machines by name."""

    hosts: dict[str, Host]
    client: MaestroClient
    nodes: dict[str, Child]
    ray_url: str
    ray_token: str

    def alive(self, name: str) -> bool:
        """Whether the head counts this machine among its own."""
        headers = {"Authorization": f"Bearer {self.ray_token}"}
        try:
            answer = httpx.get(f"{self.ray_url}/nodes?view=summary", headers=headers, timeout=5, trust_env=False)
        except httpx.HTTPError:
            return False
        summary = answer.json()["data"]["summary"] if answer.status_code == 200 else []
        return any(node["ip"] == self.hosts[name].address and node["raylet"].get("state") == "ALIVE" for node in summary)

    def join(self, name: str) -> None:
        """By the command that a person would use there."""
        self.nodes[name].start()
        self.nodes[name].wait_ready(timeout_seconds=120)


@contextlib.contextmanager
def cluster(folder: Path, *, hosts: dict[str, Host], run: str) -> Iterator[Cluster]:
    """All of it, up and joined."""
    scratch = folder / "t"  # short: Ray puts sockets below it, and a socket's path has at most 107 bytes
    scratch.mkdir()
    token, ray_token, api = secrets.token_hex(16), secrets.token_hex(32), hosts["service"]
    ray_url, url = f"http://{hosts['head'].address}:8265", f"http://{api.address}:{PORT}"
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(host.address for host in hosts.values())
    storage = Seaweedfs(
        folder / "s3", run=run, log=folder / "s3.log", access_key="multihost", secret_key=secrets.token_hex(16), address=hosts["s3"].address
    )
    keys = storage_environment(storage)
    of_ray = child_environment(run, RAY_AUTH_TOKEN=ray_token, TMPDIR=str(scratch), **keys)
    settings = {
        "DATABASE_URL": f"sqlite:///{folder / 'maestro.db'}",
        "SECRET_KEY": secrets.token_hex(32),
        "API_TOKEN": token,
        "HOST": api.address,
        "PORT": str(PORT),
        "SERVICE_URL": url,
        "RAY_URL": ray_url,
        "RAY_TOKEN": ray_token,
        "S3_ENDPOINT": storage.endpoint,
        "S3_BUCKET": BUCKET,
        "S3_REGION": REGION,
        "WORKER_PYTHON": sys.executable,
    }
    of_service = child_environment(run, **{f"MAESTRO_{name}": value for name, value in settings.items()}, **keys)

    def on(host: Host, *command: str, environment: dict[str, str], name: str | None = None, ready: str | None = None) -> Child:
        return Child(
            name or host.name,
            host.command(*command, scratch=scratch),
            environment=environment,
            log=folder / f"{name or host.name}.log",
            is_ready=lambda: ready is None or _answers(ready, ray_token),
        )

    maestro = [sys.executable, "-m", "service.cli", "cluster"]
    head = on(
        hosts["head"],
        *maestro,
        "head",
        "--address",
        hosts["head"].address,
        "--num-cpus",
        "0",
        environment=of_ray,
        ready=f"{ray_url}/api/jobs/",
    )
    storage.child.command = hosts["s3"].command(*storage.child.command, scratch=scratch)
    parts = {
        "API": on(api, sys.executable, "-m", "service.app", environment=of_service, name="API", ready=f"{url}/readyz"),
        "dispatcher": on(api, sys.executable, "-m", "service.dispatcher", environment=of_service, name="dispatcher"),
    }
    nodes = {name: on(hosts[name], *maestro, "join", hosts["head"].address, "--num-cpus", "2", environment=of_ray) for name in WORKERS}
    with contextlib.ExitStack() as stack:
        stack.callback(sweep, run)
        client = stack.enter_context(MaestroClient(url, token, patience_seconds=60))
        made = Cluster(hosts, client, nodes, ray_url, ray_token)
        for name, node in nodes.items():
            node.is_ready = lambda name=name: made.alive(name)
        storage.start()
        storage.create_bucket(BUCKET)
        subprocess.run([sys.executable, "-m", "service.migrations"], env=of_service, check=True, capture_output=True, timeout=60)
        for part in (head, parts["API"], parts["dispatcher"]):
            part.start()
            part.wait_ready(timeout_seconds=120)
        for name in nodes:
            made.join(name)
        yield made


def _answers(url: str, ray_token: str) -> bool:
    try:
        return httpx.get(url, headers={"Authorization": f"Bearer {ray_token}"}, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
