"""`kglmatch register`: one image warped onto another, or the bands of a rig onto one of them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kglmatch.commands.common import (
    EXIT_FAILED,
    add_backend_option,
    add_json_option,
    add_model_options,
    as_matches,
    check_outputs,
    load_matcher,
    local_effect,
    non_negative_float,
    number,
    output_path,
    print_json,
    registration_summary,
    say,
)
from kglmatch.commands.common_evidence import (
    EVIDENCE,
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
    load_raw,
    masked,
)
from kglmatch.commands.common_register import run_raster
from kglmatch.options import (
    DEFAULT_BAND_ROTATION,
    DEFAULT_BAND_SCALE,
    DEFAULT_KIND,
    DEFAULT_MAP_ROTATION,
    DEFAULT_MAP_SCALE,
    DEFAULT_MAX_ROTATION,
    DEFAULT_MAX_SCALE,
    DEFAULT_RESAMPLING,
    KINDS,
    PROPOSERS,
    RESAMPLINGS,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kglmatch.matcher import Matcher
    from kglmatch.proposers import OpenCVProposer
    from kglmatch.registration.files import MapFrame, TiffFields
    from kglmatch.registration.limits import Limits
    from kglmatch.registration.results import BandRegistration, Registration, RegistrationCheck

# Outputs of one VIS and one IR.
_SINGLE = ("overlay", "checkerboard", "matches", "yml", "gcp", *EVIDENCE)

EPILOG = """exit code: 0 if every image was registered (or is doubtful, which is said), 1 if one failed,
which is then not written, 2 for a mistake.

examples:
  kglmatch register scene_vis.png scene_nir.tif -o aligned.tif --overlay overlay.png
  kglmatch register rgb.jpg thermal.tif --gcp thermal.points --json
  kglmatch register ortho.tif thermal.tif:3 -o aligned.tif --max-displacement 60m   (GeoTIFFs)
  kglmatch register red.tif sar.tif -o aligned.tif --local --report report.html
  kglmatch register green.tif red.tif rededge.tif nir.tif -o stack.tif   (a rig: all onto the first)
