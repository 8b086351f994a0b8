"""Patch pairs to measure and train on: folders of registered images, published patch files, `.npz`.

Everything ends in one of two forms. `ScenePairs` are registered images with points in them; patches
are cut when they are needed. `PatchPairs` are labelled patches, what an evaluation reads.

The protocol, by which image pairs become patch pairs, follows Aguilera et al. (Learning cross-spectral
similarity measures with deep convolutional neural networks, CVPR workshops 2016). It is fixed:

1. Both images become 8-bit grey (`kglmatch.images.load_image`). An image with an affine is warped onto
   the visible one by `cv2.warpAffine`, bicubic; a pixel whose interpolation reads anything outside the
   image is not valid.
2. Keypoints: `cv2.SIFT_create()`, OpenCV's own settings, on the visible image. Sorted by falling
   response, then y, then x; positions rounded to whole pixels; of equal positions the first stays.
3. A point (x, y) stays if its patch, rows y - 32 to y + 31 and columns x - 32 to x + 31, is wholly
   inside the visible image and holds valid pixels alone. Of these the first 1,500 are an image's points.
4. The images of a folder, in the order of their names, are one subset. `max_pairs` limits the number of
   its points, which are drawn at random, without repeats.
5. Each point gives one matching pair (its patch in both images) and one non-matching pair: its visible
   patch with the other image's patch at a random other point of the subset (of those drawn), in
   another image, or in the same one at least `MIN_NEGATIVE_DISTANCE` pixels away.
6. All draws come from `numpy.random.RandomState(seed)`, whose stream numpy has frozen, each subset
   starting anew. Nothing depends on the number of threads or on the order of a folder's listing.

More non-matching pairs a point (`negatives`) make the figures finer and leave the protocol's pairs in place.
"""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import DataError
from kglmatch.options import DEFAULT_NEGATIVES, PATCH_SIZE

MAX_POINTS = 1500
MIN_NEGATIVE_DISTANCE = 8.0
# Grey levels. Chosen by eye on the training images of thermal streets at night: below, patches show the
# sensor's noise and the compression's blocks; from here to 4 the first outlines can be recognised.
LEAST_CONTRAST = 3.0

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".ppm", ".pgm"}
# Names of the two folders of a set, in any case; the order of the modalities is never guessed.
_VIS_FOLDERS = {"vis", "visible", "rgb", "optical"}
_IR_FOLDERS = {"ir", "infrared", "nir", "lwir", "thermal", "sar"}
_LAYOUTS = (
    "NAME_rgb.* with NAME_nir.*, or two folders of equally named files "
    f"({', '.join(sorted(_VIS_FOLDERS))} with {', '.join(sorted(_IR_FOLDERS))})"
)
_CHUNK = 4096  # patches in work at once
_READ_ERRORS = (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError, TypeError, NotImplementedError)
_CSV_COLUMNS = ("type", "rgb", "rgb_x", "rgb_y", "nir", "nir_x", "nir_y")
_CSV_LABELS = {"positive": True, "1": True, "negative": False, "0": False}

cv2_any: Any = cv2  # OpenCV's type stubs lack the detectors


