"""A real Prometheus scrapes a live service by the deployed rules: all that alerts and dashboards name is there."""

import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import yaml

from benchmarks.reattach import spec
from service.local import LOOPBACK, Seaweedfs
from service.processes import Child, child_environment, free_ports
from tests.deploy.compose import PROJECT
from tests.deploy.rules import alerts, metrics_named, queries, rules
from tests.stand_in.script import Script
from tests.stand_in.stage import Stage, stage

TOKEN = "prometheus-token-of-enough-length"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, seaweedfs: Seaweedfs, run_mark: str) -> Iterator[Stage]:
    """A service at which a job has been done."""
    folder = tmp_path_factory.mktemp("stage")
    with stage(folder, storage=seaweedfs, postgres=None, run=run_mark, report_seconds=0.2, metrics_token=TOKEN) as made:
        made.dispatchers[0].start()
        with made.client() as client:
            job = client.submit(spec(Script(num_steps=2, step_seconds=0.05, start_seconds=0.05)))
            wait(lambda: client.job(job["id"])["status"] == "succeeded")
        yield made


@pytest.fixture(scope="module")
def prometheus(served: Stage, tmp_path_factory: pytest.TempPathFactory, run_mark: str) -> Iterator[httpx.Client]:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("NO PROMETHEUS: apt-get install prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((PROJECT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    [job] = [job for job in config["scrape_configs"] if job["job_name"] == "maestro"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [served.url.removeprefix("http://")]}]
    (folder / "token").write_text(TOKEN)
    job["authorization"]["credentials_file"] = str(folder / "token")
    config["scrape_configs"] = [job]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copytree(PROJECT / "deploy" / "prometheus" / "rules", folder / "rules")
    url = f"http://{LOOPBACK}:{free_ports(1)[0]}"
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        command = [program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        child = Child(
            "Prometheus",
            [*command, f"--web.listen-address={url.removeprefix('http://')}"],
            environment=child_environment(run_mark),
            log=folder / "log",
            is_ready=lambda: answers(client),
        )
        try:
            child.start()
            child.wait_ready(timeout_seconds=60)
            # what is recorded needs two samples of what it is made of
            wait(lambda: query(client, "maestro:ingest_points:rate5m") and query(client, "maestro:requests:rate5m"))
            yield client
        finally:
            child.stop()


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.HTTPError:
        return False


def wait(condition: Callable[[], object], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def query(client: httpx.Client, expression: str) -> list[Any]:
    answer = client.get("/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", (expression, answer)
    result: list[Any] = answer["data"]["result"]
    return result


def test_every_metric_that_is_named_exists(prometheus: httpx.Client) -> None:
    """Ray's are in a cluster alone: `make compose-test` asks for those."""
    named = {name for name in metrics_named() if not name.startswith("ray_")}
    assert len(named) > 20
    assert {name for name in named if not query(prometheus, f'{{__name__="{name}"}}')} == set()


def test_every_panel_can_be_drawn(prometheus: httpx.Client) -> None:
    """All queries are understood; those of our own metrics have an answer, where there was something to count."""
    empty = [text for text in queries() if not query(prometheus, text) and "ray" not in text]
    assert empty == []


def test_rules_are_evaluated_and_a_service_that_is_well_raises_no_alarm(prometheus: httpx.Client) -> None:
    told = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    evaluated = {rule["name"]: rule for group in told for rule in group["rules"]}
    assert set(evaluated) == {rule.get("alert") or rule["record"] for rule in rules()}
    assert {rule["health"] for rule in evaluated.values()} == {"ok"}
    assert {alert["alert"]: evaluated[alert["alert"]]["state"] for alert in alerts()} == {alert["alert"]: "inactive" for alert in alerts()}


def test_a_service_that_has_gone_raises_one(prometheus: httpx.Client, served: Stage) -> None:
    """The last test here: nobody starts it again."""
    served.api.stop()
    wait(lambda: query(prometheus, 'ALERTS{alertname="MaestroApiDown", alertstate="pending"}'))
