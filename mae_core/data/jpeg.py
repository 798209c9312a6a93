"""JPEG files, decoded no further than to the last row that is wanted.

Two thirds of the time of decoding goes into the entropy code, which can only be read from the top. So the decoder is told a smaller height
than the image has, and stops there. Decoded by libjpeg-turbo, as Pillow does: the pixels are the same bit for bit.
"""

import math
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray

SHRINKS = (8, 4, 2)  # the decoder shrinks by these while it decodes, at no cost

_START, _END = b"\xff\xd8\xff", b"\xff\xd9"
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_NO_FRAMES = {0xC4, 0xC8, 0xCC}  # markers between those of the frames that are of tables
_METADATA, _SCAN = 0xE1, 0xDA


@dataclass(frozen=True)
class JpegHeader:
    """What the header says. `height_at`: where in the file the height stands, in two bytes. `has_metadata`: EXIF or XMP."""

    width: int
    height: int
    height_at: int
    rows_at_once: int
    is_sequential: bool
    has_metadata: bool


def read_header(data: bytes) -> JpegHeader | None:
    """None where `data` is not a whole JPEG of 8 bits in grey or colour, of the kinds that are written today."""
    if not (data.startswith(_START) and data.endswith(_END)):
        return None
    frame_at, has_metadata, place = 0, False, 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == _SCAN:
            return _frame(data, frame_at, has_metadata) if frame_at else None
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES:
            frame_at = place
        has_metadata |= marker == _METADATA
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _frame(data: bytes, place: int, has_metadata: bool) -> JpegHeader | None:
    marker, bits, num_components = data[place + 1], data[place + 4], data[place + 9]
    height, width = (int.from_bytes(data[at : at + 2], "big") for at in (place + 5, place + 7))
    if marker not in (_BASELINE, _EXTENDED, _PROGRESSIVE) or bits != 8 or num_components not in (1, 3) or not height or not width:
        return None
    samplings = [data[place + 11 + 3 * component] & 15 for component in range(num_components)]
    return JpegHeader(width, height, place + 5, 8 * max(samplings), marker != _PROGRESSIVE, has_metadata)


def decode_rows(data: bytes, header: JpegHeader, bottom: int, *, shrink: int = 1) -> NDArray[np.uint8]:
    """The image down to the row `bottom`, not included: (H, W, 3), each side divided by `shrink` and rounded up.

    Raises ValueError where it cannot be decoded. As in Pillow, damage that the decoder gets over is none.
    """
    height = header.height
    if header.is_sequential:
        rows = header.rows_at_once
        height = min(height, math.ceil(bottom / rows) * rows + (rows if rows > 8 else 0))  # smoothed chroma looks at the rows below
    told = bytearray(data)
    told[header.height_at : header.height_at + 2] = height.to_bytes(2, "big")
    expected = (math.ceil(height / shrink), math.ceil(header.width / shrink), 3)
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(told, min_height=expected[0], min_width=expected[1], min_factor=shrink, strict=False)
    if pixels.shape != expected:
        raise ValueError(f"decoded to {pixels.shape}, not to {expected}")
    return pixels[: math.ceil(bottom / shrink)]