@dataclass(frozen=True)
class ImagePair:
    """Two image files of one scene, and how they are aligned.

    Attributes:
        name: of the scene.
        vis, ir: the image files.
        affine: (2, 3) float64, takes a visible pixel (x, y) to its pixel in the other image; None
            means that the two are registered.
    """

    name: str
    vis: Path
    ir: Path
    affine: NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """A registered pair in memory: grey uint8 (H, W) images and where both are valid (H, W) bool."""

    name: str
    vis: NDArray[np.uint8]
    ir: NDArray[np.uint8]
    valid: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class ScenePairs:
    """Scenes and the points at which patches are cut: the same place in both images.

    Attributes:
        scenes: the images.
        points: (N, 2) int64 xy pixels.
        scene_index: (N,) int64, which scene a point belongs to.
        patch_size: P, side of the patches around the points, pixels.
    """

    scenes: tuple[Scene, ...]
    points: NDArray[np.int64]
    scene_index: NDArray[np.int64]
    patch_size: int = PATCH_SIZE

    def __len__(self) -> int:
        return len(self.points)

    def patches(self, rows: NDArray[np.int64], modality: str) -> NDArray[np.uint8]:
        """Patches (len(rows), P, P) uint8 around the points of these rows, in one modality."""
        half = self.patch_size // 2
        out = np.empty((len(rows), self.patch_size, self.patch_size), np.uint8)
        for i, row in enumerate(rows):
            image = getattr(self.scenes[self.scene_index[row]], modality)
            x, y = self.points[row]
            out[i] = image[y - half : y + half, x - half : x + half]
        return out

    def contrast(self) -> NDArray[np.float64]:
        """`contrast` of each point's second patch (N,), in bounded memory."""
        parts = [
            contrast(self.patches(np.arange(i, min(i + _CHUNK, len(self))), "ir"))
            for i in range(0, len(self), _CHUNK)
        ]
        return np.concatenate(parts) if parts else np.empty(0)


@dataclass(frozen=True, eq=False)
class PatchPairs:
    """Labelled patch pairs of one subset.

    Attributes:
        name: of the subset, for the report.
        vis, ir: (N, P, P) uint8.
        labels: (N,) bool, true for matching pairs.
        images: (N,) str, name of the image that each visible patch is from; None where a file does not say.
    """

    name: str
    vis: NDArray[np.uint8]
    ir: NDArray[np.uint8]
    labels: NDArray[np.bool_] = field(repr=False)
    images: NDArray[np.str_] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.vis.shape != self.ir.shape or self.vis.ndim != 3:
            raise DataError(
                f"{self.name}: vis and ir must both be (N, P, P), got {self.vis.shape} and {self.ir.shape}"
            )
        if self.labels.shape != (len(self.vis),):
            raise DataError(f"{self.name}: labels must be ({len(self.vis)},), got {self.labels.shape}")
        if self.images is not None and self.images.shape != self.labels.shape:
            raise DataError(f"{self.name}: images must be ({len(self.vis)},), got {self.images.shape}")

    def __len__(self) -> int:
        return len(self.labels)


def contrast(patches: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How much patches show: the standard deviation of their grey levels, noise of one pixel blurred away.

    Args:
        patches: (N, P, P) uint8.

    Returns:
        (N,) grey levels. Below `LEAST_CONTRAST` a patch is flat, saturated, or noise.
    """
    out = np.empty(len(patches))
    for i, patch in enumerate(patches):
        out[i] = cv2.GaussianBlur(patch.astype(np.float32), (0, 0), 1.0).std()
    return out


# --- folders of registered images -------------------------------------------------------------


def find_image_pairs(folder: str | Path) -> list[ImagePair]:
    """Image pairs of a folder, in the order of their names.

    Two layouts are known: `NAME_rgb.*` with `NAME_nir.*` (and an optional `NAME_nir.npy`, the
    2 x 3 affine from visible to NIR pixels), and two folders whose files have the same names, the one
    called vis, visible, rgb or optical, the other ir, infrared, nir, lwir, thermal or sar.

    Raises:
        DataError: not a folder, no pair in it, an image without its partner, a bad affine.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"not a folder: {folder}")
    pairs = _suffix_pairs(folder) or _subfolder_pairs(folder)
    if not pairs:
        raise DataError(f"no image pairs in {folder}: expected {_LAYOUTS}")
    return pairs


def pair_folders(vis: str | Path, ir: str | Path) -> list[ImagePair]:
    """Registered pairs of two folders: images of the same name (but for the ending), in their order.

    Raises:
        DataError: not a folder, or an image that has no partner.
    """
    folders = Path(vis), Path(ir)
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"not a folder: {folder}")
    images = tuple(_images_by_stem(folder) for folder in folders)
    for ours, theirs, other in ((images[0], images[1], folders[1]), (images[1], images[0], folders[0])):
        for stem in sorted(set(ours) - set(theirs)):
            raise DataError(f"{ours[stem]} has no partner of that name in {other}; add it or remove this one")
    return [ImagePair(stem, path, images[1][stem]) for stem, path in images[0].items()]


