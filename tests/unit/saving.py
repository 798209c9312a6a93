"""A saver and what it needs, over storage in a folder, on a machine whose disk is a folder, too."""

import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from mae_core.checkpoint import saving_group
from mae_core.world import World
from tests.unit.core_fixtures import pretrain_spec
from tests.unit.folder_store import FolderStore
from workers.contract import EventType, StorageRef, WorkOrder
from workers.delays import Delays
from workers.local_states import LocalStates
from workers.saver import Saver
from workers.uploads import Uploads

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

    def spool(self) -> None: ...

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


class Saving(NamedTuple):
    saver: Saver
    uploads: Uploads
    told: Told

    def wait(self) -> None:
        """Until disk and storage have what was saved."""
        self.saver.wait()
        self.saver.check()
        assert self.uploads.wait(60)


def work_on(machine: Path) -> None:
    """Has this process take `machine` for its machine's temporary folder."""
    machine.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(machine)


def saving(world: World, folder: Path, store: Any, *, incarnation: int = 5, timeout_seconds: float = 60) -> Saving:
    """What a worker of a job of `world.size` workers saves with. It saves on `work_on`'s machine."""
    told, job = Told(), order(folder, num_workers=world.size)
    saves, rounds = (saving_group(world, timeout=timedelta(seconds=timeout_seconds)) for _ in range(2))
    reporter: Any = told if world.rank == 0 else None
    states = LocalStates(job.job, world.rank, born=incarnation)
    uploads = Uploads(job, store, world, rounds, states, delays=Delays(reporter), reporter=reporter)
    return Saving(Saver(job, world, saves, uploads, incarnation=incarnation, reporter=reporter), uploads, told)


def stored_steps(folder: Path, prefix: str) -> list[int]:
    """0, and the steps of the states that the storage in `folder`/s3 has committed, the newest first."""
    return [0, *(int(name.split("step=")[1].split("-")[0]) for name in FolderStore(folder / "s3").training_states(prefix))]
