"""What two sensors agree on: the direction of edges. Maps of it, and how they correlate.

Grey values differ between spectra, and so does the sign of an edge; its direction modulo half a turn
does not. At each pixel it is a vector of twice its angle, as long as the edge is strong (Granlund, "In search
of a general picture processing operator", CGIP 1978), so that edges across each other cancel and averages
mean something. Channel features of orientated gradients (CFOG: Ye et al., "Fast and Robust Matching for
Multimodal Remote Sensing Image Registration", IEEE TGRS 2019) say the same in more channels: what their six
hold, smoothed over neighbouring directions, is this harmonic but for half a percent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

_PRE_BLUR = 0.8  # pixels: sensor noise is finer
_POOL = 0.8  # pixels: edges of two sensors are a little apart
_NEIGHBOURHOOD = 33  # pixels
_NOISE = 2e-4  # of Scharr's gain of 32: far below a grey level of 8 bits
EDGE = 4  # pixels next to a border, where filters see what is not there

_COARSER = 4  # pixels, a shift in whose number changes overlap and norms little
_TO_WIDE = np.array([[1 / _COARSER, 0, 0], [0, 1 / _COARSER, 0]])
_INVERSE = cv2.DFT_INVERSE | cv2.DFT_SCALE

Maps = NDArray[np.float32]
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The function of each item, in as many threads as OpenCV may use.

    For work of OpenCV, which goes on without the interpreter's lock.
    """
    with ThreadPoolExecutor(_num_threads()) as pool:
        return list(pool.map(function, items))


def _num_threads() -> int:
    """Threads that OpenCV may use, at least 1."""
    return max(1, cv2.getNumThreads())


def structure_maps(image: NDArray[np.float32], *, even: bool = True) -> Maps:
    """Edges as vectors of twice their angle, nearly of unit length at each pixel.

    Args:
        image: (H, W) float32 grey.
        even: weak edges count where all are weak, as in the dark half of a scene; otherwise edges count
            by their strength in the whole image, which is more reliable for whole images shrunk to little.

    Returns:
        (2, H, W) float32: cosine and sine. Pixels without structure are near zero in both.
    """
    smooth = cv2.GaussianBlur(image, (0, 0), _PRE_BLUR)
    gx, gy = cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1)
    strength = cv2.magnitude(gx, gy) + np.float32(1e-12)
    maps = np.empty((2, *image.shape), np.float32)
    cv2.GaussianBlur((gx * gx - gy * gy) / strength, (0, 0), _POOL, dst=maps[0])
    cv2.GaussianBlur(2 * gx * gy / strength, (0, 0), _POOL, dst=maps[1])
    norm = cv2.magnitude(maps[0], maps[1])
    # What is far weaker than this is taken for noise.
    if even:
        floor = 0.75 * cv2.blur(norm, (_NEIGHBOURHOOD, _NEIGHBOURHOOD))
    else:
        floor = np.full_like(norm, 0.5 * np.median(norm))
    maps /= np.sqrt(norm * norm + floor * floor + np.float32(_NOISE**2))
    return maps


def without_edge(maps: Maps) -> Maps:
    """The maps (K, H, W) themselves, set to zero along the image's border."""
    maps[:, :EDGE] = maps[:, -EDGE:] = 0
    maps[:, :, :EDGE] = maps[:, :, -EDGE:] = 0
    return maps