def image_files(folder: str | Path) -> list[Path]:
    """The image files of a folder, in the order of their names.

    Raises:
        DataError: not a folder, none in it, or two of one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"not a folder: {folder}")
    files = list(_images_by_stem(folder).values())
    if not files:
        raise DataError(f"no images in {folder}")
    return files


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name alike on every system; hidden entries are left out."""
    try:
        entries = [p for p in folder.iterdir() if not p.name.startswith(".")]
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror or error}") from error
    return sorted(entries, key=lambda p: p.name)


def _images_by_stem(folder: Path) -> dict[str, Path]:
    images: dict[str, Path] = {}
    for path in _entries(folder):
        if path.suffix.lower() in _IMAGE_SUFFIXES:
            if path.stem in images:
                raise DataError(f"{images[path.stem]} and {path.name} have one name; remove one of them")
            images[path.stem] = path
    return dict(sorted(images.items()))


def _suffix_pairs(folder: Path) -> list[ImagePair]:
    images = _images_by_stem(folder)
    pairs = []
    for stem, path in images.items():
        name, _, kind = stem.rpartition("_")
        if kind not in ("rgb", "nir"):
            continue
        other = f"{name}_{'nir' if kind == 'rgb' else 'rgb'}"
        if other not in images:
            raise DataError(f"{path} has no partner {other}.* in the same folder; add it or remove this one")
        if kind == "rgb":
            affine = folder / f"{name}_nir.npy"
            pairs.append(
                ImagePair(name, path, images[other], _read_affine(affine) if affine.exists() else None)
            )
    return pairs


def _subfolder_pairs(folder: Path) -> list[ImagePair]:
    folders = [p for p in _entries(folder) if p.is_dir()]
    vis = [p for p in folders if p.name.lower() in _VIS_FOLDERS]
    ir = [p for p in folders if p.name.lower() in _IR_FOLDERS]
    if not vis or not ir:
        return []
    if len(vis) > 1 or len(ir) > 1:
        names = ", ".join(p.name for p in (*vis, *ir))
        raise DataError(
            f"{folder} holds more than two folders of images ({names}); call pair_folders with two, "
            "or move each pair into a folder of its own"
        )
    return pair_folders(vis[0], ir[0])


def _read_affine(path: Path) -> NDArray[np.float64]:
    try:
        affine = np.load(path, allow_pickle=False)
    except _READ_ERRORS as error:
        raise DataError(f"cannot read the affine {path}: {error}") from error
    shape = getattr(affine, "shape", None)
    if shape != (2, 3) or affine.dtype.kind not in "fiu" or not np.isfinite(affine).all():
        raise DataError(f"{path} must hold a finite (2, 3) affine, got shape {shape}")
    if abs(np.linalg.det(affine[:, :2])) < 1e-6:
        raise DataError(f"{path} holds an affine that cannot be inverted")
    return np.asarray(affine, dtype=np.float64)


def _read_grey(path: Path) -> NDArray[np.uint8]:
    from kglmatch.images import load_image

    grey: NDArray[np.uint8] = np.rint(load_image(path) * 255).astype(np.uint8)
    return grey


def load_scene(pair: ImagePair) -> Scene:
    """Reads a pair and warps the second image onto the first by its affine, if it has one.

    Raises:
        ImageError: a file cannot be read.
        DataError: registered images of different sizes.
    """
    vis, ir = _read_grey(pair.vis), _read_grey(pair.ir)
    valid = np.ones(vis.shape, bool)
    if pair.affine is not None:
        size = (vis.shape[1], vis.shape[0])
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        # The weights that fall inside the image add up to 1 only where no tap is outside.
        weight = cv2.warpAffine(np.ones(ir.shape, np.float32), pair.affine, size, flags=flags)
        valid = np.abs(weight - 1) < 1e-3
        ir = cv2.warpAffine(ir, pair.affine, size, flags=flags).astype(np.uint8, copy=False)
    elif vis.shape != ir.shape:
        raise DataError(
            f"{pair.vis} is {vis.shape[1]} x {vis.shape[0]} but {pair.ir} is {ir.shape[1]} x {ir.shape[0]}; "
            "a registered pair has one size"
        )
    return Scene(pair.name, vis, ir, valid)


