"""To and from other libraries: OpenCV, kornia, hloc and COLMAP, image-matching-models.

The libraries other than OpenCV are optional (``pip install "kglmatch[kornia,colmap]"``) and imported where
they are used. The visible image or set comes first in all of them: OpenCV's query, image 0, the first
name of a pair.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import DataError, KGLMatchError
from kglmatch.features import (
    Array,
    Features,
    Matches,
    Modality,
    check_keypoints,
    check_modality,
    is_whole,
    to_numpy,
)
from kglmatch.files import atomic_output, make_folder
from kglmatch.images import load_image
from kglmatch.matcher import Matcher
from kglmatch.options import DEFAULT_MAX_KEYPOINTS, PATCH_SIZE

FEATURES_FILE = "features.h5"
MATCHES_FILE = "matches.h5"
PAIRS_FILE = "pairs.txt"
# COLMAP counts pixels from the image's corner, not from the centre of its first pixel.
COLMAP_ORIGIN = 0.5


# --- OpenCV -----------------------------------------------------------------------------------


def to_cv2_keypoints(keypoints: Features | NDArray[np.floating], *, size: float = PATCH_SIZE) -> list[Any]:
    """Keypoints as OpenCV's.

    Args:
        keypoints: `Features`, or (N, 2) xy pixels.
        size: diameter of the neighbourhood in pixels; the patch's side by default.

    Returns:
        N `cv2.KeyPoint`, in the same order.

    Raises:
        KGLMatchError: features without keypoints, or another shape.
    """
    return [cv2.KeyPoint(float(x), float(y), float(size)) for x, y in _keypoints(keypoints)]


def from_cv2_keypoints(keypoints: Sequence[Any]) -> NDArray[np.float32]:
    """(N, 2) xy pixels of N `cv2.KeyPoint`, for `Matcher.extract(..., keypoints=...)`.

    Raises:
        KGLMatchError: something else than `cv2.KeyPoint`, or a position that is not finite.
    """
    return check_keypoints([keypoint.pt for keypoint in _instances(keypoints, cv2.KeyPoint)])


def to_cv2_matches(matches: Matches) -> list[Any]:
    """K matches as K `cv2.DMatch`: query is the visible side, distance the descriptors' L2 distance."""
    rows = zip(matches.indices.tolist(), matches.distances.tolist(), strict=True)
    return [cv2.DMatch(vis, ir, distance) for (vis, ir), distance in rows]


def from_cv2_matches(
    matches: Sequence[Any],
    keypoints_vis: NDArray[np.floating] | Sequence[Any] | None = None,
    keypoints_ir: NDArray[np.floating] | Sequence[Any] | None = None,
) -> Matches:
    """OpenCV's matches of our descriptors as `Matches`, best first.

    OpenCV has no score; it becomes ``1 - distance / 2``, as `Matcher.match` gives it with
    ``decide="descriptor"``.

    Args:
        matches: K `cv2.DMatch` of a matcher with `cv2.NORM_L2`; query is the visible side.
        keypoints_vis, keypoints_ir: all keypoints of the two sides, (N, 2) xy pixels or
            `cv2.KeyPoint`s, or None.

    Raises:
        KGLMatchError: something else than `cv2.DMatch`, a distance outside [0, 2], which is not one of unit
            vectors, or an index below 0 or beyond the keypoints.
    """
    matches = _instances(matches, cv2.DMatch)  # knnMatch gives a tuple of them for each query
    indices = np.array([(m.queryIdx, m.trainIdx) for m in matches], np.int64).reshape(-1, 2)
    if (indices < 0).any():
        raise KGLMatchError(f"match {int(np.argmin(indices.min(axis=1)))} has an index below 0")
    distances = np.array([m.distance for m in matches], np.float32)
    if len(distances) and not (distances.min() >= 0 and distances.max() <= 2 + 1e-5):
        raise KGLMatchError(
            f"distances go from {distances.min():g} to {distances.max():g}, expected [0, 2]: L2 distances of "
            "our descriptors"
        )
    order = np.argsort(distances, kind="stable")
    indices, distances = indices[order], np.minimum(distances[order], np.float32(2))
    return Matches(
        indices,
        1 - distances / np.float32(2),
        distances,
        _matched_points("visible", keypoints_vis, indices[:, 0]),
        _matched_points("ir", keypoints_ir, indices[:, 1]),
    )


