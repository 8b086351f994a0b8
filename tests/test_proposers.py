"""Proposals of others: what may be returned, how libraries are called, and what `register` makes of them."""

from __future__ import annotations

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import other_sensor, texture

from kglmatch import Matches
from kglmatch.errors import KGLMatchError
from kglmatch.geometry import corner_error, similarity_about, transform_points
from kglmatch.proposers import (
    HuggingFaceProposer,
    KorniaProposer,
    OpenCVProposer,
    VismatchProposer,
    named_proposer,
)
from kglmatch.registration import proposals
from kglmatch.registration.limits import Limits, within_limits
from kglmatch.registration.proposals import read_proposal

SIZE = WIDTH, HEIGHT = 256, 200
# Beyond the default limits of `register`, so that its own search cannot find it.
TURNED = similarity_about(40, 1.0, (127.5, 99.5), (130, 97))


@pytest.fixture(autouse=True)
def few_patches(monkeypatch):
    monkeypatch.setattr("kglmatch.registration.from_matches._KEYPOINTS", 30)
    monkeypatch.setattr("kglmatch.registration.verdict._PLACES", 16)


def pair(transform, seed=0):
    """A visible image, and what another sensor sees of it: (HEIGHT, WIDTH) each."""
    vis = texture(WIDTH, HEIGHT, seed)
    ir = cv2.warpPerspective(other_sensor(vis), transform, SIZE, flags=cv2.INTER_CUBIC)
    return vis, np.clip(ir, 0, 1)


@pytest.fixture(scope="module")
def turned():
    return pair(TURNED)


def matched(transform, count=40, noise=0.5, wrong=10):
    """Matches that follow a transform but for noise, and some that do not: (N, 2) twice."""
    rng = np.random.default_rng(0)
    vis = rng.uniform(10, 190, (count + wrong, 2))
    ir = transform_points(transform, vis) + rng.normal(0, noise, vis.shape)
    ir[count:] = rng.uniform(0, 190, (wrong, 2))
    return vis, ir


# --- what may be returned -----------------------------------------------------------------------------


def test_matches_in_every_form_are_the_same():
    vis, ir = matched(np.eye(3))
    rows = np.arange(len(vis))
    as_matches = Matches(
        np.stack([rows, rows], 1),
        np.ones(len(vis)),
        np.ones(len(vis)),
        vis.astype(np.float32),
        ir.astype(np.float32),
    )
    for value in (
        (vis, ir),
        [vis.tolist(), ir.tolist()],
        (torch.from_numpy(vis), torch.from_numpy(ir)),
        np.concatenate([vis, ir], axis=1),
        as_matches,
    ):
        found = read_proposal(value, "x")
        assert found.transform is None
        assert np.abs(found.points_vis - vis).max() < 1e-4 and np.abs(found.points_ir - ir).max() < 1e-4


@pytest.mark.parametrize("scale", [1, -2.5])
def test_transforms_are_normalised(scale):
    assert np.allclose(read_proposal(TURNED * scale, "x").transform, TURNED)
    assert np.allclose(read_proposal(TURNED[:2], "x").transform, TURNED)
    assert np.allclose(read_proposal(torch.from_numpy(TURNED * scale), "x").transform, TURNED)


@pytest.mark.parametrize("value", [None, [], np.empty((0, 4)), (np.empty((0, 2)), np.empty((0, 2)))])
def test_nothing_is_a_proposal_without_matches(value):
    found = read_proposal(value, "x")
    assert found.transform is None and found.points_vis.shape == found.points_ir.shape == (0, 2)
    assert proposals.candidates(found, "auto") == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((5, 3)), r"expected Matches .* got shape \(5, 3\)"),
        (np.zeros((3, 3)), "cannot be inverted"),
        (np.full((3, 3), np.nan), "not finite"),
        (np.full((7, 4), np.inf), "not finite"),
        ((np.zeros((5, 2)), np.zeros((6, 2))), r"\(5, 2\) and \(6, 2\)"),
        ("sift", "expected Matches"),
        (object(), "expected Matches"),
        ([["a", 1], ["b", 2]], "expected Matches"),
        (Matches(np.zeros((1, 2), np.int64), np.ones(1), np.ones(1)), "hold no keypoints"),
    ],
)
def test_anything_else_is_an_error_that_names_the_proposer(value, message):
    with pytest.raises(KGLMatchError, match=f"^mine: .*{message}"):
        read_proposal(value, "mine")


