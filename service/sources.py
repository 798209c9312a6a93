"""Checks of a job's data at submission: what lies in object storage, and folders where this machine sees the same ones as the workers."""

from typing import NamedTuple

from pydantic import ValidationError

from mae_core.config import EmbedSpec, EvaluateSpec, FinetuneSpec, PretrainSpec, Spec
from mae_core.options import DIGITS, IMAGE_SUFFIXES, DataConfig
from mae_core.packed import INDEX, PackedIndex, is_packed, is_remote
from service.artifacts import JOBS_PREFIX
from service.errors import Invalid
from service.folders import REMEDY, check_folder, class_folders, packed_content
from service.storage import PAGE, ObjectNotFound, Storage, split_uri


class _Source(NamedTuple):
    """A place that a spec names, with images in it. packed: their index, if any. is_seen: whether names can be looked through here."""

    field: str
    place: str
    packed: PackedIndex | None
    is_seen: bool


def check_sources(spec: Spec, storage: Storage, *, sources_are_local: bool) -> None:
    """Invalid where images are missing, or have no labels though they are needed. The same rules as mae_core.data's.

    Raises StorageUnreachable where images lie in object storage that does not answer, or refuses us.
    """

    def found(section: str, data: DataConfig) -> list[_Source]:
        places = {f"{section}.source": data.source, f"{section}.validation": data.validation}
        return [
            _remote_source(field, place, storage) if is_remote(place) else _local_source(field, place)
            for field, place in places.items()
            if place is not None and place != DIGITS and (is_remote(place) or sources_are_local)
        ]

    sources = found("data", spec.data)
    if isinstance(spec, PretrainSpec | FinetuneSpec) and sources and sources[0].field == "data.source":
        _check_number(spec, sources[0])
    if isinstance(spec, EmbedSpec):
        return
    if isinstance(spec, EvaluateSpec):
        for source in sources:
            _classes(source)  # how many there must be depends on the encoder, which the workers open
    elif not isinstance(spec, PretrainSpec):
        _check_labels(sources)
    elif spec.evaluation.labelled is not None:
        _check_labels(found("evaluation.labelled", spec.evaluation.labelled))


def _local_source(field: str, place: str) -> _Source:
    content = packed_content(place)
    if content is not None:
        return _Source(field, place, _index(field, place, content), True)
    check_folder(field, place)
    return _Source(field, place, None, True)


def _remote_source(field: str, place: str, storage: Storage) -> _Source:
    bucket, prefix = split_uri(f"{place.rstrip('/')}/")
    if bucket == storage.bucket and prefix.startswith(JOBS_PREFIX):
        raise Invalid(field, f"{place} lies among the results of jobs; images have a prefix of their own")
    try:
        content = storage.read_text(prefix + INDEX, bucket=bucket)
        if is_packed(content.encode()):
            return _Source(field, place, _index(field, place, content), True)
    except ObjectNotFound:
        pass  # then it may be images themselves
    try:
        first = storage.list(prefix, bucket=bucket, limit=PAGE)
    except ObjectNotFound:
        raise Invalid(field, f"there is no bucket {bucket!r}") from None
    if not any(each.key.lower().endswith(IMAGE_SUFFIXES) for each in first) and len(first) < PAGE:
        raise Invalid(field, f"below {place} there are neither packed images ({INDEX}) nor images ({', '.join(IMAGE_SUFFIXES)})")
    return _Source(field, place, None, False)


def _index(field: str, place: str, content: str) -> PackedIndex:
    try:
        return PackedIndex.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors()[0]
        why = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
        raise Invalid(field, f"{place}: {INDEX} is damaged or of another version ({why}); pack the images again") from None


def _check_number(spec: PretrainSpec | FinetuneSpec, source: _Source) -> None:
    views = spec.masking.num_masks if isinstance(spec, PretrainSpec) else 1
    if source.packed is not None and spec.optim.batch_size > source.packed.num_images * views:
        raise Invalid("optim.batch_size", f"{spec.optim.batch_size} is more than the {source.packed.num_images} images of {source.place}")


def _check_labels(sources: list[_Source]) -> None:
    """At least two classes, and the same ones in all sources, as far as they can be seen from here."""
    classes = {source.field: names for source in sources if (names := _classes(source)) is not None}
    for source in sources:
        names = classes.get(source.field)
        if names is not None and len(names) < 2:
            raise Invalid(source.field, f"labels are missing: {source.place!r} has only one class folder, {min(names)!r}; {REMEDY}")
    for field, names in list(classes.items())[1:]:
        first, expected = next(iter(classes.items()))
        if names != expected:
            differ = ", ".join(sorted(names ^ expected)[:5])
            raise Invalid(field, f"its class folders are not those of {first}; only one of the two has {differ}")


def _classes(source: _Source) -> set[str] | None:
    """The names of the classes, at least one; None where only the workers can tell."""
    if source.packed is not None:
        if not source.packed.classes:
            raise Invalid(source.field, f"labels are missing: {source.place} was packed without classes; {REMEDY}, and pack them again")
        return set(source.packed.classes)
    return class_folders(source.field, source.place) if source.is_seen else None
