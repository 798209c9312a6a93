"""Requests to addresses that users name: never to our own networks, unless a setting allows it, and bounded in time and size.

A name is resolved once, every address that it has is checked, and the connection goes to one of those: a second answer of its DNS server
cannot lead elsewhere. Redirects are not followed, and proxies of the environment not used.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from service.errors import Invalid

SEND_SECONDS = 10.0  # from the first connection to the last byte
CONNECT_SECONDS = 5.0
KEPT_BYTES = 300  # of a body that says why
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_AZURE_HOST = ipaddress.ip_address("168.63.129.16")  # looks public, and serves machines' secrets to themselves
Addresses = Sequence[tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]]  # as getaddrinfo answers


class NotAllowed(OSError):
    """The address is one of our own networks."""


@dataclass(frozen=True)
class Answer:
    """status None: there was none."""

    status: int | None
    detail: str

    @property
    def is_taken(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


def check_url(url: str, *, allow_private: bool) -> None:
    """What can be said without asking DNS. Raises Invalid."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not allow_private:
        raise Invalid("url", "it is to begin with https://")
    if parts.username is not None or parts.password is not None:
        raise Invalid("url", "it has a user or a password in it; messages are signed instead")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except OSError:
        return  # a name: its addresses are looked at each time
    try:
        _check(found, allow_private=allow_private)
    except NotAllowed as error:
        raise Invalid("url", str(error)) from None


def is_public(text: str) -> bool:
    """Whether an address belongs to the internet; of one that carries an IPv4 address in it, that one counts, too."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return address.is_global and not address.is_multicast and address != _AZURE_HOST


def post(url: str, body: bytes, headers: Mapping[str, str], *, allow_private: bool) -> Answer:
    """Send it once. What goes wrong is in the answer."""
    try:
        return _post(url, body, headers, allow_private=allow_private)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(None, f"{type(error).__name__}: {error}"[:KEPT_BYTES])


def _post(url: str, body: bytes, headers: Mapping[str, str], *, allow_private: bool) -> Answer:
    parts = urlsplit(url)
    assert parts.hostname is not None
    is_tls = parts.scheme == "https"
    kind = http.client.HTTPSConnection if is_tls else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port)
    deadline = time.monotonic() + SEND_SECONDS
    found = socket.getaddrinfo(parts.hostname, connection.port, type=socket.SOCK_STREAM)
    _check(found, allow_private=allow_private)
    connected = _connect(found, deadline)
    try:
        if is_tls:
            connected = ssl.create_default_context().wrap_socket(connected, server_hostname=parts.hostname)
        connection.sock = connected
        with _cut_at(deadline, connected):
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("POST", path, body=body, headers=dict(headers))
            response = connection.getresponse()
            text = b"" if 200 <= response.status < 300 else response.read(KEPT_BYTES)
    finally:
        connected.close()
    said = f": {text.decode(errors='replace')}" if text else ""
    return Answer(response.status, f"{response.status} {response.reason}{said}"[:KEPT_BYTES])


def _check(found: Addresses, *, allow_private: bool) -> None:
    """All addresses of a name, not the first alone: which one is used is nobody's choice."""
    inner = [str(entry[4][0]) for entry in found if not is_public(str(entry[4][0]))]
    if inner and not allow_private:
        raise NotAllowed(f"{inner[0]} is no address of the internet, and this service sends nothing to its own networks")


def _connect(found: Addresses, deadline: float) -> socket.socket:
    failure = OSError("the name has no address")
    for family, kind, protocol, _, address in found:
        seconds = min(CONNECT_SECONDS, deadline - time.monotonic())
        if seconds <= 0:
            raise TimeoutError("no connection in time")
        connected = socket.socket(family, kind, protocol)
        try:
            connected.settimeout(seconds)
            connected.connect(address)
            return connected
        except OSError as error:
            connected.close()
            failure = error
    raise failure


@contextmanager
def _cut_at(deadline: float, connected: socket.socket) -> Iterator[None]:
    """Time-outs of each read alone would let a receiver drip for ever. Raises TimeoutError where it was cut: what was read is not whole."""
    timer = threading.Timer(max(deadline - time.monotonic(), 0.0), _cut, [connected])
    timer.daemon = True
    timer.start()
    try:
        yield
        if time.monotonic() >= deadline:
            raise TimeoutError("no whole answer in time")
    finally:
        timer.cancel()


def _cut(connected: socket.socket) -> None:
    try:
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # not SSLSocket's own, which takes the TLS away under a reader
    except OSError:
        pass  # it has ended by itself
