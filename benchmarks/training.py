"""How fast training runs: the published loop, written plainly, against ours.

    python benchmarks/training.py                       # CPU, 96 pairs a batch
    python benchmarks/training.py --device cuda --pairs 512 --precision bfloat16
    OMP_NUM_THREADS=1 python benchmarks/training.py --cpu-time     # a machine that others use, too
    python benchmarks/training.py --pairs 4 --seconds 0 --eager    # one round, to see that it runs

Both loops train the same network on the same scenes and take turns in one process, so that other load on
the machine affects both. A step is everything from the scenes to the updated weights. Before the
clock starts, both must give the same loss and the same gradients on one batch.

The plain loop follows the description of the published one: each stem runs twice, once for each branch,
eager, in float32 and PyTorch's default layout, FRN as separate operations; two calls of the metric head;
patches are augmented one by one on the CPU with OpenCV and numpy. Ours also averages the weights.

The matrix product of the same run, in the precision of our loop, is the yardstick for the arithmetic.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from inference import plain_blocks, plain_frn_tlu
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kglmatch.datasets import ScenePairs
from kglmatch.models.config import KGLNetConfig
from kglmatch.models.cost import cost
from kglmatch.models.network import KGLNet
from kglmatch.training import Augmentation, Batch, Trainer, TrainingConfig, losses, mining, objective
from kglmatch.training.data import load_training_data

MATRIX = {"cpu": 2048, "cuda": 8192}
NETWORK = KGLNetConfig()  # the published one
Clock = Callable[[], float]


# --- the published loop, plainly ------------------------------------------------------------------


class PlainLoop:
    """One process, one batch after the other; nothing is compiled, fused or done on the device early."""

    def __init__(self, scenes: ScenePairs, config: TrainingConfig, device: torch.device) -> None:
        self.scenes, self.config, self.device = scenes, config, device
        self.net = KGLNet(NETWORK).to(device).train()
        self.random = np.random.default_rng(config.seed)
        head = list(self.net.metric_head.parameters())
        ids = {id(p) for p in head}
        trunk = [p for p in self.net.parameters() if id(p) not in ids]
        self.optimizers = (
            torch.optim.Adam(trunk, config.learning_rate),
            torch.optim.Adam(head, config.metric_head_learning_rate),
        )

    def step(self) -> None:
        rows = self.random.choice(len(self.scenes), self.config.batch_size, replace=False)
        pairs = [
            augment_pair(vis, ir, self.config.augmentation, self.random)
            for vis, ir in zip(self.scenes.patches(rows, "vis"), self.scenes.patches(rows, "ir"), strict=True)
        ]
        vis, ir = (
            torch.from_numpy(np.stack(side)).unsqueeze(1).to(self.device) for side in zip(*pairs, strict=True)
        )
        loss = self.loss(vis, ir)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        loss.item()  # the published loop prints its losses

    def loss(self, vis: Tensor, ir: Tensor) -> Tensor:
        raw_vis, descriptor_vis = self.describe(vis, "vis")
        raw_ir, descriptor_ir = self.describe(ir, "ir")
        map_vis, map_ir = self.map(vis, "vis"), self.map(ir, "ir")
        a, b = F.normalize(raw_vis, dim=1), F.normalize(raw_ir, dim=1)
        same = torch.eye(len(vis), dtype=torch.bool, device=vis.device)
        mined = mining.hard_negatives(losses.descriptor_distances(a, b), same)[:, 0]
        return (
            losses.hybrid_triplet_loss(a, b)
            + self.config.norm_weight * losses.norm_loss(raw_vis, raw_ir)
            + losses.metric_loss(self.score(map_vis, map_ir), self.score(map_vis, map_ir[mined]))
            + losses.feature_guided_loss(descriptor_vis, map_vis)
            + losses.feature_guided_loss(descriptor_ir, map_ir)
        )

    def describe(self, x: Tensor, modality: str) -> tuple[Tensor, Tensor]:
        stem = plain_blocks(self.net.stem.select(modality), x)
        descriptor_map = plain_blocks(self.net.descriptor_trunk.select(modality), stem)
        return self.net.descriptor_head(descriptor_map, modality), descriptor_map

    def map(self, x: Tensor, modality: str) -> Tensor:
        stem = plain_blocks(self.net.stem.select(modality), x)
        return plain_blocks(self.net.metric_trunk.select(modality), stem)

    def score(self, map_vis: Tensor, map_ir: Tensor) -> Tensor:
        head = self.net.metric_head
        x = plain_frn_tlu(head.conv(torch.abs(map_vis - map_ir)), head.norm, head.activation)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return head.fc3(F.relu(head.fc2(F.relu(head.fc1(x))))).flatten()


def augment_pair(
    vis: NDArray[np.uint8], ir: NDArray[np.uint8], settings: Augmentation, random: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Flip and quarter turn of both patches, everything else of each on its own."""
    turns, mirror = int(random.integers(4)), bool(random.integers(2))
    out = []
    for patch in (vis, ir):
        turned = np.rot90(patch[:, ::-1] if mirror else patch, turns)
        out.append(augment_patch(np.ascontiguousarray(turned), settings, random))
    return out[0], out[1]


