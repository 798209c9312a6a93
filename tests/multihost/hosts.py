"""Network namespaces as machines: each has an address, a folder for temporary files and shared memory of its own, and a cable to a switch.

Needs root. The switch is a namespace too: nothing of this machine's own network is touched.
"""

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from service.processes import kill

_PREFIX = "maestro-"
_SWITCH = f"{_PREFIX}switch"
_SUBNET = "10.77.0"


@dataclass(frozen=True)
class Host:
    """One machine. Its folder for temporary files is at the same place as those of the others, and empty after each start."""

    name: str
    address: str

    @property
    def namespace(self) -> str:
        return _PREFIX + self.name

    def command(self, *command: str, scratch: Path) -> list[str]:
        """The command as this machine runs it, with what it writes to `scratch` and to /dev/shm for itself alone."""
        script = f'mount -t tmpfs none {scratch} && mount -t tmpfs none /dev/shm && hostname {self.name} && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", script, "sh", *command]

    def cut(self) -> None:
        """Pull the cable: packets vanish, and nobody is told."""
        _ip("-n", _SWITCH, "link", "set", self.name, "down")

    def heal(self) -> None:
        _ip("-n", _SWITCH, "link", "set", self.name, "up")

    def kill(self) -> None:
        """kill -9 of all that runs here, at once."""
        _kill_all(self.namespace)


@contextlib.contextmanager
def network(names: list[str]) -> Iterator[dict[str, Host]]:
    """The machines by name, cabled for the block. What runs there at its end is killed."""
    hosts = {name: Host(name, f"{_SUBNET}.{number}") for number, name in enumerate(names, start=10)}
    with contextlib.ExitStack() as stack:
        _add(_SWITCH, stack)
        _ip("-n", _SWITCH, "link", "add", "bridge", "type", "bridge")
        _ip("-n", _SWITCH, "link", "set", "bridge", "up")
        for host in hosts.values():
            _add(host.namespace, stack)
            stack.callback(host.kill)
            _ip("-n", host.namespace, "link", "add", "eth0", "type", "veth", "peer", "name", host.name, "netns", _SWITCH)
            _ip("-n", _SWITCH, "link", "set", host.name, "master", "bridge", "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
        yield hosts


def _add(namespace: str, stack: contextlib.ExitStack) -> None:
    """In place of one that a killed run has left."""
    if any(line.split()[0] == namespace for line in _ip("netns", "list").splitlines()):
        _kill_all(namespace)
        _ip("netns", "del", namespace)
    _ip("netns", "add", namespace)
    stack.callback(_ip, "netns", "del", namespace)
    _ip("-n", namespace, "link", "set", "lo", "up")


def _kill_all(namespace: str) -> None:
    pids = _ip("netns", "pids", namespace).split()
    kill(psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid)))


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise SystemExit(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