def _instances(values: Sequence[Any], kind: type) -> list[Any]:
    for value in values:
        if not isinstance(value, kind):
            raise KGLMatchError(f"expected a flat list of cv2.{kind.__name__}, got a {type(value).__name__}")
    return list(values)


def _matched_points(
    side: str, keypoints: NDArray[np.floating] | Sequence[Any] | None, rows: NDArray[np.int64]
) -> NDArray[np.float32] | None:
    if keypoints is None:
        return None
    points = _keypoints(keypoints if isinstance(keypoints, np.ndarray) else from_cv2_keypoints(keypoints))
    if len(rows) and rows.max() >= len(points):
        raise KGLMatchError(f"a match names {side} keypoint {rows.max()}, but there are {len(points)}")
    return points[rows]


# --- kornia -----------------------------------------------------------------------------------


def kornia_descriptor(matcher: Matcher, modality: Modality) -> Any:
    """Our network as kornia's descriptor of local affine frames (LAFs).

    Its descriptors are those of `Matcher.describe`, for `kornia.feature.match_mnn` and similar matchers. No
    gradient flows through it, and it runs on the matcher's device.

    Args:
        modality: "vis" or "ir"; make one for each.

    Returns:
        a `kornia.feature.LAFDescriptor`: image (B, C, H, W) with values in [0, 1] and LAFs
        (B, N, 2, 3) -> (B, N, D).

    Raises:
        KGLMatchError: kornia is not installed, or an unknown modality.
    """
    check_modality(modality)
    kornia = _optional("kornia.feature", "kornia")
    import torch

    class PatchDescriptor(torch.nn.Module):
        """Patches (N, 1, P, P) -> descriptors (N, D) of their device and type."""

        def forward(self, patches: torch.Tensor) -> torch.Tensor:
            # Sampling may exceed [0, 1] by rounding.
            found = matcher.describe(patches.detach().float().clamp(0, 1), modality, maps=False)
            descriptors: torch.Tensor = found.descriptors.to(patches).clone()
            return descriptors

    return kornia.LAFDescriptor(
        PatchDescriptor(), patch_size=matcher.config.patch_size, grayscale_descriptor=True
    )


def to_kornia_lafs(keypoints: Features | NDArray[np.floating], *, patch_size: int = PATCH_SIZE) -> Any:
    """Upright LAFs from which kornia cuts the patches that `extract_patches` cuts at these keypoints.

    The keypoint is pixel P // 2 of its patch, so the frame's centre is half a pixel before it.

    Args:
        keypoints: `Features`, or (N, 2) xy pixels.
        patch_size: P, side of a patch in pixels.

    Returns:
        (1, N, 2, 3) float32 tensor on the CPU.

    Raises:
        KGLMatchError: features without keypoints, or another shape.
    """
    import torch

    points = _keypoints(keypoints)
    lafs = np.zeros((1, len(points), 2, 3), np.float32)
    lafs[..., 0, 0] = lafs[..., 1, 1] = patch_size / 2
    lafs[0, :, :, 2] = points - 0.5
    return torch.from_numpy(lafs)


# --- hloc and COLMAP --------------------------------------------------------------------------


