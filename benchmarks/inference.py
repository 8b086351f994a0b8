"""How fast the network runs: the published way in eager PyTorch, our PyTorch backend, onnxruntime.

    python benchmarks/inference.py                    # CPU, 64 pairs at once
    python benchmarks/inference.py --device cuda --pairs 2048
    python benchmarks/inference.py --model runs/mine/model --no-onnx --pairs 2 --seconds 0.1    # a trial
    OMP_NUM_THREADS=1 python benchmarks/inference.py --cpu-time     # a machine that others use, too

All contenders run by turns in one process, so that other load of the machine affects all of them. A
pair is two descriptors, two metric maps and the score; arrays come from and go to numpy. The published
way runs each branch from the patch on, in float32 and PyTorch's default layout, and FRN as separate
operations; so each stem, and a trunk that serves both branches, runs twice.

The matrix product of the same run is the yardstick: a convolution cannot do more multiplications a
second than that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kglmatch import Matcher
from kglmatch.models.cost import cost
from kglmatch.models.network import ConvBlock, KGLNet, compare_maps
from kglmatch.models.pretrained import load_model

MATRIX = 2048
Clock = Callable[[], float]


# --- the published way ----------------------------------------------------------------------------


def plain_frn_tlu(x: Tensor, norm: nn.Module, activation: nn.Module) -> Tensor:
    mean_square = torch.mean(x.pow(2), dim=(2, 3), keepdim=True)
    x = x * torch.rsqrt(mean_square + 1e-6)
    return torch.max(norm.weight * x + norm.bias, activation.tau)


def plain_block(block: ConvBlock, x: Tensor) -> Tensor:
    if block.input_norm is not None:
        x = plain_frn_tlu(x, block.input_norm, block.input_activation)
    x = plain_frn_tlu(block.conv(x), block.norm, block.activation)
    if block.attention is not None:
        mean = F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(1, 2)
        weight = torch.sigmoid(block.attention.conv(mean)).transpose(1, 2).unsqueeze(-1)
        x = x * weight.expand_as(x)
    return x


def plain_blocks(blocks: nn.Sequential, x: Tensor) -> Tensor:
    for block in blocks:
        x = plain_block(block, x)
    return x


def plain_descriptors(net: KGLNet, x: Tensor, modality: str) -> Tensor:
    stem = plain_blocks(net.stem.select(modality), x)
    descriptor_map = plain_blocks(net.descriptor_trunk.select(modality), stem)
    return F.normalize(net.descriptor_head(descriptor_map, modality), dim=1)


def plain_maps(net: KGLNet, x: Tensor, modality: str) -> Tensor:
    trunk = net.descriptor_trunk if net.metric_trunk is None else net.metric_trunk
    return plain_blocks(trunk.select(modality), plain_blocks(net.stem.select(modality), x))


def plain_scores(net: KGLNet, vis: Tensor, ir: Tensor) -> Tensor:
    head = net.metric_head
    maps = plain_maps(net, vis, "vis"), plain_maps(net, ir, "ir")
    x = head.conv(compare_maps(*maps, head.has_product))
    x = head.activation(x) if head.norm is None else plain_frn_tlu(x, head.norm, head.activation)
    x = F.adaptive_avg_pool2d(x, 1).flatten(1)
    return torch.sigmoid(head.fc3(F.relu(head.fc2(F.relu(head.fc1(x))))))


# --- contenders -----------------------------------------------------------------------------------


def published(model: str, device: str) -> tuple[Callable, Callable]:
    """Functions of numpy patches: all of a pair, and descriptors alone."""
    state, config = load_model(model)
    net = KGLNet(config).eval()
    net.load_state_dict(state)
    net.eval().requires_grad_(False).to(device)

    def to_device(patches: np.ndarray) -> Tensor:
        return torch.from_numpy(patches).unsqueeze(1).to(device)

    @torch.no_grad()
    def pairs(vis: np.ndarray, ir: np.ndarray) -> list[np.ndarray]:
        a, b = to_device(vis), to_device(ir)
        out = plain_descriptors(net, a, "vis"), plain_descriptors(net, b, "ir"), plain_scores(net, a, b)
        return [tensor.cpu().numpy() for tensor in out]

    @torch.no_grad()
    def descriptors(vis: np.ndarray) -> np.ndarray:
        return plain_descriptors(net, to_device(vis), "vis").cpu().numpy()

    return pairs, descriptors


def ours(matcher: Matcher) -> tuple[Callable, Callable]:
    def pairs(vis: np.ndarray, ir: np.ndarray) -> list[np.ndarray]:
        a, b = matcher.describe(vis, "vis"), matcher.describe(ir, "ir")
        return [a.descriptors, b.descriptors, matcher.score(a, b)]

    return pairs, lambda vis: matcher.describe(vis, "vis", maps=False).descriptors


def matrix_products(device: str, clock: Clock) -> Callable[[], float]:
    """A function that multiplies two float32 matrices and returns how many GFLOP/s that were."""
    a, b = (torch.rand(MATRIX, MATRIX, device=device) for _ in range(2))

    def run() -> float:
        start = clock()
        torch.mm(a, b)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return 2 * MATRIX**3 / (clock() - start) / 1e9

    return run


# --- measurement ----------------------------------------------------------------------------------


def check_numbers(results: dict[str, list[np.ndarray]], tolerance: float) -> None:
    """Ends the program unless all contenders give what the first does."""
    _, expected = next(iter(results.items()))
    for name, result in results.items():
        for value, reference in zip(result, expected, strict=True):
            if np.abs(value.reshape(reference.shape) - reference).max() > tolerance:
                raise SystemExit(f"{name} does not give the published network's numbers")


def measure(
    tasks: dict[tuple[str, str], Callable], matrix: Callable[[], float], seconds: float, clock: Clock
) -> tuple[dict[tuple[str, str], list[float]], list[float]]:
    """Runs all tasks by turns; returns the seconds of each round, and GFLOP/s of the matrix product."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in tasks}
    peaks: list[float] = []
    stop = time.perf_counter() + seconds
    while not peaks or time.perf_counter() < stop:
        peaks.append(matrix())
        for key, task in tasks.items():
            start = clock()
            task()
            times[key].append(clock() - start)
    return times, peaks


