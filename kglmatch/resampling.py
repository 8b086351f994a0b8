"""Images at another size or in another frame, and the transforms between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import ImageError, KGLMatchError
from kglmatch.geometry import resize_matrix, transform_points

Image = NDArray[np.float32]
Interpolation = Literal["cubic", "linear", "nearest"]
# Columns (w,) and rows (h,) of the output -> the displacement of each crossing, (h, w, 2) xy pixels.
Displacement = Callable[[NDArray[np.floating], NDArray[np.floating]], NDArray[np.float32]]

_OPENCV_FLAGS = {"cubic": cv2.INTER_CUBIC, "linear": cv2.INTER_LINEAR}
# Types that OpenCV interpolates as they are.
_OPENCV_TYPES = ("uint8", "uint16", "int16", "float32")
_OPENCV_CHANNELS = 4  # that it warps at once
_OPENCV_LARGEST = 1e37  # of a float32: beyond it, OpenCV's sums may overflow
_TILE = 8192  # pixels of the output that are warped at once
_DISPLACED_TILE = 2048  # the same, where each has its own displacement
_LARGEST = 32766  # pixels: the side of an image that OpenCV warps
_MARGIN = 4  # pixels that interpolation reaches beyond
_STRIP = 1 << 16  # pixels that are interpolated at once without OpenCV
_CUBIC = -0.75  # Keys' parameter, as in OpenCV
_WHOLE = 1e-6  # pixels: so near to a pixel's centre, its value is taken


def shrink(image: Image, factor: float) -> Image:
    """An image (H, W) made smaller without aliasing; as it is for a factor of 1 or more."""
    if factor >= 1:
        return image
    blurred = cv2.GaussianBlur(image, (0, 0), 0.35 / factor)
    width, height = (max(1, round(side * factor)) for side in (image.shape[1], image.shape[0]))
    return cv2.resize(blurred, (width, height), interpolation=cv2.INTER_AREA)


def shrinking(image: Image, side: int, least: int) -> float:
    """The factor that makes the longer side `side` pixels, but leaves a strip `least` pixels wide."""
    return min(1.0, max(side / max(image.shape), least / min(image.shape)))


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
    image: Image,
    transform: NDArray[np.float64],
    size: tuple[int, int],
    *,
    edge: int,
    valid: NDArray[np.bool_] | None = None,
) -> tuple[Image, NDArray[np.float32]]:
    """An image (H, W) in another frame, and where that frame is covered by it (1) or not (0).

    Args:
        transform: (3, 3) from the frame to the image's pixels.
        size: (width, height) of the frame.
        edge: pixels along the image's border that do not count.
        valid: the pixels that count, of the image or of a larger copy of it; None for all.
    """
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved = cv2.warpPerspective(image, transform, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    inside = np.zeros(image.shape, np.float32)
    inside[edge:-edge, edge:-edge] = 1
    if valid is not None:
        share = cv2.resize(valid.astype(np.float32), inside.shape[::-1], interpolation=cv2.INTER_AREA)
        inside *= share > 0.99
    covered = cv2.warpPerspective(inside, transform, size, flags=flags) > 0.99
    mask = cv2.erode(covered.astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=0)
    return moved, mask.astype(np.float32)


# --- whole images of any type ---------------------------------------------------------------------


def warp_image(
    image: NDArray[Any],
    transform: NDArray[np.floating],
    size: tuple[int, int],
    *,
    nodata: float = 0,
    interpolation: Interpolation | None = None,
    displacement: Displacement | None = None,
) -> NDArray[Any]:
    """Resamples an image into the frame that a transform starts from; the type is kept.

    Values are interpolated without loss: where the transform moves by whole pixels they come back exactly,
    whatever the type. uint8, uint16, int16 and float32 are interpolated by OpenCV, to 1/32 pixel; the
    other types in float64, 64-bit integers by their differences to the nearest pixel, so that those beyond
    2^53 keep their last digit. What "cubic" overshoots is clipped to the range of the type.

    NaN and infinite pixels make NaN (or infinite) those output pixels that they have a share in: 2 pixels
    around for "cubic", 1 for "linear", the pixel itself for "nearest" and where the transform moves by
    whole pixels.

    Args:
        image: (H, W) or (H, W, C) with any number of channels; bool, integers or floats up to 64 bits.
        transform: (3, 3) from output to input pixels.
        size: (width, height) of the output.
        nodata: value where the image does not reach; one that its type holds.
        interpolation: "cubic", "linear" or "nearest". None takes "nearest" for bool and "cubic" otherwise;
            give "nearest" for labels, whose numbers must not mix. bool is true where its interpolated value
            is 0.5 or more.
        displacement: of the output's pixels, before the transform: at x the output shows the image at
            transform(x + displacement(x)). None for none.

    Raises:
        ImageError: no image of such a shape and type, or one over 32,766 pixels wide or high that is shrunk
            too much by the transform.
        KGLMatchError: another interpolation, or a nodata that the type cannot hold.
    """
    _check_image(image)
    check_nodata(nodata, image.dtype)
    if interpolation is None:
        interpolation = "nearest" if image.dtype == np.bool_ else "cubic"
    elif interpolation not in get_args(Interpolation):
        raise KGLMatchError(
            f"interpolation must be one of {', '.join(get_args(Interpolation))}, got {interpolation!r}"
        )
    source = image if image.dtype.isnative else image.astype(image.dtype.newbyteorder("="))
    by_opencv = interpolation != "nearest" and _opencv_keeps(source)
    moved = np.empty((size[1], size[0], *image.shape[2:]), source.dtype)
    side = _TILE if displacement is None else _DISPLACED_TILE
    for top in range(0, size[1], side):
        for left in range(0, size[0], side):
            tile = moved[top : top + side, left : left + side]
            if displacement is None:
                _warp_tile(source, transform, (left, top), tile, interpolation, by_opencv, nodata)
            else:
                _warp_displaced(
                    source, transform, displacement, (left, top), tile, interpolation, by_opencv, nodata
                )
    return moved


def warp_around_nodata(
    image: NDArray[Any],
    transform: NDArray[np.floating],
    size: tuple[int, int],
    *,
    nodata: float,
    interpolation: Interpolation | None = None,
    displacement: Displacement | None = None,
) -> NDArray[Any]:
    """`warp_image` of an image that holds pixels without data, which do not mix into their neighbours.

    Args:
        image, transform, size, interpolation, displacement: as for `warp_image`.
        nodata: value of the image's pixels without data (all colour channels alike; alpha is no colour), and
            of output pixels for which one of them, or none at all, is needed.

    Raises:
        ImageError, KGLMatchError: as `warp_image`.
    """
    _check_image(image)
    colours = image[..., : 1 if image.shape[2] < 3 else 3] if image.ndim == 3 else image[..., None]
    hole = (np.isnan(colours) if np.isnan(nodata) else colours == nodata).all(axis=2)
    if hole.any() and not hole.all():
        # The nearest pixel with data stands in for the resampling.
        _, labels = cv2.distanceTransformWithLabels(
            hole.astype(np.uint8), cv2.DIST_L2, 3, labelType=cv2.DIST_LABEL_PIXEL
        )
        nearest = np.empty(labels.max() + 1, np.int64)
        nearest[labels[~hole]] = np.arange(np.count_nonzero(~hole))
        image = image.copy()
        image[hole] = image[~hole][nearest[labels[hole]]]
    moved = warp_image(
        image, transform, size, nodata=nodata, interpolation=interpolation, displacement=displacement
    )
    moved[~covered_by(transform, size, ~hole, displacement=displacement)] = nodata
    return moved


def covered_by(
    transform: NDArray[np.floating],
    size: tuple[int, int],
    valid: NDArray[np.bool_],
    *,
    displacement: Displacement | None = None,
) -> NDArray[np.bool_]:
    """(height, width) of the frame: where all of the four pixels around the place are valid.

    Args:
        transform, size, displacement: as for `warp_image`.
        valid: (H, W), the pixels of the image that count; all, for what the image covers.
    """
    full = np.where(valid, 255, 0).astype(np.uint8)
    return warp_image(full, transform, size, interpolation="linear", displacement=displacement) == 255


def check_nodata(nodata: float, dtype: np.dtype[Any]) -> None:
    """Raises `KGLMatchError` for a value that pixels of a type cannot hold."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            if math.isfinite(nodata) and not np.isfinite(dtype.type(nodata)):
                raise KGLMatchError(
                    f"nodata {nodata} is no {dtype} value; expected one up to {np.finfo(dtype).max:g}"
                )
        return
    low, high = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    if not (math.isfinite(nodata) and nodata == int(nodata) and low <= nodata <= high):
        raise KGLMatchError(
            f"nodata {nodata} is no {dtype} value; expected a whole number from {low} to {high}"
        )


