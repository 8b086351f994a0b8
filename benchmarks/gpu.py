"""Patches per second on a GPU, and the share of its matrix-product and copy rates that they reach.

    python benchmarks/gpu.py                          # CUDA, ten minutes at most
    python benchmarks/gpu.py --json                   # one JSON object, to send to us
    python benchmarks/gpu.py --device cpu --patches 32 --seconds 5    # what it prints, without a GPU

Describing is timed for every backend and precision, with patches and descriptors on the host. The rates are
measured in the same run: the product of two matrices in the same precision, and a copy within the device's
memory. A convolution cannot do more multiplications per second than the product; of the copy, the share
counts each map of a descriptor once written and once read. A pair of images is matched and registered on
the device and on the CPU beside it: detecting, aligning and verifying run on the CPU in any case.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from kglmatch import KGLMatchError, Matcher, __version__, load_image
from kglmatch.models.config import KGLNetConfig
from kglmatch.models.cost import cost

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"
DTYPES = ("float32", "float16", "bfloat16")
COPY_BYTES = 2**28
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def rate(run: Callable[[], object], device: str, seconds: float) -> float:
    """Calls per second: the median of calls for `seconds`, at least three."""
    run()  # choices of algorithms, and memory
    synchronize(device)
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        began = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return 1 / statistics.median(times)


def product_rate(device: str, dtype: str, size: int, seconds: float) -> float:
    """Multiply-adds per second of a matrix product in a precision, without TF32."""
    a, b = (torch.rand(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return rate(lambda: torch.mm(a, b), device, seconds) * size**3


def copy_rate(device: str, seconds: float, size: int = COPY_BYTES) -> float:
    """Bytes read and written per second by a copy within the memory."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return rate(lambda: target.copy_(source), device, seconds) * 2 * size


