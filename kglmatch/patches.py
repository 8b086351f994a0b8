"""Square patches around keypoints, and the check that every patch array passes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Literal

import cv2
import numpy as np

from kglmatch.errors import KGLMatchError, PatchError
from kglmatch.features import check_size, is_whole
from kglmatch.options import PATCH_SIZE

BORDERS = ("replicate", "reflect")
# How far outside [0, 1] a float may be by rounding.
TOLERANCE = 1e-6

_FLOATS = ("float16", "float32", "float64")
# Pixels that are computed at once: few enough to stay in the processor's cache.
_CHUNK_PIXELS = 1 << 16
_LARGEST_POSITION = 1e8


def extract_patches(
    image: np.ndarray,
    xy: Any,
    *,
    patch_size: int = PATCH_SIZE,
    border: Literal["replicate", "reflect"] = "replicate",
    scale: Any = None,
    angle: Any = None,
    subpixel: bool = True,
) -> np.ndarray:
    """Cuts a square patch around each position.

    The patch of a keypoint at whole pixels (x, y) is exactly
    ``image[y - P // 2 : y - P // 2 + P, x - P // 2 : x - P // 2 + P]``: the keypoint is pixel
    (P // 2, P // 2) of its patch, counted from 0. Other positions are interpolated bilinearly. With
    `scale` and `angle`, patch pixel (i, j) is at ``xy + scale * R(angle) (j - P // 2, i - P // 2)``,
    R turning the x axis towards the y axis, so that a keypoint's orientation becomes the patch's +x;
    scales of 2 and more are read from an image pyramid, lest they alias.

    A patch does not depend on the other patches that are cut with it.

    Args:
        image: (H, W) grey, float or uint8.
        xy: (N, 2) positions in pixels, (0, 0) the centre of the first pixel.
        patch_size: P, the side of a patch.
        border: what is outside the image: "replicate" repeats the edge pixel, "reflect" mirrors
            the image at the centre of the edge pixel. `patches_inside` reports which patches need none.
        scale: None, a number or (N,): image pixels per patch pixel, above 0.
        angle: None, a number or (N,): degrees. A detector's -1 for "none" must be replaced by 0 first.
        subpixel: False rounds positions to whole pixels (half up).

    Returns:
        (N, P, P) float32, uint8 images divided by 255. A uint8 image stays uint8, unscaled, where the
        positions are whole pixels by type (an integer array, or `subpixel=False`) and neither scale
        nor angle is given.

    Raises:
        PatchError: an argument of the wrong shape or type, a position that is not finite, a scale
            that is not positive.

    Examples:
        >>> extract_patches(np.zeros((480, 640), np.float32), [[100, 200], [310.5, 20.25]]).shape
        (2, 64, 64)
    """
    if not isinstance(image, np.ndarray) or image.ndim != 2 or image.size == 0:
        given = image.shape if isinstance(image, np.ndarray) else type(image).__name__
        raise PatchError(f"expected a grey image, a numpy array (H, W), got {given}; load_image makes one")
    if image.dtype != np.uint8 and image.dtype.name not in _FLOATS:
        raise PatchError(f"expected an image of uint8 or floats in [0, 1], got {image.dtype}; see load_image")
    _check_patch_size(patch_size)
    if border not in BORDERS:
        raise PatchError(f"border must be one of {', '.join(BORDERS)}, got {border!r}")
    positions, whole = _positions(xy)
    count, size = len(positions), int(patch_size)
    if not subpixel:
        positions, whole = np.floor(positions + 0.5), True
    warped = scale is not None or angle is not None
    scales = _per_patch(1.0 if scale is None else scale, count, "scale")
    angles = _per_patch(0.0 if angle is None else angle, count, "angle")
    if not (scales > 0).all():
        raise PatchError(f"scale must be above 0, got {scales.min():g}; a detector's 0 means it has none")

    if image.dtype == np.uint8 and not (whole and not warped):
        image = image.astype(np.float32) / np.float32(255)
    elif image.dtype != np.uint8:
        image = np.ascontiguousarray(image, dtype=np.float32)
    patches = np.empty((count, size, size), image.dtype)
    plain = (scales == 1) & (angles == 0)
    at_pixels = plain & (positions == np.floor(positions)).all(axis=1)
    _cut(image, positions, np.flatnonzero(at_pixels), border, patches)
    _shift(image, positions, np.flatnonzero(plain & ~at_pixels), border, patches)
    # Level l of the pyramid halves the image l times; its pixel i is the image's pixel i * 2^l.
    levels = np.where(plain, -1, np.maximum(np.floor(np.log2(scales)), 0)).astype(int)
    level_image, level = image, 0
    for wanted in np.unique(levels[levels >= 0]):
        while level < wanted and min(level_image.shape) > 1:
            level_image, level = cv2.pyrDown(level_image), level + 1
        rows = np.flatnonzero(levels == wanted)
        _warp(level_image, 2.0**-level, positions, scales, angles, rows, border, patches)
    return patches


def patches_inside(xy: Any, image_size: tuple[int, int], *, patch_size: int = PATCH_SIZE) -> np.ndarray:
    """Which patches, unscaled and unrotated, read no pixel outside the image.

    Args:
        xy: (N, 2) positions in pixels, (0, 0) the centre of the first pixel.
        image_size: (width, height) of the image in pixels, as in `Features.image_size`.
        patch_size: P, the side of a patch.

    Returns:
        (N,) bool.

    Raises:
        PatchError: positions of the wrong shape or type, or a size that is not two whole numbers.
    """
    _check_patch_size(patch_size)
    positions, _ = _positions(xy)
    try:
        width, height = check_size(image_size)
    except KGLMatchError as error:
        raise PatchError(str(error)) from error
    first = positions - patch_size // 2
    last = first + patch_size - 1
    return (first >= 0).all(axis=1) & (last[:, 0] <= width - 1) & (last[:, 1] <= height - 1)


def check_patches(patches: Any, *, patch_size: int = PATCH_SIZE, name: str = "patches") -> Any:
    """Checks an array of patches before it goes to the network; the values are not changed.

    Args:
        patches: (N, P, P) or (N, 1, P, P), N from 0, a numpy array or a torch tensor on any device:
            uint8 (0 to 255), or float16, float32 or float64 within [0, 1].
        patch_size: P, that of the network.
        name: what an error calls the array.

    Returns:
        (N, P, P) of the same kind, type and device: `patches` itself, or a view of it; a copy only of
        a numpy array in foreign byte order.

    Raises:
        PatchError: another kind, shape or type, a value that is NaN or infinite or outside [0, 1].
    """
    torch = sys.modules.get("torch")
    is_tensor = torch is not None and isinstance(patches, torch.Tensor)
    if not is_tensor and (not isinstance(patches, np.ndarray) or isinstance(patches, np.ma.MaskedArray)):
        raise PatchError(
            f"{name} is a {type(patches).__name__}, expected a numpy array or torch tensor "
            f"(N, {patch_size}, {patch_size}); np.stack makes one of a list of patches"
        )
    _check_shape(tuple(patches.shape), patch_size, name)
    dtype = str(patches.dtype).removeprefix("torch.") if is_tensor else patches.dtype.name
    if dtype not in ("uint8", *_FLOATS):
        raise PatchError(f"{name} has type {dtype}, expected uint8 or floats in [0, 1]; {_way_out(dtype)}")
    if not is_tensor and not patches.dtype.isnative:
        patches = patches.astype(patches.dtype.newbyteorder("="))
    if patches.ndim == 4:
        patches = patches[:, 0]
    if dtype != "uint8" and patches.shape[0]:
        # NaN passes through both, and fails the comparison.
        values = patches.detach() if is_tensor else patches
        low, high = float(values.min()), float(values.max())
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
            raise PatchError(f"{name} {_range_error(low, high)}")
    return patches


def _check_shape(shape: tuple[int, ...], size: int, name: str) -> None:
    if shape[1:] in ((size, size), (1, size, size)):
        return
    expected = f"expected (N, {size}, {size}) or (N, 1, {size}, {size})"
    if shape == (size, size):
        hint = "a single patch needs one more axis: patches[None]"
    elif len(shape) == 4 and (shape[1] in (2, 3, 4) or shape[3] in (1, 2, 3, 4)):
        hint = "patches are grey and channels come first; load_image turns a colour image into grey"
    elif len(shape) in (3, 4) and shape[-1] == shape[-2]:
        hint = f"cut or resize them to {size} pixels"
    else:
        hint = "extract_patches cuts them from an image"
    raise PatchError(f"{name} has shape {shape}, {expected}; {hint}")


def _way_out(dtype: str) -> str:
    if dtype in ("uint16", "int16", "int32", "uint32"):
        return "load_image stretches an image of that depth into [0, 1] before patches are cut"
    if dtype == "bfloat16":
        return "convert with .float()"
    if dtype == "bool":
        return "convert to float32"
    if dtype == "int64":
        return "convert to uint8 if the values are 0 to 255"
    return "convert to float32 in [0, 1]"


def _range_error(low: float, high: float) -> str:
    if not (np.isfinite(low) and np.isfinite(high)):
        return "holds values that are NaN or infinite, expected floats within [0, 1]; replace them first"
    given = f"has values from {low:g} to {high:g}, expected floats within [0, 1]"
    if low < -TOLERANCE:
        return f"{given}; give the grey values as they are, without standardising them"
    return f"{given}; divide 8-bit values by 255 or give them as uint8"


def _check_patch_size(patch_size: int) -> None:
    if not is_whole(patch_size) or patch_size < 1:
        raise PatchError(f"patch_size must be an integer of at least 1, got {patch_size!r}")


def _positions(xy: Any) -> tuple[np.ndarray, bool]:
    """(N, 2) float64, and whether the positions are whole pixels by their type."""
    try:
        array = np.asarray(xy)
        if array.shape == (0,):
            array = array.reshape(0, 2)
        positions = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise PatchError(f"xy must be numbers of shape (N, 2), got {type(xy).__name__}") from error
    if positions.ndim != 2 or positions.shape[1] != 2 or array.dtype.kind not in "iuf":
        raise PatchError(f"xy must be numbers of shape (N, 2), got shape {array.shape} of {array.dtype}")
    bad = ~(np.abs(positions) <= _LARGEST_POSITION).all(axis=1)
    if bad.any():
        row = int(np.argmax(bad))
        raise PatchError(f"xy row {row} is {positions[row].tolist()}, which is no position in an image")
    return positions, array.dtype.kind in "iu"


def _per_patch(values: Any, count: int, name: str) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PatchError(f"{name} must be a number or numbers of shape ({count},), got {values!r}") from error
    if array.shape not in ((), (count,)):
        raise PatchError(f"{name} must be a number or of shape ({count},) as xy, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise PatchError(f"{name} must be finite, got NaN or infinity")
    return np.broadcast_to(array, (count,))


def _chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    step = max(1, _CHUNK_PIXELS // (size * size))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _index(index: np.ndarray, length: int, border: str) -> np.ndarray:
    """Any whole coordinates -> rows or columns of the image."""
    inside: np.ndarray
    if border == "replicate" or length == 1:
        inside = np.clip(index, 0, length - 1)
    else:
        period = 2 * (length - 1)
        index = np.mod(index, period)
        inside = np.minimum(index, period - index)
    return inside


def _windows(image: np.ndarray, corner: np.ndarray, size: int, border: str) -> np.ndarray:
    """(n, size, size) copies whose first pixels are `corner` (n, 2), whole numbers as xy."""
    height, width = image.shape
    inside = ((corner >= 0) & (corner + size <= (width, height))).all(axis=1)
    if inside.all():
        views = np.lib.stride_tricks.sliding_window_view(image, (size, size))
        windows: np.ndarray = views[corner[:, 1], corner[:, 0]]
        return windows
    windows = np.empty((len(corner), size, size), image.dtype)
    if inside.any():
        windows[inside] = _windows(image, corner[inside], size, border)
    x = _index(corner[~inside, :1] + np.arange(size), width, border)
    y = _index(corner[~inside, 1:] + np.arange(size), height, border)
    windows[~inside] = image[y[:, :, None], x[:, None, :]]
    return windows


def _cut(
    image: np.ndarray, positions: np.ndarray, rows: np.ndarray, border: str, patches: np.ndarray
) -> None:
    """Patches at whole pixels: copies."""
    size = patches.shape[-1]
    for chunk in _chunks(rows, size):
        patches[chunk] = _windows(image, positions[chunk].astype(np.int64) - size // 2, size, border)


def _shift(
    image: np.ndarray, positions: np.ndarray, rows: np.ndarray, border: str, patches: np.ndarray
) -> None:
    """Patches between pixels: one pair of weights a patch."""
    size = patches.shape[-1]
    for chunk in _chunks(rows, size):
        floor = np.floor(positions[chunk])
        weight = (positions[chunk] - floor).astype(np.float32)[:, :, None, None]
        windows = _windows(image, floor.astype(np.int64) - size // 2, size + 1, border)
        left, right = windows[:, :, :-1], windows[:, :, 1:]
        lines = left + weight[:, 0] * (right - left)
        patches[chunk] = lines[:, :-1] + weight[:, 1] * (lines[:, 1:] - lines[:, :-1])


def _warp(
    image: np.ndarray,
    zoom: float,
    positions: np.ndarray,
    scales: np.ndarray,
    angles: np.ndarray,
    rows: np.ndarray,
    border: str,
    patches: np.ndarray,
) -> None:
    """Scaled and rotated patches, from an image that was shrunk by `zoom`: bilinear, pixel by pixel.

    Not by `cv2.remap`, which may round positions to 1/32 pixel and takes no image above 32767 pixels.
    """
    size = patches.shape[-1]
    height, width = image.shape
    flat = np.ascontiguousarray(image).reshape(-1)
    offsets = np.arange(size) - size // 2
    for chunk in _chunks(rows, size):
        radians = np.deg2rad(angles[chunk])
        cos, sin = (scales[chunk] * f(radians) * zoom for f in (np.cos, np.sin))
        across, down = offsets[None, None, :], offsets[None, :, None]
        centre = positions[chunk] * zoom
        x = centre[:, 0, None, None] + cos[:, None, None] * across - sin[:, None, None] * down
        y = centre[:, 1, None, None] + sin[:, None, None] * across + cos[:, None, None] * down
        x0, y0 = np.floor(x), np.floor(y)
        weight_x, weight_y = (x - x0).astype(np.float32), (y - y0).astype(np.float32)
        left, top = x0.astype(np.int64), y0.astype(np.int64)
        right, bottom = _index(left + 1, width, border), _index(top + 1, height, border) * width
        left, top = _index(left, width, border), _index(top, height, border) * width
        upper = flat[top + left]
        upper += weight_x * (flat[top + right] - upper)
        lower = flat[bottom + left]
        lower += weight_x * (flat[bottom + right] - lower)
        patches[chunk] = upper + weight_y * (lower - upper)
