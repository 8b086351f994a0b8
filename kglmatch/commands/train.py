"""`kglmatch train`: trains a network; a killed run resumes where it stopped."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from kglmatch.commands.common import (
    DEVICE_HELP,
    add_json_option,
    output_path,
    positive_float,
    positive_int,
    print_json,
    seed,
)

DESCRIPTION = """Trains a network on registered image pairs, of one data set or several. The last images of
each are held out: they choose the model that is kept, in FOLDER/model, and its fusion, default
decision and calibration are fitted on them. FOLDER/log.jsonl has losses, pace and validation.
Given a FOLDER that holds an unfinished run of the same settings, the command resumes it.
"""

EPILOG = """examples:
  kglmatch train examples/training/vis-nir.toml --data vis-nir/country -o runs/nir --time-budget 20
  kglmatch train examples/training/vis-nir-cpu.toml --data vis-nir/country -o runs/nir
  kglmatch train examples/training/vis-nir-cpu.toml --data vis-nir/country -o runs/nir-decay \\
      --decay-from runs/nir --steps 500
  torchrun --nproc-per-node 4 -m kglmatch train examples/training/vis-nir.toml \\
      --data vis-nir/country -o runs/nir

Every key of the configuration is described in kglmatch.training.TrainingConfig.
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "train",
        help="train a network, or resume a run that was stopped",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="settings of the run: .toml")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FOLDER",
        type=output_path,
        required=True,
        help="the run's folder; made if missing",
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="one data set in place of the configuration's, also where that lists several",
    )
    parser.add_argument("--seed", metavar="S", type=seed, help="takes the place of the configuration's seed")
    parser.add_argument("--steps", metavar="N", type=positive_int, help="length of the run, in batches")
    parser.add_argument(
        "--time-budget",
        metavar="MINUTES",
        type=positive_float,
        help="set the length by what fits into this time, once; a run that is resumed keeps its length",
    )
    parser.add_argument(
        "--decay-from",
        metavar="FOLDER",
        type=Path,
        help="start from the state of another run and let the rate fall to zero over --steps",
    )
    parser.add_argument("--device", metavar="D", default="auto", help=DEVICE_HELP)
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    from kglmatch.training.config import TrainingConfig

    given = {"data": args.data, "seed": args.seed, "steps": args.steps}
    config = TrainingConfig.from_toml(args.config, **{k: v for k, v in given.items() if v is not None})

    from kglmatch.training.parallel import leave_processes
    from kglmatch.training.trainer import Trainer

    log = logging.getLogger("kglmatch.training")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm([log]):
            trainer = Trainer(config, args.output, device=args.device, decay_from=args.decay_from)
            best = trainer.train(time_budget=args.time_budget)
    finally:
        log.removeHandler(handler)
        leave_processes()
    if not trainer.processes.is_first:
        return 0
    if args.json:
        print_json({**best, "decide": trainer.decide})
    else:
        print(
            f"{args.output / 'model'}: step {best['step']:.0f}, FPR95 on the images held out: "
            f"descriptor {best['descriptor_fpr95']:.2f} %, metric head {best['metric_fpr95']:.2f} %, "
            f"fused {best['fused_fpr95']:.2f} %; decides by {trainer.decide}"
        )
    return 0