def protocol_points(
    scene: Scene, max_points: int = MAX_POINTS, patch_size: int = PATCH_SIZE
) -> NDArray[np.int64]:
    """Where patches are cut in a scene, by the protocol above, strongest first.

    Args:
        patch_size: side of the patches in pixels; the protocol's is 64.

    Returns:
        (N, 2) int64 xy pixels, N at most `max_points`.
    """
    half = patch_size // 2
    height, width = scene.valid.shape
    if min(height, width) < patch_size:
        return np.empty((0, 2), np.int64)
    keypoints = cv2_any.SIFT_create().detect(scene.vis, None)
    found = np.array([(*k.pt, k.response) for k in keypoints], np.float64).reshape(-1, 3)
    found = found[np.lexsort((found[:, 0], found[:, 1], -found[:, 2]))]
    points = np.rint(found[:, :2]).astype(np.int64)
    _, first = np.unique(points, axis=0, return_index=True)
    points = points[np.sort(first)]
    x, y = points.T
    points = points[(x >= half) & (y >= half) & (x <= width - half) & (y <= height - half)]
    # How many pixels of each patch are not valid, by an integral image.
    integral = cv2.integral((~scene.valid).astype(np.uint8))
    x, y = points.T
    top, bottom, left, right = y - half, y + half, x - half, x + half
    holes = integral[bottom, right] - integral[top, right] - integral[bottom, left] + integral[top, left]
    whole: NDArray[np.int64] = points[holes == 0][:max_points]
    return whole


def load_scene_pairs(
    source: str | Path | Sequence[ImagePair], *, max_points: int = MAX_POINTS, patch_size: int = PATCH_SIZE
) -> ScenePairs:
    """Reads the image pairs of a folder (or of a list) and finds the protocol's points in them.

    Args:
        max_points: points an image, strongest first.
        patch_size: side of the patches in pixels; the protocol's is 64.

    Raises:
        DataError: no pairs, or no point in any of them.
        ImageError: a file cannot be read.
    """
    pairs = find_image_pairs(source) if isinstance(source, str | Path) else list(source)
    scenes = tuple(load_scene(pair) for pair in pairs)
    points = [protocol_points(scene, max_points, patch_size) for scene in scenes]
    if not sum(map(len, points)):
        where = pairs[0].vis.parent if pairs else "an empty list"
        raise DataError(
            f"no keypoint with a whole {patch_size} x {patch_size} patch "
            f"in the {len(scenes)} image pairs of {where}"
        )
    index = np.repeat(np.arange(len(scenes), dtype=np.int64), [len(p) for p in points])
    return ScenePairs(scenes, np.concatenate(points), index, patch_size)


def sample_patch_pairs(
    pairs: ScenePairs,
    *,
    name: str = "scenes",
    max_pairs: int | None = None,
    negatives: int = DEFAULT_NEGATIVES,
    seed: int = 0,
) -> PatchPairs:
    """Labelled patches by the protocol above: for each point one matching pair and others.

    Args:
        max_pairs: the largest number of points, drawn at random.
        negatives: non-matching pairs a point; 1 is the protocol's. The patches of one point take
            8 KiB a pair.
        seed: of every draw; one seed gives one set on every machine.

    Returns:
        `PatchPairs`: of each point the matching pair, then its non-matching ones.

    Raises:
        DataError: a point without a place far enough away to be its non-matching partner.
    """
    _check_counts(max_pairs, negatives)
    random = np.random.RandomState(seed)
    rows = np.arange(len(pairs))
    if max_pairs is not None and max_pairs < len(rows):
        rows = np.sort(random.permutation(len(rows))[:max_pairs])
    points, scene = pairs.points[rows], pairs.scene_index[rows]
    partners = [rows[draw_partners(points, scene, random, name)] for _ in range(negatives)]
    each = 1 + negatives
    names = np.array([scene.name for scene in pairs.scenes], np.str_)
    return PatchPairs(
        name,
        np.repeat(pairs.patches(rows, "vis"), each, axis=0),
        pairs.patches(np.stack([rows, *partners], axis=1).ravel(), "ir"),
        np.tile([True] + [False] * negatives, len(rows)),
        np.repeat(names[scene], each),
    )


