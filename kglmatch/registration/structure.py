"""What two sensors agree on: the direction of edges. Maps of it, and how they correlate.

Grey values differ between spectra, and so does the sign of an edge; its direction modulo half a turn
does not. The maps follow CFOG, channel features of orientated gradients (Ye et al., "Fast and Robust
Matching for Multimodal Remote Sensing Image Registration", IEEE TGRS 2019).
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

CHANNELS = 6
_PRE_BLUR = 0.8  # pixels: sensor noise is finer
_POOL = 0.8  # pixels: edges of two sensors are a little apart
_NEIGHBOURHOOD = 33  # pixels
_NOISE = 1e-4  # of Scharr's gain of 32: far below a grey level of 8 bits
EDGE = 4  # pixels next to a border, where filters see what is not there
_CHUNK = 24  # windows whose spectra are held at once

Maps = NDArray[np.float32]


def structure_maps(image: NDArray[np.float32], channels: int = CHANNELS, *, even: bool = True) -> Maps:
    """Edge strength by direction, nearly of unit length at each pixel.

    Args:
        image: (H, W) float32 grey.
        channels: number of directions over half a turn.
        even: weak edges count where all are weak, as in the dark half of a scene; otherwise edges count
            by their strength in the whole image, which is more reliable for whole images shrunk to little.

    Returns:
        (channels, H, W) float32. Pixels without structure are near zero in every channel.
    """
    smooth = cv2.GaussianBlur(image, (0, 0), _PRE_BLUR)
    gx, gy = cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1)
    maps = np.empty((channels, *image.shape), np.float32)
    for k in range(channels):
        angle = np.pi * k / channels
        response = np.abs(gx * np.float32(np.cos(angle)) + gy * np.float32(np.sin(angle)))
        maps[k] = cv2.GaussianBlur(response, (0, 0), _POOL)
    maps = (np.roll(maps, 1, axis=0) + 2 * maps + np.roll(maps, -1, axis=0)) / 4
    # What is alike in all directions says nothing about direction.
    maps -= maps.mean(axis=0, keepdims=True)
    norm = np.sqrt(np.square(maps).sum(axis=0))
    # What is far weaker than this is taken for noise.
    if even:
        floor = 0.75 * cv2.blur(norm, (_NEIGHBOURHOOD, _NEIGHBOURHOOD))
    else:
        floor = np.full_like(norm, 0.5 * np.median(norm))
    return maps / np.sqrt(np.square(norm) + np.square(floor) + _NOISE**2)


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
        a, b: (K, H, W) structure maps of one size; zero where there is no image.
        centres: (P, 2) xy pixels of the windows.
        size: side of a window, pixels, even.
        radius: displacements searched, pixels, in x and y.

    Returns:
        (P, 2 * radius + 1, 2 * radius + 1), in [-1, 1]; the middle is no displacement. A window that
        holds little structure correlates with nothing.
    """
    reach = size + 2 * radius
    n = cv2.getOptimalDFTSize(reach)
    margin = reach // 2 + 1
    a = np.pad(a, ((0, 0), (margin, margin), (margin, margin)))
    b = np.pad(b, ((0, 0), (margin, margin), (margin, margin)))
    hann = np.hanning(size + 2)[1:-1].astype(np.float32)
    taper = hann[:, None] * hann
    taper_spectrum = np.conj(np.fft.rfft2(taper, s=(n, n)))
    side = 2 * radius + 1
    full = taper.sum() * 0.1  # a tenth of the pixels hold structure
    surfaces = np.empty((len(centres), side, side), np.float32)
    for start in range(0, len(centres), _CHUNK):
        part = centres[start : start + _CHUNK]
        templates = np.zeros((len(part), len(a), n, n), np.float32)
        searched = np.zeros_like(templates)
        energies = np.empty((len(part), 1, 1), np.float32)
        for i, (x, y) in enumerate(part):
            top, left = y + margin - size // 2, x + margin - size // 2
            window = a[:, top : top + size, left : left + size] * taper
            templates[i, :, :size, :size] = window
            energies[i] = (window * a[:, top : top + size, left : left + size]).sum()
            top, left = top - radius, left - radius
            searched[i, :, :reach, :reach] = b[:, top : top + reach, left : left + reach]
        product = (np.conj(np.fft.rfft2(templates)) * np.fft.rfft2(searched)).sum(axis=1)
        numerator = np.fft.irfft2(product, s=(n, n))[:, :side, :side]
        # The taper weighs the other image too, so that both norms are of the same pixels.
        there = np.fft.irfft2(taper_spectrum * np.fft.rfft2(np.square(searched).sum(axis=1)), s=(n, n))
        there = np.maximum(there[:, :side, :side], 0)
        surfaces[start : start + _CHUNK] = numerator / np.sqrt((energies + full) * (there + full))
    return surfaces


