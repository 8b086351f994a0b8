"""Measures jobs on many pairs: throughput, memory, kills, Ray.

python benchmarks/many.py --throughput               match_many against describe and match alone
python benchmarks/many.py --memory [--output NAME]   memory along 10,000 pairs; NAME.csv and NAME.png
python benchmarks/many.py --kills 10 [--command C]   kill -9 at random moments, then resume
python benchmarks/many.py --ray                      two actors against two plain processes
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kglmatch.batch import Model, PairList, RayOptions, pairs_of_folders
from kglmatch.batch.image_jobs import MatchWork
from kglmatch.batch.ray_engine import run_on_ray
from kglmatch.images import load_image
from kglmatch.options import DEFAULT_MODEL
from kglmatch.patch_matcher import cut_patches

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"


def write_pairs(folder: Path, count: int, side: int) -> tuple[Path, Path]:
    """Pairs of PNG files of random structure; every 16th is a new one, the others are copies of its file."""
    folders = folder / "vis", folder / "ir"
    for one in folders:
        one.mkdir(parents=True)
    rng = np.random.default_rng(0)
    files: list[list[bytes]] = []
    for i in range(count):
        if i < 16:
            image = sum(
                cv2.GaussianBlur(rng.standard_normal((side, side)), (0, 0), s) * s for s in (1.5, 4, 9)
            )
            image = np.clip(image / 4 + 0.5, 0, 1)
            pictures = image, 0.15 + 0.7 * image**1.6
            files.append(
                [cv2.imencode(".png", np.rint(p * 255).astype(np.uint8))[1].tobytes() for p in pictures]
            )
        for one, content in zip(folders, files[i % 16], strict=True):
            (one / f"{i:06}.png").write_bytes(content)
    return folders


def thin_model(folder: Path) -> Model:
    sys.path.insert(0, str(TESTS))
    import pytest
    from thin_network import make_thin, save_thin_model

    make_thin(pytest.MonkeyPatch())
    return Model(str(save_thin_model(folder)), device="cpu")


def throughput(args: argparse.Namespace, model: Model, folder: Path) -> None:
    """Both ways, turn by turn, so that what else the machine does falls on both."""
    pairs = pairs_of_folders(*write_pairs(folder / "data", args.pairs, args.side))
    matcher = model.load()
    patches = []
    for pair in pairs:
        sides = []
        for path, modality in ((pair.vis, "vis"), (pair.ir, "ir")):
            detector = matcher.config.inference.get("detector", "structure")
            cut = cut_patches(
                load_image(path), modality, patch_size=64, detector=detector, max_keypoints=args.keypoints
            )
            sides.append(cut[1])
        patches.append(sides)
    list(matcher.match_many(pairs[:1], max_keypoints=args.keypoints))  # warm
    clocks: dict[str, list[tuple[float, float]]] = {"alone": [], "many": []}
    for _ in range(args.rounds):
        began = clock()
        for vis, ir in patches:
            features = matcher.describe(vis, "vis"), matcher.describe(ir, "ir")
            matcher.match(*features)
        clocks["alone"].append(elapsed(began))
        began = clock()
        for result in matcher.match_many(pairs, max_keypoints=args.keypoints, workers=args.workers):
            assert result.error is None, result.error
        clocks["many"].append(elapsed(began))
    count = sum(len(side) for sides in patches for side in sides)
    print(f"{len(pairs)} pairs, {count} patches, {args.rounds} rounds")
    for unit, column in (("wall", 0), ("processor", 1)):
        alone, many = ([row[column] for row in clocks[name]] for name in ("alone", "many"))
        ratios = np.divide(alone, many)
        print(
            f"{unit} time: describe and match alone {np.round(alone, 2)} s, match_many {np.round(many, 2)} s"
        )
        print(f"    ratio of throughputs {np.round(ratios, 3)}, median {np.median(ratios):.3f}")


def clock() -> tuple[float, float]:
    """Wall time, and processor time of this process and of those that it started and that have ended."""
    return time.perf_counter(), sum(os.times()[:4])


def elapsed(began: tuple[float, float]) -> tuple[float, float]:
    now = clock()
    return now[0] - began[0], now[1] - began[1]


def resident() -> float:
    """MiB of this process and of those that it started."""
    total, page = 0, os.sysconf("SC_PAGE_SIZE")
    children = {os.getpid()}
    for path in sorted(Path("/proc").glob("[0-9]*/stat"), key=lambda p: int(p.parent.name)):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
            if int(path.parent.name) in children or int(fields[1]) in children:
                children.add(int(path.parent.name))
                total += int(fields[21]) * page
        except OSError:
            continue
    return total / 2**20


def memory(args: argparse.Namespace, model: Model, folder: Path) -> None:
    write_pairs(folder / "data", 16, args.side)
    matcher = model.load()

    def pairs() -> Iterator[tuple[str, str]]:
        for i in range(args.pairs):
            yield tuple(str(folder / "data" / side / f"{i % 16:06}.png") for side in ("vis", "ir"))  # type: ignore[misc]

    print("pair    MiB    seconds")
    began, rows = time.perf_counter(), []
    for i, _ in enumerate(matcher.match_many(pairs(), max_keypoints=args.keypoints, workers=args.workers), 1):
        if i % max(1, args.pairs // 200) == 0 or i == 100:
            rows.append((i, round(resident(), 1), round(time.perf_counter() - began, 1)))
            if i in (100, 300, 1000, 3000) or i == args.pairs:
                print("{:<7} {:<6.1f} {:.0f}".format(*rows[-1]), flush=True)
    later = [mib for i, mib, _ in rows if i >= min(100, args.pairs)]
    print(f"from pair {min(100, args.pairs)} on: {min(later):.1f} to {max(later):.1f} MiB")
    if args.output is not None:
        save_memory(args.output, rows)


def save_memory(output: Path, rows: list[tuple[int, float, float]]) -> None:
    """Writes OUTPUT.csv and OUTPUT.png."""
    from matplotlib.figure import Figure

    with output.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([("pair", "mib", "seconds"), *rows])
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([row[0] for row in rows], [row[1] for row in rows], color="black", linewidth=1)
    axes.set(xlabel="pair", ylabel="resident memory, MiB", ylim=(0, None), xlim=(0, None))
    axes.set_title("match_many: this process and its workers", fontsize=10)
    figure.savefig(output.with_suffix(".png"), dpi=120)
    print(f"wrote {output.with_suffix('.csv')} and {output.with_suffix('.png')}")


def kills(args: argparse.Namespace, model: Model, folder: Path) -> None:
    folders = write_pairs(folder / "data", args.pairs, args.side)
    out, rng = folder / "out", random.Random(args.seed)
    journal = out / "journal.jsonl"
    command = [sys.executable, str(TESTS / "thin_network.py"), args.command, *map(str, folders)]
    command += ["-o", str(out), "--model", model.name, "--device", "cpu", "--workers", "1"]
    if args.command == "match-many":
        command += ["--max-keypoints", str(args.keypoints), "--min-score", "0", "--save", "npz"]
    else:
        command += ["--kind", "translation", "--max-displacement", "4", "--save", "png"]

    def lines() -> int:
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    for number in range(args.kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        at, deadline = lines() + rng.randint(0, max(1, args.pairs // args.kills - 1)), time.monotonic() + 300
        while process.poll() is None and lines() < at and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.wait()
        print(f"kill {number + 1}: {lines()} of {args.pairs} in the journal", flush=True)
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    import pyarrow.parquet as pq

    names = pq.read_table(out / "results.parquet")["name"].to_pylist()
    print(f"last run: exit code {done.returncode}, {json.loads(done.stdout)}")
    print(f"{args.pairs} pairs: {len(names)} rows, {len(set(names))} names, {lines()} lines in the journal")


class TimedWork(MatchWork):
    """Rows say when the actor began and ended the task that they belong to."""

    def __call__(self, items: list[Any]) -> list[dict[str, Any]]:
        began = time.time()
        rows = super().__call__(items)
        return [{**row, "began": began, "ended": time.time()} for row in rows]


PLAIN = """
import sys, pickle
model, pairs, options = pickle.load(sys.stdin.buffer)
matcher = model.load()
print("ready", flush=True)
sys.stdin.buffer.read(1)
assert all(result.error is None for result in matcher.match_many(pairs, workers=0, **options))
"""


def plain_processes(model: Model, pairs: PairList, options: dict[str, Any]) -> float:
    """Seconds that two processes of one thread take with half of the pairs each, models loaded before."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    halves = [pairs[0 : len(pairs) : 2], pairs[1 : len(pairs) : 2]]
    processes = [
        subprocess.Popen([sys.executable, "-c", PLAIN], stdin=-1, stdout=-1, env=environment) for _ in halves
    ]
    for process, half in zip(processes, halves, strict=True):
        pickle.dump((model, half, options), process.stdin)
        process.stdin.flush()
    for process in processes:
        process.stdout.readline()
    began = time.perf_counter()
    for process in processes:
        process.stdin.close()
    assert not any(process.wait() for process in processes)
    return time.perf_counter() - began


