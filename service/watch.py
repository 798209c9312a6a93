"""Jobs as a person watches them in a terminal: a progress bar for each, the course of its loss, and a line for what happens to it."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn
from rich.text import Text

from service.client import JobFailed, Json, MaestroClient, MaestroError, Message
from service.console import say
from service.watched_events import event_line, outcome_line, progress_figures
from service.wording import clean, duration, sparkline
from workers.contract import EventType, JobStatus

PLAIN_PAUSE_SECONDS = 5.0  # between two lines of progress where there is no terminal
_KEPT_LOSSES = 400
_AWAY = "away"  # a message of our own: the service does not answer


def watch_one(client: MaestroClient, job: Json, *, to_stderr: bool) -> None:
    """Show a job until it has ended, and tell how. Raises JobFailed unless it has succeeded."""
    try:
        [ended] = watch(client, [job], console=Console(stderr=to_stderr))
    except KeyboardInterrupt:
        say(f"the job goes on: `maestro watch {job['id']}` shows it again, `maestro cancel {job['id']}` ends it")
        raise
    if ended["status"] != JobStatus.SUCCEEDED:
        raise JobFailed(ended)
    typer.echo(clean(outcome_line(ended)), err=to_stderr)


def watch(client: MaestroClient, jobs: list[Json], *, console: Console) -> list[Json]:
    """Show these jobs until all have ended, and answer them as they ended. The service may be away in between."""
    messages: queue.Queue[tuple[str, Message | Exception]] = queue.Queue()
    for job in jobs:
        threading.Thread(target=_listen, args=(client, job["id"], messages.put), daemon=True).start()
    waiting = {job["id"] for job in jobs}
    with _display(client, jobs, console=console) as show:
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
        for message in client.stream(job_id, on_away=lambda error: tell((job_id, Message(_AWAY, {"detail": str(error)})))):
            tell((job_id, message))
    except Exception as error:  # raised again by the one who waits
        tell((job_id, error))


Show = Callable[[str, Message], None]


@contextmanager
def _display(client: MaestroClient, jobs: list[Json], *, console: Console) -> Iterator[Show]:
    names = {job["id"]: clean(job["name"]) for job in jobs}
    if not console.is_terminal:
        yield _PlainLines(names, console=console).show
        return
    columns = (
        TextColumn("[bold]{task.fields[name]}[/] {task.fields[status]}"),
        BarColumn(bar_width=None),
        _Figures("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console, expand=True, refresh_per_second=4) as progress:
        yield _Bars(names, progress=progress, losses={job_id: _losses(client, job_id) for job_id in names}).show


def _losses(client: MaestroClient, job_id: str) -> list[float]:
    """What there is of a job that has been running for a while; of its loss nothing depends on it."""
    with suppress(MaestroError):
        series = client.metrics(job_id, names=["loss"], max_points=_KEPT_LOSSES).get("loss", {"values": []})
        return [float(value) for value in series["values"]]
    return []


class _Figures(TextColumn):
    """The figures of the last progress, the loss's course, and the time left, which counts down also while the service is away."""

    def render(self, task: Task) -> Text:
        parts = [task.fields["figures"], task.fields["course"]]
        if (done_at := task.fields["done_at"]) is not None:
            parts.append(f"ETA {duration(max(done_at - time.monotonic(), 0.0))}")
        return Text("  ".join(part for part in parts if part), no_wrap=True, overflow="ellipsis")


class _Bars:
    """A bar for each job; what happens to it is printed above."""

    def __init__(self, names: dict[str, str], *, progress: Progress, losses: dict[str, list[float]]) -> None:
        self._progress = progress
        self._names = names
        self._losses = {job_id: deque(known, maxlen=_KEPT_LOSSES) for job_id, known in losses.items()}
        self._statuses = dict.fromkeys(names, "")
        self._tasks: dict[str, TaskID] = {
            job_id: progress.add_task(
                "", total=None, name=escape(name), status="", figures="", course=sparkline(self._losses[job_id]), done_at=None
            )
            for job_id, name in names.items()
        }

    def show(self, job_id: str, message: Message) -> None:
        task = self._tasks[job_id]
        if message.event == _AWAY:
            self._progress.update(task, status="[yellow]the service does not answer; trying again[/]")
            return
        if message.event == "progress":
            self._show_progress(job_id, message.data)
        elif message.event == "end":
            self._statuses[job_id] = clean(message.data.get("status", ""))
            self._progress.update(task, done_at=None)
        else:
            if message.data.get("type") == EventType.STATUS_CHANGED:
                self._statuses[job_id] = clean(message.data["data"].get("to", ""))
            if line := event_line(message.data):
                self._progress.console.print(f"{self._names[job_id]}: {clean(line)}", markup=False, highlight=False)
        self._progress.update(task, status=self._statuses[job_id])

    def _show_progress(self, job_id: str, progress: Json) -> None:
        if progress.get("loss") is not None:
            self._losses[job_id].append(float(progress["loss"]))
        left = progress.get("eta_seconds")
        self._progress.update(
            self._tasks[job_id],
            total=progress["num_steps"],
            completed=progress["step"],
            figures=progress_figures(progress, with_eta=False),
            course=sparkline(self._losses[job_id]),
            done_at=None if left is None else time.monotonic() + float(left),
        )


class _PlainLines:
    """Lines only, for a log file or a pipe."""

    def __init__(self, names: dict[str, str], *, console: Console) -> None:
        self._names = names
        self._console = console
        self._told_at: dict[str, float] = {}
        self._away = set[str]()

    def show(self, job_id: str, message: Message) -> None:
        line = ""
        if message.event == _AWAY:
            line = "" if job_id in self._away else "the service does not answer; trying again"
            self._away.add(job_id)
        else:
            self._away.discard(job_id)
        if message.event == "progress":
            last = message.data["step"] >= message.data["num_steps"]
            if last or time.monotonic() - self._told_at.get(job_id, 0.0) >= PLAIN_PAUSE_SECONDS:
                self._told_at[job_id] = time.monotonic()
                line = progress_figures(message.data)
        elif message.event == "event":
            line = event_line(message.data)
        if line:
            self._console.print(f"{self._names[job_id]}: {clean(line)}", markup=False, highlight=False, soft_wrap=True)
