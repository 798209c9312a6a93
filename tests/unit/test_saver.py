"""What becomes of saves that fail on one worker, and of a training that diverges: all workers do the same, and none is left waiting."""

import gc
import json
import tempfile
import threading
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_core.checkpoint import SavesBeside, State, gather
from mae_core.errors import DivergedError
from mae_core.loop import Progress, Training
from mae_core.run import Run
from mae_core.state_files import read_state
from mae_core.world import World
from tests.unit.core_fixtures import image_folder
from tests.unit.folder_store import FolderStore
from tests.unit.forked import Forked, in_workers
from tests.unit.saving import PREFIX, order, saving, work_on
from workers import train_loop, uploads
from workers.causes import explain
from workers.contract import Reason, WorkOrder
from workers.objects import file_entry
from workers.saver import SavingGroupError
from workers.seat import Seat
from workers.signals import Signals
from workers.state_names import newest_first, state_name, state_prefix
from workers.train_loop import Follower, Stop


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class RefusingStore(FolderStore):
    """Storage that refuses one worker's first upload."""

    refuses = False

    def upload(self, key: str, path: Path) -> None:
        if self.refuses:
            self.refuses = False
            raise PermissionError("no entry")
        super().upload(key, path)


def save_twice(world: World, folder: Path) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    uploads._PAUSE_SECONDS = 0.01
    work_on(folder / "machine")
    store = RefusingStore(folder)
    store.refuses = world.rank == 1
    parts = saving(world, folder, store)
    for step in (3, 6):
        parts.saver.save(step, {"module.weight": torch.full((4,), float(step)), "module.bias": torch.zeros(3), "step": torch.tensor(step)})
        parts.wait()
        world.gather(None)
    return parts.told.events, store.training_states(PREFIX)


def test_where_one_worker_cannot_upload_none_commits_and_all_try_again(tmp_path: Path) -> None:
    (events, states), (_, others) = in_workers(save_twice, 2, tmp_path, tmp_path)
    assert states == others == [f"{PREFIX}training_state/step={step:010d}-a1-5/" for step in (6, 3)]
    kinds = ["upload_delayed", "upload_recovered", "training_state_committed", "training_state_committed"]
    assert sorted(kind for kind, _ in events) == sorted(kinds)
    assert (events[0][0], events[0][1]["step"]) == ("upload_delayed", 3)
    assert "worker 1: PermissionError: no entry" in events[0][1]["message"]
    assert [(data["step"], data["key"]) for kind, data in events if kind == "training_state_committed"] == [(3, states[1]), (6, states[0])]
    into = {"module.weight": torch.zeros(4), "module.bias": torch.ones(3), "step": torch.tensor(0)}
    FolderStore(tmp_path).fetch_training_state(states[0], tmp_path)
    read_state(into, tmp_path, None)
    assert into["module.weight"].tolist() == [6.0] * 4


def save_where_one_hangs(world: World, tell: Any, folder: Path) -> None:
    work_on(folder / "machine")
    saver, _, told = saving(world, folder, FolderStore(folder), timeout_seconds=2)
    saver.check()
    if world.rank == 0:
        saver.save(1, {"step": torch.tensor(1)})
        saver.wait()
    reason = None
    try:
        saver.check()
    except SavingGroupError as error:
        reason = explain(error, 0).reason
    total = world.sum(torch.ones(1)).item()  # the training's own group is whole
    tell((told.kinds(), reason, total))


def test_a_worker_that_hangs_in_a_save_ends_this_start_of_the_workers(tmp_path: Path) -> None:
    """Another start goes on from the last state: after a failed collective no state could be saved or read in this one."""
    with Forked(save_where_one_hangs, 2, tmp_path, tmp_path) as workers:
        assert workers.told(0) == (["save_failed"], Reason.WORKER_DIED, 2.0)
        assert workers.told(1) == ([], None, 2.0)


def save_where_one_has_no_place(world: World, folder: Path) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """A file is in the way of its first save's folder."""
    work_on(folder / f"machine-{world.rank}")
    parts = saving(world, folder, FolderStore(folder))
    place = parts.uploads.states.folder(state_name(step=3, attempt=1, incarnation=5))
    if world.rank == 1:
        place.parent.mkdir(parents=True)
        place.touch()
    for step in (3, 6):
        parts.saver.save(step, {"module.weight": torch.ones(4), "module.bias": torch.zeros(3), "step": torch.tensor(step)})
        parts.wait()
        world.gather(None)
        place.unlink() if place.is_file() else None
    return parts.told.events, [path.name for path in place.parent.iterdir()]


