"""How a module is spread over the workers: copied whole (DDP) or in shards (FSDP2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae_core.mae import CrossBlock
from mae_core.sharded import is_shard, is_sharded
from mae_core.vit import Block, Encoder
from mae_core.world import World, autocasts


def shard(module: nn.Module, world: World) -> None:
    """Shards the parameters of `module` over all workers, in place (FSDP2): each block by itself, then the encoder's rest, then what is
    left. To be called before the optimiser is made. One worker keeps all.

    Where the device has bfloat16, blocks are gathered in it: under autocast alone, every worker would keep a cast copy of all of them.
    """
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh  # half a second: only where it is used
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    dtype = torch.bfloat16 if autocasts(world.device) else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in module.modules():
        if isinstance(part, Block | CrossBlock):
            fully_shard(part, mesh=mesh, mp_policy=policy)
    encoder = cast(Encoder, module.encoder)
    fully_shard(encoder, mesh=mesh)
    register_fsdp_forward_method(encoder, "encode")
    fully_shard(module, mesh=mesh)


def replicate(module: nn.Module, world: World) -> nn.Module:
    """What a step calls in place of `module`: DDP around it, or the module itself where it is sharded or alone."""
    if world.size == 1 or is_sharded(module):
        return module
    return DistributedDataParallel(module)


@contextmanager
def synchronised(replica: nn.Module, is_last: bool) -> Iterator[None]:
    """Gradients are exchanged between the workers by the last micro-batch of a step alone."""
    if is_sharded(replica):
        replica.set_requires_gradient_sync(is_last)
        yield
    elif isinstance(replica, DistributedDataParallel) and not is_last:
        with replica.no_sync():
            yield
    else:
        yield


def grad_norm(module: nn.Module) -> Tensor:
    """The norm of all gradients of a step, a scalar on the device, the same on all workers."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if is_shard(norm) else norm


def load_whole(into: nn.Module, module: nn.Module) -> None:
    """Gives `into`, a module of plain tensors, the weights of `module`, which is sharded. To be called by all workers.

    One tensor at a time: what fits only in shards must not be whole on a device.
    """
    own = into.state_dict()
    for name, tensor in module.state_dict().items():
        own[name].copy_(tensor.full_tensor() if is_shard(tensor) else tensor)
