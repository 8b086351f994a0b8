"""`Matcher.verify` and `kglmatch verify`: transforms and matches from anywhere, judged as they are."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import other_sensor, texture

import kglmatch.commands.verify as command
from kglmatch import Matches
from kglmatch.cli import main
from kglmatch.errors import DataError, KGLMatchError
from kglmatch.geometry import corner_error, similarity_about, transform_points
from kglmatch.options import VERIFY_TOLERANCE
from kglmatch.registration.files import (
    MapFrame,
    registration_to_dict,
    save_control_points,
    save_json,
    save_yml,
)
from kglmatch.registration.given import Given, check_sizes, read_given
from kglmatch.registration.results import Registration
from kglmatch.registration.verify import as_given

SIZE = WIDTH, HEIGHT = 256, 200
TRUE = similarity_about(70, 1.1, (127.5, 99.5), (131, 97))  # no limits hold for what is given


@pytest.fixture(autouse=True)
def few_patches(monkeypatch):
    monkeypatch.setattr("kglmatch.registration.from_matches._KEYPOINTS", 30)
    monkeypatch.setattr("kglmatch.registration.verdict._PLACES", 16)


@pytest.fixture(scope="module")
def scene():
    vis = texture(WIDTH, HEIGHT)
    ir = cv2.warpPerspective(other_sensor(vis), TRUE, SIZE, flags=cv2.INTER_CUBIC)
    return vis, np.clip(ir, 0, 1)


@pytest.fixture(scope="module")
def files(scene, tmp_path_factory):
    """The two images, and TRUE in every form that can be read."""
    folder = tmp_path_factory.mktemp("files")
    for name, image in zip(("vis.png", "ir.png"), scene, strict=True):
        cv2.imwrite(str(folder / name), np.rint(image * 255).astype(np.uint8))
    found = made_up()
    save_json(folder / "t.json", registration_to_dict(found))
    save_yml(folder / "t.yml", found)
    save_control_points(folder / "t.points", found)
    save_control_points(folder / "t.txt", found)
    save_control_points(folder / "t.gcp", found)
    np.save(folder / "t.npy", TRUE[:2])
    matches(found).save(folder / "m.csv")
    matches(found).save(folder / "m.json")
    matches(found).save(folder / "m.npz")
    points = np.concatenate([found.keypoints_vis, found.keypoints_ir], axis=1)
    np.savetxt(folder / "plain.csv", points, delimiter=",")
    return folder


def made_up(off=0.0, count=40, **changes):
    """A registration by TRUE with places at random; the ir ones are found exactly."""
    points = np.random.default_rng(0).uniform(40, 160, (count, 2))
    shift = np.array([[1, 0, off], [0, 1, 0], [0, 0, 1]])
    values = np.zeros(count, np.float32)
    found = Registration(
        "registered", 0.9, shift @ TRUE, "similarity", points.astype(np.float32),
        transform_points(shift @ TRUE, points).astype(np.float32), values, values, np.ones(count, bool), 1.0,
        0.9, 0, SIZE, SIZE,
    )  # fmt: skip
    return dataclasses.replace(found, **changes)


def matches(found):
    rows = np.arange(len(found.keypoints_vis))
    ones = np.ones(len(rows), np.float32)
    return Matches(np.stack([rows, rows], 1), ones, ones, found.keypoints_vis, found.keypoints_ir)


def moved(x, y=0.0):
    """TRUE, that many ir pixels off."""
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]]) @ TRUE


# --- the verdict ------------------------------------------------------------------------------------------


def test_the_right_transform_is_registered_as_it_is(matcher, scene):
    found = matcher.verify(*scene, TRUE)
    assert (found.verdict, found.kind, found.proposer) == ("registered", "similarity", "given")
    assert found.confidence >= 0.5 and found.inliers.sum() > 20
    assert np.array_equal(found.transform, TRUE)


def test_a_transform_is_judged_as_it_is_given(matcher, scene):
    verdicts = []
    for pixels, angle in ((1.5, 0.4), (5, 2.0), (8, 4.1), (25, 5.5)):
        found = matcher.verify(*scene, moved(pixels * np.cos(angle), pixels * np.sin(angle)))
        assert (found.verdict == "registered") == (found.confidence >= 0.5)
        assert (found.transform is None) == (found.verdict == "failed")
        verdicts.append(found.verdict)
    assert verdicts == ["registered", "doubtful", "failed", "failed"]


def test_a_turn_counts_by_what_it_moves(matcher, scene):
    # Nothing in the middle of the image, and about six pixels where the places are farthest from it.
    turned = similarity_about(4, 1, (131, 97), (131, 97)) @ TRUE
    assert matcher.verify(*scene, turned).verdict != "registered"


@pytest.mark.parametrize("pixels", [0, 6])
def test_refined_it_is_right_to_a_fraction_of_a_pixel(matcher, scene, pixels):
    found = matcher.verify(*scene, moved(pixels, -pixels), refine=True)
    assert (found.verdict, found.proposer) == ("registered", "given")
    assert corner_error(found.transform, TRUE, SIZE) < 0.5


def test_matches_are_judged_by_the_transform_that_most_agree_on(matcher, scene):
    vis = np.random.default_rng(0).uniform(40, 160, (60, 2))
    ir = transform_points(TRUE, vis)
    ir[40:] = np.random.default_rng(1).uniform(0, 190, (20, 2))
    found = matcher.verify(*scene, (vis, ir))
    assert found.verdict == "registered" and corner_error(found.transform, TRUE, SIZE) < 1
    by_columns = matcher.verify(*scene, np.concatenate([vis, ir], axis=1))
    assert np.array_equal(by_columns.transform, found.transform)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_matches_fail(matcher, scene, count):
    found = matcher.verify(*scene, np.zeros((count, 4)))
    assert (found.verdict, found.transform, len(found.keypoints_vis)) == ("failed", None, 0)


def test_matches_that_agree_on_nothing_fail(matcher, scene):
    assert matcher.verify(*scene, np.random.default_rng(2).uniform(0, 190, (12, 4))).verdict == "failed"


def test_a_transform_of_unrelated_images_fails(matcher, scene):
    other = other_sensor(texture(WIDTH, HEIGHT, seed=9))
    for refine in (False, True):
        assert matcher.verify(scene[0], other, np.eye(3), refine=refine).verdict != "registered"


def test_images_that_do_not_overlap_by_it_fail(matcher, scene):
    assert matcher.verify(*scene, moved(1000)).verdict == "failed"


def test_where_structure_says_nothing_matches_may(matcher, scene, monkeypatch):
    """The other witness is asked in the frame that the transform leads to, whatever its rotation."""
    from kglmatch.registration import verify

    weak = dataclasses.replace
    refine = verify.refine
    monkeypatch.setattr(verify, "refine", lambda *a, **k: weak(refine(*a, **k), support=0.0))
    asked = []

    def by_matches(_matcher, vis, ir, limits, masks):
        assert masks is None
        asked.append((np.abs(ir - other_sensor(vis))[60:140, 80:170].mean(), limits.max_rotation))
        points = made_up().keypoints_vis.astype(float)
        none = np.zeros(len(points))
        step = similarity_about(0, 1, (0, 0), (1, 0))
        return verify.Alignment(
            step, "similarity", points, points + np.array([1, 0]), none + 1, none, 0.5, 20
        )

    monkeypatch.setattr(verify, "align_by_matches", by_matches)
    found = matcher.verify(*scene, TRUE)
    assert len(asked) == 1 and asked[0][0] < 0.05 and asked[0][1] <= 15
    assert found.verdict == "registered" and found.num_matches == 20
    # One visible pixel off what the matches say, which is within the tolerance.
    expected = transform_points(TRUE, made_up().keypoints_vis + np.array([1, 0]))
    assert np.abs(found.keypoints_ir - expected).max() < 0.01


def test_distance_from_what_holds_decides():
    def judged(off, **changes):
        return as_given(moved(off), made_up(**changes))

    near = judged(0.9 * VERIFY_TOLERANCE)
    assert (near.verdict, near.confidence) == ("registered", 0.9) and not near.inliers.any()
    assert judged(1.5).inliers.all()
    assert np.allclose(judged(1.5).residuals, 1.5, atol=1e-3)
    some = judged(1.5 * VERIFY_TOLERANCE)  # over 1.1 visible pixels, which are larger
    assert some.verdict == "doubtful" and some.confidence == pytest.approx(0.5 * (2 - 1.5 / 1.1))
    far = judged(2.4 * VERIFY_TOLERANCE)
    assert (far.verdict, far.confidence, far.transform, far.kind) == ("failed", 0.0, None, None)
    weak = judged(1.0, verdict="doubtful", confidence=0.3)
    assert (weak.verdict, weak.confidence) == ("doubtful", 0.3)
    failed = judged(1.0, verdict="failed", confidence=0.1, transform=None)
    assert (failed.verdict, failed.transform) == ("failed", None)


def test_coarse_structure_decides_where_fine_structure_is_noise():
    """The reference has moved by 8 pixels; its support of 1.0 is matched by that of coarse structure."""
    astray = dataclasses.replace(made_up(), transform=moved(8))
    assert as_given(TRUE, astray).verdict == "failed"
    assert as_given(TRUE, astray, (moved(1), 0.95)).verdict == "registered"
    assert as_given(TRUE, astray, (moved(1), 0.5)).verdict == "failed"  # fine structure says more
    assert as_given(TRUE, astray, (moved(7), 0.95)).verdict == "failed"


def test_pixels_are_those_of_the_coarser_image():
    fine = np.diag([10.0, 10, 1])  # the ir image has ten times the pixels
    reference = dataclasses.replace(made_up(), transform=fine)
    shift = similarity_about(0, 1, (0, 0), (20, 0))
    assert as_given(shift @ fine, reference).verdict == "registered"
    coarse = np.diag([0.1, 0.1, 1])
    reference = dataclasses.replace(made_up(), transform=coarse)
    assert as_given(shift @ coarse, reference).verdict == "failed"


@pytest.mark.parametrize(
    ("transform", "kind", "message"),
    [
        (np.zeros((2, 2)), "auto", r"^given: expected Matches with keypoints, .* got shape \(2, 2\)"),
        (np.zeros((2, 3)), "auto", "cannot be inverted"),
        (TRUE, "elastic", "kind must be one of auto"),
    ],
)
def test_mistakes_are_errors(thin_matcher, scene, transform, kind, message):
    with pytest.raises(KGLMatchError, match=message):
        thin_matcher.verify(*scene, transform, kind=kind)


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.yml", "t.npy"])
def test_transforms_are_read_as_they_were_written(files, name):
    given = read_given(files / name)
    assert np.allclose(given.value, TRUE[: len(given.value)], atol=1e-12)
    assert given.vis_size == given.ir_size == (None if name == "t.npy" else SIZE)


@pytest.mark.parametrize("name", ["m.csv", "m.npz", "plain.csv", "t.points", "t.txt", "t.gcp"])
def test_matches_are_read_as_they_were_written(files, name):
    found = made_up()
    expected = np.concatenate([found.keypoints_vis, found.keypoints_ir], axis=1)
    assert np.abs(read_given(files / name).value - expected).max() < 1e-3


@pytest.mark.parametrize("ending", [".points", ".txt"])
def test_control_points_are_read_on_the_map_that_they_are_on(tmp_path, ending):
    frame = MapFrame(np.array([[10.0, 0, 500_005], [0, -10, 4_999_995]]), 32633)
    path = tmp_path / f"t{ending}"
    found = made_up()
    save_control_points(path, found, frame)
    assert np.abs(read_given(path, frame).value[:, :2] - found.keypoints_vis).max() < 1e-3
    with pytest.raises(DataError, match="is on EPSG:32633, but VIS is on no map"):
        read_given(path)


def test_points_that_are_switched_off_do_not_count(tmp_path, files):
    lines = (files / "t.points").read_text().splitlines()
    lines[3] = lines[3].replace(",1,0,0,", ",0,0,0,")
    (tmp_path / "t.points").write_text("\n".join(lines))
    assert len(read_given(tmp_path / "t.points").value) == 39


BROKEN = {
    "t.yml": ["", "no yml: [", "%YAML:1.0\n---\nother: 1\n"],
    "t.npy": ["text"],
    "m.csv": ["", "a,b\n1,2\n", "x_vis,y_vis,x_ir,y_ir\n1,2,3\n", "1,2,3,nan\n", '"\n'],
    "m.npz": ["text"],
    "t.points": ["", "mapX,mapY,sourceX,sourceY,enable\n", "a,b\n", "mapX,mapY,sourceX,sourceY\n1,2,x,4\n"],
    "t.txt": ["", "1 0 0 0 1 0", "-gcp 1 2 3", "-gcp 1 2 3 x"],
    "t.xml": ["<x/>"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BROKEN.items() for text in texts])
def test_damaged_files_are_data_errors_in_a_line(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=name) as caught:
        read_given(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*t\.yml: no such file"):
        read_given(tmp_path / "t.yml")


def test_files_about_other_images_are_data_errors():
    given = Given(TRUE, SIZE, SIZE)
    check_sizes(given, "t.json", SIZE, SIZE)
    check_sizes(Given(TRUE), "t.npy", (3, 4), (5, 6))
    with pytest.raises(
        DataError, match=r"t\.json is for a IR of 256 x 200 pixels, but this one is 320 x 200"
    ):
        check_sizes(given, "t.json", SIZE, (320, 200))


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture
def stub(monkeypatch):
    """Stands in for the matcher; the list holds what it was asked to verify."""
    asked = []

    def use(found):
        def verify(vis, ir, transform, **options):
            asked.append((transform, options))
            return found

        config = SimpleNamespace(patch_size=64)
        matcher = SimpleNamespace(config=config, device="cpu", verify=verify)
        monkeypatch.setattr(command, "load_matcher", lambda args: matcher)
        return asked

    return use


def verify_files(files, name, *options):
    images = [str(files / image) for image in ("vis.png", "ir.png")]
    return main(["verify", *images, "--transform", str(files / name), *map(str, options)])


@pytest.mark.parametrize(
    "name", ["t.json", "t.yml", "t.npy", "t.points", "t.txt", "t.gcp", "m.csv", "m.json", "m.npz"]
)
def test_every_file_reaches_the_matcher(files, stub, capsys, name):
    asked = stub(made_up())
    assert verify_files(files, name, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["verdict"], result["given"], result["refined"]) == ("registered", str(files / name), False)
    ((value, options),) = asked
    assert value.shape in ((3, 3), (2, 3), (40, 4)) and options == {"kind": "auto", "refine": False}


def test_verdicts_are_exit_codes(files, stub, capsys):
    stub(made_up())
    assert verify_files(files, "t.json") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("registered, confidence 0.90: median distance") and captured.err == ""
    stub(made_up(verdict="doubtful", confidence=0.3))
    assert verify_files(files, "t.json") == 0
    assert "doubtful; look at it" in capsys.readouterr().err
    stub(made_up(verdict="failed", confidence=0.0, transform=None, kind=None))
    assert verify_files(files, "t.json") == 1
    assert "does not register" in capsys.readouterr().err


def test_outputs_are_written(files, stub, tmp_path, capsys):
    stub(made_up())
    names = {"--overlay": "o.png", "--checkerboard": "c.png", "--yml": "t.yml", "--save": "t.json"}
    options = [part for option, name in names.items() for part in (option, tmp_path / name)]
    assert verify_files(files, "t.json", "--refine", *options) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names.values())
    assert json.loads((tmp_path / "t.json").read_text())["proposer"] == "kglmatch"


def test_the_real_thing(files, matcher, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_matcher", lambda args: matcher)
    assert verify_files(files, "plain.csv", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verdict"] == "registered" and corner_error(np.array(result["transform"]), TRUE, SIZE) < 0.1


MISTAKES = {
    "missing.json": ["missing.json"],
    "t.csv --band red": ["no such file", "t.csv"],
    "t.yml --band red": ["holds a single transform", "'red'"],
    "t.json --band red": ["holds a single transform"],
    "vis.png": ["vis.png", "must end in one of .json"],
    "t.json --save x.txt": ["x.txt", ".json"],
    "t.json --overlay x.doc": ["x.doc"],
    "t.json --kind elastic": ["--kind"],
    "": ["--transform"],
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_mistakes_are_one_line_before_the_model_is_loaded(files, monkeypatch, capsys, typed):
    monkeypatch.chdir(files)
    monkeypatch.setattr(command, "load_matcher", lambda args: pytest.fail("the model was loaded"))
    options = ["--transform", *typed.split()] if typed else []
    if "t.csv" in typed:
        options = [part for part in options if part not in ("--band", "red")]
    assert main(["verify", "vis.png", "ir.png", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("kglmatch: error: ")
    for text in MISTAKES[typed]:
        assert text in captured.err


def test_a_file_for_other_images_is_a_mistake(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_matcher", lambda args: pytest.fail("the model was loaded"))
    save_json(tmp_path / "t.json", registration_to_dict(made_up(vis_size=(640, 480))))
    images = [str(files / image) for image in ("vis.png", "ir.png")]
    assert main(["verify", *images, "--transform", str(tmp_path / "t.json")]) == 2
    assert "is for a VIS of 640 x 480 pixels, but this one is 256 x 200" in capsys.readouterr().err
