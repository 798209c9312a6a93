"""Jobs as a person watches them in a terminal: a progress bar for each, and a line for what happens to it."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from service.client import Json, MaestroClient, Message
from workers.contract import EventType, JobStatus

PLAIN_PAUSE_SECONDS = 5.0  # between two lines of progress where there is no terminal
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


def watch(client: MaestroClient, jobs: list[Json], *, console: Console) -> list[Json]:
    """Show these jobs until all have ended, and answer them as they ended. The service may be away in between."""
    messages: queue.Queue[tuple[str, Message | Exception]] = queue.Queue()
    for job in jobs:
        threading.Thread(target=_listen, args=(client, job["id"], messages.put), daemon=True).start()
    waiting = {job["id"] for job in jobs}
    with _display(jobs, console=console) as show:
        while waiting:
            job_id, message = messages.get()
            if isinstance(message, Exception):
                raise message
            show(job_id, message)
            if message.event == "end":
                waiting.discard(job_id)
    return [client.job(job["id"]) for job in jobs]


def _listen(client: MaestroClient, job_id: str, tell: Callable[[tuple[str, Message | Exception]], None]) -> None:
    try:
        for message in client.stream(job_id):
            tell((job_id, message))
    except Exception as error:  # raised again by the one who waits
        tell((job_id, error))


Show = Callable[[str, Message], None]


@contextmanager
def _display(jobs: list[Json], *, console: Console) -> Iterator[Show]:
    names = {job["id"]: job["name"] for job in jobs}
    if not console.is_terminal:
        yield _PlainLines(names, console=console).show
        return
    columns = (
        TextColumn("[bold]{task.fields[name]}[/] {task.fields[status]}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield _Bars(names, progress=progress).show


class _Bars:
    """A bar for each job; what happens to it is printed above."""

    def __init__(self, names: dict[str, str], *, progress: Progress) -> None:
        self._progress = progress
        self._names = names
        self._tasks: dict[str, TaskID] = {
            job_id: progress.add_task("", total=None, name=escape(name), status="", figures="") for job_id, name in names.items()
        }

    def show(self, job_id: str, message: Message) -> None:
        task = self._tasks[job_id]
        if message.event == "progress":
            figures = progress_figures(message.data)
            self._progress.update(task, total=message.data["num_steps"], completed=message.data["step"], figures=figures)
        elif message.event == "end":
            self._progress.update(task, status=message.data.get("status", ""))
        else:
            if message.data.get("type") == EventType.STATUS_CHANGED:
                self._progress.update(task, status=message.data["data"].get("to", ""))
            if line := event_line(message.data):
                self._progress.console.print(f"{self._names[job_id]}: {line}", markup=False, highlight=False)


class _PlainLines:
    """Lines only, for a log file or a pipe."""

    def __init__(self, names: dict[str, str], *, console: Console) -> None:
        self._names = names
        self._console = console
        self._told_at: dict[str, float] = {}

    def show(self, job_id: str, message: Message) -> None:
        line = ""
        if message.event == "progress":
            last = message.data["step"] >= message.data["num_steps"]
            if last or time.monotonic() - self._told_at.get(job_id, 0.0) >= PLAIN_PAUSE_SECONDS:
                self._told_at[job_id] = time.monotonic()
                line = progress_figures(message.data)
        elif message.event != "end":
            line = event_line(message.data)
        if line:
            self._console.print(f"{self._names[job_id]}: {line}", markup=False, highlight=False, soft_wrap=True)


def progress_figures(progress: Json) -> str:
    """`step 120/400  loss 0.4711  812 images/s  ETA 0:21`; what is not known yet is left out."""
    parts = [f"step {progress['step']}/{progress['num_steps']}"]
    if (loss := progress.get("loss")) is not None:
        parts.append(f"loss {float(loss):.4f}")
    if (rate := progress.get("images_per_second")) is not None:
        parts.append(f"{float(rate):.0f} images/s")
    if (eta := progress.get("eta_seconds")) is not None:
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
        shown = ", ".join(f"{name} {_number(value)}" for name, value in flat.items() if isinstance(value, str | int | float))
        return f"{str(kind).replace('_', ' ')}{f': {shown}' if shown else ''}"
    return ""


def _number(value: str | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _joined(status: str, data: dict[str, Any]) -> str:
    told = [str(data[name]) for name in ("reason", "detail") if data.get(name)]
    return f"{status} ({': '.join(told)})" if told else status


def duration(seconds: float) -> str:
    if not 0 <= seconds < 1e9:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def outcome_line(job: Json) -> str:
    """How a job ended, in one line."""
    if job["status"] == JobStatus.SUCCEEDED:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in (job["metrics"] or {}).items() if isinstance(value, int | float))
        return f"job {job['id']} succeeded{f': {figures}' if figures else ''}; result in {job['result_uri']}"
    why = "; ".join(str(job[name]) for name in ("reason", "detail", "reason_message") if job.get(name))
    return f"job {job['id']} {job['status']}{f': {why}' if why else ''}"
