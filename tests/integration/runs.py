"""Specs small enough to train in seconds, and waiting for what a service does with them."""

import time
from collections.abc import Callable
from typing import Any

import psutil

from service.client import MaestroClient
from service.processes import processes_of_run

Json = dict[str, Any]
MODEL = {"arch": "vit_tiny_patch4", "image_size": 8, "in_chans": 1}


def pretrain_spec(**changes: Any) -> Json:
    """The digits, 2 workers, 10 steps an epoch: one slow enough to be killed in the middle."""
    spec: Json = {
        "kind": "pretrain",
        "name": "digits",
        "model": MODEL,
        "masking": {"ratio": 0.5},
        "decoder": {"depth": 1, "width": 32},
        "data": {"source": "digits", "validation_fraction": 0.2},
        "optim": {"epochs": 4, "batch_size": 128, "base_lr": 1e-3, "warmup_epochs": 1},
        "resources": {"num_workers": 2},
        "checkpoint": {"every_steps": 10},
        "export": {"formats": []},
    }
    return spec | changes


def probe_spec(encoder: Json, **changes: Any) -> Json:
    return {
        "kind": "probe",
        "name": "digits-probe",
        "encoder": encoder,
        "data": {"source": "digits", "validation_fraction": 0.2},
        "optim": {"epochs": 10, "batch_size": 128, "warmup_epochs": 1},
    } | changes


def wait_for(condition: Callable[[], Any], *, seconds: float, what: str) -> Any:
    """The first true value of `condition`, asked again and again."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)
    return value


def wait_for_end(client: MaestroClient, job: str, *, seconds: float = 240) -> Json:
    """The job when it has ended."""

    def ended() -> Json | None:
        view = client.job(job)
        return view if view["status"] in ("succeeded", "cancelled", "failed") else None

    view: Json = wait_for(ended, seconds=seconds, what=f"the end of {job}")
    return view


def wait_for_step(client: MaestroClient, job: str, step: int, *, seconds: float = 180) -> None:
    def reached() -> bool:
        view = client.job(job)
        assert view["status"] not in ("failed", "cancelled", "succeeded"), (view["status"], view["detail"])
        return view["progress"] is not None and view["progress"]["step"] >= step

    wait_for(reached, seconds=seconds, what=f"step {step} of {job}")


def events_of(client: MaestroClient, job: str, kind: str) -> list[Json]:
    return [event["data"] for event in client.events(job) if event["type"] == kind]


def losses_of(client: MaestroClient, job: str) -> dict[int, float]:
    """By step; empty where none was told."""
    series = client.metrics(job, names=["loss"]).get("loss", {"steps": [], "values": []})
    return dict(zip(series["steps"], series["values"], strict=True))


def train_workers(run: str) -> list[psutil.Process]:
    """The processes that train, oldest first."""
    return sorted(filter(_trains, processes_of_run(run)), key=lambda process: process.create_time())


def _trains(process: psutil.Process) -> bool:
    try:
        return "ray::TrainWorker" in process.name() + "".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return False