def correlate_windows(
    a: Maps, b: Maps, centres: NDArray[np.int64], *, size: int, radius: int
) -> NDArray[np.float32]:
    """Normalised cross-correlation of windows of `a` with their surroundings in `b`.

    Args:
        a, b: (2, H, W) structure maps of one size; zero where there is no image.
        centres: (P, 2) xy pixels of the windows.
        size: side of a window, pixels, even.
        radius: displacements searched, pixels, in x and y.

    Returns:
        (P, 2 * radius + 1, 2 * radius + 1), in [-1, 1]; the middle is no displacement. A window that
        holds little structure correlates with nothing.
    """
    reach, side = size + 2 * radius, 2 * radius + 1
    n = cv2.getOptimalDFTSize(reach)
    margin = reach // 2 + 1
    a, b = (cv2.copyMakeBorder(cv2.merge(list(maps)), *4 * (margin,), cv2.BORDER_CONSTANT) for maps in (a, b))
    hann = np.hanning(size + 2)[1:-1].astype(np.float32)
    taper = (hann[:, None] * hann)[:, :, None]
    # The taper weighs the other image too, so that both norms are of the same pixels.
    slide = np.zeros((side, reach), np.float32)
    for i in range(side):
        slide[i, i : i + size] = hann
    full = np.float32(taper.sum() * 0.1)  # a tenth of the pixels hold structure
    surfaces = np.empty((len(centres), side, side), np.float32)

    def correlate(some: slice) -> None:
        template, searched = np.zeros((n, n, 2), np.float32), np.zeros((n, n, 2), np.float32)
        for (x, y), surface in zip(centres[some] + margin - size // 2, surfaces[some], strict=True):
            window = a[y : y + size, x : x + size]
            around = b[y - radius : y - radius + reach, x - radius : x - radius + reach]
            template[:size, :size] = window * taper
            searched[:reach, :reach] = around
            energy = np.vdot(template[:size, :size], window)
            there = slide @ np.square(around).sum(axis=2) @ slide.T
            product = cv2.mulSpectrums(
                cv2.dft(searched, nonzeroRows=reach), cv2.dft(template, nonzeroRows=size), 0, conjB=True
            )
            agreed = cv2.dft(product, flags=_INVERSE)[:side, :side, 0]
            surface[:] = agreed / np.sqrt((energy + full) * (there + full))

    threads = _num_threads()
    in_threads(correlate, [slice(start, None, threads) for start in range(threads)])
    return surfaces


class GlobalCorrelator:
    """Correlates one image's structure with another's as a whole, over all shifts at once.

    Normalised over the pixels that both show (Padfield, "Masked object registration in the Fourier
    domain", IEEE TIP 2012). Overlap and norms change slowly with the shift: they are found for every
    fourth one, on pixels four times as wide.

    Args:
        maps: (2, H, W) structure maps of the fixed image.
        mask: (H, W), 1 where its pixels count; None for all.
    """

    def __init__(self, maps: Maps, mask: NDArray[np.float32] | None = None) -> None:
        _, height, width = maps.shape
        small = (cv2.getOptimalDFTSize(-(-3 * side // (2 * _COARSER))) for side in (height, width))
        self._small = tuple(small)
        self._size = tuple(_COARSER * side for side in self._small)
        self._shifts = [np.fft.fftfreq(side, 1 / side) for side in self._size]  # in y and in x
        if mask is None:
            mask = np.ones((height, width), np.float32)
        else:
            maps = maps * mask
        self._area = float(mask.sum())
        self._maps = _spectrum(maps, self._size)
        nothing = np.zeros_like(mask)
        self._mask, self._energy = (
            _spectrum(self._coarser(x, nothing), self._small) for x in (mask, np.square(maps).sum(axis=0))
        )

    def _coarser(self, *layers: NDArray[np.float32]) -> Maps:
        """Layers (H, W) on wider pixels: mean values."""
        size = tuple(_COARSER * -(-side // _COARSER) for side in layers[0].shape)
        padded = np.zeros((*size, len(layers)), np.float32)
        for k, layer in enumerate(layers):
            padded[: layer.shape[0], : layer.shape[1], k] = layer
        pooled = cv2.resize(padded, (size[1] // _COARSER, size[0] // _COARSER), interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(pooled.transpose(2, 0, 1))

    def best_shift(
        self, maps: Maps, mask: NDArray[np.float32], *, min_overlap: float, max_shift: float | None
    ) -> tuple[float, float, float]:
        """The shift at which the moving maps agree best with the fixed ones.

        Args:
            maps: (2, H, W) of the moving image, resampled to the fixed image's frame.
            mask: (H, W), 1 where it has pixels.
            min_overlap: share of the fixed image that both must show.
            max_shift: pixels in x and y, or None.

        Returns:
            evidence (correlation times the root of the overlap in pixels; minus infinity if no shift
            is allowed), and dx, dy: the fixed pixel (x, y) is (x + dx, y + dy) in the moving frame.
        """
        # Two real signals as one complex one: what is correlated with a real one comes apart again.
        covered = _spectrum(self._coarser(mask, np.square(maps).sum(axis=0)), self._small)
        overlap, moving_energy = cv2.split(_correlation(self._mask, covered) * np.float32(_COARSER**2))
        fixed_energy = _correlation(self._energy, covered)[:, :, 0] * np.float32(_COARSER**2)
        norms = np.maximum(fixed_energy * moving_energy, 1e-3)
        weight = np.sqrt(np.maximum(overlap, 0) / norms)
        weight[overlap <= min_overlap * self._area] = 0
        # Shifts wrap around: the first follow the last.
        weight = cv2.copyMakeBorder(weight, 0, 1, 0, 1, cv2.BORDER_WRAP)
        weight = cv2.warpAffine(
            weight, _TO_WIDE, self._size[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        )
        dy, dx = self._shifts
        if max_shift is not None:
            weight[np.abs(dy) > max_shift] = 0
            weight[:, np.abs(dx) > max_shift] = 0
        if not weight.any():
            return -np.inf, 0.0, 0.0
        evidence = _correlation(self._maps, _spectrum(maps, self._size))[:, :, 0] * weight
        evidence[weight == 0] = -np.inf
        y, x = np.unravel_index(int(evidence.argmax()), evidence.shape)
        return float(evidence[y, x]), float(dx[x]), float(dy[y])


def _spectrum(layers: Maps, size: tuple[int, ...]) -> NDArray[np.float32]:
    """Of real and imaginary part (2, H, W), padded to a size: (H', W', 2)."""
    _, height, width = layers.shape
    padded = np.zeros((*size, 2), np.float32)
    padded[:height, :width, 0], padded[:height, :width, 1] = layers
    return cv2.dft(padded, nonzeroRows=height)


def _correlation(fixed: NDArray[np.float32], moving: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of two complex signals, from their spectra: (H', W', 2)."""
    return cv2.dft(cv2.mulSpectrums(moving, fixed, 0, conjB=True), flags=_INVERSE)
