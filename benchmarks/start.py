"""What `kglmatch match` spends outside matching: the interpreter, imports, the weights, the results.

    python benchmarks/start.py                                    # the example pair, PyTorch
    python benchmarks/start.py --backend onnx --model onnx/       # graphs that kglmatch export wrote
    python benchmarks/start.py --modules 20                       # also the slowest imports

Each run is a process of its own. Both clocks are given: on a machine that others use, the processor time is
the better one. `import torch` alone is measured in the same way: nothing that uses PyTorch starts faster.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"
# Counted from the start of the process; the matching itself is clocked within.
TIMED = """
import json, sys, time
began = time.perf_counter()
from kglmatch.cli import main
from kglmatch.commands import match
inner, spent = match._match, []

def timed(*arguments):
    clocks = time.perf_counter(), time.process_time()
    found = inner(*arguments)
    spent.extend((time.perf_counter() - clocks[0], time.process_time() - clocks[1]))
    return found

match._match = timed
code = main(sys.argv[1:])
if code:
    sys.exit(code)
wall, cpu = time.perf_counter() - began, time.process_time()
report = {"wall": wall - spent[0], "cpu": cpu - spent[1], "torch": "torch" in sys.modules}
print(json.dumps(report), file=sys.stderr)
"""
IMPORT = "import time, {0}; print(time.process_time())"


def run(code: str, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *options, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return done


def outside(arguments: list[str]) -> dict[str, float]:
    return json.loads(run(TIMED, *arguments).stderr.splitlines()[-1])


def slowest_imports(arguments: list[str], count: int) -> list[tuple[str, float]]:
    """Modules at the top of other packages and our own, with the seconds that they and theirs took."""
    done = run(TIMED, *arguments, options=("-X", "importtime"))
    lines = re.findall(r"^import time:\s+\d+ \|\s+(\d+) \|\s+([\w.]+)$", done.stderr, re.M)
    found = [
        (name, int(spent) / 1e6) for spent, name in lines if "." not in name or name.startswith("kglmatch.")
    ]
    return sorted(found, key=lambda item: -item[1])[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="kglnet-vis-nir")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--max-keypoints", type=int, default=50, help="so that a run is short (default: 50)")
    parser.add_argument("--rounds", type=int, default=5, help="runs (default: 5)")
    parser.add_argument("--modules", type=int, default=0, metavar="N", help="also list the N slowest imports")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    pair = [str(DATA / f"sentinel2_{band}.tif") for band in ("red", "nir")]
    match = ["match", *pair, "--max-displacement", "8", "--max-keypoints", str(args.max_keypoints)]
    match += ["--model", args.model, "--backend", args.backend, "--device", "cpu"]

    runs = [outside(match) for _ in range(args.rounds)]
    imports = {
        name: min(float(run(IMPORT.format(name)).stdout) for _ in range(args.rounds))
        for name in ("sys", "numpy", "cv2", "torch" if args.backend == "torch" else "onnxruntime")
    }
    report = {
        "cpu": {
            "best": min(each["cpu"] for each in runs),
            "median": statistics.median(each["cpu"] for each in runs),
        },
        "wall": {
            "best": min(each["wall"] for each in runs),
            "median": statistics.median(each["wall"] for each in runs),
        },
        "torch_imported": any(each["torch"] for each in runs),
        "imports_cpu": imports,
        "modules": slowest_imports(match, args.modules) if args.modules else [],
    }
    if args.json:
        print(json.dumps(report))
        return
    for clock, name in (("cpu", "processor time"), ("wall", "wall time")):
        best, median = report[clock]["best"], report[clock]["median"]
        print(f"outside matching, {name}: best {best:.2f} s, median {median:.2f} s of {args.rounds}")
    for name, spent in imports.items():
        print(f"a process that imports {name} alone: {spent:.2f} s processor time, best")
    for name, spent in report["modules"]:
        print(f"{spent:8.3f} s  {name}")


if __name__ == "__main__":
    main()
