"""A worker's place among all, for torch: its device, and the process group."""

import os
from datetime import timedelta

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
        dist.init_process_group("nccl" if post.gpus else "gloo", timeout=_TIMEOUT)
    return World(post.rank, post.num_workers, device)
