"""Many pairs through one matcher: order, equality with single calls, bad pairs, bounded memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import other_sensor, texture
from thin_network import make_thin, save_thin_model

from kglmatch import KGLMatchError, Pair
from kglmatch.matcher import Matcher
from kglmatch.streaming.prefetch import Prefetch, size_of
from kglmatch.streaming.worker import Failure
from kglmatch.streaming.workers import Workers

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def thin_matcher(tmp_path_factory):
    """A thin network with random weights, which loads in no time."""
    with pytest.MonkeyPatch.context() as patch:
        make_thin(patch)
        folder = save_thin_model(tmp_path_factory.mktemp("model"))
        yield Matcher.from_pretrained(folder, device="cpu", batch_size=16)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[tuple[Path, Path]]:
    """Six pairs of PNG files, 120 x 100 pixels."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs = []
    for i in range(6):
        vis = texture(120, 100, seed=i)
        pair = folder / f"{i}_vis.png", folder / f"{i}_ir.png"
        for path, image in zip(pair, (vis, other_sensor(vis)), strict=True):
            cv2.imwrite(str(path), np.rint(image * 255).astype(np.uint8))
        pairs.append(pair)
    return pairs


def same_matches(a, b) -> None:
    assert np.array_equal(a.indices, b.indices)
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
    assert np.array_equal(a.keypoints_vis, b.keypoints_vis)
    assert (a.homography is None) == (b.homography is None)


# --- match_many -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_match_many_gives_what_match_images_gives(thin_matcher, files, workers):
    options = {"max_keypoints": 30, "min_score": 0.0, "max_displacement": 20}
    results = list(thin_matcher.match_many(iter(files), workers=workers, **options))
    assert [result.pair.vis for result in results] == [vis for vis, _ in files]
    for result, (vis, ir) in zip(results, files, strict=True):
        assert result.error is None and result.seconds > 0
        assert 0 < result.keypoints_vis <= 30 and 0 < result.keypoints_ir <= 30
        same_matches(result.matches, thin_matcher.match_images(vis, ir, **options))


def test_patches_of_several_pairs_share_a_batch(thin_matcher, files, monkeypatch):
    described = []
    describe = type(thin_matcher).describe

    def count(self, patches, *args, **options):
        described.append(len(patches))
        time.sleep(0.1)  # so that the next pairs are ready
        return describe(self, patches, *args, **options)

    monkeypatch.setattr(type(thin_matcher), "describe", count)
    results = list(thin_matcher.match_many(files, workers=0, max_keypoints=5))
    assert len(results) == 6 and len(described) < 12 and max(described) > 5


def test_arrays_dense_search_and_turned_patches_take_the_same_way(thin_matcher, files):
    images = [tuple(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in pair) for pair in files[:2]]
    for more in ({"dense": True, "max_displacement": 8}, {"upright": False}, {"decide": "descriptor"}):
        options = {"max_keypoints": 12, "min_score": 0.0, **more}
        for result, (vis, ir) in zip(
            thin_matcher.match_many(images, workers=1, **options), files, strict=False
        ):
            same_matches(result.matches, thin_matcher.match_images(vis, ir, **options))


def test_a_bad_pair_is_a_result_and_the_rest_continues(thin_matcher, files, tmp_path):
    cut, small = tmp_path / "cut.png", tmp_path / "small.png"
    cut.write_bytes(files[0][0].read_bytes()[:300])
    cv2.imwrite(str(small), np.zeros((20, 30), np.uint8))
    pairs = [
        files[0],
        (tmp_path / "none.png", files[0][1]),
        (cut, files[0][1]),
        (files[1][0], small),
        files[1],
    ]
    pairs.insert(3, (np.zeros((80, 80), complex), files[0][1]))
    results = list(thin_matcher.match_many(pairs, workers=1, max_keypoints=8))
    errors = [result.error for result in results]
    assert errors[0] is None and errors[5] is None and all(errors[1:5])
    for error, words in zip(errors[1:5], ("no such file", "cut.png", "complex", "smaller than"), strict=True):
        assert words in error and "\n" not in error
    assert [result.pair.name for result in results] == list("012345")


def test_no_pair_and_no_keypoint(thin_matcher):
    assert list(thin_matcher.match_many([], workers=1)) == []
    flat = np.full((80, 80), 0.5, np.float32)
    (result,) = thin_matcher.match_many([(flat, flat)], workers=0)
    assert result.error is None and len(result.matches) == 0 and result.keypoints_vis == 0


@pytest.mark.parametrize(
    "options",
    [{"top_k": 0}, {"min_score": 2}, {"decide": "fused"}, {"detector": "x"}, {"max_keypoints": 0},
     {"dense": True}, {"workers": -1}],
)  # fmt: skip
def test_a_wrong_parameter_is_an_error_at_once(thin_matcher, options):
    with pytest.raises(KGLMatchError):
        thin_matcher.match_many([], **options)


