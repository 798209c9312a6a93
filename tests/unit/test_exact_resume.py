"""Killed at any moment, and taken up by as many workers: every later loss is that of a run never killed, bit for bit.

Taken up by another number of workers, or in another way spread over them: the same images in every step, and losses within rtol 1e-5.
"""

import hashlib
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from mae_core.data.listing import FolderImages, list_images
from mae_core.data.order import WINDOW_SHARDS
from mae_core.data.pack import Packing, pack
from mae_core.loop import Progress
from mae_core.run import Run, TrainedRun
from mae_core.stores import FolderParts
from mae_core.world import World
from tests.unit.core_fixtures import finetune_spec, image_folder, pretrain_spec
from tests.unit.folder_store import FolderStore, away
from tests.unit.forked import Forked
from tests.unit.saving import stored_steps, work_on
from workers import train_loop
from workers.contract import StorageRef, WorkOrder
from workers.seat import Seat
from workers.signals import Signals
from workers.train_loop import Follower, Stop

NUM_STEPS = 48  # 12 epochs of 4 steps: 48 images, 12 in each
KILLS = 4  # of each of the 7 ways to train
MOST_STEPS = (NUM_STEPS - 1) // KILLS  # between two kills: none comes after the end
Tell = Callable[[Any], None]
Json = dict[str, Any]


class Watched(Follower):
    """A worker, rank 0 too, that tells the test each step: ("started", state), ("step", number, loss, images), ("ended", weights)."""

    def __init__(self, order: WorkOrder, world: World, stack: ExitStack, tell_test: Tell, stop_after: int) -> None:
        super().__init__(order, Seat(world, 0, world.rank), stack, Signals())
        self._tell_test, self._stop_after = tell_test, stop_after
        self._images: list[int] = []

    def open_run(self) -> tuple[Run, str | None]:
        run, taken_up = super().open_run()
        assert isinstance(run, TrainedRun)
        take_next = run.training._next

        def recording(batches: Any) -> Any:
            micro = take_next(batches)
            self._images += micro.batch.samples_B.tolist()
            return micro

        run.training._next = recording  # type: ignore[method-assign]
        return run, taken_up

    def started(self, taken_up: str | None) -> None:
        self._images.clear()
        self._tell_test(("started", taken_up))

    def tell(self, progress: Progress) -> None:
        for step, values in progress.points:
            self._tell_test(("step", step, values["loss"], self._images))
            self._images = []

    def wants_stop(self) -> bool:
        return self.last is not None and self.last.step >= self._stop_after

    def ended(self, run: Run, stop: Stop | None) -> None:
        self.saver.wait()
        state = run.training_state()
        whole = {name: state[name].full_tensor() if isinstance(state[name], DTensor) else state[name] for name in sorted(state)}  # type: ignore[attr-defined]
        digest = hashlib.sha256(
            b"".join(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in whole.values())
        )
        self._tell_test(("ended", digest.hexdigest()))


def train(world: World, tell: Tell, folder: Path, changes: Json, stop_after: int) -> None:
    train_loop.ObjectStore = lambda *_: FolderStore(folder / "s3")  # type: ignore[assignment, misc]
    work_on(folder / "machines" / changes["name"])
    given = WorkOrder(
        job="job1",
        attempt=1,
        spec=spec_of_run(folder, world.size, **changes),
        token="t",
        service_url="http://127.0.0.1:1",
        storage=StorageRef(endpoint="http://127.0.0.1:1", bucket="none"),
        prefix=f"jobs/{changes['name']}/",
    )
    with ExitStack() as stack:
        Watched(given, world, stack, tell, stop_after).train()


