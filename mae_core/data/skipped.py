"""Images that cannot be read, as the threads that read them tell the training loop."""

import threading
from collections.abc import Mapping

from mae_core.data.names import printable


class SkippedImages:
    """Unreadable images, each once, with the reason, and whether the run can go on. Threads add; the training loop takes what is new.

    `known`: those that an earlier part of the run has told of already.
    """

    def __init__(self, known: Mapping[str, str] | None = None) -> None:
        self._lock = threading.Lock()
        self._known = dict(known or {})
        self._new: list[str] = []
        self._fatal: str | None = None

    def add(self, key: str, why: str) -> None:
        key, why = printable(key), printable(why)
        with self._lock:
            if key not in self._known:
                self._known[key] = why
                self._new.append(key)

    def give_up(self, message: str) -> None:
        """The run cannot go on. Said here and not raised: an error in one worker alone would leave the others waiting for it."""
        with self._lock:
            self._fatal = self._fatal or message

    @property
    def fatal(self) -> str | None:
        """Why this worker's data cannot be used. Whoever exchanges it with the other workers raises DataError on all of them."""
        return self._fatal

    @property
    def num_new(self) -> int:
        return len(self._new)

    def take_new(self) -> dict[str, str]:
        with self._lock:
            new, self._new = self._new, []
            return {key: self._known[key] for key in new}

    def known(self) -> dict[str, str]:
        """All of them, new or not."""
        with self._lock:
            return dict(self._known)
