"""`python -m benchmarks.train_step`: a pretraining step (forward, backward, AdamW) of ours and of Hugging Face's `ViTMAEForPreTraining`.

The peer runs in its own fastest straightforward loop: SDPA, fused AdamW, gradients set to None; on a GPU under bfloat16 autocast, and
compiled too. Both have the same sizes, masking ratio, images and batch. Each turn is a process of its own, pinned to as many cores as it
has threads; the sides take turns, and figures are medians over all turns' steps. Ours has the environment that its workers get from the
service (`mae_core.memory`); `peer_with_our_allocator` is the peer with it.

`of_matmul`: the step's model FLOPs per second, three times those of the forward pass of our model, as a part of the rate of large matrix
products in the same process. `peak_mib`: of the process, on a GPU of its allocator.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mae_core.mae import MaskedAutoencoder
from mae_core.memory import KEEPS_MEMORY
from mae_core.optim import pretrain_optimizer
from mae_core.options import DecoderConfig, MaskingConfig, ModelConfig, PretrainOptim, TargetConfig
from mae_core.recipes import recipe_fields
from mae_core.vit import Encoder, initialise
from mae_core.world import autocast

Step = Callable[[], Tensor]
_SIDES = ("ours", "peer", "peer_with_our_allocator")
_NUM_UNMEASURED = 2


def measure(
    *, arch: str, image_size: int, batch_size: int, threads: int, steps: int, turns: int, device: str, compiled: bool = False
) -> dict[str, Any]:
    """The line of one size; `steps` are measured in each of `turns` turns of a side."""
    sides = _SIDES if device == "cpu" else _SIDES[:2]
    told: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(turns):
        for side in sides if turn % 2 == 0 else sides[::-1]:
            told[side].append(_turn(side, arch, image_size, batch_size, threads, steps, device, compiled))
    ours, peer, *same_allocator = (_summary(told[side], batch_size) for side in sides)
    return {
        "name": "train_step",
        "unit": "images/s",
        "ours": ours["images_per_second"],
        "peer": peer["images_per_second"],
        "peer_name": "transformers ViTMAEForPreTraining, SDPA, fused AdamW" + (", compiled" if compiled else ""),
        "ratio": ours["images_per_second"] / peer["images_per_second"],
        "cpu_ratio": peer["cpu_seconds"] / ours["cpu_seconds"],
        "details": {"ours": ours, "peer": peer} | ({"peer_with_our_allocator": same_allocator[0]} if same_allocator else {}),
        "arch": arch,
        "image_size": image_size,
        "batch_size": batch_size,
        "threads": threads,
        "turns": turns,
        "steps_per_turn": steps,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def _turn(side: str, *arguments: str | int | bool) -> dict[str, Any]:
    environment = dict(os.environ) | (KEEPS_MEMORY if side != "peer" else {})
    command = [sys.executable, "-m", "benchmarks.train_step", "--turn", json.dumps([side, *arguments])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=1800)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _summary(turns: list[dict[str, Any]], batch_size: int) -> dict[str, Any]:
    wall, cpu = (statistics.median(seconds for turn in turns for seconds in turn[name]) for name in ("wall_seconds", "cpu_seconds"))
    return {
        "images_per_second": batch_size / wall,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "of_matmul": statistics.median(turn["flops"] / turn["matmul_flops_per_second"] for turn in turns) / wall,
        "peak_mib": max(turn["peak_mib"] for turn in turns),
    }


def take_turn(
    side: str, arch: str, image_size: int, batch_size: int, threads: int, steps: int, device: str, compiled: bool
) -> dict[str, Any]:
    """Seconds of each of `steps` steps, and what they cost."""
    torch.set_num_threads(threads)
    if device == "cpu" and threads < (os.cpu_count() or 1):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    model = ModelConfig(arch=arch, image_size=image_size)  # type: ignore[arg-type]
    fields = recipe_fields("paper" if model.width >= 768 else "small", kind="pretrain", size=None)
    masking, decoder = MaskingConfig(**fields["masking"]), DecoderConfig(**fields["decoder"])
    images_BCHW = torch.randn(batch_size, 3, *model.image_size, generator=torch.Generator().manual_seed(1)).to(device)
    make = our_step if side == "ours" else peer_step
    step = make(model, masking, decoder, images_BCHW, compiled)
    matmul = _matmul_rate(torch.device(device))
    losses = [step().detach() for _ in range(_NUM_UNMEASURED)]
    _wait(device)
    wall_seconds, cpu_seconds = [], []
    for _ in range(steps):
        wall, cpu = time.perf_counter(), time.process_time()
        losses.append(step().detach())
        _wait(device)
        wall_seconds.append(time.perf_counter() - wall)
        cpu_seconds.append(time.process_time() - cpu)
    assert all(loss.isfinite() for loss in losses)
    return {
        "wall_seconds": wall_seconds,
        "cpu_seconds": cpu_seconds,
        "flops": batch_size * step_flops(model, masking, decoder),
        "matmul_flops_per_second": matmul,
        "peak_mib": (torch.cuda.max_memory_allocated() >> 20)
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def our_step(model: ModelConfig, masking: MaskingConfig, decoder: DecoderConfig, images_BCHW: Tensor, compiled: bool) -> Step:
    mae = MaskedAutoencoder(Encoder(model), masking=masking, decoder=decoder, target=TargetConfig())
    initialise(mae, torch.Generator().manual_seed(0))
    mae.to(images_BCHW.device).train()
    optimizer = pretrain_optimizer(mae, PretrainOptim())
    if compiled:
        for block in [*mae.encoder.blocks, *mae.decoder_blocks]:
            block.compile()

    def step() -> Tensor:
        with autocast(images_BCHW.device):
            loss = mae(images_BCHW, torch.rand(len(images_BCHW), mae.num_numbers, device=images_BCHW.device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def peer_step(model: ModelConfig, masking: MaskingConfig, decoder: DecoderConfig, images_BCHW: Tensor, compiled: bool) -> Step:
    from tests.torchvision_ops import import_torchvision

    import_torchvision()
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=model.width,
        num_hidden_layers=model.depth,
        num_attention_heads=model.num_heads,
        intermediate_size=4 * model.width,
        image_size=model.image_size[0],
        patch_size=model.patch_size,
        decoder_hidden_size=decoder.width,
        decoder_num_hidden_layers=decoder.depth,
        decoder_num_attention_heads=decoder.num_heads,
        decoder_intermediate_size=4 * decoder.width,
        mask_ratio=masking.ratio,
        norm_pix_loss=True,
        layer_norm_eps=1e-6,
        attn_implementation="sdpa",
    )
    mae = ViTMAEForPreTraining(config).to(images_BCHW.device).train()
    optim = PretrainOptim()
    optimizer = torch.optim.AdamW(mae.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)
    forward = torch.compile(mae) if compiled else mae

    def step() -> Tensor:
        with autocast(images_BCHW.device):
            loss: Tensor = forward(images_BCHW).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def step_flops(model: ModelConfig, masking: MaskingConfig, decoder: DecoderConfig) -> float:
    """Of one image: the matrix products of a forward pass, and twice as many on the way back. What our model leaves out is not counted."""
    kept = masking.num_keep(model.num_patches)
    tokens, masked = model.num_patches + 1, model.num_patches - kept

    def blocks(num_tokens: int, width: int, depth: int) -> float:
        return depth * (24 * num_tokens * width**2 + 4 * num_tokens**2 * width)

    unread = (tokens - masked) * (20 * decoder.width**2 + 4 * tokens * decoder.width)  # of the last block
    linear = 2 * (
        kept * model.patch_dim * model.width + (kept + 1) * model.width * decoder.width + masked * decoder.width * model.patch_dim
    )
    return 3 * (blocks(kept + 1, model.width, model.depth) + blocks(tokens, decoder.width, decoder.depth) - unread + linear)


def _matmul_rate(device: torch.device) -> float:
    size, dtype = (2048, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    left, right, product = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(left, right, out=product)
        _wait(device.type)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[2:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--arch")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--turn", type=json.loads, help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    if turn := given.pop("turn"):
        print(json.dumps(take_turn(*turn)))
    elif given["arch"]:
        print(json.dumps(measure(**given)))
    else:
        for arch, image_size, batch_size in (("vit_base_patch16", 224, 32), ("vit_tiny_patch4", 32, 256)):
            print(json.dumps(measure(**given | {"arch": arch, "image_size": image_size, "batch_size": batch_size})), flush=True)


if __name__ == "__main__":
    main()