def draw_partners(
    points: NDArray[np.int64], scene: NDArray[np.int64], random: np.random.RandomState, name: str
) -> NDArray[np.int64]:
    """For each point a random other one, uniform over those that are not nearly the same place.

    Args:
        points: (N, 2) xy pixels.
        scene: (N,) which image each is in.
        random: source of the draw.
        name: of the set, for the error.

    Returns:
        (N,) rows.

    Raises:
        DataError: a point without a place at least `MIN_NEGATIVE_DISTANCE` pixels away.
    """

    def near(a: Any, b: Any) -> Any:
        apart = ((points[a] - points[b]) ** 2).sum(axis=-1)
        return (scene[a] == scene[b]) & (apart < MIN_NEGATIVE_DISTANCE**2)

    everyone = np.arange(len(points))
    partners = random.randint(0, len(points), size=len(points), dtype=np.int64)
    for i in np.flatnonzero(near(everyone, partners)):
        allowed = np.flatnonzero(~near(i, everyone))
        if not len(allowed):
            raise DataError(
                f"{name}: {len(points)} points, none of them {MIN_NEGATIVE_DISTANCE:g} pixels from "
                f"{points[i].tolist()}; more points are needed for non-matching pairs"
            )
        partners[i] = allowed[random.randint(0, len(allowed), dtype=np.int64)]
    return partners


# --- published patch files, csv lists, .npz ---------------------------------------------------


def load_sos_patches(path: str | Path, *, max_pairs: int | None = None, seed: int = 0) -> PatchPairs:
    """Reads a published patch file `NAME_sos.npy` with its list `NAME_info.txt`.

    The array is (2N, 1, 64, 64); rows 2i and 2i+1 are a pair, visible first, matching where the ids
    on lines 2i and 2i+1 of the list are equal (an id is a line's first word). Bytes are not copied
    from the file before they are used.

    Args:
        max_pairs: the largest number of matching and of non-matching pairs, drawn at random.
        seed: of the draw.

    Raises:
        DataError: a file is missing, damaged or of another shape.
    """
    path = Path(path)
    name = path.stem.removesuffix("_sos")
    info = path.with_name(f"{name}_info.txt")
    try:
        patches = np.load(path, mmap_mode="r", allow_pickle=False)
        ids = np.array([line.split()[0] for line in info.read_text().splitlines() if line.strip()])
    except _READ_ERRORS as error:
        raise DataError(f"cannot read {path} with {info.name}: {error}") from error
    shape: tuple[int, ...] = getattr(patches, "shape", ())
    if (
        len(shape) not in (3, 4)
        or (len(shape) == 4 and shape[1] != 1)
        or len(ids) != shape[0]
        or len(ids) % 2
    ):
        raise DataError(
            f"{path}: expected (2N, 1, {PATCH_SIZE}, {PATCH_SIZE}) patches and 2N ids, "
            f"got {shape} and {len(ids)} ids"
        )
    patches = patches.reshape(shape[0], *shape[-2:])
    labels = ids[0::2] == ids[1::2]
    factor = _factor_to_8_bit(patches, path)
    rows = _draw(labels, max_pairs, seed)
    vis, ir = (
        _to_8_bit(side if rows is None else side[rows], factor) for side in (patches[::2], patches[1::2])
    )
    return PatchPairs(name, vis, ir, labels if rows is None else labels[rows])


