import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from service.models import JobRow
from service.ray_jobs import RayStatus
from tests.unit.service_fixtures import PRETRAIN, PROBE, Service, manifest_for
from workers.contract import JobStatus

OF_HF = {
    "model_type": "vit_mae",
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
}
EVALUATE: dict[str, Any] = {"kind": "evaluate", "name": "digits-accuracy", "data": {"source": "digits", "validation_fraction": 0.2}}


def probe(client: TestClient, **encoder: str) -> Any:
    return client.post("/v1/jobs", json=PROBE | {"encoder": encoder})


def evaluate(client: TestClient, *, encoder: dict[str, str], **changes: Any) -> Any:
    return client.post("/v1/jobs", json=EVALUATE | {"encoder": encoder} | changes)


def error(answer: Any) -> tuple[str, str]:
    assert answer.status_code == 422, answer.text
    return answer.json()["errors"][0]["field"], answer.json()["errors"][0]["message"]


def succeed(service: Service, job_id: str) -> str:
    service.tick()
    service.commit_result(job_id)
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick(2)
    assert service.job(job_id).status is JobStatus.SUCCEEDED
    return job_id


@pytest.fixture
def pretrained(service: Service) -> str:
    return succeed(service, service.submit())


@pytest.fixture
def finetuned(service: Service, pretrained: str) -> str:
    return succeed(service, service.submit(PROBE | {"kind": "finetune", "encoder": {"job": pretrained}}))


def test_a_job_is_frozen_into_its_artifact_with_its_model(client: TestClient, pretrained: str) -> None:
    answer = probe(client, job=pretrained)
    assert answer.status_code == 201, answer.text
    spec = answer.json()["spec"]
    assert spec["encoder"] == {"job": None, "artifact": f"s3://maestro/jobs/{pretrained}/encoder/", "file": None, "init": None}
    assert spec["model"] == {"arch": "vit_tiny_patch2", "image_size": [8, 8], "in_chans": 1}


def test_a_repeat_is_answered_though_its_encoder_is_gone(client: TestClient, service: Service, pretrained: str) -> None:
    body, headers = PROBE | {"encoder": {"job": pretrained}}, {"Idempotency-Key": "k"}
    first = client.post("/v1/jobs", json=body, headers=headers)
    service.storage.objects.clear()
    again = client.post("/v1/jobs", json=body, headers=headers)
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])


def test_an_artifact(client: TestClient, service: Service, pretrained: str) -> None:
    uri = f"s3://maestro/jobs/{pretrained}/encoder"
    assert probe(client, artifact=uri).json()["spec"]["encoder"]["artifact"] == uri + "/"
    service.storage.objects["elsewhere", "a/manifest.json"] = manifest_for(service.job(pretrained)).model_dump_json().encode()
    assert probe(client, artifact="s3://elsewhere/a/").status_code == 201


def test_a_job_that_does_not_do(client: TestClient, service: Service, pretrained: str) -> None:
    assert error(probe(client, job="nope")) == ("encoder.job", "there is no job nope")
    running = service.start()
    service_probe = probe(client, job=pretrained).json()["id"]
    assert error(probe(client, job=service_probe))[1].endswith("is of kind probe; name a pretrain job, or give the encoder as an artifact")
    with service.database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == running).values(status=JobStatus.FAILED))
    assert "left no encoder" in error(probe(client, job=running))[1]


def test_an_artifact_that_does_not_do(client: TestClient, service: Service, pretrained: str) -> None:
    field, message = error(probe(client, artifact="s3://maestro/nope/"))
    assert field == "encoder.artifact"
    assert message.startswith("there is no encoder at s3://maestro/nope/: no manifest.json, and no config.json and no model.safetensors; ")
    service.storage.put_bytes("bad/manifest.json", b"{}")
    assert "is not an encoder's" in error(probe(client, artifact="s3://maestro/bad/"))[1]
    service.storage.put_bytes("probe/manifest.json", manifest_for(service.job(pretrained), kind="probe").model_dump_json().encode())
    message = error(probe(client, artifact="s3://maestro/probe/"))[1]
    assert message.endswith("is the result of a job of kind probe, not pretrain; name the encoder that it started from")


