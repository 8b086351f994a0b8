"""`kglmatch apply`: a saved transform, applied to another image."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from kglmatch.commands.common import add_json_option, check_outputs, number, output_path, print_json

EPILOG = """examples:
  kglmatch register scene_vis.png scene_nir.tif --save transform.json
  kglmatch apply transform.json scene_nir_full.tif -o aligned.tif
  kglmatch apply rig.json IMG_0001_5.tif --band 5 -o aligned.tif
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "apply",
        help="warp an image by a transform that register or rig saved",
        description="Warps an image of the other sensor onto the visible one by a transform that "
        "`kglmatch register --save` or `kglmatch rig calibrate` wrote. The image may be another band, or of "
        "another resolution: then the output is as much larger or smaller than the visible image was.",
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
        default=0,
        help="value of pixels that IMAGE does not cover (default: %(default)s)",
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from kglmatch.batch.transforms import apply_transform, read_saved_transform
    from kglmatch.images import check_image_fits, check_image_name, read_image_raw, save_image

    check_image_name(args.output)
    check_outputs({"-o": args.output}, (args.transform, args.image))
    saved = read_saved_transform(args.transform, args.band)
    image = read_image_raw(args.image)
    check_image_fits(args.output, image)
    warped = apply_transform(saved, image, size=args.size, nodata=args.nodata, name=str(args.image))
    save_image(args.output, warped)
    size = [warped.shape[1], warped.shape[0]]
    if args.json:
        print_json({"image": str(args.image), "size": size, "written": [str(args.output)]})
    else:
        print(f"wrote {args.output}, {size[0]} x {size[1]}")
    return 0


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text)
    if match is None or not (int(match[1]) and int(match[2])):
        raise argparse.ArgumentTypeError(f"expected a size such as 1280x960, got {text!r}")
    return int(match[1]), int(match[2])
