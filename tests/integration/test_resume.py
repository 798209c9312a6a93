"""A worker killed with -9 costs the steps since the last save and nothing else: the losses are those of a run never killed."""

import signal

from tests.conftest import LiveService
from tests.integration.runs import events_of, losses_of, pretrain_spec, train_workers, wait_for, wait_for_end, wait_for_step
from tests.integration.test_local import is_loopback, listeners

NUM_STEPS = 44  # 4 epochs of 11 steps: 1,442 digits to train on, 128 at a time


def test_killed_worker_resumes_bit_for_bit(live_service: LiveService) -> None:
    client = live_service.client
    optim = {"epochs": 12, "batch_size": 128, "base_lr": 1e-3, "warmup_epochs": 1}  # long enough to be killed in its middle
    undisturbed = client.submit(pretrain_spec(name="undisturbed", optim=optim))["id"]
    assert wait_for_end(client, undisturbed)["status"] == "succeeded"

    killed = client.submit(pretrain_spec(name="killed", optim=optim))["id"]
    wait_for(lambda: events_of(client, killed, "training_state_committed"), seconds=180, what="a save")
    wait_for_step(client, killed, 14)
    workers = train_workers(live_service.run)
    assert len(workers) == 2
    found = listeners(live_service.run)
    assert {name for name, _, _ in found if "TrainWorker" in name}  # torch's store and gloo's sockets are among them
    assert {entry for entry in found if not is_loopback(entry[1])} == set()
    workers[-1].send_signal(signal.SIGKILL)
    view = wait_for_end(client, killed)

    assert (view["status"], view["attempt"]) == ("succeeded", 1), view["detail"]
    starts = events_of(client, killed, "workers_started")
    saved = [state["key"] for state in events_of(client, killed, "training_state_committed")]
    assert [start["num_workers"] for start in starts] == [2, 2]
    assert starts[0]["resumed_from"] is None
    assert starts[1]["resumed_from"] in saved
    expected = losses_of(client, undisturbed)
    assert sorted(expected) == list(range(1, 3 * NUM_STEPS + 1))
    assert losses_of(client, killed) == expected  # bit for bit
    assert view["metrics"]["loss"] == expected[3 * NUM_STEPS]


def test_a_paused_job_releases_its_devices_and_goes_on_at_the_exact_step(live_service: LiveService) -> None:
    client = live_service.client
    spec = pretrain_spec(optim={"epochs": 12, "batch_size": 128, "base_lr": 1e-3, "warmup_epochs": 1}, checkpoint={"every_steps": 1000})
    undisturbed = client.submit(spec | {"name": "undisturbed"})["id"]
    assert wait_for_end(client, undisturbed)["status"] == "succeeded"
    job = client.submit(spec | {"name": "paused"})["id"]
    wait_for_step(client, job, 5)
    client.pause(job)
    paused = wait_for(lambda: (view := client.job(job))["status"] == "paused" and view, seconds=60, what="the pause")
    [stopped] = events_of(client, job, "run_stopped")
    [state] = events_of(client, job, "training_state_committed")  # no other was due
    assert state["step"] == stopped["step"]
    assert train_workers(live_service.run) == []
    assert (paused["reason"], paused["finished_at"]) == ("paused_by_user", None)
    client.resume(job)
    view = wait_for_end(client, job)

    assert (view["status"], view["attempt"]) == ("succeeded", 2), view["detail"]
    assert [start["resumed_from"] for start in events_of(client, job, "workers_started")] == [None, state["key"]]
    assert losses_of(client, job) == losses_of(client, undisturbed)  # bit for bit


def test_killed_api_and_dispatcher_lose_nothing_and_start_nothing_twice(live_service: LiveService) -> None:
    client = live_service.client
    job = client.submit(pretrain_spec(name="outage", optim={"epochs": 8, "batch_size": 128, "base_lr": 1e-3, "warmup_epochs": 1}))["id"]
    wait_for_step(client, job, 2)
    live_service.kill_dispatcher()
    live_service.kill_api()
    wait_for(lambda: live_service.has_object(f"jobs/{job}/encoder/manifest.json"), seconds=240, what="the training's end, with no service")
    live_service.start_api()
    live_service.start_dispatcher()
    view = wait_for_end(client, job)

    assert (view["status"], view["attempt"]) == ("succeeded", 1), view["detail"]
    assert len(events_of(client, job, "workers_started")) == 1
    assert sorted(losses_of(client, job)) == list(range(1, 2 * NUM_STEPS + 1))
    assert [name for name in live_service.submissions() if name.startswith(job)] == [f"{job}-a1"]