def test_a_fine_tuned_model_is_evaluated(client: TestClient, service: Service, finetuned: str) -> None:
    """By its head, so that no images need be held back: all of the source are."""
    everything = {"data": {"source": "digits"}}
    uri = f"s3://maestro/jobs/{finetuned}/encoder/"
    for encoder in ({"job": finetuned}, {"artifact": uri}):
        answer = evaluate(client, encoder=encoder, **everything)
        assert answer.status_code == 201, answer.text
        assert answer.json()["spec"]["encoder"]["artifact"] == uri
        assert answer.json()["spec"]["model"]["arch"] == "vit_tiny_patch2"
    job_id = succeed(service, answer.json()["id"])
    assert service.job(job_id).result_uri == f"s3://maestro/jobs/{job_id}/evaluation/"
    artifacts = client.get(f"/v1/jobs/{job_id}/artifacts").json()["artifacts"]
    assert {artifact["kind"] for artifact in artifacts if artifact["name"].startswith("evaluation/")} == {"evaluation"}
    assert [job["id"] for job in client.get("/v1/jobs", params={"kind": "evaluate", "status": "succeeded"}).json()["jobs"]] == [job_id]


def test_an_encoder_embeds(client: TestClient, service: Service, pretrained: str, finetuned: str) -> None:
    embed = {"kind": "embed", "name": "digits-features", "data": {"source": "digits"}, "pooling": "tokens"}
    answer = client.post("/v1/jobs", json=embed | {"encoder": {"job": pretrained}})
    assert answer.status_code == 201, answer.text
    spec = answer.json()["spec"]
    assert (spec["model"]["arch"], spec["encoder"]["artifact"]) == ("vit_tiny_patch2", f"s3://maestro/jobs/{pretrained}/encoder/")
    assert (spec["pooling"], spec["dtype"], spec["batch_size"]) == ("tokens", "float32", None)
    job_id = succeed(service, answer.json()["id"])
    assert service.job(job_id).result_uri == f"s3://maestro/jobs/{job_id}/embedding/"
    artifacts = client.get(f"/v1/jobs/{job_id}/artifacts").json()["artifacts"]
    assert {artifact["kind"] for artifact in artifacts if artifact["name"].startswith("embedding/")} == {"embedding"}
    assert [job["id"] for job in client.get("/v1/jobs", params={"kind": "embed"}).json()["jobs"]] == [job_id]
    told = error(client.post("/v1/jobs", json=embed | {"encoder": {"job": finetuned}}))
    assert told == ("encoder.job", f"job {finetuned} is of kind finetune; name a pretrain job, or give the encoder as an artifact")


@pytest.mark.parametrize(("field", "value"), [("knn", 20), ("pooling", "cls")])
def test_what_a_fine_tuned_model_would_ignore(client: TestClient, finetuned: str, field: str, value: Any) -> None:
    told = error(evaluate(client, encoder={"job": finetuned}, **{field: value}))
    assert told == (field, "a fine-tuned model is measured by its own head and pooling; leave it out")


def test_a_fine_tuned_model_is_no_encoder_to_start_from(client: TestClient, finetuned: str) -> None:
    assert "is of kind finetune; name a pretrain job" in error(probe(client, job=finetuned))[1]
    field, message = error(probe(client, artifact=f"s3://maestro/jobs/{finetuned}/encoder/"))
    assert field == "encoder.artifact"
    assert message.endswith("is the result of a job of kind finetune, not pretrain; name the encoder that it started from")


def test_an_encoder_without_a_head_is_evaluated_on_images_held_back(client: TestClient, pretrained: str) -> None:
    answer = evaluate(client, encoder={"job": pretrained}, knn=5)
    assert (answer.status_code, answer.json()["spec"]["knn"]) == (201, 5)
    random: dict[str, Any] = {"encoder": {"init": "random"}, "model": {"arch": "vit_tiny_patch2", "image_size": 8, "in_chans": 1}}
    assert evaluate(client, **random).status_code == 201
    for changes in ({"encoder": {"job": pretrained}}, random):
        field, message = error(evaluate(client, data={"source": "digits"}, **changes))
        assert field == "data"
        assert "measured by k-NN against labelled images: hold some back, with validation" in message


def test_an_evaluation_has_nothing_to_be_evaluated(client: TestClient, service: Service, finetuned: str) -> None:
    evaluation = succeed(service, evaluate(client, encoder={"job": finetuned}).json()["id"])
    assert "is of kind evaluate; name a pretrain or finetune job" in error(evaluate(client, encoder={"job": evaluation}))[1]
    message = error(evaluate(client, encoder={"artifact": f"s3://maestro/jobs/{evaluation}/evaluation/"}))[1]
    assert message.endswith("is the result of a job of kind evaluate, not pretrain or finetune; name the encoder that it started from")