def spec_of_run(
    folder: Path,
    num_workers: int,
    *,
    kind: str = "pretrain",
    source: str = "images",
    every_steps: int = 2,
    accumulation: int = 1,
    **changes: Any,
) -> Any:
    sections: Json = {
        "optim": {"epochs": NUM_STEPS // 4, "batch_size": 12, "base_lr": 1e-3, "warmup_epochs": 1, "accumulation": accumulation},
        "resources": {"num_workers": num_workers},
        "checkpoint": {"every_steps": every_steps},
    }
    if kind == "finetune":
        data = {"validation": str(folder / "images"), "validation_fraction": 0.0}
        return finetune_spec(folder / "images", data=data, **sections, **changes)
    return pretrain_spec(folder / source, evaluation={"every_epochs": 2}, **sections, **changes)


class Outcome:
    """What was seen of a run: its losses and images by step, where it was taken up, and its weights at the end."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.images: dict[int, list[int]] = {}
        self.starts: list[int] = []
        self.digest: str | None = None

    def follow(self, workers: Forked, size: int, *, num_steps: int = NUM_STEPS + 1) -> None:
        """Reads what the workers tell until they have ended, or have taken `num_steps` steps."""
        while self.digest is None:
            told = [workers.told(rank) for rank in range(size)]
            kind, *values = told[0]
            if kind == "started":
                self.starts.append(0 if values[0] is None else int(values[0].split("step=")[1].split("-")[0]))
            elif kind == "step":
                step, loss, _ = values
                assert self.losses.setdefault(step, loss) == loss, f"step {step}, taken again"
                self.images[step] = sorted(image for _, _, _, images in told for image in images)
                if step == self.starts[-1] + num_steps:
                    return
            else:
                [self.digest] = values


def run_to_end(folder: Path, size: int, changes: Json, *, stop_after: int = NUM_STEPS + 1) -> Outcome:
    outcome = Outcome()
    with Forked(train, size, folder, folder, changes, stop_after) as workers:
        outcome.follow(workers, size)
    return outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    images = FolderImages(image_folder(folder / "images", per_class=24))
    how = Packing(shard_bytes=6_000)  # two windows of shards
    index = pack(images, list_images(images, None), FolderParts(folder / "packed"), how, num_processes=1, tell=lambda _: None)
    assert len(index.shards) > WINDOW_SHARDS
    return folder


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, {"name": "one"}),
        (1, {"name": "one-accumulated", "accumulation": 2, "kind": "finetune"}),
        (2, {"name": "two"}),
        (2, {"name": "two-accumulated", "accumulation": 2}),
        (2, {"name": "two-packed", "source": "packed", "accumulation": 2}),
        (2, {"name": "two-sharded", "parallel": {"strategy": "fsdp"}}),
        (2, {"name": "two-sharded-accumulated", "accumulation": 2, "parallel": {"strategy": "fsdp"}}),
    ],
)
def test_killed_at_any_moment_it_goes_on_bit_for_bit(folder: Path, size: int, changes: Json) -> None:
    undisturbed = run_to_end(folder, size, changes)
    draw = random.Random(changes["name"])
    killed, changes = Outcome(), changes | {"name": f"{changes['name']}-killed", "every_steps": draw.choice([1, 2, 3])}
    for _ in range(KILLS):
        with Forked(train, size, folder, folder, changes, NUM_STEPS + 1) as workers:
            killed.follow(workers, size, num_steps=draw.randint(4, MOST_STEPS))
            workers.kill(draw.randrange(size))
    with Forked(train, size, folder, folder, changes, NUM_STEPS + 1) as workers:
        killed.follow(workers, size)
    print(f"{changes['name']}: {KILLS} kills, taken up at steps {killed.starts}")
    assert len(killed.starts) == KILLS + 1
    assert killed.starts[-1] > 0
    assert sorted(undisturbed.losses) == list(range(1, NUM_STEPS + 1))
    assert killed.losses == undisturbed.losses
    assert killed.images == undisturbed.images
    assert killed.digest == undisturbed.digest


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, {"name": "away-one"}),
        (2, {"name": "away-two"}),
        (2, {"name": "away-sharded", "parallel": {"strategy": "fsdp"}}),
    ],
)
def test_killed_while_storage_is_away_it_goes_on_from_the_disk_bit_for_bit(folder: Path, size: int, changes: Json) -> None:
    undisturbed = run_to_end(folder, size, changes)
    killed, changes = Outcome(), changes | {"name": f"{changes['name']}-killed", "every_steps": 1}
    for _ in range(3):
        with Forked(train, size, folder, folder, changes, NUM_STEPS + 1) as workers:
            killed.follow(workers, size, num_steps=2)
            away(folder / "s3").touch()
            killed.follow(workers, size, num_steps=MOST_STEPS)
            workers.kill(size - 1)
    away(folder / "s3").unlink()
    assert max(stored_steps(folder, f"jobs/{changes['name']}/")) < killed.starts[-1]
    with Forked(train, size, folder, folder, changes, NUM_STEPS + 1) as workers:
        killed.follow(workers, size)
    print(f"{changes['name']}: taken up at steps {killed.starts}")
    assert killed.starts == sorted(set(killed.starts)), "each start goes on behind the one before"
    assert len(killed.starts) == 4
    assert killed.losses == undisturbed.losses
    assert killed.digest == undisturbed.digest
    assert max(stored_steps(folder, f"jobs/{changes['name']}/")) > killed.starts[-1], "storage has got states since"


@pytest.mark.parametrize(
    ("before", "after", "source"),
    [
        ((2, "ddp"), (1, "ddp"), "images"),
        ((2, "ddp"), (4, "ddp"), "images"),
        ((1, "ddp"), (3, "ddp"), "packed"),
        ((2, "fsdp"), (2, "ddp"), "images"),
        ((2, "ddp"), (3, "fsdp"), "images"),
    ],
)
def test_another_number_of_workers_goes_on_with_the_same_images(
    folder: Path, before: tuple[int, str], after: tuple[int, str], source: str
) -> None:
    def changes(strategy: str, *, name: str) -> Json:
        return {"name": name, "source": source, "parallel": {"strategy": strategy}, "every_steps": 5}

    undisturbed = run_to_end(folder, before[0], changes(before[1], name=f"undisturbed-{before}-{after}"))
    first = run_to_end(folder, before[0], changes(before[1], name=f"{before}-{after}"), stop_after=6)
    assert sorted(first.losses) == list(range(1, 8))
    second = run_to_end(folder, after[0], changes(after[1], name=f"{before}-{after}"))
    assert second.starts == [5]
    assert sorted(second.losses) == list(range(6, NUM_STEPS + 1))
    assert second.images == {step: images for step, images in undisturbed.images.items() if step > 5}
    expected = [undisturbed.losses[step] for step in sorted(second.losses)]
    assert [second.losses[step] for step in sorted(second.losses)] == pytest.approx(expected, rel=1e-5)