def augment_patch(
    patch: NDArray[np.uint8], settings: Augmentation, random: np.random.Generator
) -> NDArray[np.float32]:
    """Small shift, scale and rotation, then blur, gamma, contrast, brightness and noise."""
    size = patch.shape[0]
    centre = ((size - 1) / 2, (size - 1) / 2)
    scale = float(np.exp(random.uniform(-1, 1) * np.log1p(settings.scale)))
    affine = cv2.getRotationMatrix2D(centre, random.uniform(-settings.rotation, settings.rotation), scale)
    affine[:, 2] += random.uniform(-settings.shift, settings.shift, 2)
    image = patch.astype(np.float32) / 255
    image = cv2.warpAffine(image, affine, (size, size), borderMode=cv2.BORDER_REPLICATE)
    sigma = random.uniform(-settings.blur, settings.blur)
    if sigma > 0.1:
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    image = np.power(np.clip(image, 1e-4, 1), np.exp(random.normal(0, settings.gamma)))
    mean = image.mean()
    image = mean + random.uniform(1 - settings.contrast, 1 + settings.contrast) * (image - mean)
    image = image + random.uniform(-settings.brightness, settings.brightness)
    image = image + random.uniform(0, settings.noise) * random.standard_normal(image.shape)
    return np.clip(image, 0, 1).astype(np.float32)


# --- what both train on ---------------------------------------------------------------------------


def write_scenes(folder: Path, count: int = 6) -> None:
    """Image pairs of random structure, 640 x 480."""
    random = np.random.default_rng(0)
    for i in range(count):
        image = sum(
            cv2.GaussianBlur(random.standard_normal((480, 640)), (0, 0), sigma) * sigma for sigma in (1, 3, 9)
        )
        image = (image - image.min()) / (image.max() - image.min())
        for name, picture in (("rgb", image), ("nir", 1 - image**1.5)):
            cv2.imwrite(str(folder / f"{i:04}_{name}.png"), np.rint(255 * picture).astype(np.uint8))


def check_same_gradients(plain: PlainLoop, trainer: Trainer) -> None:
    """Ends the program unless both loops give one loss and one gradient."""
    plain.net.load_state_dict(trainer.net.state_dict())
    generator = torch.Generator().manual_seed(0)
    vis, ir = (torch.rand(8, 1, 64, 64, generator=generator).to(plain.device) for _ in range(2))
    theirs = plain.loss(vis, ir)
    theirs.backward()
    # Eager: another batch size would be compiled for itself.
    net = KGLNet(NETWORK).to(plain.device).train()
    net.load_state_dict(trainer.net.state_dict())
    same_place = torch.eye(8, dtype=torch.bool, device=plain.device)
    config = dataclasses.replace(trainer.config, precision="float32")
    ours = objective(net, Batch(vis, ir, same_place), config).total
    ours.backward()
    for (name, a), b in zip(net.named_parameters(), plain.net.parameters(), strict=True):
        if (a.grad - b.grad).norm() > 1e-2 * b.grad.norm() + 1e-4:
            raise SystemExit(f"the two loops differ in the gradient of {name}")
    if not torch.isclose(ours, theirs, rtol=1e-4):
        raise SystemExit(f"the two loops differ in their loss: {float(ours)} and {float(theirs)}")


