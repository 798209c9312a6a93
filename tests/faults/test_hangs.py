"""Workers that live, but train no more: they are seen, told with their stacks, and started again."""

import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.conftest import LiveService
from tests.faults.checks import check_job
from tests.integration.runs import Json, events_of, pretrain_spec, train_workers, wait_for, wait_for_step
from tests.unit.core_fixtures import image_folder
from workers.group import _LOOK_SECONDS

Undisturbed = Callable[[Json], dict[int, float]]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("hangs") / "images", per_class=32)


def spec_of(images: Path) -> Json:
    return pretrain_spec(
        model={"arch": "vit_tiny_patch4", "image_size": 8},
        data={"source": str(images)},
        optim={"epochs": 60, "batch_size": 8, "base_lr": 1e-3, "warmup_epochs": 1},
        retry={"hang_minutes": 0.2},
    )


def hung(service: LiveService, job: str) -> Json:
    [told] = wait_for(lambda: events_of(service.client, job, "run_hung"), seconds=90, what="the hang")
    assert told["seconds"] >= 12.0
    assert any("train_worker" in stacks for stacks in told["stacks"].values())
    return dict(told)


def wait_for_a_look(service: LiveService, job: str) -> None:
    """Until the driver has heard of a step: of a rank 0 that is stopped before, it knows only that it is silent, for minutes."""
    [told] = [event for event in service.client.events(job) if event["type"] == "first_step_taken"]
    heard_at = datetime.fromisoformat(told["at"]) + timedelta(seconds=2 * _LOOK_SECONDS)
    wait_for(lambda: datetime.now(UTC) > heard_at, seconds=60, what="a look at the workers")


def check(service: LiveService, job: str, expected: dict[int, float]) -> None:
    check_job(service, job, attempts=1, undisturbed=expected)  # bit for bit
    [failed] = events_of(service.client, job, "workers_failed")
    assert (failed["reason"], failed["num_workers_before"]) == ("hung", 2)
    assert "hangs:" in wait_for(lambda: service.client.logs(job), seconds=30, what="the kept log")


@pytest.mark.fault("an image that never comes", "running")
def test_a_read_that_never_ends(live_service: LiveService, undisturbed: Undisturbed, images: Path) -> None:
    """As from a dead file server: whoever opens the file waits."""
    expected = undisturbed(spec_of(images))
    job = live_service.client.submit(spec_of(images) | {"name": "hangs"})["id"]
    wait_for_step(live_service.client, job, 12)
    image = min(images.rglob("*.png"))
    content, pipe = image.read_bytes(), image.with_suffix(".pipe")
    os.mkfifo(pipe)
    pipe.replace(image)
    told = hung(live_service, job)
    pipe.write_bytes(content)
    pipe.replace(image)
    assert any("in _next" in stacks for stacks in told["stacks"].values())
    check(live_service, job, expected)


@pytest.mark.fault("SIGSTOP of a worker", "running")
def test_a_process_that_is_stopped(live_service: LiveService, undisturbed: Undisturbed, images: Path) -> None:
    expected = undisturbed(spec_of(images))
    job = live_service.client.submit(spec_of(images) | {"name": "stopped"})["id"]
    wait_for_step(live_service.client, job, 12)
    wait_for_a_look(live_service, job)
    train_workers(live_service.run)[-1].send_signal(signal.SIGSTOP)
    told = hung(live_service, job)
    silent = [rank for rank, stacks in told["stacks"].items() if stacks == "it does not answer"]
    assert silent == [str(told["rank"])]
    check(live_service, job, expected)
