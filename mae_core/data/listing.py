"""What is to be packed: all images of a folder or prefix, or those of a list in CSV or Parquet, in the order of their names' hashes."""

import csv
import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from mae_core.data.names import key_hash, labels_of, printable
from mae_core.errors import DataError
from mae_core.options import IMAGE_SUFFIXES

LIST_SUFFIXES = (".csv", ".parquet")
_PATH, _LABEL = "path", "label"


class ImagePlace(Protocol):
    """Files by name, below one place. Other processes get a copy."""

    def names(self) -> list[str]:
        """All that is there."""
        ...

    def read(self, name: str) -> bytes:
        """All of a file. Raises OSError where it cannot be read."""
        ...


class FolderImages:
    """Files below a local folder, by their relative paths; an absolute path is taken as it is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        return find_files(self._folder, "")

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()


class Listed(NamedTuple):
    """Images by name, in the order in which they are packed. labels: places in `classes`; both empty where there are no labels."""

    keys: list[str]
    classes: list[str]
    labels: list[int]


def find_files(folder: Path, where: str) -> list[str]:
    """Paths of all files below `folder`, relative to it. Raises DataError where it cannot be read; `where` follows that in the message."""
    if not folder.is_dir():
        raise DataError(f"data: the folder {folder} does not exist{where}")

    def fail(error: OSError) -> None:
        raise DataError(f"data: the folder {error.filename} cannot be read{where} ({error.strerror}); mend its permissions") from error

    found = []
    for place, _, names in os.walk(folder, onerror=fail):
        inside = os.path.relpath(place, folder)
        found += names if inside == "." else [f"{inside}/{name}" for name in names]
    return found


def list_images(place: ImagePlace, list_name: str | None) -> Listed:
    """All images of `place`, or those of its file `list_name`. Raises DataError where there are none, and for a list that is unfit."""
    if list_name is None:
        keys = [name for name in place.names() if name.lower().endswith(IMAGE_SUFFIXES)]
        classes, labels = labels_of(keys)
        if not keys:
            raise DataError(f"data: no images found (looked for {', '.join(IMAGE_SUFFIXES)}; links to folders are not followed)")
    else:
        keys, classes, labels = _read_list(place, list_name)
    order = sorted(range(len(keys)), key=lambda index: (key_hash(keys[index]), keys[index]))
    return Listed(
        [keys[index] for index in order], [printable(name) for name in classes], [labels[index] for index in order] if classes else []
    )


def _read_list(place: ImagePlace, name: str) -> tuple[list[str], list[str], list[int]]:
    try:
        content = place.read(name)
        columns = _of_parquet(content) if name.lower().endswith(".parquet") else _of_csv(content)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"data: the list {name} cannot be read: {error}") from error
    if _PATH not in columns:
        raise DataError(f"data: the list {name} has no column {_PATH!r}, only {', '.join(columns) or 'none'}")
    keys = columns[_PATH]
    if not keys or any(not key for key in keys):
        raise DataError(f"data: the list {name} {'has a row without a path' if keys else 'is empty'}")
    [(most, times)] = Counter(keys).most_common(1)
    if times > 1:
        raise DataError(f"data: the list {name} has {most} {times} times")
    found = columns.get(_LABEL, [])
    if found and any(not label for label in found):
        raise DataError(f"data: in the list {name} {keys[found.index('')]} has no label; leave the column out, or give every image one")
    classes = sorted(set(found))
    places = {label: place for place, label in enumerate(classes)}
    return list(keys), classes, [places[label] for label in found]


def _of_csv(content: bytes) -> dict[str, Sequence[str]]:
    rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    return {name: [row[name] or "" for row in rows] for name in (_PATH, _LABEL) if rows and name in rows[0]}


def _of_parquet(content: bytes) -> dict[str, Sequence[str]]:
    import pyarrow as pa  # a quarter of a second: only where there is such a list
    import pyarrow.parquet as pq

    names = [name for name in (_PATH, _LABEL) if name in pq.read_schema(pa.BufferReader(content)).names]
    table = pq.read_table(pa.BufferReader(content), columns=names)
    return {name: ["" if value is None else str(value) for value in table[name].to_pylist()] for name in names}
