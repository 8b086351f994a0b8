"""`kglmatch rig`: a multispectral rig, calibrated once and applied to every capture of a flight."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kglmatch.commands.common import (
    EXIT_FAILED,
    add_json_option,
    add_model_options,
    check_outputs,
    load_matcher,
    non_negative_float,
    number,
    output_path,
    positive_float,
    positive_int,
    print_json,
    say,
)
from kglmatch.options import (
    DEFAULT_BAND_ROTATION,
    DEFAULT_BAND_SCALE,
    DEFAULT_KIND,
    DEFAULT_RIG_CAPTURES,
    DEFAULT_RIG_TOLERANCE,
    KINDS,
)

if TYPE_CHECKING:
    from kglmatch.batch.captures import Capture
    from kglmatch.batch.rig_check import RigCheck
    from kglmatch.batch.rig_results import Rig

CAPTURES_HELP = (
    "a folder of captures, named CAPTURE_BAND (IMG_0001_1.tif), or with a folder a band; or a .csv file with "
    'a column "capture" and one column of paths a band'
)
_PROBLEMS_SHOWN = 20

EPILOG = """examples:
  kglmatch rig calibrate flight/ -o rig.json
  kglmatch rig check rig.json flight/ -o residuals.png --table residuals.csv
  kglmatch rig apply rig.json flight/ -o stacks/ --crop
"""
CALIBRATE_EPILOG = """exit code: 0 if every band is registered, 1 if one transform does not serve the flight,
or a band is doubtful or failed (the rig says so; rig apply refuses such bands), 2 for a mistake.
"""
APPLY_EPILOG = """Run again with the same arguments, it resumes: a capture that is there is whole, and stays.

