"""A rig: calibrated from captures whose transforms are known; refused where one transform does not serve."""

from __future__ import annotations

import dataclasses
import json
import time

import cv2
import numpy as np
import pytest
import tifffile
from conftest import other_sensor, texture

import kglmatch.batch.rig
from kglmatch.batch.captures import Capture, Moment
from kglmatch.batch.rig import Flight, calibrate_rig, find_trend, objection, spread
from kglmatch.batch.rig_apply import apply_rig
from kglmatch.batch.rig_check import check_rig, draw_check
from kglmatch.batch.rig_pool import _clearly_more, own_shift, refine_capture
from kglmatch.batch.rig_results import Residuals, Rig, RigBand
from kglmatch.errors import DataError, KGLMatchError, OutputError
from kglmatch.geometry import corner_error, similarity_about

SIZE = 256, 208
# Narrow limits and one kind, so that a search takes seconds.
LIMITS = {"max_displacement": 20, "max_rotation": 2, "max_scale": 1.03}
CENTRE = (SIZE[0] - 1) / 2, (SIZE[1] - 1) / 2
TRUTH = similarity_about(0.8, 1.01, CENTRE, (CENTRE[0] + 5, CENTRE[1] - 3))
OTHER = similarity_about(-0.5, 0.99, CENTRE, (CENTRE[0] - 4, CENTRE[1] - 6))


def scene(seed: int) -> np.ndarray:
    return texture(SIZE[0] + 60, SIZE[1] + 60, seed)


