"""Ray's Jobs REST API as `service.ray_jobs` uses it, over the stand-in's cluster, and the faults that it shows when told to."""

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable

from tests.stand_in.cluster import Cluster
from tests.stand_in.wire import Answer, NoAnswer, Request

_STALL_SECONDS = 11.0  # longer than the service waits for an answer


@dataclasses.dataclass
class Faults:
    """Shares of the requests, 0 to 1, that something befalls."""

    lost_answers: float = 0.0  # it is done, and the connection cut without an answer
    stalls: float = 0.0  # it is done, and the answer comes too late
    errors: float = 0.0  # 500, half of the time though it is done
    away: bool = False  # nothing is heard at all


class Api:
    """`token`: what callers must bring. Routes below /stand-in are for tests, and know no faults."""

    def __init__(self, cluster: Cluster, *, token: str, seed: int) -> None:
        self._cluster = cluster
        self._token = token
        self._random = random.Random(seed)
        self._faults = Faults()

    async def __call__(self, request: Request) -> Answer:
        if request.path.startswith("/stand-in/"):
            return self._told(request)
        if self._faults.away:
            raise NoAnswer
        sent = request.headers.get("authorization")
        if sent != f"Bearer {self._token}":
            return Answer(401, "Unauthorized: Missing authentication token") if sent is None else Answer(403, "Forbidden: Invalid token")
        faults, draw = self._faults, self._random.random()
        if draw < faults.errors / 2:
            return Answer(500, "Internal Server Error: as told")
        answer = self._answer(request)
        if draw < faults.errors:
            return Answer(500, "Internal Server Error: as told, though it was done")
        if draw < faults.errors + faults.lost_answers:
            raise NoAnswer
        if draw < faults.errors + faults.lost_answers + faults.stalls:
            await asyncio.sleep(_STALL_SECONDS)
        return answer

    def _answer(self, request: Request) -> Answer:
        match request.method, request.path.removeprefix("/api/").split("/"):
            case "GET", ["version"]:
                return Answer(200, {"version": "4", "ray_version": "stand-in", "session_name": "stand-in"})
            case "POST", ["jobs", ""]:
                return self._submit(request)
            case "GET", ["jobs", ""]:
                return Answer(200, [job.details() for job in self._cluster.jobs.values()])
            case "GET", ["jobs", name]:
                return self._of(name, lambda: self._cluster.jobs[name].details())
            case "GET", ["jobs", name, "logs"]:
                return self._of(name, lambda: {"logs": self._cluster.jobs[name].log})
            case "POST", ["jobs", name, "stop"]:
                return self._of(name, lambda: {"stopped": self._cluster.stop(name)})
            case "GET", ["cluster_status"]:
                at, used = self._cluster.usage()
                usage = {"CPU": [float(used), float(self._cluster.num_cpus)]}
                return Answer(200, {"result": True, "data": {"clusterStatus": {"time": at, "loadMetricsReport": {"usage": usage}}}})
            case "GET", ["v0", "nodes"]:
                total = {"CPU": float(self._cluster.num_cpus)}
                nodes = [{"node_id": "stand-in", "is_head_node": True, "state": "ALIVE", "resources_total": total}]
                return Answer(200, {"result": True, "data": {"result": {"result": nodes}}})
        return Answer(404, "404: Not Found")

    def _of(self, name: str, content: Callable[[], object]) -> Answer:
        if name not in self._cluster.jobs:
            return Answer(404, f"Job {name} does not exist")
        return Answer(200, content())

    def _submit(self, request: Request) -> Answer:
        body = request.json()
        name, entrypoint = body.get("submission_id"), body.get("entrypoint")
        if not name or not entrypoint:
            return Answer(400, "TypeError: __init__() missing 1 required positional argument: 'entrypoint'")
        env_vars = body.get("runtime_env", {}).get("env_vars", {})
        if not self._cluster.submit(name, entrypoint, env_vars, body.get("metadata", {})):
            return Answer(500, f"Traceback (most recent call last):\nValueError: Job with submission_id {name} already exists.")
        return Answer(200, {"job_id": name, "submission_id": name})

    def _told(self, request: Request) -> Answer:
        match request.path.removeprefix("/stand-in/"):
            case "faults":
                self._faults = Faults(**request.json())
                return Answer(200, dataclasses.asdict(self._faults))
            case "forget":
                return Answer(200, {"num_killed": self._cluster.forget(), "at": time.time()})
            case "history":
                return Answer(200, self._cluster.history())
        return Answer(404, "404: Not Found")
