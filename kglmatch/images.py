"""Any image -> grey float32 in [0, 1]; reading and writing files with their bit depth kept.

Pixels are taken in the order in which the file stores them: an EXIF orientation is ignored, as
`cv2.imread(..., cv2.IMREAD_UNCHANGED)` ignores it, so that keypoints fit the stored pixels.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from kglmatch.errors import ImageError, OutputError
from kglmatch.features import is_number
from kglmatch.files import atomic_output

PERCENTILES = (0.1, 99.9)
# How far outside [0, 1] a float pixel may be by rounding; it is clipped.
TOLERANCE = 1e-6

_JPEG = (".jpg", ".jpeg")
_TIFF = (".tif", ".tiff")
# Extension -> dtypes and channel counts that it stores without loss of either.
_DEPTH_8 = ("uint8",)
_DEPTH_16 = ("uint8", "uint16")
_DEPTH_ANY = ("uint8", "uint16", "int16", "int32", "float32", "float64")
_FORMATS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    ".png": (_DEPTH_16, (1, 3, 4)),
    ".tif": (_DEPTH_ANY, (1, 3, 4)),
    ".tiff": (_DEPTH_ANY, (1, 3, 4)),
    ".jpg": (_DEPTH_8, (1, 3)),
    ".jpeg": (_DEPTH_8, (1, 3)),
    ".bmp": (_DEPTH_8, (1, 3)),
    ".webp": (_DEPTH_8, (3, 4)),
}

# What Pillow's decoders raise about damaged files.
_PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, MemoryError,
    struct.error, Image.DecompressionBombError,
)  # fmt: skip

# OpenCV's log level belongs to the process: the first thread in silences it, the last restores it.
_log_lock = threading.Lock()
_log_silenced = [0, 0]


def load_image(
    source: Any,
    *,
    stretch: Literal["auto"] | bool = "auto",
    percentiles: tuple[float, float] = PERCENTILES,
    nodata: float | None = None,
) -> np.ndarray:
    """Reads or converts any image to grey float32 in [0, 1].

    Colour becomes grey by OpenCV's weights (Rec. 601: 0.299 R + 0.587 G + 0.114 B); alpha is ignored.

    How the range is mapped, with `stretch="auto"`:

    - bool and 8-bit: divided by 1 and 255;
    - other integers (16-bit sensors, radar, int32): a percentile stretch of the grey image, since
      such data seldom fill the range of their type;
    - floats within [0, 1]: taken as they are; other floats: a percentile stretch.

    `stretch=True` stretches whatever the type, `stretch=False` never does: integers are divided by
    the largest value of their type, and floats must be within [0, 1].

    Pixels that are NaN, infinite, masked (a numpy masked array) or equal to `nodata` do not count
    in the percentiles and become 0. A constant image that is to be stretched becomes 0 everywhere.

    Args:
        source: one of
            - a path (str or path-like): PNG, JPEG, TIFF and GeoTIFF of 8, 16 or 32 bits or float,
              and what else OpenCV or Pillow can read; of several pages, the first;
            - a Pillow image;
            - a numpy array (H, W) or (H, W, C), C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA; an array
              read by OpenCV is BGR and must be reversed first;
            - a torch tensor (H, W) or (C, H, W), C as above, on any device; also (H, W, C) where the
              first axis cannot be channels, being longer than 4.
        stretch: see above.
        percentiles: the percentiles that a stretch maps to 0 and 1.
        nodata: a pixel value (in the units of `source`, all colour channels alike) that says "no
            data here", such as -9999 or 0 in satellite products.

    Returns:
        (H, W) float32 in [0, 1], C-contiguous; never shares memory with `source`.

    Raises:
        ImageError: missing, unreadable or damaged file; an array that is empty, has the wrong number
            of axes or channels or a type that is no pixel type; no pixel with data; `stretch=False`
            with values outside the range.
    """
    return load_masked(source, stretch=stretch, percentiles=percentiles, nodata=nodata)[0]


def load_masked(
    source: Any,
    *,
    stretch: Literal["auto"] | bool = "auto",
    percentiles: tuple[float, float] = PERCENTILES,
    nodata: float | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """`load_image`, and which pixels hold data: (H, W) bool, or None where all do."""
    if stretch != "auto" and not isinstance(stretch, bool):
        raise ImageError(f'stretch must be "auto", True or False, got {stretch!r}')
    if nodata is not None and not is_number(nodata):
        raise ImageError(f"nodata must be a number or None, got {nodata!r}")
    low, high = _checked_percentiles(percentiles)
    pixels, name = _pixels(source)
    valid = None
    if isinstance(pixels, np.ma.MaskedArray):
        mask = np.ma.getmaskarray(pixels)
        valid = ~(mask if mask.ndim == 2 else mask.any(axis=2))
        pixels = pixels.data
    _check_array(pixels, name)
    if not pixels.dtype.isnative:
        pixels = pixels.astype(pixels.dtype.newbyteorder("="))
    if pixels.ndim == 3:
        pixels = pixels[:, :, : 1 if pixels.shape[2] < 3 else 3]
    if nodata is not None:
        equal = pixels == nodata
        has_data = ~(equal if equal.ndim == 2 else equal.all(axis=2))
        valid = has_data if valid is None else valid & has_data
    grey = _grey(pixels)
    if grey.dtype.kind == "f":
        finite = np.isfinite(grey)
        if not finite.all():
            valid = finite if valid is None else valid & finite
    if valid is not None:
        if not valid.any():
            raise ImageError(f"{name} has no pixel with data: all are NaN, infinite, masked or nodata")
        if valid.all():
            valid = None
    data = grey if valid is None else grey[valid]

    kind, dtype = pixels.dtype.kind, pixels.dtype
    in_range = kind == "f" and data.min() >= -TOLERANCE and data.max() <= 1 + TOLERANCE
    if stretch is True or (stretch == "auto" and not (kind == "b" or dtype == np.uint8 or in_range)):
        bottom, top = _stretch_range(data, low, high)
    elif kind == "f" and not in_range:
        raise ImageError(
            f"{name} has values from {data.min():g} to {data.max():g}, expected floats within [0, 1]; "
            "scale them or let stretch=True do it"
        )
    elif kind == "i" and data.min() < 0:
        raise ImageError(
            f"{name} has negative values (down to {data.min():g}), which cannot be divided into [0, 1]; "
            "use stretch=True"
        )
    else:
        bottom, top = 0.0, 1.0 if kind in "bf" else float(np.iinfo(dtype).max)
    result = _scaled(grey, bottom, top)
    if valid is None:
        return result, None
    result[~valid] = 0
    return result, np.asarray(valid)


def read_image_raw(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image file with its bit depth and channels kept.

    The EXIF orientation is ignored; of several pages the first is read; a palette is resolved to RGB.

    Args:
        path: an image file, of any format that OpenCV or Pillow can read.

    Returns:
        (H, W), or (H, W, C) with C = 2 grey + alpha, 3 RGB or 4 RGBA, in the file's own type (uint8,
        uint16, int32, float32, ...; bool or uint8 for one-bit images), C-contiguous. OpenCV reads
        the grey + alpha of a PNG as RGBA.

    Raises:
        ImageError: the file is missing, a folder, empty, damaged, no image, or too large to decode.
    """
    name = os.fspath(path)
    data = _file_bytes(name)
    # Some decoders print about these on the process's stderr, so they are not asked.
    if (data.startswith(b"\x89PNG") and data.rfind(b"IEND") < 0) or (
        data.startswith(b"\xff\xd8\xff") and data.rfind(b"\xff\xd9") < 0
    ):
        raise ImageError(f"cannot read {name}: the file is truncated")
    with _quiet_opencv():
        try:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        except cv2.error:
            # Too large or not of its kind: Pillow's verdict is the one reported.
            pixels = None
    if pixels is None:
        pixels = _decode_with_pillow(data, name)
    elif pixels.ndim == 3 and pixels.shape[2] in (3, 4):
        # By index: `cv2.cvtColor` takes no int16, int32 and float64.
        pixels = pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
    elif pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return np.ascontiguousarray(pixels)


