"""`kglmatch eval`: what a model reaches on labelled data, alongside baselines."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kglmatch.commands.common import (
    add_backend_option,
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
from kglmatch.options import (
    DEFAULT_NEGATIVES,
    DEFAULT_PATCH_BASELINES,
    DEFAULT_REGISTRATION_BASELINES,
    PATCH_BASELINES,
    REGISTRATION_BASELINES,
)

if TYPE_CHECKING:
    from kglmatch.datasets import PatchSource
    from kglmatch.evaluation.patches import PatchReport
    from kglmatch.evaluation.registration import RegistrationReport
    from kglmatch.matcher import Matcher

DESCRIPTION = """Measures a model on patch pairs: false positives at 95 and 80 % recall with intervals over
images, ROC-AUC and average precision of descriptor, metric head and both fused. With --registration or
--homography: how many image pairs are registered within 1, 3, 5 and 10 pixels.
"""

EPILOG = """data: one or several of
  a folder of registered image pairs: NAME_rgb.* and NAME_nir.* (NAME_nir.npy: the 2 x 3 affine from visible
    to NIR pixels), or two folders of equally named files (visible/infrared, optical/sar, vis/ir, ...)
  a folder of such folders: one subset each
  patch files: NAME_sos.npy with NAME_info.txt, a VIS-NIR list .csv, .npz with vis, ir and labels

examples:
  kglmatch eval vis-nir/field vis-nir/water --max-pairs 1000 --plot roc.png
  kglmatch eval vis-nir/field --baselines sift,gradient,ncc,nmi
  kglmatch eval vis-nir/field --registration
  kglmatch eval my-validation --model my-model --fit-fusion
