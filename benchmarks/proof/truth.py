"""Where a pair of a set really is: its own offset, by methods that are no contender's search.

The pairs of public sets are off by some pixels before anybody warps them. Three methods look for the offset
of each pair from its published place; all are local, and none knows of the others:

- mutual information of the grey values (elastix, Mattes, a similarity);
- mutual information of gradient magnitudes (elastix, Mattes, affine);
- the correlation coefficient of gradient magnitudes (OpenCV's ECC, affine).

Of the two that agree best, to `AGREEMENT` pixels or better (mean over the corners), the truth is the mean.
Where no two agree, but one agrees with the published place, that is the truth. Otherwise the pair is
"unconfirmed", and is not measured.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import cv2
import numpy as np

from kglmatch.geometry import corner_error

AGREEMENT = 3.0  # pixels
_FINE = 1.5  # pixels of blur
LARGEST = 40.0  # pixels: more is no offset of a registered pair but a failure of the method


@dataclass(frozen=True)
class Truth:
    """Attributes:
    transform: (3, 3) from visible to ir pixels.
    confirmed: by a second opinion.
    by: what it is: "two methods", "published" or "unconfirmed".
    """

    transform: np.ndarray
    confirmed: bool
    by: str


def own_offset(vis: np.ndarray, ir: np.ndarray, published: np.ndarray) -> Truth:
    """The true transform of a pair that is nearly registered by its published one."""
    size = vis.shape[1], vis.shape[0]
    moved = cv2.warpPerspective(
        ir, published, size, flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    )
    found = [estimate(vis, np.clip(moved, 0, 1)) for estimate in METHODS]
    offsets = [
        offset for offset in found if offset is not None and corner_error(offset, np.eye(3), size) < LARGEST
    ]
    pairs = [(corner_error(a, b, size), (a + b) / 2) for a, b in itertools.combinations(offsets, 2)]
    apart, middle = min(pairs, key=lambda pair: pair[0], default=(np.inf, np.eye(3)))
    if apart <= AGREEMENT:
        return Truth(published @ middle, True, "two methods")
    near = any(corner_error(offset, np.eye(3), size) <= AGREEMENT for offset in offsets)
    return Truth(published, near, "published" if near else "unconfirmed")


def mutual_information(vis: np.ndarray, ir: np.ndarray, kind: str = "affine") -> np.ndarray | None:
    """From visible to ir pixels by elastix, from no displacement; None where it gives up.

    Args:
        kind: "affine" or "similarity".
    """
    import itk

    parameters = itk.ParameterObject.New()
    how = parameters.GetDefaultParameterMap("affine" if kind == "affine" else "rigid", 4)
    if kind == "similarity":
        how["Transform"] = ["SimilarityTransform"]
    how["AutomaticTransformInitialization"] = ["false"]
    how["RandomSeed"] = ["1"]
    how["WriteResultImage"] = ["false"]
    parameters.AddParameterMap(how)
    fixed, moving = (
        itk.image_from_array(np.ascontiguousarray(image * 255, np.float32)) for image in (vis, ir)
    )
    try:
        _, result = itk.elastix_registration_method(
            fixed, moving, parameter_object=parameters, log_to_console=False, number_of_threads=1
        )
    except RuntimeError:
        return None  # too few samples overlap
    found = result.GetParameterMap(0)
    values = [float(value) for value in found["TransformParameters"]]
    centre = np.array([float(value) for value in found["CenterOfRotationPoint"]])
    if kind == "affine":
        matrix, shift = np.reshape(values[:4], (2, 2)), np.array(values[4:])
    else:
        (scale, angle), shift = values[:2], np.array(values[2:])
        matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    transform = np.eye(3)
    transform[:2, :2], transform[:2, 2] = matrix, centre + shift - matrix @ centre
    return transform if np.isfinite(transform).all() else None


def similarity_by_grey(vis: np.ndarray, ir: np.ndarray) -> np.ndarray | None:
    """A similarity by the mutual information of grey values."""
    return mutual_information(vis, ir, "similarity")


def affine_by_gradients(vis: np.ndarray, ir: np.ndarray) -> np.ndarray | None:
    """An affine by the mutual information of gradient magnitudes."""
    return mutual_information(_edges(vis, _FINE), _edges(ir, _FINE))


def gradient_correlation(vis: np.ndarray, ir: np.ndarray) -> np.ndarray | None:
    """Affine from visible to ir pixels by ECC on gradient magnitudes, from none; None if it diverges."""
    warp = np.eye(2, 3, dtype=np.float32)
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 50, 1e-4)
    for sigma in (6.0, 3.0, _FINE):
        edges = [_edges(image, sigma) for image in (vis, ir)]
        try:
            _, warp = cv2.findTransformECC(*edges, warp, cv2.MOTION_AFFINE, criteria, None, 1)
        except cv2.error:
            return None
    return np.vstack([warp, [0, 0, 1]]).astype(np.float64)


def _edges(image: np.ndarray, sigma: float) -> np.ndarray:
    smooth = cv2.GaussianBlur(image, (0, 0), sigma)
    magnitude = cv2.magnitude(cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1))
    # Strong edges of one sensor may be weak ones of the other.
    edges: np.ndarray = np.sqrt(magnitude / (magnitude.max() + 1e-9))
    return edges


METHODS = (similarity_by_grey, affine_by_gradients, gradient_correlation)