def _check_image(image: NDArray[Any]) -> None:
    if image.dtype.kind not in "biuf" or image.dtype.itemsize > 8:
        raise ImageError(f"cannot warp {image.dtype}; expected bool, integers or floats up to 64 bits")
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ImageError(f"cannot warp an image of shape {image.shape}; expected (H, W) or (H, W, C)")


def _opencv_keeps(image: NDArray[Any]) -> bool:
    """Whether OpenCV interpolates an image without loss."""
    if image.dtype.name not in _OPENCV_TYPES:
        return False
    # A weight of 0 times NaN is NaN.
    return image.dtype != np.float32 or bool((np.abs(image) < _OPENCV_LARGEST).all())


def _warp_tile(
    image: NDArray[Any],
    transform: NDArray[np.floating],
    corner: tuple[int, int],
    tile: NDArray[Any],
    interpolation: Interpolation,
    by_opencv: bool,
    nodata: float,
) -> None:
    """Fills a part (h, w) of the output of `warp_image`, whose upper left pixel is `corner`."""
    height, width = tile.shape[:2]
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
    if by_opencv:
        flags = _OPENCV_FLAGS[interpolation] | cv2.WARP_INVERSE_MAP
        channels, filled = (a.reshape(*a.shape[:2], -1) for a in (part, tile))
        for first in range(0, channels.shape[2], _OPENCV_CHANNELS):
            some = slice(first, first + _OPENCV_CHANNELS)
            moved = cv2.warpPerspective(
                np.ascontiguousarray(channels[..., some]),
                transform,
                (width, height),
                flags=flags,
                borderMode=cv2.BORDER_REPLICATE,
            )
            filled[..., some] = moved.reshape(height, width, -1)
    else:
        part = np.ascontiguousarray(part)
        for rows, x, y in _places(transform, (width, height)):
            tile[rows] = _interpolate(part, x, y, interpolation)
    # Not by OpenCV's border value, which is mixed into the pixels near it.
    inside = np.full(part.shape[:2], 255, np.uint8)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    covered = cv2.warpPerspective(inside, transform, (width, height), flags=flags)
    tile[covered < 255] = nodata


