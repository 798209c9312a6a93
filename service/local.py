"""The object store and the Ray cluster of an installation on one machine. All they listen on is the loopback interface."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from service.processes import Child, StartError, child_environment, free_ports

LOOPBACK = "127.0.0.1"
REGION = "us-east-1"
OBJECT_STORE_BYTES = 256 * 2**20
_PROBE_BUCKET = "maestro-probe"
_WEED_PORTS = tuple(f"{part}.{port}" for part in ("s3", "master", "volume", "filer", "admin") for port in ("port", "port.grpc"))
_WEED_OFF = ("webdav", "admin.ui", "master.telemetry", "s3.allowDeleteBucketNotEmpty", "s3.autoCreateBucket")
_RAY_PORTS = (
    "port",
    "object-manager-port",
    "node-manager-port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "ray-client-server-port",
)


def s3_client(endpoint: str, *, access_key: str, secret_key: str) -> Any:
    config = Config(connect_timeout=2, read_timeout=30, retries={"max_attempts": 0}, s3={"addressing_style": "path"})
    return boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id=access_key, aws_secret_access_key=secret_key, region_name=REGION, config=config
    )


class Seaweedfs:
    """One SeaweedFS server (`weed mini`) over a folder. Its keys are given once and must stay the same for that folder."""

    def __init__(self, directory: Path, *, run: str, log: Path, access_key: str, secret_key: str, address: str = LOOPBACK) -> None:
        self.access_key = access_key
        self._address = address
        self.secret_key = secret_key
        self._directory = directory
        self._ports = dict(zip(_WEED_PORTS, free_ports(len(_WEED_PORTS)), strict=True))
        self.endpoint = f"http://{address}:{self._ports['s3.port']}"
        environment = child_environment(run, AWS_ACCESS_KEY_ID=access_key, AWS_SECRET_ACCESS_KEY=secret_key, GOMEMLIMIT="300MiB")
        self.child = Child("SeaweedFS", self._command(), environment=environment, log=log, is_ready=self._accepts_objects)

    def _command(self) -> list[str]:
        return [
            find_program("weed"),
            "-logtostderr",
            "mini",
            f"-dir={self._directory}",
            f"-ip={self._address}",
            f"-ip.bind={self._address}",
            *(f"-{name}={port}" for name, port in self._ports.items()),
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            *(f"-{name}=false" for name in _WEED_OFF),
            f"-filer.localSocket={self._directory}/filer.sock",
            f"-s3.localSocket={self._directory}/s3.sock",
        ]

    def client(self) -> Any:
        return s3_client(self.endpoint, access_key=self.access_key, secret_key=self.secret_key)

    def start(self, *, timeout_seconds: float = 60) -> None:
        self.launch()
        self.child.wait_ready(timeout_seconds=timeout_seconds)

    def launch(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._remove_sockets()
        self.child.start()

    def stop(self) -> None:
        self.child.stop(grace_seconds=10)
        self._remove_sockets()

    def create_bucket(self, name: str) -> None:
        try:
            self.client().create_bucket(Bucket=name)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("BucketAlreadyExists", "BucketAlreadyOwnedByYou"):
                raise

    def _accepts_objects(self) -> bool:
        """Buckets are answered before the volume server takes writes: ready means that an object was written."""
        try:
            self.create_bucket(_PROBE_BUCKET)
            self.client().put_object(Bucket=_PROBE_BUCKET, Key="probe", Body=b"ready")
        except (BotoCoreError, ClientError):
            return False
        return True

    @property
    def ports(self) -> list[int]:
        return list(self._ports.values())

    def _remove_sockets(self) -> None:
        """weed leaves these behind, and `localSocket` does not cover them all."""
        remove_weed_sockets(self.ports)


class RayHead:
    """A Ray head on this machine, with token authentication, and a temporary folder of its own."""

    def __init__(self, *, run: str, log: Path, token: str, environment: dict[str, str], num_cpus: int | None = None) -> None:
        self.token = token
        self.num_cpus = num_cpus or max(os.cpu_count() or 1, 2)
        # Short, whatever TMPDIR says: Ray puts sockets below it, and a socket's path has at most 107 bytes.
        self.temp_dir = Path(tempfile.mkdtemp(prefix="maestro-ray-", dir="/tmp"))
        self._ports = dict(zip(_RAY_PORTS, free_ports(len(_RAY_PORTS)), strict=True))
        self.address = f"{LOOPBACK}:{self._ports['port']}"
        self.url = f"http://{LOOPBACK}:{self._ports['dashboard-port']}"
        # RAY_ADDRESS: Ray Train's helper actors look for "the" cluster of the machine, and fail where there are two.
        settings = ray_environment(token) | {"RAY_ADDRESS": self.address} | environment
        self.child = Child("Ray", self._command(), environment=child_environment(run, **settings), log=log, is_ready=self._answers)

    def _command(self) -> list[str]:
        return [
            find_program("ray"),
            "start",
            "--head",
            "--block",
            f"--node-ip-address={LOOPBACK}",
            f"--dashboard-host={LOOPBACK}",
            "--include-dashboard=true",
            *(f"--{name}={port}" for name, port in self._ports.items()),
            "--min-worker-port=0",  # any free one; the default is a fixed range that two clusters would share
            "--max-worker-port=0",
            f"--num-cpus={self.num_cpus}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            f"--temp-dir={self.temp_dir}",
            "--disable-usage-stats",
        ]

    def start(self, *, timeout_seconds: float = 120) -> None:
        self.launch()
        self.child.wait_ready(timeout_seconds=timeout_seconds)

    def launch(self) -> None:
        self.child.sweep()
        shutil.rmtree(self.temp_dir, ignore_errors=True)  # what a killed cluster leaves there misleads the next one
        self.temp_dir.mkdir(mode=0o700)
        self.child.start()

    def stop(self) -> None:
        self.child.stop(grace_seconds=5)  # with a run at work Ray would drain for 30 s
        shutil.rmtree(self.temp_dir, ignore_errors=True)

    def _answers(self) -> bool:
        headers = {"Authorization": f"Bearer {self.token}"}
        try:
            nodes = httpx.get(f"{self.url}/nodes?view=summary", headers=headers, timeout=5, trust_env=False)
            jobs = httpx.get(f"{self.url}/api/jobs/", headers=headers, timeout=5, trust_env=False)
        except httpx.HTTPError:
            return False
        return jobs.status_code == 200 and nodes.status_code == 200 and "ALIVE" in nodes.text


def ray_environment(token: str) -> dict[str, str]:
    """What every process of the local cluster, and every driver that joins it, must have in its environment."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # left alone, Ray rewrites 127.0.0.1 and listens on all interfaces
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_COLOR_PREFIX": "0",
        "GLOO_SOCKET_IFNAME": loopback_interface(),
        "NCCL_SOCKET_IFNAME": loopback_interface(),
    }


def storage_environment(storage: Seaweedfs) -> dict[str, str]:
    """Credentials of the workers: in the raylet's environment, never in a Ray runtime_env, which the dashboard shows."""
    return s3_environment(storage.endpoint, storage.access_key, storage.secret_key)


def s3_environment(endpoint: str, access_key: str, secret_key: str) -> dict[str, str]:
    """By which boto3 finds the object store of this machine."""
    return {
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def loopback_interface() -> str:
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == LOOPBACK for address in addresses):
            return name
    return "lo"


def remove_weed_sockets(ports: Iterable[int]) -> None:
    for port in ports:
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            path.unlink(missing_ok=True)


def find_program(name: str) -> str:
    """A program of our own virtual environment, or of the PATH."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        raise StartError(f"the program {name!r} is not installed: pip install 'maestro-mae[local]'")
    return found
