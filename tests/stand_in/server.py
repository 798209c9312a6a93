"""The stand-in as a process of its own, and what tests tell and ask it."""

import secrets
import sys
from pathlib import Path
from typing import Any

import httpx

from service.local import LOOPBACK
from service.processes import Child, child_environment, free_ports
from tests.stand_in.__main__ import TOKEN_VARIABLE


class StandIn:
    """Like `service.local.RayHead`: `.url` (Jobs API), `.token`, `.num_cpus`. `environment`: the workers' keys of object storage."""

    def __init__(
        self, *, run: str, log: Path, environment: dict[str, str], num_cpus: int = 64, report_seconds: float = 1.0, seed: int = 0
    ) -> None:
        self.num_cpus = num_cpus
        self.token = secrets.token_hex(16)
        port = free_ports(1)[0]
        self.url = f"http://{LOOPBACK}:{port}"
        options = {"port": port, "cpus": num_cpus, "report-seconds": report_seconds, "seed": seed}
        command = [sys.executable, "-m", "tests.stand_in", *(f"--{name}={value}" for name, value in options.items())]
        settings = {TOKEN_VARIABLE: self.token} | environment
        self.child = Child("stand-in", command, environment=child_environment(run, **settings), log=log, is_ready=self._answers)

    def start(self) -> None:
        self.child.start()
        self.child.wait_ready(timeout_seconds=300)

    def stop(self) -> None:
        self.child.stop(grace_seconds=5)

    def faults(self, **faults: float | bool) -> None:
        """From now on (see `api.Faults`); none given: none any more."""
        self._tell("faults", faults)

    def forget(self) -> int:
        """The head restarts: how many runs died of it."""
        num_killed: int = self._tell("forget", {})["num_killed"]
        return num_killed

    def history(self) -> list[dict[str, Any]]:
        """Every run that there ever was (see `cluster.Life`)."""
        lives: list[dict[str, Any]] = self._tell("history", {})
        return lives

    def _tell(self, route: str, content: Any) -> Any:
        answer = httpx.post(f"{self.url}/stand-in/{route}", json=content, trust_env=False, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def _answers(self) -> bool:
        headers = {"Authorization": f"Bearer {self.token}"}
        try:
            return httpx.get(f"{self.url}/api/version", headers=headers, trust_env=False, timeout=5).status_code == 200
        except httpx.HTTPError:
            return False
