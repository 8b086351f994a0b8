"""Batches of matching patch pairs, cut and augmented on the device that trains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kglmatch.datasets import PATCH_SIZE, ScenePairs
from kglmatch.training.augmentation import CONTEXT, Augmentation, augment


@dataclass(frozen=True)
class Batch:
    """N matching pairs.

    Attributes:
        vis, ir: (N, 1, 64, 64) float32 in [0, 1].
        same_place: (N, N) bool, true on the diagonal and where two patches of one image are nearer
            than the sampler's `min_distance`: such a pair is no negative.
    """

    vis: Tensor
    ir: Tensor
    same_place: Tensor


class PatchSampler:
    """Draws batches from scenes held as uint8 on the device.

    A batch depends on (seed, step) and on nothing else, so that a run can be resumed at any step. An
    epoch visits each point once.

    Args:
        pairs: scenes and points.
        batch_size: pairs a batch, at most the number of points.
        min_distance: pixels; nearer points of one image are not each other's negatives.
        augmentation: what is done to the patches; None cuts them as they are.
    """

    def __init__(
        self,
        pairs: ScenePairs,
        *,
        batch_size: int,
        seed: int = 0,
        min_distance: float = 8.0,
        augmentation: Augmentation | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.batch_size = min(batch_size, len(pairs))
        self.seed = seed
        self.min_distance = min_distance
        self.augmentation = augmentation
        self.device = torch.device(device)
        sizes = [scene.vis.size for scene in pairs.scenes]
        self._vis = self._flat([scene.vis for scene in pairs.scenes])
        self._ir = self._flat([scene.ir for scene in pairs.scenes])
        index = pairs.scene_index
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])[index]
        shapes = np.array([scene.vis.shape for scene in pairs.scenes])[index]
        self._offset = torch.from_numpy(offsets).to(self.device)
        self._height, self._width = torch.from_numpy(shapes.astype(np.int64)).to(self.device).unbind(1)
        self._scene = torch.from_numpy(index).to(self.device)
        self._points = torch.from_numpy(pairs.points).to(self.device)

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._points) // self.batch_size

    def _flat(self, images: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([image.ravel() for image in images])).to(self.device)

    def rows(self, step: int) -> Tensor:
        """(N,) points of a step, in the epoch's own random order."""
        epoch, position = divmod(step, len(self))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self._points))
        start = position * self.batch_size
        return torch.from_numpy(order[start : start + self.batch_size]).to(self.device)

    def _cut(self, flat: Tensor, rows: Tensor, size: int) -> Tensor:
        """uint8 windows (N, size, size) around points; what lies outside the image repeats its edge."""
        around = torch.arange(-(size // 2), size - size // 2, device=self.device)
        x = (self._points[rows, 0, None] + around).clamp_min(0).minimum(self._width[rows, None] - 1)
        y = (self._points[rows, 1, None] + around).clamp_min(0).minimum(self._height[rows, None] - 1)
        at = self._offset[rows, None, None] + y[:, :, None] * self._width[rows, None, None] + x[:, None, :]
        return flat[at]

    def batch(self, step: int, part: slice = slice(None)) -> Batch:
        """The batch of a step; `part` cuts out the rows of one process of several."""
        rows = self.rows(step)[part]
        same_place = self._same_place(rows)
        size = PATCH_SIZE if self.augmentation is None else CONTEXT
        vis, ir = (self._cut(flat, rows, size).unsqueeze(1).float() / 255 for flat in (self._vis, self._ir))
        if self.augmentation is not None:
            generator = torch.Generator(self.device)
            draw = np.random.SeedSequence((self.seed, step, part.start or 0)).generate_state(1, np.uint64)
            generator.manual_seed(int(draw[0] >> 1))
            vis, ir = augment(vis, ir, self.augmentation, generator)
        return Batch(vis, ir, same_place)

    def _same_place(self, rows: Tensor) -> Tensor:
        points = self._points[rows].float()
        near = torch.cdist(points, points) < self.min_distance
        scene = self._scene[rows]
        return near & (scene[:, None] == scene[None, :])
