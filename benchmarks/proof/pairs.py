"""The pairs of the proof: which images, which random warps, which pairs that show nothing in common."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from kglmatch.datasets import ImagePair, find_image_pairs
from kglmatch.geometry import estimate_homography, similarity_about
from kglmatch.images import load_image
from kglmatch.proposers import named_proposer

COMMON = 15  # matches that agree on a homography: two visible images show the same place
UNRELATED = "unrelated"
CATEGORIES = ("field", "forest", "indoor", "mountain", "oldbuilding", "street", "urban", "water")


@dataclass(frozen=True)
class Strength:
    """How far a random warp goes, and the limits that a search needs to find it.

    Attributes:
        shift: pixels in x and y, either way.
        rotation: degrees, either way.
        scale: factor, either way.
        limits: of `Matcher.register`, where the defaults do not reach.
    """

    shift: float
    rotation: float
    scale: float
    limits: tuple[tuple[str, float], ...] = ()


STRENGTHS = {
    "small": Strength(6, 0, 1),
    "medium": Strength(20, 10, 1.1),
    "large": Strength(20, 180, 1.5, (("max_rotation", 180.0), ("max_scale", 1.5))),
}


@dataclass(frozen=True)
class Part:
    """Pairs of one folder, in the order of names.

    Attributes:
        folder: below the data's folder.
        start, stop: the first one, and the one after the last.
        third: whether every third one (the 3rd, 6th, ...) is meant, or all others; None for all.
    """

    folder: str
    start: int = 0
    stop: int | None = None
    third: bool | None = None

    def holds(self, index: int) -> bool:
        """Whether the pair of this index is one of them."""
        return self.third is None or (index % 3 == 2) == self.third


# Test folders, which choose nothing; and those that the confidence is fitted on.
TEST = {
    "vis-nir": [Part(f"vis-nir/{name}") for name in CATEGORIES],
    "vis-lwir": [Part("vis-lwir/roadscene", start=160), Part("vis-lwir/tno")],
    "vis-sar": [Part("vis-sar/sentinel/test"), Part("vis-sar/high-resolution", third=True)],
}
FIT = {
    "vis-nir": [Part("vis-nir/country")],
    "vis-lwir": [Part("vis-lwir/roadscene", stop=160)],
    "vis-sar": [Part("vis-sar/sentinel/train"), Part("vis-sar/high-resolution", third=False)],
}


@dataclass(frozen=True)
class Task:
    """One pair of images that every contender registers.

    Attributes:
        set_name: "vis-nir", "vis-lwir" or "vis-sar".
        subset: the folder that the visible image is from.
        vis, ir: the pair that each image is from; two pairs where they are unrelated.
        strength: of `STRENGTHS`, or "unrelated".
    """

    set_name: str
    subset: str
    vis: ImagePair
    ir: ImagePair
    strength: str

    @property
    def pair(self) -> str:
        """Names the pair that the visible image is from, in all files of results."""
        return f"{self.set_name}/{self.subset}/{self.vis.name}"

    @property
    def key(self) -> str:
        """Names the task in the file of results."""
        other = f" {self.ir.name}" if self.strength == UNRELATED else ""
        return f"{self.pair}{other} {self.strength}"

    def images(self) -> tuple[np.ndarray, np.ndarray]:
        """The grey images (H, W) float32 in [0, 1], as they are in the set."""
        return load_image(self.vis.vis), load_image(self.ir.ir)

    def warp(self, size: tuple[int, int]) -> np.ndarray:
        """(3, 3) from pixels of the ir image to those of the warped one; of the task's own random numbers.

        The transform that the set publishes is undone first, so that the strength bounds the whole.
        """
        if self.strength == UNRELATED:
            return np.eye(3)
        how, rng = STRENGTHS[self.strength], np.random.default_rng(zlib.crc32(self.key.encode()))
        scale = float(np.exp(rng.uniform(-1, 1) * np.log(how.scale)))
        rotation = float(rng.uniform(-1, 1) * how.rotation)
        centre = (size[0] - 1) / 2, (size[1] - 1) / 2
        shift = rng.uniform(-1, 1, 2) * how.shift
        moved = similarity_about(rotation, scale, centre, (centre[0] + shift[0], centre[1] + shift[1]))
        return moved @ np.linalg.inv(published(self.vis))


def published(pair: ImagePair) -> np.ndarray:
    """(3, 3) from visible to ir pixels, as the set says."""
    return np.eye(3) if pair.affine is None else np.vstack([pair.affine, [0, 0, 1]])


def warped(ir: np.ndarray, warp: np.ndarray) -> np.ndarray:
    """An image in the frame that a warp leads to, of the same size."""
    if np.array_equal(warp, np.eye(3)):
        return ir
    size = ir.shape[1], ir.shape[0]
    return np.clip(cv2.warpPerspective(ir, warp, size, flags=cv2.INTER_CUBIC), 0, 1)


def find_pairs(data: Path, parts: list[Part]) -> list[tuple[str, ImagePair]]:
    """(folder, pair) of those parts of the data that are there, in the order of names."""
    found = []
    for part in parts:
        if not (data / part.folder).is_dir():
            continue
        pairs = find_image_pairs(data / part.folder)
        kept = [pair for i, pair in enumerate(pairs[: part.stop]) if i >= part.start and part.holds(i)]
        found += [(part.folder.partition("/")[2], pair) for pair in kept]
    return found


def _shuffled(pairs: list[tuple[str, ImagePair]]) -> list[tuple[str, ImagePair]]:
    """The pairs in an order that their names alone decide."""
    return sorted(pairs, key=lambda found: zlib.crc32(f"{found[0]}/{found[1].name}".encode()))


def shows_same_place(a: Path, b: Path) -> bool:
    """Whether two visible images show something in common, by SIFT, which is reliable within one sensor."""
    points_a, points_b = named_proposer("sift")(load_image(a), load_image(b))
    _, inliers = estimate_homography(points_a, points_b)
    return int(inliers.sum()) >= COMMON


def shows_two_scenes(task: Task) -> bool:
    """Whether the visible images of the two pairs of an unrelated task show nothing in common."""
    return not shows_same_place(task.vis.vis, task.ir.vis)


def make_tasks(
    data: Path,
    sets: dict[str, list[Part]],
    *,
    strengths: list[str],
    limit: int | None = None,
    unrelated: int = 0,
    usable: Callable[[Task], bool] = lambda task: True,
    unlike: Callable[[Task], bool] = shows_two_scenes,
) -> list[Task]:
    """The tasks of these sets: each pair at each strength, then pairs of images of different scenes.

    Args:
        limit: pairs of each set, at most.
        unrelated: pairs of each set that show nothing in common.
        usable: whether the pair of a task can be measured; asked, in an order as good as random, until
            there are enough.
        unlike: whether the two pairs of a task show different scenes; asked as `usable` is.
    """
    tasks: list[Task] = []
    for name, parts in sets.items():
        every_pair = find_pairs(data, parts)
        candidates = (Task(name, subset, pair, pair, strengths[0]) for subset, pair in _shuffled(every_pair))
        chosen = itertools.islice(filter(usable, candidates), limit)
        tasks += [replace(task, strength=strength) for task in chosen for strength in strengths]
        rng = np.random.default_rng(0)
        seen: set[str] = set()
        for _ in range(20 * unrelated):
            if len(seen) == unrelated or len(every_pair) < 2:
                break
            (subset, vis), (_, ir) = (every_pair[i] for i in rng.choice(len(every_pair), 2, replace=False))
            task = Task(name, subset, vis, ir, UNRELATED)
            if task.key in seen or vis.ir.parent != ir.ir.parent:
                continue
            # Pictures of one walk, drive or flight may show the same place.
            if unlike(task):
                seen.add(task.key)
                tasks.append(task)
    return sorted(tasks, key=lambda task: zlib.crc32(task.key.encode()))  # a part of a run is a fair sample
