"""Uploads that nobody completes are aborted: those that are old, below our jobs, page by page."""

from datetime import UTC, datetime, timedelta

import pytest

from service import unfinished
from service.storage import Upload
from service.unfinished import UnfinishedUploads
from tests.unit.fake_storage import FakeStorage

NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)
OLD, YOUNG = NOW - timedelta(days=1, seconds=1), NOW - timedelta(hours=20)


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> FakeStorage:
    monkeypatch.setattr("tests.unit.fake_storage.PAGE", 2)
    storage = FakeStorage()
    storage.uploads = {Upload(f"jobs/{number}/x", "1", YOUNG if number % 3 else OLD) for number in range(7)}
    storage.uploads.add(Upload("other/x", "1", OLD))
    return storage


def left(storage: FakeStorage) -> list[str]:
    return sorted(upload.key for upload in storage.uploads)


KEPT = ["jobs/1/x", "jobs/2/x", "jobs/4/x", "jobs/5/x", "other/x"]


def test_old_ones_go_by_pages_and_others_stay(storage: FakeStorage) -> None:
    clock = Clock()
    uploads = UnfinishedUploads(storage, clock=clock)
    seen = [len(storage.uploads)]
    for _ in range(4):
        uploads.sweep_when_due()
        seen.append(len(storage.uploads))
        clock.now += timedelta(seconds=unfinished.PAGE_SECONDS)
    assert seen == [8, 7, 6, 6, 5]
    assert left(storage) == KEPT
    storage.uploads.add(Upload("jobs/0/y", "1", OLD))
    uploads.sweep_when_due()
    assert "jobs/0/y" in left(storage), "the next sweep is an hour later"
    clock.now += timedelta(seconds=unfinished.SWEEP_SECONDS)
    uploads.sweep_when_due()
    assert "jobs/0/y" not in left(storage)


def test_storage_that_is_away_is_waited_for(storage: FakeStorage) -> None:
    clock = Clock()
    uploads = UnfinishedUploads(storage, clock=clock)
    uploads.sweep_when_due()
    storage.is_down = True
    clock.now += timedelta(seconds=unfinished.PAGE_SECONDS)
    uploads.sweep_when_due()
    storage.is_down = False
    for _ in range(4):
        clock.now += timedelta(seconds=unfinished.UNREACHABLE_SECONDS)
        uploads.sweep_when_due()
    assert left(storage) == sorted({*KEPT, *(upload.key for upload in storage.uploads if upload.begun_at == YOUNG)})
