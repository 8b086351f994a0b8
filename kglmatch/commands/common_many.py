"""Options and outputs that the commands for many pairs share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kglmatch.commands.common import (
    EXIT_FAILED,
    add_json_option,
    non_negative_float,
    positive_int,
    print_json,
    say,
    say_alone,
)

if TYPE_CHECKING:
    from kglmatch.batch import JobReport, Model, PairList, RayOptions

ENGINES = ("local", "ray")

EXIT_CODES = """exit code: 0 if all pairs were answered, 1 if some ended in an error, 2 for a mistake or a
full disk, 130 after Ctrl-C. Stopped or killed, the same command resumes; pairs that ended in an error are
tried again."""


def add_pairs_options(parser: argparse.ArgumentParser) -> None:
    """Adds the pairs: two folders or a list."""
    parser.add_argument(
        "vis",
        metavar="VIS",
        type=Path,
        help="folder of visible images, or a list: .csv or .parquet with columns vis and ir, paths relative "
        "to the list, and name if wanted",
    )
    parser.add_argument(
        "ir",
        metavar="IR",
        type=Path,
        nargs="?",
        help="folder of images of the other sensor, paired by name: a.png with a.tif",
    )


def add_job_options(parser: argparse.ArgumentParser, *, workers: bool = True) -> None:
    """Adds --output, --dry-run, --json, and how the work is spread."""
    outputs = parser.add_argument_group("job")
    outputs.add_argument(
        "-o",
        "--output",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="new, empty, or that of the same job, which is then resumed; results.parquet is written there",
    )
    outputs.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    add_json_option(outputs)
    how = parser.add_argument_group("engine")
    if workers:
        how.add_argument(
            "--workers",
            metavar="N",
            type=_whole,
            help="processes that read images ahead (default: by the number of processors)",
        )
    how.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="ray: on a Ray cluster, all of whose machines reach the images and the output folder "
        "(default: %(default)s)",
    )
    how.add_argument(
        "--ray-address",
        metavar="A",
        help="the cluster (default: RAY_ADDRESS, the one that runs here, or a new one)",
    )
    how.add_argument(
        "--actors",
        metavar="N",
        type=positive_int,
        help="Ray: how many (default: one a GPU, or by processors)",
    )
    how.add_argument(
        "--actor-cpus",
        metavar="N",
        type=non_negative_float,
        help="Ray: processors of each actor (default: 1)",
    )
    how.add_argument(
        "--actor-gpus",
        metavar="N",
        type=non_negative_float,
        help="Ray: GPUs of each actor (default: 1 if any)",
    )


def _whole(text: str) -> int:
    return 0 if text == "0" else positive_int(text)


def read_pair_list(args: argparse.Namespace) -> PairList:
    """The pairs that were given. Raises `DataError` where they cannot be read."""
    from kglmatch.batch import pairs_of_folders, read_pairs
    from kglmatch.errors import DataError

    if args.ir is not None:
        pairs = pairs_of_folders(args.vis, args.ir)
        say_alone(pairs.alone)
        return pairs
    if args.vis.is_dir():
        raise DataError(f"{args.vis} alone holds no pairs: give a second folder, or a .csv or .parquet list")
    return read_pairs(args.vis)


def run_pairs(args: argparse.Namespace, command: str, options: dict[str, Any]) -> int:
    """Runs a job on the pairs, or says what it would do; the exit code.

    Args:
        args: of `add_pairs_options`, `add_job_options` and `add_model_options`, and `save`.
        command: "match" or "register".
        options: of `Matcher.match_many` or `register_many`.
    """
    from kglmatch.batch import run_match, run_register
    from kglmatch.batch.image_jobs import pending_pairs

    save = None if args.save is None else f".{args.save}"
    pairs, model = read_pair_list(args), model_of(args)
    if args.dry_run:
        pending = pending_pairs(command, model, save, pairs, args.output, options)
        return say_plan(args, len(pairs), pending, "pairs")
    report = (run_match if command == "match" else run_register)(
        pairs,
        args.output,
        model=model,
        save=save,
        workers=args.workers,
        engine=args.engine,
        ray=ray_options(args),
        progress=True,
        **options,
    )
    return say_report(args, report)


def model_of(args: argparse.Namespace) -> Model:
    """What the model options ask for."""
    from kglmatch.batch import Model

    return Model(args.model, args.device, args.dtype, args.batch_size)


def ray_options(args: argparse.Namespace) -> RayOptions:
    """What the engine options ask for."""
    from kglmatch.batch import RayOptions

    return RayOptions(args.ray_address, args.actors, args.actor_cpus, args.actor_gpus)


def say_plan(args: argparse.Namespace, total: int | None, pending: int | None, what: str) -> int:
    """Prints what a run would do; the exit code."""
    if args.json:
        print_json({"output": str(args.output), "total": total, "pending": pending, "dry_run": True})
    else:
        counted = f"{pending} of {total} {what}" if total is not None else f"{pending} {what}"
        print(f"would work on {counted} into {args.output}")
    return 0


def say_report(args: argparse.Namespace, report: JobReport) -> int:
    """Prints what a job came to; the exit code."""
    facts: dict[str, Any] = {
        "output": str(args.output),
        "results": str(args.output / "results.parquet"),
        "total": report.total,
        "done_before": report.done_before,
        "answered": report.answered,
        "errors": report.errors,
        "first_error": report.first_error,
        "seconds": round(report.seconds, 3),
    }
    if args.json:
        print_json(facts)
    else:
        total = "" if report.total is None else f" of {report.total}"
        before = f", {report.done_before} of them by earlier runs" if report.done_before else ""
        print(f"{report.answered}{total} pairs answered{before} ({report.seconds:.1f} s)")
        print(f"wrote {args.output / 'results.parquet'}")
    if report.errors:
        more = f" and {report.errors - 1} more" if report.errors > 1 else ""
        say(f"no answer for {report.first_error}{more}; column error says why")
    return 0 if report.complete else EXIT_FAILED
