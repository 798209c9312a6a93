"""`python -m benchmarks.recover`: from a loss to the next optimiser step, on a warm cluster of this machine.

A worker killed with -9: ours through the service, against Ray Train's own handling of failures of the same model in a plain script
(`plain_survivor`), submitted to the same head; they alternate. A machine lost (a second raylet and all its processes killed with -9) under
an elastic run: ours alone. Prints a JSON line for each, with every time in seconds.
"""

import argparse
import json
import shlex
import signal
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.waiting import wait
from service.client import Json, MaestroClient
from service.home import Home
from service.processes import RUN_VARIABLE, free_ports, processes_of_run
from service.ray_jobs import HttpRayJobs
from service.up import Installation, running
from tests.ray_nodes import second_node

_PEER = Path(__file__).with_name("plain_survivor.py")
_BATCH_SIZE = 64  # of each worker
_STEPS_BEFORE = 25  # two saves of the peer's, and of ours


def spec(resources: Json, *, batch_size: int) -> Json:
    """The digits: a step takes milliseconds, so that what is left is the recovery. Ends only when it is cancelled."""
    return {
        "kind": "pretrain",
        "name": "recover",
        "model": {"arch": "vit_tiny_patch4", "image_size": 8, "in_chans": 1},
        "masking": {"ratio": 0.5},
        "decoder": {"depth": 1, "width": 32},
        "data": {"source": "digits"},
        "optim": {"epochs": 100_000, "batch_size": batch_size, "base_lr": 1e-3, "warmup_epochs": 0},
        "resources": resources,
        "checkpoint": {"every_steps": 10},
        "evaluation": {"every_epochs": 100_000},
    }


def recover_ours(installation: Installation, client: MaestroClient, resources: Json, *, lose: Callable[[], object] | None = None) -> float:
    """Seconds from a loss to the next step of a job; without `lose` it is that of the worker that started last."""
    job = client.submit(spec(resources, batch_size=2 * _BATCH_SIZE))["id"]

    def first_steps() -> list[float]:
        events = [event for event in client.events(job) if event["type"] == "first_step_taken"]
        return [datetime.fromisoformat(event["at"]).timestamp() for event in events]

    wait(lambda: ((client.job(job)["progress"] or {}).get("step") or 0) >= _STEPS_BEFORE, what=f"step {_STEPS_BEFORE} of job {job}")
    began = time.time()
    if lose is None:
        _kill_newest(installation, "ray::TrainWorker")
    else:
        lose()
    wait(lambda: len(first_steps()) == 2, what=f"the recovery of job {job}")
    client.cancel(job)
    wait(lambda: client.job(job)["status"] == "cancelled", what=f"the end of job {job}")
    return first_steps()[1] - began


def recover_peer(installation: Installation, ray: HttpRayJobs, num_workers: int, folder: Path) -> float:
    """The same of the plain script."""
    name = f"peer-{uuid.uuid4().hex}"
    steps = folder / name
    command = [sys.executable, str(_PEER), str(steps), str(num_workers), str(_BATCH_SIZE), str(folder)]
    ray.submit(name, entrypoint=shlex.join(command), env_vars={"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}, metadata={})

    def times() -> list[float]:
        return [float(line.split()[1]) for line in steps.read_text().splitlines()] if steps.exists() else []

    wait(lambda: len(times()) >= _STEPS_BEFORE, what=f"step {_STEPS_BEFORE} of the plain script")
    began = time.time()
    victim = _kill_newest(installation, "RayTrainWorker")
    wait(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE, what="the death of its worker")
    died = time.time()
    wait(lambda: times()[-1] > died + 1.0, what="the recovery of the plain script")  # a step of its peer's may have been under way
    ray.stop(name)
    wait(lambda: (job := ray.info(name)) is None or job.status.is_over, what="the end of the plain script")
    return next(at for at in times() if at > died + 1.0) - began


def _kill_newest(installation: Installation, name: str) -> psutil.Process:
    """kill -9 of the youngest process that has this name."""
    run = installation.api.child.environment[RUN_VARIABLE]
    found = [process for process in processes_of_run(run) if name in process.name() + "".join(process.cmdline())]
    if not found:
        raise SystemExit(f"there is no process {name}")
    victim = max(found, key=lambda process: process.create_time())
    victim.send_signal(signal.SIGKILL)
    return victim


def worker_killed(
    installation: Installation, client: MaestroClient, folder: Path, *, num_workers: int, repeats: int, num_unmeasured: int = 1
) -> dict[str, Any]:
    """The JSON line of `repeats` kills of a worker on each side, behind `num_unmeasured` that fill the caches of files."""
    ray = HttpRayJobs(installation.cluster.url, token=installation.cluster.token)
    ours, peer = [], []
    for _ in range(num_unmeasured + repeats):
        wait(lambda: ray.resources().used_cpus == 0, what="Ray's figures to say that the last run has gone")
        ours.append(round(recover_ours(installation, client, {"num_workers": num_workers}), 2))
        wait(lambda: ray.resources().used_cpus == 0, what="Ray's figures to say that the last run has gone")
        peer.append(round(recover_peer(installation, ray, num_workers, folder), 2))
        print(json.dumps({"ours": ours[-1], "peer": peer[-1]}), file=sys.stderr)
    ray.close()
    medians = {"ours": statistics.median(ours[num_unmeasured:]), "peer": statistics.median(peer[num_unmeasured:])}
    return {
        "name": "recover",
        "loss": "worker",
        "unit": "s",
        **medians,
        "peer_name": "Ray Train's handling of failures, the same model in a plain TorchTrainer script",
        "ratio": medians["ours"] / medians["peer"],
        "device": "cpu",
        "num_workers": num_workers,
        "seconds": {"ours": ours[num_unmeasured:], "peer": peer[num_unmeasured:]},
    }


def machine_lost(installation: Installation, client: MaestroClient, *, repeats: int) -> dict[str, Any]:
    """The JSON line of `repeats` losses of the second of two machines, each with a worker of an elastic run."""
    cluster = installation.cluster
    resources = {"num_workers": {"min": 1, "max": 2}, "cpus_per_worker": cluster.num_cpus}
    ours = []
    for _ in range(repeats):
        with second_node(cluster, num_cpus=cluster.num_cpus) as node:
            ours.append(round(recover_ours(installation, client, resources, lose=node.lose), 2))
        print(json.dumps({"ours": ours[-1]}), file=sys.stderr)
    return {
        "name": "recover",
        "loss": "machine",
        "unit": "s",
        "value": statistics.median(ours),
        "device": "cpu",
        "num_workers": {"before": 2, "after": 1},
        "seconds": ours,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recover", description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="maestro-recover-") as place:
        folder, home = Path(place), Home(Path(place) / "home")
        with (
            running(home, port=free_ports(1)[0], say=lambda text: print(text, file=sys.stderr)) as installation,
            MaestroClient(installation.url, home.secrets().api_token, patience_seconds=30) as client,
        ):
            print(json.dumps(worker_killed(installation, client, folder, num_workers=given.workers, repeats=given.repeats)), flush=True)
            print(json.dumps(machine_lost(installation, client, repeats=given.repeats)), flush=True)


if __name__ == "__main__":
    main()
