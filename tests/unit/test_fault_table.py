"""The table of faults × moments: which cells run, and what is written of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.faults.outcome import Outcomes, commit

CELLS = """
import pytest

@pytest.mark.fault("kill -9 of the API", "running", ci=True)
def test_one(): pass

@pytest.mark.fault("kill -9 of the API", "saving")
def test_other(): assert False

DISK = [pytest.param(moment, marks=pytest.mark.fault("disk full", moment)) for moment in ("starting", "running")]

@pytest.mark.parametrize("moment", DISK)
def test_moments(moment):
    if moment == "starting":
        pytest.skip("no disk")

def test_of_no_cell(): pass
"""


def run_pytest(folder: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A session of its own, with the same options and hooks."""
    (folder / "test_cells.py").write_text(text)
    plugins = ["-p", "tests.conftest", "-p", "tests.faults.conftest", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-c", str(PROJECT / "pyproject.toml"), "--rootdir", str(folder), *plugins, *arguments]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    return subprocess.run([*command, str(folder)], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_only_cells_of_ci_run_unless_all_are_asked_for(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, CELLS)
    assert "2 passed, 3 deselected" in done.stdout
    assert "3 faults of tests/faults were left out; --faults (or make faults) runs them all" in done.stdout


def test_all_cells_and_their_table(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, CELLS, "--faults", "--outcome", str(tmp_path / "outcome.md"))
    assert "1 failed, 3 passed, 1 skipped" in done.stdout
    assert "left out" not in done.stdout
    lines = (tmp_path / "outcome.md").read_text().splitlines()
    at = commit()
    assert lines[-2:] == [f"| kill -9 of the API |  | passed {at} | FAILED {at} |  |", f"| disk full | skipped {at} | passed {at} |  |  |"]
    assert "s: 2 passed, 1 FAILED, 1 skipped." in lines[2]


def test_cells_that_did_not_run_stay_as_they_were() -> None:
    one, new = ("fault", "running"), ("other", "starting")
    before = (
        "# Faults\n\n| fault | starting | running | saving | stopping |\n|---|---|---|---|---|\n| fault |  | FAILED abc | passed abc |  |\n"
    )
    outcomes = Outcomes([[one], [new], [("fault", "saving")]])  # the last one did not come to its turn
    for cell in (one, new):
        outcomes.add([cell], phase="call", outcome="passed", seconds=1)
    at = commit()
    table = outcomes.as_markdown(before)
    assert table.splitlines()[-2:] == [f"| fault |  | passed {at} | passed abc |  |", f"| other | passed {at} |  |  |  |"]
    assert outcomes.as_markdown(table) == table


def test_a_cell_of_no_moment_is_refused(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, CELLS.replace('"saving"', '"sleeping"'))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "not ('kill -9 of the API', 'sleeping')" in done.stderr


def test_a_cell_is_as_good_as_the_worst_of_its_tests() -> None:
    one, two = ("fault", "running"), ("fault", "saving")
    outcomes = Outcomes([[one], [one, two], [two]])
    outcomes.add([one], phase="call", outcome="passed", seconds=1)
    assert outcomes.of(one) == "not run"
    outcomes.add([one, two], phase="call", outcome="passed", seconds=1)
    assert (outcomes.of(one), outcomes.of(two)) == ("passed", "not run")
    outcomes.add([two], phase="call", outcome="passed", seconds=1)
    outcomes.add([two], phase="teardown", outcome="failed", seconds=1)
    assert (outcomes.of(one), outcomes.of(two)) == ("passed", "FAILED")