def write_hloc(
    folder: str | Path, images: Mapping[str, Features], pairs: Mapping[tuple[str, str], Matches]
) -> None:
    """Writes features and matches as hloc reads them: `features.h5`, `matches.h5` and `pairs.txt`.

    `features.h5` has a group for each image with `keypoints` (N, 2), `descriptors` (D, N), `scores` (N,),
    all 1, and `image_size` (width, height); `matches.h5` one for each pair with `matches0` (N,), the
    second image's row or -1, and `matching_scores0` (N,). Pixels are counted as here and in hloc:
    the centre of the first one is (0, 0).

    Args:
        folder: made if missing.
        images: name, a path relative to the folder of images -> its features, with keypoints.
        pairs: names of the visible and the ir image -> their matches, one to one.

    Raises:
        KGLMatchError: h5py is not installed; a pair of unknown images; features without keypoints;
            matches that name a row twice or beyond the features; names that hloc cannot tell apart.
        OutputError: the folder cannot be written.
    """
    h5py = _optional("h5py", "colmap")
    for name, features in images.items():
        if not name.strip("/") or any(character.isspace() for character in name):
            raise KGLMatchError(f"an image is named by its path, without spaces, got {name!r}")
        _keypoints(features)
    rows = {names: _matches_by_row(names, matches, images) for names, matches in pairs.items()}
    groups: dict[str, tuple[str, str]] = {}
    for names in pairs:
        other = groups.setdefault(_group(names), names)
        if other != names:
            raise KGLMatchError(f"hloc writes / in names as -, so the pairs {other} and {names} become one")
    folder = make_folder(folder)
    with atomic_output(folder / FEATURES_FILE) as temporary, h5py.File(temporary, "w") as file:
        for name, features in images.items():
            group = file.create_group(name)
            group["keypoints"] = _keypoints(features)
            group["keypoints"].attrs["uncertainty"] = 1.0
            group["descriptors"] = to_numpy(features.descriptors).T
            group["scores"] = np.ones(len(features), np.float32)
            if features.image_size is not None:
                group["image_size"] = np.array(features.image_size)
    with atomic_output(folder / MATCHES_FILE) as temporary, h5py.File(temporary, "w") as file:
        for names, (matches0, scores0) in rows.items():
            group = file.create_group(_group(names))
            group["matches0"], group["matching_scores0"] = matches0, scores0
    with atomic_output(folder / PAIRS_FILE) as temporary:
        temporary.write_text("".join(f"{vis} {ir}\n" for vis, ir in pairs), encoding="utf-8")


def _group(names: tuple[str, ...]) -> str:
    """The group of a pair in hloc's file of matches."""
    return "/".join(name.replace("/", "-") for name in names)


