"""The local correction: known fields recovered, unsupported ones refused, none folded; saved and applied."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from kglmatch.batch.transforms import apply_transform, read_saved_transform
from kglmatch.errors import DataError
from kglmatch.images import load_image
from kglmatch.registration import local
from kglmatch.registration.displacement import DisplacementField, LocalCorrection
from kglmatch.registration.evidence import tie_points_of
from kglmatch.registration.files import registration_to_dict, save_json
from kglmatch.registration.local import correct
from kglmatch.registration.results import Registration
from kglmatch.resampling import covered_by, warp_around_nodata, warp_image

SIDE = 256
DATA = Path(__file__).resolve().parents[1] / "examples/data"


def wave(side: int = SIDE, amplitude: float = 4.0, wavelength: float = 200.0) -> np.ndarray:
    """(side, side, 2): a smooth displacement that no affine explains."""
    y, x = np.mgrid[:side, :side]
    k = 2 * np.pi / wavelength
    return amplitude * np.stack([np.sin(k * y), np.cos(k * x)], axis=2).astype(np.float32)


def moved(image: np.ndarray, field: np.ndarray) -> np.ndarray:
    """The image whose pixel x shows what `image` shows at x + field(x)."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float32)
    places = x + field[..., 0], y + field[..., 1]
    return cv2.remap(image, *places, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT).clip(0, 1)


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Red and near infrared of one place."""
    vis, ir = (load_image(DATA / f"sentinel2_{band}.tif") for band in ("red", "nir"))
    return vis[100 : 100 + SIDE, 60 : 60 + SIDE], ir[100 : 100 + SIDE, 60 : 60 + SIDE]


@pytest.fixture(scope="module")
def corrected(pair) -> LocalCorrection:
    vis, ir = pair
    return correct(moved(vis, wave()), ir, np.eye(3))


def registration(correction: LocalCorrection | None, transform: np.ndarray, side: int = SIDE) -> Registration:
    points, values = np.empty((0, 2), np.float32), np.empty(0, np.float32)
    return Registration(
        "registered", 0.9, transform, "affine", points, points, values, values, np.empty(0, bool),
        1.0, 0.9, 0, (side, side), (side, side), correction=correction,
    )  # fmt: skip


def smooth_field(seed: int = 0, side: int = SIDE, amplitude: float = 3.0) -> DisplacementField:
    control = np.random.default_rng(seed).normal(0, amplitude, (8, 9, 2))
    return DisplacementField(control, (side, side))


def applied(field: DisplacementField) -> LocalCorrection:
    none = np.empty((0, 2))
    return LocalCorrection(field, "", none, none, np.empty(0), 0.1, 9.0)


# --- the fit --------------------------------------------------------------------------------------


def test_a_known_smooth_field_is_recovered(corrected):
    # The visible image was moved by the field, and its pixel x is where the ir image has x + field(x).
    assert corrected.reason == "" and corrected.field is not None
    inner = slice(16, -16)
    left = np.linalg.norm(wave()[inner, inner], axis=2)
    off = np.linalg.norm((corrected.field.dense() - wave())[inner, inner], axis=2)
    assert np.median(off) < 0.6 and np.median(left) > 3
    assert np.percentile(off, 90) < 1.2
    assert corrected.gain > 0.02 and corrected.significance > 6
    low, high = corrected.field.folding()
    assert 0.3 < low < 1 < high < 3


def test_a_pair_without_displacement_keeps_its_transform(pair):
    found = correct(*pair, np.eye(3))
    assert found.field is None and found.reason.startswith("no clear gain on held-out windows")
    assert found.significance < 4 or found.gain < 0.012


def test_images_that_have_nothing_in_common_are_refused(pair):
    found = correct(pair[0], np.ascontiguousarray(pair[1][::-1].T), np.eye(3))
    assert found.field is None and found.reason


@pytest.mark.parametrize("side", [64, 90])
def test_too_few_windows_are_refused(pair, side):
    vis, ir = (np.ascontiguousarray(image[:side, :side]) for image in pair)
    shifted = np.array([[1, 0, 0.8 * side], [0, 1, 0], [0, 0, 1]])
    found = correct(vis, ir, shifted)
    assert found.field is None and found.reason.startswith("too few")


def test_a_field_that_would_fold_is_refused(pair, monkeypatch):
    vis, ir = pair
    tries = []
    fit_all = local._fit_all

    def counted(*args):
        tries.append(args[4])
        return fit_all(*args)

    monkeypatch.setattr(local, "_FOLD", (0.999, 1.001))
    monkeypatch.setattr(local, "_held_out", lambda *args: (0.1, 9.0))
    monkeypatch.setattr(local, "_fit_all", counted)
    found = correct(moved(vis, wave()), ir, np.eye(3))
    assert found.field is None and found.reason.startswith("the field would fold: areas change by")
    assert tries == [1.0, 4.0, 16.0]  # stiffer each time


def test_a_field_is_zero_away_from_evidence(pair):
    vis, ir = pair
    field = np.zeros((SIDE, SIDE, 2), np.float32)
    field[..., 0] = 3
    whole = local._Pair(moved(vis, field), ir, np.eye(3))
    start = DisplacementField.zero((SIDE, SIDE), (12, 12))
    measured = whole.measure(start, local.passes(SIDE)[0])
    half = measured[measured.points[:, 0] < SIDE / 3]
    fitted = local._fit(half, start, local._Penalty(start.cells), (2.0, 1.0), 1.0).dense()
    assert np.median(fitted[:, : SIDE // 4, 0]) > 2.5
    assert np.abs(fitted[:, -SIDE // 6 :]).max() < 0.7


# --- the field ------------------------------------------------------------------------------------


def test_the_jacobian_is_the_derivative_and_the_inverse_inverts():
    field = smooth_field()
    points = np.random.default_rng(1).uniform(5, SIDE - 5, (40, 2))
    for axis in (0, 1):
        step = np.eye(2)[axis] * 1e-4
        slope = (field.at(points + step) - field.at(points - step)) / 2e-4 + np.eye(2)[axis]
        np.testing.assert_allclose(field.jacobian_at(points)[:, :, axis], slope, atol=1e-8)
    found = field.inverse_at(points)
    np.testing.assert_allclose(found + field.at(found), points, atol=1e-3)
    determinants = np.linalg.det(field.jacobian_at(points))
    low, high = field.folding()
    assert low - 1e-3 <= determinants.min() and determinants.max() <= high + 1e-3
    assert smooth_field(amplitude=80.0).folding()[0] < 0  # which folds
    assert field.at(np.empty((0, 2))).shape == field.inverse_at(np.empty((0, 2))).shape == (0, 2)


def test_a_field_has_the_same_effect_at_any_resolution():
    field = smooth_field()
    double = field.resized((2 * SIDE, 2 * SIDE))
    points = np.random.default_rng(1).uniform(0, SIDE - 1, (20, 2))
    np.testing.assert_allclose(double.at(2 * points + 0.5), 2 * field.at(points), atol=1e-9)
    assert field.dense((40, 30)).shape == (30, 40, 2)
    np.testing.assert_allclose(field.dense()[20, 30], field.at(np.array([[30.0, 20]]))[0], atol=1e-5)
    assert 0 < field.largest() <= np.linalg.norm(field.control, axis=2).max()


def test_a_field_survives_json():
    field = smooth_field()
    again = DisplacementField.from_dict(json.loads(json.dumps(field.to_dict())))
    assert again.size == field.size
    np.testing.assert_allclose(again.control, field.control, atol=1e-6)


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"size": [9, 9], "control": [[1]]},
        {"size": [9, 0], "control": np.zeros((5, 5, 2)).tolist()},
        {"size": [9], "control": np.zeros((5, 5, 2)).tolist()},
        {"size": [9, 9], "control": np.full((5, 5, 2), np.nan).tolist()},
        {"size": [9, 9], "control": np.zeros((3, 5, 2)).tolist()},
    ],
)
def test_a_damaged_field_is_one_error(value):
    with pytest.raises(DataError):
        DisplacementField.from_dict(value)


# --- warping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.int32, np.float64, bool])
def test_pixels_of_every_type_are_displaced_alike(dtype):
    field = smooth_field(side=96)
    smooth = cv2.GaussianBlur(np.random.default_rng(0).random((96, 96)), (0, 0), 4)
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    image = smooth > 0.5 if dtype is bool else (smooth * 200).astype(dtype)
    found = warp_image(image, np.eye(3), (96, 96), displacement=field.on_grid)
    y, x = np.mgrid[:96, :96].astype(np.float32)
    places = np.stack([x, y], axis=2) + field.dense()
    inside = ((places >= 0) & (places <= 95)).all(axis=2)
    assert found.dtype == image.dtype and not found[~inside].any()
    flags = cv2.INTER_NEAREST if dtype is bool else cv2.INTER_CUBIC
    expected = cv2.remap(image.astype(np.float32), places, None, flags, borderMode=cv2.BORDER_REPLICATE)
    off = np.abs(found[inside].astype(float) - expected[inside])
    assert (off > 1.5).mean() < 0.01
    both = covered_by(np.eye(3), (96, 96), np.ones((96, 96), bool), displacement=field.on_grid)
    assert (both == inside).mean() > 0.99


def test_pixels_without_data_do_not_mix_into_displaced_ones():
    image = np.full((80, 80), 100, np.uint16)
    image[30:40, 30:40] = 9
    field = smooth_field(side=80)
    found = warp_around_nodata(image, np.eye(3), (80, 80), nodata=9, displacement=field.on_grid)
    assert set(np.unique(found)) == {9, 100}


def test_a_displacement_over_several_tiles_has_no_seam(monkeypatch):
    field = smooth_field(side=96)
    image = np.random.default_rng(0).random((96, 96)).astype(np.float32)
    whole = warp_image(image, np.eye(3), (96, 96), displacement=field.on_grid)
    monkeypatch.setattr("kglmatch.resampling._DISPLACED_TILE", 40)
    np.testing.assert_allclose(
        warp_image(image, np.eye(3), (96, 96), displacement=field.on_grid), whole, atol=1e-4
    )


def test_warp_applies_transform_and_field_in_one_step(corrected, pair):
    ir = pair[1]
    shift = np.array([[1, 0, 7.0], [0, 1, -3], [0, 0, 1]])
    shifted = cv2.warpAffine(ir, shift[:2], (SIDE, SIDE), flags=cv2.INTER_CUBIC)
    found = registration(corrected, shift)
    at_once = found.warp(shifted)
    by_field = corrected.field.apply(ir)
    inner = np.s_[24:-24, 24:-24]
    np.testing.assert_allclose(at_once[inner], by_field[inner], atol=0.03)
    assert found.covered()[inner].all() and not found.covered().all()
    # and that is what the visible image shows there
    assert (
        np.abs(by_field - moved(ir, wave()))[inner].mean()
        < 0.4 * np.abs(ir - moved(ir, wave()))[inner].mean()
    )


# --- saved ----------------------------------------------------------------------------------------


def test_a_saved_field_is_applied_at_twice_the_resolution(tmp_path):
    side, field = 96, smooth_field(side=96)
    transform = np.array([[0.99, 0.02, 2.0], [-0.02, 0.99, 3.0], [0, 0, 1]])
    found = registration(applied(field), transform, side)
    save_json(tmp_path / "t.json", registration_to_dict(found))
    saved = read_saved_transform(tmp_path / "t.json")
    small = cv2.GaussianBlur(np.random.default_rng(0).random((side, side)).astype(np.float32), (0, 0), 4)
    np.testing.assert_allclose(apply_transform(saved, small), found.warp(small), atol=1e-3)
    large = cv2.resize(small, (2 * side, 2 * side), interpolation=cv2.INTER_CUBIC)
    double = apply_transform(saved, large)
    assert double.shape == large.shape
    expected = cv2.resize(found.warp(small), (2 * side, 2 * side), interpolation=cv2.INTER_CUBIC)
    inner = np.s_[40:-40, 40:-40]
    assert np.abs(double - expected)[inner].max() < 0.01
    without = apply_transform(dataclasses.replace(saved, local=None), large)
    assert np.abs(without - expected)[inner].max() > 0.02


def test_a_saved_field_of_another_size_is_an_error(tmp_path):
    value = registration_to_dict(registration(applied(smooth_field(side=96)), np.eye(3), 96))
    value["local"]["field"]["size"] = [90, 96]
    save_json(tmp_path / "t.json", value)
    with pytest.raises(DataError, match="local correction"):
        read_saved_transform(tmp_path / "t.json")


def test_a_refused_correction_leaves_the_transform_alone(tmp_path):
    refused = dataclasses.replace(applied(smooth_field()), field=None, reason="too few windows: 3, of 12")
    found = registration(refused, np.eye(3))
    assert found.local is None and found.displacement is None
    assert found.to_dict()["local"]["reason"] == "too few windows: 3, of 12"
    save_json(tmp_path / "t.json", registration_to_dict(found))
    assert read_saved_transform(tmp_path / "t.json").local is None
    assert len(tie_points_of(found)) == 0


def test_the_normal_matrix_is_that_of_all_weights():
    """What is summed is 16 weights a point, also where cells are few and points lie outside the image."""
    rng = np.random.default_rng(0)
    for cells in ((2, 2), (13, 9)):
        field = DisplacementField.zero((520, 360), cells)
        weights = field.basis(rng.uniform(-20, 540, (300, 2)))
        weight = rng.uniform(0, 2, 300)
        expected = weights.T @ (weight[:, None] * weights)
        assert local._Basis(weights).normal(weight) == pytest.approx(expected, abs=1e-9)
