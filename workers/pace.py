"""How fast a run goes, and what is left of it."""

import time

from mae_core.loop import Progress
from workers.contract import RunProgress


class Pace:
    """Speed and time left, smoothed over the recent steps."""

    def __init__(self) -> None:
        self._images_per_second: float | None = None
        self._loss: float | None = None
        self._seconds_per_step: float | None = None
        self._last: tuple[int, float] | None = None

    def progress(self, progress: Progress) -> RunProgress:
        now = time.monotonic()
        if self._last is not None and progress.step > self._last[0]:
            seconds = (now - self._last[1]) / (progress.step - self._last[0])
            self._seconds_per_step = seconds if self._seconds_per_step is None else 0.9 * self._seconds_per_step + 0.1 * seconds
        self._last = (progress.step, now)
        if progress.points:
            values = progress.points[-1][1]
            self._images_per_second = values.get("images_per_second", self._images_per_second)
            self._loss = values.get("loss", self._loss)
        left = progress.num_steps - progress.step
        return RunProgress(
            step=progress.step,
            num_steps=progress.num_steps,
            epoch=progress.epoch,
            images_per_second=self._images_per_second,
            eta_seconds=None if self._seconds_per_step is None else self._seconds_per_step * left,
            loss=self._loss,
        )
