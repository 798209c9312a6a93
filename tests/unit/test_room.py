"""How many workers find room, and when a run grows. Ray's placement groups are stand-ins; tests/integration has the real ones."""

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mae_core.options import ResourcesConfig
from workers import room
from workers.contract import Reason
from workers.failures import RunFailedError
from workers.room import Growth, Room, lost_machines

RESOURCES = ResourcesConfig(num_workers={"min": 1, "max": 8}, cpus_per_worker=2, gpus_per_worker=1)  # type: ignore[arg-type]


class Cluster:
    """Has `free` workers' devices, which Ray's figures say to be `said`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = self.said = 4
        self.now = 1000.0
        self.asked: list[tuple[int, float, Any]] = []
        self._waiting: dict[int, tuple[int, Any]] = {}
        monkeypatch.setattr(room, "placement_group", self.place)
        monkeypatch.setattr(room, "remove_placement_group", self.remove)
        monkeypatch.setattr(room.ray, "available_resources", lambda: {"CPU": 2.0 * self.said + 1, "GPU": float(self.said)})
        monkeypatch.setattr(room.time, "monotonic", lambda: self.now)

    def place(self, bundles: list[dict[str, float]], *, bundle_label_selector: Any) -> Any:
        assert bundles == [{"CPU": 2.0, "GPU": 1.0}] * len(bundles)
        assert bundle_label_selector is None or len(bundle_label_selector) == len(bundles)
        group = SimpleNamespace(size=len(bundles), held=False)

        def wait(seconds: float) -> bool:
            self.asked.append((group.size, seconds, bundle_label_selector and bundle_label_selector[0]))
            group.held = group.size <= self.free
            self.free -= group.size * group.held
            return bool(group.held)

        group.wait = wait
        return group

    def remove(self, group: Any) -> None:
        self.free += group.size * group.held


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def test_the_most_that_find_room_begin(cluster: Cluster) -> None:
    held = Room(RESOURCES)
    held.find([1, 2, 4, 8], at_most=5)
    assert (held.num_workers, len(held.strategies()), cluster.free) == (4, 4, 0)
    held.give_back()
    assert (held.num_workers, cluster.free) == (0, 4)


def test_room_that_is_spread_badly_is_not_waited_for(cluster: Cluster) -> None:
    cluster.free = 2
    held = Room(RESOURCES)
    held.find([1, 2, 4], at_most=4)
    assert held.num_workers == 2
    assert cluster.asked == [(4, 3.0, None), (2, 3.0, None)]


def test_where_none_is_free_the_fewest_are_waited_for(cluster: Cluster) -> None:
    Room(RESOURCES).find([2, 4], at_most=0)
    assert cluster.asked == [(2, 300.0, None)]


def test_a_run_for_which_there_is_no_room_gives_its_turn_back(cluster: Cluster) -> None:
    cluster.free = 1
    held = Room(RESOURCES)
    with pytest.raises(RunFailedError, match=r"no room for 2 worker\(s\).*within 300 s") as failed:
        held.find([2, 4], at_most=0)
    assert failed.value.reason is Reason.WAITING_FOR_RESOURCES
    assert (held.num_workers, cluster.free) == (0, 1)


def test_a_lost_machine_is_avoided_until_ray_knows(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.free = 0

    def comes_back(group: Any) -> None:
        cluster.free = 2 if len(cluster.asked) == 2 else cluster.free

    monkeypatch.setattr(room, "remove_placement_group", comes_back)
    Room(RESOURCES).find([2, 4], at_most=2, avoid={"b", "a"})
    elsewhere = {"ray.io/node-id": "!in(a,b)"}
    assert cluster.asked == [(2, 3.0, elsewhere), (2, 30.0, elsewhere), (2, 300.0, None)]


@pytest.fixture
def growth(cluster: Cluster) -> Growth:
    """Of a run of two workers that may be 2, 4 or 8, beside which nothing is free now."""
    held = Room(RESOURCES)
    held.find([2, 4, 8], at_most=2)
    cluster.free = cluster.said = 0
    return Growth(held, RESOURCES, [2, 4, 8])


def looks(growth: Growth, cluster: Cluster, *, seconds: int, can_grow: bool = True) -> bool:
    """Whether it grows within so many seconds."""
    for _ in range(seconds):
        cluster.now += 1.0
        if growth.take_more(can_grow):
            return True
    return False


def test_a_run_grows_into_what_is_free_for_a_while(growth: Growth, cluster: Cluster) -> None:
    cluster.now += 100.0
    assert not looks(growth, cluster, seconds=20)
    cluster.free = cluster.said = 3
    assert not looks(growth, cluster, seconds=10)
    assert looks(growth, cluster, seconds=1)
    assert (growth._room.num_workers, cluster.free) == (4, 1)  # to 8 is too far


def test_what_others_take_meanwhile_is_theirs(growth: Growth, cluster: Cluster) -> None:
    cluster.now += 100.0
    for free in (2, 1, 2, 1):
        cluster.free = cluster.said = free
        assert not looks(growth, cluster, seconds=9)


def test_a_run_that_has_just_begun_does_not_grow(growth: Growth, cluster: Cluster) -> None:
    cluster.free = cluster.said = 6
    assert not looks(growth, cluster, seconds=29)
    assert looks(growth, cluster, seconds=1)
    assert growth._room.num_workers == 8


def test_a_run_that_may_not_grow_has_seen_nothing_free(growth: Growth, cluster: Cluster) -> None:
    cluster.now += 100.0
    cluster.free = cluster.said = 6
    assert not looks(growth, cluster, seconds=9)
    assert not looks(growth, cluster, seconds=20, can_grow=False)  # a job waits for it
    assert not looks(growth, cluster, seconds=10)
    assert looks(growth, cluster, seconds=1)


def test_what_ray_calls_free_may_have_no_room(growth: Growth, cluster: Cluster) -> None:
    cluster.now += 100.0
    cluster.said = 2
    assert not looks(growth, cluster, seconds=60)
    assert cluster.asked[1:] == [(2, 3.0, None)] * 5  # again only after another while


def test_a_run_of_a_fixed_number_asks_nothing(cluster: Cluster) -> None:
    held = Room(RESOURCES)
    held.find([2], at_most=0)
    cluster.now += 100.0
    assert not looks(Growth(held, RESOURCES, [2]), cluster, seconds=60)


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_lost_machines_are_those_that_take_no_connection(monkeypatch: pytest.MonkeyPatch, listening: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        refused = closed.getsockname()[1]
    ports, alive = {"there": listening, "gone": refused, "given up": listening}, {"there", "gone"}
    nodes = [
        {"NodeID": name, "Alive": name in alive, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port} for name, port in ports.items()
    ]
    monkeypatch.setattr(room.ray, "nodes", lambda: nodes)
    assert lost_machines(["there", "gone", "given up", "there", "never seen"]) == {"gone", "given up", "never seen"}
    assert lost_machines([]) == set()


def test_room_is_lost_with_its_machines(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle that Ray is looking for another place for has none."""
    held = Room(RESOURCES)
    held.find([1, 2], at_most=2)
    assert held.take(2, seconds=3.0)
    tables = [{0: "a", 1: "b"}, {0: "b", 1: ""}]
    monkeypatch.setattr(
        room, "placement_group_table", lambda group: {"bundles_to_node_id": tables[[held._held[0][0], held._held[1][0]].index(group)]}
    )
    monkeypatch.setattr(room, "lost_machines", lambda machines: set(machines) - {"a"})
    assert held.lost() == (3, {"b"})
