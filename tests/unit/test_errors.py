from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from service import errors, jobs
from tests.unit.service_fixtures import PRETRAIN, PROBE


def problem(client: TestClient, body: dict[str, Any]) -> dict[str, Any]:
    answer = client.post("/v1/jobs", json=body)
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = answer.json()
    assert found["type"] == "urn:maestro:invalid-request"
    assert found["status"] == 422
    return found


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"model": {"arch": "vit_tiny_patch2", "image_size": 9, "in_chans": 1}}, "model.image_size", "use 8 or 10"),
        ({"model": {"arch": "vit_big_patch2", "image_size": 8, "in_chans": 1}}, "model.arch", "vit_<size>_patch<n>"),
        ({"nam": "x"}, "nam", "did you mean name?"),
        ({"model": {"arch": "vit_tiny_patch2", "image_size": 8, "in_chan": 1}}, "model.in_chan", "did you mean model.in_chans?"),
        (
            {"optim": {"epochs": 2, "batch_size": 63, "warmup_epochs": 1}, "resources": {"num_workers": 2}},
            "optim.batch_size",
            "use 62 or 64",
        ),
        ({"optim": {"epochs": 2, "batch_size": 64}}, "optim.warmup_epochs", "less than epochs 2"),
        ({"data": {"source": "photos"}}, "data.source", "absolute path"),
        ({"data": {"source": "digits", "validation": "digits"}}, "data.validation", "leave it out"),
        ({"name": ""}, "name", "at least 1 character"),
        ({"kind": "train"}, "kind", "pretrain, probe, finetune"),
        ({"data": {"source": "digits", "transform": {"crop_scale": [1, 0.2]}}}, "data.transform.crop_scale", "low <= high"),
    ],
)
def test_a_bad_spec_names_the_field_as_the_user_writes_it(client: TestClient, change: dict[str, Any], field: str, says: str) -> None:
    found = problem(client, PRETRAIN | change)
    assert [error["field"] for error in found["errors"]] == [field]
    assert says in found["errors"][0]["message"]
    assert field in found["detail"]


def test_a_spec_without_a_kind(client: TestClient) -> None:
    assert problem(client, {"name": "x"})["errors"][0]["field"] == "kind"


def test_a_probe_is_told_what_it_lacks(client: TestClient) -> None:
    assert problem(client, PROBE)["errors"] == [{"field": "encoder", "message": "Field required"}]
    found = problem(client, PROBE | {"encoder": {"init": "random"}})
    assert found["errors"][0]["field"] == "model"
    found = problem(client, PROBE | {"encoder": {"job": "a", "init": "random"}})
    assert found["errors"][0]["field"] == "encoder"


def test_what_is_not_json(client: TestClient) -> None:
    answer = client.post("/v1/jobs", content=b'{"kind": ', headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "body"


def test_a_query_that_cannot_be(client: TestClient) -> None:
    answer = client.get("/v1/jobs", params={"limit": 500})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "limit"


def test_unknown_paths_and_jobs_are_problems_too(client: TestClient) -> None:
    for path in ("/v1/jobs/nope", "/v2", "/v1/jobs/nope/metrics", "/v1/jobs/nope/artifacts", "/v1/jobs/nope/logs", "/v1/jobs/nope/events"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["type"]) == (404, "urn:maestro:not-found"), path
        assert answer.headers["content-type"] == "application/problem+json"
    answer = client.put("/v1/jobs")
    assert (answer.status_code, answer.json()["type"]) == (405, "urn:maestro:method-not-allowed")
    assert answer.headers["allow"]


def test_types_are_those_of_all_problems_and_of_the_framework() -> None:
    assert {"invalid-request", "stale-attempt", "storage-unreachable", "content-too-large", "internal-error"} <= set(errors.all_problems())


def test_an_unexpected_error_tells_nothing_of_the_inside(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("a secret inside")

    monkeypatch.setattr(jobs, "get_if_changed", fail)
    answer = client.get("/v1/jobs/x")
    assert answer.status_code == 500
    assert answer.json()["type"] == "urn:maestro:internal-error"
    assert "secret" not in answer.text


def test_a_database_that_does_not_answer_is_503(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OperationalError("SELECT secret", {}, Exception("database is locked"))

    monkeypatch.setattr(jobs, "get_if_changed", fail)
    answer = client.get("/v1/jobs/x")
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert "secret" not in answer.text
