"""`PatchMatcher`: describe patches once, then score and match them as often as needed."""

from __future__ import annotations

import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kglmatch.backends.base import Backend
from kglmatch.dense import check_dense, find_places
from kglmatch.errors import ConfigError, ImageError, KGLMatchError, PatchError
from kglmatch.features import (
    Array,
    Features,
    Matches,
    Modality,
    check_keypoints,
    check_modality,
    check_size,
    is_number,
    is_whole,
    to_numpy,
)
from kglmatch.fusion import fuse
from kglmatch.geometry import estimate_homography
from kglmatch.images import load_masked
from kglmatch.keypoints import detect_keypoints, gradient_directions
from kglmatch.matching import (
    CHUNK,
    distance_from_cosine,
    keep_top_k,
    neighbours_within,
    paired_cosine,
    select_matches,
    union_of_shortlists,
)
from kglmatch.models.config import KGLNetConfig
from kglmatch.options import (
    DECISIONS,
    DEFAULT_DETECTOR,
    DEFAULT_MAX_KEYPOINTS,
    DEFAULT_MIN_SCORE,
    DEFAULT_THRESHOLD,
    DEFAULT_TOP_K,
)
from kglmatch.patches import check_patches, extract_patches

Candidates = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]


class _Cut(NamedTuple):
    """Patches of an image, not described yet."""

    modality: Modality
    keypoints: NDArray[np.float32]  # (N, 2)
    patches: NDArray[np.float32]  # (N, P, P)
    image_size: tuple[int, int]


