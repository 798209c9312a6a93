"""`maestro data`: the core's commands in a child process."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mae_core.data import __main__ as core
from service import data_commands
from service.cli import app
from service.home import Home, Run
from tests.unit.core_fixtures import corrupt, image_folder


def maestro(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["data", *arguments])


def test_pack_and_show_and_verify(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = image_folder(tmp_path / "raw", per_class=3)
    corrupt(folder / "cat" / "001.png")
    assert maestro("pack", str(folder), str(tmp_path / "packed"), "--processes", "1").exit_code == 0
    assert "5 images in 1 shards" in capfd.readouterr().err
    assert maestro("show", str(tmp_path / "packed"), "--json").exit_code == 0
    shown = json.loads(capfd.readouterr().out)
    assert (shown["num_images"], shown["num_unreadable"], shown["classes"]) == (5, 1, ["cat", "dog"])
    (tmp_path / "packed" / "sizes.bin").write_bytes(b"")
    assert maestro("verify", str(tmp_path / "packed")).exit_code == 1
    assert "sizes.bin is damaged" in capfd.readouterr().out


def test_wrong_usage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert maestro("pack", str(tmp_path), "--resize", "0").exit_code == 2
    assert maestro("pack", str(tmp_path / "nowhere"), str(tmp_path / "packed")).exit_code == 1
    assert "error: data: the folder" in capfd.readouterr().err


def test_progress_as_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image_folder(tmp_path / "raw", per_class=3)
    assert core.main(["pack", str(folder), str(tmp_path / "packed"), "--processes", "1", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told == [{"shards": done, "num_shards": 1, "images": 6 * done, "unreadable": 0} for done in (0, 1)]


def test_storage_of_this_machine_unless_the_user_has_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "MAESTRO_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MAESTRO_HOME", str(tmp_path))
    assert data_commands._storage_of_this_machine() == {}
    home = Home(tmp_path)
    home.prepare()
    run = {
        "run": "r",
        "pid": 1,
        "started_at": 0.0,
        "url": "",
        "s3_endpoint": "http://127.0.0.1:1",
        "ray_url": "",
        "ray_temp_dir": "",
        "s3_ports": [],
    }
    home.write_run(Run.model_validate(run))
    monkeypatch.setattr(Run, "is_alive", lambda _: True)
    found = data_commands._storage_of_this_machine()
    assert (found["AWS_ENDPOINT_URL"], found["AWS_ACCESS_KEY_ID"]) == ("http://127.0.0.1:1", home.secrets().s3_access_key)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of the user")
    assert data_commands._storage_of_this_machine() == {}
