import json
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service import up
from service.cli import app
from service.home import Run
from service.processes import Child
from service.up import Keeper, restart_pause


class Fake(Child):
    """A child that ends when told to, without a process."""

    ended: int | None = None

    @property
    def exit_code(self) -> int | None:
        return self.ended


class FakePart:
    def __init__(self) -> None:
        self.child = Fake("API", [], environment={}, log=Path("api.log"), is_ready=lambda: True)
        self.num_launches = 0

    def launch(self) -> None:
        self.num_launches += 1
        self.child.ended = None

    def stop(self) -> None: ...


@pytest.fixture
def part() -> FakePart:
    return FakePart()


def test_what_runs_is_left_alone(part: FakePart) -> None:
    keeper = Keeper(part, say=lambda _: None)
    assert not any(keeper.tick(now) for now in (0.0, 10.0))
    assert part.num_launches == 0


def test_what_ends_is_started_again_with_growing_pauses(part: FakePart) -> None:
    said: list[str] = []
    keeper = Keeper(part, say=said.append)
    now, launched_at = 100.0, []
    while len(launched_at) < 5:
        part.child.ended = -9
        if keeper.tick(now):
            launched_at.append(now)
        now += 0.5
    assert [later - earlier for earlier, later in pairwise(launched_at)] == [1.5, 2.5, 4.5, 8.5]
    assert said[0] == "API ended with exit code -9; starting it again (log: api.log)"
    assert "in 8 s" in said[-1]


def test_pauses_begin_anew_after_a_stable_minute(part: FakePart) -> None:
    keeper = Keeper(part, say=lambda _: None)
    for now in (100.0, 102.0):
        part.child.ended = 1
        keeper.tick(now)
    keeper.tick(110.0)
    part.child.ended = 1
    assert keeper.tick(200.0)


def test_pauses_are_bounded() -> None:
    assert [restart_pause(number) for number in (0, 1, 2, 6, 50)] == [0.0, 1.0, 2.0, 30.0, 30.0]


def maestro(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def test_up_and_down_as_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run(
        run="r",
        pid=1,
        started_at=0.0,
        url="http://127.0.0.1:8470",
        s3_endpoint="http://127.0.0.1:1",
        ray_url="http://127.0.0.1:2",
        ray_temp_dir="",
        s3_ports=[],
    )
    monkeypatch.setattr(up, "start_detached", lambda home, *, port: run)
    assert json.loads(maestro("up", "--detach", "--json", "--home", str(tmp_path))[1]) == {
        "url": "http://127.0.0.1:8470",
        "dashboard": "http://127.0.0.1:8470/",
        "s3_endpoint": "http://127.0.0.1:1",
        "ray_url": "http://127.0.0.1:2",
        "home": str(tmp_path),
    }
    code, out, err = maestro("up", "--json", "--home", str(tmp_path))
    assert (code, out, "--json goes with --detach" in err) == (2, "", True)
    told = {"stopped": False, "detail": f"nothing is up in {tmp_path}"}
    assert json.loads(maestro("down", "--json", "--home", str(tmp_path))[1]) == told