def _matches_by_row(
    names: tuple[str, str], matches: Matches, images: Mapping[str, Features]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    unknown = [name for name in names if name not in images]
    if unknown:
        raise KGLMatchError(f"the pair {names} names images without features: {unknown}")
    counts = [len(images[name]) for name in names]
    vis, ir = matches.indices[:, 0], matches.indices[:, 1]
    if len(matches) and not (matches.indices.min() >= 0 and vis.max() < counts[0] and ir.max() < counts[1]):
        raise KGLMatchError(
            f"the matches of {names} name rows beyond their {counts[0]} and {counts[1]} features"
        )
    if len(np.unique(vis)) != len(vis) or len(np.unique(ir)) != len(ir):
        raise KGLMatchError(f"the matches of {names} name a row twice: match with one_to_one=True")
    matches0, scores0 = np.full(counts[0], -1, np.int32), np.zeros(counts[0], np.float32)
    matches0[vis], scores0[vis] = ir, matches.scores
    return matches0, scores0


def import_into_colmap(folder: str | Path, image_folder: str | Path, database: str | Path) -> None:
    """Makes a COLMAP database of what `write_hloc` wrote, through pycolmap.

    Each image gets its own camera, from its EXIF data or COLMAP's guess. The matches are not
    verified yet: ``pycolmap.verify_matches(database, folder / "pairs.txt")`` does that.

    Args:
        folder: as given to `write_hloc`.
        image_folder: the images are there under their names.
        database: the file to write; replaced if it exists.

    Raises:
        KGLMatchError: h5py or pycolmap is not installed.
        DataError: a file that is missing or not as `write_hloc` writes it, or an image that COLMAP
            cannot read.
        OutputError: the database cannot be written.
    """
    h5py, pycolmap = _optional("h5py", "colmap"), _optional("pycolmap", "colmap")
    keypoints, found = _read_hloc(h5py, Path(folder))
    missing = [name for name in keypoints if not (Path(image_folder) / name).is_file()]
    if missing:
        raise DataError(f"{image_folder} lacks {len(missing)} of the images (first: {missing[0]})")
    with atomic_output(database) as temporary:
        pycolmap.import_images(
            temporary, image_folder, camera_mode=pycolmap.CameraMode.PER_IMAGE, image_names=list(keypoints)
        )
        with pycolmap.Database.open(temporary) as db:
            ids: dict[str, int] = {}
            for name, points in keypoints.items():
                image = db.read_image_with_name(name)
                if image is None:
                    raise DataError(f"COLMAP cannot read {Path(image_folder) / name}")
                ids[name] = image.image_id
                db.write_keypoints(image.image_id, points + COLMAP_ORIGIN)
            for (vis, ir), matches0 in found.items():
                rows = np.flatnonzero(matches0 >= 0)
                db.write_matches(ids[vis], ids[ir], np.stack([rows, matches0[rows]], 1).astype(np.uint32))


def _read_hloc(
    h5py: Any, folder: Path
) -> tuple[dict[str, NDArray[np.float32]], dict[tuple[str, str], NDArray[np.int32]]]:
    """Keypoints by image name, and `matches0` by pair, of what `write_hloc` wrote."""
    try:
        lines = (folder / PAIRS_FILE).read_text(encoding="utf-8").splitlines()
        pairs = [(vis, ir) for vis, ir in map(str.split, lines)]
        with h5py.File(folder / FEATURES_FILE) as features, h5py.File(folder / MATCHES_FILE) as matches:
            names = _image_names(h5py, features)
            keypoints = {name: check_keypoints(features[name]["keypoints"][:]) for name in names}
            found = {pair: matches[_group(pair)]["matches0"][:] for pair in pairs}
            for (vis, ir), matches0 in found.items():
                counts = len(keypoints[vis]), len(keypoints[ir])
                if matches0.shape != counts[:1] or matches0.max(initial=-1) >= counts[1]:
                    raise ValueError(f"the matches of {vis} and {ir} do not fit their keypoints")
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{folder} does not hold what write_hloc writes: {error}") from error
    return keypoints, found


def _image_names(h5py: Any, file: Any) -> list[str]:
    """Names of the images of a features file; those with "/" are nested groups."""
    names: list[str] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Group) and "keypoints" in item:
            names.append(name)

    file.visititems(visit)
    return sorted(names)


# --- image-matching-models --------------------------------------------------------------------


