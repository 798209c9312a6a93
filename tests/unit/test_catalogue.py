"""Recipes, and the cluster with those who hold it."""

from dataclasses import replace
from typing import Any

from fastapi.testclient import TestClient

from mae_core.config import RUN_SPEC
from service.tokens import Role
from tests.unit.access import bearer, make_token
from tests.unit.service_fixtures import PRETRAIN, Service


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
