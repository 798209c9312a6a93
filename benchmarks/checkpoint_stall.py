"""`python -m benchmarks.checkpoint_stall`: what saving the training state of a ViT-B MAE costs the training.

One worker trains in blocks of steps, in turn without a save, with one beside the training (as the workers save), and with the same save
waited for in the step. Saves go to a SeaweedFS server on the same machine. Prints one JSON line. `ours` and `peer` are shares of the time
of `steps_per_save` steps and a save, lost against those steps without it: all that saving takes from the training, also by using the same
processors. `waited` is the part of it that the steps stood still for. Blocks without a save beside them are shorter: what they say of a
step and of a save is the same.
"""

import argparse
import json
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from mae_core.config import PretrainSpec
from mae_core.loop import Progress
from mae_core.run import Run
from mae_core.runs import open_run
from mae_core.world import World
from service.local import Seaweedfs
from service.processes import sweep
from workers.contract import EventType, StorageRef, WorkOrder
from workers.delays import Delays
from workers.local_states import LocalStates
from workers.objects import ObjectStore
from workers.reporter import Reporter
from workers.saver import Saver
from workers.uploads import Uploads

_KINDS = ("plain", "beside", "blocking")
_WARM_UP_STEPS = 2
_BUCKET = "checkpoint-stall"


class Listener:
    """Stands for rank 0's reporter: knows when each save was committed, and its bytes. A failed save ends the benchmark."""

    def __init__(self) -> None:
        self.committed: list[tuple[float, int]] = []
        self.failure: str | None = None

    def event(self, kind: EventType, **data: Any) -> None:
        if kind is EventType.TRAINING_STATE_COMMITTED:
            self.committed.append((time.monotonic(), data["bytes"]))
        else:
            self.failure = f"{kind}: {data}"

    def spool(self) -> None: ...


