"""Object storage down, slow, full, failing after it has committed, and cut at random, at each moment; and the way to the API cut.

A whole installation whose workers and service reach object storage through a proxy, and whose workers reach the API through another.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from service import up
from service.client import MaestroClient
from service.home import Home
from service.local import Seaweedfs, s3_client
from service.processes import free_ports
from tests.conftest import LiveService
from tests.faults.checks import check_job, drivers
from tests.faults.proxy import ChaosProxy, Faults
from tests.integration.runs import Json, events_of, losses_of, pretrain_spec, train_workers, wait_for, wait_for_end, wait_for_step
from workers.stored import MANIFEST

SEED = 5
NUM_STEPS = 176
TRAINING = pretrain_spec(
    optim={"epochs": 16, "batch_size": 128, "base_lr": 1e-3, "warmup_epochs": 1},
    evaluation={"every_epochs": 16},
    resources={"num_workers": 1},
    checkpoint={"every_steps": 20},
)
DOWN, FULL = Faults(refuse=True), Faults(write_status=507)
PASSABLE = {
    "S3 slow": Faults(chunk_seconds=0.02),
    "S3 fails after it has committed": Faults(lose_answers=0.4),
    "TCP to S3 cut at random": Faults(cut_within_bytes=40_000_000),
}


class ProxiedSeaweedfs(Seaweedfs):
    """All but this test reach it through `proxy`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._own_endpoint = self.endpoint
        self.proxy = ChaosProxy(self._ports["s3.port"], seed=SEED)
        self.endpoint = self.proxy.url

    def client(self) -> Any:
        return s3_client(self._own_endpoint, access_key=self.access_key, secret_key=self.secret_key)


class ProxiedInstallation(up.Installation):
    """Its workers reach the API through `api_proxy`."""

    def _settings(self) -> dict[str, str]:
        self.api_proxy = ChaosProxy(self.port, seed=SEED)
        return super()._settings() | {"MAESTRO_SERVICE_URL": self.api_proxy.url}


class ProxiedService(LiveService):
    @property
    def storage(self) -> ChaosProxy:
        proxy: ChaosProxy = self.installation.storage.proxy  # type: ignore[attr-defined]
        return proxy

    @property
    def way_to_api(self) -> ChaosProxy:
        proxy: ChaosProxy = self.installation.api_proxy  # type: ignore[attr-defined]
        return proxy


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxiedService]:
    home = Home(tmp_path_factory.mktemp("maestro") / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(up, "Seaweedfs", ProxiedSeaweedfs)
        patch.setattr(up, "Installation", ProxiedInstallation)
        with (
            up.running(home, port=free_ports(1)[0], say=print, num_cpus=2) as installation,
            MaestroClient(installation.url, home.secrets().api_token, patience_seconds=30) as client,
        ):
            yield ProxiedService(installation, client)


@pytest.fixture(scope="module")
def undisturbed(service: ProxiedService) -> dict[int, float]:
    job = service.client.submit(TRAINING | {"name": "undisturbed"})["id"]
    assert wait_for_end(service.client, job)["status"] == "succeeded"
    return losses_of(service.client, job)


def conditions(service: ProxiedService, job: str) -> Json:
    found: Json = service.client.job(job)["conditions"]
    return found


def wait_for_delay(service: ProxiedService, job: str) -> None:
    wait_for(lambda: "upload_delayed" in conditions(service, job), seconds=120, what=f"the condition of {job}")


def start(service: ProxiedService, moment: str) -> str:
    """A job at its moment: a driver whose workers have not begun, a first step, a save, or the last steps."""
    job: str = service.client.submit(TRAINING | {"name": moment})["id"]
    if moment == "starting":
        wait_for(lambda: drivers(service.run, job), seconds=120, what=f"the driver of {job}")
        assert not events_of(service.client, job, "workers_started")
    else:
        wait_for_step(service.client, job, 1)
    if moment == "saving":
        wait_for(lambda: service.has_object(f"jobs/{job}/training_state/"), seconds=120, what="files of a training state")
    return job


def cells(fault: str, *moments: str) -> pytest.MarkDecorator:
    """One test for each moment."""
    return pytest.mark.parametrize("moment", [pytest.param(moment, marks=pytest.mark.fault(fault, moment)) for moment in moments])


def away(service: ProxiedService, undisturbed: dict[int, float], moment: str, faults: Faults) -> None:
    """The run goes on while storage is away, says so, and brings there later what it has made meanwhile."""
    job = start(service, moment)
    with service.storage.having(faults):
        wait_for_delay(service, job)
        if moment != "starting" or faults is FULL:  # what is already there can be read
            last = wait_for(lambda: events_of(service.client, job, "training_ended"), seconds=120, what="the last step")
            assert last[0]["step"] == NUM_STEPS
            wait_for(lambda: service.client.job(job)["status"] == "finalizing", seconds=30, what="the result waits")
        assert not service.has_object(f"jobs/{job}/encoder/{MANIFEST}")
    view = check_job(service, job, attempts=1, undisturbed=undisturbed)
    assert view["conditions"] == {}
    assert events_of(service.client, job, "save_failed") == []


@cells("S3 down", "starting", "running", "saving")
def test_storage_down(service: ProxiedService, undisturbed: dict[int, float], moment: str) -> None:
    away(service, undisturbed, moment, DOWN)


@cells("S3 full", "starting", "running", "saving")
def test_storage_full(service: ProxiedService, undisturbed: dict[int, float], moment: str) -> None:
    away(service, undisturbed, moment, FULL)


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(DOWN, marks=pytest.mark.fault("S3 down", "stopping")),
        pytest.param(FULL, marks=pytest.mark.fault("S3 full", "stopping")),
    ],
)
def test_a_pause_waits_for_storage(service: ProxiedService, undisturbed: dict[int, float], faults: Faults) -> None:
    job = start(service, "running")
    with service.storage.having(faults):
        service.client.pause(job)
        wait_for_delay(service, job)
        assert service.client.job(job)["status"] == "pausing"
    wait_for(lambda: service.client.job(job)["status"] == "paused", seconds=120, what="the pause")
    [told] = events_of(service.client, job, "run_stopped")
    service.client.resume(job)
    check_job(service, job, attempts=2, undisturbed=undisturbed)
    resumed_from = events_of(service.client, job, "workers_started")[-1]["resumed_from"]
    assert f"step={told['step']:010d}-" in resumed_from, "at the exact step"


