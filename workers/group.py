"""The workers of one start of a run: Ray actors on one placement group, which begin together and end together.

On Ray alone: Ray Train starts three more processes, one after the other, before its workers train (DECISIONS.md).
"""

import logging
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util import get_node_ip_address
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mae_core.options import ResourcesConfig
from workers.contract import Reason, WorkOrder
from workers.failures import RunFailedError, first_cause, of_ray

logger = logging.getLogger("maestro.driver")

_LOOK_SECONDS = 5.0
_SILENCE_SECONDS = 600.0  # of a process that neither works nor dies, as one that was stopped
_SETTLE_SECONDS = 1.0  # within which the others fail too, where one has died


class Place(NamedTuple):
    """Where Ray has put a worker: the machine, a port there that it holds, and its GPU (None: it trains on CPUs)."""

    machine: str
    port: int
    gpu: str | None


class Post(NamedTuple):
    """A worker's place among all; machines count from 0. All meet at rank 0's address. `gpus` are those of its machine, by local rank.

    `listener` has rank 0 alone, in its own process: the file descriptor of the socket that listens there.
    """

    rank: int
    num_workers: int
    machine: int
    local_rank: int
    address: str
    port: int
    gpus: tuple[str, ...]
    listener: int | None = None


class TrainWorker:
    """A worker's process. It has its place before it imports torch, which then all do at once."""

    def place(self) -> Place:
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids()["GPU"]
        # Open until torch takes it over: nobody else gets the port, and nothing listens at another address than the machine's in Ray.
        address: str = get_node_ip_address()  # type: ignore[no-untyped-call]
        self._listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        return Place(context.get_node_id(), self._listener.getsockname()[1], gpus[0] if gpus else None)

    def train(self, post: Post, order: WorkOrder, times: Mapping[str, str]) -> RunFailedError | None:
        """What went wrong, if anything did."""
        from workers.causes import explained
        from workers.train_loop import train_worker

        if post.rank == 0 and post.num_workers > 1:
            post = post._replace(listener=self._listener.detach())
        self._listener.close()
        return explained(post.rank, lambda: train_worker(post, order, times))

    def answer(self) -> None:
        """Tells that this process works."""


class WorkerGroup:
    """All workers of one start. Whatever ends the driver, Ray ends them too."""

    def __init__(self, resources: ResourcesConfig) -> None:
        cpus, gpus = resources.cpus_per_worker, resources.gpus_per_worker
        # All or none: two runs never hold a part each of what both need.
        self._room = placement_group([{"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})] * resources.num_workers)
        worker: Any = ray.remote(TrainWorker)
        self._workers = [
            worker.options(
                num_cpus=cpus,
                num_gpus=gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._room, placement_group_bundle_index=index),
                max_concurrency=2,  # it answers while it trains
            ).remote()
            for index in range(resources.num_workers)
        ]

    def train(self, order: WorkOrder, times: Mapping[str, str]) -> None:
        """Waits for the workers' places, however long, and for the end of the training. Raises RunFailedError."""
        places = _places([worker.place.remote() for worker in self._workers])
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}  # type: ignore[no-untyped-call]
        posts = posts_of(places, addresses)
        times = {**times, "workers_placed_at": datetime.now(UTC).isoformat()}
        trainings = {self._workers[index].train.remote(post, order, times): post.rank for index, post in posts.items()}
        _watch(trainings, {post.rank: self._workers[index] for index, post in posts.items()})

    def stop(self) -> None:
        """Ends the processes and gives their place back."""
        for worker in self._workers:
            ray.kill(worker)
        remove_placement_group(self._room)


def posts_of(places: Sequence[Place], addresses: Mapping[str, str]) -> dict[int, Post]:
    """The post of each worker, by its index in `places`, in order of rank: machine by machine, and there by the GPU's number."""
    machines = {machine: number for number, machine in enumerate(dict.fromkeys(place.machine for place in places))}
    by_rank = sorted(range(len(places)), key=lambda index: (machines[places[index].machine], _gpu_order(places[index].gpu), index))
    first, on_machine = places[by_rank[0]], dict[str, list[int]]()
    for index in by_rank:
        on_machine.setdefault(places[index].machine, []).append(index)
    return {
        index: Post(
            rank=rank,
            num_workers=len(places),
            machine=machines[places[index].machine],
            local_rank=on_machine[places[index].machine].index(index),
            address=addresses[first.machine],
            port=first.port,
            gpus=tuple(gpu for peer in on_machine[places[index].machine] if (gpu := places[peer].gpu) is not None),
        )
        for rank, index in enumerate(by_rank)
    }


def _gpu_order(gpu: str | None) -> tuple[int, str]:
    """By number; a GPU's id may be a name, too."""
    return len(gpu or ""), gpu or ""


def _places(calls: Sequence[Any]) -> list[Place]:
    try:
        places: list[Place] = ray.get(list(calls))
    except RayError as error:
        raise of_ray(error, -1) from error
    return places


def _watch(trainings: dict[Any, int], workers: Mapping[int, Any]) -> None:
    """Waits until all `trainings`, calls with their ranks, are over. Raises the failure behind those that fail."""
    pulse = Pulse(workers)
    while trainings:
        done, _ = ray.wait([*trainings], timeout=_LOOK_SECONDS)
        failures = [failure for call in done if (failure := _failure(call, trainings.pop(call)))]
        failures += pulse.silent(trainings.values())
        if failures and trainings:
            done, _ = ray.wait([*trainings], num_returns=len(trainings), timeout=_SETTLE_SECONDS)
            failures += [failure for call in done if (failure := _failure(call, trainings.pop(call)))]
        if failures:
            raise first_cause(failures)


def _failure(call: Any, rank: int) -> RunFailedError | None:
    """How a call of `train` that is over has failed."""
    try:
        failure: RunFailedError | None = ray.get(call)
    except RayError as error:
        return of_ray(error, rank)
    return failure


class Pulse:
    """Asks all workers for an answer, again and again. Who is stopped gives none, and is not dead for Ray."""

    def __init__(self, workers: Mapping[int, Any]) -> None:
        self._workers = workers
        self._asked = {rank: (worker.answer.remote(), time.monotonic()) for rank, worker in workers.items()}

    def silent(self, ranks: Iterable[int]) -> list[RunFailedError]:
        """Those of `ranks` that have not answered for minutes, as failures. To be called every few seconds."""
        now = time.monotonic()
        for rank in ranks:
            if ray.wait([self._asked[rank][0]], timeout=0)[0]:
                self._asked[rank] = (self._workers[rank].answer.remote(), now)
        gone = [rank for rank in ranks if now - self._asked[rank][1] > _SILENCE_SECONDS]
        message = f"the worker's process has not answered for {_SILENCE_SECONDS:g} s"
        return [RunFailedError(Reason.WORKER_DIED, message, rank) for rank in gone]
