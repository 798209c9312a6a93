"""The main job, end to end on real parts: spec over REST → Ray → metrics → encoder in S3 → timm → probe and fine-tune."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from mae_core.encoders import load_encoder
from service.client import ApiError
from tests.conftest import LiveService
from tests.integration.runs import MODEL, Json, events_of, losses_of, pretrain_spec, probe_spec, wait_for, wait_for_end, wait_for_step
from tests.torchvision_ops import import_torchvision

import_torchvision()

import timm  # noqa: E402  (needs the line above)


@pytest.fixture(scope="module")
def pretrained(live_service: LiveService) -> Json:
    """A job that has pretrained an encoder, and written it in every format."""
    job = live_service.client.submit(pretrain_spec(export={"license": "cc0-1.0"}))["id"]
    view = wait_for_end(live_service.client, job)
    assert view["status"] == "succeeded", view["detail"]
    return view


def test_encoder_opens_in_timm_with_equal_features(live_service: LiveService, pretrained: Json, tmp_path: Path) -> None:
    manifest, folder = live_service.client.download_result(pretrained["id"], tmp_path)
    assert pretrained["result_uri"] == f"s3://maestro/jobs/{pretrained['id']}/encoder/"
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md", "manifest.json"}
    assert manifest.spec.name == "digits"
    assert manifest.metrics == pretrained["metrics"]
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours = load_encoder(folder, wanted=None).encoder
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(theirs.forward_features(images), ours.eval()(images), rtol=0, atol=1e-5)


def test_metrics_events_logs_and_pictures_are_kept(live_service: LiveService, pretrained: Json, tmp_path: Path) -> None:
    client, job = live_service.client, pretrained["id"]
    losses = losses_of(client, job)
    assert sorted(losses) == list(range(1, 45))
    assert losses[44] < losses[1]
    statuses = [data["to"] for data in events_of(client, job, "status_changed")]
    assert statuses == ["starting", "running", "finalizing", "succeeded"]
    arrays = [artifact["name"] for artifact in client.artifacts(job) if artifact["kind"] == "reconstruction_arrays"]
    with np.load(client.download(job, arrays[-1], tmp_path / "arrays.npz")) as reconstructions:
        assert reconstructions["prediction"].shape == (8, 1, 8, 8)
    pictures = [artifact["name"] for artifact in client.artifacts(job) if artifact["kind"] == "reconstruction"]
    assert len(pictures) >= 2
    with Image.open(client.download(job, pictures[-1], tmp_path / "picture.png")) as picture:
        assert picture.size == (4 * 100 + 4, 8 * 100 + 4)  # 4 columns and 8 rows of 8 px enlarged to 96, with gaps of 4
    assert "maestro.driver" in wait_for(lambda: client.logs(job), seconds=30, what="the kept log")
    assert "worker 0 of 2 trains on cpu" in client.logs(job, worker="0")
    url = f"{live_service.url}/v1/jobs/{job}/artifacts/encoder/model.safetensors"
    answer = httpx.get(url, headers={"Authorization": f"Bearer {live_service.home.secrets().api_token}"}, trust_env=False)
    assert answer.status_code == 307
    assert len(httpx.get(answer.headers["location"], trust_env=False).content) > 1_000_000


def test_probe_and_finetune_start_from_the_encoder(live_service: LiveService, pretrained: Json, tmp_path: Path) -> None:
    client = live_service.client
    probe = client.submit(probe_spec({"job": pretrained["id"]}, num_seeds=2, resources={"num_workers": 1}))["id"]
    finetune = client.submit(
        {
            "kind": "finetune",
            "name": "digits-finetune",
            "encoder": {"artifact": pretrained["result_uri"]},
            "data": {"source": "digits", "validation_fraction": 0.2, "transform": {"crop_scale": [0.6, 1.0], "flip": False}},
            "optim": {"epochs": 8, "batch_size": 64, "base_lr": 4e-3, "warmup_epochs": 1, "layer_decay": 0.9},
        }
    )["id"]
    probed, tuned = wait_for_end(client, probe), wait_for_end(client, finetune)

    assert probed["status"] == tuned["status"] == "succeeded", (probed["detail"], tuned["detail"])
    assert probed["spec"]["model"] == MODEL | {"image_size": [8, 8]}
    assert probed["spec"]["encoder"]["artifact"] == pretrained["result_uri"]
    assert len(probed["metrics"]["val_accuracy_seeds"]) == 2
    assert probed["metrics"]["val_accuracy"] > 0.5
    assert tuned["metrics"]["val_accuracy"] > 0.5
    _, folder = client.download_result(finetune, tmp_path)
    assert timm.create_model(f"local-dir:{folder}", pretrained=True)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert json.loads((folder / "config.json").read_text())["label_names"] == [str(digit) for digit in range(10)]


def test_jobs_start_from_what_other_libraries_open(live_service: LiveService, pretrained: Json) -> None:
    """From a folder of Hugging Face, with its decoder, and from a checkpoint of the authors' names, both in S3 and without a manifest.

    And one from a job that has not finished, for which it waits.
    """
    client = live_service.client
    more = client.submit(pretrain_spec(name="more", encoder={"artifact": f"{pretrained['result_uri']}hf-mae/"}))["id"]
    file = {"artifact": f"{pretrained['result_uri']}torch/model.pth"}
    data = {"source": "digits", "validation_fraction": 0.2, "normalize": {"mean": [0.5], "std": [0.5]}}
    probe = client.submit(probe_spec(file, data=data, model=MODEL, resources={"num_workers": 1}))["id"]
    child = client.submit(probe_spec({"job": more}, name="waits", resources={"num_workers": 1}))["id"]
    went_on, probed = wait_for_end(client, more), wait_for_end(client, probe)
    waited = wait_for_end(client, child)
    assert waited["status"] == "succeeded", waited["detail"]
    assert {event["reason"] for event in events_of(client, child, "reason_changed")} >= {"waiting_for_job", None}
    assert waited["started_at"] > went_on["finished_at"]
    assert waited["spec"]["encoder"]["artifact"] == went_on["result_uri"]
    assert went_on["status"] == probed["status"] == "succeeded", (went_on["detail"], probed["detail"])
    losses, first = losses_of(client, more), losses_of(client, pretrained["id"])
    assert losses[1] < 0.8 * first[1]  # of the same images and masks
    assert "and its decoder" in wait_for(lambda: client.logs(more), seconds=30, what="the kept log")
    assert probed["spec"]["encoder"]["artifact"].endswith("/torch/model.pth")
    assert probed["metrics"]["val_accuracy"] > 0.5


def test_cancel_reaches_a_running_job(live_service: LiveService) -> None:
    client = live_service.client
    job = client.submit(pretrain_spec(optim={"epochs": 10_000, "batch_size": 128, "warmup_epochs": 1}))["id"]
    wait_for_step(client, job, 1)
    client.cancel(job)
    view = wait_for_end(client, job, seconds=60)
    assert (view["status"], view["reason"]) == ("cancelled", "cancelled_by_user")
    assert len(events_of(client, job, "run_stopped")) == 1  # the workers heard it, and stopped between two steps
    assert client.cancel(job)["status"] == "cancelled"


def test_folder_with_a_corrupt_image_and_a_job_that_waits(live_service: LiveService, tmp_path: Path) -> None:
    client = live_service.client
    for number in range(64):
        folder = tmp_path / "images" / ("even" if number % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 12), (number * 3, 255 - number, number % 7 * 30)).save(folder / f"{number:03}.png")
    (tmp_path / "images" / "odd" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a photo")
    spec = pretrain_spec(
        name="folder",
        model={"arch": "vit_tiny_patch4", "image_size": [8, 12]},
        data={"source": str(tmp_path / "images"), "max_corrupt_fraction": 0.05},
        optim={"epochs": 2, "batch_size": 32, "warmup_epochs": 0},
    )
    tolerant = client.submit(spec)["id"]
    strict = client.submit(spec | {"name": "strict", "data": {"source": str(tmp_path / "images"), "max_corrupt_fraction": 0.0}})["id"]

    waits = wait_for(lambda: client.job(strict)["reason"], seconds=60, what="a reason for waiting")
    assert waits == "waiting_for_resources"
    assert "needs 2 CPU" in client.job(strict)["detail"]

    assert wait_for_end(client, tolerant)["status"] == "succeeded"
    skipped = events_of(client, tolerant, "images_skipped")
    assert [(event["count"], list(event["images"])) for event in skipped] == [(1, ["odd/broken.jpg"])]
    failed = wait_for_end(client, strict)
    assert (failed["status"], failed["reason"], failed["attempt"]) == ("failed", "data_error", 1)
    assert "1 of 65 images cannot be read" in failed["detail"]
    assert "odd/broken.jpg" in failed["detail"]
    assert len(events_of(client, strict, "workers_started")) == 1  # not tried again: a retry cannot help


def test_a_job_waits_for_storage_that_is_away(live_service: LiveService) -> None:
    client = live_service.client
    live_service.kill_storage()
    try:
        job = client.submit(pretrain_spec(optim={"epochs": 10_000, "batch_size": 128, "warmup_epochs": 1}))["id"]
        wait_for(lambda: client.job(job)["reason"] == "storage_unreachable", seconds=60, what="its reason")
        assert client.job(job)["status"] == "queued"
    finally:
        live_service.start_storage()
    wait_for_step(client, job, 1)
    client.cancel(job)
    assert wait_for_end(client, job, seconds=60)["status"] == "cancelled"


def fetch(live_service: LiveService, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service.cli", "fetch", *arguments]
    environment = os.environ | {"MAESTRO_URL": live_service.url, "MAESTRO_TOKEN": live_service.home.secrets().api_token}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_fetch_command(live_service: LiveService, pretrained: Json, tmp_path: Path) -> None:
    done = fetch(live_service, pretrained["id"], "--to", str(tmp_path / "encoder"))
    assert done.returncode == 0, done.stderr
    assert "timm.create_model" in done.stdout
    assert load_encoder(tmp_path / "encoder", wanted=None).encoder.model.arch == "vit_tiny_patch4"


def test_fetch_of_another_format(live_service: LiveService, pretrained: Json, tmp_path: Path) -> None:
    done = fetch(live_service, pretrained["id"], "--format", "onnx", "--to", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'README.md'} says how to load it" in done.stdout
    card = (tmp_path / "README.md").read_text()
    assert f"job `{pretrained['id']}`" in card
    assert 'license: "cc0-1.0"' in card
    [features] = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(["features"], {"images": np.zeros((3, 1, 8, 8), np.float32)})
    assert features.shape == (3, 5, 192)


def test_an_export_that_cannot_be_faithful_is_refused_at_submission(live_service: LiveService) -> None:
    spec = pretrain_spec(decoder={"attention": "cross"}, export={"formats": ["hf-mae"]})
    with pytest.raises(ApiError, match=r"hf-mae cannot be faithful to this model: .* by cross attention; use hf for the encoder alone"):
        live_service.client.submit(spec)


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"modle": {}}, "modle", "no such field"),
        ({"model": {"arch": "vit_tiny_patch3", "image_size": 8, "in_chans": 1}}, "model", "not divisible by the patch size 3"),
        ({"data": {"source": "/nowhere/at/all"}}, "data.source", "/nowhere/at/all"),
        ({"resources": {"num_workers": 1000}, "optim": {"batch_size": 4000}}, "resources.num_workers", "or fewer"),
        (probe_spec({"job": "nosuchjob"}), "encoder.job", "nosuchjob"),
        (probe_spec({"artifact": "s3://maestro/jobs/none/encoder/"}), "encoder.artifact", "there is no job none"),
        (probe_spec({"artifact": "s3://maestro/elsewhere/encoder/"}), "encoder.artifact", "there is no encoder at s3://"),
    ],
)
def test_bad_input_is_refused_at_submission(live_service: LiveService, changes: Json, field: str, says: str) -> None:
    spec = changes if "kind" in changes else pretrain_spec(**changes)
    with pytest.raises(ApiError) as refused:
        live_service.client.submit(spec)
    assert refused.value.status == 422
    assert field in str(refused.value)
    assert says in str(refused.value)
