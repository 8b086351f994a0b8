"""Rasters whose map is wrong by a known shift: kglmatch, AROSICS and the method of KARIOS on the same pairs.

    python benchmarks/maps.py DATA/vis-nir --arosics-python AROSICS/bin/python
    python benchmarks/maps.py DATA/vis-sar/sentinel/test --model kglnet-vis-sar --arosics-python ...
    python benchmarks/maps.py DATA/vis-nir/country --every 4 --settings ...   # all settings of the baselines
    python benchmarks/maps.py DATA/vis-nir/country --limit 1 --truth set      # one pair, to see that it runs

Each pair is written as two GeoTIFFs (EPSG:32633, 10 m). The pixels of the second one are those of the set,
but its geotransform is wrong by a shift, which is drawn evenly from a disc of 6 and of 60 pixels. All methods
look for displacements of up to 4 pixels more. The error of a pair is the mean distance, over a grid of points
of the first raster, of where a method finds them from where they are: by the shift, and by the set's own
offset as `proof/truth.py` measures it (`pip install "kglmatch[proof]"`). Pairs whose own offset is confirmed
by no second method count in no share. `--truth set` takes the set's word instead.

AROSICS (https://pypi.org/project/arosics) needs GDAL; it runs in a Python that has both, such as a virtual
environment with `--system-site-packages` next to Debian's python3-gdal (with GDAL 3.6: arosics 1.10.2,
geoarray 0.16.1, py_tools_ds 0.21.1, by `pip install --no-deps`, and what they import). It finds a shift in
one window ("global"), or in many, which become one shift or affine ("local"). "KLT" follows the published
description of KARIOS: corners (Shi and Tomasi) of the Laplacians of both images are tracked (Lucas and
Kanade) there and back; with "phase", the phase correlation of the whole images is the start. The settings are
the best of those in `SETTINGS` on training pairs: VIS-NIR Country and Sentinel train. Every method runs in a
process of its own on one thread; seconds include reading, but not the start.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rasterio
from local import load, pairs_of
from proof.truth import own_offset
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.vrt import WarpedVRT
from run_arosics import peak_memory

from kglmatch import Matcher, load_image
from kglmatch.datasets import ImagePair
from kglmatch.geo import register_rasters
from kglmatch.geometry import fit_robustly, transform_points

CORNER, METRES = (500_000.0, 5_500_000.0), 10.0
MARGIN = 4  # pixels that all may find beyond the displacement
GRID = 16  # pixels between the points that are measured
LIMITS = (1, 3, 5)  # pixels
OURS, MAP = "kglmatch", "none: as the map says"
# Those that are best on training pairs; --settings runs all.
SETTINGS: dict[str, dict[str, Any]] = {
    "AROSICS, global": {"method": "global", "window": 256, "fit": "translation"},
    "AROSICS, global, 512": {"method": "global", "window": 512, "fit": "translation"},
    "AROSICS, local, 128": {"method": "local", "window": 128, "step": 50, "fit": "translation"},
    "AROSICS, local, 256": {"method": "local", "window": 256, "step": 50, "fit": "translation"},
    "AROSICS, local, 256, affine": {"method": "local", "window": 256, "step": 50, "fit": "affine"},
    "KLT": {"levels": 1, "phase": False, "fit": "translation"},
    "KLT, affine": {"levels": 1, "phase": False, "fit": "affine"},
    "KLT, 4 levels": {"levels": 4, "phase": False, "fit": "translation"},
    "KLT, phase": {"levels": 1, "phase": True, "fit": "translation"},
    "KLT, phase, affine": {"levels": 1, "phase": True, "fit": "affine"},
    "KLT, 4 levels, phase": {"levels": 4, "phase": True, "fit": "translation"},
}
BEST = ("AROSICS, global, 512", "AROSICS, local, 256, affine", "KLT, phase", "KLT, phase, affine")
Found = tuple[np.ndarray | None, str]
Points = np.ndarray


# --- pairs --------------------------------------------------------------------------------------


def make(pair: ImagePair, name: str, shift: np.ndarray, folder: Path) -> dict[str, Any]:
    """Writes a pair, the second raster's map wrong by a shift (2,) in pixels; where the files are."""
    vis, ir = load(pair)
    valid = np.ones(vis.shape, bool)
    if pair.affine is not None:
        own = load_image(pair.ir).shape
        flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
        valid = cv2.warpAffine(np.ones(own, np.uint8), pair.affine, vis.shape[::-1], flags=flags) > 0
    paths = {}
    for band, image, mask, off in (("vis", vis, True, np.zeros(2)), ("ir", ir, valid, shift)):
        # AROSICS guesses a value without data where the file names none.
        pixels = np.where(mask, np.clip(np.rint(image * 255), 1, 255), 0).astype(np.uint8)
        path = folder / f"{name.replace('/', '_')}_{band}.tif"
        place = from_origin(CORNER[0] + METRES * off[0], CORNER[1] - METRES * off[1], METRES, METRES)
        profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "nodata": 0, "tiled": True}
        profile |= {"width": vis.shape[1], "height": vis.shape[0], "crs": "EPSG:32633", "transform": place}
        with rasterio.open(path, "w", **profile) as file:
            file.write(pixels, 1)
        paths[band] = str(path)
    return paths