def test_where_one_worker_has_no_place_for_its_files_the_next_save_succeeds(tmp_path: Path) -> None:
    (events, left), (_, others_left) = in_workers(save_where_one_has_no_place, 2, tmp_path, tmp_path)
    assert [kind for kind, _ in events] == ["save_failed", "training_state_committed"]
    assert "worker 1: " in events[0][1]["message"]
    assert left == others_left == [], "what is committed is no more needed on disk"


def test_states_of_the_newest_start_come_first() -> None:
    """Also where it began anew behind damaged ones, so that its steps are lower."""
    folders = [(900, 1, 10), (6, 1, 30), (4, 2, 20), (800, 1, 10), (2, 2, 20), (5000000000000, 1, 10)]
    names = [state_name(step=step, attempt=attempt, incarnation=incarnation) for step, attempt, incarnation in folders]
    prefixes = [state_prefix(PREFIX, name) for name in names]
    assert newest_first(names) == [names[place] for place in (2, 4, 1, 5, 0, 3)]
    assert newest_first(prefixes) == [prefixes[place] for place in (2, 4, 1, 5, 0, 3)]


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
        super().__init__(order, Seat(world, 0, world.rank), stack, Signals())
        self.seen: list[Any] = []

    def started(self, taken_up: str | None) -> None:
        self.first_saver = weakref.ref(self.saver)
        self.seen.append(("started", taken_up))

    def tell(self, progress: Progress) -> None:
        self.seen.append(progress.step)
        if progress.step == 3:
            self.saver.wait()
            self.state_uploads.wait()  # the state of step 2 is committed before anything else happens

    def went_back(self, why: DivergedError, taken_up: str | None) -> None:
        self.seen.append(("went back", str(why).split(" of rank")[0], taken_up and taken_up.split("/")[-2].split("-")[0]))

    def ended(self, run: Run, stop: Stop | None) -> None:
        gc.collect()
        assert self.first_saver() is None, "its buffers are as large as the state"
        self.seen.append("ended")


def train_where_worker_1_diverges(world: World, folder: Path, times: int) -> list[Any]:
    """The loss of worker 1 is not a number in steps 5 and 6, so many times."""
    train_loop.ObjectStore = lambda *_: FolderStore(folder / "s3")  # type: ignore[assignment, misc]
    work_on(folder / "machine")
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


def open_beside_states(world: World, folder: Path, damage: str) -> list[Any]:
    """A run of two states, of which the newest is damaged, is opened again."""
    train_loop.ObjectStore = lambda *_: FolderStore(folder / "s3")  # type: ignore[assignment, misc]
    work_on(folder / "machine")
    given = order(folder / "images", num_workers=2, checkpoint={"every_steps": 2}, evaluation={"every_epochs": 2})
    with ExitStack() as stack:
        first = Recording(given, world, stack)
        run, _ = first.open_run()
        for step in (2, 4):
            first.saver.save(step, run.training_state())
            first.saver.wait()
            assert first.state_uploads.wait(60)
            world.gather(None)
    place = next((folder / "s3" / PREFIX / "training_state").glob("step=0000000004-*"))
    if world.rank == 0:
        file, manifest = place / "state-00001.safetensors", place / "manifest.json"
        if damage == "missing":
            file.unlink()
        else:  # whole as it was uploaded, and yet no state
            file.write_bytes(b"no tensors")
            content = json.loads(manifest.read_text())
            content["files"][file.name] = file_entry(file).model_dump()
            manifest.write_text(json.dumps(content))
    world.gather(None)
    with ExitStack() as stack:
        _, taken_up = Recording(given, world, stack).open_run()
    return [taken_up and taken_up.split("/")[-2].split("-")[0]]


@pytest.mark.parametrize("damage", ["missing", "unreadable"])
def test_a_state_without_one_of_its_files_is_passed_over(tmp_path: Path, damage: str) -> None:
    image_folder(tmp_path / "images")
    assert in_workers(open_beside_states, 2, tmp_path, tmp_path, damage) == [["step=0000000002"]] * 2


def test_a_pause_at_a_step_that_was_saved_anyway_writes_it_once(tmp_path: Path, machine: None) -> None:
    """A second save of it would replace the files of a committed manifest."""
    parts = saving(World(), tmp_path, FolderStore(tmp_path / "s3"))
    follower: Any = object.__new__(Follower)
    follower._saved_step, follower.world = 3, World()
    follower.saver, follower.state_uploads = parts.saver, parts.uploads

    class Paused:
        def training_state(self) -> State:
            return {"step": torch.tensor(0)}

    follower.saver.save(3, Paused().training_state())
    for step in (3, 4):
        follower._save_last(step, Paused())
    assert [(kind, data["step"]) for kind, data in parts.told.events] == [("training_state_committed", 3), ("training_state_committed", 4)]
