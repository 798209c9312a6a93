"""A small form of `make chaos`: seeded faults of every kind, on the stand-in of Ray, with real processes, storage and databases."""

from pathlib import Path

from service.local import Seaweedfs
from tests.faults.chaos import on_stand_in
from tests.postgres import Postgres

NUM_JOBS = 60
HARM_SECONDS = 25.0


def test_no_job_is_lost_doubled_stuck_or_wrong(seaweedfs: Seaweedfs, postgres: Postgres, run_mark: str, tmp_path: Path) -> None:
    """With two dispatchers."""
    servers = {"storage": seaweedfs, "postgres": postgres, "run": run_mark}
    line, verdict = on_stand_in(tmp_path, num_jobs=NUM_JOBS, seed=5, harm_seconds=HARM_SECONDS, **servers)
    assert (line["on"], line["database"], line["jobs"]) == ("stand-in", "postgresql", NUM_JOBS)
    assert line["faults"]
    assert verdict.is_good, vars(verdict)
    assert {name: line[name] for name in ("lost", "doubled", "stuck", "wrong")} == dict.fromkeys(("lost", "doubled", "stuck", "wrong"), 0)