class PatchMatcher:
    """Matches patches, and the keypoints of images; `kglmatch.Matcher` adds files and registration.

    The costly part, `describe` (or `extract` for an image), is done once a patch set; `score` and
    `match` then work on `Features`.

    Args:
        backend: runs the network.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @property
    def config(self) -> KGLNetConfig:
        """The architecture, and the defaults that were measured for these weights."""
        return self.backend.config

    @property
    def device(self) -> str:
        """Where the network runs: "cpu" or "cuda:N"."""
        return self.backend.device

    def __repr__(self) -> str:
        backend = self.backend
        return f"{type(self).__name__}({backend.name}, device={backend.device!r}, dtype={backend.dtype!r})"

    # --- patches ------------------------------------------------------------------------------

    def describe(
        self,
        patches: Array,
        modality: Modality,
        *,
        maps: bool = True,
        keypoints: NDArray[np.floating] | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> Features:
        """Runs the network over patches of one modality.

        Args:
            patches: (N, 64, 64) or (N, 1, 64, 64), uint8 or floats in [0, 1], numpy or torch.
            modality: "vis" or "ir"; each has its own weights.
            maps: also make the metric maps (64 KiB a patch) that `score` and `match` need.
            keypoints: (N, 2) xy pixels where the patches come from, kept for the matches.
            image_size: (width, height) of that image in pixels.

        Returns:
            `Features` with (N, 128) descriptors, numpy for numpy and torch for torch.

        Raises:
            PatchError: wrong shape, type or values, or another number of keypoints.
            KeypointError: keypoints of another shape or type, or not finite.
            KGLMatchError: an image size that is not two whole numbers.
        """
        check_modality(modality)
        patches = check_patches(patches, patch_size=self.config.patch_size)
        if keypoints is not None:
            keypoints = check_keypoints(keypoints)
            if len(keypoints) != len(patches):
                raise PatchError(f"keypoints must be ({len(patches)}, 2), got {keypoints.shape}")
        if image_size is not None:
            image_size = check_size(image_size)
        descriptors, metric_maps = self.backend.encode(patches, modality, maps=maps)
        return Features(descriptors, modality, metric_maps, keypoints, image_size)

    def score(self, vis: Features | Array, ir: Features | Array) -> Array:
        """Probability that each pair matches, row by row, by the metric head.

        Args:
            vis, ir: `Features` with maps, or patches as for `describe`; N rows each.

        Returns:
            (N,) float32 in [0, 1]; torch on the matcher's device if both came as torch, else numpy.

        Raises:
            KGLMatchError: different lengths, swapped modalities, features without maps or of another model.
            PatchError: patches of the wrong shape, type or values.
        """
        self._check_sides(vis, ir, maps=True)
        if len(vis) != len(ir):
            raise KGLMatchError(
                f"score compares row by row: got {len(vis)} visible and {len(ir)} ir patches; use match() "
                "for sets of different size"
            )
        features_vis, features_ir = self._features(vis, "vis"), self._features(ir, "ir")
        scores = self.backend.score(_maps(features_vis), _maps(features_ir))
        if _is_torch(features_vis.descriptors) and _is_torch(features_ir.descriptors):
            return sys.modules["torch"].from_numpy(scores).to(self.device)
        return scores

    def match(
        self,
        vis: Features | Array,
        ir: Features | Array,
        *,
        top_k: int | None = DEFAULT_TOP_K,
        mutual: bool = True,
        one_to_one: bool = True,
        min_score: float = DEFAULT_MIN_SCORE,
        max_displacement: float | None = None,
        decide: str | None = None,
    ) -> Matches:
        """Matches two patch sets: a shortlist by descriptor, the decision by the metric head.

        Args:
            vis, ir: `Features`, or patches as for `describe`.
            top_k: candidates that each patch proposes by descriptor distance; None lets the metric
                head score every pair (slow, in bounded memory).
            mutual: keep a pair only if each is the other's best; else each visible patch gets its best.
            one_to_one: an ir patch serves one visible patch at most (implied by `mutual`).
            min_score: matches below are dropped, in [0, 1].
            max_displacement: pixels; for registered or nearly registered images, only pairs whose
                keypoints are at most this far apart are candidates. Needs keypoints.
            decide: "fused", by both answers together (`kglmatch.fusion`, at no extra cost); "metric",
                by the metric head; or "descriptor", by the descriptors alone (no maps needed; the
                score is then ``1 - distance / 2``). None takes the model's default, see `decision`.

        Returns:
            `Matches`, best first; empty if nothing matches.

        Raises:
            KGLMatchError: a parameter out of range, or features that lack what it needs or come from
                another model.
            PatchError: patches of the wrong shape, type or values.
        """
        decide = self.decision(decide)
        check_match_parameters(top_k, min_score, max_displacement)
        maps = decide != "descriptor"
        self._check_sides(vis, ir, maps=maps, keypoints=max_displacement is not None)
        features_vis, features_ir = self._features(vis, "vis", maps), self._features(ir, "ir", maps)
        if top_k is None and max_displacement is None:
            candidates = self._every_pair(features_vis, features_ir, decide)
        else:
            rows_vis, rows_ir, cosine = self._candidates(features_vis, features_ir, top_k, max_displacement)
            distances = distance_from_cosine(cosine)
            scores = self._decide(features_vis, features_ir, rows_vis, rows_ir, distances, decide)
            candidates = rows_vis, rows_ir, scores, distances
        rows_vis, rows_ir, scores, distances = candidates
        chosen = select_matches(rows_vis, rows_ir, scores, distances, mutual=mutual, one_to_one=one_to_one)
        chosen = chosen[scores[chosen] >= min_score]
        indices = np.stack([rows_vis[chosen], rows_ir[chosen]], axis=1)
        return Matches(
            indices,
            scores[chosen],
            distances[chosen],
            None if features_vis.keypoints is None else features_vis.keypoints[indices[:, 0]],
            None if features_ir.keypoints is None else features_ir.keypoints[indices[:, 1]],
        )

    # --- images -------------------------------------------------------------------------------

    def extract(
        self,
        image: Any,
        modality: Modality,
        *,
        keypoints: NDArray[np.floating] | None = None,
        detector: str | None = None,
        max_keypoints: int = DEFAULT_MAX_KEYPOINTS,
        maps: bool = True,
        upright: bool = True,
    ) -> Features:
        """Finds keypoints in an image and describes the patches around them.

        Args:
            image: anything that `kglmatch.images.load_image` reads: a path, PIL image, numpy or
                torch array of 8 or 16 bits or floats.
            modality: "vis" or "ir".
            keypoints: (N, 2) xy pixels to use instead of detecting some; an empty list for none.
            detector: one of `kglmatch.keypoints.DETECTORS`; None takes the model's default, "structure"
                for the bundled ones.
            max_keypoints: how many to keep, the strongest.
            maps: as for `describe`.
            upright: False turns each patch to the main direction of the gradients around its keypoint.
                That is known up to half a turn, so ir keypoints come twice: all of them, then all of
                them turned by half a turn. For images rotated against each other by 15 degrees or more;
                costs correct matches where they are not (`benchmarks/patch_geometry.py`).

        Returns:
            `Features` with keypoints in pixels of the original image; empty if it has none.

        Raises:
            ImageError: unreadable, or smaller than a patch.
            KeypointError: keypoints of another shape or type or not finite, an unknown detector, or
                `max_keypoints` below 1.
        """
        check_modality(modality)
        if keypoints is not None:
            keypoints = check_keypoints(keypoints)
        read = self.load_masked(image, f"the {modality} image")
        return self._describe_cut(
            self._cut(read, modality, keypoints, detector, max_keypoints, upright), maps
        )

    def _cut(
        self,
        read: tuple[NDArray[np.float32], NDArray[np.bool_] | None],
        modality: Modality,
        keypoints: NDArray[np.floating] | None,
        detector: str | None,
        max_keypoints: int,
        upright: bool,
    ) -> _Cut:
        """Keypoints of an image, as `load_masked` read it, and the patches around them."""
        grey, valid = read
        height, width = grey.shape
        detected = keypoints is None
        keypoints, patches = cut_patches(
            grey,
            modality,
            patch_size=self.config.patch_size,
            keypoints=keypoints,
            detector=self.detector(detector),
            max_keypoints=max_keypoints,
            upright=upright,
        )
        if detected and valid is not None:
            x, y = np.rint(keypoints).astype(np.int64).T
            kept = valid[y.clip(0, height - 1), x.clip(0, width - 1)]
            keypoints, patches = keypoints[kept], patches[kept]
        return _Cut(modality, keypoints, patches, (width, height))

    def _describe_cut(self, cut: _Cut, maps: bool) -> Features:
        return self.describe(
            cut.patches, cut.modality, maps=maps, keypoints=cut.keypoints, image_size=cut.image_size
        )

    def extract_pair(
        self,
        vis: Any,
        ir: Any,
        *,
        detector: str | None = None,
        max_keypoints: int = DEFAULT_MAX_KEYPOINTS,
        maps: bool = True,
        upright: bool = True,
        dense: bool = False,
        max_displacement: float | None = None,
    ) -> tuple[Features, Features]:
        """The features of two images, as `match_images` makes them.

        Args:
            vis, ir: images, as for `extract`, or features, which are returned as they are.
            detector, max_keypoints, maps, upright: as for `extract`.
            dense: see `match_images`; needs `max_displacement`.
            max_displacement: pixels that dense search looks around each visible keypoint.

        Raises:
            ImageError, KGLMatchError: as for `extract`, or dense search of what cannot be searched.
        """

        radius = check_dense(max_displacement, upright) if dense else 0.0
        if dense and isinstance(ir, Features):
            raise KGLMatchError("dense search needs the ir image, not features of it")
        # Both are read before the network runs on one.
        read = [
            None if isinstance(image, Features) else self.load_masked(image, f"the {modality} image")
            for image, modality in ((vis, "vis"), (ir, "ir"))
        ]
        how = None, detector, max_keypoints, upright
        with ThreadPoolExecutor(1) as thread:
            # The ir image's patches are cut while the network describes the visible one's.
            cut_ir = None if dense or read[1] is None else thread.submit(self._cut, read[1], "ir", *how)
            if read[0] is not None:
                vis = self._describe_cut(self._cut(read[0], "vis", *how), maps)
            if dense:
                assert read[1] is not None
                return vis, self._extract_dense(vis, read[1][0], radius, maps)
            return vis, ir if cut_ir is None else self._describe_cut(cut_ir.result(), maps)

    def match_images(
        self,
        vis: Any,
        ir: Any,
        *,
        detector: str | None = None,
        max_keypoints: int = DEFAULT_MAX_KEYPOINTS,
        top_k: int | None = DEFAULT_TOP_K,
        mutual: bool = True,
        one_to_one: bool = True,
        min_score: float = DEFAULT_MIN_SCORE,
        max_displacement: float | None = None,
        decide: str | None = None,
        threshold: float = DEFAULT_THRESHOLD,
        dense: bool = False,
        upright: bool = True,
    ) -> Matches:
        """Matches two images and estimates the homography between them.

        Args:
            vis, ir: images, as for `extract`, or the features that `extract` made of them.
            detector, max_keypoints, upright: as for `extract`.
            top_k, mutual, one_to_one, min_score, max_displacement, decide: as for `match`.
            threshold: pixels; matches farther from the homography are outliers.
            dense: detect keypoints in the visible image alone, and search for each within
                `max_displacement` in the ir image (see `kglmatch.dense`): where detectors do not find
                the same places in both. `ir` must be an image then, and patches upright. Costs about
                0.2 R^2 patches a keypoint for R pixels, less where keypoints are dense.

        Returns:
            `Matches` with keypoints in pixels of the two original images, `homography` (None if fewer
            than 4 matches agree on one) and `inliers`.

        Raises:
            ImageError, KGLMatchError: as for `extract` and `match`, before the network runs.
        """
        decide = self.decision(decide)
        check_match_parameters(top_k, min_score, max_displacement, threshold)
        maps = decide != "descriptor"
        for source, modality in ((vis, "vis"), (ir, "ir")):
            if isinstance(source, Features) and not (dense and source is ir):  # dense takes no features there
                self._check_features(source, modality, maps=maps, keypoints=True)
        features_vis, features_ir = self.extract_pair(
            vis,
            ir,
            detector=detector,
            max_keypoints=max_keypoints,
            maps=maps,
            upright=upright,
            dense=dense,
            max_displacement=max_displacement,
        )
        matches = self.match(
            features_vis,
            features_ir,
            top_k=top_k,
            mutual=mutual,
            one_to_one=one_to_one,
            min_score=min_score,
            max_displacement=max_displacement,
            decide=decide,
        )
        homography, inliers = estimate_homography(
            _keypoints(features_vis)[matches.indices[:, 0]],
            _keypoints(features_ir)[matches.indices[:, 1]],
            threshold=threshold,
        )
        return dataclasses.replace(matches, homography=homography, inliers=inliers)

    # --- how ----------------------------------------------------------------------------------

    def decision(self, decide: str | None = None) -> str:
        """What decides: `decide` itself if it is given, else what the model's configuration names.

        Args:
            decide: one of `kglmatch.options.DECISIONS`, or None for the model's default:
                ``config.inference["decide"]``, which was chosen on validation data; without it "fused"
                where the model carries a fusion, else "metric".

        Raises:
            KGLMatchError: an unknown decision, or "fused" for a model without a fusion.
            ConfigError: the configuration names a decision that is not known or not possible.
        """
        inference = self.config.inference
        carries_fusion = inference.get("fusion") is not None
        if decide is None:
            decide = inference.get("decide", "fused" if carries_fusion else "metric")
            if decide not in DECISIONS or (decide == "fused" and not carries_fusion):
                possible = [name for name in DECISIONS if name != "fused" or carries_fusion]
                raise ConfigError(
                    f"the model's inference.decide must be one of {', '.join(possible)}, got {decide!r}"
                )
            return decide
        if decide not in DECISIONS:
            raise KGLMatchError(f"decide must be one of {DECISIONS}, got {decide!r}")
        if decide == "fused" and not carries_fusion:
            raise KGLMatchError('this model carries no fusion: decide by "metric" or "descriptor"')
        return decide

    def load(self, image: Any, name: str = "the image") -> NDArray[np.float32]:
        """An image as for `extract`, (H, W) float32 grey in [0, 1].

        Args:
            image: as for `extract`.
            name: what an error calls an image that is no file.

        Raises:
            ImageError: unreadable, or smaller than a patch.
        """
        return self.load_masked(image, name)[0]

    def load_masked(
        self, image: Any, name: str = "the image"
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """`load`, and which pixels hold data: (H, W) bool, or None where all do."""
        grey, valid = load_masked(image)
        check_image_size(grey, self.config.patch_size, str(image) if isinstance(image, str | Path) else name)
        return grey, valid

    def detector(self, name: str | None) -> str:
        """The detector of that name, or the model's own for None."""
        return name or self.config.inference.get("detector", DEFAULT_DETECTOR)

    def _extract_dense(self, vis: Features, ir: Any, radius: float, maps: bool) -> Features:
        """Features of an ir image at the places that are most like the visible keypoints, in their order.

        A keypoint has none where there is no whole patch within `radius` pixels.
        """
        image, size, keypoints = self.load(ir, "the ir image"), self.config.patch_size, _keypoints(vis)

        def describe(places: NDArray[np.int64]) -> NDArray[np.float32]:
            patches = extract_patches(image, places, patch_size=size)
            return to_numpy(self.describe(patches, "ir", maps=False).descriptors)

        places = np.empty((0, 2), np.float32)
        if len(vis):
            descriptors = to_numpy(vis.descriptors)
            places = find_places(describe, size, keypoints, descriptors, image.shape, radius)
        return self.extract(image, "ir", keypoints=places, maps=maps)

    def _features(self, source: Features | Array, modality: Modality, maps: bool = True) -> Features:
        return source if isinstance(source, Features) else self.describe(source, modality, maps=maps)

    def _check_sides(self, vis: Any, ir: Any, *, maps: bool, keypoints: bool = False) -> None:
        """Raises for features or patches that cannot be used, before the network runs on any.

        Args:
            vis, ir: features or patches.
            maps, keypoints: whether they must have them.
        """
        for source, modality in ((vis, "vis"), (ir, "ir")):
            if isinstance(source, Features):
                self._check_features(source, modality, maps=maps)
            else:
                check_patches(source, patch_size=self.config.patch_size, name=f"{modality} patches")
            if keypoints and getattr(source, "keypoints", None) is None:
                raise KGLMatchError(
                    "max_displacement needs features with keypoints on both sides: make them with extract, "
                    "or describe(..., keypoints=)"
                )

    def _check_features(
        self, features: Features, modality: str, *, maps: bool = False, keypoints: bool = False
    ) -> None:
        """Raises `KGLMatchError` for features of the other modality or another model, or that lack a part."""
        if features.modality != modality:
            raise KGLMatchError(
                f'the {modality} side got features of modality "{features.modality}"; the order is vis, ir'
            )
        length = features.descriptors.shape[1]
        if length != self.config.descriptor_dim:
            raise KGLMatchError(
                f"the {modality} features have descriptors of length {length}, this model makes "
                f"{self.config.descriptor_dim}: describe the patches with this model"
            )
        if maps:
            shape, side = tuple(_maps(features).shape), self.config.map_size
            if len(shape) != 4 or shape[2:] != (side, side):
                raise KGLMatchError(
                    f"the {modality} features have maps of shape {shape}, this model makes "
                    f"(N, C, {side}, {side}): describe the patches with this model"
                )
        if keypoints:
            _keypoints(features)

    def _candidates(
        self, vis: Features, ir: Features, top_k: int | None, max_displacement: float | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Pairs worth a decision: rows (P,), (P,) and their descriptors' inner products (P,)."""
        a, b = to_numpy(vis.descriptors), to_numpy(ir.descriptors)
        if max_displacement is None:
            k = len(b) if top_k is None else top_k
            rows = union_of_shortlists(
                self.backend.top_k(vis.descriptors, ir.descriptors, k),
                self.backend.top_k(ir.descriptors, vis.descriptors, k),
            )
            return *rows, paired_cosine(a, b, *rows)
        found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
        for rows_vis, rows_ir in neighbours_within(_keypoints(vis), _keypoints(ir), max_displacement):
            found.append((rows_vis, rows_ir, paired_cosine(a, b, rows_vis, rows_ir)))
        if not found:
            empty = np.empty(0, np.int64)
            return empty, empty, np.empty(0, np.float32)
        rows_vis, rows_ir, cosine = (np.concatenate(parts) for parts in zip(*found, strict=True))
        if top_k is not None:
            keep = keep_top_k(rows_vis, cosine, top_k) | keep_top_k(rows_ir, cosine, top_k)
            rows_vis, rows_ir, cosine = rows_vis[keep], rows_ir[keep], cosine[keep]
        return rows_vis, rows_ir, cosine

    def _decide(
        self,
        vis: Features,
        ir: Features,
        rows_vis: NDArray[np.int64],
        rows_ir: NDArray[np.int64],
        distances: NDArray[np.float32],
        decide: str,
    ) -> NDArray[np.float32]:
        if decide == "descriptor":
            return np.asarray(1 - distances / 2, dtype=np.float32)
        if decide == "fused":
            scores = self.backend.score(_maps(vis), _maps(ir), rows_vis, rows_ir)
            fused = fuse(distances, scores, self.config.inference["fusion"])
            return np.asarray(fused, dtype=np.float32)
        return self.backend.score(_maps(vis), _maps(ir), rows_vis, rows_ir)

    def _every_pair(self, vis: Features, ir: Features, decide: str) -> Candidates:
        """Scores all N x M pairs by chunks of visible rows, keeping each row's and column's best."""
        a, b = to_numpy(vis.descriptors), to_numpy(ir.descriptors)
        kept: list[Candidates] = [_no_candidates()]
        rows_at_once = max(1, CHUNK // 256 // max(len(b), 1))
        columns = np.arange(len(b), dtype=np.int64)
        for start in range(0, len(a) if len(b) else 0, rows_at_once):
            stop = min(start + rows_at_once, len(a))
            rows_vis = np.repeat(np.arange(start, stop, dtype=np.int64), len(b))
            rows_ir = np.tile(columns, stop - start)
            distances = distance_from_cosine((a[start:stop] @ b.T).ravel())
            scores = self._decide(vis, ir, rows_vis, rows_ir, distances, decide)
            # The best by the order of `select_matches`: score, then distance.
            order = np.lexsort((distances, -scores))
            best = np.union1d(
                order[np.unique(rows_vis[order], return_index=True)[1]],
                order[np.unique(rows_ir[order], return_index=True)[1]],
            )
            kept.append((rows_vis[best], rows_ir[best], scores[best], distances[best]))
        rows_vis, rows_ir, scores, distances = (np.concatenate(p) for p in zip(*kept, strict=True))
        return rows_vis, rows_ir, scores, distances


def cut_patches(
    image: NDArray[np.float32],
    modality: Modality,
    *,
    patch_size: int,
    keypoints: NDArray[np.floating] | None = None,
    detector: str = DEFAULT_DETECTOR,
    max_keypoints: int = DEFAULT_MAX_KEYPOINTS,
    upright: bool = True,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Keypoints of a grey image (H, W) and the patches around them: what `PatchMatcher.extract` describes.

    Args: as for `PatchMatcher.extract`.

    Returns:
        (N, 2) float32 xy pixels and (N, P, P) float32.
    """
    if keypoints is None:
        border = patch_size // 2 if upright else patch_size / np.sqrt(2)
        keypoints = detect_keypoints(image, detector=detector, max_keypoints=max_keypoints, border=border).xy
    keypoints, angle = np.asarray(keypoints, dtype=np.float32).reshape(-1, 2), None
    if not upright:
        angle = gradient_directions(image, keypoints)
        if modality == "ir":
            keypoints, angle = np.tile(keypoints, (2, 1)), np.concatenate([angle, angle + 180])
    return keypoints, extract_patches(image, keypoints, patch_size=patch_size, angle=angle)


def check_image_size(image: NDArray[Any], patch_size: int, name: str) -> None:
    """Raises `ImageError` for an image (H, W) that is smaller than a patch; `name` is what to call it."""
    height, width = image.shape
    if min(height, width) < patch_size:
        raise ImageError(
            f"{name} is {width} x {height} pixels, smaller than a patch ({patch_size} x {patch_size})"
        )


def check_match_parameters(
    top_k: int | None,
    min_score: float,
    max_displacement: float | None,
    threshold: float = DEFAULT_THRESHOLD,
) -> None:
    """Raises `KGLMatchError` for a parameter of `match` or `match_images` that is out of range."""
    if top_k is not None and not (is_whole(top_k) and top_k >= 1):
        raise KGLMatchError(
            f"top_k must be a whole number of at least 1, or None for every pair, got {top_k!r}"
        )
    if not (is_number(min_score) and 0 <= min_score <= 1):
        raise KGLMatchError(f"min_score must be a number in [0, 1], got {min_score!r}")
    if max_displacement is not None and not (is_number(max_displacement) and max_displacement >= 0):
        raise KGLMatchError(f"max_displacement must be 0 pixels or more, got {max_displacement!r}")
    if not (is_number(threshold) and 0 < threshold < np.inf):
        raise KGLMatchError(f"threshold must be a number of pixels above 0, got {threshold!r}")


def _maps(features: Features) -> Array:
    if features.maps is None:
        raise KGLMatchError(
            f"the {features.modality} features hold no metric maps: describe them with maps=True, "
            'or match with decide="descriptor"'
        )
    return features.maps


def _keypoints(features: Features) -> NDArray[np.float32]:
    if features.keypoints is None:
        raise KGLMatchError(
            f"this needs {features.modality} features with keypoints: make them with extract, or "
            "describe(..., keypoints=)"
        )
    return features.keypoints


def _is_torch(array: Array) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _no_candidates() -> Candidates:
    rows = np.empty(0, np.int64)
    values = np.empty(0, np.float32)
    return rows, rows, values, values
