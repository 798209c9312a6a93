"""`maestro up` and `maestro down` as a person runs them."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from service.home import Home, Run
from service.processes import processes_of_run, sweep
from tests.integration.test_local import is_loopback, listeners


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "home")
    yield home
    if (run := home.read_run()) is not None:
        if run.is_alive():
            os.kill(run.pid, signal.SIGKILL)
        sweep(run.run)


def maestro(*arguments: str, home: Home) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service.cli", *arguments, "--home", str(home.path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def wait_until(condition: Callable[[], object], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def is_live(url: str) -> bool:
    try:
        return httpx.get(f"{url}/livez", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def read_run(home: Home) -> Run:
    run = home.read_run()
    assert run is not None
    return run


def test_up_heals_what_dies_refuses_a_second_and_leaves_nothing(home: Home) -> None:
    up = maestro("up", "--detach", home=home)
    assert up.returncode == 0, up.stderr
    run = read_run(home)
    assert run.url in up.stdout
    assert str(home.client_file) in up.stdout
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    assert is_live(run.url)
    assert httpx.get(f"{run.url}/readyz", trust_env=False, timeout=30).status_code == 200

    found = listeners(run.run)
    assert {"weed", "raylet", "gcs_server"} <= {name for name, _, _ in found}
    assert {entry for entry in found if not is_loopback(entry[1])} == set()

    second = maestro("up", home=home)
    assert second.returncode == 1
    assert f"already up in {home.path} (pid {run.pid}, {run.url})" in second.stderr

    for name in ("API", "dispatcher"):
        pid = read_run(home).pids[name]
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda name=name, pid=pid: read_run(home).pids[name] not in (None, pid))
    wait_until(lambda: is_live(run.url))

    family = [psutil.Process(run.pid), *processes_of_run(run.run)]
    down = maestro("down", home=home)
    assert (down.returncode, down.stdout) == (0, "stopped\n"), down.stderr
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    assert processes_of_run(run.run) == []
    assert not Path(run.ray_temp_dir).exists()
    assert [path for port in run.s3_ports for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")] == []
    assert maestro("down", home=home).stdout == f"nothing is up in {home.path}\n"


def test_what_a_killed_up_left_is_cleared_away_by_the_next_and_ctrl_c_stops_it(home: Home) -> None:
    assert maestro("up", "--detach", home=home).returncode == 0
    killed = read_run(home)
    os.kill(killed.pid, signal.SIGKILL)
    wait_until(lambda: not killed.is_alive())
    assert is_live(killed.url)  # a training is not lost with its watcher
    command = [sys.executable, "-m", "service.cli", "up", "--home", str(home.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as up:
        wait_until(lambda: (run := home.read_run()) is not None and run.pid == up.pid and run.ready, seconds=120)
        run = read_run(home)
        assert processes_of_run(killed.run) == []
        up.send_signal(signal.SIGINT)
        output, _ = up.communicate(timeout=60)
    assert up.returncode == 0
    assert "process(es) that a killed `maestro up` had left" in output
    assert output.endswith("stopped\n")
    assert processes_of_run(run.run) == []


def test_ctrl_c_while_starting_leaves_nothing(home: Home) -> None:
    command = [sys.executable, "-m", "service.cli", "up", "--home", str(home.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as up:
        wait_until(lambda: home.run_file.exists())
        run = read_run(home)
        wait_until(lambda: processes_of_run(run.run))
        up.send_signal(signal.SIGTERM)
        output, _ = up.communicate(timeout=60)
    assert "stopped" in output
    assert processes_of_run(run.run) == []
    assert not home.is_locked()
