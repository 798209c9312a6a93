"""One body for a real Ray head, for the stand-in that a thousand jobs run on, and for the fake that unit tests use."""

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from service.errors import RayUnreachable
from service.local import RayHead
from service.processes import free_ports
from service.ray_jobs import AlreadyExists, HttpRayJobs, RayJob, RayJobs, RayStatus
from tests.stand_in.server import StandIn
from tests.unit.fake_ray import FakeRay
from tests.unit.scripted_server import Answer, scripted_server


@dataclass
class Cluster:
    """A Ray, and the means to wait for what it does (the fake is told to do it)."""

    ray: RayJobs
    settle: Callable[[str, RayStatus], object]
    num_cpus: float


def wait_for(ray: RayJobs, submission_id: str, status: RayStatus) -> RayJob:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        job = ray.info(submission_id)
        if job is not None and job.status is status:
            return job
        time.sleep(0.1)
    raise AssertionError(f"{submission_id} is {job}, not {status}")


@pytest.fixture
def stand_in(run_mark: str, tmp_path: Path) -> Iterator[StandIn]:
    server = StandIn(run=run_mark, log=tmp_path / "stand-in.log", environment={}, num_cpus=2)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(params=["ray_head", "stand_in"])
def served(request: pytest.FixtureRequest) -> RayHead | StandIn:
    """What answers Ray's Jobs API over HTTP."""
    server: RayHead | StandIn = request.getfixturevalue(request.param)
    return server


