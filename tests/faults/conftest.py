"""The table of faults × moments: which of its cells run, and what came of them.

A cell is a test marked `@pytest.mark.fault("kill -9 of the API", "running", ci=True)`. Without `--faults` only those with `ci=True` run;
`--outcome FILE` writes the table, or into one that is there what came of the cells that ran.
"""

from collections.abc import Callable, Iterator

import pytest

from tests.conftest import LiveService
from tests.faults.outcome import MOMENTS, Outcomes
from tests.faults.services import OnPostgres, on_postgres
from tests.integration.runs import Json, losses_of, wait_for_end
from tests.postgres import Postgres

_OUTCOMES = pytest.StashKey[Outcomes]()
_NUM_LEFT_OUT = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = []
    for item in items:
        for mark in item.iter_markers("fault"):
            if len(mark.args) != 2 or mark.args[1] not in MOMENTS:
                raise pytest.UsageError(f"{item.nodeid}: fault(fault, moment) with a moment of {', '.join(MOMENTS)}, not {mark.args}")
        marks = list(item.iter_markers("fault"))
        if marks and not config.getoption("--faults") and not any(mark.kwargs.get("ci", False) for mark in marks):
            left_out.append(item)
    config.stash[_NUM_LEFT_OUT] = len(left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    config.stash[_OUTCOMES] = Outcomes(cells_of(item) for item in items)


def cells_of(item: pytest.Item) -> list[tuple[str, str]]:
    """The cells of the table that a test speaks for."""
    return [(mark.args[0], mark.args[1]) for mark in item.iter_markers("fault")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: pytest.TestReport = yield
    item.config.stash[_OUTCOMES].add(cells_of(item), phase=report.when, outcome=report.outcome, seconds=report.duration)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if num_left_out := config.stash.get(_NUM_LEFT_OUT, 0):
        terminalreporter.write_line(f"{num_left_out} faults of tests/faults were left out; --faults (or make faults) runs them all")


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, outcomes = session.config.getoption("--outcome"), session.config.stash.get(_OUTCOMES, None)
    if path is not None and outcomes is not None and not session.config.option.collectonly:
        path.write_text(outcomes.as_markdown(path.read_text() if path.exists() else ""))


@pytest.fixture(scope="session")
def undisturbed(live_service: LiveService) -> Callable[[Json], dict[int, float]]:
    """The losses of a spec's run that nothing disturbs. Each spec runs once in a session."""
    known: dict[str, dict[int, float]] = {}

    def losses(spec: Json) -> dict[int, float]:
        key = repr(sorted((name, value) for name, value in spec.items() if name != "name"))
        if key not in known:
            job = live_service.client.submit(spec | {"name": "undisturbed"})["id"]
            view = wait_for_end(live_service.client, job, seconds=900)  # a busy machine is no fault
            assert view["status"] == "succeeded", view["detail"]
            known[key] = losses_of(live_service.client, job)
        return known[key]

    return losses


@pytest.fixture(scope="session")
def postgres_service(live_service: LiveService, run_mark: str) -> Iterator[OnPostgres]:
    """A second service on the same Ray and object storage, whose database is on a PostgreSQL server of its own."""
    server = Postgres(run=run_mark)
    try:
        with on_postgres(live_service, server.start()) as service:
            yield service
    finally:
        server.close()
