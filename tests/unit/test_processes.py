import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.processes import Child, StartError, child_environment, free_ports, is_free, processes_of_run, sweep


@pytest.fixture
def run() -> Iterator[str]:
    mark = secrets.token_hex(8)
    yield mark
    sweep(mark)


def child(run: str, folder: Path, code: str) -> Child:
    ready = folder / "ready"
    program = f"import os, sys, time, signal, subprocess\nfrom pathlib import Path\nready = Path({str(ready)!r})\n{code}"
    return Child(
        "part", [sys.executable, "-c", program], environment=child_environment(run), log=folder / "part.log", is_ready=ready.exists
    )


def test_a_child_is_stopped_with_a_descendant_that_left_its_session(run: str, tmp_path: Path) -> None:
    sleeper = (
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True); ready.touch(); time.sleep(60)"
    )
    part = child(run, tmp_path, sleeper)
    part.start()
    part.wait_ready(timeout_seconds=30)
    assert len(processes_of_run(run)) == 2
    part.stop()
    assert processes_of_run(run) == []
    assert part.pid is None


def test_orphans_of_a_killed_child_are_found(run: str, tmp_path: Path) -> None:
    part = child(run, tmp_path, "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); ready.touch(); time.sleep(60)")
    part.start()
    part.wait_ready(timeout_seconds=30)
    part.kill()
    assert part.exit_code == -9
    assert sweep(run, part="another") == 0
    assert part.sweep() == 1


def test_one_that_ignores_sigterm_is_killed(run: str, tmp_path: Path) -> None:
    part = child(run, tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready.touch(); time.sleep(60)")
    part.start()
    part.wait_ready(timeout_seconds=30)
    part.stop(grace_seconds=0.1)
    assert part.exit_code == -9


def test_one_that_ends_while_starting_is_reported_with_its_log(run: str, tmp_path: Path) -> None:
    part = child(run, tmp_path, "sys.exit('no luck today')")
    part.start()
    with pytest.raises(StartError, match=r"exit code 1 while starting(.|\n)*no luck today"):
        part.wait_ready(timeout_seconds=30)


def test_one_that_never_answers_is_reported(run: str, tmp_path: Path) -> None:
    part = child(run, tmp_path, "time.sleep(60)")
    part.start()
    began_at = time.monotonic()
    with pytest.raises(StartError, match=r"did not answer within 0\.2 s"):
        part.wait_ready(timeout_seconds=0.2)
    assert time.monotonic() - began_at < 5
    part.stop()


def test_children_inherit_neither_keys_nor_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "MAESTRO_API_TOKEN"):
        monkeypatch.setenv(name, "another's")
    environment = child_environment("mark", AWS_ACCESS_KEY_ID="ours")
    assert "another's" not in environment.values()
    assert environment["AWS_ACCESS_KEY_ID"] == "ours"
    assert environment["PATH"] == os.environ["PATH"]


def test_ports_are_free_and_different() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[0]))
        taken.listen()
        assert not is_free(ports[0])
    assert is_free(ports[0])