def offset_of(pair: ImagePair, truth: str) -> np.ndarray | None:
    """(3, 3) from visible pixels to those of the ir image on their grid; None if nobody confirms it."""
    if truth == "set":
        return np.eye(3)
    published = np.eye(3) if pair.affine is None else np.vstack([pair.affine, [0, 0, 1]])
    found = own_offset(load_image(pair.vis), load_image(pair.ir), published)
    return np.linalg.inv(published) @ found.transform if found.confirmed else None


def offsets_of(
    numbered: list[tuple[int, tuple[str, ImagePair]]], truth: str, kept: Path | None
) -> dict[str, np.ndarray | None]:
    """The offsets of all pairs; those that a file keeps are not measured again."""
    known = json.loads(kept.read_text("utf-8")) if kept is not None and kept.exists() else {}
    for _, (name, pair) in numbered:
        if name not in known:
            offset = offset_of(pair, truth)
            known[name] = None if offset is None else offset.tolist()
            print(f"{name}: {'own offset not confirmed' if offset is None else 'ready'}", file=sys.stderr)
            if kept is not None:
                kept.write_text(json.dumps(known) + "\n", encoding="utf-8")
    return {name: None if offset is None else np.array(offset) for name, offset in known.items()}


def random_shift(displacement: float, seed: int) -> np.ndarray:
    """(2,) pixels, evenly from the disc of this radius."""
    rng = np.random.default_rng([seed, round(displacement)])
    length, angle = displacement * np.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)
    return length * np.array([np.cos(angle), np.sin(angle)])


def error_of(found: np.ndarray | None, true: np.ndarray, size: tuple[int, int]) -> float:
    """Mean distance in pixels over a grid of points that both rasters show."""
    if found is None:
        return float("inf")
    x, y = np.meshgrid(np.arange(0, size[0], GRID), np.arange(0, size[1], GRID))
    points = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float64)
    places = transform_points(true, points)
    return float(np.linalg.norm(transform_points(found, points) - places, axis=1).mean())


# --- methods ------------------------------------------------------------------------------------


def fit(kind: str, points_vis: Points, points_ir: Points) -> np.ndarray | None:
    """One transform for matches (N, 2): the median shift, or an affine that outliers hardly change."""
    if not len(points_vis):
        return None
    transform = np.eye(3)
    transform[:2, 2] = np.median(points_ir - points_vis, axis=0)
    if kind == "affine" and len(points_vis) >= 6:
        transform = fit_robustly("affine", points_vis, points_ir, transform, (4.0, 1.0))
    return transform


def from_arosics(result: dict[str, Any], kind: str) -> np.ndarray | None:
    """The transform in pixels of the first raster of what `run_arosics.py` found on the map."""
    places = np.array(result["places"], np.float64).reshape(-1, 2)
    right = places + np.array(result["shifts"], np.float64).reshape(-1, 2)
    vis, ir = ((each - CORNER) * [1 / METRES, -1 / METRES] - 0.5 for each in (right, places))
    return fit(kind, vis, ir)


