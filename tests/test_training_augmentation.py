"""Augmentation of batches: what moves together, what does not, and where every pixel goes."""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np
import pytest
import torch
from conftest import texture

from kglmatch.errors import ConfigError
from kglmatch.training import Augmentation, augment
from kglmatch.training.augmentation import Draws, blur, draw_jitter, draw_turns, resample

NONE = Augmentation.none()
ALL = Augmentation(speckle=0.2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def windows(n, size, seed=0):
    return torch.from_numpy(np.stack([texture(size, size, seed + i) for i in range(n)])).unsqueeze(1)


def turned(patch):
    """The eight symmetric copies of a patch (P, P)."""
    return [copy for k in range(4) for copy in (patch.rot90(k), patch.rot90(k).T)]


def test_everything_off_gives_the_patches_back():
    vis, ir = windows(3, 32), windows(3, 32, seed=9)
    assert NONE.window_size(32) == 32 and not NONE.moves
    out = augment(vis, ir, NONE, generator(), patch_size=32)
    assert torch.equal(out[0], vis) and torch.equal(out[1], ir)


def test_flips_act_on_both_alike_and_nothing_else_does():
    patches = windows(40, 32)
    flips = dataclasses.replace(NONE, flip=True)
    vis, ir = augment(patches, patches, flips, generator(), patch_size=32)
    assert torch.equal(vis, ir)
    kinds = []
    for before, after in zip(patches[:, 0], vis[:, 0], strict=True):
        errors = [(copy - after).abs().max().item() for copy in turned(before)]
        assert min(errors) < 1e-4
        kinds.append(int(np.argmin(errors)))
    assert set(kinds) == set(range(8))
    for name in ("shift", "scale", "rotation", "gamma", "contrast", "brightness", "blur", "noise"):
        alone = dataclasses.replace(NONE, **{name: getattr(Augmentation(), name)})
        large = windows(8, alone.window_size(32))
        vis, ir = augment(large, large, alone, generator(), patch_size=32)
        assert (vis - ir).abs().amax(dim=(1, 2, 3)).gt(1e-4).sum() >= 2, name


def test_speckle_is_the_second_sensors():
    patches = windows(8, 32)
    speckle = dataclasses.replace(NONE, speckle=0.3)
    vis, ir = augment(patches, patches, speckle, generator(), patch_size=32)
    assert torch.equal(vis, patches) and not torch.allclose(ir, patches, atol=1e-2)
    # Multiplicative: black stays black.
    black = torch.zeros(2, 1, 32, 32)
    assert augment(black, black, speckle, generator(), patch_size=32)[1].abs().max() == 0


@pytest.mark.parametrize("patch_size", [16, 64])
def test_shape_range_and_determinism(patch_size):
    size = ALL.window_size(patch_size)
    vis, ir = windows(5, size), windows(5, size, seed=7)
    vis[0], ir[0], vis[1], ir[1] = 0, 0, 1, 1
    first = augment(vis, ir, ALL, generator(3), patch_size=patch_size)
    for out in first:
        assert out.shape == (5, 1, patch_size, patch_size)
        assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1
    again = augment(vis, ir, ALL, generator(3), patch_size=patch_size)
    other = augment(vis, ir, ALL, generator(4), patch_size=patch_size)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("first", [0, 4])
def test_some_rows_of_a_batch_are_those_of_the_whole(first):
    size = ALL.window_size(32)
    vis, ir = windows(8, size), windows(8, size, seed=50)
    whole = augment(vis, ir, ALL, generator(), patch_size=32)
    rows = slice(first, first + 4)
    part = augment(vis[rows], ir[rows], ALL, generator(), patch_size=32, total=8, first=first)
    for a, b in zip(part, whole, strict=True):
        assert torch.allclose(a, b[rows], atol=1e-6)


def test_a_shift_moves_the_content_by_its_pixels():
    window = windows(1, 48)
    for x, y in ((0, 0), (3, 0), (0, -5), (-2, 4)):
        transform = torch.tensor([[[1.0, 0.0, x], [0.0, 1.0, y]]])
        patch = resample(window, transform, 32)[0, 0]
        assert torch.allclose(patch, window[0, 0, 8 + y : 40 + y, 8 + x : 40 + x], atol=1e-5), (x, y)
    # Half a pixel: the mean of two.
    patch = resample(window, torch.tensor([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]]), 32)[0, 0]
    expected = (window[0, 0, 8:40, 8:40] + window[0, 0, 8:40, 9:41]) / 2
    assert torch.allclose(patch, expected, atol=1e-5)


