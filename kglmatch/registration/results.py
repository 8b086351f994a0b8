"""What registration of whole images gives: `Registration`, `RegistrationCheck`, `BandRegistration`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import KGLMatchError
from kglmatch.options import TransformKind
from kglmatch.registration.displacement import DisplacementField, LocalCorrection
from kglmatch.resampling import Displacement, Interpolation, covered_by, warp_image

Verdict = Literal["registered", "doubtful", "failed"]

OURS = "kglmatch"  # the proposer that always takes part


@dataclass(frozen=True, eq=False)
class Registration:
    """The transform from the visible image to the other sensor's, and how reliable it is.

    Attributes:
        verdict: "registered", "doubtful" (look before you use it) or "failed".
        confidence: in [0, 1]; "registered" starts at 0.5. With a model that holds a calibration, the share of
            registrations with such evidence that were within 5 pixels on pairs that test nothing.
        transform: (3, 3) float64 from visible to ir pixels, or None if the verdict is "failed".
        kind: what kind of transform it is, or None.
        keypoints_vis: (K, 2) float32 xy pixels of the visible image where agreement was looked for.
        keypoints_ir: (K, 2) float32 xy pixels where it was found, near the predicted place.
        scores: (K,) float32 in [0, 1], by the metric head on the patches there (0 where no whole
            patch is covered).
        residuals: (K,) float32, pixels of the ir image between found and predicted place.
        inliers: (K,) bool, the places that support the transform.
        support: mean vote of windows for transforms fitted without them, about 0 to 3.
        agreement: mean share of other places that the network finds less alike than the right one;
            0.5 is chance. Limited where the metric head says that few places match at all.
        num_matches: keypoint matches found without a prior that agree with the transform; 0 where structure
            was enough, and none were looked for.
        vis_size, ir_size: (width, height) in pixels.
        proposer: what proposed the transform: "kglmatch", or one of `Matcher.register`'s proposers by its
            name; "given" for `Matcher.verify`.
        errors: one line for each proposer that raised, or returned neither matches nor a transform.
        correction: of `Matcher.register(..., local=True)`: the displacement that the transform leaves over,
            and whether the images support it; None where it was not asked for. Where it is applied, the
            places above are its windows, and the predicted places are those of transform and field together.
    """

    verdict: Verdict
    confidence: float
    transform: NDArray[np.float64] | None
    kind: TransformKind | None
    keypoints_vis: NDArray[np.float32]
    keypoints_ir: NDArray[np.float32]
    scores: NDArray[np.float32]
    residuals: NDArray[np.float32]
    inliers: NDArray[np.bool_]
    support: float
    agreement: float
    num_matches: int
    vis_size: tuple[int, int]
    ir_size: tuple[int, int]
    proposer: str = OURS
    errors: tuple[str, ...] = ()
    correction: LocalCorrection | None = None

    @property
    def local(self) -> DisplacementField | None:
        """The displacement u of the visible pixels: x is at transform(x + u(x)); None for none."""
        field = None if self.correction is None else self.correction.field
        # A field has the same effect at any resolution.
        return field if field is None or field.size == self.vis_size else field.resized(self.vis_size)

    @property
    def displacement(self) -> Displacement | None:
        """`local` for `kglmatch.resampling.warp_image`."""
        return None if self.local is None else self.local.on_grid

    @property
    def median_residual(self) -> float:
        """Median residual of the inliers in pixels; NaN without any."""
        return float(np.median(self.residuals[self.inliers])) if self.inliers.any() else float("nan")

    def warp(
        self, image: NDArray[Any], *, nodata: float = 0, interpolation: Interpolation | None = None
    ) -> NDArray[Any]:
        """Warps an image of the other sensor onto the visible one, by transform and field in one step.

        Args:
            image: (H, W) or (H, W, C) in the other sensor's frame, with any number of channels; bool,
                integers or floats up to 64 bits. The type is kept, and no value is rounded on the way; NaN
                spreads as far as the interpolation reaches (see `kglmatch.resampling.warp_image`).
            nodata: value of pixels that it does not cover; one that the type holds.
            interpolation: "cubic", "linear" or "nearest"; None takes "nearest" for bool and "cubic"
                otherwise. Give "nearest" for labels, whose numbers must not mix.

        Returns:
            the image in the visible frame, (height, width) of `vis_size`.

        Raises:
            ImageError: an array that is no image.
            KGLMatchError: the registration failed, the image is of another size, another interpolation, or
                a nodata that the type cannot hold.
        """
        if self.transform is None:
            raise KGLMatchError("the registration failed: there is no transform to warp by")
        if (image.shape[1], image.shape[0]) != self.ir_size:
            raise KGLMatchError(
                f"the image is {image.shape[1]} x {image.shape[0]}, the registered one was "
                f"{self.ir_size[0]} x {self.ir_size[1]}"
            )
        return warp_image(
            image,
            self.transform,
            self.vis_size,
            nodata=nodata,
            interpolation=interpolation,
            displacement=self.displacement,
        )

    def covered(self, valid: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
        """(height, width) of the visible image: which of its pixels the other image covers.

        Args:
            valid: (H, W), the pixels of the other image that count; None for all.
        """
        if self.transform is None:
            return np.zeros(self.vis_size[::-1], bool)
        if valid is None:
            valid = np.ones(self.ir_size[::-1], bool)
        return covered_by(self.transform, self.vis_size, valid, displacement=self.displacement)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, without the single places; NaN becomes None."""
        residual = self.median_residual
        return {
            "verdict": self.verdict,
            "confidence": round(self.confidence, 4),
            "kind": self.kind,
            "transform": None if self.transform is None else self.transform.tolist(),
            "places": len(self.keypoints_vis),
            "inliers": int(self.inliers.sum()),
            "median_residual": None if np.isnan(residual) else round(residual, 3),
            "support": round(self.support, 4),
            "agreement": round(self.agreement, 4),
            "num_matches": self.num_matches,
            "vis_size": list(self.vis_size),
            "ir_size": list(self.ir_size),
            "proposer": self.proposer,
            "errors": list(self.errors),
            "local": None if self.correction is None else self.correction.to_dict(),
        }


