"""What reaches the API over real connections: bodies without end, heads without end, and whoever sends slowly."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from service import bodylimit, connections
from service.app import create_app
from tests.unit.access import bearer
from tests.unit.served import served
from tests.unit.service_fixtures import API_TOKEN, Service

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
MEGABYTE = b"x" * 10**6
AUTHORIZED = f"Authorization: Bearer {API_TOKEN}"
JSON = "Content-Type: application/json"


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with served(create_app(service.settings, storage=service.storage, ray=service.ray)) as url:
        yield url


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=30) as connection:
        yield connection


def head(method: str, path: str, *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode("latin-1")


def answer_of(connection: socket.socket) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and content of what comes."""
    with connection.makefile("rb") as stream:
        status = int(stream.readline().split()[1])
        headers: dict[str, str] = {}
        while line := stream.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        content = json.loads(stream.read(int(headers["content-length"])))
    assert headers["content-type"] == "application/problem+json"
    assert content["status"] == status
    return status, headers, content


def is_closed(connection: socket.socket) -> bool:
    """Also where it does not read what is still on its way."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/x/attempts/1/reports"])
def test_a_hundred_megabytes_are_refused_before_they_have_come(url: str, path: str, is_chunked: bool) -> None:
    announced = "Transfer-Encoding: chunked" if is_chunked else "Content-Length: 100000000"
    with connected(url) as connection:
        connection.sendall(head("POST", path, AUTHORIZED, JSON, announced))
        for _ in range(5 if is_chunked else 0):
            connection.sendall(b"%x\r\n%s\r\n" % (len(MEGABYTE), MEGABYTE))
        status, _, content = answer_of(connection)
    assert (status, content["type"]) == (413, "urn:maestro:content-too-large")
    assert "MiB" in content["detail"]


def test_what_follows_a_refusal_is_thrown_away_and_the_connection_goes_on(url: str) -> None:
    with connected(url) as connection:
        connection.sendall(head("POST", "/v1/jobs", AUTHORIZED, JSON, "Content-Length: 100000000"))
        assert answer_of(connection)[0] == 413
        for _ in range(100):
            connection.sendall(MEGABYTE)
        connection.sendall(head("GET", "/v1/nowhere"))
        assert answer_of(connection)[0] == 404


def test_memory_does_not_grow_with_bodies(url: str) -> None:
    process = psutil.Process(os.getpid())
    with httpx.Client(base_url=url, headers=bearer(API_TOKEN), trust_env=False, timeout=60) as client:
        client.post("/v1/jobs", content=MEGABYTE)
        before = process.memory_info().rss
        for _ in range(3):
            answer = client.post("/v1/jobs", content=(MEGABYTE for _ in range(100)))
            assert answer.status_code == 413
    assert process.memory_info().rss - before < 50 * 10**6


def test_who_sends_a_body_slowly_is_told(service: Service) -> None:
    app = create_app(service.settings, storage=service.storage, ray=service.ray)
    next(each for each in app.user_middleware if each.cls is bodylimit.BodyLimit).kwargs["max_seconds"] = 0.2
    with served(app) as url, connected(url) as connection:
        connection.sendall(head("POST", "/v1/jobs", AUTHORIZED, JSON, "Content-Length: 100") + b"{")
        status, _, content = answer_of(connection)
    assert (status, content["type"]) == (408, "urn:maestro:body-too-slow")


@pytest.mark.parametrize(
    "sent", [b"", b"GET /livez HTTP/1.1\r\nX-Slow: ", b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"]
)
def test_who_sends_a_head_slowly_or_nothing_is_cut_off(url: str, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """Also who has an answer and never ends its body."""
    monkeypatch.setattr(connections, "PATIENCE_SECONDS", 0.2)
    with connected(url) as connection:
        connection.sendall(sent)
        if sent.startswith(b"POST"):
            assert answer_of(connection)[0] == 404
        assert is_closed(connection)


def test_a_stream_and_a_connection_that_stays_open_are_not_cut_off(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PATIENCE_SECONDS", 0.2)
    with connected(url) as connection:
        for _ in range(3):
            connection.sendall(head("GET", "/v1/nowhere"))
            assert answer_of(connection)[0] == 404


@pytest.mark.parametrize(
    "sent",
    [
        head("GET", "/livez", "X-Bomb: " + "b" * 10**6),
        head("GET", "/livez", *(f"X-{number}: {'b' * 100}" for number in range(10_000))),
        head("GET", "/v1/jobs?" + "&".join(["label=a"] * 10**5)),
        head("GET", "/" + "a" * 10**6),
        b"\x16\x03\x01\x02\x00 a TLS handshake\r\n\r\n",
        b"GET\r\n\r\n",
        head("POST", "/v1/jobs", AUTHORIZED, JSON, "Content-Length: -1"),
        head("POST", "/v1/jobs", AUTHORIZED, JSON, "Content-Length: 1", "Content-Length: 2"),
        head("POST", "/v1/jobs", AUTHORIZED, JSON, "Transfer-Encoding: chunked") + b"zz\r\n",
        head("GET", "/livez", "Bad Name: x"),
    ],
)
def test_what_is_no_http_is_a_problem_too(url: str, sent: bytes) -> None:
    with connected(url) as connection:
        connection.sendall(sent)
        status, headers, content = answer_of(connection)
        assert (status, content["type"], headers["connection"]) == (400, "urn:maestro:bad-request", "close")
        assert is_closed(connection)
