"""The workers of one start of a run: Ray actors in the run's room, which begin together and end together.

On Ray alone: Ray Train starts three more processes, one after the other, before its workers train (DECISIONS.md).
"""

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util import get_node_ip_address

from mae_core.options import ResourcesConfig
from workers.contract import Reason, WorkOrder
from workers.failures import RunFailedError, first_cause, of_ray
from workers.log_uploads import LogUploads
from workers.pulse import Pulse
from workers.room import Room
from workers.signals import Sign, Signals, stacks

logger = logging.getLogger("maestro.driver")

_START_SECONDS = 300.0  # of processes that have their room
_LOOK_SECONDS = 5.0
_LAST_LOG_SECONDS = 2.0
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

    def __init__(self) -> None:
        self._signals = Signals()

    def place(self) -> Place:
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids()["GPU"]
        # Open until torch takes it over: nobody else gets the port, and nothing listens at another address than the machine's in Ray.
        address: str = get_node_ip_address()  # type: ignore[no-untyped-call]
        self._listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        return Place(context.get_node_id(), self._listener.getsockname()[1], gpus[0] if gpus else None)

    def train(self, post: Post, order: WorkOrder, times: Mapping[str, str]) -> RunFailedError | bool:
        """What went wrong, if anything did; else whether the training stopped so that another number of workers goes on."""
        uploads = LogUploads.start(order, str(post.rank), num_workers=post.num_workers)
        try:
            return self._train(post, order, times)
        finally:
            uploads.close(_LAST_LOG_SECONDS)

    def _train(self, post: Post, order: WorkOrder, times: Mapping[str, str]) -> RunFailedError | bool:
        from workers.causes import explained
        from workers.train_loop import train_worker

        if post.rank == 0 and post.num_workers > 1:
            post = post._replace(listener=self._listener.detach())
        self._listener.close()
        return explained(post.rank, lambda: train_worker(post, order, times, self._signals))

    def answer(self) -> Sign | None:
        """Tells that this process works, and how its training goes."""
        return self._signals.sign()

    def regroup(self) -> None:
        """Has all workers save and stop after the step at hand. For rank 0."""
        self._signals.regroups = True

    def stacks(self) -> str:
        """Where the threads of this process are."""
        return stacks()


class WorkerGroup:
    """All workers of one start. Whatever ends the driver, Ray ends them too."""

    def __init__(self, resources: ResourcesConfig, room: Room) -> None:
        worker: Any = ray.remote(TrainWorker)
        self._workers = [
            worker.options(
                num_cpus=resources.cpus_per_worker,
                num_gpus=resources.gpus_per_worker,
                scheduling_strategy=strategy,
                max_concurrency=2,  # it answers while it trains
            ).remote()
            for strategy in room.strategies()
        ]
        self._began_at: float | None = None

    def train(self, order: WorkOrder, times: Mapping[str, str], *, take_more: Callable[[bool], bool]) -> bool:
        """Waits for the end of the training, and says whether it stopped so that more workers go on. Raises RunFailedError.

        `take_more` is asked every few seconds, with whether the training can be stopped so; it is, once that says True.
        """
        places = _places([worker.place.remote() for worker in self._workers])
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}  # type: ignore[no-untyped-call]
        posts = posts_of(places, addresses)
        machines = {post.rank: places[index].machine for index, post in posts.items()}
        self._began_at = time.monotonic()
        times = {**times, "workers_placed_at": datetime.now(UTC).isoformat()}
        trainings = {self._workers[index].train.remote(post, order, times): post.rank for index, post in posts.items()}
        workers = {post.rank: self._workers[index] for index, post in posts.items()}
        return _watch(trainings, workers, Pulse(workers, machines), hang_seconds=order.spec.retry.hang_minutes * 60, take_more=take_more)

    def trained_seconds(self) -> float:
        """Since all had their places."""
        return 0.0 if self._began_at is None else time.monotonic() - self._began_at

    def stop(self) -> None:
        """Ends the processes, all but those that are stopped: these end with their room."""
        for worker in self._workers:
            ray.kill(worker)


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
    _, late = ray.wait([*calls], num_returns=len(calls), timeout=_START_SECONDS)
    if late:  # such as those for which Ray looks anew, as their machine was lost when they had their room
        raise RunFailedError(Reason.WORKER_DIED, f"{len(late)} worker(s) did not start within {_START_SECONDS:.0f} s", -1)
    try:
        places: list[Place] = ray.get(list(calls))
    except RayError as error:
        raise of_ray(error, -1) from error
    return places


def _watch(
    trainings: dict[Any, int], workers: Mapping[int, Any], pulse: Pulse, *, hang_seconds: float, take_more: Callable[[bool], bool]
) -> bool:
    """Waits until all `trainings`, calls with their ranks, are over, and says whether they stopped to regroup.

    Raises the failure behind those that fail.
    """
    regroups = is_asked = False
    while trainings:
        done, _ = ray.wait([*trainings], timeout=_LOOK_SECONDS)
        ends = [_end(call, trainings.pop(call)) for call in done]
        failures = [end for end in ends if isinstance(end, RunFailedError)] + pulse.silent(trainings.values())
        if failures and trainings:
            done, _ = ray.wait([*trainings], num_returns=len(trainings), timeout=_SETTLE_SECONDS)
            failures += [end for call in done if isinstance(end := _end(call, trainings.pop(call)), RunFailedError)]
        if failures:
            raise first_cause(failures)
        regroups = regroups or True in ends
        if trainings and not ends:
            pulse.check_steps(hang_seconds)
        if not is_asked and take_more(pulse.sign is not None and pulse.sign.can_regroup):
            is_asked = True
            workers[0].regroup.remote()
    return regroups


def _end(call: Any, rank: int) -> RunFailedError | bool:
    """How a call of `train` that is over has ended."""
    try:
        end: RunFailedError | bool = ray.get(call)
    except RayError as error:
        return of_ray(error, rank)
    return end
