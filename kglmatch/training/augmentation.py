"""Augmentation of whole batches, on the device that holds them.

Flips and quarter turns act on both patches of a pair alike. Everything else acts on each modality on
its own, since two sensors differ in just these ways: sharpness, tone, noise, and a remainder of
misregistration (small shift, scale and rotation: the patch is another crop of its surroundings).

One random number is drawn for each pair of the whole batch, also by a process that holds only some of
its rows, so that a batch does not depend on how many processes share it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from kglmatch.errors import ConfigError


@dataclass(frozen=True)
class Augmentation:
    """How strong each part is; 0 (or False) switches it off.

    Args:
        flip: flips and quarter turns, of both patches together.
        shift: pixels, uniform in +-shift for each axis.
        scale: relative, log-uniform in 1 / (1 + scale) .. 1 + scale.
        rotation: degrees, uniform in +-rotation.
        gamma: standard deviation of the logarithm of the exponent.
        contrast: relative, uniform in 1 +- contrast, about the patch's mean.
        brightness: uniform in +-brightness, in units of the full range.
        blur: largest standard deviation of a Gaussian, pixels; half of the patches are blurred.
        noise: largest standard deviation of Gaussian noise, in units of the full range.
        speckle: largest standard deviation of multiplicative noise, on the second sensor only (radar).

    Raises:
        ConfigError: a negative or infinite strength, or a contrast above 1.
    """

    flip: bool = True
    shift: float = 1.5
    scale: float = 0.06
    rotation: float = 4.0
    gamma: float = 0.25
    contrast: float = 0.2
    brightness: float = 0.08
    blur: float = 1.2
    noise: float = 0.03
    speckle: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"augmentation: {field.name} must be a number of at least 0, got {value}")
        if self.contrast > 1:
            raise ConfigError(f"augmentation: contrast must be in [0, 1], got {self.contrast}")

    @classmethod
    def none(cls) -> Augmentation:
        """Everything off: patches are used as they were cut."""
        return cls(
            flip=False,
            shift=0,
            scale=0,
            rotation=0,
            gamma=0,
            contrast=0,
            brightness=0,
            blur=0,
            noise=0,
            speckle=0,
        )

    @property
    def moves(self) -> bool:
        """Whether patches are resampled one by one, and thus need their surroundings."""
        return bool(self.shift or self.scale or self.rotation)

    def window_size(self, patch_size: int) -> int:
        """Side in pixels of the windows that `augment` takes: none of its patches shows a border."""
        if not self.moves:
            return patch_size
        angle = math.radians(min(self.rotation, 45.0))
        reach = patch_size / 2 * (1 + self.scale) * (math.cos(angle) + math.sin(angle)) + self.shift
        return 2 * math.ceil(reach + 1)


@dataclass(frozen=True)
class Draws:
    """Random numbers for some rows of a batch, cut out of those for the whole batch.

    Args:
        generator: source of every draw, on the device of the patches.
        total: rows of the whole batch.
        rows: which of them are wanted.
        chosen: (n,) bool mask over these; None takes all.
    """

    generator: torch.Generator
    total: int
    rows: slice
    chosen: Tensor | None = None

    def of(self, chosen: Tensor) -> Draws:
        """The same draws for some of the rows, given by a mask (n,) bool."""
        return replace(self, chosen=chosen)

    def _select(self, drawn: Tensor) -> Tensor:
        own = drawn[self.rows]
        return own if self.chosen is None else own[self.chosen]

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """(rows, *shape) float32, uniform in [low, high)."""
        device = self.generator.device
        drawn = torch.rand((self.total, *shape), generator=self.generator, device=device)
        return self._select(drawn) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """(rows, *shape) float32 of mean 0 and standard deviation 1."""
        device = self.generator.device
        return self._select(torch.randn((self.total, *shape), generator=self.generator, device=device))

    def integers(self, count: int) -> Tensor:
        """(rows,) int64 of 0 .. count - 1."""
        device = self.generator.device
        return self._select(torch.randint(count, (self.total,), generator=self.generator, device=device))


def augment(
    vis: Tensor,
    ir: Tensor,
    settings: Augmentation,
    generator: torch.Generator,
    *,
    patch_size: int,
    total: int | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Augments N pairs.

    Args:
        vis, ir: (N, 1, W, W) windows in [0, 1], W as `settings.window_size` says; the patch is the middle.
        generator: source of every draw, on the windows' device.
        patch_size: side of the patches in pixels.
        total: pairs of the whole batch, if these are only some of its rows; N if None.
        first: the row of the whole batch that comes first here.

    Returns:
        two (N, 1, patch_size, patch_size) batches in [0, 1].
    """
    draws = Draws(generator, len(vis) if total is None else total, slice(first, first + len(vis)))
    if settings.flip or settings.moves:
        turn = draw_turns(draws, settings)
        vis = resample(vis, turn @ draw_jitter(draws, settings), patch_size)
        ir = resample(ir, turn @ draw_jitter(draws, settings), patch_size)
    if settings.speckle:
        amount = draws.uniform(0, settings.speckle, 1, 1, 1)
        ir = ir * (1 + amount * draws.normal(1, patch_size, patch_size))
    return change_tone(vis, settings, draws), change_tone(ir, settings, draws)


