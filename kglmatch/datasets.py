"""Patch pairs to measure and train on: folders of registered images, published patch files, `.npz`.

Everything ends in one of two forms. `ScenePairs` are registered images with points in them; patches
are cut when they are needed. `PatchPairs` are labelled patches, what an evaluation reads.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import DataError

PATCH_SIZE = 64
MAX_POINTS = 1500
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".ppm", ".pgm"}
_FOLDER_PAIRS = (("visible", "infrared"), ("optical", "sar"), ("vis", "ir"), ("rgb", "nir"))
_UNCOVERED = 0  # grey value of pixels that no image covers


@dataclass(frozen=True)
class ImagePair:
    """Two image files of one scene, and how they lie on each other.

    `affine` (2, 3) takes a visible pixel (x, y) to its pixel in the other image; None means that
    the two are registered.
    """

    name: str
    vis: Path
    ir: Path
    affine: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Scene:
    """A registered pair in memory: grey uint8 (H, W) images and where both are valid (H, W) bool."""

    name: str
    vis: NDArray[np.uint8]
    ir: NDArray[np.uint8]
    valid: NDArray[np.bool_]


@dataclass(frozen=True)
class ScenePairs:
    """Scenes and the points at which patches are cut: the same place in both images.

    Attributes:
        scenes: the images.
        points: (N, 2) int64 xy pixels.
        scene_index: (N,) int64, which scene a point belongs to.
    """

    scenes: tuple[Scene, ...]
    points: NDArray[np.int64]
    scene_index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.points)

    def patches(self, rows: NDArray[np.int64], modality: str) -> NDArray[np.uint8]:
        """Patches (len(rows), 64, 64) uint8 around the points of these rows, in one modality."""
        half = PATCH_SIZE // 2
        out = np.empty((len(rows), PATCH_SIZE, PATCH_SIZE), np.uint8)
        for i, row in enumerate(rows):
            image = getattr(self.scenes[self.scene_index[row]], modality)
            x, y = self.points[row]
            out[i] = image[y - half : y + half, x - half : x + half]
        return out


@dataclass(frozen=True)
class PatchPairs:
    """Labelled patch pairs of one subset.

    Attributes:
        name: of the subset, for the report.
        vis, ir: (N, 64, 64) uint8.
        labels: (N,) bool, true for matching pairs.
    """

    name: str
    vis: NDArray[np.uint8]
    ir: NDArray[np.uint8]
    labels: NDArray[np.bool_] = field(repr=False)

    def __post_init__(self) -> None:
        if self.vis.shape != self.ir.shape or self.vis.ndim != 3:
            raise DataError(
                f"{self.name}: vis and ir must both be (N, P, P), got {self.vis.shape} and {self.ir.shape}"
            )
        if self.labels.shape != (len(self.vis),):
            raise DataError(f"{self.name}: labels must be ({len(self.vis)},), got {self.labels.shape}")

    def __len__(self) -> int:
        return len(self.labels)


# --- folders of registered images -------------------------------------------------------------


def find_image_pairs(folder: str | Path) -> list[ImagePair]:
    """Image pairs of a folder, in the order of their names.

    Two layouts are known: `NAME_rgb.*` beside `NAME_nir.*` (with an optional `NAME_nir.npy`, the
    2 x 3 affine from visible to NIR pixels), and two folders whose files have the same names
    (visible/infrared, optical/sar, vis/ir or rgb/nir).

    Raises:
        DataError: not a folder, no pair in it, a visible image without its partner, a bad affine.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"not a folder: {folder}")
    pairs = _suffix_pairs(folder) or _folder_pairs(folder)
    if not pairs:
        raise DataError(
            f"no image pairs in {folder}: expected NAME_rgb.*/NAME_nir.*, or two folders of equal file "
            f"names called {' or '.join('/'.join(names) for names in _FOLDER_PAIRS)}"
        )
    return pairs


def _images_by_stem(folder: Path) -> dict[str, Path]:
    return {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in _IMAGE_SUFFIXES}


