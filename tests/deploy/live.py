"""`make compose-test`: docker-compose.yml without Docker, on loopback. Installs 2 GB; takes some ten minutes.

What the build stage of each Dockerfile does is done in an empty virtual environment; each service of ours, SeaweedFS and PostgreSQL
are then started by the file's own commands, environment and secrets, waited for by its own health checks, and a job is trained. Only names
of hosts, ports and folders are replaced. What Docker alone can show (images, networks, users, read-only file systems) is not shown here.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import yaml

from service.client import MaestroClient
from service.local import LOOPBACK, loopback_interface, remove_weed_sockets
from service.processes import Child, child_environment, exempt_loopback_from_proxies, free_ports
from tests.deploy.compose import PROJECT, command_of, read_compose
from tests.deploy.dockerfile import read_stages
from tests.deploy.rules import metrics_named
from tests.postgres import Postgres

HOSTS = ("postgres:5432", "seaweedfs:8333", "api:8000", "ray-head:8265", "ray-head:6379")
WEED_PORTS = [f"{part}.{port}" for part in ("master", "volume", "filer", "admin") for port in ("port", "port.grpc")]
RAY_PORTS = ("object-manager-port", "node-manager-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "ray-client-server-port")
RAY_ADDRESS = "127.0.0.2"  # loopback as well; 127.0.0.1 itself Ray rewrites to an outer address, where nothing listens
OF_GPUS = {"ray_node_gpus_utilization", "ray_node_gram_used"}  # without a GPU there are none


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Virtual environments, by the Dockerfile that they are of."""
    built = {}
    for path in sorted((PROJECT / "deploy" / "docker").glob("*.Dockerfile")):
        folder = tmp_path_factory.mktemp(path.stem)
        built[f"deploy/docker/{path.name}"] = build(path, folder)
    return built