@pytest.fixture(params=["ray_head", "stand_in", "fake"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if request.param == "fake":
        fake = FakeRay(num_cpus=2)
        fake.texts["written"] = "a line of text\n"

        def settle(submission_id: str, status: RayStatus) -> None:
            fake.texts[submission_id] = "Running entrypoint\na line of text\n"
            job = fake.jobs[submission_id]
            if not job.status.is_over:
                fake.run(submission_id) if status is RayStatus.RUNNING else fake.end(submission_id, status, message="it ended")

        yield Cluster(fake, settle, 2)
        return
    head: RayHead | StandIn = request.getfixturevalue(request.param)
    ray = HttpRayJobs(head.url, token=head.token)
    yield Cluster(ray, lambda submission_id, status: wait_for(ray, submission_id, status), head.num_cpus)
    ray.close()


def name() -> str:
    return f"job{uuid.uuid4().hex[:10]}-a1"


def test_the_contract(cluster: Cluster) -> None:
    ray, one, other, third = cluster.ray, name(), name(), name()
    ray.check()
    assert ray.info(one) is None
    assert ray.logs(one) is None
    ray.stop(one)  # nobody knows it: no matter

    ray.submit(
        one, entrypoint='echo "a line of text $MAESTRO_ORDER"', env_vars={"MAESTRO_ORDER": "{}"}, metadata={"job": "x", "attempt": "1"}
    )
    assert ray.info(one) is not None
    with pytest.raises(AlreadyExists):
        ray.submit(one, entrypoint="echo again", env_vars={}, metadata={})
    cluster.settle(one, RayStatus.SUCCEEDED)
    done = ray.info(one)
    assert done is not None
    assert (done.submission_id, done.status, done.status.is_over) == (one, RayStatus.SUCCEEDED, True)
    assert done.metadata == {"job": "x", "attempt": "1"}
    assert "a line of text" in (ray.logs(one) or "")
    ray.stop(one)  # it is over: no matter
    assert ray.info(one) == done
    with pytest.raises(AlreadyExists):
        ray.submit(one, entrypoint="echo again", env_vars={}, metadata={})

    ray.submit(other, entrypoint="sleep 600", env_vars={"RAY_JOB_STOP_WAIT_TIME_S": "1"}, metadata={})
    cluster.settle(other, RayStatus.RUNNING)
    ray.stop(other)
    cluster.settle(other, RayStatus.STOPPED)
    stopped = ray.info(other)
    assert stopped is not None
    assert stopped.status is RayStatus.STOPPED

    ray.submit(third, entrypoint="exit 3", env_vars={}, metadata={})
    cluster.settle(third, RayStatus.FAILED)
    failed = ray.info(third)
    assert failed is not None
    assert failed.message
    assert {name: ray.list()[name] for name in (one, other, third)} == {one: done, other: stopped, third: failed}

    resources = ray.resources()
    assert resources.num_cpus == cluster.num_cpus
    assert resources.num_gpus >= 0
    assert 0 <= resources.used_cpus <= cluster.num_cpus
    [node] = ray.nodes()
    assert (node.is_head, node.num_cpus) == (True, cluster.num_cpus)
    assert node.id


def test_what_runs_is_counted_after_a_while(served: RayHead | StandIn) -> None:
    """The figures lag by up to 5 s: that is why the dispatcher counts its own launches."""
    ray = HttpRayJobs(served.url, token=served.token)
    deadline = time.monotonic() + 30
    while ray.resources().at is None and time.monotonic() < deadline:
        time.sleep(0.5)
    first = ray.resources()
    assert first.at is not None
    while ray.resources().at == first.at and time.monotonic() < deadline:
        time.sleep(0.5)
    second = ray.resources().at
    assert second is not None
    assert second > first.at
    ray.close()


def test_the_list_of_all(served: RayHead | StandIn) -> None:
    ray, one, other = HttpRayJobs(served.url, token=served.token), name(), name()
    before = time.time()
    for submission_id, entrypoint in ((one, "true"), (other, "sleep 600")):
        ray.submit(submission_id, entrypoint=entrypoint, env_vars={"RAY_JOB_STOP_WAIT_TIME_S": "1"}, metadata={"job": submission_id})
    wait_for(ray, one, RayStatus.SUCCEEDED)
    wait_for(ray, other, RayStatus.RUNNING)
    listed = httpx.get(f"{served.url}/api/jobs/", headers={"Authorization": f"Bearer {served.token}"}, trust_env=False).json()
    mine = {job["submission_id"]: job for job in listed if job["submission_id"] in (one, other)}
    assert {submission_id: job["status"] for submission_id, job in mine.items()} == {one: "SUCCEEDED", other: "RUNNING"}
    assert mine[one]["metadata"]["job"] == one
    assert before - 1 <= mine[one]["start_time"] / 1000 <= mine[one]["end_time"] / 1000 <= time.time() + 1
    assert not mine[other]["end_time"]
    ray.stop(other)
    wait_for(ray, other, RayStatus.STOPPED)
    ray.close()


def test_a_wrong_token_and_no_server(served: RayHead | StandIn) -> None:
    for url, token, says in (
        (served.url, "wrong", "refuses our token: check MAESTRO_RAY_TOKEN"),
        (f"http://127.0.0.1:{free_ports(1)[0]}", "x", r"does not answer \(ConnectError\)"),
    ):
        ray = HttpRayJobs(url, token=token)
        calls: list[Callable[[], object]] = [ray.check, ray.resources, lambda ray=ray: ray.info("x"), lambda ray=ray: ray.logs("x")]  # type: ignore[misc]
        calls.append(lambda ray=ray: ray.submit("x", entrypoint="true", env_vars={}, metadata={}))  # type: ignore[misc]
        for call in calls:
            with pytest.raises(RayUnreachable, match=says):
                call()
        ray.close()


def test_a_cluster_that_is_open_to_all_is_not_ready() -> None:
    """Without its token mode Ray answers whoever asks: who reaches it could run anything there."""
    with scripted_server(lambda request: Answer(body=b"{}") if request.path == "/api/version" else Answer(404)) as server:
        ray = HttpRayJobs(server.url, token="token")
        with pytest.raises(RayUnreachable, match="asks for no token: start it with RAY_AUTH_MODE=token"):
            ray.check()
        ray.close()
