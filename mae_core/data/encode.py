"""One image file as it goes into a shard: as it was, or with its shorter side brought to a length."""

from io import BytesIO
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mae_core.data.decode import JpegImage, PixelArray, Pixels, decode_image
from mae_core.data.moments import moments_of

JPEG_QUALITY = 90  # of images that were JPEGs before; others stay lossless

_JPEG = b"\xff\xd8\xff"


class Encoded(NamedTuple):
    """suffix: of the file's name. moments: see `moments.moments_of`, of the pixels that are stored, before a JPEG loses some of them."""

    suffix: str
    data: bytes
    moments: NDArray[np.float64]


def encode(data: bytes, key: str, *, channels: int, resize: int | None) -> Encoded:
    """The file `key`, decoded once to see that it can be. Larger images are brought to a shorter side of `resize`.

    Resized bicubically with antialiasing, in `channels` channels and upright: JPEGs become JPEGs of quality 90 with halved chroma, other
    8-bit images of 1 or 3 channels PNGs, all others arrays in `.npy` of their own type. Raises UnreadableImage.
    """
    image = decode_image(data, channels, name=key)
    width, height = image.shape[1::-1] if isinstance(image, np.ndarray) else image.size
    if resize is None or min(width, height) <= resize:
        return Encoded(PurePosixPath(key).suffix.lower(), data, moments_of(image))
    zoom = resize / min(width, height)
    resized = _resized(image, (max(resize, round(width * zoom)), max(resize, round(height * zoom))))
    file = BytesIO()
    if isinstance(resized, np.ndarray):
        np.lib.format.write_array(file, resized, allow_pickle=False)
        suffix = ".npy"
    elif data.startswith(_JPEG):
        resized.save(file, format="JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
        suffix = ".jpg"
    else:
        resized.save(file, format="PNG")
        suffix = ".png"
    return Encoded(suffix, file.getvalue(), moments_of(resized))


def _resized(image: Pixels, size: tuple[int, int]) -> Image.Image | PixelArray:
    if isinstance(image, JpegImage):
        image = image.whole()
    if isinstance(image, Image.Image):
        return image.resize(size, Image.Resampling.BICUBIC)
    planes = [_resized_plane(image[:, :, channel], size) for channel in range(image.shape[2])]
    resized: PixelArray = np.stack(planes, axis=2)
    return resized


def _resized_plane(plane: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    values = np.asarray(Image.fromarray(plane.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
    if plane.dtype.kind == "f":
        return values
    return values.clip(0, np.iinfo(plane.dtype).max).round().astype(plane.dtype)