def _warp_displaced(
    image: NDArray[Any],
    transform: NDArray[np.floating],
    displacement: Displacement,
    corner: tuple[int, int],
    tile: NDArray[Any],
    interpolation: Interpolation,
    by_opencv: bool,
    nodata: float,
) -> None:
    """`_warp_tile` with a displacement of each output pixel."""
    height, width = tile.shape[:2]
    x, y = displaced_places(transform, displacement, corner, (width, height))
    reach = np.array(image.shape[1::-1])
    with np.errstate(invalid="ignore"):
        covered = (x >= 0) & (y >= 0) & (x <= reach[0] - 1) & (y <= reach[1] - 1)
    if not covered.any():
        tile[:] = nodata
        return
    low = np.array([int(x[covered].min()), int(y[covered].min())]) - _MARGIN
    high = np.array([int(x[covered].max()), int(y[covered].max())]) + _MARGIN + 1
    low, high = np.maximum(low, 0), np.minimum(high, reach)
    part = np.ascontiguousarray(image[low[1] : high[1], low[0] : high[0]])
    if max(part.shape[:2]) > _LARGEST:
        raise ImageError(
            f"cannot warp: {width} x {height} pixels need {part.shape[1]} x {part.shape[0]} of the other "
            f"image, and OpenCV takes at most {_LARGEST} a side; shrink that image first"
        )
    x, y = x - low[0], y - low[1]
    if by_opencv:
        channels, filled = (a.reshape(*a.shape[:2], -1) for a in (part, tile))
        for first in range(0, channels.shape[2], _OPENCV_CHANNELS):
            some = slice(first, first + _OPENCV_CHANNELS)
            moved = cv2.remap(
                np.ascontiguousarray(channels[..., some]),
                x.astype(np.float32),
                y.astype(np.float32),
                _OPENCV_FLAGS[interpolation],
                borderMode=cv2.BORDER_REPLICATE,
            )
            filled[..., some] = moved.reshape(height, width, -1)
    else:
        step = max(1, _STRIP // width)
        for top in range(0, height, step):
            rows = slice(top, top + step)
            tile[rows] = _interpolate(part, x[rows], y[rows], interpolation)
    tile[~covered] = nodata


def displaced_places(
    transform: NDArray[np.floating],
    displacement: Displacement,
    corner: tuple[int, int],
    size: tuple[int, int],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """x and y (height, width) that a part of the output is taken from; `corner` is its upper left pixel."""
    columns = corner[0] + np.arange(size[0], dtype=np.float64)
    rows = corner[1] + np.arange(size[1], dtype=np.float64)
    moved = displacement(columns, rows)
    column, row = columns + moved[..., 0], rows[:, None] + moved[..., 1]
    x, y, depth = (a * column + b * row + c for a, b, c in transform)
    depth = np.where(np.abs(depth) < 1e-12, 1e-12, depth)
    return np.clip(x / depth, -1e9, 1e9), np.clip(y / depth, -1e9, 1e9)


def _places(
    transform: NDArray[np.floating], size: tuple[int, int]
) -> Iterator[tuple[slice, NDArray[np.float64], NDArray[np.float64]]]:
    """Rows of the output, some at a time, and the x and y (rows, width) that they are taken from."""
    width, height = size
    step = max(1, _STRIP // width)
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        row, column = np.mgrid[rows, :width].astype(np.float64)
        x, y, depth = (a * column + b * row + c for a, b, c in transform)
        depth = np.where(np.abs(depth) < 1e-12, 1e-12, depth)
        # What is far outside is not covered, and must not overflow as an index.
        x, y = (np.clip(v / depth, -1e9, 1e9) for v in (x, y))
        yield rows, x, y


def _interpolate(
    image: NDArray[Any], x: NDArray[np.float64], y: NDArray[np.float64], interpolation: Interpolation
) -> NDArray[Any]:
    """The image (H, W) or (H, W, C) at places (h, w), edge pixels repeated beyond it: (h, w) or (h, w, C).

    The weighted differences to the nearest pixel are added to it, so that no value that all pixels around
    share is rounded.
    """
    height, width = image.shape[:2]
    pixels = image.reshape(height * width, *image.shape[2:])

    def column(at: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.clip(at, 0, width - 1).astype(np.int64)

    def row(at: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.clip(at, 0, height - 1).astype(np.int64) * width

    nearest = pixels.take(row(np.floor(y + 0.5)) + column(np.floor(x + 0.5)), axis=0)
    if interpolation == "nearest":
        return nearest
    taps, weigh = ((-1, 0, 1, 2), _cubic_weights) if interpolation == "cubic" else ((0, 1), _linear_weights)
    shape = *x.shape, *[1] * (image.ndim - 2)
    (left, weights_x), (top, weights_y) = (_split(v.reshape(shape), weigh) for v in (x, y))
    columns = [column(left.reshape(x.shape) + dx) for dx in taps]
    weighted = _weighted if image.dtype.kind != "f" or np.isfinite(image).all() else _weighted_without_0
    change = np.zeros(nearest.shape, np.float64)
    with np.errstate(invalid="ignore"):
        for dy, weight_y in zip(taps, weights_y, strict=True):
            start = row(top.reshape(x.shape) + dy)
            across = np.zeros(nearest.shape, np.float64)
            for at, weight_x in zip(columns, weights_x, strict=True):
                across += weighted(_difference(pixels.take(start + at, axis=0), nearest), weight_x)
            change += weighted(across, weight_y)
    return _added(nearest, change)


def _weighted(values: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    values *= weight
    return values


def _weighted_without_0(values: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """What has no weight counts nothing, even if it is NaN."""
    return np.where(weight == 0, 0, values * weight)


def _split(v: NDArray[np.float64], weigh: Any) -> tuple[NDArray[np.float64], tuple[Any, ...]]:
    """Whole pixels below places, and the weights of those around them."""
    near = np.rint(v)
    v = np.where(np.abs(v - near) < _WHOLE, near, v)
    whole = np.floor(v)
    return whole, weigh(v - whole)


def _linear_weights(t: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    return 1 - t, t


def _cubic_weights(t: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Weights of the pixels at -1, 0, 1 and 2 for places at 0 <= t < 1 (Keys 1981), 0 exactly at t = 0."""
    a = _CUBIC
    s = 1 - t
    return (
        a * t * s * s,
        ((a + 2) * t - (a + 3)) * t * t + 1,
        ((a + 2) * s - (a + 3)) * s * s + 1,
        a * s * t * t,
    )


def _difference(values: NDArray[Any], base: NDArray[Any]) -> NDArray[np.float64]:
    """values - base as float64, for integers of any size without overflow."""
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.subtract(values, base, dtype=np.float64)
        # Infinity less itself is NaN.
        if not np.isfinite(apart).all():
            apart[values == base] = 0
        return apart
    if values.dtype.itemsize < 8:
        return np.subtract(values, base, dtype=np.float64)
    # Modulo 2^64, either difference that is not negative is right.
    unsigned, own = base.astype(np.uint64), values.astype(np.uint64)
    return np.where(values >= base, (own - unsigned).astype(np.float64), -(unsigned - own).astype(np.float64))


def _added(base: NDArray[Any], change: NDArray[np.float64]) -> NDArray[Any]:
    """base + change, rounded and clipped to the range of the type of base."""
    dtype = base.dtype
    if dtype.kind == "b":
        return base + change >= 0.5
    if dtype.kind == "f":
        limits = np.finfo(dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            total = base.astype(np.float64) + change
            finite = np.isfinite(base) & np.isfinite(change)
            clipped = np.clip(total, float(limits.min), float(limits.max))
            return np.where(finite, clipped, total).astype(dtype)
    limits_int = np.iinfo(dtype)
    change = np.rint(change)
    if dtype.itemsize < 8:
        return np.clip(base + change, limits_int.min, limits_int.max).astype(dtype)
    # Modulo 2^64, so is how far each value may rise and fall.
    value = base.astype(np.uint64)
    up, down = (np.array(end, dtype).astype(np.uint64) - value for end in (limits_int.max, limits_int.min))
    raised = value + _whole_up_to(change, up)
    lowered = value - _whole_up_to(-change, np.uint64(0) - down)
    return np.where(change >= 0, raised, lowered).astype(dtype)


def _whole_up_to(change: NDArray[np.float64], room: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Changes from 0 upwards as whole numbers, at most `room`; 0 for those below 0."""
    full = change >= room.astype(np.float64)
    return np.where(full, room, np.where(full, 0, np.maximum(change, 0)).astype(np.uint64))
