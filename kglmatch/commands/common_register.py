"""`kglmatch register` of two rasters that are on the map."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kglmatch.commands.common import (
    EXIT_FAILED,
    as_matches,
    check_outputs,
    load_matcher,
    local_effect,
    print_json,
    registration_summary,
    say,
)
from kglmatch.commands.common_evidence import EVIDENCE, evidence_outputs, report_writer, table_writers
from kglmatch.commands.common_rasters import files, masked
from kglmatch.options import DEFAULT_MAP_ROTATION, DEFAULT_MAP_SCALE

if TYPE_CHECKING:
    from kglmatch.geo.raster import Raster
    from kglmatch.geo.register import RasterRegistration
    from kglmatch.matcher import Matcher
    from kglmatch.registration.proposals import Proposer
    from kglmatch.registration.results import Registration

_PICTURES = ("overlay", "checkerboard", "matches")


def run_raster(args: argparse.Namespace, proposers: Sequence[Proposer] = ()) -> int:
    """Runs `kglmatch register` with the map as prior; returns the exit code."""
    from kglmatch.geo.raster import Raster, gdal_settings
    from kglmatch.geo.register import correct_rasters, register_rasters

    ir_path = args.ir[0]
    _check_names(args)
    outputs = {f"--{name}": getattr(args, name) for name in (*_PICTURES, "yml", "gcp", "save")}
    outputs |= evidence_outputs(args)
    check_outputs({"-o": args.output, **outputs}, files(args.vis, ir_path))
    kind = "translation" if args.shift_only else args.kind
    with (
        gdal_settings(),
        Raster(args.vis, args.vis_band, args.nodata) as vis,
        Raster(ir_path, args.ir_band, args.nodata) as ir,
    ):
        _check_pair(args, vis, ir)
        matcher = load_matcher(args)
        began = time.perf_counter()
        found = register_rasters(
            matcher,
            vis,
            ir,
            kind=kind,
            max_displacement=args.max_displacement,
            max_rotation=DEFAULT_MAP_ROTATION if args.max_rotation is None else args.max_rotation,
            max_scale=DEFAULT_MAP_SCALE if args.max_scale is None else args.max_scale,
            proposers=proposers,
            progress=True,
        )
        if args.local:
            found = correct_rasters(matcher, vis, ir, found)
        seconds = time.perf_counter() - began
        written = _write(args, matcher, vis, ir, found)
    registration = found.registration
    if args.json:
        facts = {"vis": str(args.vis), "ir": str(ir_path), "model": args.model, "device": matcher.device}
        timing = {"seconds": round(seconds, 3), "written": [str(path) for path in written]}
        print_json({**facts, **found.to_dict(), **timing})
    else:
        for line in _lines(found, ir_path, seconds, matcher.device):
            print(line)
        for path in written:
            print(f"wrote {path}")
    if registration.verdict == "failed":
        unwritten = any(getattr(args, name) is not None for name in ("output", *_PICTURES, "yml", "gcp"))
        say(f"{ir_path}: not registered to {args.vis}{'; no raster was written' if unwritten else ''}")
        return EXIT_FAILED
    if registration.verdict == "doubtful":
        say(f"{ir_path}: doubtful; look at it before you use it (--overlay, --checkerboard)")
    return 0


def _check_names(args: argparse.Namespace) -> None:
    from kglmatch.errors import OutputError
    from kglmatch.geo.write import GEOTIFF
    from kglmatch.registration.files import check_ending

    if args.output is not None:
        check_ending(args.output, GEOTIFF, "a raster")
    if args.shift_only and args.local:
        raise OutputError("--shift-only keeps the pixels, and --local moves them: give one of them")
    if args.shift_only and args.output is None:
        raise OutputError("--shift-only says what is written: name the file by -o")


def _check_pair(args: argparse.Namespace, vis: Raster, ir: Raster) -> None:
    """What would fail after the work fails before it."""
    from kglmatch.geo.register import common_scene

    scene, _ = common_scene(vis, ir)
    if args.yml is not None and scene.grid.crs != scene.ir_grid.crs:
        from kglmatch.errors import OutputError

        raise OutputError(
            f"cannot write --yml {args.yml}: the rasters have different coordinate reference systems, and no "
            "homography is between their pixels; --gcp writes points"
        )
    for name, raster in ((args.vis, vis), (args.ir[0], ir)):
        if raster.source.count > 1:
            say(f"{name}: {raster.source.count} bands; {raster.describe_bands()} is matched")


def _write(
    args: argparse.Namespace, matcher: Matcher, vis: Raster, ir: Raster, found: RasterRegistration
) -> list[Path]:
    """Writes what was asked for and can be, all of it or nothing; the files."""
    import numpy as np

    from kglmatch.files import atomic_outputs
    from kglmatch.geo.register import preview
    from kglmatch.geo.write import save_on_grid, save_shifted
    from kglmatch.registration.files import (
        MapFrame,
        registration_to_dict,
        save_control_points,
        save_json,
        save_yml,
    )

    def raster(path: Path) -> None:
        transform = found.registration.transform
        if args.shift_only:
            save_shifted(ir, path, found.map_shift())
        elif transform is not None:
            save_on_grid(
                ir,
                path,
                found.grid,
                found.mapping(),
                resampling=args.resampling,
                own=found.ir_grid,
                progress=True,
            )

    def points(path: Path) -> None:
        keypoints = found.to_ir_pixels(found.registration.keypoints_ir).astype(np.float32)
        own = dataclasses.replace(found.registration, keypoints_ir=keypoints)
        save_control_points(path, own, MapFrame(found.grid.matrix[:2], found.grid.crs.to_epsg()))

    def everything(path: Path) -> None:
        save_json(path, {**registration_to_dict(found.registration), **found.to_dict()})

    writers: list[tuple[Path | None, Callable[[Path], None]]] = []
    if found.registration.transform is not None:
        pictures = [getattr(args, name) for name in _PICTURES]
        if any(pictures):
            vis_image, ir_image, small = preview(vis, ir, found)
            writers += _pictures(args, vis_image, ir_image, small)
        writers += _evidence(args, matcher, vis, ir, found)
        writers += [
            (args.output, raster),
            (args.yml, lambda path: save_yml(path, found.in_ir_pixels())),
            (args.gcp, points),
        ]
    elif args.report is not None:
        images = preview(vis, ir, found)[:2]
        names = str(args.vis), str(args.ir[0])
        writers += report_writer(args, images, names, None, found.registration, on_map=True)
    writers.append((args.save, everything))
    written = []
    with atomic_outputs():
        for path, write in writers:
            if path is not None:
                write(path)
                written.append(path)
    return written


def _evidence(
    args: argparse.Namespace, matcher: Matcher, vis: Raster, ir: Raster, found: RasterRegistration
) -> list[tuple[Path | None, Callable[[Path], None]]]:
    """Report, tie points and residual field; the residuals are measured on what `preview` gives."""
    from kglmatch.geo.register import preview_with_data
    from kglmatch.registration.evidence import tie_points_of
    from kglmatch.registration.files import MapFrame

    if not any(getattr(args, name) for name in EVIDENCE):
        return []
    points = tie_points_of(found.registration)
    points = dataclasses.replace(points, ir=found.to_ir_pixels(points.ir))
    frame = MapFrame(found.grid.matrix[:2], found.grid.crs.to_epsg())
    if args.report is None and args.residual_field is None:
        return table_writers(args, points, None, frame)
    (vis_image, vis_valid), (ir_image, ir_valid), small = preview_with_data(vis, ir, found)
    warped = masked(small.warp(ir_image), small.covered(ir_valid))
    check = matcher.check(masked(vis_image, vis_valid), warped)
    writers = table_writers(args, points, found.check_on_grid(check), frame)
    names = str(args.vis), str(args.ir[0])
    metres = found.grid.resized(small.vis_size).metres_per_pixel()
    return writers + report_writer(args, (vis_image, ir_image), names, check, small, metres, True)


def _pictures(
    args: argparse.Namespace, vis: Any, ir: Any, found: Registration
) -> list[tuple[Path | None, Callable[[Path], None]]]:
    from kglmatch.images import save_image
    from kglmatch.visualize import draw_checkerboard, draw_matches, draw_overlay

    transform, local = found.transform, found.local
    if transform is None:
        return []
    return [
        (args.overlay, lambda path: save_image(path, draw_overlay(vis, ir, transform, local=local))),
        (
            args.checkerboard,
            lambda path: save_image(path, draw_checkerboard(vis, ir, transform, local=local)),
        ),
        (args.matches, lambda path: save_image(path, draw_matches(vis, ir, as_matches(found)))),
    ]


def _lines(found: RasterRegistration, path: Path, seconds: float, device: str) -> list[str]:
    registration = found.registration
    lines = [f"{registration_summary(registration)} ({seconds:.1f} s on {device})"]
    if registration.transform is not None:
        east, north = found.shift_metres
        lines.append(
            f"{path} belongs {abs(east):.2f} m {'east' if east >= 0 else 'west'} and {abs(north):.2f} m "
            f"{'north' if north >= 0 else 'south'} of where its map puts it"
        )
        if registration.correction is not None:
            lines.append(local_effect(registration.correction))
    return lines