"""


@dataclass(frozen=True)
class _Inputs:
    """What is read before the work.

    Attributes:
        greys: the visible image (or reference) and the others, (H, W) float32 in [0, 1].
        valid: (H, W) bool, the pixels of each that hold data; None for all.
        raws: images to warp, of their own types: IR; or the reference and the bands; none without -o.
        map_tags: the GeoTIFF tags of VIS, for the image or stack that is written.
        frame: the map frame of VIS, for ground control points; None where none are asked for.
        evidence_frame: the same for tie points and the residual field; None also where VIS has no map.
    """

    greys: list[NDArray[np.float32]]
    valid: list[NDArray[np.bool_] | None]
    raws: list[NDArray[Any]]
    map_tags: TiffFields
    frame: MapFrame | None
    evidence_frame: MapFrame | None = None


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "register",
        help="warp an image of another sensor onto a visible one; the bands of a rig onto one",
        description="Finds the transform between a visible image and one of another sensor, says whether "
        "to trust it, and warps the other image onto the visible one. With more than one other image, "
        "registers each band of a multispectral rig to the first image.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("vis", metavar="VIS", type=Path, help="the visible image, or the reference band")
    parser.add_argument(
        "ir", metavar="IR", type=Path, nargs="+", help="the image of the other sensor, or bands"
    )
    _add_outputs(parser)
    _add_limits(parser)
    _add_raster_options(parser)
    add_model_options(parser)
    add_backend_option(parser)


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    outputs = parser.add_argument_group("outputs", "all are written together, or none")
    outputs.add_argument(
        "-o",
        "--output",
        metavar="IMAGE",
        type=output_path,
        help="the IR image warped onto VIS, bit depth and channels kept; for several bands one multi-page "
        "TIFF: the reference, then every band that did not fail",
    )
    pictures = (
        ("--overlay", "draw both images in one, red and cyan"),
        ("--checkerboard", "draw both images in alternate squares"),
        ("--matches", "draw the places that were compared, over both images"),
    )
    for option, text in pictures:
        outputs.add_argument(option, metavar="PICTURE", type=output_path, help=text)
    outputs.add_argument(
        "--yml", metavar="FILE", type=output_path, help="write the transform for cv2.FileStorage: .yml, .yaml"
    )
    outputs.add_argument(
        "--gcp",
        metavar="FILE",
        type=output_path,
        help="write ground control points of IR: .points for QGIS's Georeferencer; .txt or .gcp for "
        "gdal_translate --optfile; on the map if VIS is a GeoTIFF",
    )
    outputs.add_argument(
        "--save", metavar="FILE", type=output_path, help="write all that was found, failed or not: .json"
    )
    add_evidence_options(outputs)
    outputs.add_argument(
        "--nodata",
        metavar="V",
        type=number,
        help="pixel value without data: does not count in the images, and fills what IR does not cover "
        "(default: every pixel counts, and the rest is filled with 0)",
    )
    add_json_option(outputs)


def _add_raster_options(parser: argparse.ArgumentParser) -> None:
    maps = parser.add_argument_group(
        "rasters",
        'GeoTIFF, COG, VRT and what else rasterio opens (pip install "kglmatch[geo]"); if VIS and IR are '
        "both on the map, that is where the search begins, and -o writes all bands of IR on VIS's grid",
    )
    add_band_options(maps)
    maps.add_argument(
        "--shift-only",
        action="store_true",
        help="write the pixels of IR as they are, with a corrected geotransform; finds a translation",
    )
    maps.add_argument(
        "--resampling",
        choices=RESAMPLINGS,
        default=DEFAULT_RESAMPLING,
        help="of the bands on VIS's grid; nearest for classes (default: %(default)s)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("registration")
    how.add_argument(
        "--kind",
        choices=KINDS,
        default=DEFAULT_KIND,
        help="of transform; auto: the simplest that no other clearly beats (default: %(default)s)",
    )
    how.add_argument(
        "--local",
        action="store_true",
        help="also correct the smooth displacement that the transform leaves over, where the images "
        "support it",
    )
    how.add_argument(
        "--max-displacement",
        metavar="R",
        type=displacement,
        help="pixels that the middle of the image may be moved by, or metres on the map, such as 60m "
        "(default: any)",
    )
    how.add_argument(
        "--max-rotation",
        metavar="D",
        type=non_negative_float,
        help="degrees, either way, up to 180 "
        f"(default: {DEFAULT_MAX_ROTATION:g}; for bands {DEFAULT_BAND_ROTATION:g}, on the map "
        f"{DEFAULT_MAP_ROTATION:g})",
    )
    how.add_argument(
        "--max-scale",
        metavar="S",
        type=non_negative_float,
        help="factor, either way, in addition to the ratio of the image sizes, 1 to 4 "
        f"(default: {DEFAULT_MAX_SCALE}; for bands {DEFAULT_BAND_SCALE}, on the map {DEFAULT_MAP_SCALE})",
    )
    how.add_argument(
        "--proposer",
        choices=PROPOSERS,
        action="append",
        default=[],
        help="features of OpenCV that propose a transform too, judged like ours; may be given several times; "
        "not for bands",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    rig = len(args.ir) > 1
    # Mistakes are reported before the model is loaded.
    limits = _limits(args, rig)
    proposers = _proposers(args, rig)
    _check_names(args, rig)
    if not rig and is_map_pair(args.vis, args.ir[0], args.vis_band, args.ir_band, _needs_map(args)):
        return run_raster(args, proposers)
    inputs = _read(args, rig)
    outputs = {
        **{f"--{name}": getattr(args, name) for name in (*_SINGLE, "save") if name not in EVIDENCE},
        **evidence_outputs(args),
    }
    check_outputs({"-o": args.output, **outputs}, files(args.vis, *args.ir))
    matcher = load_matcher(args)
    from kglmatch.patch_matcher import check_image_size

    for path, grey in zip((args.vis, *args.ir), inputs.greys, strict=True):
        check_image_size(grey, matcher.config.patch_size, str(path))
    if rig:
        return _run_rig(args, matcher, inputs, limits)
    return _run_pair(args, matcher, inputs, limits, proposers)


def _needs_map(args: argparse.Namespace) -> dict[str, bool]:
    metres = isinstance(args.max_displacement, str)
    return {"--shift-only": args.shift_only, f"--max-displacement {args.max_displacement}": metres}


def _limits(args: argparse.Namespace, rig: bool) -> Limits:
    from kglmatch.registration.limits import Limits

    rotation, scale = args.max_rotation, args.max_scale
    if rotation is None:
        rotation = DEFAULT_BAND_ROTATION if rig else DEFAULT_MAX_ROTATION
    if scale is None:
        scale = DEFAULT_BAND_SCALE if rig else DEFAULT_MAX_SCALE
    pixels = None if isinstance(args.max_displacement, str) else args.max_displacement
    return Limits(args.kind, pixels, rotation, scale)


def _proposers(args: argparse.Namespace, rig: bool) -> list[OpenCVProposer]:
    from kglmatch.errors import KGLMatchError
    from kglmatch.proposers import named_proposer

    if rig and args.proposer:
        raise KGLMatchError(f"--proposer is for one VIS and one IR, got {len(args.ir)} bands")
    return [named_proposer(name) for name in dict.fromkeys(args.proposer)]


# --- before the work ------------------------------------------------------------------------------


def _check_names(args: argparse.Namespace, rig: bool) -> None:
    from kglmatch.errors import OutputError
    from kglmatch.images import check_image_name
    from kglmatch.registration.files import CONTROL_POINTS, JSON, STACK, YML, check_ending

    if rig:
        for option, given in _needs_map(args).items():
            if given:
                raise OutputError(f"{option} is for one VIS and one IR, got {len(args.ir)} bands")
        if args.local:
            raise OutputError(
                f"--local is for one VIS and one IR, got {len(args.ir)} bands; register that band on its own"
            )
        for name in _SINGLE:
            if getattr(args, name) is not None:
                raise OutputError(
                    f"--{name.replace('_', '-')} is for one VIS and one IR, got {len(args.ir)} bands; "
                    "register that band on its own"
                )
        if args.output is not None:
            check_ending(args.output, STACK, "a stack of bands")
    for picture in (args.output, args.overlay, args.checkerboard, args.matches):
        if picture is not None:
            check_image_name(picture)
    for path, endings, what in (
        (args.yml, YML, "OpenCV's yml"),
        (args.gcp, CONTROL_POINTS, "ground control points"),
        (args.save, JSON, "the registration"),
    ):
        if path is not None:
            check_ending(path, endings, what)


def _read(args: argparse.Namespace, rig: bool) -> _Inputs:
    """Reads all that is needed, so that what is damaged shows before the work."""
    from kglmatch.registration.files import STACK, read_map_frame, read_map_tags

    bands = [args.vis_band, *[args.ir_band] * len(args.ir)]
    loaded = [
        load_grey(path, band, args.nodata) for path, band in zip((args.vis, *args.ir), bands, strict=True)
    ]
    greys, valid = [grey for grey, _ in loaded], [pixels for _, pixels in loaded]
    raws = _read_raw(args, rig)
    on_map = args.output is not None and args.output.suffix.lower() in STACK
    map_tags = read_map_tags(files(args.vis)[0]) if on_map else []
    frame = None if args.gcp is None else read_map_frame(files(args.vis)[0])
    return _Inputs(greys, valid, raws, map_tags, frame, map_frame(args, files(args.vis)[0]))


def _read_raw(args: argparse.Namespace, rig: bool) -> list[NDArray[Any]]:
    """The images to warp with their own types: IR; or the reference and the bands."""
    from kglmatch.images import check_image_fits
    from kglmatch.registration.files import check_pages

    if args.output is None:
        return []
    paths = [args.vis, *args.ir] if rig else args.ir
    raws = [load_raw(path, args.ir_band if path != args.vis else args.vis_band) for path in paths]
    if rig:
        check_pages(raws, [str(path) for path in paths])
    else:
        check_image_fits(args.output, raws[0])
    if args.nodata is not None:
        for path, raw in zip(paths, raws, strict=True):
            _check_nodata(args.nodata, raw.dtype, path)
    return raws


def _check_nodata(nodata: float, dtype: np.dtype[Any], path: Path) -> None:
    from kglmatch.errors import KGLMatchError
    from kglmatch.resampling import check_nodata

    try:
        check_nodata(nodata, dtype)
    except KGLMatchError as error:
        raise KGLMatchError(f"--nodata does not fit {path}: {error}") from None


# --- one pair -------------------------------------------------------------------------------------


def _run_pair(
    args: argparse.Namespace,
    matcher: Matcher,
    inputs: _Inputs,
    limits: Limits,
    proposers: list[OpenCVProposer],
) -> int:
    path = args.ir[0]
    began = time.perf_counter()
    images = [masked(grey, valid) for grey, valid in zip(inputs.greys, inputs.valid, strict=True)]
    found = matcher.register(*images, **asdict(limits), proposers=proposers, local=args.local)
    seconds = time.perf_counter() - began
    check = None
    if found.transform is not None and (args.report or args.residual_field):
        warped = masked(found.warp(inputs.greys[1]), found.covered(inputs.valid[1]))
        check = matcher.check(images[0], warped)
    written = _write_pair(args, inputs, found, check)
    if args.json:
        facts = {"vis": str(args.vis), "ir": str(path), "model": args.model, "device": matcher.device}
        print_json({**facts, **found.to_dict(), **_timing(seconds, written)})
    else:
        print(f"{registration_summary(found)} ({seconds:.1f} s on {matcher.device})")
        if found.transform is not None:
            print(_effect(found, found.transform))
            if found.correction is not None:
                print(local_effect(found.correction))
        for name in written:
            print(f"wrote {name}")
    for error in found.errors:
        say(f"proposer {error}")
    if found.verdict == "failed":
        unwritten = any(getattr(args, name) is not None for name in ("output", *_SINGLE))
        say(f"{path}: not registered to {args.vis}{'; no image was written' if unwritten else ''}")
        return EXIT_FAILED
    if found.verdict == "doubtful":
        say(f"{path}: doubtful; look at it before you use it (--overlay, --checkerboard)")
    return 0


def _write_pair(
    args: argparse.Namespace, inputs: _Inputs, found: Registration, check: RegistrationCheck | None
) -> list[Path]:
    """Writes what was asked for and can be, all of it or nothing; the files."""
    from kglmatch.files import atomic_outputs
    from kglmatch.images import save_image
    from kglmatch.registration.evidence import tie_points_of
    from kglmatch.registration.files import (
        NO_MAP,
        registration_to_dict,
        save_control_points,
        save_json,
        save_yml,
    )
    from kglmatch.visualize import draw_checkerboard, draw_matches, draw_overlay

    vis, ir = inputs.greys
    writers: list[tuple[Path | None, Callable[[Path], None]]] = []
    if found.transform is not None:
        transform, local = found.transform, found.local
        writers = [
            (args.output, lambda path: _write_warped(args, path, inputs, found)),
            (args.overlay, lambda path: save_image(path, draw_overlay(vis, ir, transform, local=local))),
            (
                args.checkerboard,
                lambda path: save_image(path, draw_checkerboard(vis, ir, transform, local=local)),
            ),
            (args.matches, lambda path: save_image(path, draw_matches(vis, ir, as_matches(found)))),
            (args.yml, lambda path: save_yml(path, found)),
            (args.gcp, lambda path: save_control_points(path, found, inputs.frame or NO_MAP)),
        ]
    names = str(args.vis), str(args.ir[0])
    if found.transform is not None:
        writers += table_writers(args, tie_points_of(found), check, inputs.evidence_frame)
    writers += report_writer(args, (vis, ir), names, check, found)
    writers.append((args.save, lambda path: save_json(path, registration_to_dict(found))))
    written = []
    with atomic_outputs():
        for path, write in writers:
            if path is not None:
                write(path)
                written.append(path)
    return written


def _write_warped(args: argparse.Namespace, path: Path, inputs: _Inputs, found: Registration) -> None:
    """Writes the ir image on the visible one's pixels, and with its place on the map if it has one."""
    from kglmatch.images import save_image
    from kglmatch.registration.files import save_stack

    image = _warp(found, inputs.raws[0], args.nodata)
    if inputs.map_tags:
        save_stack(path, [image], [args.ir[0].name], map_tags=inputs.map_tags, nodata=args.nodata)
    else:
        save_image(path, image)


