"""What a run's progress, its events and its end say to a person who watches it."""

from typing import Any

from service.client import JobFailed, Json
from service.wording import duration, number
from workers.contract import EventType, JobStatus

_TOLD = {
    EventType.WORKERS_FAILED,
    EventType.RUN_HUNG,
    EventType.IMAGES_SKIPPED,
    EventType.UPLOAD_DELAYED,
    EventType.UPLOAD_RECOVERED,
    EventType.SAVE_FAILED,
    EventType.STEPS_DROPPED,
    EventType.WENT_BACK,
    EventType.EVALUATED,
    EventType.RESULT_COMMITTED,
}


def progress_figures(progress: Json, *, with_eta: bool = True) -> str:
    """`step 120/400  loss 0.4711  812 images/s  ETA 0:21`; what is not known yet is left out."""
    parts = [f"step {progress['step']}/{progress['num_steps']}"]
    if (loss := progress.get("loss")) is not None:
        parts.append(f"loss {float(loss):.4f}")
    if (rate := progress.get("images_per_second")) is not None:
        parts.append(f"{float(rate):.0f} images/s")
    if with_eta and (eta := progress.get("eta_seconds")) is not None:
        parts.append(f"ETA {duration(float(eta))}")
    return "  ".join(parts)


def event_line(event: Json) -> str:
    """What an event says to a person; empty for those that only programs need."""
    kind, data = event.get("type"), event.get("data") or {}
    if kind == EventType.STATUS_CHANGED:
        return _joined(str(data.get("to")), data)
    if kind == EventType.REASON_CHANGED and data.get("reason"):
        return _joined("waiting", data)
    if kind in _TOLD:
        flat = {**data, **(data.get("metrics") or {}), **(data.get("steps") or [{}])[0]}
        shown = ", ".join(f"{name} {number(value)}" for name, value in flat.items() if isinstance(value, str | int | float))
        return f"{str(kind).replace('_', ' ')}{f': {shown}' if shown else ''}"
    return ""


def _joined(status: str, data: dict[str, Any]) -> str:
    told = [str(data[name]) for name in ("reason", "detail") if data.get(name)]
    return f"{status} ({': '.join(told)})" if told else status


def outcome_line(job: Json) -> str:
    """How a job ended, in one line."""
    if job["status"] != JobStatus.SUCCEEDED:
        return str(JobFailed(job))
    figures = ", ".join(f"{name} {value:.4g}" for name, value in (job["metrics"] or {}).items() if isinstance(value, int | float))
    return f"job {job['id']} succeeded{f': {figures}' if figures else ''}; result in {job['result_uri']}"
