"""Waiting for what a live service does, as benchmarks do."""

import time
from collections.abc import Callable


def wait(condition: Callable[[], bool], *, what: str, seconds: float = 180.0) -> None:
    """Until `condition` holds. Raises SystemExit where it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)