def cut(image: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """What a camera sees whose pixels a transform from the reference leads to: 8 bits."""
    to_scene = np.array([[1, 0, 30], [0, 1, 30], [0, 0, 1.0]]) @ np.linalg.inv(transform)
    seen = cv2.warpPerspective(image, to_scene, SIZE, flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP)
    return np.rint(np.clip(seen, 0, 1) * 255).astype(np.uint8)


def moved(transform: np.ndarray, shift) -> np.ndarray:
    step = np.eye(3)
    step[:2, 2] = shift
    return step @ transform


def flight(count: int, shifts=None) -> list[Capture]:
    """Captures of bands 1, 2 and 3; band 2 is moved in each by its shift."""
    captures = []
    for i in range(count):
        image = scene(i)
        shift = (0, 0) if shifts is None else shifts[i]
        bands = {
            "1": cut(image, np.eye(3)),
            "2": cut(other_sensor(image), moved(TRUTH, shift)),
            "3": cut(other_sensor(1 - image), OTHER),
        }
        captures.append(Capture(f"IMG_{i:04}", bands))
    return captures


@pytest.fixture(scope="module")
def rig(matcher) -> Rig:
    """Of five captures; five more show sky, and one each lacks a band, is of another size, is damaged."""
    captures = flight(5, [(0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5), (0, 0)])
    empty = {band: np.full(SIZE[::-1], 90, np.uint8) for band in "123"}
    for at in (1, 3, 5, 7, 9):
        captures.insert(at, Capture(f"sky{at}", empty))
    captures.insert(2, Capture("lacking", {band: captures[0].bands[band] for band in "12"}))
    captures.insert(4, Capture("small", {band: captures[0].bands[band][:100] for band in "123"}))
    captures.append(Capture("damaged", {**captures[0].bands, "2": "missing.tif"}))
    return calibrate_rig(matcher, captures, workers=2, **LIMITS)


def test_a_rig_is_calibrated_from_all_captures(rig):
    assert rig.reference == "1" and [band.name for band in rig.bands] == ["2", "3"]
    assert rig.serves and rig.size == SIZE and rig.num_captures == 13
    for band, truth in zip(rig.bands, (TRUTH, OTHER), strict=True):
        assert band.transform is not None and corner_error(band.transform, truth, SIZE) < 0.2
        assert band.kind == "similarity" and band.via is None and band.confidence > 0.5
        assert band.num_judged == band.num_agreeing >= 5
        assert band.support > 0.5 and band.agreement > 0.9
    assert 0.2 < rig["2"].spread < 0.9 and rig["3"].spread < 0.3


def test_captures_that_cannot_be_used_are_named(rig):
    assert set(rig.problems) == {"lacking", "small", "damaged"}
    assert rig.problems["lacking"] == "has no band 3"
    assert rig.problems["small"] == "band 1 is 256 x 100, where band 1 of the others is 256 x 208"
    assert "missing.tif" in rig.problems["damaged"]


def test_between_sizes_that_are_as_common_the_first_capture_decides(monkeypatch):
    """Whichever thread is done first: in its order a rig would differ from run to run."""
    captures = [
        Capture(name, {band: np.zeros((side, 64)) for band in "12"}) for name, side in (("a", 80), ("b", 64))
    ]
    read = kglmatch.batch.rig.image_size

    def slowly(image):
        time.sleep(0.2 if len(image) == 80 else 0)
        return read(image)

    monkeypatch.setattr(kglmatch.batch.rig, "image_size", slowly)
    flight = Flight(captures, "1", workers=2, progress=False)
    assert flight.sizes == {"1": (64, 80), "2": (64, 80)}


def test_a_flight_of_which_half_is_sky_is_calibrated_from_the_rest(rig):
    residuals = rig["2"].residuals
    assert residuals is not None
    sky = np.array([name.startswith("sky") for name in residuals.captures])
    assert sky.sum() == 5 and (residuals.judged == ~sky).all()
    shift = residuals.shifts[residuals.captures.index("IMG_0000")]
    assert shift == pytest.approx([0.5, 0], abs=0.25)


def test_a_rig_comes_back_from_its_file(rig, tmp_path):
    rig.save(tmp_path / "rig.json")
    back = Rig.load(tmp_path / "rig.json")
    assert back.to_dict() == rig.to_dict()
    assert all((a.transform == b.transform).all() for a, b in zip(back.bands, rig.bands, strict=True))
    with pytest.raises(DataError, match="no band '7'"):
        back["7"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(format="other"), "no rig"),
        (lambda v: v.update(format_version=9), "format 9"),
        (lambda v: v.pop("tolerance"), "lacks 'tolerance'"),
        (lambda v: v["bands"][0].update(transform=[[1, 2], [3, 4]]), "3 x 3"),
        (lambda v: v["bands"][0].update(transform=[[0, 0, 0]] * 3), "inverted"),
        (lambda v: v["bands"][0].update(transform=None), "has no transform"),
        (lambda v: v["bands"][0].update(size=[1.5, -2]), "whole numbers"),
        (lambda v: v["bands"][0].update(verdict="good"), "unknown verdict"),
        (lambda v: v.update(bands=None), "damaged"),
    ],
)
def test_a_damaged_rig_is_one_line(rig, tmp_path, change, words):
    value = json.loads(json.dumps(rig.to_dict()))
    change(value)
    (tmp_path / "rig.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match=words):
        Rig.load(tmp_path / "rig.json")


def test_what_is_no_json_is_one_line(tmp_path):
    for text in ("", "{", "[" * 100_000, "\xff"):
        (tmp_path / "rig.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(DataError, match=r"rig\.json"):
            Rig.load(tmp_path / "rig.json")
    with pytest.raises(DataError, match="No such file"):
        Rig.load(tmp_path / "missing.json")


def test_mistakes_are_found_before_the_work(matcher):
    captures = flight(1)
    for options, words in (
        ({"kind": "magic"}, "kind"),
        ({"tolerance": 0}, "tolerance"),
        ({"max_captures": 0}, "max_captures"),
        ({"workers": 0}, "workers"),
        ({"reference": "9"}, "no band '9'"),
    ):
        with pytest.raises(KGLMatchError, match=words):
            calibrate_rig(matcher, captures, **options)
    for nothing in ([], [Capture("a", {"1": captures[0].bands["1"]})]):
        with pytest.raises(DataError, match="two bands or more"):
            calibrate_rig(matcher, nothing)


def test_a_rig_that_moves_is_refused(matcher):
    shifts = [(3 * (-1) ** i, 0) for i in range(4)]
    captures = [Capture(c.name, {b: c.bands[b] for b in "12"}) for c in flight(4, shifts)]
    band = calibrate_rig(matcher, captures, **LIMITS)["2"]
    assert band.verdict == "varies" and band.transform is not None
    assert band.reason.startswith("one transform does not serve this flight: only ")
    assert band.num_judged == 4 and band.num_agreeing <= 2


@pytest.mark.slow
def test_parallax_is_refused_and_the_height_named(matcher, tmp_path):
    """A camera mounted apart: its displacement falls with the height that the files name."""
    heights = [40, 95, 60, 120, 45, 80, 52, 110, 70, 48]
    for capture, height in zip(flight(10, [(480 / h - 6, 0) for h in heights]), heights, strict=True):
        xmp = f'<x drone-dji:RelativeAltitude="+{height}.00"/>'.encode()
        for band in "12":
            tifffile.imwrite(
                tmp_path / f"{capture.name}_{band}.tif",
                capture.bands[band],
                extratags=[(700, "B", len(xmp), xmp, True)] if band == "1" else [],
                metadata=None,
            )
    rig = calibrate_rig(matcher, tmp_path, kind="similarity", **LIMITS)
    band = rig["2"]
    assert band.verdict == "varies" and not rig.serves and "height (parallax)" in band.reason
    assert band.trend is not None and band.trend.pixels == pytest.approx(480 / 40 - 480 / 120, rel=0.25)
    with pytest.raises(KGLMatchError, match=r"height \(parallax\).*refine each capture"):
        apply_rig(rig, tmp_path, tmp_path.parent / "out")


@pytest.mark.slow
def test_a_band_of_another_scene_fails(matcher, monkeypatch):
    monkeypatch.setattr("kglmatch.batch.rig._MATCH_KEYPOINTS", 60)
    captures = [
        Capture(str(i), {"1": cut(scene(i), np.eye(3)), "2": cut(other_sensor(scene(i + 50)), TRUTH)})
        for i in range(3)
    ]
    band = calibrate_rig(matcher, captures, **LIMITS)["2"]
    assert band.verdict == "failed" and band.transform is None and band.confidence < 0.5


@pytest.mark.slow
def test_a_band_goes_through_another_where_it_must(matcher, monkeypatch):
    from kglmatch.batch import rig as module

    whole = module._Search.calibrate

    def blind(self, name, pairs, flight):
        band = whole(self, name, pairs, flight)
        if name == "3" and pairs.vis[0] is flight.captures[0].bands["1"]:
            return dataclasses.replace(band, verdict="failed", transform=None, kind=None, confidence=0.1)
        return band

    monkeypatch.setattr(module._Search, "calibrate", blind)
    found = calibrate_rig(matcher, flight(2), kind="similarity", **LIMITS)
    assert found["2"].via is None and found["3"].via == "2"
    assert found["3"].verdict == "registered" and found["3"].confidence >= 0.5
    assert found["3"].transform is not None and corner_error(found["3"].transform, OTHER, SIZE) < 0.4


# --- what the residuals say ------------------------------------------------------------------------


def residuals(shifts, consistent: float = 0.9) -> Residuals:
    shifts = np.asarray(shifts, float)
    count = len(shifts)
    names = tuple(map(str, range(count)))
    nothing = np.empty((0, 2))
    return Residuals(names, shifts, np.full(count, 0.1), np.ones(count), consistent, nothing, nothing)


def test_parallax_follows_the_height():
    rng = np.random.default_rng(0)
    heights = rng.uniform(40, 120, 40)
    found = residuals(np.stack([400 / heights - 6, np.zeros(40)], 1) + rng.normal(0, 0.2, (40, 2)))
    trend = find_trend(found, [Moment(float(i), h, True) for i, h in enumerate(heights)])
    assert trend is not None and trend.of == "height" and trend.share > 0.9
    assert trend.pixels == pytest.approx(400 / 40 - 400 / 120, rel=0.2)
    assert "height (parallax)" in str(objection(found, 40, trend, 1.0))


def test_a_loose_mount_follows_time_without_any_clock():
    rng = np.random.default_rng(0)
    found = residuals(np.stack([np.zeros(30), np.linspace(-3, 3, 30)], 1) + rng.normal(0, 0.3, (30, 2)))
    trend = find_trend(found, [Moment()] * 30)
    assert trend is not None and trend.of == "time" and trend.pixels == pytest.approx(6, rel=0.2)
    assert "a mount that moves" in str(objection(found, 30, trend, 1.0))


def test_noise_follows_nothing():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found = residuals(rng.normal(0, 0.4, (50, 2)))
        assert find_trend(found, [Moment(float(i), rng.uniform(50, 60), True) for i in range(50)]) is None
        assert objection(found, int(found.agreeing(1.0).sum()), None, 1.0) is None


def test_parallax_within_the_scene_is_an_objection():
    found = residuals(np.zeros((5, 2)), consistent=0.4)
    assert "40 %" in str(objection(found, 5, None, 1.0))


def test_captures_that_show_nothing_do_not_choose_the_kind():
    """Halves hold as much to see, also where sky alternates; sky does not make a small gain a clear one."""
    told = np.array([1.0, 0, 0.9, 0, 1.1, 0, 1.0, 0, 0.95, 0])
    assert not _clearly_more(told * 1.005, told)
    assert _clearly_more(told * 1.05, told)
    assert _clearly_more(np.repeat(told, 2) * 1.005, np.repeat(told, 2))


def test_spread_takes_rows_evenly():
    assert spread(0, 5) == [] and spread(1, 5) == [0] and spread(3, 5) == [0, 1, 2]
    assert spread(100, 3) == [0, 50, 99] and len(spread(500, 200)) == 200


def test_the_shift_of_noise_has_no_support():
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(8) * 20, np.arange(8) * 20)
    centres = np.stack([x.ravel(), y.ravel()], axis=1).astype(float)
    noise = rng.standard_normal((64, 13, 13)).astype(np.float32)
    assert own_shift(noise, centres).support < 0.12
    peaked = noise.copy()
    peaked[:, 7:10, 3:6] += 3  # at (-2, 2)
    found = own_shift(cv2_smooth(peaked), centres)
    assert found.support > 0.5 and found.at == pytest.approx([-2, 2], abs=0.3) and found.error < 0.3


def cv2_smooth(surfaces: np.ndarray) -> np.ndarray:
    from kglmatch.registration.surfaces import smooth, standardise

    return standardise(smooth(surfaces, 0.7))


def test_a_capture_is_refined_only_where_it_says_so():
    image = scene(3)
    vis = cut(image, np.eye(3)).astype(np.float32) / 255
    there = cut(other_sensor(image), moved(TRUTH, (2.0, -1.5))).astype(np.float32) / 255
    found = refine_capture(vis, there, TRUTH)
    assert found is not None and corner_error(found, moved(TRUTH, (2.0, -1.5)), SIZE) < 0.4
    assert refine_capture(vis, np.full_like(there, 0.5), TRUTH) is None


# --- check -----------------------------------------------------------------------------------------


def test_check_measures_a_flight_under_a_rig(rig, tmp_path):
    good = check_rig(rig, flight(2), workers=2)
    assert good.serves and [band.num_agreeing for band in good.bands] == [2, 2]
    turned = check_rig(rig, flight(2, [(4, 0), (4, 0)]))
    assert not turned.serves and turned.bands[0].shift == pytest.approx((4, 0), abs=0.4)
    assert turned.bands[1].objection is None
    turned.save_table(tmp_path / "table.csv")
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[0] == "capture,band,judged,dx,dy,error,support" and len(lines) == 5
    assert abs(float(lines[1].split(",")[3]) - 4) < 0.4
    json.dumps(turned.to_dict(), allow_nan=False)
    draw_check(turned, tmp_path / "check.png")
    assert cv2.imread(str(tmp_path / "check.png")).shape[1] > 800
    with pytest.raises(OutputError, match=r"\.png"):
        draw_check(turned, tmp_path / "check.tif")


def test_check_of_another_camera_is_one_line(rig):
    small = [Capture("a", {band: image[:150] for band, image in flight(1)[0].bands.items()})]
    with pytest.raises(DataError, match="another camera: band 1 is 256 x 150"):
        check_rig(rig, small)
    with pytest.raises(DataError, match="no band '1'"):
        check_rig(rig, [Capture("a", {"7": small[0].bands["1"]})])


def test_check_of_nothing_to_see_says_so(rig):
    empty = [Capture("sky", {band: np.full(SIZE[::-1], 90, np.uint8) for band in "123"})]
    found = check_rig(rig, empty)
    assert not found.serves and not found.bands[0].residuals.judged.any()
    json.dumps(found.to_dict(), allow_nan=False)


def band_of(name: str, transform: np.ndarray | None, verdict: str = "registered") -> RigBand:
    return RigBand(
        name=name, size=SIZE, verdict=verdict, confidence=0.9, transform=transform, kind="similarity",
        via=None, reason="known", num_captures=1, num_judged=1, num_agreeing=1, spread=0.1, support=1.0,
        agreement=1.0, num_matches=0, consistent=1.0,
    )  # fmt: skip


def test_the_command_calibrates_and_says_what_is_wrong(tmp_path, capsys, monkeypatch, matcher):
    from kglmatch.cli import main

    monkeypatch.setattr("kglmatch.commands.rig.load_matcher", lambda args: matcher)
    (tmp_path / "flight").mkdir()
    for capture in flight(2, [(3, 0), (-3, 0)]):
        for band in "12":
            tifffile.imwrite(tmp_path / "flight" / f"{capture.name}_{band}.tif", capture.bands[band])
    (tmp_path / "flight" / "IMG_0009_1.tif").write_bytes(b"II*\0damaged")
    (tmp_path / "flight" / "IMG_0009_2.tif").write_bytes(b"")
    command = ["rig", "calibrate", str(tmp_path / "flight"), "-o", str(tmp_path / "rig.json")]
    limits = ["--max-displacement", "20", "--max-rotation", "2", "--max-scale", "1.03"]
    code = main([*command, *limits, "--json"])
    out = capsys.readouterr()
    assert code == 1 and json.loads(out.out)["bands"][0]["verdict"] == "varies"
    assert "one transform does not serve this flight" in out.err
    assert sum("IMG_0009" in line for line in out.err.splitlines()) == 1
    assert Rig.load(tmp_path / "rig.json")["2"].verdict == "varies"
    assert main([*command, "--reference", "9"]) == 2
    assert "no band '9'" in capsys.readouterr().err
    assert main(["rig", "check", str(tmp_path / "rig.json"), str(tmp_path / "flight")]) == 1
    assert "band" in capsys.readouterr().out
