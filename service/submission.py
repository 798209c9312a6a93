"""What a spec refers to is looked up once and frozen into it: at submission, or when the job that it waits for has succeeded."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy import select

from mae_core.config import RUN_SPEC, EvaluateSpec, Spec
from mae_core.options import EncoderRef, ModelConfig
from mae_core.saved_config import WEIGHT_SUFFIXES
from service.artifacts import JOBS_PREFIX
from service.db import Database
from service.errors import Invalid, spec_errors
from service.models import JobRow
from service.saved_encoders import FoundEncoder, LocalPlace, StoredPlace, find_encoder
from service.storage import Storage, split_uri
from workers.contract import JobStatus


def resolve_encoder(database: Database, storage: Storage, spec: Spec, *, project: str, sources_are_local: bool) -> Spec:
    """The spec with its encoder named by an artifact and with the encoder's model; or Invalid with what to do.

    Of jobs, those of `project` alone are there.
    """
    if spec.encoder is None:
        return spec
    if spec.encoder.init is not None:
        _check_evaluation(spec, has_head=False)
        return spec
    if spec.encoder.file is not None:
        return _from_file(spec, spec.encoder.file, sources_are_local=sources_are_local)
    field, uri = "encoder.artifact", spec.encoder.artifact
    if spec.encoder.job is not None:
        field, parent = "encoder.job", _parent(database, spec.encoder.job, spec, project=project)
        uri = parent.result_uri
        if uri is None:  # it has not finished: the job waits for it
            model = parent.spec.get("model")
            found = FoundEncoder(parent.kind, ModelConfig.model_validate(model) if model is not None else None)
            return _with_encoder(spec, found, field=field, where=f"of job {parent.id}")
    assert uri is not None
    _check_uri(database, storage, uri, project=project)
    if not uri.endswith(WEIGHT_SUFFIXES):
        uri = uri.rstrip("/") + "/"
    frozen = spec.model_copy(update={"encoder": EncoderRef(artifact=uri)})
    return _with_encoder(frozen, find_encoder(StoredPlace(storage, uri), field=field), field=field, where=uri)


def encoder_job(spec: Spec, *, bucket: str) -> str | None:
    """The job, if any, whose result a spec starts from: by its name, or by where that lies in our bucket."""
    if spec.encoder is None:
        return None
    owner = None if spec.encoder.artifact is None else _owner_of(spec.encoder.artifact, bucket=bucket)
    return spec.encoder.job or owner


def _owner_of(uri: str, *, bucket: str) -> str | None:
    """The job below whose prefix an address lies; None where that is none of our bucket's."""
    found, key = split_uri(uri)
    first, _, rest = key.partition("/")
    return rest.partition("/")[0] if found == bucket and first == JOBS_PREFIX.rstrip("/") else None


def _usable(spec: Spec) -> list[str]:
    """Kinds of jobs whose result the spec can start from."""
    return ["pretrain", "finetune"] if isinstance(spec, EvaluateSpec) else ["pretrain"]


def freeze_parent(storage: Storage, spec: dict[str, Any], result_uri: str) -> dict[str, Any]:
    """The stored spec of a job that waited for another, with that one's result in its place. Invalid where it cannot be used."""
    found = find_encoder(StoredPlace(storage, result_uri), field="encoder.job")
    model = spec["model"] or (found.model.model_dump(mode="json") if found.model is not None else None)
    frozen = RUN_SPEC.validate_python(spec | {"encoder": {"artifact": result_uri}, "model": model})
    return frozen.model_dump(mode="json")


def _parent(database: Database, job_id: str, spec: Spec, *, project: str) -> JobRow:
    """The job that the spec starts from: its result_uri is None as long as it goes on."""
    field = "encoder.job"
    with database.read() as session:
        row = session.get(JobRow, job_id)
    if row is None or row.deleted_at is not None or row.project != project:
        raise Invalid(field, f"there is no job {job_id}")
    if row.kind not in _usable(spec):
        wanted = " or ".join(_usable(spec))
        raise Invalid(field, f"job {job_id} is of kind {row.kind}; name a {wanted} job, or give the encoder as an artifact")
    if row.status in (JobStatus.FAILED, JobStatus.CANCELLED):
        raise Invalid(field, f"job {job_id} is {row.status}, so it left no encoder; name a job that has succeeded")
    return row


def _check_uri(database: Database, storage: Storage, uri: str, *, project: str) -> None:
    """Invalid for what lies in our bucket below a job that is not there, or not in this project."""
    field = "encoder.artifact"
    key = split_uri(uri)[1]
    if not {"", ".", ".."}.isdisjoint(key.removesuffix("/").split("/")):  # who takes them out of a path would read another object
        raise Invalid(field, f"{uri} has an empty part, or one of dots; write the key as it is")
    job_id = _owner_of(uri, bucket=storage.bucket)
    if job_id is None:
        return
    with database.read() as session:
        if session.scalar(select(JobRow.project).where(JobRow.id == job_id, JobRow.deleted_at.is_(None))) != project:
            raise Invalid(field, f"there is no job {job_id}")


def _from_file(spec: Spec, path: str, *, sources_are_local: bool) -> Spec:
    field = "encoder.file"
    if not sources_are_local:
        raise Invalid(field, "this service does not see its workers' disks; put the encoder into object storage and give its artifact")
    if not Path(path).is_absolute():
        raise Invalid(field, f"{path!r} must be an absolute path")
    return _with_encoder(spec, find_encoder(LocalPlace(Path(path)), field=field), field=field, where=path)


def _with_encoder(spec: Spec, found: FoundEncoder, *, field: str, where: str) -> Spec:
    if found.kind not in _usable(spec):
        was = f"{where} is the result of a job of kind {found.kind}"
        raise Invalid(field, f"{was}, not {' or '.join(_usable(spec))}; name the encoder that it started from")
    _check_evaluation(spec, has_head=found.kind == "finetune")
    if found.model is None:
        if spec.model is None:  # the recipe follows the model's size, and only a worker can open the file
            raise Invalid("model", f"the file {where} does not say its model here; give model (arch and image_size), or name a folder")
        return spec
    try:
        return spec.with_model(found.model, where=where)
    except ValidationError as error:
        first = spec_errors(error.errors())[0]
        at = "model" if first["field"] == "body" else first["field"]
        raise Invalid(at, f"with the encoder {where}: {first['message']}") from None
    except ValueError as error:
        raise Invalid("model", str(error)) from None


def _check_evaluation(spec: Spec, *, has_head: bool) -> None:
    """What an evaluation needs, and what it would ignore, depends on whether the model has a head."""
    if not isinstance(spec, EvaluateSpec):
        return
    for field in ("knn", "pooling"):
        if has_head and field in spec.model_fields_set:
            raise Invalid(field, "a fine-tuned model is measured by its own head and pooling; leave it out")
    if not has_head and spec.data.validation is None and not spec.data.validation_fraction:
        raise Invalid(
            "data",
            "an encoder without a head is measured by k-NN against labelled images: hold some back, "
            "with validation (a folder) or validation_fraction (such as 0.2)",
        )
