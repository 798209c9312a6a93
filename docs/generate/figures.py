"""The page of series that runs tell of, and of the service's figures for Prometheus."""

import tempfile
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from docs.generate import markdown
from docs.generate.markdown import code, sentence, table
from mae_core.series import SERIES
from service.db import Database
from service.migrations.schema import upgrade
from service.telemetry import Telemetry

_SERIES = """`GET /v1/jobs/{id}/metrics` answers a job's series, by step; the newest values are in `maestro watch` and on the dashboard. A
job has those of its kind."""
_FIGURES = """`GET /metrics`, with an admin's token or `MAESTRO_METRICS_TOKEN`. Those of requests, ingest and streams are of one API
process, all others of the whole service (the same from each process: take `max`, not `sum`)."""


def page() -> str:
    return markdown.page(
        "Figures",
        "## Series of a job",
        _SERIES,
        table(["series", "meaning"], [(code(name), sentence(meaning)) for name, meaning in SERIES.items()]),
        "## Figures for Prometheus",
        _FIGURES,
        table(["figure", "type", "meaning"], _figures()),
    )


def _figures() -> list[tuple[str, str, str]]:
    """What an API process with an empty database tells."""
    with tempfile.TemporaryDirectory(prefix="maestro-docs-") as folder:
        database = Database(f"sqlite:///{Path(folder) / 'maestro.db'}")
        try:
            upgrade(database)
            text = Telemetry(database).text().decode()
        finally:
            database.close()
    families = text_string_to_metric_families(text)
    return [
        (code(family.name + ("_total" if family.type == "counter" else "")), family.type, sentence(family.documentation))
        for family in families
        if family.name.startswith("maestro_") and not family.name.endswith("_created")
    ]
