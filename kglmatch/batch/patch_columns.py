"""Columns of tables, in whatever form they store patches, as arrays of patches."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kglmatch.errors import ImageError, KGLMatchError
from kglmatch.images import load_image
from kglmatch.patches import TOLERANCE

_FLOATS = ("float16", "float32", "float64")


def patches_of_column(column: Any, patch_size: int) -> tuple[NDArray[Any], dict[int, str]]:
    """(N, P, P) uint8, or float32 in [0, 1], and what is wrong with single rows, whose patches are zeros.

    Args:
        column: an Arrow array, a pandas column, a numpy array or a list. A patch is an image file or the
            bytes of P x P 8-bit pixels, or P * P numbers in any nesting, uint8 or floats in [0, 1].
        patch_size: P, pixels.
    """
    whole = _whole_column(column, patch_size)
    if whole is not None:
        return _checked(whole)
    values = column.to_pylist() if hasattr(column, "to_pylist") else list(column)
    found: list[NDArray[Any] | None] = []
    errors: dict[int, str] = {}
    for row, value in enumerate(values):
        try:
            found.append(_patch(value, patch_size))
        except KGLMatchError as error:
            found.append(None)
            errors[row] = str(error)
    floats = any(patch is not None and patch.dtype != np.uint8 for patch in found)
    patches = np.zeros((len(values), patch_size, patch_size), np.float32 if floats else np.uint8)
    for row, patch in enumerate(found):
        if patch is not None:
            patches[row] = patch / np.float32(255) if floats and patch.dtype == np.uint8 else patch
    checked, out_of_range = _checked(patches)
    return checked, {**out_of_range, **errors}


def _whole_column(column: Any, size: int) -> NDArray[Any] | None:
    """The pixels of a column that stores them one after the other, without a copy; None if it does not."""
    array: Any = None
    if isinstance(column, np.ndarray) and column.dtype != object:
        array = column
    elif hasattr(column, "type") and hasattr(column, "null_count"):  # Arrow
        if column.null_count:
            return None
        storage = getattr(column, "storage", column)  # of a tensor type
        kind = str(storage.type)
        if kind.startswith("fixed_size_binary"):
            width = storage.type.byte_width
            data = np.frombuffer(storage.buffers()[1], np.uint8) if len(storage) else np.empty(0, np.uint8)
            array = data[storage.offset * width : (storage.offset + len(storage)) * width]
        elif kind.startswith("fixed_size_list") and hasattr(storage, "flatten"):
            array = storage.flatten().to_numpy(zero_copy_only=False)
    if (
        array is None
        or array.size != len(column) * size * size
        or array.dtype.name not in ("uint8", *_FLOATS)
    ):
        return None
    whole: NDArray[Any] = array.reshape(len(column), size, size)
    return whole


def _patch(value: Any, size: int) -> NDArray[Any]:
    if value is None:
        raise ImageError("the patch is missing")
    if isinstance(value, dict):  # as Hugging Face's datasets store images
        value = value.get("bytes")
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        if len(data) == size * size and not _is_image_file(data):
            return np.frombuffer(data, np.uint8).reshape(size, size)
        pixels = _decode(data)
    else:
        pixels = _numbers(value, size)
    if pixels.shape != (size, size):
        raise ImageError(
            f"the patch is {' x '.join(map(str, pixels.shape[::-1]))} pixels, expected {size} x {size}"
        )
    return pixels


def _is_image_file(data: bytes) -> bool:
    """Whether bytes that may be pixels are a PNG or JPEG file of that very length."""
    return data.startswith(b"\x89PNG\r\n\x1a\n") or (
        data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9")
    )


def _decode(data: bytes) -> NDArray[Any]:
    """Grey pixels of an image file: uint8 if it holds such, else floats."""
    pixels = None
    if data:
        try:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        except cv2.error:
            pixels = None
    if pixels is not None and pixels.dtype == np.uint8 and pixels.ndim == 2:
        return pixels
    try:
        return load_image(Image.open(io.BytesIO(data)))
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, TypeError) as error:
        raise ImageError(f"no image and no pixels, but {len(data)} bytes of something else") from error


def _numbers(value: Any, size: int) -> NDArray[Any]:
    try:
        array = np.asarray(value)
        if array.dtype == object:
            array = np.stack([np.asarray(row) for row in array])
    except (TypeError, ValueError) as error:
        raise ImageError(f"a patch of type {type(value).__name__}") from error
    if array.size == size * size:
        array = array.reshape(size, size)
    if array.dtype.kind == "i" and array.size and array.min() >= 0 and array.max() <= 255:
        array = array.astype(np.uint8)  # lists of whole numbers
    if array.dtype.name not in ("uint8", *_FLOATS):
        raise ImageError(f"a patch of type {array.dtype}, expected uint8 or floats in [0, 1]")
    return array


def _checked(patches: NDArray[Any]) -> tuple[NDArray[Any], dict[int, str]]:
    """Patches whose values are in range, and which were not."""
    if patches.dtype == np.uint8:
        return patches, {}
    patches = patches.astype(np.float32)
    low, high = patches.min(axis=(1, 2), initial=0), patches.max(axis=(1, 2), initial=0)
    bad = ~((low >= -TOLERANCE) & (high <= 1 + TOLERANCE))  # NaN fails, too
    patches[bad] = 0
    message = "values that are NaN or outside [0, 1]"
    return patches, {int(row): message for row in np.flatnonzero(bad)}
