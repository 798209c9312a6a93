"""Where images come from: a folder, packed shards, object storage, or the handwritten digits of scikit-learn.

Samples are known by their place in a sorted list.
"""

import hashlib
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mae_core.data.decode import Pixels, UnfitImage, UnreadableImage, read_image
from mae_core.data.listing import find_files
from mae_core.data.names import key_hash, labels_of, printable
from mae_core.data.packed_source import LocalFiles, PackedSource
from mae_core.data.remote import Remote, open_remote
from mae_core.errors import DataError
from mae_core.options import DIGITS, IMAGE_SUFFIXES, DataConfig
from mae_core.packed import INDEX, is_packed, is_remote
from mae_core.world import World

_FIRST_IMAGES = 10


class ImageSource(Protocol):
    """Images by index. `labels` are indices into `classes`; both are empty where there are no labels."""

    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Sequence[int]: ...

    def read(self, index: int) -> Pixels:
        """The image, in the channels asked for, as `decode.read_image` gives it. Raises UnreadableImage."""
        ...


@runtime_checkable
class StreamedSource(ImageSource, Protocol):
    """Images that are fetched from elsewhere, and kept here for a while."""

    def want(self, samples: Sequence[int]) -> None:
        """These will be read soon, in this order. Returns at once."""
        ...


class FolderSource:
    """Every image below a folder, in sorted order. The first-level folders are the classes, where there are any."""

    def __init__(self, folder: Path, in_chans: int) -> None:
        self._folder = folder
        self._in_chans = in_chans
        self.keys = _find_images(folder)
        self.classes, self.labels = labels_of(self.keys)

    def read(self, index: int) -> Pixels:
        return read_image(self._folder / self.keys[index], self._in_chans)


class DigitsSource:
    """The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships."""

    def __init__(self) -> None:
        # load_digits reads the same file, a second later: importing scikit-learn takes it.
        [library] = cast(ModuleSpec, find_spec("sklearn")).submodule_search_locations or []
        table = np.loadtxt(Path(library) / "datasets" / "data" / "digits.csv.gz", delimiter=",")  # 64 pixels from 0 to 16, the digit
        self._images: NDArray[np.uint8] = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self.keys = [f"digit-{index}" for index in range(len(self._images))]
        self.classes = [str(digit) for digit in range(10)]
        self.labels: list[int] = table[:, -1].astype(int).tolist()

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])


def open_source(place: str, *, in_chans: int, remote: Remote | None = None) -> ImageSource:
    """The images at `place`, in object storage by `remote`.

    Raises DataError where there are none, and where the first one has other channels than the model.
    """
    if place == DIGITS:
        if in_chans != 1:
            raise DataError(f"data: the digits have 1 channel, but model.in_chans is {in_chans}")
        return DigitsSource()
    source = open_remote(place, remote, in_chans=in_chans) if is_remote(place) else _open_folder(Path(place), in_chans)
    _check_first_image(source)
    return source


def _open_folder(folder: Path, in_chans: int) -> ImageSource:
    try:
        content = (folder / INDEX).read_bytes()
    except OSError:
        content = b""
    return PackedSource(content, LocalFiles(folder), in_chans=in_chans) if is_packed(content) else FolderSource(folder, in_chans)


def _check_first_image(source: ImageSource) -> None:
    """Raises DataError where the first readable image does not fit the model: the others will not either, and need not be tried."""
    for index in range(min(_FIRST_IMAGES, len(source.keys))):
        try:
            source.read(index)
            return
        except UnfitImage as error:
            raise DataError(f"data: {error}") from error
        except UnreadableImage:
            continue  # counted, and named, when the run comes to it


def check_same_images(sources: Sequence[ImageSource], world: World) -> None:
    """Raises DataError, on all workers, where they do not see the same images: the order of samples would differ, and their number."""
    told = world.gather([(len(source.keys), digest(source)) for source in sources])
    for place, source in enumerate(sources):
        different = [rank for rank, each in enumerate(told) if each[place] != told[0][place]]
        if different:
            counts = f"worker 0 has {told[0][place][0]} images, worker {different[0]} has {told[different[0]][place][0]}"
            raise DataError(
                f"data: {len(different)} of {world.size} workers see other images than worker 0 (such as {printable(source.keys[0])}): "
                f"{counts}; every machine needs the same files under the same names"
            )


def digest(source: ImageSource) -> str:
    """Of the names of its images and classes, in order; of packed ones, of all their bytes."""
    if isinstance(source, PackedSource):
        return source.digest
    names = "\0".join([*source.keys, "", *source.classes])
    return hashlib.blake2b(names.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def check_units(source: ImageSource, data: DataConfig) -> None:
    """Raises DataError where images have float pixels, whose units nobody knows, and `data` says nothing of their mean and deviation."""
    for index in range(min(_FIRST_IMAGES, len(source.keys))):
        try:
            pixels = source.read(index)
        except UnreadableImage:
            continue
        if data.normalize is None and isinstance(pixels, np.ndarray) and pixels.dtype == np.float32:
            raise DataError(
                f"data.normalize: {source.keys[index]} has float pixels, in units of its own; set it to auto to have mean and deviation "
                "measured, or give them"
            )
        return


def _find_images(folder: Path) -> list[str]:
    """Paths of all images below `folder`, relative to it, sorted."""
    found = find_files(folder, " on this worker; check data.source, and that every machine has it")
    images = sorted(name for name in found if name.lower().endswith(IMAGE_SUFFIXES))
    if not images:
        raise DataError(f"data: no images below {folder} (looked for {', '.join(IMAGE_SUFFIXES)}; links to folders are not followed)")
    return images


def split(source: ImageSource, fraction: float) -> tuple[Sequence[int], Sequence[int]]:
    """Indices of the training and the held-back images. An image's key alone decides, so that it is the same in every job."""
    if isinstance(source, PackedSource):
        return source.split(fraction)
    train: list[int] = []
    held_back: list[int] = []
    for index, key in enumerate(source.keys):
        (held_back if key_hash(key) / 2**64 < fraction else train).append(index)
    return train, held_back


class LabelledData:
    """Training and validation images with labels. Raises DataError where labels are missing or the classes of the two differ."""

    def __init__(self, data: DataConfig, *, in_chans: int, remote: Remote | None = None) -> None:
        self.train_source = open_source(data.source, in_chans=in_chans, remote=remote)
        if data.validation is None:
            self.validation_source = self.train_source
            self.train, self.validation = split(self.train_source, data.validation_fraction)
        else:
            self.validation_source = open_source(data.validation, in_chans=in_chans, remote=remote)
            self.train, self.validation = range(len(self.train_source.keys)), range(len(self.validation_source.keys))
        self.classes = self.train_source.classes
        if len(self.classes) < 2:
            raise DataError(f"data.source {data.source} has no labels: put the images of each class into a folder of its name")
        if list(self.validation_source.classes) != list(self.classes):
            missing = sorted(set(self.classes) ^ set(self.validation_source.classes))[:5]
            raise DataError(f"data.validation {data.validation} has other classes than data.source; only in one: {', '.join(missing)}")
        if not self.train or not self.validation:
            raise DataError(f"data: {len(self.train)} training and {len(self.validation)} validation images; change validation_fraction")

    @property
    def sources(self) -> list[ImageSource]:
        """The one or two sources of the images."""
        return [self.train_source] if self.validation_source is self.train_source else [self.train_source, self.validation_source]
