"""A worker's place among all, for torch: its device, and the process group."""

import os
import socket
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from mae_core.world import World
from workers.group import Post

_TIMEOUT = timedelta(minutes=30)  # of a collective


def join(post: Post) -> World:
    """Chooses the device and meets the other workers, if any. To be called by all of them, once, before anything asks for a GPU."""
    os.environ |= {
        "RANK": str(post.rank),
        "WORLD_SIZE": str(post.num_workers),
        "LOCAL_RANK": str(post.local_rank),
        "MASTER_ADDR": post.address,
        "MASTER_PORT": str(post.port),
    }
    device = torch.device("cpu")
    if post.gpus:
        # Of all workers of the machine: so NCCL copies from GPU to GPU. Ray shows each its own alone.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(post.gpus)
        device = torch.device("cuda", post.local_rank)
        torch.cuda.set_device(device)
    if post.num_workers > 1:
        _meet(post)
    return World(post.rank, post.num_workers, device)


def _meet(post: Post) -> None:
    """The process group. torch's own store would listen on all interfaces, and gloo wherever the machine's name leads."""
    if (interface := _interface_towards(post.address, post.port)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    is_first = post.rank == 0
    store = dist.TCPStore(  # type: ignore[attr-defined]
        post.address, post.port, post.num_workers, is_master=is_first, timeout=_TIMEOUT, master_listen_fd=post.listener
    )
    backend = "nccl" if post.gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=post.rank, world_size=post.num_workers, timeout=_TIMEOUT)


def _interface_towards(address: str, port: int) -> str | None:
    """The network interface by which this machine reaches an address. Nothing is sent."""
    [(family, kind, _, _, target), *_] = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        own = probe.getsockname()[0]
    return next((name for name, found in psutil.net_if_addrs().items() if any(entry.address == own for entry in found)), None)