"""

# Options that are of no meaning in some modes.
_OF_PATCHES = ["max_pairs", "negatives"]
_OF_IMAGES = ["limit"]
_OF_REPORTS = ["baselines", "exclude", "plot"]


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "eval",
        help="measure a model on labelled patches or known registrations, alongside baselines",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="DATA", type=Path, nargs="+", help="folders or files, see below")
    what = parser.add_argument_group("what is measured (default: patch pairs)").add_mutually_exclusive_group()
    what.add_argument(
        "--registration", action="store_true", help="the transforms and verdicts of Matcher.register"
    )
    what.add_argument("--homography", action="store_true", help="the homographies of Matcher.match_images")
    what.add_argument(
        "--fit-fusion",
        action="store_true",
        help="write into the config.json of --model, a folder, how its two answers are fused and which "
        "decision has the fewest errors; DATA must be validation data, never test data",
    )
    how = parser.add_argument_group("data and baselines")
    how.add_argument(
        "--pairs",
        metavar="SLICE",
        type=_slice,
        help="image pairs of each subset in the order of their names, START:STOP:STEP as in Python: 2::3 "
        "takes the third, the sixth and so on, -20: the last twenty (default: all)",
    )
    how.add_argument(
        "--max-pairs",
        metavar="N",
        type=positive_int,
        help="N matching patch pairs a subset, drawn at random (default: all)",
    )
    how.add_argument(
        "--negatives",
        metavar="N",
        type=positive_int,
        help="non-matching patch pairs for each matching one, for finer figures "
        f"(default: {DEFAULT_NEGATIVES}, as in the protocol)",
    )
    how.add_argument("--seed", metavar="S", type=seed, default=0, help="of the draw (default: 0)")
    how.add_argument(
        "--limit",
        metavar="N",
        type=positive_int,
        help="with --registration or --homography: N image pairs in all, from the subsets in turn "
        "(default: all)",
    )
    how.add_argument(
        "--exclude",
        metavar="PAIRS",
        type=_names,
        help="image pairs, SUBSET/PAIR with commas between, without which the figures are given too",
    )
    how.add_argument(
        "--baselines",
        metavar="NAMES",
        type=_names,
        help=f"measured on the same data, with commas between: {', '.join(PATCH_BASELINES)} "
        f"(default: {','.join(DEFAULT_PATCH_BASELINES)}); of images {', '.join(REGISTRATION_BASELINES)} "
        f'(default: {",".join(DEFAULT_REGISTRATION_BASELINES)}); "none" for none',
    )
    outputs = parser.add_argument_group("outputs")
    outputs.add_argument("--save", metavar="FILE", type=output_path, help="write the whole report: .json")
    outputs.add_argument(
        "--plot",
        metavar="PICTURE",
        type=output_path,
        help="draw the ROC curves or the registration errors: .png, .jpg, .pdf or .svg; needs matplotlib",
    )
    add_json_option(outputs)
    add_model_options(parser)
    add_backend_option(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    _check_options(args)
    from kglmatch.datasets import find_patch_sources
    from kglmatch.evaluation.baselines import check_baselines
    from kglmatch.evaluation.excluded import excluded_of

    # Mistakes are reported before the model is loaded, and before hours of work.
    of_images = args.registration or args.homography
    if args.baselines is not None:
        check_baselines(args.baselines, REGISTRATION_BASELINES if of_images else PATCH_BASELINES)
    sources = find_patch_sources(args.data)
    if args.pairs is not None:
        sources = [source.take(args.pairs) for source in sources]
    excluded_of(sources, args.exclude or ())
    check_outputs({"--save": args.save, "--plot": args.plot}, args.data)
    if args.fit_fusion:
        return _fit_fusion(args, sources)
    matcher = _matcher(args)
    evaluate = _evaluate_images if of_images else _evaluate_patches
    report = evaluate(args, sources, matcher)
    _write(args, report.to_dict(), matcher.device)
    if args.plot is not None:
        from kglmatch.evaluation.plots import save_plot

        save_plot(args.plot, report)
        say(f"wrote {args.plot}")
    if not args.json:
        print(report.table())
        print(f"\n{args.model} on {matcher.device}, {report.seconds:.0f} s")
    return 0


def _matcher(args: argparse.Namespace) -> Matcher:
    matcher = load_matcher(args)
    matcher.backend.progress = False  # the bars over subsets and pairs say more
    return matcher


def _evaluate_patches(args: argparse.Namespace, sources: list[PatchSource], matcher: Matcher) -> PatchReport:
    from kglmatch.evaluation.patches import evaluate_patches

    return evaluate_patches(
        matcher,
        sources,
        max_pairs=args.max_pairs,
        negatives=args.negatives or DEFAULT_NEGATIVES,
        seed=args.seed,
        baselines=DEFAULT_PATCH_BASELINES if args.baselines is None else args.baselines,
        exclude=args.exclude or (),
        progress=True,
    )


def _evaluate_images(
    args: argparse.Namespace, sources: list[PatchSource], matcher: Matcher
) -> RegistrationReport:
    from kglmatch.evaluation.registration import evaluate_homography, evaluate_registration

    evaluate = evaluate_homography if args.homography else evaluate_registration
    return evaluate(
        matcher,
        sources,
        limit=args.limit,
        baselines=DEFAULT_REGISTRATION_BASELINES if args.baselines is None else args.baselines,
        exclude=args.exclude or (),
        progress=True,
    )


def _fit_fusion(args: argparse.Namespace, sources: list[PatchSource]) -> int:
    from kglmatch.evaluation.decision import check_model_folder, fit_decision, save_decision

    folder = check_model_folder(args.model)
    matcher = _matcher(args)
    decision = fit_decision(
        matcher,
        sources,
        max_pairs=args.max_pairs,
        negatives=args.negatives or DEFAULT_NEGATIVES,
        seed=args.seed,
        progress=True,
    )
    save_decision(folder, decision)
    _write(args, decision.to_dict(), matcher.device)
    if not args.json:
        figures = ", ".join(f"{name} {fpr:.2f}" for name, fpr in decision.fpr95_percent.items())
        print(f"{folder}: decides by {decision.decide}; FPR95 on these {decision.pairs} pairs, %: {figures}")
    return 0


def _write(args: argparse.Namespace, report: dict[str, Any], device: str) -> None:
    """Saves and prints the report as JSON, where that was asked for."""
    from kglmatch import __version__
    from kglmatch.files import atomic_output

    data = [str(path) for path in args.data]
    result = {"kglmatch": __version__, "model": args.model, "device": device, "data": data, **report}
    if args.save is not None:
        with atomic_output(args.save) as temporary:
            temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        say(f"wrote {args.save}")
    if args.json:
        print_json(result)


def _check_options(args: argparse.Namespace) -> None:
    if args.registration or args.homography:
        mode, others = "--registration" if args.registration else "--homography", _OF_PATCHES
    elif args.fit_fusion:
        mode, others = "--fit-fusion", _OF_REPORTS + _OF_IMAGES
    else:
        mode, others = "patch pairs: it needs --registration or --homography", _OF_IMAGES
    for name in others:
        if getattr(args, name) is not None:
            raise KGLMatchError(f"--{name.replace('_', '-')} does not go with {mode}")
    if args.save is not None and args.save.suffix.lower() != ".json":
        raise OutputError(f"cannot write the report to {args.save}: the name must end in .json")
    if args.plot is not None:
        from kglmatch.evaluation.plots import check_plot

        check_plot(args.plot)


def _slice(text: str) -> slice:
    try:
        parts = [int(part) if part.strip() else None for part in text.split(":")]
        if not 2 <= len(parts) <= 3 or parts[2:] == [0]:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected START:STOP:STEP, such as 2::3 or -20:, got {text!r}"
        ) from None
    return slice(*parts)


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(name.strip() for name in text.split(","))
