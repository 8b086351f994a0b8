"""The report, the tie points and the residual field, which `register` and `check` write alike."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kglmatch.commands.common import output_path, positive_float

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kglmatch.registration.evidence import TiePoints
    from kglmatch.registration.files import MapFrame
    from kglmatch.registration.results import Registration, RegistrationCheck

EVIDENCE = ("report", "tie_points", "residual_field")

Writers = list[tuple[Path | None, Callable[[Path], None]]]


def add_evidence_options(outputs: argparse._ActionsContainer) -> None:
    """Adds --report, --tie-points, --residual-field and --pixel-size."""
    outputs.add_argument(
        "--report",
        metavar="FILE",
        type=output_path,
        help="write a self-contained report: pictures, residuals, RMSE and CE90, verdict, versions: .html",
    )
    outputs.add_argument(
        "--tie-points",
        metavar="FILE",
        type=output_path,
        help="write the places that were compared: .csv, or .gpkg (a GeoPackage, extra kglmatch[geo]); "
        "on the map too if VIS is a GeoTIFF",
    )
    outputs.add_argument(
        "--residual-field",
        metavar="FILE",
        type=output_path,
        help="write the residual displacements, x and y in pixels, as a GeoTIFF (extra kglmatch[geo])",
    )
    outputs.add_argument(
        "--pixel-size",
        metavar="M",
        type=positive_float,
        help="ground size of a VIS pixel in metres, for the report (default: the map's, if there is one)",
    )


def evidence_outputs(args: argparse.Namespace) -> dict[str, Path | None]:
    """Option -> file, for `check_outputs`; wrong names and missing packages are reported here."""
    from kglmatch.registration.evidence import check_evidence
    from kglmatch.registration.files import check_ending
    from kglmatch.report import REPORT

    if args.report is not None:
        check_ending(args.report, REPORT, "a report")
    check_evidence(args.tie_points, args.residual_field)
    return {f"--{name.replace('_', '-')}": getattr(args, name) for name in EVIDENCE}


def map_frame(args: argparse.Namespace, vis: Path) -> MapFrame | None:
    """The map frame of a file, where it is needed and known."""
    from kglmatch.registration.files import NO_MAP, read_map_frame

    if args.tie_points is None and args.residual_field is None:
        return None
    frame = read_map_frame(vis)
    return None if frame is NO_MAP else frame


def table_writers(
    args: argparse.Namespace,
    points: TiePoints,
    check: RegistrationCheck | None,
    frame: MapFrame | None,
) -> Writers:
    """What writes the tie points and the residual field; `frame` is that of the visible pixels."""
    from kglmatch.registration.evidence import save_residual_field, save_tie_points

    writers: Writers = [(args.tie_points, lambda path: save_tie_points(path, points, frame))]
    if check is not None:
        writers.append((args.residual_field, lambda path: save_residual_field(path, check, frame)))
    return writers


def report_writer(
    args: argparse.Namespace,
    images: tuple[NDArray[np.float32], NDArray[np.float32]],
    names: tuple[str, str],
    check: RegistrationCheck | None,
    registration: Registration | None = None,
    pixel_size: float | None = None,
    on_map: bool = False,
) -> Writers:
    """What writes the report; `pixel_size`, in metres, is that of these images."""
    from kglmatch.report import save_report

    return [
        (
            args.report,
            lambda path: save_report(
                path,
                *images,
                check,
                registration=registration,
                names=names,
                model=args.model,
                command=args.command_line,
                pixel_size=args.pixel_size if pixel_size is None else pixel_size,
                on_map=on_map,
            ),
        )
    ]
