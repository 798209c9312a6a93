"""Sends what is due to webhooks: a thread of the dispatcher's process. Any number may run: each delivery is one's alone, by its lease.

Whoever dies between sending and recording has sent a message that another sends again, under the same id.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import datetime, timedelta

from service import deliveries, webhooks
from service.counters import Count, Tally
from service.db import Database, utc_now
from service.deliveries import DeliveryStatus, Letter
from service.outbound import Answer, post
from service.settings import Settings

log = logging.getLogger(__name__)

NUM_AT_ONCE = 16
POLL_SECONDS = 1.0
TIDY_SECONDS = 60.0
ERROR_SECONDS = 30.0
_COUNTS = {
    DeliveryStatus.DELIVERED: Count.WEBHOOKS_DELIVERED,
    DeliveryStatus.PENDING: Count.WEBHOOKS_FAILED,
    DeliveryStatus.DEAD: Count.WEBHOOKS_DEAD,
}


class Sender:
    """Claims, sends outside any transaction, and records."""

    def __init__(self, database: Database, settings: Settings, *, tally: Tally, clock: Callable[[], datetime] = utc_now) -> None:
        self._database = database
        self._secret_keys = settings.secret_keys
        self._allow_private = settings.webhooks_to_private_addresses
        self._tally = tally
        self._clock = clock
        self._pool = ThreadPoolExecutor(NUM_AT_ONCE, thread_name_prefix="webhook")
        self._under_way: dict[Future[None], str] = {}  # by webhook
        self._tidy_at = clock()
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Claim no more. What is being sent is waited for, a few seconds at most."""
        self._stopping.set()

    def run(self) -> None:
        """Until `stop()`. The database's absence is waited out."""
        pause = POLL_SECONDS
        while not self._stopping.is_set():
            try:
                self.tick()
                self._tidy_when_due()
                pause = POLL_SECONDS
            except Exception:
                pause = min(pause * 2, ERROR_SECONDS)
                log.exception("webhooks: a round failed; the next one comes in %.1f s", pause)
            self._stopping.wait(pause)
        self.drain()
        self._pool.shutdown()

    def tick(self) -> int:
        """Begin to send what is due, as far as there is room; answers how many there were."""
        self._under_way = {future: webhook for future, webhook in self._under_way.items() if not future.done()}
        room, now = NUM_AT_ONCE - len(self._under_way), self._clock()
        with self._database.read() as session:
            if not room or not deliveries.is_any_due(session, now):
                return 0
        with self._database.write() as session:
            letters = deliveries.claim(session, now=now, limit=room, under_way=Counter(self._under_way.values()))
        for letter in letters:
            self._under_way[self._pool.submit(self._deliver, letter)] = letter.webhook_id
        return len(letters)

    def drain(self) -> None:
        """Wait for what is being sent."""
        wait(self._under_way)

    def _deliver(self, letter: Letter) -> None:
        try:
            self._record(letter, self._send(letter))
        except Exception:  # its lease runs out, and it is sent again
            log.exception("webhook %s: what became of the delivery %s could not be recorded", letter.webhook_id, letter.id)

    def _send(self, letter: Letter) -> Answer:
        secrets = [webhooks.secret_of(key, letter.webhook_id) for key in self._secret_keys]
        signed = webhooks.sign(secrets, letter.id, int(self._clock().timestamp()), letter.body)
        headers = {"Content-Type": "application/json", "User-Agent": "MAEstro", **signed}
        return post(letter.url, letter.body, headers, allow_private=self._allow_private)

    def _record(self, letter: Letter, answer: Answer) -> None:
        with self._database.write() as session:
            status = deliveries.record(session, letter, answer, now=self._clock())
        if status is not None:
            self._tally.add(_COUNTS[status])
        if not answer.is_taken:
            log.info("webhook %s: the delivery %s failed (%r): %s", letter.webhook_id, letter.id, answer.detail, status)

    def _tidy_when_due(self) -> None:
        now = self._clock()
        if now < self._tidy_at:
            return
        self._tidy_at = now + timedelta(seconds=TIDY_SECONDS)
        with self._database.write() as session:
            deliveries.tidy(session, now=now)
