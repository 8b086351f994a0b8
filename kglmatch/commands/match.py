"""`kglmatch match`: two images -> matches, a homography, pictures."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kglmatch.commands.common import (
    add_backend_option,
    add_json_option,
    add_model_options,
    check_outputs,
    fraction,
    load_matcher,
    non_negative_float,
    output_path,
    positive_int,
    print_json,
    say,
)
from kglmatch.commands.common_rasters import add_band_options, files, is_map_pair, load_grey, masked
from kglmatch.options import (
    DECISIONS,
    DEFAULT_MAX_KEYPOINTS,
    DEFAULT_MIN_SCORE,
    DEFAULT_TOP_K,
    DETECTORS,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kglmatch.features import Features, Matches
    from kglmatch.matcher import Matcher

EPILOG = """examples:
  kglmatch match scene_vis.png scene_nir.png -o matches.png
  kglmatch match b04.tif b08.tif --max-displacement 5 --save matches.csv   (registered images)
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "match",
        help="match two images and estimate the homography between them",
        description="Matches a visible image with one of another sensor (near infrared, thermal, radar) "
        "and estimates the homography between them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("vis", metavar="VIS", type=Path, help="the visible image")
    parser.add_argument("ir", metavar="IR", type=Path, help="the image of the other sensor")
    outputs = parser.add_argument_group("outputs")
    outputs.add_argument(
        "-o", "--output", metavar="PICTURE", type=output_path, help="draw the matches over both images"
    )
    outputs.add_argument(
        "--checkerboard",
        metavar="PICTURE",
        type=output_path,
        help="draw both images in alternate squares, IR warped onto VIS by the homography",
    )
    outputs.add_argument(
        "--save", metavar="FILE", type=output_path, help="write the matches: .csv, .json or .npz"
    )
    add_json_option(outputs)
    how = parser.add_argument_group("matching")
    how.add_argument(
        "--max-displacement",
        metavar="R",
        type=non_negative_float,
        help="for registered or nearly registered images: match only points at most R pixels apart",
    )
    how.add_argument(
        "--max-keypoints",
        metavar="N",
        type=positive_int,
        default=DEFAULT_MAX_KEYPOINTS,
        help="keypoints of each image, the strongest (default: %(default)s)",
    )
    how.add_argument("--detector", choices=DETECTORS, help="what finds keypoints (default: the model's)")
    how.add_argument(
        "--dense",
        action="store_true",
        help="look for each keypoint of VIS everywhere within --max-displacement in IR instead of detecting "
        "keypoints there; finds more, takes longer",
    )
    how.add_argument(
        "--no-upright",
        dest="upright",
        action="store_false",
        help="turn each patch to the direction of its gradients, for images rotated relative to each other "
        "by 15 degrees or more; takes half as long again",
    )
    how.add_argument(
        "--top-k",
        metavar="K",
        type=_top_k,
        default=DEFAULT_TOP_K,
        help='candidates of each keypoint that the metric head scores, or "all" (default: %(default)s)',
    )
    how.add_argument(
        "--min-score",
        metavar="S",
        type=fraction,
        default=DEFAULT_MIN_SCORE,
        help="drop matches of a lower score, 0 to 1 (default: %(default)s)",
    )
    how.add_argument(
        "--decide",
        choices=DECISIONS,
        help="what ranks the candidates: both answers, the metric head, or the descriptors alone, which is "
        "faster (default: what was best on the model's validation data)",
    )
    rasters = parser.add_argument_group(
        "rasters",
        "if VIS and IR are both on the map, IR is matched as it is seen on VIS's grid, in its pixels",
    )
    add_band_options(rasters)
    add_model_options(parser)
    add_backend_option(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    _check_options(args)
    # Images and outputs first: a mistake there is reported before the model is loaded.
    vis_image, ir_image = _read(args)
    check_outputs(
        {"-o": args.output, "--checkerboard": args.checkerboard, "--save": args.save},
        files(args.vis, args.ir),
    )
    matcher = load_matcher(args)
    from kglmatch.patch_matcher import check_image_size

    for path, image in ((args.vis, vis_image), (args.ir, ir_image)):
        check_image_size(image, matcher.config.patch_size, str(path))
    began = time.perf_counter()
    vis, ir, matches = _match(args, matcher, vis_image, ir_image)
    seconds = time.perf_counter() - began
    written = _write(args, vis_image, ir_image, matches)
    if args.json:
        print_json(_report(args, vis, ir, matches, seconds, matcher.device, written))
    else:
        print(_summary(len(vis), len(ir), matches, seconds, matcher.device))
        for path in written:
            print(f"wrote {path}")
    for path, features in ((args.vis, vis), (args.ir, ir)):
        if not len(features):
            say(f"{path}: no keypoints; the image is flat, or shows nothing the detector knows")
    if args.checkerboard is not None and matches.homography is None:
        say(f"{args.checkerboard}: not written, for there is no homography to draw it by")
    return 0


def _check_options(args: argparse.Namespace) -> None:
    from kglmatch.dense import check_dense
    from kglmatch.features import check_match_format
    from kglmatch.images import check_image_name

    for picture in (args.output, args.checkerboard):
        if picture is not None:
            check_image_name(picture)
    if args.save is not None:
        check_match_format(args.save)
    if args.dense:
        check_dense(args.max_displacement, args.upright)


def _read(args: argparse.Namespace) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both images, grey, their pixels without data masked; rasters on the map on the pixels of the first."""
    if not is_map_pair(args.vis, args.ir, args.vis_band, args.ir_band, {}):
        pairs = ((args.vis, args.vis_band), (args.ir, args.ir_band))
        vis, ir = (masked(*load_grey(path, band)) for path, band in pairs)
        return vis, ir
    from kglmatch.geo.raster import Raster, gdal_settings
    from kglmatch.geo.register import pair_on_map

    with gdal_settings(), Raster(args.vis, args.vis_band) as first, Raster(args.ir, args.ir_band) as second:
        vis, valid_vis, ir, valid_ir = pair_on_map(first, second)
    return masked(vis, valid_vis), masked(ir, valid_ir)


def _match(
    args: argparse.Namespace, matcher: Matcher, vis: Any, ir: Any
) -> tuple[Features, Features, Matches]:
    """The features of two images and their matches, in the two steps of `Matcher.match_images`."""
    features = matcher.extract_pair(
        vis,
        ir,
        detector=args.detector,
        max_keypoints=args.max_keypoints,
        maps=matcher.decision(args.decide) != "descriptor",
        upright=args.upright,
        dense=args.dense,
        max_displacement=args.max_displacement,
    )
    matches = matcher.match_images(
        *features,
        top_k=args.top_k,
        min_score=args.min_score,
        max_displacement=args.max_displacement,
        decide=args.decide,
    )
    return *features, matches


def _report(
    args: argparse.Namespace,
    vis: Features,
    ir: Features,
    matches: Matches,
    seconds: float,
    device: str,
    written: list[Path],
) -> dict[str, Any]:
    return {
        "vis": str(args.vis),
        "ir": str(args.ir),
        "model": args.model,
        "device": device,
        "keypoints_vis": len(vis),
        "keypoints_ir": len(ir),
        "matches": len(matches),
        "inliers": _inliers(matches),
        "homography": None if matches.homography is None else matches.homography.tolist(),
        "seconds": round(seconds, 3),
        "written": [str(path) for path in written],
    }


def _write(args: argparse.Namespace, vis: Any, ir: Any, matches: Matches) -> list[Path]:
    """Writes what was asked for and can be; the files."""
    from kglmatch.images import save_image
    from kglmatch.visualize import draw_checkerboard, draw_matches

    written: list[Path] = []
    if args.save is not None:
        matches.save(args.save)
        written.append(args.save)
    if args.output is not None:
        save_image(args.output, draw_matches(vis, ir, matches))
        written.append(args.output)
    if args.checkerboard is not None and matches.homography is not None:
        save_image(args.checkerboard, draw_checkerboard(vis, ir, matches.homography))
        written.append(args.checkerboard)
    return written


def _inliers(matches: Matches) -> int:
    return 0 if matches.inliers is None else int(matches.inliers.sum())


def _summary(keypoints_vis: int, keypoints_ir: int, matches: Matches, seconds: float, device: str) -> str:
    if matches.homography is not None:
        found = f"homography found, {_inliers(matches)} inliers"
    else:
        found = "no homography found"
    return (
        f"{len(matches)} match{'' if len(matches) == 1 else 'es'}, {found} "
        f"({keypoints_vis} + {keypoints_ir} keypoints, {seconds:.1f} s on {device})"
    )


def _top_k(text: str) -> int | None:
    return None if text == "all" else positive_int(text)