def save_image(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Writes an image file, whole or not at all; the extension chooses the format.

    Nothing is converted: .png holds uint8 and uint16; .tif and .tiff also int16, int32, float32 and
    float64 (deflate, lossless); .jpg, .jpeg, .bmp and .webp uint8. bool is written as 0 and 255.

    Args:
        path: the file to write, in a folder that exists; replaced if it exists.
        array: (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA.

    Raises:
        ImageError: an array that is not an image, or that the format cannot hold as it is.
        OutputError: an unknown extension, or a file that cannot be written.
    """
    name = os.fspath(path)
    pixels = np.asarray(array)
    check_image_fits(name, pixels)
    extension = check_image_name(name)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if channels > 1:
        pixels = pixels[..., [2, 1, 0, 3][:channels]]
    # 8: deflate, smaller than OpenCV's default and read everywhere.
    options = [cv2.IMWRITE_TIFF_COMPRESSION, 8] if extension in _TIFF else []
    with _quiet_opencv():
        try:
            encoded_ok, encoded = cv2.imencode(extension, np.ascontiguousarray(pixels), options)
        except cv2.error as error:
            raise OutputError(f"cannot write {name}: {_one_line(error)}") from error
    if not encoded_ok:
        raise OutputError(f"cannot write {name}: OpenCV cannot encode {pixels.shape} {pixels.dtype}")
    with atomic_output(name) as temporary:
        temporary.write_bytes(encoded.tobytes())


def check_image_fits(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Raises where `save_image` would for the array's type and channels; writes nothing.

    Raises:
        ImageError: an array that is not an image, or that the format cannot hold as it is.
        OutputError: an unknown extension.
    """
    name = os.fspath(path)
    extension = check_image_name(name)
    _check_array(array, f"the image for {name}")
    types, channel_counts = _FORMATS[extension]
    dtype = "uint8" if array.dtype == np.bool_ else array.dtype.name
    if dtype not in types:
        raise ImageError(
            f"cannot write {name}: {extension} holds {' or '.join(types)}, got {dtype}; "
            "convert it (a float image in [0, 1] times 255 to uint8), or choose .tif"
        )
    channels = 1 if array.ndim == 2 else array.shape[2]
    if channels not in channel_counts:
        raise ImageError(
            f"cannot write {name}: {extension} holds {' or '.join(map(str, channel_counts))} channels, "
            f"got {channels}"
        )


def check_image_name(path: str | os.PathLike[str]) -> str:
    """The extension of an image file to write, in lower case; `OutputError` if it is not a known one."""
    extension = Path(path).suffix.lower()
    if extension not in _FORMATS:
        raise OutputError(
            f"cannot write {os.fspath(path)}: unknown image extension {extension!r}; "
            f"known are {', '.join(_FORMATS)}"
        )
    return extension


def _checked_percentiles(percentiles: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(p) for p in percentiles)
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if not 0 <= low < high <= 100:
        raise ImageError(f"percentiles must be two rising numbers within [0, 100], got {percentiles!r}")
    return low, high


def _pixels(source: Any) -> tuple[np.ndarray, str]:
    """The pixels of any source as an array of its own type, and what to call it in an error."""
    if isinstance(source, (str, os.PathLike)):
        return read_image_raw(source), os.fspath(source)
    if isinstance(source, np.ndarray):
        return source, "the image array"
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or "the Pillow image"
        return _pillow_pixels(source, name), name
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.Tensor):
        return _tensor_pixels(source, torch), "the image tensor"
    raise ImageError(
        f"cannot take an image from {type(source).__name__}; expected a path, a Pillow image, "
        "a numpy array or a torch tensor"
    )


def _tensor_pixels(tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    pixels: np.ndarray = tensor.numpy()
    # Channels first is torch's order; channels last is what remains if the first axis is too long.
    return np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 and pixels.shape[0] <= 4 else pixels


def _check_array(pixels: np.ndarray, name: str) -> None:
    shape = tuple(pixels.shape)
    if pixels.dtype.kind not in "biuf" or pixels.dtype.itemsize > 8:
        raise ImageError(f"{name} has type {pixels.dtype}; expected bool, integers or floats up to 64 bits")
    if pixels.ndim not in (2, 3):
        raise ImageError(f"{name} has shape {shape}; expected (H, W) or (H, W, C) with 1 to 4 channels")
    if 0 in shape:
        raise ImageError(f"{name} has shape {shape}: it holds no pixel")
    if pixels.ndim == 3 and shape[2] > 4:
        raise ImageError(
            f"{name} has shape {shape}; expected (H, W, C) with 1 to 4 channels last; "
            "pick or move the axis of channels"
        )


def _grey(pixels: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 1 or 3) of any pixel type -> (H, W): uint8, uint16, float32 or float64."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype in (np.bool_, np.float16):
        pixels = pixels.astype(np.float32)
    elif pixels.dtype not in (np.uint8, np.uint16, np.float32):
        pixels = pixels.astype(np.float64)
    if pixels.ndim == 2:
        return pixels
    if pixels.dtype == np.float64:
        grey: np.ndarray = pixels @ np.array([0.299, 0.587, 0.114])
    else:
        grey = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)
    return grey


def _stretch_range(data: np.ndarray, low: float, high: float) -> tuple[float, float]:
    bottom, top = (float(v) for v in np.percentile(data, (low, high)))
    if bottom == top:
        # Nearly all pixels alike, as in a mask: the few others would be lost.
        bottom, top = float(data.min()), float(data.max())
    return bottom, top


def _scaled(grey: np.ndarray, bottom: float, top: float) -> np.ndarray:
    """(grey - bottom) / (top - bottom), clipped to [0, 1]; 0 where the range is empty."""
    if not top > bottom:
        return np.zeros(grey.shape, np.float32)
    if grey.dtype in (np.uint8, np.uint16):
        # A table is exact and the fastest: each grey level is divided once.
        levels = (np.arange(np.iinfo(grey.dtype).max + 1) - bottom) / (top - bottom)
        scaled: np.ndarray = np.clip(levels, 0, 1).astype(np.float32)[np.ascontiguousarray(grey)]
        return scaled
    if (bottom, top) == (0.0, 1.0):
        return np.ascontiguousarray(np.clip(grey, 0, 1), dtype=np.float32)
    # Clipped before the division, and halved, so that huge values cannot overflow.
    result = np.clip(grey.astype(np.float64), bottom, top)
    result = (result / 2 - bottom / 2) / (top / 2 - bottom / 2)
    return np.ascontiguousarray(np.clip(result, 0, 1), dtype=np.float32)


def _file_bytes(name: str) -> bytes:
    try:
        data = Path(name).read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"cannot read {name}: no such file") from error
    except IsADirectoryError as error:
        raise ImageError(f"cannot read {name}: it is a folder; expected an image file") from error
    except (OSError, ValueError) as error:
        # ValueError: a zero byte within the name.
        raise ImageError(f"cannot read {name!r}: {_one_line(error)}") from error
    if not data:
        raise ImageError(f"cannot read {name}: the file is empty")
    return data