def read_pair(job: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Both rasters (H, W) uint8 on the pixels of the first one, the second where its map puts it."""
    with rasterio.open(job["vis"]) as vis, rasterio.open(job["ir"]) as ir:
        grid = {"crs": vis.crs, "transform": vis.transform, "width": vis.width, "height": vis.height}
        with WarpedVRT(ir, resampling=Resampling.cubic, **grid) as moved:
            return vis.read(1), moved.read(1)


def phase_shift(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(2,) whole pixels from the content of an image to where another shows it, by phase correlation."""
    spectrum = np.fft.rfft2(a).conj() * np.fft.rfft2(b)
    surface = np.fft.irfft2(spectrum / np.maximum(np.abs(spectrum), 1e-9), a.shape)
    row, column = np.unravel_index(int(surface.argmax()), surface.shape)
    sizes = np.array(a.shape[::-1])
    at = np.array([column, row])
    return np.where(at > sizes / 2, at - sizes, at).astype(np.float64)


def klt(job: dict[str, Any]) -> Found:
    """The method of KARIOS, from its published description, with its published parameters."""
    vis, ir = read_pair(job)
    valid = ((vis > 0) & (ir > 0)).astype(np.uint8)
    start = phase_shift(vis.astype(np.float64), ir.astype(np.float64)) if job["phase"] else np.zeros(2)
    if np.abs(start).max() > job["most"]:
        start = np.zeros(2)
    edges_vis, edges_ir = (cv2.Laplacian(image, cv2.CV_8U, ksize=7) for image in (vis, ir))
    points = cv2.goodFeaturesToTrack(edges_vis, 20000, 0.1, 10, mask=valid, blockSize=15)
    if points is None:
        return None, ""
    how = {
        "winSize": (25, 25),
        "maxLevel": job["levels"],
        "criteria": (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 0.03),
    }
    guess = (points + start).astype(np.float32)
    tracked, status, _ = cv2.calcOpticalFlowPyrLK(
        edges_vis, edges_ir, points, guess, flags=cv2.OPTFLOW_USE_INITIAL_FLOW, **how
    )
    guess = (tracked - start).astype(np.float32)
    back, status_back, _ = cv2.calcOpticalFlowPyrLK(
        edges_ir, edges_vis, tracked, guess, flags=cv2.OPTFLOW_USE_INITIAL_FLOW, **how
    )
    # A confidence of 0.4 or more, which is 0 at 0.1 pixels of difference.
    close = np.abs(points - back).max(axis=(1, 2)) <= 0.06
    kept = close & (status.ravel() == 1) & (status_back.ravel() == 1)
    here, there = points[kept, 0].astype(np.float64), tracked[kept, 0].astype(np.float64)
    while len(here):
        moved = there - here
        off = np.abs(moved - moved.mean(axis=0))
        inside = ((off <= 3 * moved.std(axis=0) + 1e-6) & (off < 20)).all(axis=1)
        if inside.all():
            break
        here, there = here[inside], there[inside]
    return fit(job["fit"], here, there), ""


def ours(matcher: Matcher, job: dict[str, Any]) -> Found:
    """kglmatch: the map is the prior, and the displacement is in metres."""
    most = f"{job['most'] * METRES:g}m"
    found = register_rasters(matcher, job["vis"], job["ir"], max_displacement=most).registration
    return found.transform, found.verdict


def as_the_map_says(job: dict[str, Any]) -> Found:
    """No correction."""
    return np.eye(3), ""


def work(name: str, model: str) -> None:
    """Runs one method on the jobs of standard input, as `run_arosics.py` does."""
    cv2.setNumThreads(1)
    run: Callable[[dict[str, Any]], Found] = as_the_map_says if name == MAP else klt
    if name == OURS:
        run = functools.partial(ours, Matcher.from_pretrained(model, device="cpu"))
    for line in sys.stdin:
        job = json.loads(line)
        began = time.perf_counter()
        transform, verdict = run(job)
        seconds = time.perf_counter() - began
        found = None if transform is None else transform.tolist()
        print(json.dumps({"transform": found, "verdict": verdict, "seconds": seconds}), flush=True)
    print(json.dumps({"peak": peak_memory()}), flush=True)


def run_method(
    name: str, jobs: list[dict[str, Any]], model: str, arosics: Path | None
) -> tuple[list[dict[str, Any]], float]:
    """Results of all jobs and peak memory in MiB, of a method in a process of its own."""
    setting = SETTINGS.get(name, {})
    lines = "".join(json.dumps(job | setting) + "\n" for job in jobs)
    here = Path(__file__).resolve()
    command = [sys.executable, here, "--worker", name, "--model", model]
    if "method" in setting:
        command = [arosics, here.with_name("run_arosics.py")]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    done = subprocess.run(
        [str(part) for part in command],
        input=lines,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | threads | {"MPLBACKEND": "Agg"},
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    *results, last = (json.loads(line) for line in done.stdout.splitlines())
    for result in results:
        if "places" in result:
            transform = from_arosics(result, setting["fit"])
            result["transform"] = None if transform is None else transform.tolist()
    return results, last["peak"] / 1024


# --- figures ------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row for each method, displacement and pair."""
    numbered = list(enumerate(pairs_of(args.data)))[:: args.every][: args.limit]
    methods = [MAP, OURS, *(SETTINGS if args.settings else BEST)]
    methods = args.methods or methods
    methods = [name for name in methods if args.arosics_python or "method" not in SETTINGS.get(name, {})]
    jobs: list[dict[str, Any]] = []
    offsets = offsets_of(numbered, args.truth, args.offsets)
    for seed, (name, pair) in numbered:
        offset = offsets[name]
        for displacement in args.displacements:
            own = folder / f"{displacement:g}"
            own.mkdir(exist_ok=True)
            shift = random_shift(displacement, seed)
            true = np.array([[1, 0, shift[0]], [0, 1, shift[1]], [0, 0, 1.0]])
            job = {"pair": name, "displacement": displacement, "most": displacement + MARGIN}
            job["true"] = None if offset is None else (true @ offset).tolist()
            jobs.append(job | make(pair, name, shift, own))
    rows = []
    for method in methods:
        for displacement in args.displacements:
            part = [job for job in jobs if job["displacement"] == displacement]
            results, peak = run_method(method, part, args.model, args.arosics_python)
            print(f"{method}, {displacement:g} px: done", file=sys.stderr)
            for job, result in zip(part, results, strict=True):
                row = {"method": method, "peak": peak, "error": None} | {
                    key: job[key] for key in ("pair", "displacement")
                }
                found = None if result["transform"] is None else np.array(result["transform"])
                if job["true"] is not None:
                    with rasterio.open(job["vis"]) as file:
                        size = file.width, file.height
                    row["error"] = error_of(found, np.array(job["true"]), size)
                row |= {"found": found is not None, "verdict": result.get("verdict", "")}
                rows.append(row | {"seconds": result["seconds"]})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Shares, seconds and memory of every method and displacement, in Markdown."""
    known = [row for row in rows if row["error"] is not None]
    pairs, confirmed = (len({row["pair"] for row in part}) for part in (rows, known))
    heads = ["within px", "method", *(f"{limit} px" for limit in LIMITS), "gave up", "s", "MiB"]
    lines = [
        f"{pairs} pairs, {confirmed} of them with a confirmed offset of their own",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for displacement in dict.fromkeys(row["displacement"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            part = [r for r in known if (r["displacement"], r["method"]) == (displacement, method)]
            if not part:
                continue
            errors = np.array([row["error"] for row in part])
            cells = [f"{100 * float((errors <= limit).mean()):.0f} %" for limit in LIMITS]
            cells += [str(sum(not row["found"] for row in part))]
            cells += [f"{np.median([row['seconds'] for row in part]):.2f}", f"{part[0]['peak']:.0f}"]
            lines.append("| " + " | ".join([f"{displacement:g}", method, *cells]) + " |")
    lines.append("")
    for displacement in dict.fromkeys(row["displacement"] for row in rows):
        part = [r for r in known if r["displacement"] == displacement and r["verdict"] == "registered"]
        wrong = sum(row["error"] > LIMITS[-1] for row in part)
        lines.append(
            f"up to {displacement:g} px: {OURS} calls {len(part)} registered, {wrong} of which are off by "
            f"more than {LIMITS[-1]} px"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?", help="folder of image pairs")
    parser.add_argument("--model", default="kglnet-vis-nir")
    parser.add_argument("--arosics-python", metavar="PATH", type=Path, help="a Python that has AROSICS")
    parser.add_argument("--displacements", type=float, nargs="+", default=[6.0, 60.0], metavar="PIXELS")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="take these alone")
    parser.add_argument("--settings", action="store_true", help="all settings of the baselines, not the best")
    parser.add_argument("--truth", choices=("measured", "set"), default="measured")
    parser.add_argument("--offsets", metavar="FILE", type=Path, help="keep the own offsets in this JSON")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth pair")
    parser.add_argument("--limit", type=int, metavar="N", help="take at most N pairs")
    parser.add_argument("--save", type=Path, help="write the single results as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.model)
        return
    if args.data is None:
        parser.error("which folder of image pairs?")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    print(table(rows))
    if args.save:
        args.save.write_text(json.dumps(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
