"""`python -m tests.multihost`, as root: a training over two machines, one of which is cut off and comes back, and one killed.

Machines are network namespaces. The story, in which the loss must be that of a run that nothing disturbs, to 1e-5:
 1. an elastic job runs with two workers, one on each machine;
 2. the cable of one machine is pulled: the job goes on with the other;
 3. the cable is back, and the machine joins again: the job grows;
 4. the service's own cable is pulled for a while: the training goes on, and nothing that it told is lost;
 5. the other machine is killed with all that runs on it: the job goes on.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from service.client import Json, MaestroClient
from tests.faults.checks import check_losses
from tests.integration.runs import events_of, losses_of, pretrain_spec, wait_for, wait_for_end
from tests.multihost.cluster import WORKERS, Cluster, cluster
from tests.multihost.hosts import Host, network

INSIDE_VARIABLE = "MULTIHOST_INSIDE"
NAMES = ["service", "s3", "head", *WORKERS]
AWAY_SECONDS = 15.0
SPEC = pretrain_spec(
    model={"arch": "vit_tiny_patch2", "image_size": 8, "in_chans": 1},
    optim={"epochs": 24, "batch_size": 256, "base_lr": 1e-4, "warmup_epochs": 1},
    resources={"num_workers": {"min": 1, "max": 2}, "cpus_per_worker": 2},  # one worker fills a machine
    checkpoint={"every_steps": 10},
)


class Story:
    """What happens, told as it does, with the seconds since its beginning."""

    def __init__(self, made: Cluster) -> None:
        self._made, self._began = made, time.monotonic()

    def tell(self, what: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f} s  {what}", flush=True)

    def play(self) -> None:
        client = self._made.client
        undisturbed = client.submit(SPEC | {"name": "undisturbed"})["id"]
        view = wait_for_end(client, undisturbed, seconds=900)
        assert view["status"] == "succeeded", view["detail"]
        expected = losses_of(client, undisturbed)
        self.tell(f"undisturbed: {len(expected)} steps over two machines, last loss {expected[max(expected)]:.6f}")
        job = client.submit(SPEC | {"name": "disturbed"})["id"]
        self._disturb(job)
        view = wait_for_end(client, job, seconds=900)
        assert (view["status"], view["attempt"]) == ("succeeded", 1), view["detail"]
        check_losses(losses_of(client, job), expected, complete=True, exact=False)
        names = {artifact["name"] for artifact in client.artifacts(job)}
        assert "encoder/manifest.json" in names, names  # written last
        self.tell(f"succeeded in one attempt; every loss is the undisturbed run's; workers of its starts: {sizes(client, job)}")
        for event in client.events(job):
            print(json.dumps({name: event[name] for name in ("at", "type", "data")}))

    def _disturb(self, job: str) -> None:
        first, second = (self._made.hosts[name] for name in WORKERS)
        self._wait_for_sizes(job, [2])
        self._step_on(job)
        second.cut()
        self._lost(job, second, "is cut off", [2, 1])
        second.heal()
        wait_for(lambda: self._made.nodes[second.name].exit_code is not None, seconds=120, what="the end of what was given up")
        self.tell(f"the cable of {second.name} is back; its Ray, which the head had given up, has ended")
        self._made.join(second.name)
        self._wait_for_sizes(job, [2, 1, 2])
        self.tell(f"{second.name} has joined again; two workers")
        self._service_away(job)
        first.kill()
        self._lost(job, first, "is killed", [2, 1, 2, 1])

    def _lost(self, job: str, host: Host, what: str, expected: list[int]) -> None:
        self.tell(f"{host.name} {what}")
        began = time.monotonic()
        self._wait_for_sizes(job, expected)
        self._step_on(job)
        self.tell(f"one worker goes on; next step after {time.monotonic() - began:.1f} s")

    def _service_away(self, job: str) -> None:
        """The cable is pulled where this process is."""
        service, before = self._made.hosts["service"], self._step(job)
        service.cut()
        time.sleep(AWAY_SECONDS)  # the length of the outage
        service.heal()
        wait_for(lambda: self._step(job) > before, seconds=60, what="reports after the outage")
        self.tell(f"the service was cut off for {AWAY_SECONDS:g} s; steps before and after: {before}, {self._step(job)}")

    def _step(self, job: str) -> int:
        progress = self._made.client.job(job)["progress"]
        return int(progress["step"]) if progress else 0

    def _step_on(self, job: str) -> None:
        """At least twice."""
        before = self._step(job)
        wait_for(lambda: self._step(job) >= before + 2, seconds=300, what=f"steps after {before}")

    def _wait_for_sizes(self, job: str, expected: list[int]) -> None:
        wait_for(lambda: sizes(self._made.client, job) == expected, seconds=300, what=f"starts with {expected} workers")


def sizes(client: MaestroClient, job: str) -> list[int]:
    """With how many workers each start began."""
    return [start["num_workers"] for start in events_of(client, job, "workers_started")]


def inside() -> None:
    """In the namespace of the service."""
    hosts: Json = {name: Host(name, address) for name, address in json.loads(os.environ[INSIDE_VARIABLE]).items()}
    with (
        tempfile.TemporaryDirectory(prefix="mh-", dir="/tmp") as folder,
        cluster(Path(folder), hosts=hosts, run=f"multihost-{secrets.token_hex(8)}") as made,
    ):
        Story(made).play()


def main() -> None:
    if INSIDE_VARIABLE in os.environ:
        return inside()
    if os.geteuid() != 0:
        raise SystemExit("network namespaces need root: run it as root")
    with network(NAMES) as hosts:
        environment = os.environ | {INSIDE_VARIABLE: json.dumps({host.name: host.address for host in hosts.values()})}
        command = ["ip", "netns", "exec", hosts["service"].namespace, sys.executable, "-m", "tests.multihost"]
        raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
