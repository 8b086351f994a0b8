"""Batches of matching patch pairs, cut and augmented on the device that trains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kglmatch.datasets import MIN_NEGATIVE_DISTANCE, PATCH_SIZE, ScenePairs
from kglmatch.training.augmentation import Augmentation, augment
from kglmatch.training.parallel import ALONE, Processes

_STREAMS = ("augmentation", "negatives")
_SHARE_OF_MEMORY = 0.5  # of what is free on the GPU; the images may take so much of it


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
        """Where these pairs lie in the whole batch."""
        return slice(self.first, self.first + len(self.vis))


def step_generator(seed: int, step: int, stream: str, device: torch.device) -> torch.Generator:
    """Random numbers for one step that depend on nothing else; `stream` keeps their uses apart."""
    words = np.random.SeedSequence((seed, step, _STREAMS.index(stream))).generate_state(1, np.uint64)
    generator = torch.Generator(device)
    generator.manual_seed(int(words[0] >> np.uint64(1)))
    return generator


class PatchSampler:
    """Draws batches from scenes held as uint8: on the GPU if they fit, else in the CPU's memory.

    A batch depends on (seed, step) and on nothing else, so that a run can be resumed at any step and
    shared by any number of processes. An epoch visits each point once, but for an incomplete last batch.

    Args:
        pairs: scenes and points.
        batch_size: pairs a batch, at most the number of points.
        patch_size: side of a patch, pixels.
        seed: of order and augmentation.
        min_distance: pixels; nearer points of one image are not each other's negatives.
        augmentation: what is done to the patches.
        device: where the batches are needed.
        processes: who shares each batch.
    """

    def __init__(
        self,
        pairs: ScenePairs,
        *,
        batch_size: int,
        augmentation: Augmentation,
        patch_size: int = PATCH_SIZE,
        seed: int = 0,
        min_distance: float = MIN_NEGATIVE_DISTANCE,
        device: str | torch.device = "cpu",
        processes: Processes = ALONE,
    ) -> None:
        self.batch_size = min(batch_size, len(pairs))
        self.patch_size = patch_size
        self.seed = seed
        self.min_distance = min_distance
        self.augmentation = augmentation
        self.device = torch.device(device)
        self.own_rows = processes.rows(self.batch_size)
        sizes = [scene.vis.size for scene in pairs.scenes]
        self.store = self.device if _fits(2 * sum(sizes), self.device) else torch.device("cpu")
        self._vis = self._flat([scene.vis for scene in pairs.scenes])
        self._ir = self._flat([scene.ir for scene in pairs.scenes])
        index = pairs.scene_index
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])[index]
        shapes = np.array([scene.vis.shape for scene in pairs.scenes], np.int64)[index]
        self._offset = torch.from_numpy(offsets).to(self.store)
        self._height, self._width = torch.from_numpy(shapes).to(self.store).unbind(1)
        self._scene = torch.from_numpy(index).to(self.store)
        self._points = torch.from_numpy(pairs.points).to(self.store)
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._points) // self.batch_size

    def rows(self, step: int) -> NDArray[np.int64]:
        """(N,) points of a step's whole batch, in the epoch's own random order."""
        epoch, position = divmod(step, len(self))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self._points))
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]

    def batch(self, step: int) -> Batch:
        """The batch of a step, or this process's rows of it, on the device."""
        rows = torch.from_numpy(self.rows(step)).to(self.store)
        size = self.augmentation.window_size(self.patch_size)
        vis, ir = (self._windows(flat, rows[self.own_rows], size) for flat in (self._vis, self._ir))
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

    def _flat(self, images: list[NDArray[np.uint8]]) -> Tensor:
        return torch.from_numpy(np.concatenate([image.ravel() for image in images])).to(self.store)

    def _windows(self, flat: Tensor, rows: Tensor, size: int) -> Tensor:
        """Windows (n, 1, size, size) in [0, 1] around points; outside the image, its edge goes on."""
        around = torch.arange(-(size // 2), size - size // 2, device=self.store)
        x = (self._points[rows, 0, None] + around).clamp_min(0).minimum(self._width[rows, None] - 1)
        y = (self._points[rows, 1, None] + around).clamp_min(0).minimum(self._height[rows, None] - 1)
        at = self._offset[rows, None, None] + y[:, :, None] * self._width[rows, None, None] + x[:, None, :]
        windows = flat[at]
        if self.store != self.device:
            windows = windows.pin_memory().to(self.device, non_blocking=True)
        return windows.unsqueeze(1).float() / 255

    def _same_place(self, rows: Tensor) -> Tensor:
        points = self._points[rows].float()
        near = torch.cdist(points, points) < self.min_distance
        scene = self._scene[rows]
        same = near & (scene[:, None] == scene[None, :])
        return same | torch.eye(len(rows), dtype=torch.bool, device=self.store)


def _fits(size: int, device: torch.device) -> bool:
    """Whether so many bytes of images should lie on the device."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return size <= _SHARE_OF_MEMORY * free
