"""Features of a whole source into S3, by two workers of which one is killed: what was there is not written again."""

import signal
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas
import pytest
from typer.testing import CliRunner

from mae_core.config import RUN_SPEC
from mae_core.runs import open_run
from mae_core.stores import FolderParts
from mae_core.world import World
from service.cli import app
from service.up import BUCKET
from tests.conftest import LiveService
from tests.integration.runs import Json, events_of, train_workers, wait_for, wait_for_end
from workers.stored import EncoderManifest

NUM_IMAGES, NUM_PARTS = 1797, 57
SPEC: Json = {
    "kind": "embed",
    "name": "digits-features",
    "encoder": {"init": "random"},
    "model": {"arch": "vit_tiny_patch4", "image_size": 32, "in_chans": 1},
    "data": {"source": "digits"},
    "batch_size": 8,
    "images_per_part": 32,
    "resources": {"num_workers": 2},
}


def stored(live_service: LiveService, job: str) -> dict[str, tuple[str, datetime]]:
    """ETag and LastModified of the parts that have a note."""
    found = live_service.installation.storage.client().list_objects_v2(Bucket=BUCKET, Prefix=f"jobs/{job}/embedding/part-")
    objects = {Path(item["Key"]).name: (item["ETag"], item["LastModified"]) for item in found.get("Contents", [])}
    return {name: told for name, told in objects.items() if name.endswith(".parquet") and name.replace("parquet", "json") in objects}


def test_a_killed_worker_costs_no_part_that_is_stored(live_service: LiveService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = live_service.client
    job = client.submit(SPEC)["id"]
    wait_for(lambda: len(stored(live_service, job)) >= 8, seconds=180, what="some parts")
    workers = train_workers(live_service.run)
    assert len(workers) == 2
    before = stored(live_service, job)
    workers[-1].send_signal(signal.SIGKILL)
    view = wait_for_end(client, job)

    assert (view["status"], view["attempt"]) == ("succeeded", 1), view["detail"]
    assert len(events_of(client, job, "workers_started")) == 2
    after = stored(live_service, job)
    assert 8 <= len(before) < len(after) == NUM_PARTS
    assert {name: after[name] for name in before} == before
    assert view["metrics"] == {"num_images": NUM_IMAGES, "num_unreadable": 0, "dim": 192}
    assert view["progress"]["step"] == view["progress"]["num_steps"] == 225
    speeds = client.metrics(job, names=["images_per_second"])["images_per_second"]
    assert speeds["steps"][-1] == 225
    assert min(speeds["values"]) > 0

    folder = tmp_path / "features"
    monkeypatch.setenv("MAESTRO_URL", live_service.url)
    monkeypatch.setenv("MAESTRO_TOKEN", live_service.home.secrets().api_token)
    fetched = CliRunner().invoke(app, ["fetch", job, "--to", str(folder)])  # which checks every SHA-256
    assert fetched.exit_code == 0, fetched.output
    assert "read it with: pandas.read_parquet(" in fetched.output
    manifest = EncoderManifest.model_validate_json((folder / "manifest.json").read_bytes())
    assert {artifact["kind"] for artifact in client.artifacts(job) if artifact["name"].startswith("embedding/")} == {"embedding"}
    assert set(manifest.files) == {"embedding.json", *after}
    table = pandas.read_parquet(sorted(folder.glob("*.parquet")))
    assert table["index"].tolist() == list(range(NUM_IMAGES))
    assert np.isfinite(np.stack(table["features"].tolist())).all()

    alone = open_run(RUN_SPEC.validate_python(view["spec"]), world=World(), encoder_folder=None, parts=FolderParts(tmp_path / "alone"))
    list(alone.progress(lambda: False))
    for name in after:
        assert (folder / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
