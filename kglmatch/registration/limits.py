"""What a registration may find: the kind of transform, and how far the images may be apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import KGLMatchError
from kglmatch.geometry import transform_points
from kglmatch.options import DEFAULT_KIND, DEFAULT_MAX_ROTATION, DEFAULT_MAX_SCALE, KINDS

SAME_SCALE = 0.06  # of log scale: images whose sizes differ by less have one scale
_SLACK = 1.1  # a limit is not overrun by the noise of a match


@dataclass(frozen=True)
class Limits:
    """What `Matcher.register` may find.

    Attributes:
        kind: "translation", "similarity", "affine", "homography", or "auto": the simplest that no
            other beats clearly on windows held out of the fit.
        max_displacement: pixels; how far the middle of the image may be moved in x and y; None for any.
        max_rotation: degrees, either way.
        max_scale: factor, either way, beyond one of the `nominal_scales`.

    Raises:
        KGLMatchError: a value out of range.
    """

    kind: str = DEFAULT_KIND
    max_displacement: float | None = None
    max_rotation: float = DEFAULT_MAX_ROTATION
    max_scale: float = DEFAULT_MAX_SCALE

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise KGLMatchError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.max_displacement is not None and not 0 <= self.max_displacement < np.inf:
            raise KGLMatchError(f"max_displacement must be 0 pixels or more, got {self.max_displacement}")
        if not 0 <= self.max_rotation <= 180:
            raise KGLMatchError(f"max_rotation must be in [0, 180] degrees, got {self.max_rotation}")
        if not 1 <= self.max_scale <= 4:
            raise KGLMatchError(f"max_scale must be in [1, 4], got {self.max_scale}")


def nominal_scales(vis: NDArray[np.float32], ir: NDArray[np.float32]) -> list[float]:
    """How many ir pixels wide a visible pixel may be, before `Limits.max_scale`.

    Two cameras show either the same field of view, whatever their resolutions, or the same pixels. Sizes
    that differ by no more than the coarse search's step are one case: the same pixels.

    Args:
        vis, ir: (H, W).

    Returns:
        one scale or two, none twice: 1, and the ratio of the image sizes where it differs from 1.
    """
    ratio = float(np.sqrt(ir.size / vis.size))
    return [1.0, ratio] if abs(np.log(ratio)) > SAME_SCALE else [1.0]


def within_limits(
    transform: NDArray[np.float64], vis: NDArray[np.float32], ir: NDArray[np.float32], limits: Limits
) -> bool:
    """Whether a transform keeps the limits, about one of the scales that the images may have.

    Rotation and scale are those at the middle of the visible image.

    Args:
        transform: (3, 3) from visible to ir pixels.
        vis, ir: (H, W).
    """
    centre_vis, centre_ir = ((np.array(image.shape[1::-1]) - 1) / 2 for image in (vis, ir))
    around = centre_vis + np.array([[0, 0], [0.5, 0], [-0.5, 0], [0, 0.5], [0, -0.5]])
    moved = transform_points(transform, around)
    right, down = moved[1] - moved[2], moved[3] - moved[4]
    zoom = max(float(np.sqrt(max(right[0] * down[1] - right[1] * down[0], 0.0))), 1e-6)
    turned = abs(np.rad2deg(np.arctan2(right[1] - down[0], right[0] + down[1])))
    zoomed = min(abs(np.log(zoom / scale)) for scale in nominal_scales(vis, ir))
    if turned > limits.max_rotation * _SLACK + 1 or zoomed > np.log(limits.max_scale) * _SLACK + 0.01:
        return False
    if limits.max_displacement is None:
        return True
    shift = np.abs(moved[0] - centre_ir) / zoom
    return bool((shift <= limits.max_displacement * _SLACK + 1).all())