def map_values(config: KGLNetConfig) -> int:
    """Numbers in the maps that the convolutions of a descriptor write, each once."""
    reductions = itertools.accumulate(config.strides, operator.mul)
    return sum(
        channels * (config.patch_size // reduction) ** 2
        for channels, reduction in zip(config.channels, reductions, strict=True)
    )


def contenders(model: str, device: str, folder: Path, onnx: bool) -> dict[tuple[str, str], Matcher | str]:
    """(backend, precision) -> a matcher, or why there is none."""
    makers: dict[tuple[str, str], Callable[[], Matcher]] = {
        ("PyTorch", dtype): lambda dtype=dtype: Matcher.from_pretrained(model, device=device, dtype=dtype)
        for dtype in DTYPES
    }
    if onnx:

        def exported(half: bool) -> Matcher:
            path = folder / ("float16" if half else "float32")
            by = Matcher.from_pretrained(model, device="cpu", dtype="float32")
            by.export_onnx(path, half=half)
            return Matcher.from_onnx(path, device=device)

        makers["onnxruntime", "float32"] = lambda: exported(False)
        makers["onnxruntime", "float16"] = lambda: exported(True)
    found: dict[tuple[str, str], Matcher | str] = {}
    for key, make in makers.items():
        try:
            found[key] = make()
        except KGLMatchError as error:
            found[key] = str(error)
    return found


def pair_seconds(by: Matcher, images: list[np.ndarray], args: argparse.Namespace) -> dict[str, float]:
    """Seconds to match and to register a pair of images."""
    runs: dict[str, Callable[[], object]] = {
        "match_seconds": lambda: by.match_images(*images, max_keypoints=args.keypoints),
        "register_seconds": lambda: by.register(*images),
    }
    return {name: 1 / rate(run, args.device, args.seconds) for name, run in runs.items()}


def measure(args: argparse.Namespace) -> dict[str, object]:
    device = args.device
    images = [load_image(path) for path in args.images]
    rng = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    copied = copy_rate(device, args.seconds, COPY_BYTES if device.startswith("cuda") else COPY_BYTES // 16)
    size = 8192 if device.startswith("cuda") else 512
    products = {dtype: product_rate(device, dtype, size, args.seconds) for dtype in DTYPES}
    with tempfile.TemporaryDirectory() as folder:
        for (backend, dtype), by in contenders(args.model, device, Path(folder), not args.no_onnx).items():
            row: dict[str, object] = {"backend": backend, "dtype": dtype}
            rows.append(row)
            if isinstance(by, str):
                row["problem"] = by
                continue
            patches = rng.random((args.patches, by.config.patch_size, by.config.patch_size), np.float32)
            calls = rate(lambda by=by, p=patches: by.describe(p, "vis", maps=False), device, args.seconds)
            a, b = by.describe(patches, "vis"), by.describe(patches, "ir")
            scores = rate(lambda by=by, a=a, b=b: by.score(a, b), device, args.seconds)
            row["patches_per_second"] = calls * args.patches
            row["scores_per_second"] = scores * args.patches
            row["of_product"] = calls * args.patches * cost(by.config).descriptor / products[dtype]
            moved = 2 * map_values(by.config) * BYTES[dtype]  # written by one convolution, read by the next
            row["of_copy"] = calls * args.patches * moved / copied
            row |= pair_seconds(by, images, args)
    cpu = Matcher.from_pretrained(args.model, device="cpu", dtype="float32")
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "versions": {
            "kglmatch": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "onnxruntime": onnxruntime.__version__,
        },
        "patches": args.patches,
        "keypoints": args.keypoints,
        "on_the_cpu": pair_seconds(cpu, images, args),
        "products_per_second": products,
        "copied_bytes_per_second": copied,
        "rows": rows,
    }


def print_table(report: dict) -> None:
    products = ", ".join(f"{k} {2 * v / 1e12:.2f} TFLOP/s" for k, v in report["products_per_second"].items())
    print(f"{report['device']}; {report['patches']} patches at once")
    print(f"matrix product: {products}; copy: {report['copied_bytes_per_second'] / 1e9:.0f} GB/s")
    columns = f"{'patches/s':>12}{'scores/s':>12}{'of product':>12}{'of copy':>10}"
    print(f"\n{'':24}{columns}{'match':>10}{'register':>10}")
    for row in report["rows"]:
        name = f"{row['backend']} {row['dtype']}"
        if "problem" in row:
            print(f"{name:24}  {row['problem']}")
            continue
        print(
            f"{name:24}{row['patches_per_second']:12.0f}{row['scores_per_second']:12.0f}"
            f"{row['of_product']:12.1%}{row['of_copy']:10.1%}{pair_columns(row)}"
        )
    print(f"{'PyTorch float32, CPU':70}{pair_columns(report['on_the_cpu'])}")
    print(f"match: one pair of images, {report['keypoints']} keypoints a side; register: the same pair")


def pair_columns(row: dict) -> str:
    return f"{row['match_seconds']:8.3f} s{row['register_seconds']:8.3f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="kglnet-vis-nir")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--patches", type=int, default=4096, help="at once (default: 4096)")
    parser.add_argument(
        "--images",
        nargs=2,
        metavar=("VIS", "IR"),
        default=[DATA / "sentinel2_red.tif", DATA / "sentinel2_nir.tif"],
        help="to match and to register (default: the example pair)",
    )
    parser.add_argument("--keypoints", type=int, default=2048, help="a side (default: 2048)")
    parser.add_argument("--seconds", type=float, default=10, help="for each figure (default: 10)")
    parser.add_argument("--no-onnx", action="store_true", help="leave onnxruntime out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here; --device cpu shows what is measured")
    # The yardstick without TF32, as the network runs.
    torch.backends.cuda.matmul.allow_tf32 = False
    report = measure(args)
    if args.json:
        print(json.dumps(report))
    else:
        print_table(report)


if __name__ == "__main__":
    main()