def build(path: Path, folder: Path) -> Path:
    """Does what the build stage says: COPY and RUN, in a folder of its own. torch comes from where pip finds it here."""
    stage = read_stages(path)[0]
    prefix, workdir = folder / "prefix", folder / "build"
    workdir.mkdir()
    given = stage.arguments | {"PREFIX": str(prefix), "TORCH_INDEX": ""}
    for line in stage.all("ENV"):
        given |= dict(pair.split("=", 1) for pair in line.split())  # type: ignore[misc]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")} | given
    environment["PATH"] = f"{Path(sys.base_prefix) / 'bin'}:{environment['PATH']}"
    for name, rest in stage.instructions:
        if name == "RUN":
            subprocess.run(["sh", "-euc", rest], cwd=workdir, env=environment, check=True, timeout=3600)
        elif name == "COPY":
            *sources, to = rest.split()
            for source in sources:
                if (PROJECT / source).is_dir():
                    shutil.copytree(PROJECT / source, workdir / to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(PROJECT / source, workdir / to)
    return prefix


@dataclass
class Wiring:
    """What stands for the names of the compose file on this machine."""

    folder: Path
    secrets: Path
    ports: dict[str, int]
    run: str

    def replace(self, text: str, *, data: Path) -> str:
        for host, port in self.ports.items():
            own = host.split(":")[1]
            address = RAY_ADDRESS if host == "ray-head:6379" else LOOPBACK
            text = text.replace(host, f"{address}:{port}").replace(f"{LOOPBACK}:{own}", f"{LOOPBACK}:{port}")
            text = text.replace(f"localhost:{own}", f"{LOOPBACK}:{port}")
        text = text.replace("/run/secrets", str(self.secrets)).replace("0.0.0.0", LOOPBACK)
        return re.sub(r"=/data\b", f"={data}", text)


@dataclass
class Deployment:
    """All that is up."""

    url: str
    token: str
    metrics_token: str
    ray_metrics: str


@pytest.fixture(scope="module")
def deployment(
    images: dict[str, Path], postgres: Postgres, run_mark: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    exempt_loopback_from_proxies(os.environ)
    folder = tmp_path_factory.mktemp("compose")
    (folder / "deploy" / "compose").mkdir(parents=True)
    script = shutil.copy(PROJECT / "deploy" / "compose" / "make-secrets", folder / "deploy" / "compose")
    subprocess.run([script], check=True, timeout=30)
    secrets = folder / "deploy" / "compose" / "secrets"
    ports = dict(zip(HOSTS, free_ports(len(HOSTS)), strict=True)) | {"postgres:5432": postgres.port}
    wiring = Wiring(folder, secrets, ports, run_mark)
    password = (secrets / "postgres_password").read_text()
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE maestro LOGIN PASSWORD '{password}'")  # type: ignore[arg-type]
        connection.execute("CREATE DATABASE maestro OWNER maestro")
    address = secrets / "maestro_database_url"
    address.chmod(0o600)
    address.write_text(wiring.replace(address.read_text(), data=folder))
    services = read_compose({"MAESTRO_SECRETS": str(secrets), "PUBLIC_HOST": "localhost"})["services"]
    hostname = folder / "bin" / "hostname"
    hostname.parent.mkdir()
    hostname.write_text(f"#!/bin/sh\necho {RAY_ADDRESS}\n")
    hostname.chmod(0o755)
    ray_folder = tempfile.mkdtemp(prefix="mct-", dir="/tmp")  # short: sockets lie below it
    children: list[Child] = []
    weed_ports = free_ports(len(WEED_PORTS) + 1)
    metrics = free_ports(2)
    try:
        weed_more = [f"-{name}={port}" for name, port in zip([*WEED_PORTS, "s3.port.grpc"], weed_ports, strict=True)]
        weed_more += [f"-filer.localSocket={folder}/f.sock", f"-s3.localSocket={folder}/s.sock"]
        for name in ("seaweedfs", "migrate", "ray-head", "api", "ray-worker", "dispatcher"):
            more: list[str] = weed_more if name == "seaweedfs" else []
            if name.startswith("ray"):
                own = dict(zip(RAY_PORTS, free_ports(len(RAY_PORTS)), strict=True))
                if name == "ray-worker":
                    del own["ray-client-server-port"]
                else:
                    more = [f"--temp-dir={ray_folder}"]
                more += [f"--{port}={number}" for port, number in own.items()]
            child = start(name, services[name], more, wiring, images, metrics=metrics[name == "ray-worker"])
            children.append(child)
        yield Deployment(
            f"http://{LOOPBACK}:{ports['api:8000']}",
            (secrets / "maestro_api_token").read_text(),
            (secrets / "maestro_metrics_token").read_text(),
            f"http://{LOOPBACK}:{metrics[1]}/metrics",
        )
    finally:
        for child in reversed(children):
            child.stop(grace_seconds=15)
        remove_weed_sockets([*weed_ports, ports["seaweedfs:8333"]])
        shutil.rmtree(ray_folder, ignore_errors=True)


def start(name: str, service: dict[str, Any], more: list[str], wiring: Wiring, images: dict[str, Path], *, metrics: int) -> Child:
    """The service, when its health check is content; one that runs once, when it has ended well."""
    data = wiring.folder / name
    data.mkdir()
    prefix = images[service["build"]["dockerfile"]] if "build" in service else Path(sys.prefix)
    [agent] = free_ports(1)

    def here(text: str) -> str:
        text = wiring.replace(text, data=data).replace("-s3.port=8333", f"-s3.port={wiring.ports['seaweedfs:8333']}")
        text = text.replace("-ip=seaweedfs", f"-ip={LOOPBACK}").replace("--port=6379", f"--port={wiring.ports['ray-head:6379']}")
        text = text.replace("--dashboard-port=8265", f"--dashboard-port={wiring.ports['ray-head:8265']}")
        return text.replace("--metrics-export-port=8080", f"--metrics-export-port={metrics} --dashboard-agent-listen-port={agent}").replace(
            f"{LOOPBACK}:52365", f"{LOOPBACK}:{agent}"
        )

    environment = child_environment(wiring.run, **{key: here(value) for key, value in service.get("environment", {}).items()})
    environment.pop("PYTHONPATH", None)
    environment["PATH"] = f"{wiring.folder / 'bin'}:{prefix / 'bin'}:{environment['PATH']}"
    if name == "api":
        environment["MAESTRO_PORT"] = str(wiring.ports["api:8000"])
    if name.startswith("ray"):
        environment |= {"GLOO_SOCKET_IFNAME": loopback_interface(), "HOME": str(data)}
    command = [here(part) for part in command_of(service)]
    if command[0] == "sh":
        command[-1] = " ".join([command[-1], *more])
    else:
        command += more
    check = [here(part) for part in service.get("healthcheck", {}).get("test", [])[1:]]

    def is_healthy() -> bool:
        return subprocess.run(check, env=environment, capture_output=True, timeout=60, cwd=data, check=False).returncode == 0

    if name == "migrate":
        subprocess.run(command, env=environment, cwd=data, check=True, timeout=300)
    command = ["true"] if name == "migrate" else ["env", "-C", str(data), *command]
    child = Child(name, command, environment=environment, log=wiring.folder / f"{name}.log", is_ready=is_healthy if check else lambda: True)
    child.start()
    if name != "migrate":
        child.wait_ready(timeout_seconds=300)
    return child


def test_the_services_image_has_neither_torch_nor_ray(images: dict[str, Path]) -> None:
    listed = {}
    for name, prefix in images.items():
        done = subprocess.run([prefix / "bin" / "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True, timeout=120)
        listed[name] = {line.partition("==")[0].lower() for line in done.stdout.splitlines()}
        megabytes = sum(path.stat().st_size for path in prefix.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6
        print(f"{name}: {len(listed[name])} packages, {megabytes:.0f} MB")
    assert {"torch", "ray"} & listed["deploy/docker/service.Dockerfile"] == set()
    assert {"torch", "ray"} <= listed["deploy/docker/worker.Dockerfile"]


def test_a_job_is_trained(deployment: Deployment, tmp_path: Path) -> None:
    assert httpx.get(f"{deployment.url}/readyz", trust_env=False, timeout=60).json() == {"ready": True, "missing": {}}
    spec = yaml.safe_load((PROJECT / "deploy" / "specs" / "digits-pretrain.yaml").read_text())
    spec["optim"] = spec.get("optim", {}) | {"epochs": 2, "warmup_epochs": 1}
    spec["resources"] = {"num_workers": 1}
    with MaestroClient(deployment.url, deployment.token, patience_seconds=60) as client:
        job = client.submit(spec)["id"]
        types = [message.data["type"] for message in client.stream(job, patience_seconds=900) if message.event == "event"]
        assert client.job(job)["status"] == "succeeded", types
        manifest, folder = client.download_result(job, tmp_path / "encoder")
        assert manifest.job == job
        assert (folder / "model.safetensors").stat().st_size > 0


def test_prometheus_finds_the_service_and_ray(deployment: Deployment) -> None:
    headers = {"Authorization": f"Bearer {deployment.metrics_token}"}
    ours = httpx.get(f"{deployment.url}/metrics", headers=headers, trust_env=False, timeout=60)
    assert "maestro_database_up 1.0" in ours.text
    rays = httpx.get(deployment.ray_metrics, trust_env=False, timeout=60).text
    assert {name for name in metrics_named() if name.startswith("ray_")} - OF_GPUS - set(
        re.findall(r"^(ray_\w+)", rays, re.MULTILINE)
    ) == set()
