"""One image file → pixels. The content says the format, not the name.

Shapes: H and W pixels, C channels.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mae_core.data.jpeg import JpegHeader, decode_rows, read_header

PixelArray = NDArray[np.uint8 | np.uint16 | np.float32]

_NPY, _PNG, _JPEG = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_DEPTH = 24  # the byte of the header chunk that says bits for each channel
_MODES = {1: "L", 3: "RGB"}
_ORIENTATION = 0x0112
_EXIF = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # where Pillow looks for it
_UPRIGHT: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {  # as ImageOps.exif_transpose, which takes no arrays
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: np.rot90(pixels),
}


class UnreadableImage(Exception):
    """One image cannot be used; the message says which and why."""


class UnfitImage(UnreadableImage):
    """An image that is whole, but not what the model takes: its channels or its type of number. Most likely all are like this."""


@dataclass(frozen=True, eq=False)
class JpegImage:
    """An upright JPEG in colour, decoded when its pixels are asked for, and no more of it than that needs. Errors call it `name`."""

    name: object
    header: JpegHeader
    data: bytes

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, as of PIL images."""
        return self.header.width, self.header.height

    def rows(self, bottom: int, *, shrink: int = 1) -> NDArray[np.uint8]:
        """The image down to the row `bottom`, not included: (H, W, 3), each side divided by `shrink` and rounded up.

        `shrink` is 1 or one of `jpeg.SHRINKS`. Raises UnreadableImage where the file cannot be decoded.
        """
        try:
            return decode_rows(self.data, self.header, bottom, shrink=shrink)
        except ValueError:
            return np.asarray(self.by_pillow().reduce(shrink))[: math.ceil(bottom / shrink)]

    def whole(self) -> Image.Image:
        """All of it. Raises UnreadableImage where the file cannot be decoded."""
        return Image.fromarray(self.rows(self.header.height))

    def by_pillow(self) -> Image.Image:
        """All of it, decoded by Pillow, whose word is the last on what can be read and on why not. Raises UnreadableImage."""
        with _named(self.name):
            return _read_by_pillow(BytesIO(self.data), 3)  # type: ignore[return-value]  # JPEGs in 3 channels are PIL images


Pixels = Image.Image | PixelArray | JpegImage


@contextmanager
def _named(name: object) -> Iterator[None]:
    """Whatever goes wrong becomes an UnreadableImage that names the image."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"{name}: cannot identify the format of this image; is it one?") from error
    except UnreadableImage as error:
        raise type(error)(f"{name}: {error}") from error
    except Exception as error:  # a broken file makes decoders raise almost anything
        raise UnreadableImage(f"{name}: {error or type(error).__name__}") from error


def read_image(path: Path, in_chans: int) -> Pixels:
    """The image in a file, as `decode_image` gives it. Raises UnreadableImage."""
    with _named(path), path.open("rb", buffering=0) as unbuffered:
        data = unbuffered.read()
    return decode_image(data, in_chans, name=path)


def decode_image(data: bytes, in_chans: int, *, name: object) -> Pixels:
    """The image in `in_chans` channels, upright: a PIL image where it has 8 bits and 1 or 3 channels, else an array (H, W, C).

    A JPEG in colour is not decoded yet: damage inside of it is told when its pixels are asked for. Arrays are uint8, uint16 or float32:
    other types become float32 where it holds them exactly (float64: rounded). Between grey and colour, 8-bit images are converted as Pillow
    does; 16-bit and float ones only from grey to colour; an alpha channel is left out where the model has none. Arrays in `.npy` are
    (H, W), (H, W, C) or (C, H, W). `name` is what errors call the image: its str(), made only then.

    Raises UnfitImage where the channels or the type do not fit, UnreadableImage where the file cannot be decoded or has NaN or infinite
    pixels.
    """
    with _named(name):
        if data.startswith(_JPEG) and in_chans == 3 and (jpeg := _open_jpeg(name, data)) is not None:
            return jpeg
        file = BytesIO(data)
        if data.startswith(_PNG) and data[_PNG_DEPTH : _PNG_DEPTH + 1] == b"\x10":
            return _fitted(*_read_png_of_16_bits(file), in_chans)
        if data.startswith(_TIFF) and (decoded := _read_tiff(file, in_chans)) is not None:
            return _fitted(*decoded, in_chans)
        if data.startswith(_NPY):
            return _fitted(_channels_last(np.lib.format.read_array(file, allow_pickle=False), in_chans), False, in_chans)
        file.seek(0)
        return _read_by_pillow(file, in_chans)


def _open_jpeg(name: object, data: bytes) -> JpegImage | None:
    """None: it lies on its side, is too large to be meant, or is of a kind that Pillow alone knows, such as CMYK or half a file."""
    header = read_header(data)
    if header is None or (Image.MAX_IMAGE_PIXELS is not None and header.width * header.height > Image.MAX_IMAGE_PIXELS):
        return None
    if header.has_metadata:
        with Image.open(BytesIO(data)) as image:
            if image.getexif().get(_ORIENTATION, 1) != 1:
                return None
    return JpegImage(name, header, data)


def _read_by_pillow(file: BinaryIO, in_chans: int) -> Pixels:
    with Image.open(file) as image:
        image.load()
        if _EXIF & image.info.keys() and image.getexif().get(_ORIENTATION, 1) != 1:  # the first is cheap, which small images feel
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            return _fitted(np.asarray(image)[:, :, None], False, in_chans)
        if in_chans in _MODES:
            return image.convert(_MODES[in_chans])
        if in_chans == 4 and image.has_transparency_data:
            return np.asarray(image.convert("RGBA"))  # Pillow would weigh its colours by alpha when it resizes it
        found = len(image.getbands())
        if image.mode in ("LA", "CMYK") and found == in_chans:
            return np.asarray(image)
        raise _wrong_channels(found, image.mode, in_chans)


def _read_png_of_16_bits(file: BinaryIO) -> tuple[NDArray[Any], bool]:
    """(H, W, C), and whether the last channel is alpha. Not by Pillow, which cuts 16 bits of colour to 8 in silence."""
    import imagecodecs

    exif = Image.Exif()
    with Image.open(file) as image:  # also refuses sizes that would fill the memory
        exif.load(image.info.get("exif", b""))
    file.seek(0)
    pixels = imagecodecs.png_decode(file.read())
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return _upright(pixels, exif.get(_ORIENTATION, 1)), pixels.shape[2] in (2, 4)


def _read_tiff(file: BinaryIO, in_chans: int) -> tuple[NDArray[Any], bool] | None:
    """(H, W, C), and whether the last channel is alpha. None: palettes, CMYK, single bits and the like, which Pillow knows."""
    from tifffile import EXTRASAMPLE, PHOTOMETRIC, TiffFile  # a quarter of a second: only where there are such images

    with TiffFile(file) as tiff:
        series = tiff.series[0]
        page = series.keyframe
        if page.bitspersample < 8 or page.photometric not in (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB):
            return None
        pixels = series.asarray(maxworkers=1)  # the loader has threads enough
        if page.photometric == PHOTOMETRIC.MINISWHITE and pixels.dtype.kind == "u":
            pixels = (1 << page.bitspersample) - 1 - pixels
        pixels = _upright(_plane_and_channels(pixels, series.axes, in_chans), page.tags.valueof(_ORIENTATION, default=1))
        return pixels, page.extrasamples[-1:] in ((EXTRASAMPLE.ASSOCALPHA,), (EXTRASAMPLE.UNASSALPHA,))


def _plane_and_channels(pixels: NDArray[Any], axes: str, in_chans: int) -> NDArray[Any]:
    """(H, W, C) of a TIFF's `pixels`, whose `axes` tifffile names: Y, X, S samples, C channels, I pages, Q what it does not know."""
    kept = [place for place, axis in enumerate(axes) if axis in "YX" or pixels.shape[place] > 1]
    names = "".join(axes[place] for place in kept)
    more = names.replace("Y", "").replace("X", "")
    is_image = len(names) == len(more) + 2 and more in ("", "S", "C", "Q", "I")
    if not is_image or (more == "I" and pixels.shape[axes.index("I")] != in_chans):  # pages count as channels where they are as many
        raise UnfitImage(f"its axes {axes} of {pixels.shape} are no single image; save every image as a file of its own")
    pixels = pixels.reshape([pixels.shape[place] for place in kept])
    if more == "Q":
        return _channels_last(pixels, in_chans)
    return np.moveaxis(pixels, names.index(more), -1) if more else pixels[:, :, None]


