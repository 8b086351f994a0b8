"""`kglmatch match-many`: all pairs of two folders or of a list, into a folder that can be resumed."""

from __future__ import annotations

import argparse
from typing import Any

from kglmatch.commands.common import add_model_options, fraction, non_negative_float, number, positive_int
from kglmatch.commands.common_many import EXIT_CODES, add_job_options, add_pairs_options, run_pairs
from kglmatch.options import (
    DECISIONS,
    DEFAULT_MAX_KEYPOINTS,
    DEFAULT_MIN_SCORE,
    DEFAULT_TOP_K,
    DETECTORS,
)

FORMATS = ("npz", "csv", "json")

EPILOG = f"""{EXIT_CODES}

examples:
  kglmatch match-many vis/ ir/ -o matched --max-displacement 10
  kglmatch match-many pairs.csv -o matched --save npz --engine ray
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "match-many",
        help="match thousands of image pairs, with a table of results; resumes after any kill",
        description="Matches all pairs of two folders, or of a list, as kglmatch match does. Images are read "
        "ahead by other processes. OUTPUT/results.parquet gets a row a pair.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_pairs_options(parser)
    add_job_options(parser)
    how = parser.add_argument_group("matching, as for kglmatch match")
    how.add_argument("--save", choices=FORMATS, help="write a file of matches a pair, in OUTPUT/matches")
    how.add_argument(
        "--max-displacement",
        metavar="R",
        type=non_negative_float,
        help="pixels between matching points, for registered or nearly registered images",
    )
    how.add_argument(
        "--max-keypoints",
        metavar="N",
        type=positive_int,
        default=DEFAULT_MAX_KEYPOINTS,
        help="keypoints of each image, the strongest (default: %(default)s)",
    )
    how.add_argument("--detector", choices=DETECTORS, help="what finds keypoints (default: the model's)")
    how.add_argument("--dense", action="store_true", help="search IR all over --max-displacement")
    how.add_argument(
        "--no-upright", dest="upright", action="store_false", help="rotate patches with their gradients"
    )
    how.add_argument(
        "--top-k",
        metavar="K",
        type=positive_int,
        default=DEFAULT_TOP_K,
        help="candidates of each keypoint (default: %(default)s)",
    )
    how.add_argument(
        "--min-score",
        metavar="S",
        type=fraction,
        default=DEFAULT_MIN_SCORE,
        help="drop matches of a lower score, 0 to 1 (default: %(default)s)",
    )
    how.add_argument("--decide", choices=DECISIONS, help="what ranks the candidates")
    how.add_argument("--nodata", metavar="V", type=number, help="pixel value without data")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from kglmatch.dense import check_dense

    if args.dense:
        check_dense(args.max_displacement, args.upright)
    options = {
        name: getattr(args, name)
        for name in (
            "detector", "max_keypoints", "top_k", "min_score", "max_displacement", "decide", "dense",
            "upright", "nodata",
        )
    }  # fmt: skip
    return run_pairs(args, "match", options)