@pytest.mark.parametrize("kind", ["auto", "translation", "similarity", "affine", "homography"])
def test_candidates_of_matches_are_near_what_they_follow(kind):
    true = similarity_about(0, 1, (0, 0), (6, -4)) if kind == "translation" else TURNED
    found = proposals.candidates(read_proposal(matched(true), "x"), kind)
    assert len(found) == (2 if kind == "auto" else 1)
    assert all(corner_error(transform, true, SIZE) < 4 for transform in found)


def test_few_matches_stand_for_a_similarity_alone():
    found = proposals.candidates(read_proposal(matched(TURNED, count=8, wrong=0), "x"), "auto")
    assert [proposals.transform_kind(transform) for transform in found] == ["similarity"]


def test_kind_of_a_transform_is_the_simplest():
    bent = np.eye(3)
    bent[2, 0] = 1e-5
    sheared = np.array([[1, 0.1, 0], [0, 1, 0], [0, 0, 1.0]])
    shifted = similarity_about(0, 1, (0, 0), (5, 3))
    kinds = [proposals.transform_kind(t) for t in (shifted, TURNED, sheared, bent)]
    assert kinds == ["translation", "similarity", "affine", "homography"]


def test_wild_transforms_are_not_usable():
    image = np.zeros((HEIGHT, WIDTH), np.float32)
    assert proposals.is_usable(np.eye(3), image, image) and proposals.is_usable(TURNED, image, image)
    horizon = np.eye(3)
    horizon[2, 0] = -1 / 100  # a part of the image is beyond infinity
    collapsed = np.diag([1e-3, 1e-3, 1])
    outside = similarity_about(0, 1, (0, 0), (400, 0))
    for transform in (horizon, collapsed, outside, np.diag([1, 1, 0.0])):
        assert not proposals.is_usable(transform, image, image)


def test_limits_hold_for_proposals():
    image = np.zeros((HEIGHT, WIDTH), np.float32)
    assert not within_limits(TURNED, image, image, Limits())
    assert within_limits(TURNED, image, image, Limits(max_rotation=45))
    assert not within_limits(TURNED, image, image, Limits(max_rotation=45, max_displacement=0.5))
    half = np.diag([0.5, 0.5, 1])
    assert not within_limits(half, image, image, Limits())
    assert within_limits(half, image, image[::2, ::2], Limits())  # the ratio of the sizes is allowed


def test_names_are_told_apart():
    def mine(vis, ir):
        return None

    names = proposals.proposer_names([mine, mine, OpenCVProposer("sift"), lambda vis, ir: None, mine])
    assert names == ["mine", "mine 2", "sift", "<lambda>", "mine 3"]
    with pytest.raises(KGLMatchError, match=r"called with two images.* got ndarray"):
        proposals.proposer_names([np.eye(3)])


def test_one_that_raises_does_not_keep_the_others(turned):
    def broken(vis, ir):
        vis[:] = 0  # nor does one that writes into its images
        raise RuntimeError("no\nweights")

    def odd(vis, ir):
        return np.zeros((4, 7))

    def good(vis, ir):
        assert vis.std() > 0
        return TURNED

    found, errors = proposals.propose([broken, odd, good], *turned)
    assert [proposal.name for proposal in found] == ["good"]
    assert errors[0] == "broken: RuntimeError: no weights"
    assert errors[1].startswith("odd: expected Matches") and "\n" not in errors[1]


# --- adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sift", "orb"])
def test_opencv_finds_the_transform_of_one_sensor(name, turned):
    vis, _ = turned
    moved = cv2.warpPerspective(vis, TURNED, SIZE, flags=cv2.INTER_CUBIC)
    proposer = named_proposer(name)
    assert proposer.name == name
    proposal = read_proposal(proposer(vis, np.clip(moved, 0, 1)), name)
    assert corner_error(proposals.candidates(proposal, "similarity")[0], TURNED, SIZE) < 1
    flat = np.full((HEIGHT, WIDTH), 0.5, np.float32)
    assert [len(side) for side in proposer(vis, flat)] == [0, 0]


