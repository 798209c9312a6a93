"""A small form of `make chaos`: seeded faults of every kind, on the stand-in of Ray, with real processes, storage and databases."""

from pathlib import Path

import pytest

from service.local import Seaweedfs
from tests.faults.chaos import on_stand_in

NUM_JOBS = 60
HARM_SECONDS = 25.0


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_no_job_is_lost_doubled_stuck_or_wrong(
    database: str, request: pytest.FixtureRequest, seaweedfs: Seaweedfs, run_mark: str, tmp_path: Path
) -> None:
    postgres = request.getfixturevalue("postgres") if database == "postgresql" else None
    servers = {"storage": seaweedfs, "postgres": postgres, "run": run_mark}
    line, verdict = on_stand_in(tmp_path, num_jobs=NUM_JOBS, seed=5, harm_seconds=HARM_SECONDS, **servers)
    assert (line["on"], line["database"], line["jobs"]) == ("stand-in", database, NUM_JOBS)
    assert line["faults"]
    assert verdict.is_good, vars(verdict)
    assert {name: line[name] for name in ("lost", "doubled", "stuck", "wrong")} == dict.fromkeys(("lost", "doubled", "stuck", "wrong"), 0)
