"""`kglmatch score-many`: shards of patch pairs, into a folder that can be resumed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kglmatch.commands.common import add_model_options
from kglmatch.commands.common_many import (
    EXIT_CODES,
    add_job_options,
    model_of,
    ray_options,
    say_plan,
    say_report,
)

EPILOG = f"""{EXIT_CODES}

examples:
  kglmatch score-many pairs-*.parquet -o scored
  kglmatch score-many shards/ -o scored --engine ray
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "score-many",
        help="score millions of patch pairs; resumes after any kill",
        description="Scores patch pairs in shards: .parquet with columns vis and ir (image files, or "
        "the bytes of 8-bit pixels), .npz with arrays vis and ir (N, 64, 64), or WebDataset .tar with "
        "KEY.vis.png and KEY.ir.png. OUTPUT/results.parquet gets a row a pair. Memory does not grow with "
        "their number.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "shards", metavar="SHARD", type=Path, nargs="+", help="files, or folders of files; in this order"
    )
    add_job_options(parser, workers=False)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from kglmatch.batch import run_score
    from kglmatch.batch.score_job import pending_scores

    model = model_of(args)
    if args.dry_run:
        return say_plan(args, *pending_scores(args.shards, args.output, model), "pairs")
    report = run_score(
        args.shards, args.output, model=model, engine=args.engine, ray=ray_options(args), progress=True
    )
    return say_report(args, report)
