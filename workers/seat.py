"""Where a worker sits."""

from typing import NamedTuple

from mae_core.world import World


class Seat(NamedTuple):
    """A worker's place among all, its machine, and its place among those of its machine."""

    world: World
    machine: int
    local_rank: int