def _suffix_pairs(folder: Path) -> list[ImagePair]:
    images = _images_by_stem(folder)
    pairs = []
    for stem in sorted(s for s in images if s.endswith("_rgb")):
        name = stem.removesuffix("_rgb")
        partner = images.get(f"{name}_nir")
        if partner is None:
            raise DataError(f"{images[stem]} has no partner {name}_nir.* beside it")
        affine_file = folder / f"{name}_nir.npy"
        pairs.append(
            ImagePair(
                name, images[stem], partner, _read_affine(affine_file) if affine_file.exists() else None
            )
        )
    return pairs


def _folder_pairs(folder: Path) -> list[ImagePair]:
    for vis_name, ir_name in _FOLDER_PAIRS:
        if (folder / vis_name).is_dir() and (folder / ir_name).is_dir():
            vis, ir = _images_by_stem(folder / vis_name), _images_by_stem(folder / ir_name)
            missing = sorted(set(vis) - set(ir))
            if missing:
                raise DataError(f"{vis[missing[0]]} has no partner of that name in {folder / ir_name}")
            return [ImagePair(stem, vis[stem], ir[stem]) for stem in sorted(vis)]
    return []


def _read_affine(path: Path) -> NDArray[np.float64]:
    try:
        affine = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the affine {path}: {error}") from error
    if affine.shape != (2, 3) or not np.isfinite(affine).all():
        raise DataError(f"{path} must hold a finite (2, 3) affine, got shape {affine.shape}")
    return affine.astype(np.float64)


def _read_grey(path: Path) -> NDArray[np.uint8]:
    from kglmatch.images import load_image

    return np.rint(load_image(path) * 255).astype(np.uint8)


def load_scene(pair: ImagePair) -> Scene:
    """Reads a pair and lays the second image onto the first by its affine, if it has one.

    Raises:
        ImageError: a file cannot be read.
        DataError: registered images of different sizes.
    """
    vis, ir = _read_grey(pair.vis), _read_grey(pair.ir)
    valid = np.ones(vis.shape, bool)
    if pair.affine is not None:
        size = (vis.shape[1], vis.shape[0])
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        covered = cv2.warpAffine(np.full(ir.shape, 255, np.uint8), pair.affine, size, flags=flags)
        ir = cv2.warpAffine(ir, pair.affine, size, flags=flags, borderValue=_UNCOVERED).astype(np.uint8)
        valid = covered >= 255
    elif vis.shape != ir.shape:
        raise DataError(
            f"{pair.vis} is {vis.shape[1]} x {vis.shape[0]} but {pair.ir} is {ir.shape[1]} x {ir.shape[0]}; "
            "a registered pair has one size"
        )
    return Scene(pair.name, vis, ir, valid)


def protocol_points(scene: Scene, max_points: int = MAX_POINTS) -> NDArray[np.int64]:
    """Where patches are cut by the field's protocol (Aguilera et al., CVPR workshops 2016).

    SIFT keypoints of the visible image, strongest first, rounded to whole pixels without repeats,
    the patch wholly inside what both images show; at most `max_points`.

    Returns:
        (N, 2) int64 xy pixels.
    """
    from kglmatch.keypoints import detect_keypoints

    half = PATCH_SIZE // 2
    height, width = scene.valid.shape
    if min(height, width) < PATCH_SIZE:
        return np.empty((0, 2), np.int64)
    # Every keypoint is asked for, since rounding, repeats and the border drop some.
    xy = detect_keypoints(scene.vis.astype(np.float32) / 255, detector="sift", max_keypoints=10**6).xy
    points = np.rint(xy).astype(np.int64)
    _, first = np.unique(points, axis=0, return_index=True)
    points = points[np.sort(first)]
    x, y = points.T
    points = points[(x >= half) & (y >= half) & (x <= width - half) & (y <= height - half)]
    # Invalid pixels inside a patch, by an integral image.
    integral = cv2.integral((~scene.valid).astype(np.uint8))
    x, y = points.T
    top, bottom, left, right = y - half, y + half, x - half, x + half
    holes = integral[bottom, right] - integral[top, right] - integral[bottom, left] + integral[top, left]
    return points[holes == 0][:max_points]