class ImageMatchingModel:
    """A matcher with the interface of image-matching-models' `BaseMatcher` (the package vismatch).

    The first image is the visible one. Calls return a dict of numpy arrays, in pixels of the images:

    - `num_inliers`, `H` (3, 3) or None;
    - `all_kpts0`, `all_kpts1` (N, 2), `all_desc0`, `all_desc1` (N, D);
    - `matched_kpts0`, `matched_kpts1` (K, 2), `matched_confidences` (K,);
    - `inlier_kpts0`, `inlier_kpts1` (num_inliers, 2).

    Examples:
        >>> model = ImageMatchingModel(Matcher.from_pretrained("kglnet-vis-nir"))
        >>> model("scene_vis.png", "scene_ir.png")["num_inliers"]

    Args:
        matcher: runs the network.
        detector, max_keypoints: as for `Matcher.extract`.
        options: more options of `Matcher.match_images`: `min_score`, `max_displacement`,
            `threshold` (pixels, the RANSAC threshold), `decide`, `dense` ...

    Raises:
        KGLMatchError: an option that `Matcher.match_images` does not have.
    """

    def __init__(
        self,
        matcher: Matcher,
        *,
        detector: str | None = None,
        max_keypoints: int = DEFAULT_MAX_KEYPOINTS,
        **options: Any,
    ) -> None:
        known = set(inspect.signature(matcher.match_images).parameters) - {"vis", "ir"}
        if unknown := sorted(set(options) - known):
            raise KGLMatchError(f"unknown options {unknown}; those of match_images are {sorted(known)}")
        self.matcher = matcher
        self.detector = detector
        self.max_keypoints = max_keypoints
        self.options = options

    @property
    def name(self) -> str:
        """What benchmarks print."""
        return "KGLNet"

    @property
    def device(self) -> str:
        """Where the network runs."""
        return self.matcher.device

    @staticmethod
    def load_image(path: str | Path, resize: int | tuple[int, int] | None = None) -> Any:
        """Reads an image as a grey tensor (3, H, W) float32 in [0, 1], of equal channels.

        Args:
            resize: (height, width) to resize to, or one number for both.

        Raises:
            ImageError: missing or unreadable.
            KGLMatchError: sizes that are not whole numbers of at least 1.
        """
        import torch

        grey = load_image(path)
        if resize is not None:
            sides = resize if isinstance(resize, Sequence) else (resize, resize)
            if len(sides) != 2 or not all(is_whole(side) and side >= 1 for side in sides):
                raise KGLMatchError(f"resize must be a number of pixels or (height, width), got {resize!r}")
            grey = cv2.resize(grey, sides[::-1], interpolation=cv2.INTER_AREA)
        return torch.from_numpy(grey).expand(3, -1, -1).contiguous()

    def __call__(self, img0: Any, img1: Any) -> dict[str, Any]:
        """Matches a visible image against one of the other sensor.

        Args:
            img0, img1: (3, H, W) tensors in [0, 1], paths, or what else `load_image` reads.

        Returns:
            the dict described above.

        Raises:
            ImageError, KGLMatchError: as `Matcher.match_images`.
        """
        # Features first, for they are part of the result.
        how = {name: self.options[name] for name in ("dense", "max_displacement") if name in self.options}
        vis, ir = self.matcher.extract_pair(img0, img1, **self._extraction(), **how)
        options = {name: value for name, value in self.options.items() if name not in ("dense", "upright")}
        matches = self.matcher.match_images(vis, ir, **options)
        inliers = matches if matches.inliers is None else matches[matches.inliers]
        return {
            "num_inliers": len(inliers),
            "H": matches.homography,
            "all_kpts0": vis.keypoints,
            "all_kpts1": ir.keypoints,
            "all_desc0": to_numpy(vis.descriptors),
            "all_desc1": to_numpy(ir.descriptors),
            "matched_kpts0": matches.keypoints_vis,
            "matched_kpts1": matches.keypoints_ir,
            "inlier_kpts0": inliers.keypoints_vis,
            "inlier_kpts1": inliers.keypoints_ir,
            "matched_confidences": matches.scores,
        }

    def extract(self, img: Any, modality: Modality = "vis") -> dict[str, NDArray[np.float32]]:
        """Keypoints `all_kpts0` (N, 2) and descriptors `all_desc0` (N, D) of one image."""
        features = self.matcher.extract(img, modality, **{**self._extraction(), "maps": False})
        return {"all_kpts0": _keypoints(features), "all_desc0": to_numpy(features.descriptors)}

    def _extraction(self) -> dict[str, Any]:
        """What `Matcher.extract` and `extract_pair` share."""
        return {
            "detector": self.detector,
            "max_keypoints": self.max_keypoints,
            "maps": self.matcher.decision(self.options.get("decide")) != "descriptor",
            "upright": self.options.get("upright", True),
        }


# --- helpers ----------------------------------------------------------------------------------


def _keypoints(source: Features | Array) -> NDArray[np.float32]:
    points = source.keypoints if isinstance(source, Features) else source
    if points is None:
        raise KGLMatchError("the features hold no keypoints: make them with Matcher.extract")
    return check_keypoints(points)


def _optional(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise KGLMatchError(
            f'{module.partition(".")[0]} is not installed: pip install "kglmatch[{extra}]"'
        ) from error
