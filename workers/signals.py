"""What the driver and a training say to each other inside a worker's process, where one thread trains and another answers the driver."""

import statistics
import sys
import threading
import time
import traceback
from collections import deque
from typing import NamedTuple

MAX_STACKS = 20_000  # characters of one worker's
_MEDIANS = 100.0
_LONGEST = 3.0
_GAPS = 256


class Sign(NamedTuple):
    """How a training goes: its newest step, the seconds since, and between those before: the median and the longest.

    A round of an evaluation counts as a step here: that, too, is where a training shows that it goes on.
    """

    step: int
    seconds: float
    median_seconds: float
    longest_seconds: float
    can_regroup: bool  # whether it would go on where it is, were it stopped and started again

    def hangs(self, floor_seconds: float) -> bool:
        """Whether the next step is late beyond what was ever seen of this training, and by `floor_seconds` at least."""
        return self.seconds > max(floor_seconds, _MEDIANS * self.median_seconds, _LONGEST * self.longest_seconds)


class Signals:
    """`regroups`: the driver wants the training to save its state and stop, as it goes on with another number of workers.

    `can_regroup`: see `Sign`. Both threads only set and read whole values.
    """

    def __init__(self) -> None:
        self.regroups = False
        self.can_regroup = False
        self._newest: tuple[int, float] | None = None
        self._gaps: deque[float] = deque(maxlen=_GAPS)
        self._longest = 0.0

    def stepped(self, step: int) -> None:
        """A step was taken, and another one follows."""
        now = time.monotonic()
        if self._newest is not None:
            gap = now - self._newest[1]
            self._longest = max(self._longest, gap)
            self._gaps.append(gap)
        self._newest = step, now

    def rested(self) -> None:
        """No step follows for now: it was the last one, or the training is going back to an earlier state."""
        self._newest = None

    def sign(self) -> Sign | None:
        """How the training goes; None while no step is due."""
        newest = self._newest
        if newest is None:
            return None
        gaps = list(self._gaps)
        return Sign(newest[0], time.monotonic() - newest[1], statistics.median(gaps) if gaps else 0.0, self._longest, self.can_regroup)


def stacks() -> str:
    """Where each thread of this process is now, the one that trains first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    told = {
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    }
    return "\n".join(sorted(told, key=lambda text: ("train_worker" not in text, text)))[:MAX_STACKS]