def test_another_image_size_than_the_encoders(client: TestClient, pretrained: str, finetuned: str) -> None:
    model = {"arch": "vit_tiny_patch2", "image_size": [16, 8], "in_chans": 1}
    answers = [
        client.post("/v1/jobs", json=PROBE | {"encoder": {"job": pretrained}, "model": model}),
        evaluate(client, encoder={"job": finetuned}, model=model),
    ]
    assert [(answer.status_code, answer.json()["spec"]["model"]["image_size"]) for answer in answers] == [(201, [16, 8])] * 2


def test_a_model_that_is_not_the_encoders(client: TestClient, pretrained: str) -> None:
    model = {"arch": "vit_tiny_patch4", "image_size": 8, "in_chans": 1}
    field, message = error(client.post("/v1/jobs", json=PROBE | {"encoder": {"job": pretrained}, "model": model}))
    assert field == "model"
    assert "'vit_tiny_patch4' (encoder: 'vit_tiny_patch2')" in message


def test_an_encoder_that_does_not_fit_the_data(client: TestClient, service: Service) -> None:
    job_id = service.submit(PRETRAIN | {"model": {"arch": "vit_tiny_patch2", "image_size": 8, "in_chans": 3}, "data": {"source": "/data"}})
    service.storage.put_bytes("e/manifest.json", manifest_for(service.job(job_id)).model_dump_json().encode())
    field, message = error(probe(client, artifact="s3://maestro/e/"))
    assert field == "model.in_chans"
    assert "the digits have 1 channel, not 3" in message


def test_storage_that_is_away_is_503_and_keeps_nothing(client: TestClient, service: Service, pretrained: str) -> None:
    service.storage.is_down = True
    answer = probe(client, job=pretrained)
    assert answer.status_code == 503
    assert answer.json()["type"] == "urn:maestro:storage-unreachable"
    assert answer.headers["retry-after"]
    assert len(client.get("/v1/jobs").json()["jobs"]) == 1


