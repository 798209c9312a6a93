"""Asking the workers how they are while they train: who is alive, and whether the training goes on."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from workers.contract import Reason
from workers.failures import RunFailedError
from workers.room import lost_machines
from workers.signals import Sign

_SILENCE_SECONDS = 600.0  # of a process that neither works nor dies, as one that was stopped
_UNREACHABLE_SECONDS = 10.0  # of a process on a machine that does not answer either
_STACKS_SECONDS = 10.0


class HungError(RunFailedError):
    """The workers live, but take no step. rank: the first that does not even say where it is, else 0. stacks: by rank."""

    def __init__(self, sign: Sign, rank: int, stacks: dict[int, str]) -> None:
        super().__init__(Reason.HUNG, f"no step for {sign.seconds:.0f} s after step {sign.step}", rank)
        self.step, self.seconds, self.stacks = sign.step, sign.seconds, stacks


class Pulse:
    """Asks all workers for an answer, again and again. Who is stopped gives none, and is not dead for Ray.

    `sign`: how the training goes, as rank 0 has last said; None while no step is due.
    """

    def __init__(self, workers: Mapping[int, Any], machines: Mapping[int, str]) -> None:
        self._workers, self._machines = workers, machines
        self._asked = {rank: (worker.answer.remote(), time.monotonic()) for rank, worker in workers.items()}
        self.sign: Sign | None = None
        self._heard_at = time.monotonic()

    def silent(self, ranks: Iterable[int]) -> list[RunFailedError]:
        """Those of `ranks` that have not answered for too long, as failures. To be called every few seconds."""
        now, ranks = time.monotonic(), list(ranks)
        for rank in ranks:
            call, _ = self._asked[rank]
            if ray.wait([call], timeout=0)[0]:
                self._hear(rank, call)
                self._asked[rank] = (self._workers[rank].answer.remote(), now)
        waiting = {rank: now - self._asked[rank][1] for rank in ranks}
        late = [rank for rank, seconds in waiting.items() if seconds > _UNREACHABLE_SECONDS]
        lost = lost_machines(self._machines[rank] for rank in late) if late else set()
        return [
            RunFailedError(Reason.WORKER_DIED, f"the worker's process has not answered for {waiting[rank]:.0f} s", rank)
            for rank in late
            if waiting[rank] > _SILENCE_SECONDS or self._machines[rank] in lost
        ]

    def check_steps(self, floor_seconds: float) -> None:
        """Raises HungError, with where all workers are, when the next step is late beyond measure."""
        if self.sign is None:
            return
        sign = self.sign._replace(seconds=self.sign.seconds + time.monotonic() - self._heard_at)  # rank 0 may be stopped itself
        if not sign.hangs(floor_seconds):
            return
        calls = {worker.stacks.remote(): rank for rank, worker in self._workers.items()}
        told, untold = ray.wait([*calls], num_returns=len(calls), timeout=_STACKS_SECONDS)
        stacks = {calls[call]: _stacks(call) for call in told} | {calls[call]: "it does not answer" for call in untold}
        raise HungError(sign, min((calls[call] for call in untold), default=0), dict(sorted(stacks.items())))

    def _hear(self, rank: int, call: Any) -> None:
        try:
            sign: Sign | None = ray.get(call)
        except RayError:  # it has died; the call that trains says so
            sign = None
        if rank == 0:
            self.sign, self._heard_at = sign, time.monotonic()


def _stacks(call: Any) -> str:
    try:
        told: str = ray.get(call)
    except RayError as error:
        return f"{type(error).__name__}: {error}"
    return told
