"""What lies in object storage, and under which keys: the names and manifests by which service and workers find it.

Pydantic and mae_core.config only, as the contract. Whatever has no manifest does not exist.
"""

from datetime import datetime
from typing import Literal

from pydantic import ConfigDict, Field

from mae_core.config import RunSpec
from mae_core.exports.formats import ExportFormat, ExportOutcome
from mae_core.options import ModelConfig, NormalizeConfig, Strict
from workers.contract import CONTRACT_VERSION
from workers.names import DRIVER as DRIVER

MANIFEST = "manifest.json"


class FileEntry(Strict):
    """One file of a committed folder."""

    bytes: int
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class TrainingStateManifest(Strict):
    """Commits one training state: a file of each worker that wrote one. It lies beside them and is written last, `If-None-Match: *`."""

    contract: int = CONTRACT_VERSION
    job: str
    attempt: int
    incarnation: int
    step: int
    files: dict[str, FileEntry]
    created_at: datetime


class EncoderManifest(Strict):
    """Commits a run's result, whatever its kind: what it is, what made it, its files. Written last, `If-None-Match: *`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=True, ser_json_inf_nan="strings")

    contract: int = CONTRACT_VERSION
    job: str
    attempt: int
    kind: Literal["pretrain", "probe", "finetune", "evaluate", "embed"]
    created_at: datetime
    model: ModelConfig
    normalize: NormalizeConfig
    spec: RunSpec
    metrics: dict[str, float | list[float]]
    versions: dict[str, str]
    git_revision: str | None
    files: dict[str, FileEntry]
    exports: dict[ExportFormat, ExportOutcome] = Field(default={})


def result_prefix(prefix: str, kind: str) -> str:
    """Where a job's committed result lies, below the job's own prefix: its encoder, a probe's heads, an evaluation or an embedding."""
    return f"{prefix}{result_artifact(kind)}/"


def result_artifact(kind: str) -> Literal["encoder", "probe", "evaluation", "embedding"]:
    """What a run of `kind` is for."""
    match kind:
        case "probe":
            return "probe"
        case "evaluate":
            return "evaluation"
        case "embed":
            return "embedding"
    return "encoder"


def training_state_prefix(prefix: str) -> str:
    """Where a job's training states lie, one folder each."""
    return f"{prefix}training_state/"


def log_prefix(prefix: str, attempt: int, worker: str | None = None) -> str:
    """Where lies what the processes of an attempt have printed, in chunks; or one process: `worker` is its rank, or `driver`."""
    return f"{prefix}logs/attempt-{attempt}/" + (f"{worker}/" if worker is not None else "")


def log_chunk(prefix: str, offset: int) -> str:
    """The key of the chunk that begins at this byte."""
    return f"{prefix}{offset:015d}.txt"


def log_offset(key: str) -> int:
    """Where a chunk begins."""
    return int(key.rpartition("/")[2].removesuffix(".txt"))


def reconstructions_prefix(prefix: str) -> str:
    """Where a job's reconstructions lie, as pictures and as arrays."""
    return f"{prefix}reconstructions/"
