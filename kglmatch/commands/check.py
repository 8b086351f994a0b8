"""`kglmatch check`: how well two images are registered, and where not."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kglmatch.commands.common import (
    EXIT_FAILED,
    add_backend_option,
    add_json_option,
    add_model_options,
    check_outputs,
    load_matcher,
    number,
    output_path,
    print_json,
    say,
)
from kglmatch.commands.common_evidence import (
    Writers,
    add_evidence_options,
    evidence_outputs,
    map_frame,
    report_writer,
    table_writers,
)
from kglmatch.commands.common_rasters import (
    add_band_options,
    displacement,
    files,
    is_map_pair,
    load_grey,
    masked,
)
from kglmatch.options import CHECK_DISPLACEMENTS, DEFAULT_CHECK_DISPLACEMENT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kglmatch.registration.files import MapFrame
    from kglmatch.registration.results import RegistrationCheck

EPILOG = """exit code: 0, or 1 if the verdict is failed: then it is not known how far apart the images are.

examples:
  kglmatch check scene_vis.png aligned.png -o arrows.png --report report.html
  kglmatch check ortho.tif thermal.tif --max-displacement 60m   (GeoTIFFs on any two grids)
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "check",
        help="say how well two images are registered, and where not",
        description="Measures at a grid of points how far the content of two images of one size, which "
        "should be aligned, is apart.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("vis", metavar="VIS", type=Path, help="the visible image")
    parser.add_argument("ir", metavar="IR", type=Path, help="the image of the other sensor, of the same size")
    outputs = parser.add_argument_group("outputs", "all are written together, or none")
    outputs.add_argument(
        "-o",
        "--output",
        metavar="PICTURE",
        type=output_path,
        help="draw the displacements as arrows over the visible image",
    )
    add_evidence_options(outputs)
    add_json_option(outputs)
    how = parser.add_argument_group("check")
    how.add_argument(
        "--max-displacement",
        metavar="R",
        type=_displacement,
        default=DEFAULT_CHECK_DISPLACEMENT,
        help="pixels, {:g} to {:g}, or metres on the map, such as 60m; larger displacements are not found "
        "(default: %(default)g)".format(*CHECK_DISPLACEMENTS),
    )
    how.add_argument(
        "--nodata",
        metavar="V",
        type=number,
        help="pixel value without data, which does not count (default: what the file says)",
    )
    add_band_options(how)
    add_model_options(parser)
    add_backend_option(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from kglmatch.files import atomic_outputs
    from kglmatch.images import check_image_name

    if args.output is not None:
        check_image_name(args.output)
    metres = isinstance(args.max_displacement, str)
    needs = {f"--max-displacement {args.max_displacement}": metres}
    on_map = is_map_pair(args.vis, args.ir, args.vis_band, args.ir_band, needs)
    found, writers, device, seconds = (_check_rasters if on_map else _check_images)(args)
    written = []
    with atomic_outputs():
        for path, write in writers:
            if path is not None:
                write(path)
                written.append(path)
    if args.json:
        print_json(
            {
                "vis": str(args.vis),
                "ir": str(args.ir),
                "model": args.model,
                "device": device,
                **found.to_dict(),
                "seconds": round(seconds, 3),
                "written": [str(path) for path in written],
            }
        )
    else:
        for line in _lines(found):
            print(line)
        print(f"{len(found.points)} points, {seconds:.1f} s on {device}")
        for path in written:
            print(f"wrote {path}")
    if found.verdict == "failed":
        most = args.max_displacement if metres else f"{args.max_displacement:g} px"
        say(f"{args.ir}: its content was not found in {args.vis} within {most}")
        return EXIT_FAILED
    if found.verdict == "doubtful":
        say(f"{args.ir}: doubtful whether it shows what {args.vis} shows; look at the images")
    return 0


Checked = tuple["RegistrationCheck", Writers, str, float]


def _check_images(args: argparse.Namespace) -> Checked:
    """The check of two images of one size, its picture if it is to be written, device and seconds."""
    from kglmatch.errors import ImageError

    vis, valid_vis = load_grey(args.vis, args.vis_band, args.nodata)
    ir, valid_ir = load_grey(args.ir, args.ir_band, args.nodata)
    if vis.shape != ir.shape:
        raise ImageError(
            f"{args.vis} is {vis.shape[1]} x {vis.shape[0]}, {args.ir} {ir.shape[1]} x {ir.shape[0]}: "
            "check needs images of one size that should be aligned; kglmatch register takes any two"
        )
    check_outputs({"-o": args.output, **evidence_outputs(args)}, files(args.vis, args.ir))
    frame = map_frame(args, files(args.vis)[0])
    matcher = load_matcher(args)
    from kglmatch.patch_matcher import check_image_size

    for path, image in ((args.vis, vis), (args.ir, ir)):
        check_image_size(image, matcher.config.patch_size, str(path))
    began = time.perf_counter()
    found = matcher.check(
        masked(vis, valid_vis), masked(ir, valid_ir), max_displacement=args.max_displacement
    )
    seconds = time.perf_counter() - began
    return found, _writers(args, vis, ir, found, frame), matcher.device, seconds


def _check_rasters(args: argparse.Namespace) -> Checked:
    """`_check_images` of two rasters, of what both cover on the map."""
    from kglmatch.geo.raster import Raster, gdal_settings
    from kglmatch.geo.register import check_rasters, common_scene
    from kglmatch.images import save_image
    from kglmatch.registration.evidence import tie_points_of
    from kglmatch.registration.files import MapFrame
    from kglmatch.visualize import draw_displacement

    check_outputs({"-o": args.output, **evidence_outputs(args)}, files(args.vis, args.ir))
    with (
        gdal_settings(),
        Raster(args.vis, args.vis_band, args.nodata) as vis,
        Raster(args.ir, args.ir_band, args.nodata) as ir,
    ):
        common_scene(vis, ir)
        matcher = load_matcher(args)
        began = time.perf_counter()
        result = check_rasters(matcher, vis, ir, max_displacement=args.max_displacement)
        seconds = time.perf_counter() - began
        writers: Writers = []
        if args.output is not None or any(evidence_outputs(args).values()):
            image, small = result.preview(vis)
            frame = MapFrame(result.grid.matrix[:2], result.grid.crs.to_epsg())
            writers = [(args.output, lambda path: save_image(path, draw_displacement(image, small)))]
            writers += table_writers(args, tie_points_of(result.check), result.check, frame)
            if args.report is not None:
                grid = result.grid.resized(small.image_size)
                images = image, ir.on(grid)[0]
                names = str(args.vis), str(args.ir)
                metres = grid.metres_per_pixel()
                writers += report_writer(args, images, names, small, pixel_size=metres, on_map=True)
    return result.check, writers, matcher.device, seconds


def _writers(
    args: argparse.Namespace,
    vis: NDArray[np.float32],
    ir: NDArray[np.float32],
    found: RegistrationCheck,
    frame: MapFrame | None,
) -> Writers:
    """What was asked for, and what writes it."""
    from kglmatch.images import save_image
    from kglmatch.registration.evidence import tie_points_of
    from kglmatch.visualize import draw_displacement

    names = str(args.vis), str(args.ir)
    writers: Writers = [(args.output, lambda path: save_image(path, draw_displacement(vis, found)))]
    writers += table_writers(args, tie_points_of(found), found, frame)
    return writers + report_writer(args, (vis, ir), names, found)


def _lines(found: RegistrationCheck) -> list[str]:
    import numpy as np

    if not found.judged.any():
        return [f"{found.verdict}: no point could be judged"]
    moved = np.where(found.judged[:, None], found.displacement, 0)
    worst = int(np.argmax(np.linalg.norm(moved, axis=1)))
    x, y = found.points[worst]
    return [
        f"{found.verdict}: shift ({found.shift[0]:+.2f}, {found.shift[1]:+.2f}) px",
        f"error: median {found.median_error:.2f} px, 95 % within {found.p95_error:.2f} px, "
        f"largest {np.linalg.norm(moved[worst]):.2f} px at ({x:.0f}, {y:.0f})",
        f"{100 * found.judged_share:.0f} % of the image could be judged",
    ]


def _displacement(text: str) -> float | str:
    value = displacement(text)
    least, most = CHECK_DISPLACEMENTS
    if not isinstance(value, str) and not least <= value <= most:
        raise argparse.ArgumentTypeError(f"expected pixels from {least:g} to {most:g}, got {text!r}")
    return value
