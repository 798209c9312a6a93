"""`python -m benchmarks.start_up`: from submission to the first optimiser step on a warm cluster of this machine.

Ours goes through the service; the peer is the same model in a plain Ray Train script, submitted by Ray's Jobs API to the same head.
They alternate, after one of each that does not count. Prints one JSON line, with the medians of every stage in seconds since submission.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.waiting import wait
from service.client import Json, MaestroClient
from service.home import Home
from service.processes import free_ports
from service.ray_jobs import HttpRayJobs
from service.up import Installation, running

STAGES = ("attempt_created", "driver_started_at", "workers_placed_at", "worker_started_at", "workers_started", "first_step_taken")
_PEER = Path(__file__).with_name("plain_trainer.py")
_BATCH_SIZE = 64  # of each worker
Stages = dict[str, float]


def spec(num_workers: int) -> Json:
    """The digits: a step takes milliseconds, so that what is left is the start."""
    return {
        "kind": "pretrain",
        "name": "start-up",
        "model": {"arch": "vit_tiny_patch4", "image_size": 8, "in_chans": 1},
        "masking": {"ratio": 0.5},
        "decoder": {"depth": 1, "width": 32},
        "data": {"source": "digits"},
        "optim": {"epochs": 1, "batch_size": _BATCH_SIZE * num_workers, "base_lr": 1e-3, "warmup_epochs": 0},
        "resources": {"num_workers": num_workers},
    }


def stages_of(client: MaestroClient, job: str) -> Stages:
    """Seconds from a job's submission to each stage that it has reached, as its events tell them."""
    seen: dict[str, str] = {}
    for event in client.events(job):
        seen.setdefault(event["type"], event["at"])
        seen |= {name: when for name, when in event["data"].items() if name in STAGES}
    began = datetime.fromisoformat(seen["job_queued"])
    return {name: (datetime.fromisoformat(seen[name]) - began).total_seconds() for name in STAGES if name in seen}


def start_ours(client: MaestroClient, num_workers: int) -> Stages:
    """One job through the service, to its end: the next one is to find the cluster quiet."""
    job = client.submit(spec(num_workers))["id"]
    wait(lambda: client.job(job)["status"] in ("succeeded", "failed", "cancelled"), what=f"the end of job {job}")
    view = client.job(job)
    if view["status"] != "succeeded":
        raise SystemExit(f"job {job} {view['status']}: {view['detail']}")
    return stages_of(client, job)


def start_peer(ray: HttpRayJobs, num_workers: int, folder: Path) -> Stages:
    """One plain script through the Jobs API, to its end."""
    name = f"peer-{uuid.uuid4().hex}"
    stages = folder / name
    command = [sys.executable, str(_PEER), str(stages), str(num_workers), str(_BATCH_SIZE), str(folder)]
    began = time.time()
    ray.submit(
        name, entrypoint=shlex.join(command), env_vars={"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}, metadata={}
    )  # 2 to 3 s less for it

    def is_over() -> bool:
        job = ray.info(name)
        return job is not None and job.status.is_over

    wait(is_over, what="the end of the plain script")
    if not stages.exists():
        raise SystemExit(f"the plain script failed:\n{ray.logs(name)}")
    told = dict(line.split() for line in stages.read_text().splitlines())
    return {stage: float(at) - began for stage, at in told.items()}


def measure(
    installation: Installation, client: MaestroClient, folder: Path, *, num_workers: int, repeats: int, num_unmeasured: int = 1
) -> dict[str, Any]:
    """The JSON line of `repeats` starts of each side, which alternate, behind `num_unmeasured` that fill the caches of files."""
    ray = HttpRayJobs(installation.cluster.url, token=installation.cluster.token)
    ours, peer = [], []
    for _ in range(num_unmeasured + repeats):
        wait(lambda: ray.resources().used_cpus == 0, what="Ray's figures to say that the last run has gone")
        ours.append(start_ours(client, num_workers))
        peer.append(start_peer(ray, num_workers, folder))
        print(json.dumps({"ours": ours[-1], "peer": peer[-1]}), file=sys.stderr)
    ray.close()
    medians = {"ours": _medians(ours[num_unmeasured:]), "peer": _medians(peer[num_unmeasured:])}
    last = {side: stages["first_step_taken"] for side, stages in medians.items()}
    return {
        "name": "start_up",
        "unit": "s",
        **last,
        "peer_name": "the same model in a plain TorchTrainer script by Ray's Jobs API",
        "ratio": last["ours"] / last["peer"],
        "device": "cpu",
        "num_workers": num_workers,
        "repeats": repeats,
        "stages": medians,
    }


def _medians(starts: list[Stages]) -> Stages:
    return {stage: round(statistics.median(start[stage] for start in starts), 2) for stage in STAGES if stage in starts[0]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start_up", description=__doc__)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="a line for each number of workers")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="maestro-start-up-") as place:
        folder, home = Path(place), Home(Path(place) / "home")
        with (
            running(home, port=free_ports(1)[0], say=lambda text: print(text, file=sys.stderr)) as installation,
            MaestroClient(installation.url, home.secrets().api_token, patience_seconds=30) as client,
        ):
            for num_workers in given.workers:
                print(json.dumps(measure(installation, client, folder, num_workers=num_workers, repeats=given.repeats)))


if __name__ == "__main__":
    main()
