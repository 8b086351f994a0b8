"""`kglmatch eval`: what a model reaches on labelled data, beside its peers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kglmatch.commands.common import (
    add_json_option,
    add_model_options,
    check_outputs,
    load_matcher,
    output_path,
    positive_int,
    print_json,
    say,
    seed,
)
from kglmatch.errors import KGLMatchError, OutputError

# As in `kglmatch.evaluation.baselines`, which is too heavy to import for --help.
PATCH_PEERS = ("sift", "gradient", "xfeat", "ncc", "nmi")
REGISTRATION_PEERS = ("sift", "orb", "xfeat")

DESCRIPTION = """Measures a model on patch pairs: false positives at 95 % recall (FPR95), ROC-AUC and average
precision of descriptor and metric head. With --registration: how many image pairs are registered
within 1, 3 and 5 pixels.
"""

EPILOG = """data: one or several of
  a folder of registered image pairs: NAME_rgb.* and NAME_nir.* (NAME_nir.npy: the 2 x 3 affine from visible
    to NIR pixels), or two folders of equally named files (visible/infrared, optical/sar, vis/ir, ...)
  a folder of such folders: one subset each
  patch files: NAME_sos.npy with NAME_info.txt, a VIS-NIR list .csv, .npz with vis, ir and labels

examples:
  kglmatch eval vis-nir/field vis-nir/water --max-pairs 1000 --plot roc.png
  kglmatch eval vis-nir/field --peers sift,gradient,ncc,nmi
  kglmatch eval vis-nir/field --registration
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "eval",
        help="measure a model on labelled patches or known registrations, beside its peers",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="DATA", type=Path, nargs="+", help="folders or files, see below")
    parser.add_argument(
        "--max-pairs",
        metavar="N",
        type=positive_int,
        help="at most N matching and N other pairs a subset, drawn at random (default: all)",
    )
    parser.add_argument("--seed", metavar="S", type=seed, default=0, help="of the draw (default: 0)")
    parser.add_argument(
        "--registration",
        action="store_true",
        help="register the image pairs instead of telling patches apart",
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        type=positive_int,
        help="with --registration: N image pairs in all, from the subsets in turn (default: all)",
    )
    parser.add_argument(
        "--peers",
        metavar="NAMES",
        type=_peers,
        help=f"measured beside the model, with commas between: {', '.join(PATCH_PEERS)} (default: sift); "
        f'with --registration {", ".join(REGISTRATION_PEERS)} (default: sift,orb); "none" for none',
    )
    outputs = parser.add_argument_group("outputs")
    outputs.add_argument("--save", metavar="FILE", type=output_path, help="write the whole report: .json")
    outputs.add_argument("--plot", metavar="PICTURE", type=output_path, help="draw the ROC curves")
    add_json_option(outputs)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    _check(args)
    from kglmatch.datasets import find_patch_sources
    from kglmatch.evaluation.baselines import check_peers
    from kglmatch.evaluation.patches import PatchReport, evaluate_patches
    from kglmatch.evaluation.registration import RegistrationReport, evaluate_registration

    # Mistakes are told before the model is loaded, and before hours of work.
    known = REGISTRATION_PEERS if args.registration else PATCH_PEERS
    if args.peers is not None:
        check_peers(args.peers, known)
    find_patch_sources(args.data)
    check_outputs({"--save": args.save, "--plot": args.plot}, args.data)
    matcher = load_matcher(args)
    matcher.backend.progress = False  # the bars over subsets and pairs say more
    chosen = {} if args.peers is None else {"peers": args.peers}
    report: PatchReport | RegistrationReport
    if args.registration:
        report = evaluate_registration(matcher, args.data, limit=args.limit, progress=True, **chosen)
    else:
        report = evaluate_patches(
            matcher, args.data, max_pairs=args.max_pairs, seed=args.seed, progress=True, **chosen
        )
    _write(args, report, matcher.device)
    return 0


def _write(args: argparse.Namespace, report: Any, device: str) -> None:
    from kglmatch import __version__
    from kglmatch.files import atomic_output

    result = {
        "kglmatch": __version__,
        "model": args.model,
        "device": device,
        "data": [str(path) for path in args.data],
        **report.to_dict(),
    }
    if args.save is not None:
        with atomic_output(args.save) as temporary:
            temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        say(f"wrote {args.save}")
    if args.plot is not None:
        from kglmatch.evaluation.roc_plot import save_roc

        save_roc(args.plot, report)
        say(f"wrote {args.plot}")
    if args.json:
        print_json(result)
    else:
        print(report.table())
        print(f"\n{args.model} on {device}, {report.seconds:.0f} s")


def _check(args: argparse.Namespace) -> None:
    if args.registration:
        for option, value in (("--max-pairs", args.max_pairs), ("--plot", args.plot)):
            if value is not None:
                raise KGLMatchError(f"{option} is about patches and does not go with --registration")
    elif args.limit is not None:
        raise KGLMatchError("--limit needs --registration; --max-pairs limits the patch pairs")
    if args.save is not None and args.save.suffix.lower() != ".json":
        raise OutputError(f"cannot write the report to {args.save}: the name must end in .json")
    if args.plot is not None:
        from kglmatch.images import check_image_name

        check_image_name(args.plot)


def _peers(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(name.strip() for name in text.split(","))