def test_rotation_and_scale_are_those_of_opencv():
    window = windows(1, 64)
    angle, scale = math.radians(7), 1.1
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    linear = np.array([[cos, -sin], [sin, cos]])
    transform = torch.from_numpy(np.hstack([linear, [[0.0], [0.0]]])).float()[None]
    patch = resample(window, transform, 32)[0, 0].numpy()
    # From a patch's pixel to the window's, both counted from the corner.
    offset = np.full(2, 31.5) - linear @ np.full(2, 15.5)
    affine = np.hstack([linear, offset[:, None]])
    expected = cv2.warpAffine(
        window[0, 0].numpy(), affine, (32, 32), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    )
    np.testing.assert_allclose(patch, expected, atol=0.02)  # OpenCV rounds positions to 1/32 pixel


def test_strengths_are_the_limits_of_what_is_drawn():
    settings = Augmentation(shift=2.0, scale=0.1, rotation=5.0)
    jitter = draw_jitter(Draws(generator(), 4000, slice(0, 4000)), settings)
    scale = torch.linalg.det(jitter[:, :, :2]).sqrt()
    angle = torch.rad2deg(torch.atan2(jitter[:, 1, 0], jitter[:, 0, 0]))
    assert jitter[:, :, 2].abs().max() <= 2 and jitter[:, :, 2].abs().max() > 1.98
    assert 1 / 1.1 - 1e-4 <= scale.min() < 0.92 and 1.09 < scale.max() <= 1.1 + 1e-4
    assert 4.95 < angle.abs().max() <= 5 + 1e-3
    turns = draw_turns(Draws(generator(), 500, slice(0, 500)), settings)
    assert len(turns.unique(dim=0)) == 8 and turns.abs().sum(1).eq(1).all()


def test_no_patch_shows_what_lies_outside_its_window():
    settings = Augmentation(shift=6.0, scale=0.3, rotation=30.0)
    size = settings.window_size(32)
    draws = Draws(generator(), 2000, slice(0, 2000))
    transform = draw_turns(draws, settings) @ draw_jitter(draws, settings)
    corners = torch.tensor([[x, y, 1.0] for x in (-15.5, 15.5) for y in (-15.5, 15.5)]).T
    assert (transform @ corners).abs().max() <= (size - 1) / 2


def test_blur_is_opencvs():
    patches = windows(4, 32)
    sigma = torch.tensor([0.0, 0.5, 0.9, 1.2])
    out = blur(patches, sigma, 1.2)
    assert torch.allclose(out[0], patches[0])
    for i in (1, 2, 3):
        expected = cv2.GaussianBlur(
            patches[i, 0].numpy(), (9, 9), float(sigma[i]), borderType=cv2.BORDER_REPLICATE
        )
        np.testing.assert_allclose(out[i, 0], expected, atol=1e-4)


def test_wrong_strengths_are_errors():
    with pytest.raises(ConfigError, match="blur must be a number of at least 0, got -1"):
        Augmentation(blur=-1)
    with pytest.raises(ConfigError, match="noise"):
        Augmentation(noise=math.nan)
    with pytest.raises(ConfigError, match="contrast"):
        Augmentation(contrast=1.5)
