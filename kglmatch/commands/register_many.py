"""`kglmatch register-many`: all pairs of two folders or of a list, into a folder that can be resumed."""

from __future__ import annotations

import argparse
from typing import Any

from kglmatch.commands.common import add_model_options, non_negative_float, number
from kglmatch.commands.common_many import EXIT_CODES, add_job_options, add_pairs_options, run_pairs
from kglmatch.options import DEFAULT_KIND, DEFAULT_MAX_ROTATION, DEFAULT_MAX_SCALE, KINDS

FORMATS = ("tif", "png")

EPILOG = f"""{EXIT_CODES}
The verdict "failed" is an answer.

examples:
  kglmatch register-many rgb/ thermal/ -o registered --save tif
  kglmatch register-many pairs.csv -o registered --max-displacement 50
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "register-many",
        help="register thousands of image pairs, with a table of results; resumes after any kill",
        description="Registers all pairs of two folders, or of a list, as kglmatch register does, in as many "
        "processes as there are processors. OUTPUT/results.parquet gets a row a pair.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_pairs_options(parser)
    add_job_options(parser)
    how = parser.add_argument_group("registration, as for kglmatch register")
    how.add_argument(
        "--save",
        choices=FORMATS,
        help="write IR warped onto VIS for each pair that did not fail, in OUTPUT/aligned; bit depth and "
        "channels are kept",
    )
    how.add_argument(
        "--kind", choices=KINDS, default=DEFAULT_KIND, help="of transform (default: %(default)s)"
    )
    how.add_argument(
        "--max-displacement",
        metavar="R",
        type=non_negative_float,
        help="pixels that the middle of the image may be moved by (default: any)",
    )
    how.add_argument(
        "--max-rotation",
        metavar="D",
        type=non_negative_float,
        default=DEFAULT_MAX_ROTATION,
        help="degrees, either way (default: %(default)g)",
    )
    how.add_argument(
        "--max-scale",
        metavar="S",
        type=non_negative_float,
        default=DEFAULT_MAX_SCALE,
        help="factor, either way (default: %(default)g)",
    )
    how.add_argument(
        "--nodata",
        metavar="V",
        type=number,
        help="pixel value without data: does not count, and fills what IR does not cover",
    )
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from kglmatch.registration.limits import Limits

    Limits(args.kind, args.max_displacement, args.max_rotation, args.max_scale)
    names = ("kind", "max_displacement", "max_rotation", "max_scale", "nodata")
    options = {name: getattr(args, name) for name in names}
    return run_pairs(args, "register", options)