def test_what_is_no_pair_is_an_error_after_the_pairs_before(thin_matcher, files):
    results = thin_matcher.match_many([files[0], "vis.png"], workers=0, max_keypoints=5)
    assert next(results).error is None
    with pytest.raises(KGLMatchError, match="pair 1 is a str"):
        next(results)


def test_pairs_are_drawn_a_few_ahead_however_long_the_list_is(thin_matcher, files):
    drawn = 0

    def endless():
        nonlocal drawn
        while True:
            drawn += 1
            yield files[drawn % len(files)]

    results = thin_matcher.match_many(endless(), workers=1, max_keypoints=5)
    for _ in range(3):
        next(results)
    assert drawn < 40
    results.close()
    seen = drawn
    time.sleep(0.2)
    assert drawn == seen


def test_a_group_that_fails_is_tried_pair_by_pair(thin_matcher, files, monkeypatch):
    describe = type(thin_matcher).describe

    def limited(self, patches, *args, **options):
        time.sleep(0.1)
        if len(patches) > 5:
            raise RuntimeError("CUDA out of memory")
        return describe(self, patches, *args, **options)

    monkeypatch.setattr(type(thin_matcher), "describe", limited)
    results = list(thin_matcher.match_many(files, workers=0, max_keypoints=5))
    assert [result.error for result in results] == [None] * 6
    (result,) = thin_matcher.match_many(files[:1], workers=0, max_keypoints=20)
    assert result.error == "RuntimeError: CUDA out of memory"


# --- register_many --------------------------------------------------------------------------------


def test_register_many_gives_what_register_gives(thin_matcher, files, tmp_path):
    pairs = [files[0], (tmp_path / "none.png", files[0][1]), files[1]]
    limits = {"kind": "translation", "max_displacement": 10}
    results = list(thin_matcher.register_many(pairs, workers=1, **limits))
    assert "none.png" in results[1].error and results[1].registration is None
    for result, pair in ((results[0], files[0]), (results[2], files[1])):
        alone = thin_matcher.register(*pair, **limits)
        assert result.registration.to_dict() == alone.to_dict() and result.error is None
    with pytest.raises(KGLMatchError, match="kind"):
        thin_matcher.register_many([], kind="rotation")


# --- workers and prefetch -------------------------------------------------------------------------


def test_a_worker_that_dies_costs_its_own_task():
    with Workers(1) as workers:
        assert workers.run(os.getpid) != os.getpid()
        died = workers.run(os._exit, 3)
        assert isinstance(died, Failure) and "exit code 3" in died.message
        killed = workers.run(signal.raise_signal, signal.SIGKILL)
        assert "SIGKILL" in killed.message
        assert np.array_equal(workers.run(np.arange, 5), np.arange(5))
        assert workers.run(int, "x").message.startswith("ValueError")


def test_what_a_worker_prints_does_not_get_between_the_messages(capfd):
    with Workers(1) as workers:
        assert workers.run(os.system, "echo noise") == 0
        assert workers.run(abs, -2) == 2
    assert "noise" in capfd.readouterr().err


def test_workers_end_with_the_process_that_started_them():
    code = (
        "import os, signal\n"
        "from kglmatch.streaming.workers import Workers\n"
        "workers = Workers(1)\n"
        "print(workers.run(os.getpid), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    worker, deadline = int(done.stdout), time.monotonic() + 20
    while running(worker):
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.05)


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_answers_that_wait_are_bounded():
    started = []

    def make(number):
        started.append(number)
        return np.zeros(1000, np.uint8)

    tasks = ((i, make, (i,)) for i in range(50))
    prefetch = Prefetch(tasks, Workers(0), budget=3000)
    assert prefetch.take()[0] == 0
    time.sleep(0.2)
    assert len(started) <= 6
    keys = [0]
    while (item := prefetch.take()) is not None:
        keys.append(item[0])
    prefetch.close()
    assert keys == list(range(50)) and size_of({"a": [(np.zeros(3, np.uint8),)]}) == 3


def test_closing_ends_a_worker_at_work():
    workers = Workers(1)
    threads = [threading.Thread(target=workers.run, args=(time.sleep, 60))]
    threads[0].start()
    while not workers._processes:
        time.sleep(0.01)
    workers.close()
    threads[0].join(timeout=10)
    assert not threads[0].is_alive() and workers.run(abs, 1) == Failure("interrupted")


def test_pairs_have_names():
    from kglmatch.streaming.results import as_pairs

    named = list(as_pairs([("a", "b"), Pair("c", "d", "third"), ["e", "f"]]))
    assert [(pair.vis, pair.name) for pair in named] == [("a", "0"), ("c", "third"), ("e", "2")]
