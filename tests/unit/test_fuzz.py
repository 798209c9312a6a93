"""No request that the interface's description allows, and none that it forbids, finds a server error or an answer that is not described."""

from pathlib import Path

import pytest

from tests.unit.fuzz import fuzz
from tests.unit.service_fixtures import Service, make_settings


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_schemathesis_finds_nothing(service: Service, tmp_path: Path) -> None:
    """The short form, as an admin: one that is longer, as a reader too, is `python -m tests.unit.fuzz`."""
    url = service.database.engine.url.render_as_string(hide_password=False)
    service.settings = make_settings(tmp_path, database_url=url, webhooks_to_private_addresses=True, rate_limit=100_000)
    outcome = fuzz(service, tmp_path, max_examples=2, max_seconds=75)  # the coverage phase alone takes 44 s here
    assert outcome.is_clean, outcome.text
    assert outcome.report
