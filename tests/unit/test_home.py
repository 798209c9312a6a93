import json
import os
from pathlib import Path

import psutil
import pytest

from service.home import Home, HomeError
from service.processes import ProcessId


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.prepare()
    return home


def test_a_home_is_for_its_owner_only(home: Home) -> None:
    home.secrets()
    home.write_client(url="http://127.0.0.1:1", token="token")
    assert home.path.stat().st_mode & 0o777 == 0o700
    assert {file.name: file.stat().st_mode & 0o777 for file in home.path.glob("*.json")} == {"secrets.json": 0o600, "client.json": 0o600}
    assert json.loads(home.client_file.read_text()) == {"url": "http://127.0.0.1:1", "token": "token"}


def test_keys_are_made_once_and_long_enough(home: Home) -> None:
    keys = home.secrets()
    assert home.secrets() == keys
    assert len(keys.secret_key) >= 32
    assert len(keys.api_token) >= 20


def test_damaged_keys_are_not_replaced(home: Home) -> None:
    (home.path / "secrets.json").write_text('{"secret_key": ')
    with pytest.raises(HomeError, match="damaged"):
        home.secrets()


def test_only_one_holds_a_home(home: Home) -> None:
    assert not home.is_locked()
    home.lock()
    other = Home(home.path)
    assert other.is_locked()
    with pytest.raises(HomeError, match=f"already up in {home.path}"):
        other.lock()
    home.unlock()
    other.lock()
    other.unlock()


def test_a_home_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HomeError, match="set MAESTRO_HOME"):
        Home(tmp_path / "file" / "home").prepare()


def test_a_process_is_known_by_its_start_too() -> None:
    me = ProcessId.of(os.getpid())
    assert me.is_alive()
    assert not ProcessId(me.pid, me.started_at - 100).is_alive()
    unused = next(pid for pid in range(4_000_000, 2, -1) if not psutil.pid_exists(pid))
    assert not ProcessId(unused, me.started_at).is_alive()
