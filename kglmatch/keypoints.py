"""Keypoints of a grey image: where to cut patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from kglmatch.errors import ImageError, KeypointError
from kglmatch.geometry import parabola_vertex
from kglmatch.options import DETECTORS

# OpenCV's type stubs lack the detectors, and know no None for corners.
cv2_any: Any = cv2

# A quarter of OpenCV's default: infrared and radar images have weak contrast, and the strongest
# keypoints are kept anyway.
_SIFT_CONTRAST = 0.01
# From picky to greedy; the first that finds enough is taken.
_FAST_THRESHOLDS = (40, 20, 10, 5, 2, 1)
_GFTT_QUALITY = 0.001
_GFTT_DISTANCE = 4
# Pixels: noise below the first is blurred away, a corner is as wide as the second, and gradients are
# measured against those within the third.
_STRUCTURE_BLUR, _STRUCTURE_CORNER, _STRUCTURE_AROUND = 1.0, 1.5, 24.0
_STRUCTURE_DISTANCE = 4
_STRUCTURE_FLOOR = 0.1  # of the image's mean squared gradient, so that noise in flat places is not raised
# Images that span less than this are amplified; others are not, since that clips their brightest spots.
_WEAK_RANGE = 0.5
# An image whose range is below this is not amplified further: its structure is noise.
_SMALLEST_RANGE = 0.02


@dataclass(frozen=True, eq=False)
class Keypoints:
    """Keypoints, the strongest first; positions in OpenCV's convention, (0, 0) the first pixel's centre.

    Args:
        xy: (N, 2) float32, pixels; no position occurs twice.
        scale: (N,) float32, diameter of the neighbourhood in pixels (OpenCV's `size`), 0 where the
            detector has none.
        angle: (N,) float32, degrees from the x axis towards the y axis (clockwise as one looks at
            the image) in [0, 360), -1 where the detector has none.
        response: (N,) float32, the detector's own measure of strength, 0 where it has none.
    """

    xy: np.ndarray
    scale: np.ndarray
    angle: np.ndarray
    response: np.ndarray

    def __len__(self) -> int:
        return len(self.xy)


def detect_keypoints(
    image: np.ndarray,
    *,
    detector: str = "sift",
    max_keypoints: int = 2048,
    border: float = 0,
    mask: np.ndarray | None = None,
) -> Keypoints:
    """Finds at most `max_keypoints` keypoints, in an order that is the same in every run.

    Detection is on 8 bits. An image of weak contrast, whose 0.1 to 99.9 percentiles span less than
    half of [0, 1], is amplified to the full range first, by no more than 50 times.

    Args:
        image: (H, W) grey, float in [0, 1] or uint8.
        detector:
            - "sift": blobs, to a fraction of a pixel, with scale and angle;
            - "orb": corners on a pyramid, with scale and angle, none within 31 pixels of the edge;
            - "fast": corners at whole pixels, the threshold lowered until there are enough;
            - "gftt": corners by smallest eigenvalue (Shi & Tomasi), at least 4 pixels apart;
            - "structure": corners by smallest eigenvalue too, but of gradients over their strength
              around, so that weak corners in dim parts count too; to a fraction of a pixel, about 4 apart.
              Sensors differ in how strong an edge is more than in where it is (normalised gradients:
              Haber & Modersitzki, "Intensity gradient based registration and fusion of multi-modal
              images", MICCAI 2006);
            - "grid": a regular grid as dense as `max_keypoints` allows, whatever the image shows.
        max_keypoints: how many to keep, the strongest; ties are broken by position (y, then x).
        border: keypoints nearer than this many pixels to the first or last row or column are left
            out; half the patch size keeps every patch within the image.
        mask: (H, W), True or non-zero where keypoints may lie; None for everywhere.

    Returns:
        `Keypoints`, empty (but typed) if the image shows none.

    Raises:
        KeypointError: an unknown detector, `max_keypoints` below 1, a negative border, a mask of
            another shape.
        ImageError: an image of another shape or type, or with values outside [0, 1].
    """
    if detector not in DETECTORS:
        raise KeypointError(f"unknown detector {detector!r}; known are {', '.join(DETECTORS)}")
    if not isinstance(max_keypoints, (int, np.integer)) or max_keypoints < 1:
        raise KeypointError(f"max_keypoints must be an integer of at least 1, got {max_keypoints!r}")
    if not isinstance(border, (int, float, np.integer, np.floating)) or not 0 <= border < np.inf:
        raise KeypointError(f"border must be a number of pixels of at least 0, got {border!r}")
    _check_image(image)
    height, width = image.shape
    allowed = np.zeros(image.shape, np.uint8)
    margin = int(np.ceil(border))
    if 2 * margin < min(height, width):
        allowed[margin : height - margin, margin : width - margin] = 1
    if mask is not None:
        mask = np.asarray(mask)
        if mask.shape != image.shape:
            raise KeypointError(f"mask has shape {mask.shape}, expected that of the image, {image.shape}")
        allowed[mask == 0] = 0
    if not allowed.any():
        rows = np.zeros((0, 5))
    elif detector == "grid":
        rows = _grid(allowed, int(max_keypoints), margin)
    elif detector == "gftt":
        rows = _gftt(_as_8_bit(image), allowed, int(max_keypoints))
    elif detector == "structure":
        rows = _structure(_as_8_bit(image), allowed)
    else:
        rows = _cv2_rows(_detect(detector, _as_8_bit(image), allowed, int(max_keypoints)))
    rows = rows.astype(np.float32)
    # Detectors look the mask up with roundings of their own.
    x, y = rows[:, 0], rows[:, 1]
    inside = (x >= border) & (y >= border) & (x <= width - 1 - border) & (y <= height - 1 - border)
    rows = rows[inside]
    nearest = np.rint(rows[:, :2]).astype(np.intp)
    if mask is not None:
        rows = rows[mask[nearest[:, 1], nearest[:, 0]] != 0]
    rows = _strongest(rows, int(max_keypoints))
    return Keypoints(
        xy=np.ascontiguousarray(rows[:, :2]),
        scale=rows[:, 2].copy(),
        angle=rows[:, 3].copy(),
        response=rows[:, 4].copy(),
    )


def gradient_directions(image: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """The main direction of the gradients around each position, known up to half a turn.

    Gradients flip where dark and bright change places between spectra, so they are averaged as axes,
    by doubled angles, under a Gaussian of 8 pixels.

    Args:
        image: (H, W) grey, float in [0, 1] or uint8.
        xy: (N, 2) pixels; outside the image its nearest pixel counts.

    Returns:
        (N,) float32 degrees from the x axis towards the y axis, in [-90, 90].

    Raises:
        ImageError: an image of another shape or type, or with values outside [0, 1].
    """
    _check_image(image)
    smooth = cv2.GaussianBlur(_as_8_bit(image).astype(np.float32), (0, 0), 1)
    gx, gy = cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1)
    strength = np.maximum(np.hypot(gx, gy), np.float32(1e-6))
    cos, sin = (cv2.GaussianBlur(p / strength, (0, 0), 8) for p in (gx * gx - gy * gy, 2 * gx * gy))
    x, y = np.clip(np.rint(xy), 0, np.array(image.shape[::-1]) - 1).astype(np.intp).T
    degrees: np.ndarray = np.rad2deg(np.arctan2(sin[y, x], cos[y, x])) / 2
    return degrees


def _check_image(image: Any) -> None:
    if not isinstance(image, np.ndarray) or image.ndim != 2:
        given = image.shape if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError(f"expected a grey image, a numpy array (H, W), got {given}; load_image makes one")
    if image.dtype != np.uint8 and image.dtype.kind != "f":
        raise ImageError(f"expected grey floats in [0, 1] or uint8, got {image.dtype}; see load_image")
    if image.size == 0:
        raise ImageError(f"the image has shape {image.shape}: it holds no pixel")
    if image.dtype.kind == "f" and not (image.min() >= -1e-6 and image.max() <= 1 + 1e-6):
        raise ImageError(
            f"the image has values from {image.min():g} to {image.max():g}, expected [0, 1]; see load_image"
        )


def _as_8_bit(image: np.ndarray) -> np.ndarray:
    grey = image.astype(np.float32)
    if image.dtype == np.uint8:
        grey /= 255
    low, high = (float(v) for v in np.percentile(grey, (0.1, 99.9)))
    if high - low < _WEAK_RANGE:
        # The range around its middle, so that constant images stay constant.
        low, spread = (low + high) / 2, max(high - low, _SMALLEST_RANGE)
        grey = (grey - low) / spread + 0.5
    levels: np.ndarray = np.rint(np.clip(grey * 255, 0, 255)).astype(np.uint8)
    return levels


def _detect(detector: str, image: np.ndarray, allowed: np.ndarray, wanted: int) -> list[Any]:
    if detector == "sift":
        # The precise upscale matters: without it every position is off by a quarter pixel.
        sift = cv2_any.SIFT_create(contrastThreshold=_SIFT_CONTRAST, enable_precise_upscale=True)
        return list(sift.detect(image, allowed))
    if detector == "orb":
        # Its pyramid of eight levels at 1.2 needs some pixels at the last level, and its edge of 31
        # leaves nothing in smaller images.
        if min(image.shape) <= 2 * 31:
            return []
        return list(cv2_any.ORB_create(nfeatures=wanted, fastThreshold=5).detect(image, allowed))
    found: list[Any] = []
    for threshold in _FAST_THRESHOLDS:
        found = list(cv2_any.FastFeatureDetector_create(threshold).detect(image, allowed))
        if len(found) >= wanted:
            break
    return found


def _cv2_rows(keypoints: list[Any]) -> np.ndarray:
    """(N, 5): x, y, scale, angle, response."""
    rows = [(*k.pt, k.size, k.angle, k.response) for k in keypoints]
    array = np.array(rows, np.float64).reshape(-1, 5)
    # FAST reports the size of its circle for every keypoint, which is no scale.
    array[array[:, 3] < 0, 2] = 0
    array[array[:, 3] < 0, 3] = -1
    return array


def _gftt(image: np.ndarray, allowed: np.ndarray, wanted: int) -> np.ndarray:
    corners, quality = cv2_any.goodFeaturesToTrackWithQuality(
        image, wanted, _GFTT_QUALITY, _GFTT_DISTANCE, allowed
    )
    if corners is None:
        return np.zeros((0, 5))
    xy = np.asarray(corners, np.float64).reshape(-1, 2)
    rows = np.zeros((len(xy), 5))
    rows[:, :2], rows[:, 3], rows[:, 4] = xy, -1, np.asarray(quality).reshape(-1)
    return rows


def _structure(image: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    smooth = cv2.GaussianBlur(image.astype(np.float32), (0, 0), _STRUCTURE_BLUR)
    gx, gy = cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1)
    strength = gx * gx + gy * gy
    around = cv2.GaussianBlur(strength, (0, 0), _STRUCTURE_AROUND) + _STRUCTURE_FLOOR * strength.mean()
    around = np.maximum(around, np.float32(1e-9))
    products = (gx * gx / around, gx * gy / around, gy * gy / around)
    xx, xy, yy = (cv2.GaussianBlur(product, (0, 0), _STRUCTURE_CORNER) for product in products)
    smallest = cv2.GaussianBlur(xx + yy - np.sqrt((xx - yy) ** 2 + 4 * xy * xy), (0, 0), 1)
    side = 2 * _STRUCTURE_DISTANCE + 1
    highest = (smallest == cv2.dilate(smallest, np.ones((side, side), np.uint8))) & (smallest > 1e-6)
    y, x = np.nonzero(highest & (allowed != 0))
    framed, centre = cv2.copyMakeBorder(smallest, 1, 1, 1, 1, cv2.BORDER_REFLECT_101), smallest[y, x]
    left, right, above, below = (framed[y + 1 + v, x + 1 + u] for u, v in ((-1, 0), (1, 0), (0, -1), (0, 1)))
    rows = np.zeros((len(x), 5))
    rows[:, 0] = x + parabola_vertex(left, centre, right)
    rows[:, 1] = y + parabola_vertex(above, centre, below)
    rows[:, 3], rows[:, 4] = -1, centre
    return rows


def _grid(allowed: np.ndarray, wanted: int, margin: int) -> np.ndarray:
    height, width = (side - 2 * margin for side in allowed.shape)
    spacing = max(1, int(np.sqrt(height * width / wanted)))
    while -(-height // spacing) * -(-width // spacing) > wanted:
        spacing += 1
    x = margin + (width - 1) % spacing // 2 + np.arange(-(-width // spacing)) * spacing
    y = margin + (height - 1) % spacing // 2 + np.arange(-(-height // spacing)) * spacing
    rows = np.zeros((len(x) * len(y), 5))
    rows[:, 0], rows[:, 1], rows[:, 3] = np.tile(x, len(y)), np.repeat(y, len(x)), -1
    inside: np.ndarray = rows[allowed[rows[:, 1].astype(np.intp), rows[:, 0].astype(np.intp)] != 0]
    return inside


def _strongest(rows: np.ndarray, wanted: int) -> np.ndarray:
    """Sorted by falling response, y, x; of one position only the strongest; at most `wanted`."""
    x, y, scale, angle, response = rows.T
    rows = rows[np.lexsort((angle, -scale, x, y, -response))]
    # SIFT repeats a position for each of its orientations.
    _, first = np.unique(np.ascontiguousarray(rows[:, :2]), axis=0, return_index=True)
    return rows[np.sort(first)[:wanted]]
