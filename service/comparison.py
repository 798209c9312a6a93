"""Two jobs beside each other."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from service.client_errors import JobFailed, Json
from service.wording import between, duration, number
from workers.names import JobStatus


class Comparison(NamedTuple):
    """Of two jobs; pairs are in their order, None where one has no such thing. `spec`: only the fields that differ, by their path."""

    jobs: list[Json]
    spec: dict[str, list[Any]]
    metrics: dict[str, list[Any]]
    duration_seconds: list[float | None]
    images_per_second: list[float | None]


def compare(first: Json, second: Json) -> Comparison:
    both = (first, second)
    specs = [dict(_flat(job["spec"])) for job in both]
    finals: list[Json] = [job.get("metrics") or {} for job in both]
    fields = [name for name in dict.fromkeys([*specs[0], *specs[1]]) if name != "name"]
    return Comparison(
        jobs=[{name: job[name] for name in ("id", "name", "kind", "status")} for job in both],
        spec={name: [spec.get(name) for spec in specs] for name in fields if specs[0].get(name, _NONE) != specs[1].get(name, _NONE)},
        metrics={name: [final.get(name) for final in finals] for name in dict.fromkeys([*finals[0], *finals[1]])},
        duration_seconds=[between(job.get("started_at"), job.get("finished_at")) for job in both],
        images_per_second=[(job.get("progress") or {}).get("images_per_second") for job in both],
    )


_NONE = object()  # a field that is not there differs from one that is null


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Fields by their path, as a user names them: `optim.base_lr`."""
    if isinstance(value, dict) and value:
        for name, each in value.items():
            yield from _flat(each, f"{path}.{name}" if path else str(name))
    else:
        yield path, value


def rows(found: Comparison) -> list[tuple[str, str, str]]:
    """For a table: names, and both values."""
    pairs: dict[str, list[Any]] = {**found.spec, **found.metrics}
    table = [(name, *(_shown(value) for value in pair)) for name, pair in pairs.items()]
    table += [
        ("duration", *(duration(seconds) if seconds is not None else "" for seconds in found.duration_seconds)),
        ("images/s", *(_shown(rate) for rate in found.images_per_second)),
    ]
    return [(name, first, second) for name, first, second in table]


def _shown(value: Any) -> str:
    return "" if value is None else number(value)


def require_success(job: Json) -> None:
    """Raises JobFailed."""
    if job["status"] != JobStatus.SUCCEEDED:
        raise JobFailed(job)
