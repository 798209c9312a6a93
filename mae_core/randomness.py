"""Random numbers as pure functions of (seed, epoch, sample): the same whatever the rank, the batch, the loader or the machine.

A counter-based hash (the 64-bit finaliser of SplitMix64, Steele et al. 2014) is evaluated for a whole batch at once, on the
device, with integer operations alone, so CPU and GPU give the same bits. There is no state to save and nothing to replay.
"""

from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio, as a signed 64-bit number
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15
_WORD = 2**64


class Stream(IntEnum):
    """What a number is drawn for: streams are independent of each other."""

    ORDER = 1
    MASK = 2
    CROP = 3
    HEAD_ORDER = 4
    AUGMENT = 5
    ERASE = 6
    MIX = 7
    DROP_PATH = 8
    PREDICT = 9
    SHARD_ORDER = 10


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64; `>>` is arithmetic in torch, so the sign bits it brings in are cleared."""
    x = (x ^ ((x >> 30) & 0x3_FFFF_FFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1F_FFFF_FFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1_FFFF_FFFF)


def _mix_int(x: int) -> int:
    """The same finaliser on a Python integer, taken modulo 2**64."""
    x %= _WORD
    x = (x ^ (x >> 30)) * _MIX_1 % _WORD
    x = (x ^ (x >> 27)) * _MIX_2 % _WORD
    return x ^ (x >> 31)


def hash_bits(*, seed: int, epoch: int, stream: Stream, samples: Tensor, count: int) -> Tensor:
    """64 random bits for each sample and counter.

    Args:
        samples: int64 (B,), the samples' indices in the data set.
        count: numbers for each sample.

    Returns:
        int64 (B, count), on the device of `samples`.
    """
    base = 0
    for part in (seed, epoch, int(stream)):
        base = _mix_int(base * _GOLDEN + part + 1)
    base = base - _WORD if base >= _WORD // 2 else base
    rows = _mix(base + (samples.to(torch.int64) + 1) * _GOLDEN)
    counters = torch.arange(1, count + 1, dtype=torch.int64, device=samples.device) * _GOLDEN
    return _mix(rows[:, None] + counters)


def uniform(*, seed: int, epoch: int, stream: Stream, samples: Tensor, count: int) -> Tensor:
    """Uniform float32 in [0, 1), (B, count): the top 24 bits of the hash, all that a float32 holds."""
    bits = (hash_bits(seed=seed, epoch=epoch, stream=stream, samples=samples, count=count) >> 40) & 0xFF_FFFF
    return bits.to(torch.float32) * 2.0**-24


def permutation(num_samples: int, *, seed: int, epoch: int, stream: Stream = Stream.ORDER) -> Tensor:
    """The order of an epoch: int64 (num_samples,), each index once."""
    bits = hash_bits(seed=seed, epoch=epoch, stream=stream, samples=torch.arange(num_samples), count=1)[:, 0]
    return torch.argsort(bits, stable=True)
