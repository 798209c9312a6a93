"""Runs that lose workers, machines or their way, on real Ray: they go on, and their losses are those of a run that lost nothing."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import LiveService
from tests.integration.runs import events_of, losses_of, pretrain_spec, train_workers, wait_for, wait_for_end, wait_for_step
from tests.ray_nodes import second_node
from tests.unit.core_fixtures import image_folder

ELASTIC = {"num_workers": {"min": 1, "max": 2}, "cpus_per_worker": 2}  # one worker fills a machine


def test_a_lost_machine_shrinks_an_elastic_run_and_one_that_returns_grows_it(live_service: LiveService) -> None:
    client = live_service.client
    spec = pretrain_spec(
        model={"arch": "vit_tiny_patch1", "image_size": 8, "in_chans": 1},  # slow steps: there are few while a node returns
        optim={"epochs": 12, "batch_size": 256, "base_lr": 1e-4, "warmup_epochs": 1},
        resources=ELASTIC,
        checkpoint={"every_steps": 5},
    )
    with second_node(live_service.installation.cluster, num_cpus=2) as node:
        undisturbed = client.submit(spec | {"name": "undisturbed"})["id"]
        assert wait_for_end(client, undisturbed)["status"] == "succeeded"
        job = client.submit(spec | {"name": "elastic"})["id"]
        wait_for_step(client, job, 7)
        node.lose()
        wait_for(lambda: len(events_of(client, job, "workers_started")) == 2, seconds=60, what="the start of the worker that is left")
        node.start()
        view = wait_for_end(client, job)

    assert (view["status"], view["attempt"]) == ("succeeded", 1), view["detail"]
    assert [start["num_workers"] for start in events_of(client, undisturbed, "workers_started")] == [2]
    assert [start["num_workers"] for start in events_of(client, job, "workers_started")] == [2, 1, 2]
    [failed] = events_of(client, job, "workers_failed")
    assert (failed["reason"], failed["num_workers_before"], failed["restart"], failed["max_restarts"]) == ("worker_died", 2, 1, 3)
    expected, losses = losses_of(client, undisturbed), losses_of(client, job)
    assert sorted(losses) == sorted(expected)
    assert [losses[step] for step in sorted(losses)] == pytest.approx([expected[step] for step in sorted(expected)], rel=1e-5)
    statuses = [data["to"] for data in events_of(client, job, "status_changed")]
    assert statuses == ["starting", "running", "finalizing", "succeeded"]  # growing is no pause


def block_loader(service: LiveService, images: Path) -> Callable[[], None]:
    """An image that never comes, as from a dead file server: whoever opens it waits. Returns what brings it back."""
    image = min(images.rglob("*.png"))
    content = image.read_bytes()
    pipe = image.with_suffix(".pipe")
    os.mkfifo(pipe)
    pipe.replace(image)

    def mend() -> None:
        image.with_suffix(".new").write_bytes(content)
        image.with_suffix(".new").replace(image)

    return mend


def stop_worker(service: LiveService, images: Path) -> Callable[[], None]:
    train_workers(service.run)[-1].send_signal(signal.SIGSTOP)
    return lambda: None


@pytest.mark.parametrize("hang", [block_loader, stop_worker])
def test_a_run_that_hangs_is_started_again(
    live_service: LiveService, tmp_path: Path, hang: Callable[[LiveService, Path], Callable[[], None]]
) -> None:
    client, images = live_service.client, image_folder(tmp_path / "images", per_class=32)
    spec = pretrain_spec(
        model={"arch": "vit_tiny_patch4", "image_size": 8},
        data={"source": str(images)},
        optim={"epochs": 60, "batch_size": 8, "base_lr": 1e-3, "warmup_epochs": 1},
        retry={"hang_minutes": 0.05},
    )
    undisturbed = client.submit(spec | {"name": "undisturbed"})["id"]
    assert wait_for_end(client, undisturbed)["status"] == "succeeded"
    job = client.submit(spec | {"name": "hangs"})["id"]
    wait_for_step(client, job, 12)
    mend = hang(live_service, images)
    [hung] = wait_for(lambda: events_of(client, job, "run_hung"), seconds=60, what="the hang")
    mend()
    view = wait_for_end(client, job)

    assert (view["status"], view["attempt"]) == ("succeeded", 1), view["detail"]
    assert hung["seconds"] >= 3.0
    assert "train_worker" in hung["stacks"]["0"]
    assert (hung["rank"], hung["stacks"]["1"]) == (1, "it does not answer") if hang is stop_worker else "in next" in hung["stacks"]["1"]
    [failed] = events_of(client, job, "workers_failed")
    assert (failed["reason"], failed["num_workers_before"]) == ("hung", 2)
    assert losses_of(client, job) == losses_of(client, undisturbed)  # bit for bit
    assert "hangs:" in wait_for(lambda: client.logs(job), seconds=30, what="the kept log")
