"""How long it takes to register and to match a pair, compared with other matchers on it, in one run.

    python benchmarks/speed.py                                  # the example pair
    python benchmarks/speed.py VIS IR --model kglnet-vis-lwir   # a pair of yours
    python benchmarks/speed.py --model kglnet-vis-nir kglnet-vis-nir-lite --backend torch onnx
    python benchmarks/speed.py --rounds 1 --baselines SIFT      # to see that it runs
    OMP_NUM_THREADS=1 python benchmarks/speed.py --threads 1    # one core, by its processor time

All take turns on one pair, so that other load of the machine affects them alike. Wall and processor time are
given, medians over the rounds, and the ratio of processor times to that of OpenCV's SIFT with MAGSAC++. What
is only fast is not worth much: `benchmarks/proof` says who is right.
The network as published, in eager PyTorch, describes the same patches; the rates of a matrix product and of a
copy are the machine's.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import inference
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "proof"))
import contenders

from kglmatch import Features, KGLNetConfig, Matcher, extract_patches, load_image
from kglmatch.errors import KGLMatchError
from kglmatch.models.cost import cost
from kglmatch.models.network import KGLNet

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"
LIMITS: dict[str, dict[str, float]] = {
    "register": {},
    "register, any rotation": {"max_rotation": 180.0},
    "register, any rotation and a factor of 2": {"max_rotation": 180.0, "max_scale": 2.0},
}
REFERENCE = "SIFT"
MATRIX, COPIED = 1024, 1 << 24  # side; bytes
Contender = Callable[[], Any]


def clocked(run: Contender) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def machine() -> tuple[float, float]:
    """Multiply-adds a second of a float32 matrix product in numpy, and bytes a second that a copy moves."""
    a = np.random.default_rng(0).random((MATRIX, MATRIX), dtype=np.float32)
    source, target = np.ones(COPIED, np.uint8), np.empty(COPIED, np.uint8)
    product = min(clocked(lambda: a @ a)[0] for _ in range(3))
    copy = min(clocked(lambda: np.copyto(target, source))[0] for _ in range(3))
    return MATRIX**3 / product, COPIED / copy


def ours(
    matcher: Matcher,
    vis: np.ndarray,
    ir: np.ndarray,
    keypoints: int,
    features: Features,
    patches: np.ndarray,
    called: str,
) -> dict[str, Contender]:
    """What a matcher does with the pair, and its parts; each name ends with what the matcher is called.

    Args:
        keypoints: of each image, at most.
        features, patches: of the visible image's keypoints, (N, 64, 64).
    """
    runs: dict[str, Contender] = {
        name: lambda limits=limits: matcher.register(vis, ir, **limits) for name, limits in LIMITS.items()
    }
    runs[f"match_images, {keypoints} keypoints"] = lambda: matcher.match_images(
        vis, ir, max_keypoints=keypoints
    )
    runs[f"describe {len(patches)} patches"] = lambda: matcher.describe(patches, "vis")
    runs[f"score {len(patches)} pairs"] = lambda: matcher.score(
        features, dataclasses.replace(features, modality="ir")
    )
    return {name + called: run for name, run in runs.items()}


def published(patches: np.ndarray) -> Contender:
    """Descriptors and metric maps of patches by the published network in eager PyTorch, 64 at once.

    Its speed depends on the architecture alone, so that its weights are random.
    """
    net = KGLNet(KGLNetConfig()).eval()

    @torch.no_grad()
    def run() -> None:
        for batch in torch.from_numpy(patches)[:, None].split(64):
            inference.plain_descriptors(net, batch, "vis")
            inference.plain_maps(net, batch, "vis")

    return run


def baselines(names: list[str], vis: np.ndarray, ir: np.ndarray) -> tuple[dict[str, Contender], list[str]]:
    """Other matchers, each with the transform that its matches agree on, and why some cannot be measured."""
    runs: dict[str, Contender] = {}
    missing = []
    for name in names:
        try:
            function = contenders.load(name)
        except KGLMatchError as error:
            missing.append(str(error))
            continue
        runs[name] = lambda name=name, function=function: contenders.alone(
            contenders.propose(name, function, vis, ir)
        )
    return runs, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vis", nargs="?", type=Path, default=DATA / "sentinel2_red.tif")
    parser.add_argument("ir", nargs="?", type=Path, default=DATA / "sentinel2_nir.tif")
    parser.add_argument("--model", nargs="+", default=["kglnet-vis-nir"])
    parser.add_argument("--backend", nargs="+", default=["torch"], help="each model is run by each")
    parser.add_argument("--max-keypoints", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of OpenCV (default: all cores)")
    parser.add_argument(
        "--baselines", nargs="*", default=list(contenders.available()), help="default: all but the slow ones"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    try:
        vis, ir = load_image(args.vis), load_image(args.ir)
        runs: dict[str, Contender] = {}
        macs = {}
        for model, backend in itertools.product(args.model, args.backend):
            matcher = Matcher.from_pretrained(model, backend=backend)
            macs[model] = cost(matcher.config).descriptor_and_map
            alone = len(args.model) * len(args.backend) == 1
            called = "" if alone else f" ({model}, {backend})"
            features = matcher.extract(vis, "vis", max_keypoints=args.max_keypoints)
            patches = extract_patches(vis, features.keypoints, patch_size=matcher.config.patch_size)
            runs |= ours(matcher, vis, ir, args.max_keypoints, features, patches, called)
    except KGLMatchError as error:
        raise SystemExit(str(error)) from error
    runs[f"describe {len(patches)} patches, published network"] = published(patches)
    others, missing = baselines(args.baselines, vis, ir)
    runs |= others
    cv2.setNumThreads(cv2.getNumberOfCPUs() if args.threads is None else args.threads)
    for run in runs.values():  # what is loaded or compiled at first use
        run()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            taken[name].append(clocked(run))
    product, copy = machine()
    wall, cpu = (
        {name: statistics.median(t[k] for t in times) for name, times in taken.items()} for k in (0, 1)
    )
    if args.json:
        print(json.dumps({"wall": wall, "cpu": cpu, "product": product, "copy": copy, "missing": missing}))
        return
    size = " and ".join(f"{image.shape[1]} x {image.shape[0]}" for image in (vis, ir))
    for model, patch in macs.items():
        print(f"{model}: {patch / 1e6:.0f} million multiply-adds a patch")
    width = max(map(len, runs))
    print(f"{f'Images of {size} pixels':{width}s} {'wall s':>8s} {'CPU s':>8s} {'to ' + REFERENCE:>8s}")
    for name in runs:
        ratio = f"{cpu[name] / cpu[REFERENCE]:8.2f}" if REFERENCE in cpu else ""
        print(f"{name:{width}s} {wall[name]:8.2f} {cpu[name]:8.2f} {ratio}")
    print(f"This machine: {product / 1e9:.1f} billion multiply-adds a second, {copy / 1e9:.1f} GB/s copied")
    for line in missing:
        print(line)


if __name__ == "__main__":
    main()
