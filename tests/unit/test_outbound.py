"""Whom the service may send to, and that a receiver costs a bounded time and memory whatever it does."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from service import outbound
from service.errors import Invalid
from service.outbound import check_url, is_public, post
from tests.unit.scripted_server import Answer, Request, scripted_server

INNER = [
    *("127.0.0.1", "127.8.9.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254", "0.0.0.0", "255.255.255.255"),
    *("224.0.0.1", "168.63.129.16", "::1", "::", "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "ff02::1"),
    *(
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:80ff:fffe",
    ),
]


@pytest.mark.parametrize("address", INNER)
def test_inner_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.215.14", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        *("https://127.0.0.1/", "https://2130706433/", "https://0x7f.1/", "https://0177.0.0.1/", "https://127.1/", "https://[::1]:8000/"),
        *("https://[::ffff:10.0.0.1]/", "https://169.254.169.254/latest", "http://1.1.1.1/", "https://user:word@example.com/"),
    ],
)
def test_what_no_webhook_is_made_with(url: str) -> None:
    with pytest.raises(Invalid):
        check_url(url, allow_private=False)


def test_names_are_looked_up_when_something_is_sent_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    check_url("https://hooks.example.com/a?b=c", allow_private=False)
    check_url("http://127.0.0.1:8080/", allow_private=True)


def resolves_to(monkeypatch: pytest.MonkeyPatch, *addresses: str, port: int) -> list[str]:
    """The next answer of DNS; and, as after a rebinding, loopback from the second question on. Answers the names that were asked for."""
    asked: list[str] = []

    def answer(host: str, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        found = addresses if len(asked) == 1 else ("127.0.0.1",)
        return [(socket.AF_INET6 if ":" in each else socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in found]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return asked


@pytest.mark.parametrize("addresses", [["10.0.0.1"], ["1.1.1.1", "127.0.0.1"], ["::ffff:127.0.0.1"]])
def test_a_name_of_ours_is_refused(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> None:
    with scripted_server(lambda request: Answer()) as server:
        resolves_to(monkeypatch, *addresses, port=int(server.url.rpartition(":")[2]))
        answer = post("http://inner.example.com/", b"{}", {}, allow_private=False)
    assert (answer.status, server.requests) == (None, [])
    assert "no address of the internet" in answer.detail


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS says a public address first and loopback afterwards."""
    reached: list[Any] = []

    def connect(self: socket.socket, address: Any) -> None:
        reached.append(address)
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(outbound.socket, "socket", type("Spy", (socket.socket,), {"connect": connect}))
    asked = resolves_to(monkeypatch, "93.184.215.14", port=443)
    answer = post("https://rebinding.example.com/", b"{}", {}, allow_private=False)
    assert asked == ["rebinding.example.com"]
    assert reached == [("93.184.215.14", 443)]
    assert answer.detail == "ConnectionRefusedError: nobody there"


def test_what_arrives() -> None:
    with scripted_server(lambda request: Answer(204)) as server:
        answer = post(f"{server.url}/hook?a=b", b'{"a":1}', {"X-A": "b"}, allow_private=True)
    assert (answer.status, answer.is_taken) == (204, True)
    [request] = server.requests
    assert (request.method, request.path, request.body, request.headers["x-a"]) == ("POST", "/hook?a=b", b'{"a":1}', "b")
    assert request.headers["host"] == server.url.removeprefix("http://")


def test_redirects_are_not_followed() -> None:
    with scripted_server(lambda request: Answer(302, headers={"Location": "/other"})) as server:
        answer = post(f"{server.url}/hook", b"{}", {}, allow_private=True)
    assert (answer.status, answer.is_taken) == (302, False)
    assert [request.path for request in server.requests] == ["/hook"]


def test_a_receivers_excuse_is_kept_in_short() -> None:
    def reply(request: Request) -> Answer:
        return Answer(500, body=b"because of " + b"x" * 50_000_000, cut_at=1_000_000)

    with scripted_server(reply) as server:
        answer = post(server.url, b"{}", {}, allow_private=True)
    assert answer.status == 500
    assert "because of xxx" in answer.detail
    assert len(answer.detail) <= outbound.KEPT_BYTES


def test_nobody_there() -> None:
    with scripted_server(lambda request: Answer()) as server:
        pass
    answer = post(server.url, b"{}", {}, allow_private=True)
    assert answer.status is None
    assert answer.detail.startswith("ConnectionRefusedError")
    assert post("http://no-such-name.invalid/", b"{}", {}, allow_private=True).status is None


@contextmanager
def tls_receiver(folder: Path, monkeypatch: pytest.MonkeyPatch, *, name: str) -> Iterator[tuple[str, list[bytes]]]:
    """An https server whose certificate, for `name`, is trusted here: its address as localhost, and what it is sent."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject, now = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]), datetime.now(UTC)
    unsigned = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
    certificate = unsigned.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False).sign(key, hashes.SHA256())
    no_password = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, no_password)
    (folder / "both.pem").write_bytes(pem + certificate.public_bytes(serialization.Encoding.PEM))
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "both.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "both.pem")
    received: list[bytes] = []
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listening.accept()
        try:
            with context.wrap_socket(connection, server_side=True) as secured:
                received.append(secured.recv(10_000))
                secured.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
        except OSError:
            pass  # the certificate was refused

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"https://localhost:{listening.getsockname()[1]}/hook", received
    finally:
        thread.join(30)
        listening.close()


def test_what_arrives_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tls_receiver(tmp_path, monkeypatch, name="localhost") as (url, received):
        answer = post(url, b"{}", {"X-A": "b"}, allow_private=True)
    assert (answer.status, answer.detail) == (204, "204 No Content")
    assert received[0].startswith(b"POST /hook HTTP/1.1\r\nHost: localhost")


def test_a_receiver_with_anothers_certificate_is_told_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tls_receiver(tmp_path, monkeypatch, name="other.example.com") as (url, received):
        answer = post(url, b"{}", {}, allow_private=True)
    assert (answer.status, received) == (None, [])
    assert "certificate" in answer.detail


HEADER_WITHOUT_END = b"HTTP/1.1 200 OK\r\nX-Endless: "
RECORD_BYTES = 2000
HANDSHAKE_WITHOUT_END = b"\x16\x03\x03" + RECORD_BYTES.to_bytes(2, "big")  # a record is to follow


@contextmanager
def dripping_server(begin: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """Answers a byte at a time of what has no end, each within every time-out: its port, and what it could send."""
    sent: list[bytes] = []
    done = threading.Event()
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.sendall(begin)
            try:
                while not done.wait(0.005):
                    connection.sendall(b"x")
                    sent.append(b"x")
            except OSError:
                pass  # it was cut off

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listening.getsockname()[1], sent
    finally:
        done.set()
        thread.join()
        listening.close()


@pytest.mark.parametrize(("scheme", "begin"), [("http", HEADER_WITHOUT_END), ("https", HANDSHAKE_WITHOUT_END)])
def test_a_receiver_that_drips_is_cut_off(monkeypatch: pytest.MonkeyPatch, scheme: str, begin: bytes) -> None:
    """Long before a record has come by the byte."""
    monkeypatch.setattr(outbound, "SEND_SECONDS", 0.2)
    with dripping_server(begin) as (port, sent):
        answer = post(f"{scheme}://127.0.0.1:{port}/", b"{}", {}, allow_private=True)
    assert answer.status is None
    assert len(sent) < RECORD_BYTES


def test_a_receiver_that_says_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "SEND_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert post(f"http://127.0.0.1:{listening.getsockname()[1]}", b"{}", {}, allow_private=True).status is None