def ray(args: argparse.Namespace, model: Model, folder: Path) -> None:
    """Turn by turn: two plain processes with half of the pairs each, and two actors; one thread each."""
    import ray as cluster

    pairs = pairs_of_folders(*write_pairs(folder / "data", args.pairs, args.side))
    options = {"max_keypoints": args.keypoints}
    tasks = [pairs[i : i + 8] for i in range(0, len(pairs), 8)]  # as `run_match` hands them out
    cluster.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    ratios = []
    for _ in range(args.rounds):
        plain = plain_processes(model, pairs, options)
        began = time.perf_counter()
        work = TimedWork(model, options, None, "")
        rows = list(run_on_ray(work, iter(tasks), RayOptions(actors=2, cpus=1), lambda pair: {"error": pair}))
        whole = time.perf_counter() - began
        assert len(rows) == len(pairs) and all(row["error"] is None for row in rows)
        # From the first task to the end of the last: like the plain processes, without loading the model.
        busy = max(row["ended"] for row in rows) - min(row["began"] for row in rows)
        ratios.append(plain / busy)
        print(
            f"{len(pairs)} pairs: two processes {plain:.1f} s, two actors {busy:.1f} s ({whole:.1f} s with "
            f"their start); ratio of throughputs {ratios[-1]:.3f}",
            flush=True,
        )
    print(f"median {np.median(ratios):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--throughput", action="store_true")
    what.add_argument("--memory", action="store_true")
    what.add_argument("--kills", type=int)
    what.add_argument("--ray", action="store_true")
    parser.add_argument("--command", choices=("match-many", "register-many"), default="match-many")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--side", type=int, help="pixels of an image")
    parser.add_argument("--keypoints", type=int)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="NAME", help="of --memory: NAME.csv and NAME.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--thin", action="store_true", help="a thin network, which --memory and --kills take anyway"
    )
    args = parser.parse_args()
    small = args.memory or args.kills is not None
    usual = 10_000 if args.memory else 40 if args.kills is not None else 48 if args.ray else 12
    args.pairs = args.pairs or usual
    args.side = args.side or (112 if small else 512)
    args.keypoints = args.keypoints or (32 if args.memory else 16 if small else 300)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        thin = args.thin or small
        model = thin_model(folder / "model") if thin else Model(DEFAULT_MODEL, device="cpu")
        if args.throughput:
            throughput(args, model, folder)
        elif args.memory:
            memory(args, model, folder)
        elif args.ray:
            ray(args, model, folder)
        else:
            kills(args, model, folder)


if __name__ == "__main__":
    main()
