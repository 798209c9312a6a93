"""One caller's flood is its own affair: 429 for it, answers for the others."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.middleware import Middleware

from service import ratelimit
from service.app import create_app
from service.ratelimit import MAX_CALLERS, Buckets, RateLimit
from service.routes import dashboard
from service.settings import Settings
from service.tokens import Role
from tests.unit.access import bearer, make_token, token_id
from tests.unit.service_fixtures import API_TOKEN, Service
from workers.contract import attempt_token

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
RATE = 2.0
BURST = 20


class Clock:
    """Stands until told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ask(service: Service, clock: Clock) -> Iterator[Any]:
    """Answers of a service with little patience, to (path, token, address)."""
    app = create_app(service.settings, storage=service.storage, ray=service.ray)
    place = next(index for index, each in enumerate(app.user_middleware) if each.cls is RateLimit)
    app.user_middleware[place] = Middleware(RateLimit, rate=RATE, telemetry=app.state.telemetry, clock=clock)
    with TestClient(app) as client:

        def get(
            path: str = "/v1/jobs", *, token: str | None = API_TOKEN, address: str = "192.0.2.1", method: str = "GET", **options: Any
        ) -> Any:
            client._transport.client = (address, 1234)  # type: ignore[attr-defined]
            return client.request(method, path, headers={} if token is None else bearer(token), **options)

        yield get


def statuses(ask: Any, number: int, **options: Any) -> list[int]:
    return [ask(**options).status_code for _ in range(number)]


@ON_SQLITE
def test_a_token_has_its_rate_and_no_other_pays_for_it(ask: Any, service: Service, clock: Clock) -> None:
    other = make_token(service, Role.READER)
    assert statuses(ask, BURST + 1) == [200] * BURST + [429]
    refused = ask()
    assert (refused.headers["content-type"], refused.headers["retry-after"]) == ("application/problem+json", "1")
    assert refused.json() == {
        "type": "urn:maestro:too-many-requests",
        "title": "Too many requests",
        "status": 429,
        "detail": "Wait 1 s, and ask less often.",
    }
    assert len(refused.headers["x-request-id"]) == 16
    assert ask(token=other).status_code == 200
    clock.now += 1.0
    assert statuses(ask, 3) == [200, 200, 429]
    clock.now += 1000.0
    assert statuses(ask, BURST + 1) == [200] * BURST + [429]


@ON_SQLITE
def test_another_way_to_write_a_token_is_the_same_caller(ask: Any, service: Service) -> None:
    assert statuses(ask, BURST) == [200] * BURST
    assert ask(token="  " + API_TOKEN).status_code == 429


@ON_SQLITE
def test_a_refusal_costs_neither_a_body_nor_a_look_at_the_database(ask: Any, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = make_token(service, Role.READER)
    statuses(ask, BURST, token=reader)
    monkeypatch.setattr("service.tokens.recognise", None)
    assert ask("/v1/jobs", token=reader, method="POST", content=b"{" * 2**21).status_code == 429


@ON_SQLITE
@pytest.mark.parametrize("guess", [None, "mst_guess", "x"])
def test_whoever_guesses_is_slowed_down_alone(ask: Any, service: Service, clock: Clock, guess: str | None) -> None:
    assert ask().status_code == 200
    assert statuses(ask, 4, token=guess) == [401, 401, 429, 429]
    assert ask(token=guess).headers["retry-after"] == "5"
    assert statuses(ask, 4) == [200] * 4  # a token that is known, from the same address
    assert ask(token=make_token(service, Role.READER)).status_code == 429  # a stranger might be one more guess
    assert ask(token=make_token(service, Role.READER), address="192.0.2.2").status_code == 200
    clock.now += 5.0
    assert statuses(ask, 2, token=f"{guess}2") == [401, 429]


@ON_SQLITE
def test_strangers_with_good_tokens_do_not_wait_for_each_other(ask: Any, service: Service) -> None:
    """As the workers of many jobs, from one cluster."""
    assert {ask(token=make_token(service, Role.READER)).status_code for _ in range(10)} == {200}


@ON_SQLITE
def test_an_ipv6_network_is_one_address(ask: Any) -> None:
    found = [ask(token=None, address=f"2001:db8:1:2::{number}").status_code for number in range(4)]
    assert found == [401, 401, 429, 429]
    assert ask(token=None, address="2001:db8:1:3::1").status_code == 401


@ON_SQLITE
def test_a_token_that_was_revoked_is_a_stranger_again(ask: Any, service: Service) -> None:
    token = make_token(service, Role.READER)
    assert statuses(ask, 2, token=token) == [200, 200]
    assert ask(f"/v1/tokens/{token_id(token)}", method="DELETE").status_code == 200
    assert statuses(ask, 4, token=token) == [401, 401, 429, 429]


@ON_SQLITE
def test_what_is_open_to_all_is_limited_by_address_but_for_the_watchers(ask: Any) -> None:
    assert statuses(ask, 4, path="/openapi.json", token=None) == [200, 200, 429, 429]
    assert {
        ask(path, token=None).status_code
        for path in ("/livez", "/readyz", "/", f"/dashboard/{dashboard.version()}/app.js")
        for _ in range(30)
    } == {200}


@ON_SQLITE
def test_workers_are_limited_as_others_are(ask: Any, service: Service) -> None:
    job_id = service.start()
    token = attempt_token(service.settings.secret_key.get_secret_value(), job_id, 1)

    def report(number: int) -> int:
        body = {"incarnation": 1, "sequence": number}
        status: int = ask(f"/v1/jobs/{job_id}/attempts/1/reports", token=token, method="POST", json=body).status_code
        return status

    assert [report(number) for number in range(BURST + 2)] == [200] * BURST + [429, 429]


@ON_SQLITE
def test_refusals_are_counted(ask: Any) -> None:
    assert ask().status_code == 200
    assert statuses(ask, 4, token=None) == [401, 401, 429, 429]
    assert 'maestro_requests_limited_total{of="address"} 2.0' in ask("/metrics").text


def test_memory_is_bounded(clock: Clock) -> None:
    buckets = Buckets(1.0, clock=clock)
    for number in range(MAX_CALLERS + 1):
        buckets.take(number.to_bytes(4, "big"))
        buckets.take(b"always")
    assert len(buckets._levels) == MAX_CALLERS
    assert b"always" in buckets
    assert (0).to_bytes(4, "big") not in buckets
    assert buckets.wait(b"always") > 0


def test_the_usual_rate_lets_a_thousand_watchers_come_at_once() -> None:
    assert Settings.model_fields["rate_limit"].default * ratelimit.BURST_SECONDS >= 2000