def draw_turns(draws: Draws, settings: Augmentation) -> Tensor:
    """(N, 2, 2), each one of the eight symmetries of a square (the identity, if flips are off)."""
    if not settings.flip:
        return torch.eye(2, device=draws.generator.device)
    quarter = draws.integers(4) * (math.pi / 2)
    cos, sin = quarter.cos().round(), quarter.sin().round()
    mirror = draws.integers(2) * 2.0 - 1
    return torch.stack([torch.stack([mirror * cos, -sin], 1), torch.stack([mirror * sin, cos], 1)], 1)


def draw_jitter(draws: Draws, settings: Augmentation) -> Tensor:
    """(N, 2, 3) small similarities in pixels, see `resample`."""
    angle = torch.deg2rad(draws.uniform(-settings.rotation, settings.rotation))
    log_scale = math.log1p(settings.scale)
    scale = draws.uniform(-log_scale, log_scale).exp()
    shift = draws.uniform(-settings.shift, settings.shift, 2, 1)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    linear = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    return torch.cat([linear, shift], dim=2)


def resample(windows: Tensor, transform: Tensor, patch_size: int) -> Tensor:
    """Cuts patches out of windows by affine transforms, bilinear; outside, the border continues.

    Args:
        windows: (N, 1, W, W).
        transform: (N, 2, 3); takes a patch's pixel (x, y), counted from the patch's centre, to the
            window's pixel, counted from the window's centre.
        patch_size: P.

    Returns:
        (N, 1, P, P).
    """
    size = windows.shape[-1]
    # affine_grid counts in half widths of its output, grid_sample in half widths of its input.
    linear, shift = transform[:, :, :2] * (patch_size / size), transform[:, :, 2:] * (2 / size)
    theta = torch.cat([linear, shift], dim=2)
    grid = F.affine_grid(theta, [len(windows), 1, patch_size, patch_size], align_corners=False)
    return F.grid_sample(windows, grid, mode="bilinear", padding_mode="border", align_corners=False)


def change_tone(x: Tensor, settings: Augmentation, draws: Draws) -> Tensor:
    """Blur, gamma, contrast, brightness and noise of patches (N, 1, P, P), one draw a patch."""
    if settings.blur:
        x = blur(x, draws.uniform(-settings.blur, settings.blur).clamp_min(0), settings.blur)
    if settings.gamma:
        x = x.clamp(1e-4, 1).pow((settings.gamma * draws.normal(1, 1, 1)).exp())
    if settings.contrast:
        mean = x.mean(dim=(2, 3), keepdim=True)
        x = mean + draws.uniform(1 - settings.contrast, 1 + settings.contrast, 1, 1, 1) * (x - mean)
    if settings.brightness:
        x = x + draws.uniform(-settings.brightness, settings.brightness, 1, 1, 1)
    if settings.noise:
        x = x + draws.uniform(0, settings.noise, 1, 1, 1) * draws.normal(*x.shape[1:])
    return x.clamp(0, 1)


def blur(x: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian blur of patches (N, 1, P, P), each by its own sigma.

    Args:
        sigma: (N,) pixels; 0 leaves a patch as it is.
        largest: no sigma is larger; the kernel ends at three times this.
    """
    radius = max(1, math.ceil(3 * largest))
    offset = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offset / sigma.clamp_min(1e-3)[:, None]).square())
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    for axis in (2, 3):
        pad = [radius, radius, 0, 0] if axis == 3 else [0, 0, radius, radius]
        padded, size = F.pad(x, pad, mode="replicate"), x.shape[axis]
        x = torch.zeros_like(x)
        # Shifted copies add up faster than a convolution with one group a patch does.
        for k in range(2 * radius + 1):
            x.addcmul_(padded.narrow(axis, k, size), kernel[:, k, None, None, None])
    return x
