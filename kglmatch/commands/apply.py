"""`kglmatch apply`: a saved transform, applied to another image."""

from __future__ import annotations

import argparse
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kglmatch.commands.common import add_json_option, check_outputs, number, output_path, print_json
from kglmatch.commands.common_rasters import INSTALL

if TYPE_CHECKING:
    from kglmatch.batch.transforms import SavedTransform

EPILOG = """examples:
  kglmatch register scene_vis.png scene_nir.tif --save transform.json
  kglmatch apply transform.json scene_nir_full.tif -o aligned.tif
  kglmatch apply rig.json IMG_0001_5.tif --band 5 -o aligned.tif
  kglmatch apply transform.json thermal_may.tif -o aligned.tif   (saved of rasters on the map: all bands)
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "apply",
        help="warp an image by a transform that register or rig saved",
        description="Warps an image of the other sensor onto the visible one by a transform that "
        "`kglmatch register --save` or `kglmatch rig calibrate` wrote. The image may be another band, or of "
        "another resolution: then the output is as much larger or smaller than the visible image was. If "
        "rasters on the map were registered, IMAGE is one too, on any grid, and all its bands are written on "
        "the visible raster's grid.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("transform", metavar="TRANSFORM", type=Path, help="the saved transform: .json")
    parser.add_argument("image", metavar="IMAGE", type=Path, help="the image to warp")
    parser.add_argument(
        "-o", "--output", metavar="IMAGE", type=output_path, required=True, help="the warped image"
    )
    parser.add_argument("--band", metavar="B", help="which band of a rig, or of several that were registered")
    parser.add_argument(
        "--size",
        metavar="WxH",
        type=_size,
        help="pixels of the output (default: the visible image's, times the resolution of IMAGE)",
    )
    parser.add_argument(
        "--nodata",
        metavar="V",
        type=number,
        help="value of pixels that IMAGE does not cover (default: 0; of a raster on the map, its own)",
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from kglmatch.batch.transforms import read_saved_transform
    from kglmatch.images import check_image_name

    check_image_name(args.output)
    check_outputs({"-o": args.output}, (args.transform, args.image))
    saved = read_saved_transform(args.transform, args.band, on_map=True)
    size = (_apply if saved.place is None else _apply_on_map)(args, saved)
    if args.json:
        print_json({"image": str(args.image), "size": list(size), "written": [str(args.output)]})
    else:
        print(f"wrote {args.output}, {size[0]} x {size[1]}")
    return 0


def _apply(args: argparse.Namespace, saved: SavedTransform) -> tuple[int, int]:
    """Writes the warped image; its (width, height)."""
    from kglmatch.batch.transforms import apply_transform
    from kglmatch.images import check_image_fits, read_image_raw, save_image

    image = read_image_raw(args.image)
    check_image_fits(args.output, image)
    nodata = 0 if args.nodata is None else args.nodata
    warped = apply_transform(saved, image, size=args.size, nodata=nodata, name=str(args.image))
    save_image(args.output, warped)
    return warped.shape[1], warped.shape[0]


def _apply_on_map(args: argparse.Namespace, saved: SavedTransform) -> tuple[int, int]:
    """`_apply` of a raster, onto the grid of the visible raster that was registered."""
    import numpy as np

    from kglmatch.errors import KGLMatchError
    from kglmatch.geometry import resize_matrix

    assert saved.place is not None
    if importlib.util.find_spec("rasterio") is None:
        raise KGLMatchError(f"{args.transform} is of rasters on the map, which need rasterio: {INSTALL}")
    from kglmatch.geo.grid import grid_from_text
    from kglmatch.geo.raster import Raster, gdal_settings
    from kglmatch.geo.register import mapping_of
    from kglmatch.geo.write import save_on_grid

    size = saved.vis_size if args.size is None else args.size
    grid = grid_from_text(*saved.place, saved.vis_size, name=str(args.transform)).resized(size)
    scale = resize_matrix(size[0] / saved.vis_size[0], size[1] / saved.vis_size[1])
    transform = scale @ saved.transform @ np.linalg.inv(scale)
    local = None if saved.local is None else saved.local.resized(size)
    with gdal_settings(), Raster(args.image) as raster:
        own = raster.grid.near(grid)
        save_on_grid(raster, args.output, grid, mapping_of(transform, local), nodata=args.nodata, own=own)
    return size


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text)
    if match is None or not (int(match[1]) and int(match[2])):
        raise argparse.ArgumentTypeError(f"expected a size such as 1280x960, got {text!r}")
    return int(match[1]), int(match[2])
