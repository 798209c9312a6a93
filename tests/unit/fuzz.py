"""schemathesis against the API: `python -m tests.unit.fuzz --minutes 5 --database postgresql`; test_fuzz.py is its short form.

What it sends follows from the interface's description, what comes back must be described there too. It knows the ids of what there is.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.app import create_app
from service.db import Database
from service.tokens import Role
from tests.postgres import Postgres
from tests.unit.access import make_token
from tests.unit.furnished import Furnished, furnish
from tests.unit.served import served
from tests.unit.service_fixtures import Service, make_settings, migrate
from workers.contract import attempt_token

SEED = 20260101
REPORTS = "/v1/jobs/{job_id}/attempts/{attempt}/reports"
_HITS = 0.8  # of the ids that are sent are those of something


@dataclass(frozen=True)
class Outcome:
    """What schemathesis says: its own words where it has found something, and how often it asked what."""

    is_clean: bool
    text: str
    report: dict[str, Any]


def fuzz(
    service: Service,
    folder: Path,
    *,
    role: Role = Role.ADMIN,
    max_examples: int,
    max_seconds: int,
) -> Outcome:
    """One run, as a user of that role."""
    there = furnish(service)
    app = create_app(service.settings, storage=service.storage, ray=service.ray)
    secret = service.settings.secret_key.get_secret_value()
    told, config = folder / "report.json", folder / "schemathesis.toml"
    config.write_text(_config(there, token=make_token(service, role), worker=attempt_token(secret, there.reporting, 1)))
    description = folder / "openapi.json"
    description.write_text(json.dumps(app.openapi()))
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", str(description), "--no-color"]
    command += ["--seed", str(SEED), "--max-examples", str(max_examples), "--report-json-path", str(told)]
    command += ["--max-time", str(max_seconds)]
    with served(app) as url:
        done = subprocess.run([*command, "--url", url], cwd=folder, capture_output=True, text=True, check=False)
    return Outcome(done.returncode == 0, done.stdout + done.stderr, json.loads(told.read_text()) if told.exists() else {})


def _config(there: Furnished, *, token: str, worker: str) -> str:
    known = {"jobs": there.jobs, "webhooks": there.webhooks, "tokens": there.tokens, "events": there.events}
    bound = {"path.job_id": "jobs", "path.webhook_id": "webhooks", "path.token_id": "tokens", "path.event_id": "events"}
    lines = ["request-timeout = 60.0", "continue-on-failure = true", 'generation.database = "none"']
    lines += ['suppress-health-check = ["filter_too_much"]', "[headers]"]  # of names with slashes in a path
    lines += [f'Authorization = "Bearer {token}"', "[parameters]"]
    lines += [f'"{name}" = {{ dictionary = "{values}", probability = {_HITS} }}' for name, values in bound.items()]
    lines += [f"[dictionaries.{name}]\nvalues = {json.dumps(values)}" for name, values in known.items()]
    lines += ["[[operations]]", f'include-path = "{REPORTS}"', f'headers = {{ Authorization = "Bearer {worker}" }}']
    lines += [f'parameters = {{ "path.job_id" = "{there.reporting}", "path.attempt" = 1 }}']
    lines += ["[checks]", "positive_data_acceptance.enabled = false"]  # what several fields say together may be wrong, or the time for it
    # a stream of what goes on has no end: tests/unit/test_streams.py reads those
    lines += ["[[operations]]", 'include-path = "/v1/jobs/{job_id}/events"', 'headers = { Accept = "application/json" }']
    lines += ["[[operations]]", 'include-path = "/v1/events"', 'headers = { Accept = "application/json" }']
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.unit.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--role", type=Role, default=Role.ADMIN)
    given = parser.parse_args()
    server = Postgres(run=f"fuzz-{os.getpid()}").start() if given.database == "postgresql" else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            changes = {} if server is None else {"database_url": server.url(server.create())}
            settings = make_settings(Path(folder), rate_limit=100_000, webhooks_to_private_addresses=True, **changes)
            migrate(url := settings.database_url.get_secret_value())
            database = Database(url)
            seconds = int(given.minutes * 60)
            outcome = fuzz(Service(settings, database), Path(folder), role=given.role, max_examples=100, max_seconds=seconds)
            database.close()
    finally:
        if server is not None:
            server.close()
    print(outcome.text)
    raise SystemExit(not outcome.is_clean)


if __name__ == "__main__":
    main()
