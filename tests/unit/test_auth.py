import pytest
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient

from service.auth import same_secret
from tests.unit.service_fixtures import API_TOKEN, Service
from workers.contract import attempt_token

OPEN = {"/livez", "/readyz", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}


def all_routes(client: TestClient) -> list[tuple[str, str]]:
    routes = iter_route_contexts(client.app.routes)  # type: ignore[attr-defined]
    return [(method, str(route.path)) for route in routes for method in sorted(route.methods or ())]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {API_TOKEN}"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer \xff"},
    ],
)
def test_no_route_but_the_open_ones_answers_without_a_token(client: TestClient, service: Service, headers: dict[str, str]) -> None:
    job_id = service.submit()
    client.headers.pop("Authorization")
    routes = all_routes(client)
    assert len(routes) > 12
    for method, path in routes:
        filled = path.replace("{job_id}", job_id).replace("{attempt}", "1").replace("{name:path}", "x")
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        answer = client.request(method, filled, headers=encoded)  # type: ignore[arg-type]
        assert (answer.status_code == 401) != (path in OPEN), (method, path, answer.status_code)
        if path not in OPEN:
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["type"] == "urn:maestro:not-authenticated"


def test_tokens_are_good_for_their_own_routes_only(client: TestClient, service: Service) -> None:
    job_id = service.submit()
    service.tick()
    secret = service.settings.secret_key.get_secret_value()
    reports = f"/v1/jobs/{job_id}/attempts/1/reports"
    body = {"incarnation": 1, "sequence": 0}

    def post(token: str) -> int:
        return client.post(reports, json=body, headers={"Authorization": f"Bearer {token}"}).status_code

    assert post(API_TOKEN) == 401
    assert post(attempt_token(secret, job_id, 2)) == 401
    assert post(attempt_token(secret, "other", 1)) == 401
    assert post(attempt_token(secret, job_id, 1)) == 200
    answer = client.get(f"/v1/jobs/{job_id}", headers={"Authorization": f"Bearer {attempt_token(secret, job_id, 1)}"})
    assert answer.status_code == 401


def test_same_secret() -> None:
    assert same_secret("abc", "abc")
    assert not same_secret("abc", "abd")
    assert not same_secret("ä", "abc")