exit code: 0 if every capture was written, 1 if some were not, which is said, 2 for a mistake.
"""
CHECK_EPILOG = """exit code: 0 if the rig serves this flight, 1 if it does not, 2 for a mistake.
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its own commands."""
    parser = subparsers.add_parser(
        "rig",
        help="calibrate the bands of a multispectral rig on a flight, apply and check that",
        description="The bands of a multispectral rig: calibrated on the captures of a flight together, "
        "applied to each of them, and checked.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_calibrate(commands)
    _add_apply(commands)
    _add_check(commands)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    code: int = args.run_rig(args)
    return code


def _add(commands: Any, name: str, **texts: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, formatter_class=argparse.RawDescriptionHelpFormatter, **texts
    )
    return parser


def _add_capture_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("captures", metavar="CAPTURES", type=Path, help=CAPTURES_HELP)
    parser.add_argument(
        "--pattern",
        metavar="P",
        help='how files in the folder are named, such as "{capture}_{band}.tif" or "{band}/{capture}.png" '
        "(default: what fits)",
    )
    parser.add_argument(
        "--workers", metavar="N", type=positive_int, help="threads that work at once (default: one a core)"
    )


def _captures(args: argparse.Namespace) -> list[Capture]:
    from kglmatch.batch.captures import find_captures

    return find_captures(args.captures, args.pattern)


# --- calibrate ------------------------------------------------------------------------------------


def _add_calibrate(commands: Any) -> None:
    parser = _add(
        commands,
        "calibrate",
        help="find one transform a band from all captures together",
        description="Finds one transform a band from the captures of a flight together, and says whether "
        "one transform serves the flight.",
        epilog=CALIBRATE_EPILOG,
    )
    parser.set_defaults(run_rig=_calibrate)
    _add_capture_options(parser)
    parser.add_argument(
        "-o", "--output", metavar="RIG", type=output_path, required=True, help="the rig to write: .json"
    )
    add_json_option(parser)
    how = parser.add_argument_group("calibration")
    how.add_argument(
        "--reference", metavar="B", help='band that the others are registered to (default: "1", or the first)'
    )
    how.add_argument(
        "--kind",
        choices=KINDS,
        default=DEFAULT_KIND,
        help="auto: the simplest that no other clearly beats (default: %(default)s)",
    )
    how.add_argument(
        "--tolerance",
        metavar="R",
        type=positive_float,
        default=DEFAULT_RIG_TOLERANCE,
        help="pixels of a band within which a capture agrees (default: %(default)g)",
    )
    how.add_argument(
        "--max-captures",
        metavar="N",
        type=positive_int,
        default=DEFAULT_RIG_CAPTURES,
        help="captures to use, evenly spread over the flight (default: %(default)s)",
    )
    how.add_argument(
        "--max-displacement",
        metavar="R",
        type=non_negative_float,
        help="pixels that the middle of a band may be moved by (default: any)",
    )
    how.add_argument(
        "--max-rotation",
        metavar="D",
        type=non_negative_float,
        default=DEFAULT_BAND_ROTATION,
        help="degrees, either way, up to 180 (default: %(default)g)",
    )
    how.add_argument(
        "--max-scale",
        metavar="S",
        type=non_negative_float,
        default=DEFAULT_BAND_SCALE,
        help="factor, either way, beyond the ratio of the image sizes, 1 to 4 (default: %(default)g)",
    )
    add_model_options(parser)


def _calibrate(args: argparse.Namespace) -> int:
    from kglmatch.batch.captures import band_names, choose_reference
    from kglmatch.batch.rig import calibrate_rig
    from kglmatch.registration.files import JSON, check_ending
    from kglmatch.registration.limits import Limits

    # A mistake is reported before the model is loaded.
    Limits(args.kind, args.max_displacement, args.max_rotation, args.max_scale)
    check_ending(args.output, JSON, "the rig")
    check_outputs({"-o": args.output}, (args.captures,))
    captures = _captures(args)
    choose_reference(band_names(captures), args.reference)
    matcher = load_matcher(args)
    began = time.perf_counter()
    rig = calibrate_rig(
        matcher,
        captures,
        reference=args.reference,
        kind=args.kind,
        tolerance=args.tolerance,
        max_displacement=args.max_displacement,
        max_rotation=args.max_rotation,
        max_scale=args.max_scale,
        max_captures=args.max_captures,
        workers=args.workers,
    )
    seconds = time.perf_counter() - began
    rig.save(args.output)
    if args.json:
        facts = {"seconds": round(seconds, 3), "written": [str(args.output)]}
        print_json({**rig.to_dict(), **facts, "device": matcher.device})
    else:
        for line in _rig_table(rig):
            print(line)
        print(f"{rig.num_captures} captures, reference {rig.reference} ({seconds:.1f} s on {matcher.device})")
        print(f"wrote {args.output}")
    _say_problems(rig.problems)
    for band in rig.bands:
        if band.verdict != "registered":
            say(f"band {band.name}: {band.verdict}: {band.reason}")
    return 0 if rig.serves else EXIT_FAILED


def _rig_table(rig: Rig) -> list[str]:
    header = ("band", "verdict", "confidence", "transform", "agree", "spread", "follows", "via")
    rows = [header]
    for band in rig.bands:
        trend = "-" if band.trend is None else f"{band.trend.of} ({band.trend.pixels:.1f} px)"
        rows.append(
            (
                band.name,
                band.verdict,
                f"{band.confidence:.2f}",
                band.kind or "-",
                f"{band.num_agreeing}/{band.num_judged} of {band.num_captures}",
                f"{band.spread:.2f} px" if band.num_judged else "-",
                trend,
                band.via or "-",
            )
        )
    return _columns(rows)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _say_problems(problems: dict[str, str]) -> None:
    for name, text in list(problems.items())[:_PROBLEMS_SHOWN]:
        say(f"{name}: {text}")
    if len(problems) > _PROBLEMS_SHOWN:
        say(f"and {len(problems) - _PROBLEMS_SHOWN} more captures that could not be used")


# --- apply ----------------------------------------------------------------------------------------


def _add_apply(commands: Any) -> None:
    parser = _add(
        commands,
        "apply",
        help="warp all bands of every capture onto its reference",
        description="Warps all bands of every capture onto its reference, and writes a stack a capture.",
        epilog=APPLY_EPILOG,
    )
    parser.set_defaults(run_rig=_apply)
    parser.add_argument("rig", metavar="RIG", type=Path, help="what rig calibrate wrote")
    _add_capture_options(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        type=output_path,
        required=True,
        help="a new folder, or one to resume in",
    )
    add_json_option(parser)
    how = parser.add_argument_group("outputs")
    how.add_argument(
        "--bands",
        metavar="B",
        nargs="+",
        help="bands to write after the reference (default: all of the rig)",
    )
    how.add_argument("--files", action="store_true", help="one file a band, not one stack a capture")
    how.add_argument(
        "--crop", action="store_true", help="crop to what all bands cover, the same for all captures"
    )
    how.add_argument(
        "--refine",
        action="store_true",
        help="refine each capture about the rig's transform where its content supports that more",
    )
    how.add_argument(
        "--nodata",
        metavar="V",
        type=number,
        help="value of pixels without data, in the images and where a band does not cover the reference "
        "(default: every pixel counts, and the rest is filled with 0)",
    )
    how.add_argument(
        "--force",
        action="store_true",
        help="warp also bands that are doubtful or vary",
    )


def _apply(args: argparse.Namespace) -> int:
    from kglmatch.batch.rig_apply import apply_rig, check_outside
    from kglmatch.batch.rig_results import Rig

    rig = Rig.load(args.rig)
    check_outside(args.output, args.captures)
    began = time.perf_counter()
    done = apply_rig(
        rig,
        args.captures if args.pattern is None else _captures(args),
        args.output,
        bands=args.bands,
        stack=not args.files,
        crop=args.crop,
        refine=args.refine,
        nodata=args.nodata,
        force=args.force,
        workers=args.workers,
        progress=True,
    )
    seconds = time.perf_counter() - began
    if args.json:
        print_json(
            {
                "output": str(args.output),
                "num_written": len(done.written),
                "num_present": len(done.present),
                "num_refined": len(done.refined),
                "crop": list(done.crop),
                "problems": done.problems,
                "seconds": round(seconds, 3),
            }
        )
    else:
        parts = [f"{len(done.written)} captures written to {args.output}"]
        if done.present:
            parts.append(f"{len(done.present)} were there")
        if args.refine:
            parts.append(f"{len(done.refined)} refined")
        print(f"{', '.join(parts)} ({seconds:.1f} s)")
        if args.crop:
            left, top, width, height = done.crop
            print(f"cropped to {width} x {height} pixels from ({left}, {top}) of the reference")
    _say_problems(done.problems)
    return EXIT_FAILED if done.problems else 0


# --- check ----------------------------------------------------------------------------------------


def _add_check(commands: Any) -> None:
    parser = _add(
        commands,
        "check",
        help="measure how far the captures of a flight lie from a rig",
        description="Measures how far the content of each capture lies from where a rig takes it. Needs no "
        "model.",
        epilog=CHECK_EPILOG,
    )
    parser.set_defaults(run_rig=_check)
    parser.add_argument("rig", metavar="RIG", type=Path, help="what rig calibrate wrote")
    _add_capture_options(parser)
    parser.add_argument(
        "-o", "--output", metavar="PICTURE", type=output_path, help="draw the residuals (needs matplotlib)"
    )
    parser.add_argument(
        "--table", metavar="FILE", type=output_path, help="write a row a capture and band: .csv"
    )
    parser.add_argument(
        "--max-captures",
        metavar="N",
        type=positive_int,
        help="captures to use, evenly spread over the flight (default: all)",
    )
    add_json_option(parser)


def _check(args: argparse.Namespace) -> int:
    from kglmatch.batch.rig_check import check_picture_name, check_rig, draw_check
    from kglmatch.batch.rig_results import Rig
    from kglmatch.registration.files import check_ending

    rig = Rig.load(args.rig)
    if args.table is not None:
        check_ending(args.table, (".csv",), "the table")
    if args.output is not None:
        check_picture_name(args.output)
    check_outputs({"-o": args.output, "--table": args.table}, (args.rig, args.captures))
    began = time.perf_counter()
    found = check_rig(
        rig, _captures(args), max_captures=args.max_captures, workers=args.workers, progress=True
    )
    seconds = time.perf_counter() - began
    written = []
    if args.table is not None:
        found.save_table(args.table)
        written.append(args.table)
    if args.output is not None:
        draw_check(found, args.output)
        written.append(args.output)
    if args.json:
        facts = {"seconds": round(seconds, 3), "written": [str(path) for path in written]}
        print_json({**found.to_dict(), **facts})
    else:
        for line in _check_table(found):
            print(line)
        for path in written:
            print(f"wrote {path}")
    _say_problems(found.problems)
    for band in found.bands:
        if band.objection is not None:
            say(f"band {band.name}: one transform does not serve this flight: {band.objection}")
        elif not band.residuals.judged.any():
            say(f"band {band.name}: no capture can be judged by its structure")
    return 0 if found.serves else EXIT_FAILED


def _check_table(found: RigCheck) -> list[str]:
    rows: list[tuple[str, ...]] = [("band", "captures", "judged", "agree", "shift", "spread", "follows")]
    for band in found.bands:
        judged = int(band.residuals.judged.sum())
        shift = f"({band.shift[0]:+.2f}, {band.shift[1]:+.2f}) px" if judged else "-"
        spread = f"{band.residuals.spread:.2f} px" if judged else "-"
        trend = "-" if band.trend is None else f"{band.trend.of} ({band.trend.pixels:.1f} px)"
        count = str(len(band.residuals.captures))
        rows.append((band.name, count, str(judged), str(band.num_agreeing), shift, spread, trend))
    return _columns(rows)