def _warp(found: Registration, raw: NDArray[Any], nodata: float | None) -> NDArray[Any]:
    """The image warped onto the visible one; nodata does not mix into the pixels near it."""
    from kglmatch.resampling import warp_around_nodata

    if nodata is None or found.transform is None:
        return found.warp(raw)
    return warp_around_nodata(
        raw, found.transform, found.vis_size, nodata=nodata, displacement=found.displacement
    )


# --- a rig ----------------------------------------------------------------------------------------


def _run_rig(args: argparse.Namespace, matcher: Matcher, inputs: _Inputs, limits: Limits) -> int:
    began = time.perf_counter()
    names = [str(path) for path in args.ir]
    reference, *others = inputs.greys
    results = matcher.register_stack(reference, others, names=names, **asdict(limits))
    seconds = time.perf_counter() - began
    kept = [i for i, result in enumerate(results) if result.registration.verdict != "failed"]
    facts = {
        "reference": str(args.vis),
        "model": args.model,
        "device": matcher.device,
        "stack": [str(args.vis), *(names[i] for i in kept)] if kept else [],
    }
    written = _write_rig(args, inputs, results, kept, facts)
    if args.json:
        bands = [{"band": r.name, "via": r.via, **r.registration.to_dict()} for r in results]
        print_json({**facts, "bands": bands, **_timing(seconds, written)})
    else:
        for line in _table(results):
            print(line)
        print(f"{len(kept)} of {len(results)} bands registered ({seconds:.1f} s on {matcher.device})")
        for path in written:
            print(f"wrote {path}")
    for result in results:
        if result.registration.verdict == "failed":
            say(f"{result.name}: not registered to {args.vis}; left out")
        elif result.registration.verdict == "doubtful":
            say(f"{result.name}: doubtful; look at it before you use it")
    if args.output is not None and not kept:
        say(f"{args.output}: not written, for no band was registered")
    return 0 if len(kept) == len(results) else EXIT_FAILED


