"""Uploads in parts that nobody will complete: whoever began them has died. No list of objects has them, and they are kept for ever."""

import logging
from collections.abc import Callable
from datetime import datetime, timedelta

from service.artifacts import JOBS_PREFIX
from service.errors import StorageUnreachable
from service.storage import START, ObjectNotFound, Storage

log = logging.getLogger(__name__)

SWEEP_SECONDS = 3600.0
PAGE_SECONDS = 1.0  # between two pages of one sweep
UNREACHABLE_SECONDS = 300.0
GIVEN_UP_AFTER = timedelta(days=1)  # no upload takes so long


class UnfinishedUploads:
    """Aborts those below our jobs, a page at a time. Any number may be at it."""

    def __init__(self, storage: Storage, *, clock: Callable[[], datetime]) -> None:
        self._storage = storage
        self._clock = clock
        self._due_at = clock()
        self._place = START

    def sweep_when_due(self) -> None:
        now = self._clock()
        if now < self._due_at:
            return
        try:
            page = self._storage.list_uploads(JOBS_PREFIX, after=self._place)
            old = [upload for upload in page.uploads if now - upload.begun_at > GIVEN_UP_AFTER]
            for upload in old:
                self._storage.abort_upload(upload)
                log.info("the upload of %s, begun at %s, was never completed and is aborted", upload.key, upload.begun_at)
        except (StorageUnreachable, ObjectNotFound) as error:
            self._due_at, self._place = now + timedelta(seconds=UNREACHABLE_SECONDS), START
            log.info("unfinished uploads stay for now: %s", error)
            return
        self._due_at = now + timedelta(seconds=SWEEP_SECONDS if page.next is None else PAGE_SECONDS)
        self._place = page.next or START
