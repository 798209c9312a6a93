"""The users of a chaos run: they submit, pause, resume and cancel, and do not give up while the service is away."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from heapq import heappop, heappush

from service.client import ApiError, MaestroClient
from tests.faults.chaos_plan import PlannedJob, Verb

_NUM_USERS = 4
_AGAIN_SECONDS = 0.5
_ENDED = ("succeeded", "cancelled", "failed")


@dataclass
class Users:
    """`ids`: of the jobs that the API has accepted, by name; `cancelled`: the names of those whose cancelling it has accepted."""

    client: MaestroClient
    ids: dict[str, str] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    num_wishes: dict[Verb, int] = field(default_factory=lambda: {"pause": 0, "resume": 0, "cancel": 0})

    def submit_all(self, planned: list[PlannedJob]) -> None:
        """All jobs, some at a time, and what is wished of each at its time. Returns when no wish is left."""
        wishes: list[tuple[float, str, Verb]] = []
        lock = threading.Lock()

        def submit(job: PlannedJob) -> None:
            self.ids[job.name] = self.client.submit(job.spec, idempotency_key=job.name)["id"]
            with lock:
                for wish in job.wishes:
                    heappush(wishes, (time.monotonic() + wish.seconds, job.name, wish.verb))

        with ThreadPoolExecutor(_NUM_USERS) as pool:
            submitted = [pool.submit(submit, job) for job in planned]
            while wishes or not all(each.done() for each in submitted):
                with lock:
                    due = heappop(wishes) if wishes and wishes[0][0] <= time.monotonic() else None
                if due is None:
                    time.sleep(0.02)
                elif not self._wish(due[1], due[2]):
                    with lock:
                        heappush(wishes, (time.monotonic() + _AGAIN_SECONDS, due[1], due[2]))
            for each in submitted:
                each.result()

    def _wish(self, name: str, verb: Verb) -> bool:
        """False where it is to be tried again: a job that is still being paused cannot be resumed yet."""
        job = self.ids[name]
        call = {"pause": self.client.pause, "resume": self.client.resume, "cancel": self.client.cancel}[verb]
        try:
            call(job)
        except ApiError as error:
            if error.status != 409:
                raise
            return verb != "resume" or self.client.job(job)["status"] in _ENDED
        self.num_wishes[verb] += 1
        if verb == "cancel":
            self.cancelled.add(name)
        return True
