"""Features of ranges of images as Parquet files. A note beside each says what made it, so that a run takes up those that are whole.

Which images lie in which part depends on the source, the spec and the model alone. Shapes: B images, F numbers of each.
"""

import math
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from mae_core.data.names import printable
from mae_core.data.source import ImageSource
from mae_core.options import Strict
from mae_core.stores import PartStore

METADATA = "maestro"  # the key of the schema's metadata that says, as JSON, what made a part
_IMAGES_PER_PART = 4096
_PART_BYTES = 256 * 2**20
_ROW_GROUP_BYTES = 64 * 2**20  # kept in memory until it is written


class PartNote(Strict):
    """What a part is: written behind it, so that a part without one is not there. unreadable: images without a row, and why."""

    made_of: str
    bytes: int
    sha256: str
    num_rows: int
    unreadable: dict[str, str]


@dataclass(frozen=True)
class Layout:
    """Which images lie in which part: consecutive ones, in whole batches."""

    num_images: int
    batch_size: int
    images_per_part: int

    @classmethod
    def of(cls, num_images: int, *, batch_size: int, images_per_part: int | None, row_bytes: int) -> Self:
        """With parts of `images_per_part`, rounded up to whole batches, or else of what is a good size for files."""
        wanted = images_per_part or max(min(_IMAGES_PER_PART, _PART_BYTES // row_bytes) // batch_size, 1) * batch_size
        return cls(num_images, batch_size, math.ceil(wanted / batch_size) * batch_size)

    @property
    def num_parts(self) -> int:
        return math.ceil(self.num_images / self.images_per_part)

    @property
    def num_batches(self) -> int:
        return math.ceil(self.num_images / self.batch_size)

    def images(self, part: int) -> range:
        """The images of a part, as indices into the source."""
        return range(part * self.images_per_part, min((part + 1) * self.images_per_part, self.num_images))

    def batches(self, part: int) -> int:
        """How many batches a part has."""
        return math.ceil(len(self.images(part)) / self.batch_size)


def part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def note_name(part: int) -> str:
    return f"part-{part:05d}.json"


def find_part(store: PartStore, part: int, *, made_of: str) -> PartNote | None:
    """The note of a part that is there, whole, and made of just that; else None."""
    try:
        note = PartNote.model_validate_json(store.read(note_name(part)))
    except ValidationError:
        return None
    is_whole = note.made_of == made_of and store.fingerprint(part_name(part)) == (note.bytes, note.sha256)
    return note if is_whole else None


class PartWriter:
    """One part on its way to `store`: a context, which leaves nothing behind where it ends before `finish`.

    Columns: `index` (int64, in the source), `path`, `label` (the name of the class, where the source has labels) and `features`
    (a fixed-size list). Readable images have a row, in order.
    """

    def __init__(self, store: PartStore, part: int, source: ImageSource, *, num_features: int, dtype: str, made_of: str) -> None:
        import pyarrow as pa  # a quarter of a second: only where parts are written
        import pyarrow.parquet as pq

        self._store, self._part, self._source, self._made_of = store, part, source, made_of
        self._path = store.scratch / f".{part_name(part)}"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        values = pa.list_(pa.field("element", pa.from_numpy_dtype(dtype), nullable=False), num_features)
        columns = [
            ("index", pa.int64()),
            ("path", pa.string()),
            *([("label", pa.string())] if source.classes else []),
            ("features", values),
        ]
        self._schema = pa.schema([pa.field(*column, nullable=False) for column in columns], metadata={METADATA: made_of})
        self._rows: list[Any] = []
        self._num_rows = self._num_written = 0
        self._rows_per_group = max(1, _ROW_GROUP_BYTES // (num_features * np.dtype(dtype).itemsize))
        self._writer = pq.ParquetWriter(
            self._path,
            self._schema,
            compression="zstd",
            use_dictionary=["label"],
            use_byte_stream_split=["features.list.element"],  # what numbers have in common lies together: a tenth smaller
            write_statistics=["index", "path", "label"],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()
        self._path.unlink(missing_ok=True)

    def add(self, images: list[int], features_BF: NDArray[np.float32 | np.float16]) -> None:
        """Rows of `images`, in order."""
        import pyarrow as pa

        source = self._source
        columns = [
            pa.array(images, pa.int64()),
            pa.array([printable(source.keys[image]) for image in images]),
            *([pa.array([printable(source.classes[source.labels[image]]) for image in images])] if source.classes else []),
            pa.FixedSizeListArray.from_arrays(pa.array(features_BF.reshape(-1)), type=self._schema.field("features").type),
        ]
        self._rows.append(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._num_rows += len(images)
        if self._num_rows - self._num_written >= self._rows_per_group:
            self._write_rows()

    def finish(self, unreadable: dict[str, str]) -> PartNote:
        """Stores the part, then its note."""
        self._write_rows()
        self._writer.close()
        stored = self._store.put(part_name(self._part), self._path)
        note = PartNote(made_of=self._made_of, num_rows=self._num_rows, unreadable=unreadable, **stored._asdict())
        self._path.write_text(note.model_dump_json())
        self._store.put(note_name(self._part), self._path)
        return note

    def _write_rows(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._writer.write_table(pa.Table.from_batches(self._rows), row_group_size=self._rows_per_group)
        self._rows, self._num_written = [], self._num_rows