def _channels_last(pixels: NDArray[Any], in_chans: int) -> NDArray[Any]:
    """(H, W, C) of an array that does not say which axis is which."""
    if pixels.ndim == 2:
        return pixels[:, :, None]
    if pixels.ndim != 3:
        raise UnfitImage(f"an array of shape {pixels.shape} is no image; save it as (H, W) or (H, W, C)")
    known = (1, 3, 4) if in_chans in _MODES else (in_chans,)
    first_is_channels = pixels.shape[0] in known and pixels.shape[2] not in known
    if first_is_channels or (pixels.shape[0] == in_chans and pixels.shape[2] != in_chans):
        return np.moveaxis(pixels, 0, -1)
    return pixels


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    return _UPRIGHT[orientation](pixels) if orientation in _UPRIGHT else pixels


def _fitted(pixels: NDArray[Any], has_alpha: bool, in_chans: int) -> Pixels:
    """`pixels` (H, W, C) of any type as what `read_image` returns."""
    if not pixels.size:
        raise UnfitImage(f"it is empty, of shape {pixels.shape}")
    pixels = _of_known_type(pixels)
    if has_alpha and pixels.shape[2] != in_chans:
        pixels = pixels[:, :, :-1]
    if pixels.dtype == np.uint8 and pixels.shape[2] in _MODES and in_chans in _MODES:
        image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
        return image.convert(_MODES[in_chans])
    if pixels.shape[2] == 1 and in_chans == 3:
        pixels = np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] != in_chans:
        raise _wrong_channels(pixels.shape[2], f"{pixels.dtype} of {pixels.shape}", in_chans)
    return pixels


def _of_known_type(pixels: NDArray[Any]) -> PixelArray:
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2:
        return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if pixels.dtype.kind != "f" and not (pixels.dtype.kind == "i" and pixels.dtype.itemsize <= 2):
        raise UnfitImage(f"its pixels are {pixels.dtype}; save them as uint8, uint16 or float32")
    with np.errstate(over="ignore"):
        values = pixels.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise UnreadableImage("it has NaN or infinite pixels; give them numbers, or remove the image")
    return values


def _wrong_channels(found: int, what: str, in_chans: int) -> UnfitImage:
    return UnfitImage(
        f"{found} channel(s) ({what}), but model.in_chans is {in_chans}; set model.in_chans to {found}, or convert the images"
    )
