"""What a run trains on and what it validates on, split by image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kglmatch.datasets import (
    PatchPairs,
    Scene,
    ScenePairs,
    draw_partners,
    find_patch_sources,
    image_files,
    load_scene_pairs,
    protocol_points,
)
from kglmatch.errors import DataError
from kglmatch.images import read_image_raw
from kglmatch.training.config import DataSource, TrainingConfig


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """The training points of one source.

    Attributes:
        pairs: scenes and points.
        weight: share of the training pairs, relative to the other sources'.
        colours: of a simulated source the colour images (H, W, 3) uint8 that belong to the scenes, whose ir
            images are then of no meaning; else None.
    """

    pairs: ScenePairs
    weight: float = 1.0
    colours: tuple[NDArray[np.uint8], ...] | None = None


@dataclass(frozen=True, eq=False)
class ValidationSet:
    """Held-out patches of one source.

    Attributes:
        name: of the source.
        vis, ir: (N, P, P) uint8, row by row matching.
        partners: (N, K) int64, for each visible patch K ir patches of other places.
    """

    name: str
    vis: NDArray[np.uint8]
    ir: NDArray[np.uint8]
    partners: NDArray[np.int64]


def load_training_data(
    config: TrainingConfig, patch_size: int
) -> tuple[list[TrainingSet], list[ValidationSet]]:
    """Reads the sources of a run; the last images of each are held out.

    Of a patch file the matching pairs are used, each of them as an image of its own.

    Args:
        patch_size: side of the network's patches, pixels.

    Returns:
        what is trained on, a set for each source, and what is validated on, a set for each source that
        holds images out.

    Raises:
        DataError: no image pairs there, or too few; patches of another size.
        ImageError: an image that cannot be read.
    """
    training: list[TrainingSet] = []
    validation: list[ValidationSet] = []
    for source in config.sources:
        if source.simulated:
            training.append(_load_colours(source, config, patch_size))
            continue
        pairs, held_out = _load_source(source, config, patch_size)
        training.append(TrainingSet(_with_contrast(pairs, config.least_contrast), source.weight))
        if held_out is not None:
            validation.append(draw_validation(held_out, _set_name(source, config), config))
    for source, found in zip(config.sources, training, strict=True):
        if len(found.pairs) < 2:
            raise DataError(f"{source.path} leaves {len(found.pairs)} points to train on; 2 is the least")
    return training, validation


def _set_name(source: DataSource, config: TrainingConfig) -> str:
    """The last part of a source's path, or where two of them share it, the whole path."""
    names = [Path(other.path).resolve().name for other in config.sources if other.validation_images]
    name = Path(source.path).resolve().name
    return name if names.count(name) == 1 else source.path


def draw_validation(pairs: ScenePairs, name: str, config: TrainingConfig) -> ValidationSet:
    """At most `config.validation_pairs` points, and for each `config.validation_negatives` others.

    Raises:
        DataError: a point without a place far enough away to be its negative.
    """
    random = np.random.RandomState(config.seed)
    rows = np.sort(random.permutation(len(pairs))[: config.validation_pairs])
    points, scenes = pairs.points[rows], pairs.scene_index[rows]
    partners = [draw_partners(points, scenes, random, name) for _ in range(config.validation_negatives)]
    return ValidationSet(
        name, pairs.patches(rows, "vis"), pairs.patches(rows, "ir"), np.stack(partners, axis=1)
    )


def _load_source(
    source: DataSource, config: TrainingConfig, patch_size: int
) -> tuple[ScenePairs, ScenePairs | None]:
    """The points of a source that are trained on, and those held out, if any are."""
    found = find_patch_sources(source.path)
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise DataError(f"{source.path} holds several sets ({names}); train on one of them, or list them")
    if found[0].pairs:
        pairs = found[0].pairs
        cut = _cut(source, len(pairs), "image pairs")

        def load(part: slice) -> ScenePairs:
            return load_scene_pairs(pairs[part], max_points=config.max_points, patch_size=patch_size)
    else:
        patches = found[0].load()
        if patches.vis.shape[1:] != (patch_size, patch_size):
            raise DataError(
                f"{source.path} holds patches of {patches.vis.shape[2]} x {patches.vis.shape[1]} pixels, "
                f"but the network takes {patch_size} x {patch_size}"
            )
        rows = np.flatnonzero(patches.labels)
        cut = _cut(source, len(rows), "matching patch pairs")

        def load(part: slice) -> ScenePairs:
            return patches_as_scenes(patches, rows[part])

    return load(slice(cut)), load(slice(cut, None)) if source.validation_images else None


def _cut(source: DataSource, count: int, what: str) -> int:
    """How many images are trained on; the others are held out."""
    if count <= source.validation_images:
        raise DataError(
            f"{source.path} holds {count} {what}, and {source.validation_images} are held out for "
            "validation, which leaves none to train on; lower validation_images"
        )
    return count - source.validation_images


def _load_colours(source: DataSource, config: TrainingConfig, patch_size: int) -> TrainingSet:
    """A simulated source: the colour images of a folder; those called NAME_nir are left out."""
    files = [path for path in image_files(source.path) if not path.stem.endswith("_nir")]
    scenes, colours = [], []
    for path in files:
        colour = _read_colour(path)
        grey = np.asarray(cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY), np.uint8)
        scenes.append(Scene(path.stem, grey, grey, np.ones(grey.shape, bool)))
        colours.append(colour)
    points = [protocol_points(scene, config.max_points, patch_size) for scene in scenes]
    if not sum(map(len, points)):
        raise DataError(f"no keypoint with a whole {patch_size} x {patch_size} patch in {source.path}")
    index = np.repeat(np.arange(len(scenes), dtype=np.int64), [len(p) for p in points])
    pairs = ScenePairs(tuple(scenes), np.concatenate(points), index, patch_size)
    return TrainingSet(pairs, source.weight, tuple(colours))


def _read_colour(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) uint8; a grey image has three equal channels.

    Raises:
        DataError: not 8 bits a channel.
    """
    pixels = read_image_raw(path)
    if pixels.dtype != np.uint8:
        raise DataError(f"{path}: a simulated sensor takes 8-bit images, got {pixels.dtype}")
    if pixels.ndim == 3 and pixels.shape[2] >= 3:
        return pixels[:, :, :3]
    return np.dstack([pixels if pixels.ndim == 2 else pixels[:, :, 0]] * 3)


def _with_contrast(pairs: ScenePairs, least: float) -> ScenePairs:
    """Without the points whose second patch shows nothing."""
    if not least:
        return pairs
    rows = np.flatnonzero(pairs.contrast() >= least)
    return ScenePairs(pairs.scenes, pairs.points[rows], pairs.scene_index[rows], pairs.patch_size)


def patches_as_scenes(patches: PatchPairs, rows: np.ndarray) -> ScenePairs:
    """Matching patch pairs as scenes of one point each.

    Args:
        rows: (N,) the pairs that are used.
    """
    size = patches.vis.shape[-1]
    valid = np.ones((size, size), bool)
    scenes = tuple(Scene(f"{patches.name}-{row}", patches.vis[row], patches.ir[row], valid) for row in rows)
    points = np.full((len(rows), 2), size // 2, np.int64)
    return ScenePairs(scenes, points, np.arange(len(rows), dtype=np.int64), size)
