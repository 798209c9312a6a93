"""Ray's Jobs REST API, over httpx."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Protocol

import httpx

from service.errors import RayUnreachable

READ_SECONDS = 10.0


class AlreadyExists(Exception):
    """Ray has a job with this submission id."""


class RayRefused(Exception):
    """Ray answered that the request itself is wrong: a repeat cannot help."""


class RayStatus(StrEnum):
    """Ray's own statuses of a Ray job."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"

    @property
    def is_over(self) -> bool:
        return self not in (RayStatus.PENDING, RayStatus.RUNNING)


@dataclass(frozen=True)
class RayJob:
    """What Ray says of one Ray job."""

    submission_id: str
    status: RayStatus
    message: str | None = None
    exit_code: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ClusterResources:
    """CPUs and GPUs of the cluster. The used ones are as of `at` (Ray's clock; None: not told yet), seconds in the past."""

    num_cpus: float
    num_gpus: float
    used_cpus: float = 0.0
    used_gpus: float = 0.0
    at: datetime | None = None


@dataclass(frozen=True)
class RayNode:
    """A machine of the cluster that lives. id: Ray's own."""

    id: str
    is_head: bool
    num_cpus: float
    num_gpus: float


class RayJobs(Protocol):
    """What the service asks of Ray. Every call may raise RayUnreachable: then what Ray does is unknown."""

    def check(self) -> None:
        """It answers us, and no stranger."""

    def submit(self, submission_id: str, *, entrypoint: str, env_vars: dict[str, str], metadata: dict[str, str]) -> None:
        """Raises AlreadyExists, and RayRefused."""

    def info(self, submission_id: str) -> RayJob | None:
        """None: Ray does not know it (never did, or lost it with its head)."""

    def list(self) -> dict[str, RayJob]:
        """All that Ray knows, by submission id."""

    def logs(self, submission_id: str) -> str | None: ...
    def stop(self, submission_id: str) -> None:
        """Ask it to stop; without effect on one that is over or not known."""

    def resources(self) -> ClusterResources: ...
    def nodes(self) -> Sequence[RayNode]: ...


class HttpRayJobs:
    """RayJobs on the dashboard of a Ray head with token authentication."""

    def __init__(self, url: str, *, token: str, timeout_seconds: float = READ_SECONDS) -> None:
        self._url = url
        self._client = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=httpx.Timeout(timeout_seconds, connect=3.0), trust_env=False
        )

    def close(self) -> None:
        self._client.close()

    def check(self) -> None:
        self._json("GET", "/api/version")
        asked_without = self._request("GET", "/api/jobs/none", headers={"Authorization": ""})
        if asked_without.status_code not in (401, 403):
            raise RayUnreachable(f"The Ray cluster at {self._url} asks for no token: start it with RAY_AUTH_MODE=token.")

    def version(self) -> str:
        """Ray's own."""
        return str(self._json("GET", "/api/version").get("ray_version", "unknown"))

    def submit(self, submission_id: str, *, entrypoint: str, env_vars: dict[str, str], metadata: dict[str, str]) -> None:
        body = {
            "submission_id": submission_id,
            "entrypoint": entrypoint,
            "metadata": metadata,
            "runtime_env": {"env_vars": env_vars},
        }
        response = self._request("POST", "/api/jobs/", json=body)
        if response.status_code == 500 and "already exists" in response.text:
            raise AlreadyExists(submission_id)
        if response.status_code == 400:
            raise RayRefused(_last_line(response.text))
        self._checked(response)

    def info(self, submission_id: str) -> RayJob | None:
        answer = self._json("GET", f"/api/jobs/{submission_id}", none_on_404=True)
        if answer is None:
            return None
        return _ray_job(answer)

    def list(self) -> dict[str, RayJob]:
        answers = self._json("GET", "/api/jobs/")  # drivers that nobody submitted are in it, too
        return {answer["submission_id"]: _ray_job(answer) for answer in answers if answer.get("submission_id")}

    def logs(self, submission_id: str) -> str | None:
        answer = self._json("GET", f"/api/jobs/{submission_id}/logs", none_on_404=True)
        return None if answer is None else str(answer["logs"])

    def stop(self, submission_id: str) -> None:
        self._json("POST", f"/api/jobs/{submission_id}/stop", none_on_404=True)

    def resources(self) -> ClusterResources:
        """Ray writes this status every 5 s (and not at all in a head's first seconds): what was started since is not in it."""
        status = self._json("GET", "/api/cluster_status")["data"]["clusterStatus"] or {}
        usage = status.get("loadMetricsReport", {}).get("usage", {})
        if "CPU" not in usage and "GPU" not in usage:
            return self._total_resources()
        (used_cpus, num_cpus), (used_gpus, num_gpus) = usage.get("CPU", (0.0, 0.0)), usage.get("GPU", (0.0, 0.0))
        return ClusterResources(num_cpus, num_gpus, used_cpus, used_gpus, at=datetime.fromtimestamp(status["time"], UTC))

    def nodes(self) -> Sequence[RayNode]:
        answers = self._json("GET", "/api/v0/nodes?detail=1&limit=10000")["data"]["result"]["result"]
        return [_ray_node(answer) for answer in answers if answer["state"] == "ALIVE"]

    def _total_resources(self) -> ClusterResources:
        nodes = self.nodes()
        return ClusterResources(sum(node.num_cpus for node in nodes), sum(node.num_gpus for node in nodes))

    def _json(self, method: str, path: str, *, none_on_404: bool = False) -> Any:
        response = self._request(method, path)
        if none_on_404 and response.status_code == 404:
            return None
        try:
            return self._checked(response).json()
        except ValueError:
            raise RayUnreachable(f"What answers at {self._url} is not a Ray cluster.") from None

    def _request(self, method: str, path: str, *, json: Any = None, headers: dict[str, str] | None = None) -> httpx.Response:
        try:
            return self._client.request(method, path, json=json, headers=headers)
        except httpx.HTTPError as error:
            raise RayUnreachable(f"The Ray cluster at {self._url} does not answer ({type(error).__name__}).") from None

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.status_code in (401, 403):
            raise RayUnreachable(f"The Ray cluster at {self._url} refuses our token: check MAESTRO_RAY_TOKEN.")
        if response.status_code != 200:
            raise RayUnreachable(f"The Ray cluster at {self._url} answers HTTP {response.status_code}: {_last_line(response.text)}")
        return response


def _ray_job(answer: dict[str, Any]) -> RayJob:
    message, exit_code = answer.get("message"), answer.get("driver_exit_code")
    return RayJob(answer["submission_id"], RayStatus(answer["status"]), message, exit_code, answer.get("metadata") or {})


def _ray_node(answer: dict[str, Any]) -> RayNode:
    total = answer["resources_total"]
    return RayNode(answer["node_id"], bool(answer["is_head_node"]), total.get("CPU", 0.0), total.get("GPU", 0.0))


def _last_line(text: str) -> str:
    """The message of a traceback."""
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 1]
    return lines[-1][:500] if lines else ""