class GlobalCorrelator:
    """Correlates one image's structure with another's as a whole, over all shifts at once.

    Normalised over the pixels that both show (Padfield, "Masked object registration in the Fourier
    domain", IEEE TIP 2012).

    Args:
        maps: (K, H, W) structure maps of the fixed image.
        mask: (H, W), 1 where its pixels count; None for all.
    """

    def __init__(self, maps: Maps, mask: NDArray[np.float32] | None = None) -> None:
        _, height, width = maps.shape
        self._size = tuple(cv2.getOptimalDFTSize(int(1.5 * side)) for side in (height, width))
        if mask is None:
            mask = np.ones((height, width), np.float32)
        else:
            maps = maps * mask
        self._area = float(mask.sum())
        self._maps = self._spectrum(maps)
        self._mask = self._spectrum(mask)
        self._energy = self._spectrum(np.square(maps).sum(axis=0))

    def _spectrum(self, x: NDArray[np.float32]) -> NDArray[np.complexfloating]:
        return np.conj(np.fft.rfft2(x, s=self._size)).astype(np.complex64)

    def _correlation(self, product: NDArray[np.complexfloating]) -> NDArray[np.float32]:
        return np.fft.irfft2(product, s=self._size).astype(np.float32)

    def best_shift(
        self, maps: Maps, mask: NDArray[np.float32], *, min_overlap: float, max_shift: float | None
    ) -> tuple[float, float, float]:
        """The shift at which the moving maps agree best with the fixed ones.

        Args:
            maps: (K, H, W) of the moving image, resampled to the fixed image's frame.
            mask: (H, W), 1 where it has pixels.
            min_overlap: share of the fixed image that both must show.
            max_shift: pixels in x and y, or None.

        Returns:
            evidence (correlation times the root of the overlap in pixels; minus infinity if no shift
            is allowed), and dx, dy: the fixed pixel (x, y) is (x + dx, y + dy) in the moving frame.
        """
        spectrum, covered = np.fft.rfft2(maps, s=self._size), np.fft.rfft2(mask, s=self._size)
        overlap = self._correlation(self._mask * covered)
        energy = np.fft.rfft2(np.square(maps).sum(axis=0), s=self._size)
        norms = self._correlation(self._energy * covered) * self._correlation(self._mask * energy)
        agreement = self._correlation((self._maps * spectrum).sum(axis=0))
        dy, dx = (np.fft.fftfreq(side, 1 / side) for side in self._size)
        allowed = overlap > min_overlap * self._area
        if max_shift is not None:
            allowed &= (np.abs(dy) <= max_shift)[:, None] & (np.abs(dx) <= max_shift)
        if not allowed.any():
            return -np.inf, 0.0, 0.0
        evidence = agreement * np.sqrt(np.maximum(overlap, 0) / np.maximum(norms, 1e-3))
        evidence[~allowed] = -np.inf
        y, x = np.unravel_index(int(evidence.argmax()), evidence.shape)
        return float(evidence[y, x]), float(dx[x]), float(dy[y])