def _decode_with_pillow(data: bytes, name: str) -> np.ndarray:
    # A warning adds nothing to the error; of a file that could be read it is passed on.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with Image.open(io.BytesIO(data)) as image:
                pixels = _pillow_pixels(image, name)
        except UnidentifiedImageError as error:
            raise ImageError(f"cannot read {name}: not an image of a known format, or damaged") from error
        except _PILLOW_ERRORS as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError(f"cannot read {name}: {_one_line(error)}") from error
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return pixels


def _pillow_pixels(image: Image.Image, name: str) -> np.ndarray:
    """The pixels of a Pillow image: palettes and other colour spaces become RGB or RGBA."""
    try:
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
        elif image.mode in ("La", "RGBa"):
            image = image.convert(image.mode.upper())
        elif image.mode not in ("1", "L", "LA", "RGB", "RGBA", "F") and not image.mode.startswith("I"):
            image = image.convert("RGB")
        # Decoding happens here, so damaged files show here.
        pixels = np.asarray(image)
    except _PILLOW_ERRORS as error:
        raise ImageError(f"cannot read {name}: {_one_line(error)}") from error
    if not pixels.dtype.isnative:
        pixels = pixels.astype(pixels.dtype.newbyteorder("="))
    return pixels


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _quiet_opencv() -> Iterator[None]:
    """Keeps OpenCV from printing about unknown TIFF tags, or what an error here says anyway."""
    log: Any = cv2.utils.logging
    with _log_lock:
        if _log_silenced[0] == 0:
            _log_silenced[1] = log.setLogLevel(log.LOG_LEVEL_SILENT)
        _log_silenced[0] += 1
    try:
        yield
    finally:
        with _log_lock:
            _log_silenced[0] -= 1
            if _log_silenced[0] == 0:
                log.setLogLevel(_log_silenced[1])
