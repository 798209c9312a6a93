"""Tells, once each, that object storage does not answer and that it does again."""

import logging
import threading
from typing import Any

from workers.contract import EventType
from workers.reporter import Reporter

logger = logging.getLogger(__name__)


class Delays:
    """What waits for object storage, by name. `reporter` is rank 0's; others only write to their log. Any thread may call."""

    def __init__(self, reporter: Reporter | None = None) -> None:
        self._reporter = reporter
        self._lock = threading.Lock()
        self._waiting: set[str] = set()

    def began(self, what: str, message: str, **data: Any) -> None:
        """`what` waits, because of `message`. Said again, it is told again only where it has `data` of its own."""
        logger.warning(message)
        with self._lock:
            is_first = not self._waiting
            self._waiting.add(what)
        if self._reporter is not None and (is_first or data):
            self._reporter.event(EventType.UPLOAD_DELAYED, message=message[:500], **data)

    def is_any(self) -> bool:
        """Whether anything waits now."""
        return bool(self._waiting)

    def ended(self, what: str, *, works: bool = True) -> None:
        """`what` waits no more: storage works again, or it was given up."""
        with self._lock:
            was_waiting = what in self._waiting
            self._waiting.discard(what)
            is_last = was_waiting and not self._waiting
        if self._reporter is not None and is_last and works:
            self._reporter.event(EventType.UPLOAD_RECOVERED)
