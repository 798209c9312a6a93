"""Functions run in worker processes that are forked from a server which has loaded torch: a group of them starts in a tenth of a second."""

import multiprocessing
import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mae_core.options import ARCH_SIZES
from mae_core.world import World
from tests.unit.core_fixtures import SHALLOW

_SECONDS = 120.0
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.unit.forked", "mae_core.state_files", "workers.train_loop", "torch._dynamo"])


class Forked:
    """Running workers, of which each calls `function(world, tell, *arguments)`. A context: it ends with none of them left."""

    def __init__(self, function: Callable[..., Any], size: int, folder: Path, *arguments: Any) -> None:
        rendezvous = folder / f"rendezvous-{os.urandom(8).hex()}"
        self._pipes, self._workers = [], []
        for rank in range(size):
            ours, theirs = _server.Pipe()
            worker = _server.Process(target=_work, args=(function, rank, size, rendezvous, theirs, arguments), daemon=True)
            worker.start()
            theirs.close()
            self._pipes.append(ours)
            self._workers.append(worker)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
            worker.join()

    def told(self, rank: int) -> Any:
        """The next thing that the worker tells, or what it returned. Raises EOFError when it was killed, AssertionError when it failed."""
        assert self._pipes[rank].poll(_SECONDS), f"worker {rank} says nothing"
        kind, value = pickle.loads(self._pipes[rank].recv_bytes())  # its own pickling would share tensors' memory
        assert kind == "told", value
        self._pipes[rank].send_bytes(b"heard")
        return value

    def kill(self, rank: int) -> None:
        """kill -9."""
        self._workers[rank].kill()
        self._workers[rank].join()


def in_workers(function: Callable[..., Any], size: int, folder: Path, *arguments: Any) -> list[Any]:
    """What `function(world, *arguments)` returns on each of `size` workers."""
    with Forked(_telling, size, folder, function, arguments) as workers:
        return [workers.told(rank) for rank in range(size)]


def _telling(world: World, tell: Callable[[Any], None], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    tell(function(world, *arguments))


def _tell(pipe: Connection, value: Any) -> None:
    """Waits until the test has heard it: no worker runs ahead of what the test knows of it."""
    pipe.send_bytes(pickle.dumps(("told", value)))
    pipe.recv_bytes()


def _work(function: Callable[..., Any], rank: int, size: int, rendezvous: Path, pipe: Connection, arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("error")
    ARCH_SIZES["tiny"] = SHALLOW
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with ExitStack() as stack:
        try:
            if size > 1:
                dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
                stack.callback(dist.destroy_process_group)
            function(World(rank, size), partial(_tell, pipe), *arguments)
        except BaseException:
            pipe.send_bytes(pickle.dumps(("failed", traceback.format_exc())))
        pipe.close()
