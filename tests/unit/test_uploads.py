"""Training states while storage is away: made at their steps, kept on disk, brought there later, and gone on from meanwhile."""

import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_core.world import World
from tests.integration.runs import wait_for
from tests.unit.folder_store import FolderStore, away
from tests.unit.forked import Forked, in_workers
from tests.unit.saving import PREFIX, Saving, saving, work_on
from workers import local_states, uploads
from workers.contract import EventType
from workers.delays import Delays
from workers.local_states import LocalStates
from workers.train_loop import Follower


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(uploads, "_PAUSE_SECONDS", 0.01)


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Saving]:
    parts = saving(World(), tmp_path, FolderStore(tmp_path / "s3"))
    yield parts
    away(tmp_path / "s3").unlink(missing_ok=True)
    parts.uploads.close(60)


def save(parts: Saving, step: int) -> None:
    parts.saver.wait()
    assert parts.saver.is_ready(), "the storage's absence keeps nobody from saving"
    parts.saver.save(step, {"module.weight": torch.full((4,), float(step)), "step": torch.tensor(step)})
    parts.saver.wait()


def names(*steps: int) -> list[str]:
    return [f"step={step:010d}-a1-5" for step in steps]


def told_of(parts: Saving, kind: str) -> list[int]:
    return [data["step"] for told, data in parts.told.events if told == kind]


def test_while_storage_is_away_states_are_made_and_the_newest_two_kept(tmp_path: Path, parts: Saving) -> None:
    store = FolderStore(tmp_path / "s3")
    away(store.folder).touch()
    for step in (3, 6, 9, 12):
        save(parts, step)
        wait_for(lambda step=step: told_of(parts, "upload_delayed")[-1:] == [step], seconds=60, what="its delay is told")
    assert parts.uploads.states.whole() == names(12, 9)
    assert parts.uploads.states.folder(names(12)[0]).parent.parent.parent.stat().st_mode & 0o777 == 0o700
    assert not parts.uploads.wait(0)
    assert "stays on disk until it can be uploaded" in parts.told.events[-1][1]["message"]
    away(store.folder).unlink()
    assert parts.uploads.wait(60)
    assert store.training_states(PREFIX) == [f"{PREFIX}training_state/{names(12)[0]}/"]
    assert parts.uploads.states.whole() == [], "storage has the newest"
    assert parts.told.kinds()[-2:] == ["training_state_committed", "upload_recovered"]
    assert parts.told.kinds().count("upload_delayed") == 4
    save(parts, 15)
    parts.wait()
    assert told_of(parts, "training_state_committed") == [12, 15]


def test_with_little_room_one_state_is_kept(tmp_path: Path, parts: Saving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_states, "_FREE_SHARE", 1.0)
    away(tmp_path / "s3").touch()
    for step in (3, 6):
        save(parts, step)
        wait_for(lambda step=step: told_of(parts, "upload_delayed")[-1:] == [step], seconds=60, what="its delay is told")
    assert parts.uploads.states.whole() == names(6)


class SlowStore(FolderStore):
    """Uploads wait until the test lets them go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.begun, self.go_on = threading.Semaphore(0), threading.Semaphore(0)

    def upload(self, key: str, path: Path) -> None:
        self.begun.release()
        assert self.go_on.acquire(timeout=60)
        super().upload(key, path)


def test_a_state_that_is_being_uploaded_is_not_given_up_for_newer_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else slow storage would never get a whole one."""
    monkeypatch.setattr(uploads, "_SLOW_SECONDS", 0.0)
    store = SlowStore(tmp_path / "s3")
    parts = saving(World(), tmp_path, store)
    save(parts, 3)
    assert store.begun.acquire(timeout=60)
    for step in (6, 9, 12):
        save(parts, step)
    assert parts.uploads.states.whole() == names(12, 3)
    assert told_of(parts, "upload_delayed") == [6, 9, 12]
    for _ in range(2):
        store.go_on.release()
    assert parts.uploads.wait(60)
    assert told_of(parts, "training_state_committed") == [3, 12]
    assert "upload_recovered" in parts.told.kinds()


def save_while_one_is_ahead(world: World, tell: Callable[[Any], None], folder: Path) -> None:
    """Worker 1 hears of the second state only when worker 0 has long been given it."""
    uploads._PAUSE_SECONDS = 0.01
    work_on(folder / "machine")
    parts = saving(world, folder, FolderStore(folder / "s3"))
    add = parts.uploads.add
    kept: list[Any] = []
    parts.uploads.add = kept.append if world.rank == 1 else add  # type: ignore[method-assign]
    for step in (3, 6):
        parts.saver.save(step, {"module.weight": torch.ones(4), "module.bias": torch.zeros(3), "step": torch.tensor(step)})
        parts.saver.wait()
        world.gather(None)
    tell("saved")
    for each in kept:
        add(each)
    assert parts.uploads.wait(60)
    world.gather(None)
    parts.uploads.close(60)
    tell((parts.told.events, parts.uploads.broken))