def test_akaze_is_there_or_its_error_says_where():
    if hasattr(cv2, "AKAZE_create") or hasattr(getattr(cv2, "xfeatures2d", None), "AKAZE_create"):
        assert named_proposer("akaze").name == "akaze"
    else:
        with pytest.raises(KGLMatchError, match=r"has no AKAZE here: .*opencv-contrib-python"):
            named_proposer("akaze")


def test_unknown_names_are_errors():
    with pytest.raises(KGLMatchError, match="one of sift, akaze, orb, got 'surf'"):
        named_proposer("surf")
    with pytest.raises(KGLMatchError, match="one of sift, akaze, orb, got 'surf'"):
        OpenCVProposer("surf")


def test_any_detector_of_opencv_can_be_given(turned):
    proposer = OpenCVProposer(cv2.SIFT_create(50), name="few", ratio=0.7)
    assert proposer.name == "few" and len(proposer(turned[0], turned[0])[0]) > 10


def test_kornia_is_called_by_its_convention():
    class Dense(torch.nn.Module):
        """As LoFTR: sides must be multiples of 8."""

        def forward(self, data):
            (one, channels, height, width), shape = data["image0"].shape, data["image1"].shape
            assert (one, channels, height % 8, width % 8) == (1, 1, 0, 0) and shape[2:] == (64, 48)
            points = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [99.0, 3.0]])
            return {
                "keypoints0": points,
                "keypoints1": points % 40,
                "confidence": torch.tensor([0.9, 0.1, 0.8, 0.9]),
            }

    vis, ir = np.zeros((50, 90), np.float32), np.zeros((60, 42), np.float32)
    found = KorniaProposer(Dense(), min_confidence=0.5)(vis, ir)
    assert np.array_equal(found[0], [[1, 2], [5, 6]])  # the last one is in the padding
    assert KorniaProposer(Dense()).name == "Dense"


def test_a_matcher_of_kornia_registers_what_it_sees(turned):
    kornia = pytest.importorskip("kornia.feature")
    model = kornia.LocalFeatureMatcher(
        kornia.SIFTFeature(200, device=torch.device("cpu")), kornia.DescriptorMatcher("smnn", 0.9)
    )
    proposal = read_proposal(KorniaProposer(model)(turned[0], turned[0]), "x")
    assert corner_error(proposals.candidates(proposal, "similarity")[0], np.eye(3), SIZE) < 0.1


def test_vismatch_is_called_by_its_convention(turned):
    class Model:
        name = "big-matcher"

        def __call__(self, img0, img1):
            assert img0.shape == (3, HEIGHT, WIDTH) and img0.dtype == torch.float32 and float(img0.max()) <= 1
            vis, ir = matched(TURNED)
            return {
                "num_inliers": 3,
                "H": None,
                "matched_kpts0": vis,
                "matched_kpts1": ir,
                "inlier_kpts0": vis[:3],
            }

    proposer = VismatchProposer(Model())
    assert proposer.name == "big-matcher"
    assert [len(side) for side in proposer(*turned)] == [50, 50]
    with pytest.raises(KGLMatchError, match="expected a dict with matched_kpts0 and matched_kpts1, got list"):
        VismatchProposer(lambda img0, img1: [], name="odd")(*turned)


def test_our_own_model_with_that_interface_can_propose(thin_matcher, turned):
    from kglmatch.interop import ImageMatchingModel

    proposer = VismatchProposer(ImageMatchingModel(thin_matcher, max_keypoints=20))
    vis, ir = proposer(*turned)
    assert proposer.name == "KGLNet" and vis.shape == ir.shape


