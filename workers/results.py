"""Uploads what a run is for, and commits it."""

from datetime import UTC, datetime
from pathlib import Path

from mae_core.exports.formats import Outcomes
from mae_core.provenance import provenance
from mae_core.run import Run
from workers.contract import WorkOrder
from workers.objects import ObjectStore
from workers.stored import EncoderManifest, FileEntry, result_prefix


def commit_result(run: Run, order: WorkOrder, store: ObjectStore, folder: Path) -> Outcomes:
    """Writes the result into an empty folder, uploads it and commits it; what became of its formats."""
    run.write_result(folder)
    made_by = provenance(order.job, libraries=("ray",))
    exports = dict(run.write_exports(folder, made_by))
    prefix = result_prefix(order.prefix, order.spec.kind)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: store.put_file(prefix + name, folder / name) for name in names}
    files |= {name: FileEntry(bytes=stored.bytes, sha256=stored.sha256) for name, stored in run.stored.items()}
    manifest = EncoderManifest(
        job=order.job,
        attempt=order.attempt,
        kind=order.spec.kind,
        created_at=datetime.now(UTC),
        model=run.model,
        normalize=run.normalize,
        spec=order.spec,
        metrics=run.metrics,
        versions=made_by.versions,
        git_revision=made_by.git_revision,
        files=files,
        exports=exports,
    )
    store.commit(prefix, manifest)
    return exports
