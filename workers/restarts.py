"""How often and how soon the workers of an attempt are started again."""

from mae_core.options import RetryConfig

_FIRST_PAUSE_SECONDS = 2.0
_LONGEST_PAUSE_SECONDS = 60.0


class Restarts:
    """Counts an attempt's failures. Once the workers have trained for `retry.forgive_after_hours` without another, they are forgotten."""

    def __init__(self, retry: RetryConfig) -> None:
        self._retry = retry
        self.number = 0

    def pause_after(self, trained_seconds: float) -> float | None:
        """Seconds until the workers start again after a failure that came when they had trained for so long: 0 at first, then more.

        None: it was one failure too many.
        """
        if trained_seconds >= self._retry.forgive_after_hours * 3600:
            self.number = 0
        if self.number == self._retry.max_failures:
            return None
        self.number += 1
        return 0.0 if self.number == 1 else min(_FIRST_PAUSE_SECONDS * 2.0 ** (self.number - 2), _LONGEST_PAUSE_SECONDS)