@dataclass(frozen=True, eq=False)
class RegistrationCheck:
    """How well two images that should be aligned are, and where not.

    Attributes:
        verdict: "registered" if the content agrees at all (with whatever displacement), else
            "doubtful" or "failed": then the numbers below say nothing.
        points: (G, 2) float32 xy pixels of a grid over the visible image.
        displacement: (G, 2) float32 visible pixels, where the ir content is found minus where it
            should be, robustly smoothed over the neighbours.
        certainty: (G,) float32 in [0, 1].
        judged: (G,) bool, the points whose displacement is certain enough to count.
        shift: (2,) float32 pixels, the median displacement.
        median_error, p95_error: pixels, of the displacement's length over the judged points.
        judged_share: share of the grid that could be judged.
        image_size: (width, height) pixels.
    """

    verdict: Verdict
    points: NDArray[np.float32]
    displacement: NDArray[np.float32]
    certainty: NDArray[np.float32]
    judged: NDArray[np.bool_]
    shift: NDArray[np.float32]
    median_error: float
    p95_error: float
    judged_share: float
    image_size: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers; NaN becomes None."""

        def number(value: float) -> float | None:
            return None if np.isnan(value) else round(float(value), 3)

        return {
            "verdict": self.verdict,
            "shift": [number(float(x)) for x in self.shift],
            "median_error": number(self.median_error),
            "p95_error": number(self.p95_error),
            "judged_share": round(self.judged_share, 3),
            "image_size": list(self.image_size),
            "points": self.points.tolist(),
            "displacement": [[number(x), number(y)] for x, y in self.displacement.astype(float)],
            "certainty": np.round(self.certainty.astype(float), 3).tolist(),
            "judged": self.judged.tolist(),
        }


@dataclass(frozen=True, eq=False)
class BandRegistration:
    """One band of a rig, registered to the reference.

    Attributes:
        name: of the band.
        registration: from the reference to the band. Composed where it went through another band: then
            its confidence is the product of both, unless the two images themselves speak for more.
        via: name of that band, or None for a direct registration.
    """

    name: str
    registration: Registration
    via: str | None = None
