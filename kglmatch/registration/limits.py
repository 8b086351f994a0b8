"""What a registration may find: the kind of transform, and how far the images may be apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import KGLMatchError
from kglmatch.options import DEFAULT_KIND, DEFAULT_MAX_ROTATION, DEFAULT_MAX_SCALE, KINDS

SAME_SCALE = 0.06  # of log scale: images whose sizes differ by less have one scale


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
