"""A machine of the cluster is lost, with all that runs on it: an elastic run goes on with what is left, and grows when it is back."""

from collections.abc import Callable, Iterator

import pytest

from tests.conftest import LiveService
from tests.faults.checks import check_job
from tests.integration.runs import Json, events_of, pretrain_spec, wait_for, wait_for_step
from tests.ray_nodes import RayNode, second_node

Undisturbed = Callable[[Json], dict[int, float]]
ELASTIC = pretrain_spec(
    optim={"epochs": 16, "batch_size": 128, "base_lr": 1e-4, "warmup_epochs": 1},
    resources={"num_workers": {"min": 1, "max": 2}, "cpus_per_worker": 2},  # one worker fills a machine
    checkpoint={"every_steps": 5},
)


@pytest.fixture
def node(live_service: LiveService) -> Iterator[RayNode]:
    with second_node(live_service.installation.cluster, num_cpus=2) as node:
        yield node


def sizes(service: LiveService, job: str) -> list[int]:
    """With how many workers each of its starts began."""
    return [start["num_workers"] for start in events_of(service.client, job, "workers_started")]


@pytest.mark.fault("a machine lost, and back", "running")
def test_an_elastic_run_shrinks_and_grows(live_service: LiveService, undisturbed: Undisturbed, node: RayNode) -> None:
    spec = ELASTIC | {  # slow steps: there are few of them while the machine is away and for as long as the run keeps calm
        "model": {"arch": "vit_tiny_patch2", "image_size": 8, "in_chans": 1},
        "optim": {"epochs": 16, "batch_size": 256, "base_lr": 1e-4, "warmup_epochs": 1},
    }
    expected = undisturbed(spec)
    job = live_service.client.submit(spec | {"name": "elastic"})["id"]
    wait_for_step(live_service.client, job, 7)
    node.lose()
    wait_for(lambda: len(sizes(live_service, job)) == 2, seconds=60, what="the start of the worker that is left")
    node.start()
    check_job(live_service, job, attempts=1, undisturbed=expected, exact=False, seconds=600)
    assert sizes(live_service, job) == [2, 1, 2]
    statuses = [data["to"] for data in events_of(live_service.client, job, "status_changed")]
    assert statuses == ["starting", "running", "finalizing", "succeeded"]  # growing is no pause


@pytest.mark.fault("a machine lost", "running", ci=True)
def test_an_elastic_run_goes_on_with_what_is_left(live_service: LiveService, undisturbed: Undisturbed, node: RayNode) -> None:
    expected = undisturbed(ELASTIC)
    job = live_service.client.submit(ELASTIC | {"name": "elastic"})["id"]
    wait_for_step(live_service.client, job, 12)
    node.lose()
    check_job(live_service, job, attempts=1, undisturbed=expected, exact=False)
    assert sizes(live_service, job) == [2, 1]
    [failed] = events_of(live_service.client, job, "workers_failed")
    assert (failed["reason"], failed["num_workers_before"], failed["restart"], failed["max_restarts"]) == ("worker_died", 2, 1, 3)


@pytest.mark.fault("a machine lost", "starting")
def test_a_machine_lost_while_the_workers_start(live_service: LiveService, undisturbed: Undisturbed, node: RayNode) -> None:
    expected = undisturbed(ELASTIC)
    job = live_service.client.submit(ELASTIC | {"name": "elastic"})["id"]
    wait_for(lambda: live_service.client.job(job)["status"] == "starting", seconds=60, what="the launch")
    wait_for(lambda: [process for process in node.processes() if "TrainWorker" in process.name()], seconds=60, what="its worker there")
    node.lose()
    check_job(live_service, job, attempts=1, undisturbed=expected, exact=False)
    assert sizes(live_service, job)[-1] == 1


@pytest.mark.fault("a machine lost", "saving")
def test_a_machine_lost_while_a_state_is_saved(live_service: LiveService, undisturbed: Undisturbed, node: RayNode) -> None:
    expected = undisturbed(ELASTIC)
    spec = ELASTIC | {"name": "elastic", "checkpoint": {"every_steps": 1}}  # it saves all the time
    job = live_service.client.submit(spec)["id"]
    wait_for(lambda: len(events_of(live_service.client, job, "training_state_committed")) >= 3, seconds=120, what="three saves")
    node.lose()
    check_job(live_service, job, attempts=1, undisturbed=expected, exact=False)
    assert sizes(live_service, job) == [2, 1]


@pytest.mark.fault("a machine lost", "stopping")
def test_a_machine_lost_while_the_run_pauses(live_service: LiveService, undisturbed: Undisturbed, node: RayNode) -> None:
    client = live_service.client
    expected = undisturbed(ELASTIC)
    job = client.submit(ELASTIC | {"name": "elastic"})["id"]
    wait_for_step(client, job, 7)
    client.pause(job)
    node.lose()
    wait_for(lambda: client.job(job)["status"] == "paused", seconds=120, what="the pause")
    client.resume(job)
    check_job(live_service, job, attempts=2, undisturbed=expected, exact=False)
