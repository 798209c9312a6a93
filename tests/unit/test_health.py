from fastapi.testclient import TestClient

from service.migrations.schema import downgrade
from service.routes.health import ReadinessCache
from service.views import Readiness
from tests.unit.service_fixtures import Service


def test_alive(client: TestClient, service: Service) -> None:
    service.ray.is_down = service.storage.is_down = True
    assert client.get("/livez").status_code == 200


def test_ready(client: TestClient) -> None:
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "missing": {}})


def test_what_is_missing_is_named(client: TestClient, service: Service) -> None:
    service.ray.is_down = service.storage.is_down = True
    downgrade(service.database)
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert set(answer.json()["missing"]) == {"database", "storage", "ray"}
    assert "python -m service.migrations" in answer.json()["missing"]["database"]


def test_askers_do_not_become_load_on_what_is_asked() -> None:
    cache, looks = ReadinessCache(), []

    def look() -> Readiness:
        looks.append(1)
        return Readiness(ready=True, missing={})

    assert [cache.get(look).ready for _ in range(100)] == [True] * 100
    assert len(looks) == 1
