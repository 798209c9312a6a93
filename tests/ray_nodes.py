"""A second machine of a Ray cluster, for tests: a raylet with resources of its own on this machine, which can be lost and come back."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from service.local import OBJECT_STORE_BYTES, RayHead
from service.processes import RUN_VARIABLE, Child, free_ports, kill, processes_of_run

_ADDRESS = "127.0.0.2"  # loopback as well, and another machine's for Ray
# `ray start` refuses to join a head that was told to stay on loopback, and would look for it at the machine's outer address otherwise.
_START = """
import os
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"
from ray._private import services
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
services.get_node_ip_address = lambda address=None: "127.0.0.1"
from ray.scripts.scripts import main
main()
"""
_PORTS = (
    "object-manager-port",
    "node-manager-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)


class RayNode:
    """A node beside the head's own. Its processes carry the mark of the head's run, and are killed with it at the latest."""

    def __init__(self, head: RayHead, *, num_cpus: int, log: Path) -> None:
        self._head, self._num_cpus = head, num_cpus
        ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        self._name = f"node-{ports['node-manager-port']}"
        command = [
            *(sys.executable, "-c", _START, "start"),
            "--block",
            f"--address={head.address}",
            f"--node-ip-address={_ADDRESS}",
            *(f"--{name}={port}" for name, port in ports.items()),
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--num-cpus={num_cpus}",
            f"--node-name={self._name}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--disable-usage-stats",
        ]
        self.child = Child(self._name, command, environment=head.child.environment, log=log, is_ready=self._is_known)

    def start(self, *, timeout_seconds: float = 60) -> None:
        self.child.start()
        self.child.wait_ready(timeout_seconds=timeout_seconds)

    def processes(self) -> list[psutil.Process]:
        """The raylet and all that it has started, workers too."""
        return processes_of_run(self.child.environment[RUN_VARIABLE], part=self._name)

    def lose(self) -> None:
        """kill -9 of the raylet and all of its processes at once, as when a machine loses its power."""
        kill(self.processes())
        self.child.kill()  # it is dead: its exit is taken note of

    def _is_known(self) -> bool:
        headers = {"Authorization": f"Bearer {self._head.token}"}
        try:
            nodes = httpx.get(f"{self._head.url}/nodes?view=summary", headers=headers, timeout=5, trust_env=False)
        except httpx.HTTPError:
            return False
        summary = nodes.json()["data"]["summary"] if nodes.status_code == 200 else []
        return any(node["raylet"].get("nodeName") == self._name and node["raylet"].get("state") == "ALIVE" for node in summary)


@contextmanager
def second_node(head: RayHead, *, num_cpus: int) -> Iterator[RayNode]:
    """A node that has joined; it is lost at the end, if it was not before."""
    with tempfile.TemporaryDirectory(prefix="maestro-node-") as folder:
        node = RayNode(head, num_cpus=num_cpus, log=Path(folder) / "node.log")
        try:
            node.start()
            yield node
        finally:
            node.lose()
