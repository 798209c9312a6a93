"""Ray as unit tests see it: Ray jobs in memory. `tests/integration/test_ray_jobs.py` holds it to the real one's behaviour."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from service.errors import RayUnreachable
from service.ray_jobs import AlreadyExists, ClusterResources, RayJob, RayNode, RayRefused, RayStatus


@dataclass(frozen=True)
class Submission:
    """What was asked of Ray."""

    entrypoint: str
    env_vars: dict[str, str]
    metadata: dict[str, str]


class FakeRay:
    """Jobs stay PENDING until a test says otherwise."""

    def __init__(self, *, num_cpus: float = 8.0, num_gpus: float = 0.0) -> None:
        self.cluster = ClusterResources(num_cpus, num_gpus)
        self.jobs: dict[str, RayJob] = {}
        self.submissions: dict[str, Submission] = {}
        self.num_submitted: Counter[str] = Counter()
        self.texts: dict[str, str] = {}
        self.stopped: list[str] = []
        self.is_down = False
        self.loses_answers = False  # a submission arrives, its answer does not
        self.refuses: str | None = None
        self._lock = threading.Lock()  # of two who submit the same, one is refused

    def _reach(self) -> None:
        if self.is_down:
            raise RayUnreachable("The Ray cluster does not answer (fake).")

    def check(self) -> None:
        self._reach()

    def submit(self, submission_id: str, *, entrypoint: str, env_vars: dict[str, str], metadata: dict[str, str]) -> None:
        self._reach()
        if self.refuses is not None:
            raise RayRefused(self.refuses)
        with self._lock:
            if submission_id in self.jobs:
                raise AlreadyExists(submission_id)
            self.num_submitted[submission_id] += 1
            self.jobs[submission_id] = RayJob(submission_id, RayStatus.PENDING, metadata=metadata)
        self.submissions[submission_id] = Submission(entrypoint, env_vars, metadata)
        self.texts.setdefault(submission_id, f"log of {submission_id}\n")
        if self.loses_answers:
            raise RayUnreachable("The Ray cluster does not answer (ReadTimeout, fake).")

    def info(self, submission_id: str) -> RayJob | None:
        self._reach()
        return self.jobs.get(submission_id)

    def list(self) -> dict[str, RayJob]:
        self._reach()
        return dict(self.jobs)

    def logs(self, submission_id: str) -> str | None:
        self._reach()
        return self.texts[submission_id] if submission_id in self.jobs else None

    def stop(self, submission_id: str) -> None:
        self._reach()
        self.stopped.append(submission_id)
        job = self.jobs.get(submission_id)
        if job is not None and not job.status.is_over:
            self.end(submission_id, RayStatus.STOPPED)

    def resources(self) -> ClusterResources:
        self._reach()
        return self.cluster

    def nodes(self) -> Sequence[RayNode]:
        self._reach()
        return [RayNode("head", True, self.cluster.num_cpus, self.cluster.num_gpus)]

    # what a test makes happen

    def run(self, submission_id: str) -> None:
        self.jobs[submission_id] = replace(self.jobs[submission_id], status=RayStatus.RUNNING)

    def end(self, submission_id: str, status: RayStatus, *, message: str | None = None) -> None:
        self.jobs[submission_id] = replace(self.jobs[submission_id], status=status, message=message)

    def forget(self) -> None:
        """The head restarted."""
        self.jobs.clear()