def rows(
    times: dict[tuple[str, str], list[float]], macs: dict[str, int], pairs: int, peak: float
) -> list[dict[str, object]]:
    """One row of figures a contender; ratios to the first, round by round."""
    names = list(dict.fromkeys(name for name, _ in times))
    found = []
    for name in names:
        row: dict[str, object] = {"name": name}
        for what, count in macs.items():
            own, reference = times[name, what], times[names[0], what]
            row[f"{what}_per_second"] = pairs / statistics.median(own)
            row[f"{what}_best"] = pairs / min(own)
            row[f"{what}_ratio"] = statistics.median(r / t for r, t in zip(reference, own, strict=True))
            row[f"{what}_of_peak"] = pairs / min(own) * 2 * count / 1e9 / peak
        found.append(row)
    return found


def print_table(report: dict) -> None:
    peak = report["matrix_product_gflops"]
    print(
        f"{report['device']}, {report['threads']} threads, {report['pairs']} pairs at once, "
        f"{report['rounds']} rounds; matrix product {peak['median']:.0f} GFLOP/s (best {peak['best']:.0f})"
    )
    for what, count in report["multiplications"].items():
        print(f"\n{what}: {count / 1e6:.1f} million multiply-adds each")
        print(f"  {'':32}{'per second':>12}{'best':>8}{'ratio':>8}{'of peak':>9}")
        for row in report["contenders"]:
            print(
                f"  {row['name']:32}{row[f'{what}_per_second']:12.1f}{row[f'{what}_best']:8.1f}"
                f"{row[f'{what}_ratio']:8.2f}{row[f'{what}_of_peak']:9.0%}"
            )
    print("\nper second, and ratio to the published way of the same round: medians; of peak: best to best")


def load_matchers(args: argparse.Namespace) -> dict[str, Matcher]:
    options = {"device": args.device, "dtype": args.dtype}
    matchers = {"PyTorch": Matcher.from_pretrained(args.model, **options)}
    if args.onnx is not None:
        matchers["ONNX"] = Matcher.from_onnx(args.onnx, device=args.device)
    elif not args.no_onnx:
        matchers["ONNX"] = Matcher.from_pretrained(args.model, backend="onnx", **options)
    return matchers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="kglnet-vis-nir")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=64, help="pairs at once (default: 64)")
    parser.add_argument("--seconds", type=float, default=60, help="time to measure (default: 60)")
    parser.add_argument("--dtype", help="of our backends (default: float16 on CUDA, float32 on the CPU)")
    parser.add_argument(
        "--onnx", metavar="FOLDER", help="graphs of the model (default: its own, or made once)"
    )
    parser.add_argument("--no-onnx", action="store_true", help="leave onnxruntime out")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time; needs OMP_NUM_THREADS=1")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.cpu_time and torch.get_num_threads() != 1:
        parser.error("--cpu-time needs OMP_NUM_THREADS=1")
    clock = time.process_time if args.cpu_time else time.perf_counter

    matchers = load_matchers(args)
    by_torch = matchers["PyTorch"]
    contenders = {"published, eager PyTorch": published(args.model, args.device)}
    for name, matcher in matchers.items():
        contenders[f"kglmatch, {name} {matcher.backend.dtype}"] = ours(matcher)
    size = by_torch.config.patch_size
    rng = np.random.default_rng(0)
    vis, ir = (rng.random((args.pairs, size, size), dtype=np.float32) for _ in range(2))
    full_precision = all(matcher.backend.dtype == "float32" for matcher in matchers.values())
    results = {name: pairs(vis, ir) for name, (pairs, _) in contenders.items()}
    check_numbers(results, tolerance=1e-4 if full_precision else 2e-2)

    tasks: dict[tuple[str, str], Callable] = {}
    for name, (pairs, descriptors) in contenders.items():
        tasks[name, "pairs"] = lambda run=pairs: run(vis, ir)
        tasks[name, "descriptors"] = lambda run=descriptors: run(vis)
        tasks[name, "descriptors"]()
    times, peaks = measure(tasks, matrix_products(args.device, clock), args.seconds, clock)

    macs = {"pairs": cost(by_torch.config).pair, "descriptors": cost(by_torch.config).descriptor}
    report = {
        "device": args.device,
        "threads": torch.get_num_threads(),
        "pairs": args.pairs,
        "rounds": len(peaks),
        "matrix_product_gflops": {"median": statistics.median(peaks), "best": max(peaks)},
        "multiplications": macs,
        "contenders": rows(times, macs, args.pairs, max(peaks)),
    }
    if args.json:
        print(json.dumps(report))
    else:
        print_table(report)


if __name__ == "__main__":
    main()
