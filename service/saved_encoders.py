"""What lies where a spec says that its encoder does: a job's result, a folder of timm or Hugging Face, or a file of weights."""

import json
from pathlib import Path
from typing import NamedTuple, Protocol

from pydantic import ValidationError

from mae_core.options import ModelConfig
from mae_core.saved_config import CONFIG, IMAGE_PROCESSOR, WEIGHT_SUFFIXES, WEIGHTS, WEIGHTS_OF_TORCH, SavedConfig, saved_config
from service.errors import Invalid
from service.storage import ObjectNotFound, Storage, split_uri
from workers.stored import MANIFEST, EncoderManifest


class FoundEncoder(NamedTuple):
    """kind: of the job whose result it is, or would be. model None: only a worker can open the file."""

    kind: str
    model: ModelConfig | None


class Place(Protocol):
    """A folder, or a file of weights. `shown` is how errors name it, `is_ours_whole` whether our own results need no manifest here."""

    shown: str
    is_ours_whole: bool

    def read(self, name: str) -> str | None: ...
    def has(self, name: str) -> bool: ...
    def is_file(self) -> bool: ...


class LocalPlace:
    """On this machine's disk."""

    is_ours_whole = True  # a run without the service writes no manifest

    def __init__(self, path: Path) -> None:
        self._path, self.shown = path, repr(str(path))

    def read(self, name: str) -> str | None:
        try:
            return (self._path / name).read_text(errors="replace")
        except OSError:
            return None

    def has(self, name: str) -> bool:
        return (self._path / name).is_file()

    def is_file(self) -> bool:
        return self._path.is_file()


class StoredPlace:
    """In any bucket that our credentials open: s3://bucket/prefix/, or the key of a file of weights."""

    is_ours_whole = False

    def __init__(self, storage: Storage, uri: str) -> None:
        self._storage, self.shown = storage, uri
        self._bucket, self._key = split_uri(uri)

    def read(self, name: str) -> str | None:
        try:
            return self._storage.read_text(self._key + name, bucket=self._bucket)
        except ObjectNotFound:
            return None

    def has(self, name: str) -> bool:
        return any(found.key == self._key + name for found in self._storage.list(self._key + name, bucket=self._bucket))

    def is_file(self) -> bool:
        return self._key.endswith(WEIGHT_SUFFIXES) and self.has("")


def find_encoder(place: Place, *, field: str) -> FoundEncoder:
    """Invalid where `place` has nothing that a job could start from."""
    if place.is_file():
        if not place.shown.strip("'").endswith(WEIGHT_SUFFIXES):
            raise Invalid(field, f"{place.shown} is no file of weights; their names end in {', '.join(WEIGHT_SUFFIXES)}")
        return FoundEncoder("pretrain", None)
    if (text := place.read(MANIFEST)) is not None:
        manifest = _manifest(text, field=field, shown=place.shown)
        return FoundEncoder(manifest.kind, manifest.model)
    config = _config(place, field=field)
    if config.is_ours and not place.is_ours_whole:
        raise Invalid(field, f"{place.shown} was not committed: there is no {MANIFEST} in it; name the result of a job that succeeded")
    return FoundEncoder("finetune" if config.classes else "pretrain", config.model)


def _manifest(text: str, *, field: str, shown: str) -> EncoderManifest:
    try:
        return EncoderManifest.model_validate_json(text)
    except ValidationError:
        raise Invalid(field, f"the {MANIFEST} of {shown} is not an encoder's of this version of MAEstro; name another") from None


def _config(place: Place, *, field: str) -> SavedConfig:
    text = place.read(CONFIG)
    missing = [CONFIG] if text is None else []
    missing += [WEIGHTS] if not any(place.has(name) for name in (WEIGHTS, WEIGHTS_OF_TORCH)) else []
    if text is None or missing:
        what = f"there is no encoder at {place.shown}: no {MANIFEST}, and no {' and no '.join(missing)}"
        raise Invalid(field, f"{what}; name a folder that a job committed, one of timm or Hugging Face, or a file of weights")
    try:
        processor = place.read(IMAGE_PROCESSOR)
        return saved_config(json.loads(text), json.loads(processor) if processor is not None else None)
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
    except ValueError as error:
        why = str(error)
    raise Invalid(field, f"{place.shown}: {CONFIG} is no encoder's that can be used: {why}")