# --- measurement ----------------------------------------------------------------------------------


def matrix_products(device: torch.device, precision: str, clock: Clock) -> Callable[[], float]:
    """A function that multiplies two matrices and returns how many GFLOP/s that were."""
    size = MATRIX[device.type]
    a, b = (torch.rand(size, size, device=device).to(getattr(torch, precision)) for _ in range(2))

    def run() -> float:
        start = clock()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 2 * size**3 / (clock() - start) / 1e9

    return run


def operations_a_pair(config: TrainingConfig) -> float:
    """Floating-point operations of a training step as we run it, a pair: forward, and twice as much back."""
    of = cost(NETWORK)
    return 3 * 2 * (of.pair + (config.hard_negatives + config.random_negatives) * of.score)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=96, help="pairs a batch (default: 96)")
    parser.add_argument("--seconds", type=float, default=120, help="time to measure (default: 120)")
    parser.add_argument("--precision", default="float32", help="of our loop (default: float32)")
    parser.add_argument("--eager", action="store_true", help="do not compile our loop")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time; needs OMP_NUM_THREADS=1")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.cpu_time and torch.get_num_threads() != 1:
        parser.error("--cpu-time needs OMP_NUM_THREADS=1")
    clock = time.process_time if args.cpu_time else time.perf_counter

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scenes(folder, 2 if args.pairs < 16 else 6)
        config = TrainingConfig(
            data=str(folder),
            validation_images=1,
            validation_pairs=100,
            batch_size=args.pairs,
            precision=args.precision,
            compile=not args.eager,
        )
        trainer = Trainer(config, folder / "run", device=args.device)
        (training,), _ = load_training_data(config, NETWORK.patch_size)
    device = trainer.device
    plain = PlainLoop(training.pairs, config, device)
    check_same_gradients(plain, trainer)

    def timed(task: Callable[[], object]) -> float:
        start = clock()
        task()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    loops = {"published loop, plain": plain.step, "kglmatch": trainer.one_step}
    for _ in range(2):  # the first steps compile and allocate
        for step in loops.values():
            timed(step)
    matrix = matrix_products(device, args.precision, clock)
    peaks: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in loops}
    stop = time.perf_counter() + args.seconds
    while not peaks or time.perf_counter() < stop:
        peaks.append(matrix())
        for name, step in loops.items():
            times[name].append(timed(step))

    theirs, ours = times.values()
    ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    operations = operations_a_pair(config)
    report = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "pairs": args.pairs,
        "precision": args.precision,
        "compiled": not args.eager,
        "rounds": len(peaks),
        "matrix_product_gflops": {"median": statistics.median(peaks), "best": max(peaks)},
        "gflop_a_pair": operations / 1e9,
        "pairs_per_second": {name: args.pairs / statistics.median(t) for name, t in times.items()},
        "best_pairs_per_second": {name: args.pairs / min(t) for name, t in times.items()},
        "ratio": ratio,
        "share_of_matrix_product": args.pairs / min(ours) * operations / 1e9 / max(peaks),
    }
    if args.json:
        print(json.dumps(report))
        return
    print(
        f"{device}, {report['threads']} threads, {args.pairs} pairs a batch, our loop in {args.precision}"
        f"{' (eager)' if args.eager else ''}, {len(peaks)} rounds"
    )
    for name in loops:
        print(
            f"  {name:24}{report['pairs_per_second'][name]:9.1f} pairs/s (median)"
            f"{report['best_pairs_per_second'][name]:9.1f} (best)"
        )
    print(f"  ratio {ratio:.2f} (median over the rounds)")
    print(
        f"  {operations / 1e9:.2f} GFLOP a pair; the matrix product reaches {max(peaks):.0f} GFLOP/s, "
        f"our loop {report['share_of_matrix_product']:.0%} of it"
    )


if __name__ == "__main__":
    main()