def load_scene_pairs(source: str | Path | Sequence[ImagePair], *, max_points: int = MAX_POINTS) -> ScenePairs:
    """Reads the image pairs of a folder (or of a list) and finds the protocol's points in them.

    Raises:
        DataError: no pairs, or no point in any of them.
    """
    pairs = find_image_pairs(source) if isinstance(source, str | Path) else list(source)
    scenes = tuple(load_scene(pair) for pair in pairs)
    points = [protocol_points(scene, max_points) for scene in scenes]
    if not sum(map(len, points)):
        raise DataError(
            f"no keypoint with a whole {PATCH_SIZE} x {PATCH_SIZE} patch in {len(scenes)} image pairs"
        )
    index = np.repeat(np.arange(len(scenes), dtype=np.int64), [len(p) for p in points])
    return ScenePairs(scenes, np.concatenate(points), index)


def sample_patch_pairs(
    pairs: ScenePairs, *, name: str = "scenes", max_pairs: int | None = None, seed: int = 0
) -> PatchPairs:
    """Labelled patches by the field's protocol: for each point one matching and one other pair.

    The non-matching partner of a point is a random other point of the same set whose place is not
    the same (another image, or another position in it).

    Args:
        max_pairs: at most so many matching (and as many non-matching) pairs, drawn at random.
        seed: of every draw; one seed gives one set on every machine.
    """
    rng = np.random.default_rng(seed)
    rows = np.arange(len(pairs))
    if max_pairs is not None and max_pairs < len(rows):
        rows = np.sort(rng.choice(len(rows), max_pairs, replace=False))
    if len(pairs) < 2:
        raise DataError(f"{name}: at least two points are needed for non-matching pairs, got {len(pairs)}")
    other = rng.integers(0, len(pairs) - 1, len(rows))
    other += other >= rows
    vis, positive, negative = (
        pairs.patches(rows, "vis"),
        pairs.patches(rows, "ir"),
        pairs.patches(other, "ir"),
    )
    labels = np.repeat([True, False], len(rows))
    return PatchPairs(name, np.concatenate([vis, vis]), np.concatenate([positive, negative]), labels)


# --- published patch files, csv lists, .npz ---------------------------------------------------


def load_sos_patches(path: str | Path) -> PatchPairs:
    """Reads a published patch file `NAME_sos.npy` with its list `NAME_info.txt`.

    The array is (2N, 1, 64, 64); rows 2i and 2i+1 are a pair, visible first, matching where the ids
    on lines 2i and 2i+1 of the list are equal.
    """
    path = Path(path)
    name = path.stem.removesuffix("_sos")
    info = path.with_name(f"{name}_info.txt")
    try:
        patches = np.load(path, allow_pickle=False)
        ids = np.array([line.split()[0] for line in info.read_text().splitlines() if line.strip()])
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} with {info.name}: {error}") from error
    patches = patches.reshape(len(patches), *patches.shape[-2:])
    if patches.ndim != 3 or len(patches) % 2 or len(ids) != len(patches):
        raise DataError(
            f"{path}: expected (2N, 1, P, P) patches and 2N ids, got {patches.shape}, {len(ids)} ids"
        )
    patches = _as_uint8(patches, path)
    return PatchPairs(name, patches[0::2], patches[1::2], ids[0::2] == ids[1::2])


def load_patch_npz(path: str | Path) -> PatchPairs:
    """Reads our own `.npz`: `vis` and `ir` (N, 64, 64) patches and `labels` (N,)."""
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = {"vis", "ir", "labels"} - set(file.files)
            if missing:
                raise DataError(f"{path} lacks {sorted(missing)}; it holds {sorted(file.files)}")
            vis, ir, labels = file["vis"], file["ir"], file["labels"]
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {path}: {error}") from error
    return PatchPairs(path.stem, _as_uint8(vis, path), _as_uint8(ir, path), labels.astype(bool))


