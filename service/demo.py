"""`maestro demo`: pretrain on the handwritten digits, and see that the encoder is worth more than a random one.

All of it runs as it does in earnest: jobs over REST, workers on Ray, results in S3, in a home that the demo makes and may wipe.
"""

import shutil
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from service.client import Json, MaestroClient
from service.home import Home, HomeError
from service.spec_file import load_spec
from service.up import Installation, clear_leftovers, interruptible, running
from service.watch import watch
from service.watched_events import outcome_line
from workers.contract import JobStatus

SPECS = Path(__file__).parent.parent / "deploy" / "specs"
MARKER = "this-folder-is-the-demo-of-maestro"
MIN_POINTS = 5.0


class DemoFailed(Exception):
    """A job of the demo did not succeed."""


def run_demo(home: Home) -> int:
    """The whole demo; answers the exit code."""
    console = Console(soft_wrap=True)
    began_at = time.monotonic()
    code = 1
    try:
        with interruptible():
            wipe(home, console=console)
            console.print("starting the object store, Ray, the API and the dispatcher …")
            with running(home, say=console.print) as installation, kept(installation), _client(installation) as client:
                console.print(f"up after {time.monotonic() - began_at:.0f} s: {installation.url}")
                code = _train_and_compare(client, home, console=console)
                console.print("stopping everything …")
    except DemoFailed as error:
        console.print(f"error: {error}\nlogs are in {home.path / 'logs'}", markup=False)
    except KeyboardInterrupt:
        code = 130
        console.print("interrupted; everything is stopped")
    console.print(f"{time.monotonic() - began_at:.0f} s in all")
    return code


def _train_and_compare(client: MaestroClient, home: Home, *, console: Console) -> int:
    pretrain_spec = load_spec(SPECS / "digits-pretrain.yaml", folder=SPECS)
    [pretrained] = _run_jobs(client, [pretrain_spec], console=console)
    probe_spec = load_spec(SPECS / "digits-probe.yaml", folder=SPECS)
    probes = probe_specs(probe_spec, job=pretrained["id"], model=pretrain_spec["model"])
    ended = _run_jobs(client, probes, console=console)
    ours, random = (job["metrics"]["val_accuracy_seeds"] for job in ended)
    points = median_points(ours, random)
    console.print()
    console.print(f"accuracy, pretrained encoder  {_percent(ours)}   median {100 * ended[0]['metrics']['val_accuracy']:.1f} %")
    console.print(f"accuracy, random encoder      {_percent(random)}   median {100 * ended[1]['metrics']['val_accuracy']:.1f} %")
    console.print(f"pretraining gains {points:.1f} points (median of the {len(ours)} paired differences; {MIN_POINTS:g} are asked for)")
    _tell_results(client, pretrained, home, console=console)
    if points < MIN_POINTS:
        console.print(f"error: the pretrained encoder does not win by {MIN_POINTS:g} points")
        return 1
    return 0


def _tell_results(client: MaestroClient, job: Json, home: Home, *, console: Console) -> None:
    _, folder = client.download_result(job["id"], home.path / "encoder")
    console.print(f"encoder         {job['result_uri']}", markup=False)
    console.print(f"                checked copy in {folder}: timm.create_model('local-dir:{folder}', pretrained=True)", markup=False)
    pictures = [artifact for artifact in client.artifacts(job["id"]) if artifact["name"].endswith(".png")]
    if not pictures:
        raise DemoFailed(f"job {job['id']} has left no reconstruction picture")
    newest = max(pictures, key=lambda artifact: str(artifact["name"]))
    copy = client.download(job["id"], newest["name"], home.path / "reconstruction.png", sha256=newest.get("sha256"))
    console.print(f"reconstruction  {newest['uri']}\n                copy in {copy}", markup=False)
    console.print(f"`maestro up --home {home.path}` serves them again", markup=False)


def _run_jobs(client: MaestroClient, specs: list[dict[str, Any]], *, console: Console) -> list[Json]:
    """Submit these, show them until they have ended, side by side; DemoFailed unless all succeed."""
    ended = watch(client, [client.submit(spec) for spec in specs], console=console)
    for job in ended:
        if job["status"] != JobStatus.SUCCEEDED:
            raise DemoFailed(f"{outcome_line(job)}\nits log ends:\n{client.logs(job['id'])[-3000:]}")
        console.print(outcome_line(job), markup=False, highlight=False)
    return ended


def probe_specs(spec: dict[str, Any], *, job: str, model: dict[str, Any]) -> list[dict[str, Any]]:
    """The probe of a job's encoder, and the same probe of one with random weights."""
    pretrained = spec | {"name": "probe-pretrained", "encoder": {"job": job}, "num_seeds": 3}
    random = spec | {"name": "probe-random", "encoder": {"init": "random"}, "model": model, "num_seeds": 3}
    return [pretrained, random]


def median_points(ours: Sequence[float], others: Sequence[float]) -> float:
    """Median over seeds of the difference in accuracy, in percentage points."""
    return 100 * statistics.median(mine - other for mine, other in zip(ours, others, strict=True))


def wipe(home: Home, *, console: Console) -> None:
    """An empty home. Only a folder that an earlier demo made is ever deleted."""
    if home.is_locked():
        home.lock()  # says who holds it
    if home.path.exists() and any(home.path.iterdir()):
        if not (home.path / MARKER).exists():
            raise HomeError(f"{home.path} is not a folder that the demo made; move it away, or give another with --home")
        clear_leftovers(home, say=console.print)
        shutil.rmtree(home.path)
    home.prepare()
    (home.path / MARKER).touch()


@contextmanager
def kept(installation: Installation) -> Iterator[None]:
    """What dies inside the block is started again."""
    stopping = threading.Event()
    keeper = threading.Thread(target=installation.keep, args=(stopping,), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stopping.set()
        keeper.join()


def _client(installation: Installation) -> MaestroClient:
    return MaestroClient(installation.url, installation.home.secrets().api_token)


def _percent(accuracies: Sequence[float]) -> str:
    return "  ".join(f"{100 * accuracy:5.1f} %" for accuracy in accuracies)
