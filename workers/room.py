"""Devices of the cluster that a run holds, for as many workers as find room: Ray's placement groups."""

import logging
import socket
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mae_core.options import ResourcesConfig
from workers.contract import Reason
from workers.failures import RunFailedError

logger = logging.getLogger("maestro.driver")

_PATIENCE_SECONDS = 3.0  # for room that is free by Ray's own figures, which say nothing of how it is spread over the machines
_ROOM_SECONDS = 300.0  # for room that the service has admitted the run to: it may lie in pieces too small for a worker, or be lost since
_SUSPICION_SECONDS = 30.0  # by then Ray itself knows a machine that is lost
_CONNECT_SECONDS = 2.0
_CALM_SECONDS = 30.0  # between two starts, so that a run that grows takes more steps than it loses
_STEADY_SECONDS = 10.0  # a job that waits for these devices has begun by then


class Room:
    """What a run holds. All or none: two runs never hold a part each of what both need."""

    def __init__(self, resources: ResourcesConfig) -> None:
        self._bundle = needs(resources)
        self._held: list[tuple[PlacementGroup, int]] = []

    @property
    def num_workers(self) -> int:
        return sum(num_workers for _, num_workers in self._held)

    def find(self, counts: Sequence[int], *, at_most: int, avoid: Collection[str] = ()) -> None:
        """Room for the most workers of `counts`, ascending, that find some; where none do, waits a while until the fewest do.

        Raises RunFailedError where they do not either: then the job stands in line again, where what it needs is told, and others pass.

        Args:
            at_most: workers for which room is free.
            avoid: machines that are lost, as far as can be seen: Ray may not know it yet.
        """
        for count in reversed([count for count in counts if count <= at_most]):
            if self.take(count, seconds=_PATIENCE_SECONDS, avoid=avoid):
                return
        logger.info("waiting for room for %d worker(s)", counts[0])
        if avoid and self.take(counts[0], seconds=_SUSPICION_SECONDS, avoid=avoid):
            return
        if not self.take(counts[0], seconds=_ROOM_SECONDS):
            message = f"Ray found no room for {counts[0]} worker(s) of {self._bundle} within {_ROOM_SECONDS:.0f} s"
            raise RunFailedError(Reason.WAITING_FOR_RESOURCES, message, -1)

    def take(self, num_workers: int, *, seconds: float, avoid: Collection[str] = ()) -> bool:
        """Room for so many more workers; False where it was not found within `seconds`."""
        elsewhere = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}
        group = placement_group([self._bundle] * num_workers, bundle_label_selector=[elsewhere] * num_workers if avoid else None)
        if not group.wait(seconds):
            remove_placement_group(group)
            return False
        self._held.append((group, num_workers))
        return True

    def strategies(self) -> list[Any]:
        """Where to start each worker."""
        return [
            PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            for group, num_workers in self._held
            for index in range(num_workers)
        ]

    def lost(self) -> tuple[int, set[str]]:
        """For how many workers the room is lost with its machines, as far as can be seen, and which those are."""
        tables = [placement_group_table(group) for group, _ in self._held]
        machines: list[str] = [machine for table in tables for machine in table["bundles_to_node_id"].values()]
        lost = lost_machines(machines)
        return sum(machine in lost for machine in machines), lost - {""}

    def give_back(self) -> None:
        """Ends the processes in it, too, even those that are stopped."""
        for group, _ in self._held:
            remove_placement_group(group)
        self._held = []


class Growth:
    """Watches for room for more workers. What is free for a while nobody waits for: a queued job would have taken it."""

    def __init__(self, room: Room, resources: ResourcesConfig, counts: Sequence[int]) -> None:
        self._room, self._resources = room, resources
        self._larger = [count for count in counts if count > room.num_workers]
        self._began_at = time.monotonic()
        self._free_since: float | None = None

    def take_more(self, can_grow: bool) -> bool:
        """Whether room for more workers is held from now on. To be called every few seconds. `can_grow`: whether the training would now."""
        if not self._larger or not can_grow:
            self._free_since = None
            return False
        now, held = time.monotonic(), self._room.num_workers
        fitting = [count for count in self._larger if count <= held + free_workers(self._resources)]
        self._free_since = (self._free_since or now) if fitting else None
        if self._free_since is None or now - self._free_since < _STEADY_SECONDS or now - self._began_at < _CALM_SECONDS:
            return False
        self._free_since = None
        return self._room.take(fitting[-1] - held, seconds=_PATIENCE_SECONDS)


def needs(resources: ResourcesConfig) -> dict[str, float]:
    """Of one worker, by Ray's names."""
    asked = {"CPU": float(resources.cpus_per_worker), "GPU": float(resources.gpus_per_worker)}
    return {kind: number for kind, number in asked.items() if number}


def free_workers(resources: ResourcesConfig) -> int:
    """For how many workers the cluster has free devices, wherever they are."""
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    return int(min(free.get(kind, 0.0) // number for kind, number in needs(resources).items()))


def lost_machines(machines: Iterable[str]) -> set[str]:
    """Those that Ray has given up, or whose raylet does not take a connection: Ray needs 15 s and more to see that."""
    known = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
    asked = list(dict.fromkeys(machines))
    with ThreadPoolExecutor(max_workers=32) as pool:
        found = list(pool.map(lambda machine: machine in known and _takes_connections(known[machine]), asked))
    return {machine for machine, is_there in zip(asked, found, strict=True) if not is_there}


def _takes_connections(node: dict[str, Any]) -> bool:
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=_CONNECT_SECONDS):
            return True
    except OSError:
        return False
