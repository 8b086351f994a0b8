"""What a run trains on and what it validates on, split by image."""

from __future__ import annotations

import numpy as np

from kglmatch.datasets import (
    PatchPairs,
    Scene,
    ScenePairs,
    find_patch_sources,
    load_scene_pairs,
    sample_patch_pairs,
)
from kglmatch.errors import DataError
from kglmatch.training.config import TrainingConfig


def load_training_data(config: TrainingConfig, patch_size: int) -> tuple[ScenePairs, PatchPairs]:
    """Reads `config.data`; the last `config.validation_images` images are held out.

    Of a patch file the matching pairs are used, each of them as an image of its own.

    Args:
        patch_size: side of the network's patches, pixels.

    Returns:
        scenes to train on, and labelled patch pairs to validate on.

    Raises:
        DataError: no image pairs there, or too few; patches of another size.
        ImageError: an image that cannot be read.
    """
    sources = find_patch_sources(config.data)
    if len(sources) > 1:
        names = ", ".join(source.name for source in sources)
        raise DataError(f"{config.data} holds several sets ({names}); train on one of them")
    source = sources[0]
    if source.pairs:
        _check_count(config, len(source.pairs), "image pairs")
        cut = len(source.pairs) - config.validation_images
        training, held_out = (
            load_scene_pairs(pairs, max_points=config.max_points, patch_size=patch_size)
            for pairs in (source.pairs[:cut], source.pairs[cut:])
        )
    else:
        patches = source.load()
        if patches.vis.shape[1:] != (patch_size, patch_size):
            raise DataError(
                f"{config.data} holds patches of {patches.vis.shape[2]} x {patches.vis.shape[1]} pixels, "
                f"but the network takes {patch_size} x {patch_size}"
            )
        rows = np.flatnonzero(patches.labels)
        _check_count(config, len(rows), "matching patch pairs")
        cut = len(rows) - config.validation_images
        training, held_out = (patches_as_scenes(patches, part) for part in (rows[:cut], rows[cut:]))
    if len(training) < 2:
        raise DataError(f"{config.data} leaves {len(training)} points to train on; 2 is the least")
    validation = sample_patch_pairs(
        held_out, name="validation", max_pairs=config.validation_pairs, seed=config.seed
    )
    return training, validation


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


def _check_count(config: TrainingConfig, count: int, what: str) -> None:
    if count <= config.validation_images:
        raise DataError(
            f"{config.data} holds {count} {what}, and {config.validation_images} are held out for "
            "validation, which leaves none to train on; lower validation_images"
        )
