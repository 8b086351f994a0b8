"""Grey images at another size or in another frame, and the transforms between them."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.geometry import resize_matrix

Image = NDArray[np.float32]


def shrink(image: Image, factor: float) -> Image:
    """An image (H, W) made smaller without aliasing; as it is for a factor of 1 or more."""
    if factor >= 1:
        return image
    blurred = cv2.GaussianBlur(image, (0, 0), 0.35 / factor)
    width, height = (max(1, round(side * factor)) for side in (image.shape[1], image.shape[0]))
    return cv2.resize(blurred, (width, height), interpolation=cv2.INTER_AREA)


def enlarge(image: Image, factor: float) -> Image:
    """An image (H, W) made larger; as it is for a factor of 1 or less."""
    if factor <= 1:
        return image
    width, height = (round(side * factor) for side in (image.shape[1], image.shape[0]))
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def resize_between(image: Image, resized: Image) -> NDArray[np.float64]:
    """(3, 3) from an image's pixels to those of its resized copy."""
    return resize_matrix(resized.shape[1] / image.shape[1], resized.shape[0] / image.shape[0])


def resample(
    image: Image, transform: NDArray[np.float64], size: tuple[int, int], *, edge: int
) -> tuple[Image, NDArray[np.float32]]:
    """An image (H, W) in another frame, and where that frame is covered by it (1) or not (0).

    Args:
        transform: (3, 3) from the frame to the image's pixels.
        size: (width, height) of the frame.
        edge: pixels along the image's border that do not count.
    """
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved = cv2.warpPerspective(image, transform, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    inside = np.zeros(image.shape, np.float32)
    inside[edge:-edge, edge:-edge] = 1
    covered = cv2.warpPerspective(inside, transform, size, flags=flags) > 0.99
    mask = cv2.erode(covered.astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=0)
    return moved, mask.astype(np.float32)
