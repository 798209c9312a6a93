"""The interface's description: names that stay, the one form of errors, examples that work."""

import re
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.openapi import EXAMPLES
from tests.unit.service_fixtures import Service

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

# what generated clients are made of: none of these is renamed
OPERATIONS = {
    *("submit_job", "list_jobs", "get_job", "change_job", "delete_job", "retry_job", "cancel_job", "pause_job", "resume_job"),
    *("list_events", "read_metrics", "read_logs", "list_logs", "list_artifacts", "get_artifact", "add_report"),
    *("pin_artifact", "unpin_artifact", "list_checkpoints", "list_reconstructions"),
    *("list_recipes", "get_cluster", "estimate", "create_token", "list_tokens", "revoke_token", "live", "ready"),
    *("create_webhook", "list_webhooks", "get_webhook", "change_webhook", "delete_webhook", "list_deliveries", "redeliver", "scrape"),
}


def described(client: TestClient) -> dict[str, Any]:
    schema: dict[str, Any] = client.get("/openapi.json").json()
    return schema


def operations(client: TestClient) -> dict[str, tuple[str, dict[str, Any]]]:
    """(path, operation) by id."""
    found = [(path, operation) for path, methods in described(client)["paths"].items() for operation in methods.values()]
    by_id = {operation["operationId"]: (path, operation) for path, operation in found}
    assert len(by_id) == len(found), "no two have one name"
    return by_id


def test_operation_ids_stay(client: TestClient) -> None:
    assert set(operations(client)) >= OPERATIONS
    assert all(re.fullmatch(r"[a-z][a-z_]*", name) for name in operations(client))


def test_every_operation_tells_its_errors_as_problems(client: TestClient) -> None:
    schema = described(client)
    for name, (path, operation) in operations(client).items():
        if not path.startswith("/v1"):
            continue
        answers = operation["responses"]
        assert {"400", "401", "403", "404", "413", "422", "503"} <= set(answers), name
        for status, answer in answers.items():
            if int(status) >= 400:
                assert list(answer["content"]) == ["application/problem+json"], (name, status)
                reference = answer["content"]["application/problem+json"]["schema"]["$ref"]
                assert reference.rpartition("/")[2] in schema["components"]["schemas"]


def test_all_references_are_there(client: TestClient) -> None:
    text = client.get("/openapi.json").text
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert names <= set(described(client)["components"]["schemas"])


def test_examples_are_taken_as_they_are(client: TestClient, service: Service) -> None:
    job_id = service.submit()
    for (path, method), examples in EXAMPLES.items():
        told = described(client)["paths"][path][method]["requestBody"]["content"]["application/json"]["examples"]
        assert told == examples
        for name, example in examples.items():
            answer = client.request(method, path.format(job_id=job_id), json=example["value"], headers={"If-Match": "*"})
            assert answer.status_code in (200, 201), (path, name, answer.text)