@pytest.mark.fault("S3 down, and a cancel", "stopping")
def test_a_cancel_ends_the_wait_for_storage(service: ProxiedService) -> None:
    job = start(service, "running")
    with service.storage.having(DOWN):
        wait_for(lambda: service.client.job(job)["status"] == "finalizing", seconds=120, what="the result waits")
        wait_for_delay(service, job)
        service.client.cancel(job)
        view = wait_for_end(service.client, job, seconds=120)
    assert (view["status"], view["reason"], view["conditions"]) == ("cancelled", "cancelled_by_user", {})


@pytest.mark.fault("S3 down, and kill -9 of the worker", "running", ci=True)
def test_a_worker_killed_while_storage_is_down_goes_on_from_its_disk(service: ProxiedService, undisturbed: dict[int, float]) -> None:
    job = start(service, "running")
    with service.storage.having(DOWN):
        wait_for_delay(service, job)
        [worker] = train_workers(service.run)
        worker.kill()
        starts = wait_for(lambda: len(found := events_of(service.client, job, "workers_started")) == 2 and found, seconds=120, what="it")
        assert starts[1]["resumed_from"] is not None
        assert not service.has_object(starts[1]["resumed_from"] + MANIFEST), "storage does not have it"
    check_job(service, job, attempts=1, undisturbed=undisturbed)


@pytest.mark.parametrize(
    ("faults", "moment"),
    [
        pytest.param(faults, moment, marks=pytest.mark.fault(name, moment))
        for name, faults in PASSABLE.items()
        for moment in ("starting", "running", "saving")
    ],
)
def test_storage_that_works_badly(service: ProxiedService, undisturbed: dict[int, float], faults: Faults, moment: str) -> None:
    """From that moment to the job's end."""
    before = service.storage.num_faults
    job = start(service, moment)
    with service.storage.having(faults):
        view = check_job(service, job, attempts=1, undisturbed=undisturbed, seconds=600)
    assert view["conditions"] == {}
    committed = [told["key"] for told in events_of(service.client, job, "training_state_committed")]
    assert committed, "and its states, too"
    assert len(committed) == len(set(committed))
    assert faults.chunk_seconds or service.storage.num_faults > before


@pytest.mark.parametrize("faults", [pytest.param(faults, marks=pytest.mark.fault(name, "stopping")) for name, faults in PASSABLE.items()])
def test_a_pause_over_storage_that_works_badly(service: ProxiedService, undisturbed: dict[int, float], faults: Faults) -> None:
    job = start(service, "running")
    with service.storage.having(faults):
        service.client.pause(job)
        wait_for(lambda: service.client.job(job)["status"] == "paused", seconds=300, what="the pause")
    service.client.resume(job)
    check_job(service, job, attempts=2, undisturbed=undisturbed)


def test_the_losses_are_those_of_one_that_repeats_itself(undisturbed: dict[int, float]) -> None:
    assert sorted(undisturbed) == list(range(1, NUM_STEPS + 1))


@cells("TCP to the API cut at random", "starting", "running", "saving")
def test_the_way_to_the_api_is_cut(service: ProxiedService, undisturbed: dict[int, float], moment: str) -> None:
    """What the workers tell arrives whole, each report once, whether its answer was lost or it itself."""
    before = service.way_to_api.num_faults
    job = start(service, moment)
    with service.way_to_api.having(Faults(cut_within_bytes=4000)):
        check_job(service, job, attempts=1, undisturbed=undisturbed)
    assert service.way_to_api.num_faults > before
    check_told_once(service, job)


@cells("answers of the API lost", "starting", "running", "saving")
def test_a_report_succeeds_and_its_answer_is_lost(service: ProxiedService, undisturbed: dict[int, float], moment: str) -> None:
    job = start(service, moment)
    with service.way_to_api.having(Faults(lose_answers=0.5)):
        check_job(service, job, attempts=1, undisturbed=undisturbed)
    check_told_once(service, job)


@pytest.mark.fault("TCP to the API cut at random", "stopping")
def test_a_pause_reaches_workers_whose_way_to_the_api_is_cut(service: ProxiedService, undisturbed: dict[int, float]) -> None:
    job = start(service, "running")
    with service.way_to_api.having(Faults(cut_within_bytes=4000)):
        service.client.pause(job)
        wait_for(lambda: service.client.job(job)["status"] == "paused", seconds=120, what="the pause")
        service.client.resume(job)
        check_job(service, job, attempts=2, undisturbed=undisturbed)
    check_told_once(service, job)


def check_told_once(service: ProxiedService, job: str) -> None:
    """No event of the workers came twice."""
    told = [event for event in service.client.events(job) if event["type"] in ("training_state_committed", "first_step_taken", "evaluated")]
    keys = [(event["attempt"], event["type"], event["at"]) for event in told]
    assert len(keys) == len(set(keys))
