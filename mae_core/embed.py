"""Features of a whole source, written part by part into a store: what is there and whole is not encoded again.

Each worker has parts of its own, whose batches depend on the source, the spec and the model alone; so the files are the same, byte for
byte, for any number of workers. Between batches they exchange what they did, and whether any of them is still at work.
"""

import hashlib
import json
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mae_core.config import EmbedSpec
from mae_core.data.names import printable
from mae_core.data.remote import Remote
from mae_core.data.skipped import SkippedImages
from mae_core.data.source import check_same_images, digest, open_source
from mae_core.errors import EncoderError
from mae_core.features import features_of
from mae_core.loop import CanSave, Progress, WantsStop, always, check_skipped
from mae_core.parts import Layout, PartNote, PartWriter, find_part, note_name, part_name
from mae_core.rounds import Measured, batch_size, measured_rounds, newly_skipped
from mae_core.run import Run, starting_encoder
from mae_core.stores import PartStore, StoredFile
from mae_core.vit import Encoder
from mae_core.world import World

REPORT = "embedding.json"
_NOT_OF_THE_FEATURES = {"name", "labels", "resources", "retry"}  # sections of a spec that change no byte of a part


class _Done(NamedTuple):
    """What a worker did since the last exchange. num_batches: encoded, or found in a whole part. wait_seconds: for the decoding."""

    num_batches: int = 0
    num_encoded: int = 0
    num_unreadable: int = 0
    num_not_finite: int = 0
    wait_seconds: float = 0.0