class Measurement:
    """Blocks of steps of one run, each timed from its save to the end of its last step."""

    def __init__(self, run: Run, saver: Saver, uploads: Uploads, heard: Listener, *, steps_per_save: int) -> None:
        self._run, self._saver, self._uploads, self._heard = run, saver, uploads, heard
        self._steps_per_save = steps_per_save
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._short = max(1, steps_per_save // 6)
        self.seconds: dict[str, list[float]] = {kind: [] for kind in _KINDS}
        self.waited: dict[str, list[float]] = {kind: [] for kind in _KINDS}
        self.save_seconds: dict[str, list[float]] = {kind: [] for kind in _KINDS}

    def blocks(self, num_saves: int) -> None:
        """`num_saves` blocks of each kind, in an order that changes, behind a save and some steps that do not count."""
        steps = self._run.progress(lambda: False, lambda: False)
        self._block(steps, "plain", num_steps=_WARM_UP_STEPS)
        self._block(steps, "blocking", num_steps=_WARM_UP_STEPS)
        for taken in (self.seconds, self.waited, self.save_seconds):
            for values in taken.values():
                values.clear()
        for number in range(num_saves):
            for place in range(len(_KINDS)):
                kind = _KINDS[(number + place) % len(_KINDS)]
                self._block(steps, kind, num_steps=self._steps_per_save if kind == "beside" else self._short)
        steps.close()  # type: ignore[attr-defined]  # a generator

    def _block(self, steps: Iterator[Progress], kind: str, *, num_steps: int) -> None:
        self._finish_device()
        started, progress = time.monotonic(), None
        if kind != "plain":
            self._saver.save(len(self._heard.committed), self._run.training_state())
            if kind == "blocking":
                self._wait()
        waited = time.monotonic() - started
        for _ in range(num_steps):
            progress = next(steps)
        assert progress is not None
        assert progress.step < progress.num_steps
        self._finish_device()
        self._wait()  # a save longer than its block would disturb the next one; it counts as lost
        self.seconds[kind].append(time.monotonic() - started)
        self.waited[kind].append(waited if kind != "plain" else 0.0)
        if self._heard.failure is not None:
            raise SystemExit(f"a save failed: {self._heard.failure}")
        if kind != "plain":
            self.save_seconds[kind].append(self._heard.committed[-1][0] - started)

    def _wait(self) -> None:
        """Until disk and storage have the state."""
        self._saver.wait()
        self._uploads.wait()

    def _finish_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def line(self) -> dict[str, Any]:
        """What was measured."""
        num_saves, step = len(self.seconds["plain"]), statistics.mean(self.seconds["plain"]) / self._short
        taken = {"beside": self._steps_per_save, "blocking": self._short}
        extra = {kind: sum(self.seconds[kind]) - num_saves * taken[kind] * step for kind in taken}
        whole = {kind: extra[kind] + num_saves * self._steps_per_save * step for kind in taken}
        lost = {kind: extra[kind] / whole[kind] for kind in taken}
        waited = {kind: sum(self.waited[kind]) / whole[kind] for kind in taken}
        return {
            "name": "checkpoint_stall",
            "unit": "share of step time",
            "ours": lost["beside"],
            "peer": lost["blocking"],
            "peer_name": "blocking save",
            "ratio": lost["beside"] / lost["blocking"],
            "device": self._device.type,
            "waited": {"ours": waited["beside"], "peer": waited["blocking"], "ratio": waited["beside"] / waited["blocking"]},
            "wait_seconds_per_save": {kind: _spread(self.waited[kind]) for kind in lost},
            "save_seconds": {kind: _spread(self.save_seconds[kind]) for kind in lost},
            "step_seconds": step,
            "steps_per_save": self._steps_per_save,
            "num_saves": num_saves,
            "bytes": self._heard.committed[-1][1],
            "num_threads": torch.get_num_threads(),
        }


def _spread(values: list[float]) -> Mapping[str, float]:
    return {"median": statistics.median(values), "max": max(values)}


def measure(
    folder: Path, storage: StorageRef, *, arch: str, image_size: int, batch_size: int, threads: int, num_saves: int, steps_per_save: int
) -> dict[str, Any]:
    """The JSON line of `num_saves` saves of each kind. Uses `folder` for images; storage credentials are in the environment."""
    num_steps = 2 * _WARM_UP_STEPS + len(_KINDS) * num_saves * steps_per_save  # at most
    spec = PretrainSpec.model_validate(
        {
            "kind": "pretrain",
            "name": "checkpoint-stall",
            "model": {"arch": arch, "image_size": image_size},
            "data": {"source": str(_images(folder / "images", size=image_size, number=batch_size))},
            "optim": {"epochs": num_steps + 1, "batch_size": batch_size, "warmup_epochs": 1},  # an epoch is a step
            "evaluation": {"every_epochs": num_steps + 1},
            "resources": {"cpus_per_worker": threads},
        }
    )
    order = WorkOrder(
        job="stall", attempt=1, spec=spec, token="none", service_url="http://127.0.0.1:1", storage=storage, prefix="jobs/stall/"
    )
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    run, heard = open_run(spec, world=world, encoder_folder=None), Listener()
    states, reporter = LocalStates(order.job, world.rank, born=0), cast(Reporter, heard)
    uploads = Uploads(order, ObjectStore(storage), world, None, states, delays=Delays(reporter), reporter=reporter)
    saver = Saver(order, world, None, uploads, incarnation=0, reporter=reporter)
    measurement = Measurement(run, saver, uploads, heard, steps_per_save=steps_per_save)
    measurement.blocks(num_saves)
    states.clear()
    return measurement.line()


def _images(folder: Path, *, size: int, number: int) -> Path:
    folder.mkdir()
    for seed in range(number):
        pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.jpg")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_stall", description=__doc__)
    parser.add_argument("--arch", default="vit_base_patch16")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="of the training; fewer than cores leave some to the saves"
    )
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument("--steps-per-save", type=int, default=60, help="so many that a save beside them ends before the next one")
    given = parser.parse_args()
    mark = f"stall-{secrets.token_hex(8)}"
    with tempfile.TemporaryDirectory(prefix="maestro-stall-") as place:
        folder = Path(place)
        server = Seaweedfs(folder / "s3", run=mark, log=folder / "seaweedfs.log", access_key="stall", secret_key=secrets.token_hex(16))
        try:
            server.start()
            server.create_bucket(_BUCKET)
            os.environ |= {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
            line = measure(
                folder,
                StorageRef(endpoint=server.endpoint, bucket=_BUCKET),
                arch=given.arch,
                image_size=given.image_size,
                batch_size=given.batch_size,
                threads=given.threads,
                num_saves=given.saves,
                steps_per_save=given.steps_per_save,
            )
        finally:
            server.stop()
            sweep(mark)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
