"""What dispatchers count, kept in the database: one scrape of the API has all, without a port of each dispatcher's."""

import threading
from collections import Counter
from enum import StrEnum

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.db import Database
from service.models import CounterRow


class Count(StrEnum):
    """Each has its row, made by a migration."""

    CLAIMS = "claims"
    LEASES_LOST = "leases_lost"
    ORPHANS_STOPPED = "orphans_stopped"
    WEBHOOKS_DELIVERED = "webhooks_delivered"
    WEBHOOKS_FAILED = "webhooks_failed"
    WEBHOOKS_DEAD = "webhooks_dead"
    BYTES_FREED = "bytes_freed"


MEANINGS: dict[Count, str] = {
    Count.CLAIMS: "Jobs that a dispatcher took up to look at",
    Count.LEASES_LOST: "Looks that were discarded, as another dispatcher had taken the job",
    Count.ORPHANS_STOPPED: "Ray jobs that were stopped, as nobody wanted them",
    Count.WEBHOOKS_DELIVERED: "Deliveries that a receiver has taken",
    Count.WEBHOOKS_FAILED: "Tries that failed and come again",
    Count.WEBHOOKS_DEAD: "Deliveries that were given up",
    Count.BYTES_FREED: "Bytes of deleted jobs and training states taken away from object storage",
}


class Tally:
    """Counts of one process since they were last stored. What it has not stored when it is killed is not counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[Count] = Counter()

    def add(self, count: Count, number: int = 1) -> None:
        with self._lock:
            self._counts[count] += number

    def store(self, database: Database) -> None:
        """In one transaction. Where that fails, they are kept."""
        with self._lock:
            counts, self._counts = +self._counts, Counter()
        try:
            if counts:
                with database.write() as session:
                    for name in sorted(counts):  # in one order: two who store wait for each other, and not in a circle
                        session.execute(update(CounterRow).where(CounterRow.name == name).values(value=CounterRow.value + counts[name]))
        except BaseException:
            with self._lock:
                self._counts += counts
            raise


def read(session: Session) -> dict[str, int]:
    return {row.name: row.value for row in session.scalars(select(CounterRow))}
