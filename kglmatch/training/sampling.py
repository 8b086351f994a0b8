"""Batches of matching patch pairs, cut and augmented on the device that trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kglmatch.datasets import MIN_NEGATIVE_DISTANCE
from kglmatch.options import PATCH_SIZE
from kglmatch.training.augmentation import Augmentation, Draws, augment
from kglmatch.training.data import TrainingSet
from kglmatch.training.parallel import ALONE, Processes
from kglmatch.training.simulation import simulate

_STREAMS = ("augmentation", "negatives", "simulation")
_PARTS = 2  # of a batch, each from one source, where there are several
_SHARE_OF_MEMORY = 0.5  # of what is free on the GPU that the images may take


@dataclass(frozen=True)
class Batch:
    """n of the N matching pairs of a batch: all of them, or those of one process of several.

    Attributes:
        vis, ir: (n, 1, P, P) float32 in [0, 1].
        same_place: (N, N) bool over the whole batch, true on the diagonal and where two patches of one
            image are nearer than the sampler's `min_distance`: such a pair is no negative.
        first: the row of the whole batch that comes first here.
    """

    vis: Tensor
    ir: Tensor
    same_place: Tensor
    first: int = 0

    @property
    def rows(self) -> slice:
        """The rows of the whole batch that these pairs are."""
        return slice(self.first, self.first + len(self.vis))


def step_generator(seed: int, step: int, stream: str, device: torch.device) -> torch.Generator:
    """Random numbers for one step that depend on nothing else; `stream` keeps their uses apart."""
    state = np.random.SeedSequence((seed, step, _STREAMS.index(stream))).generate_state(1, np.uint64)
    generator = torch.Generator(device)
    generator.manual_seed(int(state[0] >> np.uint64(1)))
    return generator


class PatchSampler:
    """Draws batches from scenes held as uint8: on the GPU if they fit, else in the CPU's memory.

    A batch depends on (seed, step) and on nothing else, so that a run can be resumed at any step and
    shared by any number of processes. An epoch visits each point of a source once, but for an incomplete
    last batch. Of several sources two make up a batch, half each, in the order that keeps each one's share
    nearest to its weight; they may be the same.

    Args:
        sources: the sources of the run: scenes, points and weights.
        batch_size: pairs a batch, at most the number of points of the smallest source, or twice that of
            several.
        patch_size: side of a patch, pixels.
        seed: of order and augmentation.
        min_distance: pixels; nearer points of one image are not each other's negatives.
        augmentation: what is done to the patches.
        device: where the batches are needed.
        processes: who shares each batch.
    """

    def __init__(
        self,
        sources: Sequence[TrainingSet],
        *,
        batch_size: int,
        augmentation: Augmentation,
        patch_size: int = PATCH_SIZE,
        seed: int = 0,
        min_distance: float = MIN_NEGATIVE_DISTANCE,
        device: str | torch.device = "cpu",
        processes: Processes = ALONE,
    ) -> None:
        self._parts = _PARTS if len(sources) > 1 else 1
        self._part_size = min(batch_size // self._parts, *(len(source.pairs) for source in sources))
        self.batch_size = self._part_size * self._parts
        self.patch_size = patch_size
        self.seed = seed
        self.min_distance = min_distance
        self.augmentation = augmentation
        self.device = torch.device(device)
        self.own_rows = processes.rows(self.batch_size)
        scenes = [scene for source in sources for scene in source.pairs.scenes]
        sizes = [scene.vis.size for scene in scenes]
        simulated = [colour for source in sources for colour in source.colours or ()]
        needed = 2 * sum(sizes) + sum(colour.size for colour in simulated)
        self.store = self.device if _fits(needed, self.device) else torch.device("cpu")
        self._vis = self._flat([scene.vis for scene in scenes])
        self._ir = self._flat([scene.ir for scene in scenes])
        first_scenes = np.cumsum([0, *(len(source.pairs.scenes) for source in sources)])
        first_points = np.cumsum([0, *(len(source.pairs) for source in sources)])
        index = np.concatenate(
            [source.pairs.scene_index + first for source, first in zip(sources, first_scenes, strict=False)]
        )
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])[index]
        shapes = np.array([scene.vis.shape for scene in scenes], np.int64)[index]
        self._offset = torch.from_numpy(offsets).to(self.store)
        self._height, self._width = torch.from_numpy(shapes).to(self.store).unbind(1)
        self._area = self._height * self._width
        self._scene = torch.from_numpy(index).to(self.store)
        self._points = torch.from_numpy(np.concatenate([source.pairs.points for source in sources])).to(
            self.store
        )
        # Colour is kept for simulated scenes alone; where it begins is of no meaning for other points.
        self._colour = self._flat(simulated)
        has_colour = np.concatenate([np.full(len(s.pairs.scenes), s.colours is not None) for s in sources])
        colour_sizes = np.where(has_colour, sizes, 0)
        starts = np.concatenate([[0], np.cumsum(3 * colour_sizes)[:-1]])[index]
        self._colour_offset = torch.from_numpy(starts).to(self.store)
        self._simulated = torch.from_numpy(has_colour[index]).to(self.store)
        self._ranges = list(zip(first_points[:-1].tolist(), first_points[1:].tolist(), strict=True))
        weights = np.array([source.weight for source in sources])
        self._weights = weights / weights.sum()
        self._order: list[int] = []  # the sources of the parts of all batches, in turn
        self._turn: list[int] = []  # for each of them, how often its source came before
        self._counts = np.zeros(len(sources), np.int64)
        self._epochs: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        """Batches that visit as many points as there are."""
        return len(self._points) // self.batch_size

    def rows(self, step: int) -> NDArray[np.int64]:
        """(N,) points of a step's whole batch, in each source's epoch's own random order."""
        parts = range(step * self._parts, (step + 1) * self._parts)
        return np.concatenate([self._part(part) for part in parts])

    def _part(self, part: int) -> NDArray[np.int64]:
        """The points of one part of a batch; parts are numbered through all batches."""
        while part >= len(self._order):
            source = int((self._weights * (len(self._order) + 1) - self._counts).argmax())
            self._turn.append(int(self._counts[source]))
            self._order.append(source)
            self._counts[source] += 1
        source = self._order[part]
        first, end = self._ranges[source]
        epoch, position = divmod(self._turn[part], (end - first) // self._part_size)
        if self._epochs.get(source, (-1,))[0] != epoch:
            seed = (self.seed, epoch, source) if source else (self.seed, epoch)
            self._epochs[source] = epoch, first + np.random.default_rng(seed).permutation(end - first)
        order = self._epochs[source][1]
        return order[position * self._part_size : (position + 1) * self._part_size]

    def batch(self, step: int) -> Batch:
        """The batch of a step, or this process's rows of it, on the device."""
        rows = torch.from_numpy(self.rows(step)).to(self.store)
        size = self.augmentation.window_size(self.patch_size)
        own = rows[self.own_rows]
        vis, ir = (self._windows(flat, self._offset[own], own, size) for flat in (self._vis, self._ir))
        # Without a simulated source nothing is asked of the GPU, which would have to wait.
        simulated = self._simulated[own] if len(self._colour) else self._simulated[:0]
        if simulated.any():
            generator = step_generator(self.seed, step, "simulation", self.device)
            draws = Draws(generator, len(rows), self.own_rows)
            ir[simulated.to(self.device)] = self._simulate(own, simulated, size, draws)
        vis, ir = augment(
            vis,
            ir,
            self.augmentation,
            step_generator(self.seed, step, "augmentation", self.device),
            patch_size=self.patch_size,
            total=len(rows),
            first=self.own_rows.start,
        )
        return Batch(vis, ir, self._same_place(rows).to(self.device), self.own_rows.start)

    def _simulate(self, own: Tensor, simulated: Tensor, size: int, draws: Draws) -> Tensor:
        """Windows of the simulated sensor for those of a process's own rows that have colour."""
        rows = own[simulated]
        planes = [
            self._windows(self._colour, self._colour_offset[rows] + k * self._area[rows], rows, size)
            for k in range(3)
        ]
        return simulate(torch.cat(planes, dim=1), draws.of(simulated.to(self.device)))

    def _flat(self, images: list[NDArray[np.uint8]]) -> Tensor:
        """Images in one row, colour ones plane by plane."""
        flat = [(image.transpose(2, 0, 1) if image.ndim == 3 else image).ravel() for image in images]
        return torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *flat])).to(self.store)

    def _windows(self, flat: Tensor, offset: Tensor, rows: Tensor, size: int) -> Tensor:
        """Windows (n, 1, size, size) in [0, 1] around points; outside the image, its edge continues.

        Args:
            flat: the pixels of all images.
            offset: (n,) where the image of each point begins there.
            rows: (n,) the points.
        """
        around = torch.arange(-(size // 2), size - size // 2, device=self.store)
        x = (self._points[rows, 0, None] + around).clamp_min(0).minimum(self._width[rows, None] - 1)
        y = (self._points[rows, 1, None] + around).clamp_min(0).minimum(self._height[rows, None] - 1)
        at = offset[:, None, None] + y[:, :, None] * self._width[rows, None, None] + x[:, None, :]
        windows = flat[at]
        if self.store != self.device:
            windows = windows.pin_memory().to(self.device, non_blocking=True)
        return windows.unsqueeze(1).float() / 255

    def _same_place(self, rows: Tensor) -> Tensor:
        # Whole numbers: float32 products err by pixels where coordinates reach the thousands.
        points = self._points[rows]
        squared = (points[:, None] - points[None]).square().sum(dim=2)
        near = squared < self.min_distance**2
        scene = self._scene[rows]
        same = near & (scene[:, None] == scene[None, :])
        return same | torch.eye(len(rows), dtype=torch.bool, device=self.store)


def _fits(size: int, device: torch.device) -> bool:
    """Whether images of `size` bytes should be kept on the device."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return size <= _SHARE_OF_MEMORY * free