def test_hugging_face_is_called_by_its_convention(turned):
    class Inputs(dict):
        def to(self, device):
            return self

    class Processor:
        def __call__(self, images, return_tensors):
            assert [(image.size, image.mode) for image in images] == [
                (SIZE, "RGB")
            ] * 2 and return_tensors == "pt"
            return Inputs(pixel_values=torch.zeros(1, 2, 3, 8, 8))

        def post_process_keypoint_matching(self, outputs, target_sizes, threshold):
            assert outputs == "outputs" and threshold == 0.3
            assert [tuple(size) for size in target_sizes[0]] == [(HEIGHT, WIDTH)] * 2
            points = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
            return [{"keypoints0": points, "keypoints1": points + 1, "matching_scores": torch.ones(2)}]

    class Model(torch.nn.Module):
        def forward(self, pixel_values):
            return "outputs"

    found = HuggingFaceProposer(Model(), Processor(), threshold=0.3)(*turned)
    assert np.array_equal(found[0], [[1, 2], [3, 4]]) and np.array_equal(found[1], [[2, 3], [4, 5]])


@pytest.mark.slow
def test_a_model_of_hugging_face_runs(turned):
    """With random weights, so that nothing is downloaded: its matches mean nothing, its interface does."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SuperGlueConfig(
        keypoint_detector_config=transformers.SuperPointConfig(
            encoder_hidden_sizes=[8, 8, 8, 8],
            decoder_hidden_size=16,
            descriptor_decoder_dim=32,
            max_keypoints=50,
        ),
        hidden_size=32,
        keypoint_encoder_sizes=[16],
        gnn_layers_types=["self", "cross"],
        num_attention_heads=4,
        sinkhorn_iterations=5,
    )
    model = transformers.AutoModelForKeypointMatching.from_config(config).eval()
    processor = transformers.SuperGlueImageProcessorPil(size={"height": 96, "width": 128})
    vis, ir = HuggingFaceProposer(model, processor, threshold=0.0)(*turned)
    assert vis.shape == ir.shape and vis.shape[1] == 2
    assert ((vis >= 0) & (vis <= SIZE)).all()


# --- under our judge ----------------------------------------------------------------------------------


def test_a_proposal_that_our_search_cannot_find_is_kept(matcher, turned):
    def right(vis, ir):
        return matched(TURNED)

    def broken(vis, ir):
        raise OSError("no weights")

    limits = {"max_rotation": 45.0, "max_scale": 1.05, "kind": "similarity"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kglmatch.registration.verdict.align", lambda *_: [])  # ours finds nothing
        found = matcher.register(*turned, proposers=[broken, right], **limits)
        outside = matcher.register(*turned, proposers=[right], kind="similarity", max_scale=1.05)
    assert (found.verdict, found.proposer) == ("registered", "right")
    assert corner_error(found.transform, TURNED, SIZE) < 0.5  # refined: the matches' noise is larger
    assert found.errors == ("broken: OSError: no weights",)
    assert found.to_dict()["proposer"] == "right" and found.to_dict()["errors"] == list(found.errors)
    assert outside.verdict == "failed" and outside.proposer == "kglmatch"


def test_a_wrong_proposal_is_not_believed(matcher):
    true = similarity_about(1, 1.01, (127.5, 99.5), (131, 97))

    def wrong(vis, ir):
        return similarity_about(0, 1, (0, 0), (60, 40))

    found = matcher.register(*pair(true), proposers=[wrong], max_rotation=3, max_scale=1.02)
    assert (found.verdict, found.proposer) == ("registered", "kglmatch")
    assert corner_error(found.transform, true, SIZE) < 0.7


def test_a_proposal_equal_to_ours_is_judged_once(matcher, monkeypatch):
    from kglmatch.registration import verdict

    true = similarity_about(0, 1, (0, 0), (4, -3))
    judged = []
    judge = verdict.judge

    def noted(*args, **options):
        judged.append((*args[4:], options.get("proposer")))
        return judge(*args, **options)

    monkeypatch.setattr(verdict, "judge", noted)

    def same(vis, ir):
        return true

    found = matcher.register(*pair(true), proposers=[same], kind="translation")
    assert found.proposer == "kglmatch"
    assert judged and not any("same" in row for row in judged)


def test_a_proposer_that_cannot_be_called_is_a_mistake(matcher, turned):
    with pytest.raises(KGLMatchError, match="called with two images"):
        matcher.register(*turned, proposers=[SimpleNamespace()])