def load_patch_npz(path: str | Path, *, max_pairs: int | None = None, seed: int = 0) -> PatchPairs:
    """Reads our own `.npz`: `vis` and `ir` (N, 64, 64) or (N, 1, 64, 64) patches and `labels` (N,).

    Patches are uint8, or numbers in [0, 255], or floats in [0, 1]; labels are 0 or 1. `images` (N,),
    names or numbers of the images that the visible patches are from, may be there too. `max_pairs` and
    `seed` as in `load_sos_patches`.

    Raises:
        DataError: missing, damaged, or with arrays that are not these.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = sorted({"vis", "ir", "labels"} - set(file.files))
            held = sorted(file.files)
            vis, ir, labels = (None, None, None) if missing else (file["vis"], file["ir"], file["labels"])
            images = file["images"].astype(np.str_) if "images" in file.files else None
    except (*_READ_ERRORS, AttributeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if vis is None or ir is None or labels is None:
        raise DataError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(held) or 'nothing'}")
    if labels.dtype.kind not in "biuf" or not np.isin(labels, (0, 1)).all():
        raise DataError(f"{path}: labels must be 0 (non-matching) or 1 (matching)")
    vis, ir = (a[:, 0] if a.ndim == 4 and a.shape[1] == 1 else a for a in (vis, ir))
    factors = _factor_to_8_bit(vis, path), _factor_to_8_bit(ir, path)
    sides = _to_8_bit(vis, factors[0]), _to_8_bit(ir, factors[1])
    pairs = PatchPairs(path.stem, *sides, labels.astype(bool), images)
    rows = _draw(pairs.labels, max_pairs, seed)
    if rows is None:
        return pairs
    drawn = None if pairs.images is None else pairs.images[rows]
    return PatchPairs(pairs.name, pairs.vis[rows], pairs.ir[rows], pairs.labels[rows], drawn)


def save_patch_npz(path: str | Path, pairs: PatchPairs) -> None:
    """Writes patch pairs as `load_patch_npz` reads them. Raises `OutputError` where it cannot."""
    from kglmatch.files import atomic_output

    with atomic_output(path) as temporary, temporary.open("wb") as file:
        arrays: dict[str, Any] = {"vis": pairs.vis, "ir": pairs.ir, "labels": pairs.labels}
        if pairs.images is not None:
            arrays["images"] = pairs.images
        np.savez_compressed(file, **arrays)


def load_csv_patches(
    path: str | Path, images: str | Path | None = None, *, max_pairs: int | None = None, seed: int = 0
) -> PatchPairs:
    """Reads a VIS-NIR list of patch centres (columns type, rgb, rgb_x, rgb_y, nir, nir_x, nir_y).

    The patch of a centre (x, y), in pixels counted from 0, is rows y - 32 to y + 31 and columns x - 32
    to x + 31, as the list's authors cut it.

    Args:
        path: the csv; `type` is "positive" or 1 for matching pairs, "negative" or 0 for others.
        images: folder that the image names in it refer to; an image may have another ending there.
            None looks near the csv: in the folder of its name, in its own, and in that one's
            neighbour of the csv's name.
        max_pairs, seed: as in `load_sos_patches`.

    Raises:
        DataError: a list or an image that is missing or damaged, a row that says something else, a
            patch that is not wholly inside its image.
    """
    path = Path(path)
    rows = _read_csv(path)
    labels = np.array([_csv_label(path, line, row["type"]) for line, row in enumerate(rows, 2)], dtype=bool)
    folder = _csv_images(path, rows[0]["rgb"], images)
    chosen = _draw(labels, max_pairs, seed)
    chosen = np.arange(len(rows)) if chosen is None else chosen
    available = _images_by_stem(folder)
    read: dict[str, NDArray[np.uint8]] = {}
    half = PATCH_SIZE // 2
    sides = []
    for kind in ("rgb", "nir"):
        patches = np.empty((len(chosen), PATCH_SIZE, PATCH_SIZE), np.uint8)
        for i, index in enumerate(chosen):
            row, line = rows[index], int(index) + 2
            stem = Path(row[kind]).stem
            if stem not in available:
                raise DataError(f"{path}, line {line}: no image {row[kind]} in {folder}")
            if stem not in read:
                read[stem] = _read_grey(available[stem])
            try:
                x, y = round(float(row[f"{kind}_x"])), round(float(row[f"{kind}_y"]))
            except (ValueError, OverflowError) as error:
                raise DataError(f"{path}, line {line}: {error}") from error
            patch = read[stem][max(y - half, 0) : max(y + half, 0), max(x - half, 0) : max(x + half, 0)]
            if patch.shape != (PATCH_SIZE, PATCH_SIZE):
                raise DataError(f"{path}, line {line}: the patch at ({x}, {y}) is not wholly inside {stem}")
            patches[i] = patch
        sides.append(patches)
    names = np.array([Path(rows[i]["rgb"]).stem for i in chosen], np.str_)
    return PatchPairs(path.stem, sides[0], sides[1], labels[chosen], names)


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows: list[dict[str, str]] = list(csv.DictReader(file, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not rows or any(key not in rows[0] for key in _CSV_COLUMNS):
        raise DataError(f"{path}: expected rows with the columns {', '.join(_CSV_COLUMNS)}")
    for line, row in enumerate(rows, 2):
        if any(row[key] is None for key in _CSV_COLUMNS):
            raise DataError(f"{path}, line {line}: fewer than the {len(_CSV_COLUMNS)} columns")
    return rows


def _csv_label(path: Path, line: int, text: str) -> bool:
    try:
        return _CSV_LABELS[text.strip().lower()]
    except KeyError:
        raise DataError(f'{path}, line {line}: type must be "positive" or "negative", got {text!r}') from None


def _csv_images(path: Path, first: str, images: str | Path | None) -> Path:
    if images is not None:
        if not Path(images).is_dir():
            raise DataError(f"not a folder: {images}")
        return Path(images)
    folders = (path.with_suffix(""), path.parent, path.parent.parent / path.stem)
    for folder in folders:
        if folder.is_dir() and Path(first).stem in _images_by_stem(folder):
            return folder
    raise DataError(f"{path}: no image {first} in {', '.join(map(str, folders))}; put the images into one")


def _check_counts(max_pairs: int | None, negatives: int = DEFAULT_NEGATIVES) -> None:
    if max_pairs is not None and max_pairs < 1:
        raise DataError(f"max_pairs must be at least 1, or None for all, got {max_pairs}")
    if negatives < 1:
        raise DataError(f"negatives must be at least 1, got {negatives}")


def _draw(labels: NDArray[np.bool_], max_pairs: int | None, seed: int) -> NDArray[np.int64] | None:
    """Rows, rising, of at most `max_pairs` pairs of either label; None if that is all of them."""
    _check_counts(max_pairs)
    if max_pairs is None or max(labels.sum(), (~labels).sum()) <= max_pairs:
        return None
    random = np.random.RandomState(seed)
    drawn = [random.permutation(np.flatnonzero(labels == kind))[:max_pairs] for kind in (True, False)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def _factor_to_8_bit(patches: NDArray[Any], path: Path) -> float:
    """What the patches of a file are to be multiplied by: 255 for floats in [0, 1], else 1."""
    if patches.dtype == np.uint8 or not patches.size:
        return 1.0
    if patches.dtype.kind not in "iuf":
        raise DataError(f"{path}: patches must be numbers, got {patches.dtype}")
    low, high = np.inf, -np.inf
    for start in range(0, len(patches), 4096):
        chunk = patches[start : start + 4096]
        # NaN passes through, and fails the comparison.
        low, high = np.minimum(low, chunk.min()), np.maximum(high, chunk.max())
    if not (low >= 0 and high <= 255):
        raise DataError(f"{path}: patches must be grey values in [0, 255] or [0, 1], got {low:g} to {high:g}")
    return 255.0 if patches.dtype.kind == "f" and high <= 1 else 1.0


def _to_8_bit(patches: NDArray[Any], factor: float) -> NDArray[np.uint8]:
    if patches.dtype == np.uint8:
        return patches
    return np.rint(patches * np.float32(factor)).astype(np.uint8)


# --- what an evaluation reads -------------------------------------------------------------------


@dataclass(frozen=True)
class PatchSource:
    """A labelled subset that can be loaded: an image folder, or a patch file.

    Attributes:
        name: of the subset.
        path: the folder or file.
        pairs: the image pairs of a folder; empty for a file.
    """

    name: str
    path: Path
    pairs: tuple[ImagePair, ...] = ()

    def take(self, rows: slice) -> PatchSource:
        """Some of the image pairs, in the order of their names.

        Raises:
            DataError: a patch file, or a slice that takes none of the pairs.
        """
        if not self.pairs:
            raise DataError(f"{self.path} holds patches; image pairs are taken from folders of them")
        if not self.pairs[rows]:
            raise DataError(f"{self.path} holds {len(self.pairs)} image pairs, and none of them was taken")
        return replace(self, pairs=self.pairs[rows])

    def load(
        self, *, max_pairs: int | None = None, negatives: int = DEFAULT_NEGATIVES, seed: int = 0
    ) -> PatchPairs:
        """Reads the subset. `negatives` are non-matching pairs a point; files hold their own.

        Errors are those of the readers of this module.
        """
        if self.pairs:
            return sample_patch_pairs(
                load_scene_pairs(self.pairs),
                name=self.name,
                max_pairs=max_pairs,
                negatives=negatives,
                seed=seed,
            )
        if self.path.suffix == ".csv":
            return load_csv_patches(self.path, max_pairs=max_pairs, seed=seed)
        if self.path.suffix == ".npz":
            return load_patch_npz(self.path, max_pairs=max_pairs, seed=seed)
        return load_sos_patches(self.path, max_pairs=max_pairs, seed=seed)


PatchSources = str | Path | Iterable[str | Path | PatchSource]


def find_patch_sources(source: PatchSources) -> list[PatchSource]:
    """Every labelled subset that a path holds, without reading an image.

    Args:
        source: a `.npz`, a `NAME_sos.npy`, a VIS-NIR `.csv`, a folder of image pairs (see
            `find_image_pairs`), a folder of such files, a folder of image folders (one subset each);
            or several of them. A `PatchSource` is passed on as it is.

    Returns:
        the subsets, in the order of the names within each path.

    Raises:
        DataError: nothing there that is known, or a folder with something wrong in it.
    """
    if not isinstance(source, str | Path):
        return [
            found
            for one in source
            for found in ([one] if isinstance(one, PatchSource) else find_patch_sources(one))
        ]
    path = Path(source)
    if path.is_file():
        return [_file_source(path)]
    if not path.is_dir():
        raise DataError(f"no such file or folder: {path}")
    if pairs := _suffix_pairs(path) or _subfolder_pairs(path):
        return [PatchSource(path.resolve().name, path, tuple(pairs))]
    entries = _entries(path)
    files = [p for p in entries if p.name.endswith("_sos.npy") or p.suffix in (".npz", ".csv")]
    if files:
        return [_file_source(file) for file in files]
    folders = [p for p in entries if p.is_dir()]
    if not folders:
        raise DataError(
            f"no patch pairs in {path}: expected {_LAYOUTS}; or NAME_sos.npy, .npz or .csv files; or folders "
            "of images"
        )
    return [PatchSource(folder.name, folder, tuple(find_image_pairs(folder))) for folder in folders]


def _file_source(path: Path) -> PatchSource:
    if path.name.endswith("_sos.npy"):
        info = path.with_name(path.name.replace("_sos.npy", "_info.txt"))
        if not info.is_file():
            raise DataError(f"{path} lacks its list of ids, {info.name}, in the same folder")
        return PatchSource(path.name.removesuffix("_sos.npy"), path)
    if path.suffix in (".npz", ".csv"):
        return PatchSource(path.stem, path)
    raise DataError(f"{path} is no file of patch pairs: expected NAME_sos.npy, .npz or .csv, or a folder")


def load_patch_sets(
    source: PatchSources, *, max_pairs: int | None = None, seed: int = 0
) -> Iterator[PatchPairs]:
    """Loads the subsets that `find_patch_sources` finds, one at a time: what `kglmatch eval` measures.

    Args:
        source: see `find_patch_sources`.
        max_pairs: the largest number of matching and of non-matching pairs a subset, drawn at random.
        seed: of every draw.

    Raises:
        DataError, ImageError: what cannot be read.
    """
    for found in find_patch_sources(source):
        yield found.load(max_pairs=max_pairs, seed=seed)
