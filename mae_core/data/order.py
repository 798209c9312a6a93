"""The order of an epoch's samples, as a pure function of (seed, epoch): no worker, loader or earlier step has a say in it.

Shapes: B samples, S shards.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mae_core.randomness import Stream, hash_bits, permutation

WINDOW_SHARDS = 16  # that are mixed with each other
_BLOCK_SAMPLES = 1024


class Order(Protocol):
    """Each member once in an epoch."""

    def samples(self, epoch: int, first: int, last: int) -> Tensor:
        """The samples at the positions `first` to `last` - 1 of an epoch, int64 (B,). Their order among each other may depend on both."""
        ...

    def block(self, epoch: int, position: int) -> int:
        """Which stretch of the run a position lies in, counted over all epochs: what is read from there is read ahead as one."""
        ...


class FullOrder:
    """All members, mixed with each other. It costs memory and time in proportion to their number."""

    def __init__(self, members: Sequence[int], *, seed: int) -> None:
        self._members, self._seed = members, seed

    def samples(self, epoch: int, first: int, last: int) -> Tensor:
        order = _permutation(len(self._members), self._seed, epoch)
        return torch.tensor([self._members[position] for position in order[first:last].tolist()])

    def block(self, epoch: int, position: int) -> int:
        return (epoch * len(self._members) + position) // _BLOCK_SAMPLES


class WindowedOrder:
    """Shards in a random order, and the samples of each `window` of them mixed with each other: near O(S) in memory, O(window) in time.

    Those that are asked for at once come shard by shard: workers, who take consecutive parts of a batch, then read few shards each.

    Args:
        starts: int64 (S + 1,), rising: shard s has the samples from starts[s] to starts[s + 1] - 1.
        members: the samples that belong to the order.
    """

    def __init__(self, starts: NDArray[np.int64], members: range, *, seed: int, window: int = WINDOW_SHARDS) -> None:
        edges = starts.clip(members.start, members.stop)
        used = np.flatnonzero(np.diff(edges))
        self._first, self._count = edges[used], np.diff(edges)[used]
        self._seed = seed
        num_windows = -(-len(used) // window)
        self._cuts = np.linspace(0, len(used), num_windows + 1).round().astype(np.int64)  # of nearly as many shards each
        self.num_windows = num_windows
        self._ends = lru_cache(maxsize=2)(self._epoch)
        self._window = lru_cache(maxsize=4)(self._mixed)

    def samples(self, epoch: int, first: int, last: int) -> Tensor:
        _, ends = self._ends(epoch)
        found = [torch.empty(0, dtype=torch.int64)]
        place = int(np.searchsorted(ends, first, side="right"))
        while first < last:
            begin = int(ends[place - 1]) if place else 0
            stop = min(last, int(ends[place]))
            samples, shards = self._window(epoch, place)
            chosen = slice(first - begin, stop - begin)
            found.append(samples[chosen][shards[chosen].argsort(stable=True)])
            first, place = stop, place + 1
        return torch.cat(found)

    def block(self, epoch: int, position: int) -> int:
        _, ends = self._ends(epoch)
        return epoch * self.num_windows + int(np.searchsorted(ends, position, side="right"))

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards in order, and the position behind the last sample of each window."""
        order = permutation(len(self._count), seed=self._seed, epoch=epoch, stream=Stream.SHARD_ORDER).numpy()
        behind = np.concatenate([[0], np.cumsum(self._count[order])])
        return order, behind[self._cuts[1:]]

    def _mixed(self, epoch: int, place: int) -> tuple[Tensor, Tensor]:
        """The samples of a window, in order, and for each which of the window's shards it is of."""
        chosen = self._ends(epoch)[0][self._cuts[place] : self._cuts[place + 1]]
        samples = torch.cat(
            [torch.arange(first, first + count) for first, count in zip(self._first[chosen], self._count[chosen], strict=True)]
        )
        shards = torch.from_numpy(np.repeat(np.arange(len(chosen)), self._count[chosen]))
        bits = hash_bits(seed=self._seed, epoch=epoch, stream=Stream.ORDER, samples=samples, count=1)[:, 0]
        mixed = torch.argsort(bits, stable=True)
        return samples[mixed], shards[mixed]


@lru_cache(maxsize=2)
def _permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    return permutation(num_samples, seed=seed, epoch=epoch)
