"""Recipes, and the cluster with those who hold it."""

from dataclasses import replace
from typing import Any

from fastapi.testclient import TestClient

from mae_core.config import RUN_SPEC
from service.tokens import Role
from tests.unit.access import bearer, make_token
from tests.unit.service_fixtures import PRETRAIN, PROBE, Service


def test_recipes_say_what_specs_get(client: TestClient) -> None:
    recipes = {recipe["name"]: recipe for recipe in client.get("/v1/recipes").json()["recipes"]}
    assert {name: recipe["default_for"] for name, recipe in recipes.items()} == {
        "paper": ["base", "large", "huge"],
        "small": ["tiny", "small"],
    }
    spec = RUN_SPEC.validate_python(PRETRAIN).model_dump(mode="json")
    small = recipes["small"]["kinds"]["pretrain"]
    assert small["masking"].items() <= spec["masking"].items()
    assert small["optim"]["base_lr"] == spec["optim"]["base_lr"]
    assert recipes["paper"]["by_size"]["huge"]["finetune"]["optim"]["drop_path"] == 0.3
    assert set(recipes["paper"]["by_size"]) == {"large", "huge"}
    assert recipes["small"]["by_size"] == {}
    assert set(recipes["paper"]["kinds"]) == {"pretrain", "probe", "finetune", "evaluate", "embed"}


def test_the_cluster_and_who_holds_it(client: TestClient, service: Service) -> None:
    ours, theirs = service.start(project="ours", name="mine"), service.start(project="theirs", resources={"num_workers": 2})
    service.submit(project="ours", resources={"num_workers": 8})
    service.tick(1)
    service.ray.cluster = replace(service.ray.cluster, used_cpus=4.0)

    def ask(headers: dict[str, str], **params: str) -> Any:
        answer = client.get("/v1/cluster", headers=headers, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    seen = ask(bearer(make_token(service, Role.READER, "ours")))
    [run] = seen["runs"]
    assert (run["job"], run["name"], run["attempt"], run["num_cpus"], run["num_gpus"]) == (ours, "mine", 1, 1.0, 0.0)
    assert seen["other_runs"] == {"num_cpus": 2.0, "num_gpus": 0.0}
    assert (seen["total"], seen["used"]) == ({"num_cpus": 8.0, "num_gpus": 0.0}, {"num_cpus": 4.0, "num_gpus": 0.0})
    assert seen["nodes"] == [{"id": "head", "is_head": True, "num_cpus": 8.0, "num_gpus": 0.0}]
    assert seen["num_waiting"] == 1
    assert theirs not in str(seen)
    whole = ask({})
    assert ({run["job"] for run in whole["runs"]}, whole["other_runs"]["num_cpus"]) == ({ours, theirs}, 0.0)
    assert [run["job"] for run in ask({}, project="theirs")["runs"]] == [theirs]
    service.ray.is_down = True
    answer = client.get("/v1/cluster")
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:maestro:ray-unreachable")


def estimate(client: TestClient, spec: dict[str, Any], **params: Any) -> Any:
    answer = client.post("/v1/estimates", json=spec, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_estimate_keeps_nothing_and_says_what_a_job_would_be(client: TestClient, service: Service) -> None:
    found = estimate(client, PRETRAIN)
    assert client.get("/v1/jobs").json()["jobs"] == []
    job = client.post("/v1/jobs", json=PRETRAIN).json()
    assert found["spec"] == job["spec"]
    assert found["num_trained_parameters"] < found["num_parameters"]
    assert found["hours"] == 2 * 1797 / found["images_per_second"] / 3600
    assert (found["needs"], found["fits"]) == ({"num_cpus": 1.0, "num_gpus": 0.0}, "now")
    photos = PRETRAIN | {"data": {"source": "/photos"}}
    assert estimate(client, photos)["hours"] is None
    assert estimate(client, photos, num_images=1000)["hours"] == 2 * 1000 / found["images_per_second"] / 3600
    assert client.post("/v1/estimates", json=PRETRAIN | {"name": ""}).status_code == 422
    assert client.post("/v1/estimates", json=PROBE | {"encoder": {"job": "none"}}).json()["errors"][0]["field"] == "encoder.job"


def test_an_estimate_takes_the_model_of_a_jobs_encoder(client: TestClient, service: Service) -> None:
    parent = service.submit()
    found = estimate(client, PROBE | {"encoder": {"job": parent}})
    assert found["spec"]["model"]["arch"] == PRETRAIN["model"]["arch"]
    assert (found["num_trained_parameters"], found["memory_bytes_per_worker"]) == (0, None)


def test_an_estimate_says_whether_there_is_room(client: TestClient, service: Service) -> None:
    def fits(**resources: int) -> tuple[str, str]:
        found = estimate(client, PRETRAIN | {"resources": resources})
        return found["fits"], found["detail"]

    assert fits(num_workers=8)[0] == "now"
    service.ray.cluster = replace(service.ray.cluster, used_cpus=3.0)
    assert fits(num_workers=8) == ("later", "8 workers with 1 CPUs each; free are 5 CPUs and 0 GPUs")
    assert fits(num_workers=4)[0] == "now"
    assert fits(num_workers=4, cpus_per_worker=3) == ("never", "4 workers with 3 CPUs each; the cluster's machines have room for 2")
    assert fits(gpus_per_worker=1)[0] == "never"
    service.ray.is_down = True
    assert fits(num_workers=1)[0] == "unknown"
