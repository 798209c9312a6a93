"""Scratch folders: what killed workers left goes, what belongs to running ones stays."""

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from workers.scratch import FORGET_SECONDS, forget_untouched, scratch_folder


@pytest.fixture(autouse=True)
def of_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"maestro-{os.getuid()}"


def left_by_a_dead_worker(of_user: Path, name: str) -> Path:
    folder = of_user / name
    (folder / "saving").mkdir(parents=True)
    (folder / "saving" / "state.safetensors").write_bytes(b"gigabytes")
    return folder


def test_a_workers_folder_is_its_own_and_goes_with_it(of_user: Path) -> None:
    with scratch_folder("job1", 1, 0) as one, scratch_folder("job1", 1, 1) as other:
        assert one.is_dir(), "a second worker of the job does not take it"
        assert other.is_dir()
        assert one.name.startswith("job1-a1-rank0-")
        assert {oct(folder.stat().st_mode & 0o777) for folder in (of_user, one, other)} == {"0o700"}
    assert list(of_user.iterdir()) == []


def test_what_a_killed_worker_left_goes_when_its_job_starts_again(of_user: Path) -> None:
    earlier, of_another_job = (left_by_a_dead_worker(of_user, name) for name in ("job1-a1-rank3-x", "job12-a1-rank0-x"))
    with scratch_folder("job1", 2, 0) as mine:
        assert sorted(of_user.iterdir()) == sorted([mine, of_another_job])
    assert not earlier.exists()


def test_it_goes_after_a_failure_too(of_user: Path) -> None:
    with suppress(ValueError), scratch_folder("job1", 1, 0):
        raise ValueError
    assert list(of_user.iterdir()) == []


def test_what_nobody_has_touched_for_a_week_goes(of_user: Path) -> None:
    states = of_user / "states"
    for name, days in (("old", 8), ("new", 6)):
        left_by_a_dead_worker(states, name)
        os.utime(states / name, times=(0, time.time() - days * 86400))
    forget_untouched(states)
    assert [path.name for path in states.iterdir()] == ["new"]
    forget_untouched(of_user / "nothing", seconds=FORGET_SECONDS)
