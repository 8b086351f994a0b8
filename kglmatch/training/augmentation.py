"""Augmentation of whole batches, on the device that holds them.

Flips and quarter turns act on both patches of a pair alike; everything else on each modality on its
own, since two sensors differ in just these ways: sharpness, tone, noise, and a remainder of
misregistration (small shift, scale, rotation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kglmatch.datasets import PATCH_SIZE

CONTEXT = 96
"""Side of the windows that patches are resampled from, so that turning one shows no border."""


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


def augment(
    vis: Tensor, ir: Tensor, settings: Augmentation, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Augments N pairs.

    Args:
        vis, ir: (N, 1, CONTEXT, CONTEXT) windows in [0, 1]; the patch is the middle.
        generator: source of every draw, on the windows' device.

    Returns:
        two (N, 1, 64, 64) batches in [0, 1].
    """
    turn = _turns(len(vis), settings, generator)
    vis = _resample(vis, turn @ _jitter(len(vis), settings, generator), settings)
    ir = _resample(ir, turn @ _jitter(len(ir), settings, generator), settings)
    if settings.speckle:
        amount = _uniform((len(ir), 1, 1, 1), 0, settings.speckle, generator)
        ir = ir * (1 + amount * _normal(ir.shape, generator))
    return _tone(vis, settings, generator), _tone(ir, settings, generator)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def _normal(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _turns(n: int, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """(N, 2, 2) of the eight symmetries of a square."""
    if not settings.flip:
        return torch.eye(2, device=generator.device).expand(n, 2, 2)
    quarter = torch.randint(0, 4, (n,), generator=generator, device=generator.device) * (math.pi / 2)
    cos, sin = quarter.cos().round(), quarter.sin().round()
    mirror = torch.randint(0, 2, (n,), generator=generator, device=generator.device) * 2.0 - 1
    return torch.stack([torch.stack([mirror * cos, -sin], 1), torch.stack([mirror * sin, cos], 1)], 1)


def _jitter(n: int, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """(N, 2, 3) small similarities: output pixel offsets from the centre -> input pixel offsets."""
    angle = _uniform((n,), -settings.rotation, settings.rotation, generator) * (math.pi / 180)
    log_scale = math.log1p(settings.scale)
    scale = _uniform((n,), -log_scale, log_scale, generator).exp()
    shift = _uniform((n, 2, 1), -settings.shift, settings.shift, generator)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    linear = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    return torch.cat([linear, shift], dim=2)


def _resample(windows: Tensor, transform: Tensor, settings: Augmentation) -> Tensor:
    """Bilinear resampling of windows (N, 1, CONTEXT, CONTEXT) into patches (N, 1, 64, 64)."""
    if not (settings.flip or settings.shift or settings.scale or settings.rotation):
        edge = (CONTEXT - PATCH_SIZE) // 2
        return windows[..., edge:-edge, edge:-edge]
    # affine_grid speaks in half widths of its output and grid_sample in those of its input.
    theta = transform * (PATCH_SIZE / CONTEXT)
    theta = torch.cat([theta[:, :, :2], transform[:, :, 2:] * (2 / CONTEXT)], dim=2)
    grid = F.affine_grid(theta, [len(windows), 1, PATCH_SIZE, PATCH_SIZE], align_corners=False)
    return F.grid_sample(windows, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _tone(x: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Blur, gamma, contrast, brightness and noise, one draw a patch."""
    n = len(x)
    each = (n, 1, 1, 1)
    if settings.blur:
        x = _blur(x, _uniform((n,), -settings.blur, settings.blur, generator).clamp_min(0))
    if settings.gamma:
        x = x.clamp(1e-4, 1).pow((settings.gamma * _normal(each, generator)).exp())
    if settings.contrast or settings.brightness:
        mean = x.mean(dim=(2, 3), keepdim=True)
        gain = _uniform(each, 1 - settings.contrast, 1 + settings.contrast, generator)
        x = mean + gain * (x - mean) + _uniform(each, -settings.brightness, settings.brightness, generator)
    if settings.noise:
        x = x + _uniform(each, 0, settings.noise, generator) * _normal(x.shape, generator)
    return x.clamp(0, 1)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, a sigma (N,) in pixels for each patch; 0 leaves a patch as it is."""
    radius = 3
    offset = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offset / sigma.clamp_min(1e-3)[:, None]).square())
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    # One group a patch: the batch becomes the channels.
    padded = F.pad(x, [radius] * 4, mode="replicate").transpose(0, 1)
    rows = F.conv2d(padded, kernel[:, None, :, None], groups=len(x))
    return F.conv2d(rows, kernel[:, None, None, :], groups=len(x)).transpose(0, 1)
