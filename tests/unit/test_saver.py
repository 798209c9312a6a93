"""What becomes of saves that fail on one worker, and of a training that diverges: all workers do the same, and none is left waiting."""

import threading
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_core.checkpoint import SavesBeside, State, gather, read_state, saving_group
from mae_core.errors import DivergedError
from mae_core.loop import Progress, Training
from mae_core.run import Run
from mae_core.world import World
from tests.unit.core_fixtures import image_folder, pretrain_spec
from tests.unit.folder_store import FolderStore
from tests.unit.forked import Forked, in_workers
from workers import train_loop
from workers.contract import EventType, FileEntry, StorageRef, WorkOrder
from workers.saver import Saver
from workers.train_loop import Follower, Seat

PREFIX = "jobs/job1/"


def order(images: Path, *, num_workers: int, **changes: Any) -> WorkOrder:
    return WorkOrder(
        job="job1",
        attempt=1,
        spec=pretrain_spec(images, resources={"num_workers": num_workers}, **changes),
        token="t",
        service_url="http://127.0.0.1:1",
        storage=StorageRef(endpoint="http://127.0.0.1:1", bucket="none"),
        prefix=PREFIX,
    )


class Told:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: EventType, **data: Any) -> None:
        self.events.append((str(kind), data))


class RefusingStore(FolderStore):
    """Storage that refuses one worker's first upload."""

    refuses = False

    def put_file(self, key: str, path: Path) -> FileEntry:
        if self.refuses:
            self.refuses = False
            raise PermissionError("no entry")
        return super().put_file(key, path)


def save_twice(world: World, folder: Path) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    store, told = RefusingStore(folder), Told()
    store.refuses = world.rank == 1
    group = saving_group(world, timeout=timedelta(seconds=60))
    saver = Saver(order(folder, num_workers=2), store, world, group, incarnation=5, reporter=told if world.rank == 0 else None)  # type: ignore[arg-type]
    for step in (3, 6):
        saver.save(step, {"module.weight": torch.full((4,), float(step)), "module.bias": torch.zeros(3), "step": torch.tensor(step)})
        saver.wait()
        world.gather(None)
    return told.events, store.training_states(PREFIX)


def test_where_one_worker_cannot_upload_none_commits_and_the_next_save_succeeds(tmp_path: Path) -> None:
    (events, states), (_, others) = in_workers(save_twice, 2, tmp_path, tmp_path)
    assert states == others == [f"{PREFIX}training_state/step=0000000006-a1-5/"]
    (failed, failure), (committed, state) = events
    assert (failed, failure["step"]) == ("save_failed", 3)
    assert "worker 1: PermissionError: no entry" in failure["message"]
    assert (committed, state["step"], state["key"]) == ("training_state_committed", 6, states[0])
    into = {"module.weight": torch.zeros(4), "module.bias": torch.ones(3), "step": torch.tensor(0)}
    FolderStore(tmp_path).fetch_training_state(states[0], tmp_path)
    read_state(into, tmp_path, None)
    assert into["module.weight"].tolist() == [6.0] * 4


def save_where_one_hangs(world: World, tell: Any, folder: Path) -> None:
    group = saving_group(world, timeout=timedelta(seconds=2))
    saver = Saver(order(folder, num_workers=2), FolderStore(folder), world, group, incarnation=5, reporter=(told := Told()))  # type: ignore[arg-type]
    for step in (1, 2):
        if world.rank == 0:
            saver.save(step, {"step": torch.tensor(step)})
            saver.wait()
            assert saver.is_ready()
    total = world.sum(torch.ones(1)).item()  # the training goes on
    tell(([kind for kind, _ in told.events], total))


def test_a_worker_that_hangs_in_a_save_does_not_hang_the_others_for_ever(tmp_path: Path) -> None:
    with Forked(save_where_one_hangs, 2, tmp_path, tmp_path) as workers:
        assert workers.told(0) == (["save_failed", "save_failed"], 2.0)
        assert workers.told(1) == ([], 2.0)


