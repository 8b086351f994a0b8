"""Images at another size or in another frame, and the transforms between them."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import ImageError
from kglmatch.geometry import resize_matrix, transform_points

Image = NDArray[np.float32]

_TILE = 8192  # pixels of the output that are warped at once
_LARGEST = 32766  # pixels: the side of an image that OpenCV warps
_MARGIN = 4  # pixels that interpolation reaches beyond


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


def warp_image(
    image: NDArray[Any],
    transform: NDArray[np.floating],
    size: tuple[int, int],
    *,
    nodata: float = 0,
    interpolation: int = cv2.INTER_CUBIC,
) -> NDArray[Any]:
    """Resamples an image into the frame that a transform starts from; the type is kept.

    Args:
        image: (H, W) or (H, W, C), 8- or 16-bit or float.
        transform: (3, 3) from output to input pixels.
        size: (width, height) of the output.
        nodata: value where the image does not reach.

    Raises:
        ImageError: an image over 32,766 pixels wide or high that is shrunk too much by the transform.
    """
    kind = image.dtype
    # OpenCV resamples these types only (and cuts off what a float64 has behind its point).
    direct = kind in (np.uint8, np.uint16, np.int16, np.float32)
    source = image if direct else image.astype(np.float32)
    moved = np.empty((size[1], size[0], *image.shape[2:]), source.dtype)
    for top in range(0, size[1], _TILE):
        for left in range(0, size[0], _TILE):
            rows, columns = slice(top, top + _TILE), slice(left, left + _TILE)
            moved[rows, columns] = _warp_tile(
                source, transform, (left, top), moved[rows, columns].shape[:2], nodata, interpolation
            )
    if direct:
        return moved
    if np.issubdtype(kind, np.integer):
        limits = np.iinfo(kind)
        moved = np.clip(np.rint(moved), limits.min, limits.max)
    return moved.astype(kind)


def _warp_tile(
    image: NDArray[Any],
    transform: NDArray[np.floating],
    corner: tuple[int, int],
    shape: tuple[int, ...],
    nodata: float,
    interpolation: int,
) -> NDArray[Any]:
    """A part (h, w) of the output of `warp_image`, whose upper left pixel is `corner`, from what it needs."""
    height, width = shape
    to_output = np.array([[1, 0, corner[0]], [0, 1, corner[1]], [0, 0, 1.0]])
    transform = transform @ to_output
    frame = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)
    depth = frame @ transform[2, :2] + transform[2, 2]
    low, high = np.zeros(2, np.int64), np.array(image.shape[1::-1])
    if depth.min() > 0 or depth.max() < 0:  # else the tile reaches to infinity
        needed = transform_points(transform, frame)
        low = np.clip(np.floor(needed.min(axis=0)) - _MARGIN, 0, high - 1).astype(np.int64)
        high = np.clip(np.ceil(needed.max(axis=0)) + _MARGIN, low + 1, high).astype(np.int64)
    part = image[low[1] : high[1], low[0] : high[0]]
    if max(part.shape[:2]) > _LARGEST:
        raise ImageError(
            f"cannot warp: {width} x {height} pixels need {part.shape[1]} x {part.shape[0]} of the other "
            f"image, and OpenCV takes at most {_LARGEST} a side; shrink that image first"
        )
    transform = np.array([[1, 0, -low[0]], [0, 1, -low[1]], [0, 0, 1.0]]) @ transform
    flags = interpolation | cv2.WARP_INVERSE_MAP
    moved = cv2.warpPerspective(
        part, transform, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE
    )
    # Not by OpenCV's border value, which is mixed into the pixels beside it.
    inside = np.full(part.shape[:2], 255, np.uint8)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    covered = cv2.warpPerspective(inside, transform, (width, height), flags=flags)
    moved[covered < 255] = nodata
    return moved.reshape(height, width, *image.shape[2:])
