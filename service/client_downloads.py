"""Files of a job, from object storage to a folder: by presigned addresses, going on where an earlier try was broken off, checked."""

import hashlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from mae_core.exports.names import FOLDERS, ExportFormat
from service.client_errors import DownloadError
from service.client_http import Http
from workers.stored import MANIFEST, EncoderManifest, result_prefix

Tell = Callable[[str, int, int | None], None]  # a file's name, how many bytes of it are here, how many there are


class Downloads:
    """Of one job. `path`: of its artifacts in the API."""

    def __init__(self, http: Http, job: str, path: str, *, tell: Tell | None = None) -> None:
        self._http = http
        self._job = job
        self._path = path
        self._tell = tell or (lambda name, num_bytes, of: None)

    def file(self, name: str, to: Path, *, sha256: str | None = None, num_bytes: int | None = None) -> Path:
        """One artifact, to the file `to`. Raises DownloadError."""
        try:
            return self._file(name, to, sha256=sha256, num_bytes=num_bytes)
        except OSError as error:
            raise DownloadError(f"{to} cannot be written: {error.strerror}; a repeat goes on where this was broken off") from error

    def result(self, to: Path, *, kind: str, format: ExportFormat) -> tuple[EncoderManifest, Path]:
        """A committed result, into the folder `to`, by its manifest, which is written last."""
        prefix = result_prefix("", kind)
        partial = to / f".{MANIFEST}"
        self.file(prefix + MANIFEST, partial)
        manifest = EncoderManifest.model_validate_json(partial.read_bytes())
        for name in files_of(manifest, format):
            path = to / safe_path(name.removeprefix(FOLDERS[format]))
            entry = manifest.files[name]
            self.file(prefix + name, path, sha256=entry.sha256, num_bytes=entry.bytes)
        partial.replace(to / MANIFEST)
        return manifest, to

    def _file(self, name: str, to: Path, *, sha256: str | None, num_bytes: int | None) -> Path:
        if to.exists() and sha256 is not None and file_sha256(to) == sha256:
            return to
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = to.with_name(f".{to.name}.partial")
        for last_try in (False, True):
            self._http.patiently(lambda: self._bytes(name, partial, num_bytes=num_bytes), progress=lambda: _size(partial))
            found = file_sha256(partial)
            if sha256 is None or found == sha256:
                partial.replace(to)
                return to
            partial.unlink()  # perhaps the rest of another file: once more, from its beginning
            if last_try:
                raise DownloadError(f"{name} of job {self._job} has sha256 {found}, not {sha256}: it is damaged in the object store")
        raise AssertionError

    def _bytes(self, name: str, partial: Path, *, num_bytes: int | None) -> None:
        url = self._http.request_once("GET", f"{self._path}/{quoted(name)}").headers["location"]
        have = _size(partial)
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with self._http.stored(url, headers=headers) as response:
            if response.status_code == 416:  # all of it is here already, or it is another file: the checksum tells
                return
            if response.status_code not in (200, 206):
                raise DownloadError(f"{name} of job {self._job}: the object store answered {response.status_code}")
            goes_on = response.status_code == 206
            have = have if goes_on else 0
            with partial.open("ab" if goes_on else "wb") as output:
                for chunk in response.iter_bytes():
                    output.write(chunk)
                    have += len(chunk)
                    self._tell(name, have, num_bytes)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def quoted(name: str) -> str:
    """An artifact's name in a path."""
    return "/".join(quote(part, safe="") for part in name.split("/"))


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(manifest: EncoderManifest, format: ExportFormat) -> list[str]:
    """Names of the files of one format of a result. Raises DownloadError where it has none, and says which there are."""
    if manifest.kind not in ("pretrain", "finetune"):
        if format != "timm":
            raise DownloadError(f"job {manifest.job} is of kind {manifest.kind}, which is not written as {format}; leave the format out")
        return list(manifest.files)
    by_folder: dict[str, list[str]] = {}
    for name in manifest.files:
        folder, slash, _ = name.partition("/")
        by_folder.setdefault(folder + slash if slash else "", []).append(name)
    if FOLDERS[format] in by_folder:
        return by_folder[FOLDERS[format]]
    there = ", ".join(name for name, folder in FOLDERS.items() if folder in by_folder)
    outcome = manifest.exports.get(format)
    why = outcome.left_out if outcome is not None else None
    raise DownloadError(f"job {manifest.job} was not written as {format}{f' ({why})' if why else ''}; there are {there}")


def safe_path(name: str) -> Path:
    """A manifest's file name as a path that stays inside its folder."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise DownloadError(f"the manifest names the file {name!r}, which would lie outside its folder")
    return Path(*path.parts)
