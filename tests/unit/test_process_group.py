"""Two workers that meet: real processes, and what they listen on."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from mae_core.world import World
from service.local import loopback_interface
from tests.unit.forked import Forked
from workers.group import Post
from workers.process_group import join


def test_workers_listen_only_where_they_meet(tmp_path: Path) -> None:
    """torch's store, gloo of the training and gloo of the saver: all at the address of the workers' machine in Ray, here loopback."""
    with Forked(_rank_0, 1, tmp_path) as first:
        port = first.told(0)
        with Forked(_rank_1, 1, tmp_path, port) as second:
            (total, interface, found), (other_total, _, others) = first.told(0), second.told(0)
    assert total == other_total == 3.0
    assert interface == loopback_interface()  # else gloo goes by the name of the machine
    assert port in {at for _, at in found}
    assert len(found) > 2  # the store, and gloo's
    assert {address for address, _ in found | others} == {"127.0.0.1"}


def _rank_0(world: World, tell: Callable[[Any], None]) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    tell(port)
    tell(_meet(Post(0, 2, 0, 0, "127.0.0.1", port, (), listener.detach())))


def _rank_1(world: World, tell: Callable[[Any], None], port: int) -> None:
    tell(_meet(Post(1, 2, 0, 1, "127.0.0.1", port, ())))


def _meet(post: Post) -> tuple[float, str, set[tuple[str, int]]]:
    """The sum over both, gloo's interface, and where this process listens meanwhile."""
    os.environ.pop("GLOO_SOCKET_IFNAME", None)  # as in a cluster that does not set it
    join(post)
    of_saver = dist.new_group(backend="gloo")
    value = torch.tensor(float(post.rank + 1))
    dist.all_reduce(value)
    dist.barrier(of_saver)
    listening = [found.laddr for found in psutil.Process().net_connections(kind="inet") if found.status == psutil.CONN_LISTEN]
    return value.item(), os.environ["GLOO_SOCKET_IFNAME"], {(address.ip, address.port) for address in listening}
