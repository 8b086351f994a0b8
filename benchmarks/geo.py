"""Two large rasters on the map, apart by a known transform: error, seconds and peak memory of `kglmatch
register`.

    python benchmarks/geo.py --size 20000 --folder /tmp/geo
    python benchmarks/geo.py --size 4000 --crs EPSG:3857

The scene is made of the example pair: mirrored tiles of it, for structure at full resolution, added to the
pair enlarged to the whole size, so that no two places are alike. The near-infrared raster is sampled from
the same scene by a similarity, whose map says nothing of it; with --crs, it is reprojected as well. Both are
tiled, and have overviews with --overviews. The command runs in a process of its own, whose peak
memory is reported.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import rasterio
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from kglmatch.geometry import corner_error, similarity_about
from kglmatch.images import read_image_raw

DATA = Path(__file__).resolve().parents[1] / "examples/data"
BLOCK = 1024
TURN, ZOOM, SHIFT = 0.05, 1.0004, (23.4, -17.7)  # degrees; pixels at the middle
PROFILE = {
    "driver": "GTiff", "count": 1, "dtype": "uint16", "tiled": True, "blockxsize": 512, "blockysize": 512,
    "bigtiff": "if_safer",
}  # fmt: skip
PLACE = from_origin(500_000, 5_500_000, 10, 10)


def sample(band: np.ndarray, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """The scene of one band at places (h, w) of it, float32 xy in pixels."""
    enlarged = max(1.0, size / band.shape[0])
    # OpenCV reflects no coordinates that are far outside.
    last = np.float32(band.shape[0] - 1)
    folded = (last - np.abs(np.mod(v, 2 * last) - last) for v in (x, y))
    fine = cv2.remap(band, *folded, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    scaled = (v / np.float32(enlarged) for v in (x, y))
    coarse = cv2.remap(band, *scaled, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return np.clip((fine + coarse) / 2, 0, 65535)


def make(path: Path, band: np.ndarray, size: int, to_scene: np.ndarray, overviews: bool) -> None:
    """Writes a raster whose pixels are sampled from the scene where `to_scene` (3, 3) takes them."""
    with rasterio.open(
        path, "w", **PROFILE, width=size, height=size, crs="EPSG:32633", transform=PLACE
    ) as file:
        for top in range(0, size, BLOCK):
            for left in range(0, size, BLOCK):
                width, height = min(BLOCK, size - left), min(BLOCK, size - top)
                column = np.arange(left, left + width, dtype=np.float64)
                row = np.arange(top, top + height, dtype=np.float64)[:, None]
                x, y = ((a * column + (b * row + c)).astype(np.float32) for a, b, c in to_scene[:2])
                pixels = sample(band, x, y, size)
                file.write(np.rint(pixels).astype(np.uint16), 1, window=Window(left, top, width, height))
    if overviews:
        with rasterio.open(path, "r+") as file:
            file.build_overviews([2**i for i in range(1, 7) if size >> i >= 256], Resampling.average)


def reprojected(path: Path, crs: str) -> Path:
    """A copy in another coordinate reference system, by GDAL."""
    out = path.with_name(f"{path.stem}_reprojected.tif")
    with (
        rasterio.open(path) as source,
        WarpedVRT(source, crs=crs, resampling=Resampling.cubic, nodata=0) as virtual,
    ):
        place = {"width": virtual.width, "height": virtual.height, "crs": crs, "transform": virtual.transform}
        with rasterio.open(out, "w", **PROFILE, nodata=0, **place) as file:
            for top in range(0, virtual.height, BLOCK):
                for left in range(0, virtual.width, BLOCK):
                    size = min(BLOCK, virtual.width - left), min(BLOCK, virtual.height - top)
                    window = Window(left, top, *size)
                    file.write(virtual.read(window=window), window=window)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=20_000, help="pixels a side (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="where the rasters are made and kept (default: a temporary one)"
    )
    parser.add_argument("--crs", help="of the near-infrared raster")
    parser.add_argument("--overviews", action="store_true")
    parser.add_argument("--shift-only", action="store_true")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        measure(args, folder)


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Makes the pair if it is not there, registers it, prints the figures."""
    size = args.size
    middle = (size - 1) / 2, (size - 1) / 2
    true = similarity_about(TURN, ZOOM, middle, (middle[0] + SHIFT[0], middle[1] + SHIFT[1]))
    vis, ir = folder / f"vis_{size}.tif", folder / f"nir_{size}.tif"
    red, nir = (read_image_raw(DATA / f"sentinel2_{band}.tif").astype(np.float32) for band in ("red", "nir"))
    began = time.perf_counter()
    if not vis.exists() or not ir.exists():
        make(vis, red, size, np.eye(3), args.overviews)
        make(ir, nir, size, np.linalg.inv(true), args.overviews)
    if args.crs:
        ir = reprojected(ir, args.crs)
    made = time.perf_counter() - began
    command = ["register", vis, ir, "-o", folder / "aligned.tif", "--device", args.device, "--json"]
    command += ["--shift-only"] if args.shift_only else []
    began = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "kglmatch", *map(str, command)], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - began
    if result.returncode:
        raise SystemExit(result.stderr)
    found = json.loads(result.stdout)
    kilobytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"{size} x {size} pixels, made in {made:.0f} s; {found['verdict']}, {found['kind']}")
    print(f"corner error: {corner_error(np.array(found['transform']), true, (size, size)):.3f} px")
    peak = kilobytes / 2**20
    print(
        f"registered in {found['seconds']:.0f} s, whole command {seconds:.0f} s, peak memory {peak:.2f} GiB"
    )


if __name__ == "__main__":
    main()