def test_a_save_is_not_ready_until_the_last_one_is_written() -> None:
    go_on, written = threading.Event(), list[tuple[int, float]]()

    def write(step: int, staged: State) -> None:
        assert go_on.wait(60)
        written.append((step, staged["weight"].item()))

    saves, weight = SavesBeside(World(), write), torch.tensor(1.0)
    assert saves.is_ready()
    saves.save(4, {"weight": weight})
    weight.fill_(2.0)
    assert not saves.is_ready()
    go_on.set()
    saves.wait()
    assert saves.is_ready()
    assert written == [(4, 1.0)]


def test_what_is_gathered_alone_is_ones_own() -> None:
    assert gather("mine", None) == ["mine"]


class Recording(Follower):
    """A worker that keeps what happens to it."""

    def __init__(self, order: WorkOrder, world: World, stack: ExitStack) -> None:
        super().__init__(order, Seat(world, 0, world.rank), stack)
        self.seen: list[Any] = []

    def started(self, taken_up: str | None) -> None:
        self.seen.append(("started", taken_up))

    def tell(self, progress: Progress) -> None:
        self.seen.append(progress.step)
        if progress.step == 3:
            self.saver.wait()  # the state of step 2 is committed before anything else happens

    def went_back(self, why: DivergedError, taken_up: str | None) -> None:
        self.seen.append(("went back", str(why).split(" of rank")[0], taken_up and taken_up.split("/")[-2].split("-")[0]))

    def ended(self, run: Run) -> None:
        self.seen.append("ended")


def train_where_worker_1_diverges(world: World, folder: Path, times: int) -> list[Any]:
    """The loss of worker 1 is not a number in steps 5 and 6, so many times."""
    train_loop.ObjectStore = lambda *_: FolderStore(folder / "s3")  # type: ignore[assignment, misc]
    take_gradients, left = Training._take_gradients, {5: times, 6: times}

    def diverging(training: Training, batches: Any) -> torch.Tensor:
        step = training.step + 1
        if world.rank == 1 and left.get(step, 0) > 0:
            left[step] -= 1
            loss_of = training._loss
            training._loss = lambda replica, micro: loss_of(replica, micro) * float("nan")
            try:
                return take_gradients(training, batches)
            finally:
                training._loss = loss_of
        return take_gradients(training, batches)

    Training._take_gradients = diverging  # type: ignore[method-assign]
    spec = {"optim": {"max_dropped_steps": 1, "base_lr": 1e-3}, "checkpoint": {"every_steps": 2}, "evaluation": {"every_epochs": 2}}
    with ExitStack() as stack:
        worker = Recording(order(folder / "images", num_workers=2, **spec), world, stack)
        try:
            worker.train()
        except DivergedError as error:
            worker.seen.append(f"DivergedError: {error}")
    return worker.seen


@pytest.mark.parametrize("times", [1, 2])
def test_all_workers_go_back_once_to_the_newest_state(tmp_path: Path, times: int) -> None:
    image_folder(tmp_path / "images")
    first, second = in_workers(train_where_worker_1_diverges, 2, tmp_path, tmp_path, times)
    assert first == second
    assert first[:7] == [("started", None), 1, 2, 3, 4, 5, 6]
    what, why, state = first[7]
    assert what == "went back"
    assert why.startswith("2 step(s) in a row had no finite loss or gradient")
    assert state in ("step=0000000002", "step=0000000004")
    again = int(state.removeprefix("step=")) + 1
    if times == 1:
        assert first[8:] == [*range(again, 9), 8, "ended"]  # the last step is told with its evaluation, too
    else:
        assert first[8:-1] == list(range(again, 7))
        assert first[-1].startswith("DivergedError: 2 step(s) in a row")
        assert "step 5 (loss nan" in first[-1]
        assert "of rank 1, images " in first[-1]