def test_storage_is_asked_in_no_transaction(client: TestClient, service: Service, pretrained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = service.storage.read_text

    def read_text(key: str, *, bucket: str | None = None) -> str:
        assert service.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        service.submit()  # would wait for ever on a writer
        return real(key, bucket=bucket)

    monkeypatch.setattr(service.storage, "read_text", read_text)
    assert probe(client, job=pretrained).status_code == 201


def test_a_file_needs_a_service_that_sees_it(client: TestClient, tmp_path: Path) -> None:
    assert "give its artifact" in error(probe(client, file=str(tmp_path)))[1]


def test_a_file(client: TestClient, service: Service, pretrained: str, tmp_path: Path) -> None:
    object.__setattr__(service.settings, "sources_are_local", True)
    assert "absolute path" in error(probe(client, file="encoder"))[1]
    assert "no config.json and no model.safetensors" in error(probe(client, file=str(tmp_path)))[1]
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    assert "has neither maestro nor model_type (Hugging Face) nor architecture (timm)" in error(probe(client, file=str(tmp_path)))[1]
    (tmp_path / "config.json").write_text(json.dumps(OF_HF))
    assert probe(client, file=str(tmp_path)).json()["spec"]["model"]["arch"] == "vit_tiny_patch2"
    (tmp_path / "manifest.json").write_text(manifest_for(service.job(pretrained)).model_dump_json())
    assert probe(client, file=str(tmp_path)).json()["spec"]["model"]["arch"] == "vit_tiny_patch2"
    (tmp_path / "manifest.json").write_text(manifest_for(service.job(pretrained), kind="finetune").model_dump_json())
    assert "is the result of a job of kind finetune" in error(probe(client, file=str(tmp_path)))[1]
    assert evaluate(client, encoder={"file": str(tmp_path)}).status_code == 201


def put(service: Service, prefix: str, config: object, *names: str) -> str:
    """A folder of another library in a bucket that is not ours."""
    for name in names:
        service.storage.objects["elsewhere", prefix + name] = b"weights"
    service.storage.objects["elsewhere", f"{prefix}config.json"] = json.dumps(config).encode()
    return f"s3://elsewhere/{prefix}"


def test_an_artifact_of_hugging_face(client: TestClient, service: Service) -> None:
    for number, name in enumerate(("model.safetensors", "pytorch_model.bin")):
        uri = put(service, f"hf{number}/", OF_HF, name)
        spec = probe(client, artifact=uri.rstrip("/")).json()["spec"]
        assert (spec["encoder"]["artifact"], spec["model"]) == (uri, {"arch": "vit_tiny_patch2", "image_size": [8, 8], "in_chans": 1})
    assert "no model.safetensors" in error(probe(client, artifact=put(service, "no-weights/", OF_HF)))[1]
    field, message = error(probe(client, artifact=put(service, "swin/", OF_HF | {"model_type": "swin"}, "model.safetensors")))
    assert field == "encoder.artifact"
    assert "s3://elsewhere/swin/: config.json is no encoder's that can be used: its model_type 'swin' is another network" in message
    odd = put(service, "odd/", OF_HF | {"image_size": 9}, "model.safetensors")
    assert "can be used: image_size: height 9 is not divisible by the patch size 2" in error(probe(client, artifact=odd))[1]


def test_a_fine_tuned_model_of_another_library(client: TestClient, service: Service) -> None:
    """Is evaluated by its head, and refused as an encoder."""
    named = {"architectures": ["ViTForImageClassification"], "model_type": "vit", "id2label": {"0": "a", "1": "b"}}
    uri = put(service, "hf/", OF_HF | named, "model.safetensors")
    assert "not pretrain; name the encoder that it started from" in error(probe(client, artifact=uri))[1]
    assert evaluate(client, encoder={"artifact": uri}, data={"source": "digits"}).status_code == 201


def test_a_file_of_weights(client: TestClient, service: Service, tmp_path: Path) -> None:
    """Only the workers can open it: its model, which the recipe depends on, must be given."""
    uri = "s3://elsewhere/mae/mae_pretrain_vit_base.pth"
    assert "there is no encoder at" in error(probe(client, artifact=uri))[1]
    service.storage.objects["elsewhere", "mae/mae_pretrain_vit_base.pth"] = b"weights"
    field, message = error(probe(client, artifact=uri))
    assert (field, "does not say its model here; give model" in message) == ("model", True)
    model = {"model": {"arch": "vit_base_patch16", "image_size": 224, "in_chans": 1}}
    spec = client.post("/v1/jobs", json=PROBE | model | {"encoder": {"artifact": uri}}).json()["spec"]
    assert (spec["encoder"]["artifact"], spec["recipe"]) == (uri, "paper")
    object.__setattr__(service.settings, "sources_are_local", True)
    for name in ("mae.pth", "mae.txt"):
        (tmp_path / name).write_text("weights")
    assert client.post("/v1/jobs", json=PROBE | model | {"encoder": {"file": str(tmp_path / "mae.pth")}}).status_code == 201
    assert "is no file of weights; their names end in .safetensors, .pth" in error(probe(client, file=str(tmp_path / "mae.txt")))[1]


def test_a_result_that_was_not_committed_does_not_exist(client: TestClient, service: Service) -> None:
    config = {"maestro": {"model": {"arch": "vit_tiny_patch2", "image_size": 8}, "normalize": {"mean": [0.5] * 3, "std": [0.5] * 3}}}
    uri = put(service, "jobs/x/encoder/", config, "model.safetensors")
    assert error(probe(client, artifact=uri))[1].startswith(f"{uri} was not committed: there is no manifest.json in it")


def test_a_pretraining_goes_on_from_an_encoder(client: TestClient, service: Service, pretrained: str, finetuned: str) -> None:
    answer = client.post("/v1/jobs", json=PRETRAIN | {"encoder": {"job": pretrained}})
    assert answer.status_code == 201, answer.text
    assert answer.json()["spec"]["encoder"]["artifact"] == f"s3://maestro/jobs/{pretrained}/encoder/"
    larger = {"model": {"arch": "vit_tiny_patch2", "image_size": 16, "in_chans": 1}}
    assert client.post("/v1/jobs", json=PRETRAIN | larger | {"encoder": {"job": pretrained}}).status_code == 201
    other = {"model": {"arch": "vit_tiny_patch4", "image_size": 8, "in_chans": 1}}
    field, message = error(client.post("/v1/jobs", json=PRETRAIN | other | {"encoder": {"job": pretrained}}))
    assert (field, "'vit_tiny_patch4' (encoder: 'vit_tiny_patch2')" in message) == ("model", True)
    assert "is of kind finetune; name a pretrain job" in error(client.post("/v1/jobs", json=PRETRAIN | {"encoder": {"job": finetuned}}))[1]
    message = error(client.post("/v1/jobs", json=PRETRAIN | {"encoder": {"init": "random"}}))[1]
    assert message == "a pretraining begins with random weights anyway; leave it out"


def test_random_weights_need_nothing(client: TestClient, service: Service) -> None:
    service.storage.is_down = True
    model = {"arch": "vit_tiny_patch2", "image_size": 8, "in_chans": 1}
    assert client.post("/v1/jobs", json=PROBE | {"encoder": {"init": "random"}, "model": model}).status_code == 201
