"""Other matchers as proposers of `Matcher.register`: OpenCV, kornia, vismatch, Hugging Face transformers.

Each adapter is a callable that takes the two grey images (H, W), float32 in [0, 1], and returns matches as
two arrays (N, 2) of xy pixels. It keeps the model that it is given, on the device where that is; the
libraries other than OpenCV are not imported here.

    >>> matcher.register("vis.png", "ir.png", proposers=[OpenCVProposer("sift"),
    KorniaProposer(LoFTR("outdoor"))])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import KGLMatchError
from kglmatch.features import to_numpy
from kglmatch.options import PROPOSERS

Image = NDArray[np.float32]
Points = NDArray[np.float64]
MatchedPoints = tuple[Points, Points]

DEFAULT_FEATURES = 4000
DEFAULT_RATIO = 0.85
DEFAULT_THRESHOLD = 0.2  # of a match's score, by Hugging Face's models

# Name -> OpenCV's class, and what it calls the number of features.
_DETECTORS = {"sift": ("SIFT", "nfeatures"), "akaze": ("AKAZE", "max_points"), "orb": ("ORB", "nfeatures")}


class OpenCVProposer:
    """Keypoints and descriptors of OpenCV, matched by the ratio test.

    Args:
        detector: "sift", "akaze", "orb", or any `cv2.Feature2D` that detects and describes.
        max_features: of each image, the strongest; for the named ones.
        ratio: a match is kept if it is nearer than this times the second nearest.
        name: what `Registration.proposer` calls it; by default the detector's name.

    Raises:
        KGLMatchError: an unknown name, or a detector that this OpenCV lacks: AKAZE is in
            opencv-contrib-python since OpenCV 5.
    """

    def __init__(
        self,
        detector: Any,
        *,
        max_features: int = DEFAULT_FEATURES,
        ratio: float = DEFAULT_RATIO,
        name: str | None = None,
    ) -> None:
        if isinstance(detector, str):
            name = detector if name is None else name
            detector = _create(detector, max_features)
        self.name = type(detector).__name__ if name is None else name
        self.ratio = ratio
        self._detector = detector

    def __call__(self, vis: Image, ir: Image) -> MatchedPoints:
        """Matches two images: (N, 2) and (N, 2) xy pixels."""
        (points_vis, found_vis), (points_ir, found_ir) = (
            self._detector.detectAndCompute(_eight_bit(image), None) for image in (vis, ir)
        )
        if found_vis is None or found_ir is None or len(found_ir) < 2:
            return _none()
        norm = self._detector.defaultNorm()
        nearest = cv2.BFMatcher(norm).knnMatch(found_vis, found_ir, k=2)
        kept = [first for first, second in nearest if first.distance < self.ratio * second.distance]
        return (
            np.array([points_vis[match.queryIdx].pt for match in kept], np.float64).reshape(-1, 2),
            np.array([points_ir[match.trainIdx].pt for match in kept], np.float64).reshape(-1, 2),
        )


class KorniaProposer:
    """A matcher of kornia, or another with its convention.

    It is called with ``{"image0": (1, 1, H, W), "image1": ...}`` and returns a dict with ``keypoints0`` and
    ``keypoints1`` (N, 2): `kornia.feature.LoFTR`, `kornia.feature.LocalFeatureMatcher`.

    Args:
        model: the torch module, ready to use.
        min_confidence: drops matches whose ``confidence``, if it returns that, is lower.
        multiple: images are padded at the right and bottom to a multiple of this number of pixels, for
            networks that need it: 8 for LoFTR.
        name: what `Registration.proposer` calls it; by default that of the model's class.
    """

    def __init__(
        self, model: Any, *, min_confidence: float = 0.0, multiple: int = 8, name: str | None = None
    ) -> None:
        self.model = model
        self.min_confidence = min_confidence
        self.multiple = multiple
        self.name = type(model).__name__ if name is None else name

    def __call__(self, vis: Image, ir: Image) -> MatchedPoints:
        """Matches two images: (N, 2) and (N, 2) xy pixels."""
        import torch

        device = _device(self.model)
        tensors = [
            torch.from_numpy(_padded(image, self.multiple))[None, None].to(device) for image in (vis, ir)
        ]
        with torch.inference_mode():
            found = self.model({"image0": tensors[0], "image1": tensors[1]})
        vis_points, ir_points = _points(found, ("keypoints0", "keypoints1"), self.name)
        kept = _inside(vis_points, vis) & _inside(ir_points, ir)  # not in the padding
        confidence = found.get("confidence")
        if confidence is not None:
            kept &= to_numpy(confidence) >= self.min_confidence
        return vis_points[kept], ir_points[kept]


class VismatchProposer:
    """A matcher of vismatch, formerly image-matching-models, or another with its convention.

    It is called as ``model(img0, img1)`` with tensors (3, H, W) in [0, 1] and returns a dict with
    ``matched_kpts0`` and ``matched_kpts1`` (N, 2).

    Args:
        model: what ``vismatch.get_matcher(name, device=...)`` returns.
        name: what `Registration.proposer` calls it; by default the model's own name, or that of its class.
    """

    def __init__(self, model: Any, *, name: str | None = None) -> None:
        own = getattr(model, "name", None)
        self.model = model
        self.name = name or (own if isinstance(own, str) else type(model).__name__)

    def __call__(self, vis: Image, ir: Image) -> MatchedPoints:
        """Matches two images: (N, 2) and (N, 2) xy pixels."""
        import torch

        tensors = [torch.from_numpy(image).expand(3, -1, -1).contiguous() for image in (vis, ir)]
        found = self.model(*tensors)
        return _points(found, ("matched_kpts0", "matched_kpts1"), self.name)


class HuggingFaceProposer:
    """A keypoint matcher of Hugging Face transformers: SuperGlue, LightGlue, EfficientLoFTR, MatchAnything.

    Args:
        model: what ``AutoModelForKeypointMatching.from_pretrained(name)`` returns.
        processor: what ``AutoImageProcessor.from_pretrained(name)`` returns.
        threshold: score that a match must reach.
        name: what `Registration.proposer` calls it; by default that of the model's class.
    """

    def __init__(
        self, model: Any, processor: Any, *, threshold: float = DEFAULT_THRESHOLD, name: str | None = None
    ) -> None:
        self.model = model
        self.processor = processor
        self.threshold = threshold
        self.name = type(model).__name__ if name is None else name

    def __call__(self, vis: Image, ir: Image) -> MatchedPoints:
        """Matches two images: (N, 2) and (N, 2) xy pixels."""
        import torch
        from PIL import Image as PillowImage

        pictures = [PillowImage.fromarray(_eight_bit(image)).convert("RGB") for image in (vis, ir)]
        inputs = self.processor(pictures, return_tensors="pt").to(_device(self.model))
        with torch.inference_mode():
            outputs = self.model(**inputs)
        found = self.processor.post_process_keypoint_matching(
            outputs, [[vis.shape, ir.shape]], threshold=self.threshold
        )[0]
        return _points(found, ("keypoints0", "keypoints1"), self.name)


def named_proposer(name: str) -> OpenCVProposer:
    """A proposer that needs nothing but OpenCV, one of `kglmatch.options.PROPOSERS`.

    Raises:
        KGLMatchError: an unknown name, or a detector that this OpenCV lacks.
    """
    if name not in PROPOSERS:
        raise KGLMatchError(f"proposer must be one of {', '.join(PROPOSERS)}, got {name!r}")
    return OpenCVProposer(name)


def _create(name: str, count: int) -> Any:
    if name not in _DETECTORS:
        raise KGLMatchError(f"detector must be one of {', '.join(_DETECTORS)}, got {name!r}")
    kind, parameter = _DETECTORS[name]
    for module in (cv2, getattr(cv2, "xfeatures2d", None)):
        create = getattr(module, f"{kind}_create", None)
        if create is not None:
            return create(**{parameter: count})
    raise KGLMatchError(
        f"OpenCV {cv2.__version__} has no {kind} here: take opencv-contrib-python in place of opencv-python"
    )


def _points(found: Any, keys: tuple[str, str], name: str) -> MatchedPoints:
    if not isinstance(found, Mapping) or not all(key in found for key in keys):
        got = sorted(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
        raise KGLMatchError(f"{name}: expected a dict with {' and '.join(keys)}, got {got}")
    vis, ir = (
        np.empty((0, 2))
        if found[key] is None
        else np.asarray(to_numpy(found[key]), np.float64).reshape(-1, 2)
        for key in keys
    )
    return vis, ir


def _device(model: Any) -> Any:
    """Where a torch module is: that of its first parameter, or of its attribute; the CPU if it has none."""
    parameters = model.parameters() if hasattr(model, "parameters") else iter(())
    first = next(iter(parameters), None)
    return getattr(model, "device", "cpu") if first is None else first.device


def _padded(image: Image, multiple: int) -> Image:
    below, right = (-side % multiple for side in image.shape)
    return np.pad(image, ((0, below), (0, right)), mode="edge")


def _inside(points: Points, image: Image) -> NDArray[np.bool_]:
    height, width = image.shape
    return np.all((points >= 0) & (points <= [width - 1, height - 1]), axis=1)


def _eight_bit(image: Image) -> NDArray[np.uint8]:
    return np.rint(image * 255).astype(np.uint8)


def _none() -> MatchedPoints:
    return np.empty((0, 2)), np.empty((0, 2))
