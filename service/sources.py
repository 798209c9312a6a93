"""Checks of data folders at submission, where this machine sees the same folders as the workers."""

import os
from collections.abc import Iterator
from pathlib import Path

from mae_core.config import EmbedSpec, EvaluateSpec, PretrainSpec, Spec
from mae_core.options import DIGITS, IMAGE_SUFFIXES, DataConfig
from service.errors import Invalid

_REMEDY = "put the images of each class into a folder of its name"


def check_sources(spec: Spec) -> None:
    """Invalid where a folder is missing, empty, or not sorted into classes though labels are needed. The same rules as mae_core.data's."""
    folders = _check_folders("data", spec.data)
    if isinstance(spec, EmbedSpec):
        return
    if isinstance(spec, EvaluateSpec):
        for field, folder in folders.items():
            _classes(field, folder)  # how many there must be depends on the encoder, which the workers open
    elif not isinstance(spec, PretrainSpec):
        _check_labels(folders)
    elif spec.evaluation.labelled is not None:
        _check_labels(_check_folders("evaluation.labelled", spec.evaluation.labelled))


def _check_folders(section: str, data: DataConfig) -> dict[str, Path]:
    """The folders that `data` names, by field, each with images in it."""
    sources = {f"{section}.source": data.source, f"{section}.validation": data.validation}
    folders = {field: Path(source) for field, source in sources.items() if source is not None and source != DIGITS}
    for field, folder in folders.items():
        _check_folder(field, folder)
    return folders


def _check_labels(folders: dict[str, Path]) -> None:
    """At least two classes, and the same ones in all of `folders`."""
    classes = {field: _classes(field, folder) for field, folder in folders.items()}
    for field, names in classes.items():
        if len(names) < 2:
            raise Invalid(field, f"labels are missing: {str(folders[field])!r} has only one class folder, {min(names)!r}; {_REMEDY}")
    for field, names in list(classes.items())[1:]:
        source, expected = next(iter(classes.items()))
        if names != expected:
            differ = ", ".join(sorted(names ^ expected)[:5])
            raise Invalid(field, f"its class folders are not those of {source}; only one of the two has {differ}")


def _check_folder(field: str, folder: Path) -> None:
    if not folder.exists():
        raise Invalid(field, f"the folder {str(folder)!r} does not exist")
    if not folder.is_dir():
        raise Invalid(field, f"{str(folder)!r} is not a folder; give the folder that holds the images")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise Invalid(field, f"the folder {str(folder)!r} cannot be read by the service; grant it access")
    if next(_images(folder), None) is None:
        raise Invalid(field, f"the folder {str(folder)!r} holds no images ({', '.join(IMAGE_SUFFIXES)}; links to folders are not followed)")


def _classes(field: str, folder: Path) -> set[str]:
    """The names of the class folders, at least one."""
    entries = list(folder.iterdir())
    loose = [entry.name for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file()]
    names = {entry.name for entry in entries if entry.is_dir() and not entry.is_symlink() and next(_images(entry), None) is not None}
    if loose:
        raise Invalid(field, f"labels are missing: {min(loose)!r} lies in {str(folder)!r} itself, in no class folder; {_REMEDY}")
    return names


def _images(folder: Path) -> Iterator[str]:
    for _, _, names in os.walk(folder):
        yield from (name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
