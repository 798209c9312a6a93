"""Which training state a start of the workers takes up, of those in storage and on disk."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mae_core.world import World
from tests.unit.core_fixtures import image_folder
from tests.unit.folder_store import FolderStore, away
from tests.unit.forked import in_workers
from tests.unit.saving import PREFIX, order, stored_steps, work_on
from workers import train_loop
from workers.failures import StorageError
from workers.seat import Seat
from workers.signals import Signals
from workers.train_loop import Follower


def take_up(world: World, folder: Path) -> tuple[str, str | None]:
    """What a start of the workers makes of the states that there are."""
    train_loop.ObjectStore = lambda *_: FolderStore(folder / "s3")  # type: ignore[assignment, misc]
    work_on(folder / "machine")
    with ExitStack() as stack:
        try:
            follower = Follower(order(folder / "images", num_workers=world.size), Seat(world, 0, world.rank), stack, Signals())
            run, taken_up = follower.open_run()
            if not away(folder / "s3").exists():
                assert follower.state_uploads.wait(60)
                world.gather(None)
        except StorageError as error:
            return str(error), None
        return str(int(run.training_state()["step"])), taken_up


def save_one(world: World, folder: Path, step: int) -> None:
    train_loop.ObjectStore = lambda *_: FolderStore(folder / "s3")  # type: ignore[assignment, misc]
    work_on(folder / "machine")
    with ExitStack() as stack:
        follower = Follower(order(folder / "images", num_workers=world.size), Seat(world, 0, world.rank), stack, Signals())
        run, _ = follower.open_run()
        follower.saver.save(step, run.training_state() | {"step": torch.tensor(step)})
        follower.saver.wait()
        if not away(folder / "s3").exists():
            assert follower.state_uploads.wait(60)
        world.gather(None)


def test_a_run_never_starts_over_because_storage_is_away(tmp_path: Path) -> None:
    """Storage may have a state, where those on disk are damaged."""
    image_folder(tmp_path / "images")
    in_workers(save_one, 2, tmp_path, tmp_path, 3)
    assert [step for step, _ in in_workers(take_up, 2, tmp_path, tmp_path)] == ["3", "3"]
    away(tmp_path / "s3").touch()
    assert "it is away" in in_workers(take_up, 1, tmp_path, tmp_path)[0][0], "no state on disk"
    away(tmp_path / "s3").unlink()
    in_workers(hide, 2, tmp_path, tmp_path)
    away(tmp_path / "s3").touch()
    assert [step for step, _ in in_workers(take_up, 2, tmp_path, tmp_path)] == ["6", "6"]
    for file in (tmp_path / "machine").rglob("state-00001.safetensors"):
        file.write_bytes(b"damaged")
    assert "it is away" in in_workers(take_up, 1, tmp_path, tmp_path)[0][0]
    away(tmp_path / "s3").unlink()
    assert [step for step, _ in in_workers(take_up, 2, tmp_path, tmp_path)] == ["3", "3"]


def test_what_a_killed_start_left_on_disk_is_uploaded_by_the_next(tmp_path: Path) -> None:
    image_folder(tmp_path / "images")
    in_workers(save_one, 2, tmp_path, tmp_path, 3)
    in_workers(hide, 2, tmp_path, tmp_path)
    away(tmp_path / "s3").unlink()
    assert [step for step, _ in in_workers(take_up, 2, tmp_path, tmp_path)] == ["6", "6"]
    assert stored_steps(tmp_path, PREFIX) == [0, 6, 3]
    assert list((tmp_path / "machine").rglob("*.safetensors")) == []


def hide(world: World, folder: Path) -> None:
    """Saves the state of step 6 while storage is away; it goes away only behind the look for older ones."""
    open_run = Follower.open_run

    def away_then(follower: Follower) -> Any:
        opened = open_run(follower)
        world.gather(None)
        away(folder / "s3").touch()
        return opened

    Follower.open_run = away_then  # type: ignore[method-assign]
    save_one(world, folder, 6)


def take_up_on_machines(world: World, folder: Path) -> str | None:
    """Two workers on two machines, each of which has its own file of the state alone."""
    train_loop.ObjectStore = lambda *_: FolderStore(folder / "s3")  # type: ignore[assignment, misc]
    work_on(folder / f"machine-{world.rank}")
    starts = []
    for _ in range(2):
        with ExitStack() as stack:
            follower = Follower(order(folder / "images", num_workers=world.size), Seat(world, world.rank, 0), stack, Signals())
            run, taken_up = follower.open_run()
            starts.append(taken_up)
            for step in (3, 6):
                follower.saver.save(step, run.training_state() | {"step": torch.tensor(step)})
                follower.saver.wait()
                if step == 3:
                    assert follower.state_uploads.wait(60)
                world.gather(None)
                away(folder / "s3").touch()
                world.gather(None)
            follower.state_uploads.close(60)
            assert follower.states.whole() == []
        world.gather(None)
        away(folder / "s3").unlink(missing_ok=True)
        world.gather(None)
    return starts[1]


def test_a_state_of_which_each_machine_has_a_part_is_none(tmp_path: Path) -> None:
    """It is passed over for the newest that storage has."""
    image_folder(tmp_path / "images")
    first, second = in_workers(take_up_on_machines, 2, tmp_path, tmp_path)
    assert first == second
    assert first is not None
    assert "step=0000000003-" in first
