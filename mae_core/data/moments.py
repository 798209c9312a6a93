"""Mean and variance of an image's channels, in the units of `transforms.normalise`."""

import numpy as np
from numpy.typing import NDArray

from mae_core.data.decode import JpegImage, Pixels


def moments_of(image: Pixels) -> NDArray[np.float64]:
    """The channels' means, then their variances: (2 C,). Raises UnreadableImage."""
    pixels = np.atleast_3d(np.asarray(image.whole() if isinstance(image, JpegImage) else image))
    largest = 1.0 if pixels.dtype.kind == "f" else float(np.iinfo(pixels.dtype).max)
    planes = [pixels[:, :, channel].astype(np.float64) / largest for channel in range(pixels.shape[2])]
    return np.array([plane.mean() for plane in planes] + [plane.var() for plane in planes])
