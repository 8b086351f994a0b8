"""`kglmatch export`: a model -> ONNX graphs."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kglmatch.commands.common import add_json_option, output_path, positive_int, print_json, say
from kglmatch.errors import KGLMatchError
from kglmatch.options import CALIBRATION_PAIRS, DEFAULT_MODEL

if TYPE_CHECKING:
    from kglmatch.models.files import ModelFiles


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "export",
        help="export a model to ONNX",
        description="Writes a model as ONNX graphs for onnxruntime, C++ or TensorRT: encoders, descriptors "
        "alone, metric head, and all in one file; with configuration, checksums and a model card that names "
        "inputs, shapes and preprocessing. The graphs are run and compared with PyTorch first; where they "
        "differ by more than 1e-4 (--half: 5e-3; --int8: 0.02 on average), nothing is written.",
    )
    parser.add_argument("--onnx", action="store_true", required=True, help="the format; there is no other")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FOLDER",
        type=output_path,
        help="the folder to make; an existing one must be empty (default: the model's name and -onnx)",
    )
    parser.add_argument(
        "--model",
        metavar="M",
        default=DEFAULT_MODEL,
        help="a bundled model, a model folder, or owner/name on the Hub (default: %(default)s)",
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="convolutions in float16, FRN statistics and pooling in float32; inputs, outputs are float32",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="convolutions in 8 bits, FRN and the rest in float32, with ranges from --calibrate",
    )
    parser.add_argument(
        "--calibrate",
        metavar="IMAGES",
        type=Path,
        nargs="+",
        help="with --int8: folders of registered image pairs, or patch files, as for kglmatch eval; images "
        f"like those to match, none of a test set ({CALIBRATION_PAIRS} patches of each sensor are drawn)",
    )
    parser.add_argument(
        "--batch", metavar="N", type=positive_int, help="fix the number of rows (default: any number)"
    )
    parser.add_argument("--opset", metavar="K", type=positive_int, help="18 to 23 (default: 23)")
    add_json_option(parser)


def _default_folder(source: ModelFiles | None) -> Path:
    """Named after the model, in the folder that the command runs in."""
    if source is None or source.source == "bundled":
        name = source.name if source else ""
    elif source.repo_id is not None:
        name = source.repo_id.rpartition("/")[2]
    else:
        name = source.config.parent.resolve().name
    return Path(f"{name.lstrip('.') or 'model'}-onnx")


def _calibration(folders: list[Path]) -> tuple[Any, Any]:
    """Matching patches of both sensors, the same number from each subset."""
    import numpy as np

    from kglmatch.datasets import find_patch_sources

    sources = find_patch_sources(folders)
    vis, ir = [], []
    for source in sources:
        pairs = source.load(max_pairs=-(-CALIBRATION_PAIRS // len(sources)))
        vis.append(pairs.vis[pairs.labels])
        ir.append(pairs.ir[pairs.labels])
    # Mixed, so that what is kept out to measure the error is of all subsets.
    order = np.random.default_rng(0).permutation(sum(map(len, vis)))[:CALIBRATION_PAIRS]
    return np.concatenate(vis)[order], np.concatenate(ir)[order]


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    if args.int8 != (args.calibrate is not None):
        raise KGLMatchError("--int8 and --calibrate IMAGES go together: it needs images like those to match")
    from kglmatch.matcher import Matcher

    calibrate = _calibration(args.calibrate) if args.int8 else None
    matcher = Matcher.from_pretrained(args.model, device="cpu", dtype="float32")
    folder = args.output or _default_folder(matcher.source)
    say(f"exporting {args.model} to {folder}; this takes about a minute{', int8 two' if args.int8 else ''}")
    report = matcher.export_onnx(
        folder, half=args.half, calibrate=calibrate, batch=args.batch, opset=args.opset
    )
    if args.json:
        print_json({**dataclasses.asdict(report), "folder": str(report.folder)})
        return 0
    for graph in report.graphs:
        errors = [case for case in report.parity if case.file == graph.file]
        largest, mean = max(case.max_error for case in errors), max(case.mean_error for case in errors)
        difference = f"mean difference {mean:.1e}" if args.int8 else f"largest difference {largest:.1e}"
        print(f"{graph.file}\t{graph.size / 1e6:.1f} MB\t{graph.nodes} nodes\t{difference}")
    say(f"wrote {report.folder}; load it by Matcher.from_onnx({str(report.folder)!r})")
    return 0