def _write_rig(
    args: argparse.Namespace,
    inputs: _Inputs,
    results: list[BandRegistration],
    kept: list[int],
    facts: dict[str, Any],
) -> list[Path]:
    """Writes what was asked for and can be, all of it or nothing; the files."""
    from kglmatch.files import atomic_outputs
    from kglmatch.registration.files import registration_to_dict, save_json, save_stack

    written = []
    with atomic_outputs():
        if args.output is not None and kept:
            bands = [_warp(results[i].registration, inputs.raws[i + 1], args.nodata) for i in kept]
            page_names = [args.vis.name, *(args.ir[i].name for i in kept)]
            pages = [inputs.raws[0], *bands]
            save_stack(args.output, pages, page_names, map_tags=inputs.map_tags, nodata=args.nodata)
            written.append(args.output)
        if args.save is not None:
            rows = [{"band": r.name, "via": r.via, **registration_to_dict(r.registration)} for r in results]
            save_json(args.save, {**facts, "bands": rows})
            written.append(args.save)
    return written


def _table(results: list[BandRegistration]) -> list[str]:
    header = ("band", "verdict", "confidence", "kind", "inliers", "median residual", "via")
    rows = [header]
    for result in results:
        found = result.registration
        failed = found.verdict == "failed"
        rows.append(
            (
                result.name,
                found.verdict,
                f"{found.confidence:.2f}",
                "-" if failed else str(found.kind),
                f"{int(found.inliers.sum())}/{len(found.inliers)}",
                "-" if failed or not found.inliers.any() else f"{found.median_residual:.2f} px",
                result.via or "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


# --- texts ----------------------------------------------------------------------------------------


def _timing(seconds: float, written: list[Path]) -> dict[str, Any]:
    return {"seconds": round(seconds, 3), "written": [str(path) for path in written]}


def _effect(found: Registration, transform: NDArray[np.float64]) -> str:
    """What the transform does at the middle of the visible image, in pixels of the other one."""
    import numpy as np

    from kglmatch.geometry import transform_points

    middle = (np.array([found.vis_size], float) - 1) / 2
    around = middle + np.array([[0, 0], [0.5, 0], [-0.5, 0], [0, 0.5], [0, -0.5]])
    moved = transform_points(transform, around)
    shift = moved[0] - (np.array(found.ir_size) - 1) / 2
    right, down = moved[1] - moved[2], moved[3] - moved[4]
    rotation = float(np.degrees(np.arctan2(right[1] - down[0], right[0] + down[1])))
    scale = float(np.sqrt(abs(right[0] * down[1] - right[1] * down[0])))
    return (
        f"from visible to ir pixels: centre moved by ({shift[0]:+.2f}, {shift[1]:+.2f}) px, "
        f"turned by {rotation:+.2f} degrees, scaled by {scale:.4f}"
    )