class EmbedRun(Run):
    """Its result is the parts in `parts`, and a report. Raises DataError or EncoderError."""

    def __init__(
        self, spec: EmbedSpec, *, world: World, encoder_folder: Path | None, parts: PartStore, remote: Remote | None = None
    ) -> None:
        self._spec, self._world, self._store = spec, world, parts
        encoder, self.normalize = starting_encoder(spec, encoder_folder, spec.seed)
        self._encoder = encoder.to(world.device).eval()
        self.model, self.metrics = encoder.model, {}
        self._source = open_source(spec.data.source, in_chans=self.model.in_chans, remote=remote)
        check_same_images([self._source], world)
        self._skipped = SkippedImages()
        tokens = [self.model.num_patches] if spec.pooling == "tokens" else []
        self._shape = [*tokens, self.model.width]
        self._num_features = int(np.prod(self._shape))
        self._layout = Layout.of(
            len(self._source.keys),
            batch_size=spec.batch_size or batch_size(self.model),
            images_per_part=spec.images_per_part,
            row_bytes=self._num_features * np.dtype(spec.dtype).itemsize,
        )
        self._made_of = {
            "spec": spec.model_dump(mode="json", exclude=_NOT_OF_THE_FEATURES),
            "model": self.model.model_dump(mode="json"),
            "normalize": self.normalize.model_dump(mode="json"),
            "encoder_sha256": _tensors_sha256(encoder),
            "shape": self._shape,
            "num_images": self._layout.num_images,
            "source_digest": digest(self._source),
        }
        self._notes: dict[int, PartNote] = {}  # of this worker's parts; at the end of all

    def progress(self, wants_stop: WantsStop, can_save: CanSave = always) -> Iterator[Progress]:
        num_batches, batches_done, num_unreadable = self._layout.num_batches, 0, 0
        with closing(self._work()) as work:
            while True:
                started = time.monotonic()
                is_working, stop, total, num_new = self._exchange(next(work, None), wants_stop)
                if not is_working:
                    break
                seconds = max(time.monotonic() - started, 1e-9)
                batches_done += total.num_batches
                num_unreadable += total.num_unreadable
                speed = {"images_per_second": total.num_encoded / seconds, "data_wait": total.wait_seconds / self._world.size / seconds}
                points = [(batches_done, speed)] if total.num_encoded else []
                skipped = newly_skipped(self._skipped, self._world) if num_new else {}
                yield Progress(batches_done, num_batches, batches_done / num_batches, points, skipped, stop_agreed=stop)
                if stop:
                    return
                self._check(total, num_unreadable)
        self._finish()

    def write_result(self, folder: Path) -> None:
        """`embedding.json`: what the parts are, and which images have no row."""
        parts = {part_name(part): {"first": self._layout.images(part)[0], "rows": note.num_rows} for part, note in self._notes.items()}
        unreadable = {path: why for note in self._notes.values() for path, why in note.unreadable.items()}
        (folder / REPORT).write_text(json.dumps(self._made_of | self.metrics | {"parts": parts, "unreadable": unreadable}) + "\n")

    def _work(self) -> Generator[_Done]:
        """All parts of this worker: first those that are there, then those that are missing."""
        names, missing = set(self._store.names()), []
        for part in range(self._world.rank, self._layout.num_parts, self._world.size):
            note = find_part(self._store, part, made_of=self._text(part)) if note_name(part) in names else None
            if note is None:
                missing.append(part)
                continue
            self._notes[part] = note
            yield _Done(num_batches=self._layout.batches(part), num_unreadable=len(note.unreadable))
        yield from self._encode(missing)

    def _encode(self, missing: list[int]) -> Generator[_Done]:
        """Encodes and stores parts, yielding after each batch: a part is stored when all have agreed on its last one."""
        members = [image for part in missing for image in self._layout.images(part)]
        with closing(self._rounds(members)) as rounds:
            for part in missing:
                left = set(self._layout.images(part))
                with self._writer(part) as writer:
                    for measured in islice(rounds, self._layout.batches(part)):
                        found = [members[place] for place in measured.places_B.tolist()]
                        left.difference_update(found)
                        with np.errstate(over="ignore"):  # what float16 cannot hold is counted below
                            features_BF = measured.outputs.flatten(1).cpu().numpy().astype(self._spec.dtype)
                        writer.add(found, features_BF)
                        num_not_finite = int((~np.isfinite(features_BF).all(axis=1)).sum())
                        yield _Done(1, len(found), num_not_finite=num_not_finite, wait_seconds=measured.wait_seconds)
                    self._notes[part] = writer.finish(self._why_unreadable(sorted(left)))
                if left:
                    yield _Done(num_unreadable=len(left))

    def _rounds(self, members: list[int]) -> Generator[Measured]:
        return measured_rounds(
            features_of(self._encoder, self._spec.pooling),
            self._source,
            members,
            model=self.model,
            normalize=self.normalize,
            world=World(device=self._world.device),
            num_threads=self._spec.resources.cpus_per_worker,
            skipped=self._skipped,
            at_once=self._layout.batch_size,
        )

    def _writer(self, part: int) -> PartWriter:
        made_of = self._text(part)
        return PartWriter(self._store, part, self._source, num_features=self._num_features, dtype=self._spec.dtype, made_of=made_of)

    def _text(self, part: int) -> str:
        """What a part is made of, as JSON."""
        images = self._layout.images(part)
        return json.dumps(self._made_of | {"images": [images.start, images.stop]})

    def _why_unreadable(self, images: list[int]) -> dict[str, str]:
        known = self._skipped.known()
        return {key: known[key] for key in (printable(self._source.keys[image]) for image in images)}

    def _exchange(self, done: _Done | None, wants_stop: WantsStop) -> tuple[bool, bool, _Done, int]:
        """Whether any worker did something, or wants to stop; what they did together; and how many newly met unreadable images."""
        own = [float(done is not None), float(wants_stop()), float(self._skipped.num_new), *(done or _Done())]
        working, stop, num_new, *numbers = self._world.sum(torch.tensor(own, dtype=torch.float64, device=self._world.device)).tolist()
        batches, encoded, unreadable, not_finite, waited = numbers
        return working > 0, stop > 0, _Done(int(batches), int(encoded), int(unreadable), int(not_finite), waited), int(num_new)

    def _check(self, total: _Done, num_unreadable: int) -> None:
        """Raises DataError or EncoderError, on all workers at once."""
        if total.num_not_finite:
            remedy = "its weights are damaged, name another" + ("; or set dtype to float32" if self._spec.dtype == "float16" else "")
            raise EncoderError(f"the encoder's features of {total.num_not_finite} image(s) are not finite numbers; {remedy}")
        limit = self._spec.data.max_corrupt_fraction
        check_skipped(num_unreadable, of=self._layout.num_images, max_fraction=limit, example="see the images_skipped events")

    def _finish(self) -> None:
        """Every worker learns of all parts; what an earlier state of the source has left beside them goes."""
        gathered = {part: note for notes in self._world.gather(self._notes) for part, note in notes.items()}
        self._notes = dict(sorted(gathered.items()))
        self.stored = {part_name(part): StoredFile(note.bytes, note.sha256) for part, note in self._notes.items()}
        num_rows = sum(note.num_rows for note in self._notes.values())
        self.metrics = {"num_images": num_rows, "num_unreadable": self._layout.num_images - num_rows, "dim": self._num_features}
        if self._world.rank == 0:
            expected = {name for part in self._notes for name in (part_name(part), note_name(part))}
            for name in sorted(self._store.names()):
                if name.startswith("part-") and name not in expected:
                    self._store.delete(name)


def _tensors_sha256(encoder: Encoder) -> str:
    """Of all tensors, in order of name: whatever format they were read from."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(tensor.cpu().contiguous().numpy().data)
    return sha256.hexdigest()