def test_workers_of_which_one_is_behind_bring_the_same_states(tmp_path: Path) -> None:
    with Forked(save_while_one_is_ahead, 2, tmp_path, tmp_path) as workers:
        assert [workers.told(rank) for rank in (0, 1)] == ["saved", "saved"]
        (events, broken), (_, others_broken) = workers.told(0), workers.told(1)
    assert (broken, others_broken) == (None, None)
    assert [kind for kind, _ in events] == ["training_state_committed"] * len(events)
    assert events[-1][1]["step"] == 6
    assert FolderStore(tmp_path / "s3").training_states(PREFIX)[0] == f"{PREFIX}training_state/{names(6)[0]}/"


def lose_each_other(world: World, folder: Path) -> str | None:
    work_on(folder / "machine")
    parts = saving(world, folder, FolderStore(folder / "s3"), timeout_seconds=2)
    if world.rank == 0:
        parts.saver.wait()
        parts.uploads.close(60)  # the other does not come
    world.gather(None)
    return None if parts.uploads.broken is None else type(parts.uploads.broken).__name__


def test_workers_that_lose_each_other_in_a_round_know_it(tmp_path: Path) -> None:
    broken, _ = in_workers(lose_each_other, 2, tmp_path, tmp_path)
    assert broken is not None


def test_a_pause_waits_for_storage_and_a_cancel_ends_the_wait(tmp_path: Path, parts: Saving, monkeypatch: pytest.MonkeyPatch) -> None:
    follower: Any = object.__new__(Follower)
    follower.world, follower.saver, follower.state_uploads, follower._saved_step = World(), parts.saver, parts.uploads, None
    looks: list[bool] = []

    def gives_up() -> bool:
        looks.append(True)
        if follower.cancelled:
            return True
        away(tmp_path / "s3").unlink(missing_ok=True)
        return False

    class Paused:
        def training_state(self) -> dict[str, torch.Tensor]:
            return {"step": torch.tensor(0)}

    monkeypatch.setattr("workers.train_loop._LOOK_SECONDS", 0.1)
    follower.gives_up, follower.cancelled = gives_up, False
    away(tmp_path / "s3").touch()
    follower._save_last(3, Paused())
    assert told_of(parts, "training_state_committed") == [3]
    assert looks
    follower.cancelled = True
    away(tmp_path / "s3").touch()
    follower._save_last(4, Paused())
    assert parts.uploads.states.whole() == names(4)


def test_what_is_on_disk_is_whole_or_no_state(tmp_path: Path, parts: Saving) -> None:
    away(tmp_path / "s3").touch()
    for step in (3, 6):
        save(parts, step)
    states = LocalStates("job1", 0, born=6)
    (states.folder(names(6)[0]) / "manifest.json").write_text("{")
    assert states.whole() == names(3)
    [file] = states.files(names(3)[0]).values()
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    (tmp_path / "into").mkdir()
    with pytest.raises(local_states.EncoderError, match=r"state-00000\.safetensors is damaged"):
        states.fetch(names(3)[0], tmp_path / "into")
    file.unlink()
    assert states.whole() == []
    states.delete_left(but=[names(6)[0]])
    assert [place.stem for place in states.folder("x").parent.iterdir()] == names(6)
    states.delete_left(but=[])
    assert list(states.folder("x").parent.iterdir()) == [], "of an earlier start of the workers: nobody else will"


def test_a_delay_is_told_once_and_its_end_when_nothing_waits_any_more() -> None:
    class Told:
        def __init__(self) -> None:
            self.kinds: list[str] = []

        def event(self, kind: EventType, **data: Any) -> None:
            self.kinds.append(str(kind))

    told: Any = Told()
    delays = Delays(told)
    delays.ended("upload a")
    for what in ("upload a", "upload b", "upload a"):
        delays.began(what, "no answer")
    delays.ended("upload a")
    assert told.kinds == ["upload_delayed"]
    delays.ended("upload b", works=False)
    assert told.kinds == ["upload_delayed"], "it was given up: that does not say that storage answers"
    delays.began("upload c", "no answer")
    delays.ended("upload c")
    assert told.kinds == ["upload_delayed", "upload_delayed", "upload_recovered"]