def save_patch_npz(path: str | Path, pairs: PatchPairs) -> None:
    """Writes patch pairs as `load_patch_npz` reads them."""
    from kglmatch.files import atomic_output

    with atomic_output(path) as temporary:
        np.savez_compressed(temporary, vis=pairs.vis, ir=pairs.ir, labels=pairs.labels)


def load_csv_patches(path: str | Path, images: str | Path) -> PatchPairs:
    """Reads a VIS-NIR list of patch centres (columns type, rgb, rgb_x, rgb_y, nir, nir_x, nir_y).

    Args:
        path: the csv; `type` is 1 or "positive" for matching pairs.
        images: folder that the image names in it refer to.
    """
    path, images = Path(path), Path(images)
    wanted = ("type", "rgb", "rgb_x", "rgb_y", "nir", "nir_x", "nir_y")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not rows or any(key not in rows[0] for key in wanted):
        raise DataError(f"{path}: expected rows with the columns {', '.join(wanted)}")
    cache: dict[str, NDArray[np.uint8]] = {}

    def cut(line: int, image: str, x: str, y: str) -> NDArray[np.uint8]:
        if image not in cache:
            cache[image] = _read_grey(images / image)
        half = PATCH_SIZE // 2
        try:
            left, top = round(float(x)) - half, round(float(y)) - half
        except ValueError as error:
            raise DataError(f"{path}, line {line}: {error}") from error
        patch = cache[image][max(top, 0) : top + PATCH_SIZE, max(left, 0) : left + PATCH_SIZE]
        if patch.shape != (PATCH_SIZE, PATCH_SIZE):
            raise DataError(f"{path}, line {line}: the patch at ({x}, {y}) is not wholly inside {image}")
        return patch

    vis = [cut(i, row["rgb"], row["rgb_x"], row["rgb_y"]) for i, row in enumerate(rows, 2)]
    ir = [cut(i, row["nir"], row["nir_x"], row["nir_y"]) for i, row in enumerate(rows, 2)]
    labels = [row["type"].strip().lower() in {"1", "positive", "pos", "true"} for row in rows]
    return PatchPairs(path.stem, np.stack(vis), np.stack(ir), np.array(labels))


def _as_uint8(patches: NDArray[np.generic], path: Path) -> NDArray[np.uint8]:
    if patches.dtype == np.uint8:
        return patches.astype(np.uint8, copy=False)
    values = np.asarray(patches, dtype=np.float64)
    low, high = (values.min(), values.max()) if values.size else (0.0, 0.0)
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > 255:
        raise DataError(f"{path}: patches must be grey values in [0, 255] or [0, 1], got {low:g} to {high:g}")
    return np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)


def load_patch_sets(
    source: str | Path, *, max_pairs: int | None = None, seed: int = 0
) -> Iterator[PatchPairs]:
    """Every labelled subset that a path holds: what `kglmatch eval` measures.

    Args:
        source: an `.npz`, a `NAME_sos.npy`, a folder of such files, a folder of image pairs, or a
            folder of such folders (one subset each).
        max_pairs, seed: see `sample_patch_pairs`; for image folders only.

    Yields:
        one `PatchPairs` a subset, in the order of the names.
    """
    path = Path(source)
    if path.is_file():
        yield load_patch_npz(path) if path.suffix == ".npz" else load_sos_patches(path)
        return
    if not path.is_dir():
        raise DataError(f"no such file or folder: {path}")
    files = sorted(path.glob("*_sos.npy")) + sorted(path.glob("*.npz"))
    if files:
        for file in files:
            yield from load_patch_sets(file)
        return
    folders = (
        [path]
        if _suffix_pairs(path) or _folder_pairs(path)
        else sorted(p for p in path.iterdir() if p.is_dir())
    )
    if not folders:
        find_image_pairs(path)  # raises, naming the layouts
    for folder in folders:
        yield sample_patch_pairs(load_scene_pairs(folder), name=folder.name, max_pairs=max_pairs, seed=seed)
