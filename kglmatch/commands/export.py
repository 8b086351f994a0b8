"""`kglmatch export`: a model -> ONNX graphs."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kglmatch.commands.common import add_json_option, output_path, positive_int, print_json, say
from kglmatch.options import DEFAULT_MODEL

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
        "differ by more than 1e-4 (--half: 5e-3), nothing is written.",
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


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from kglmatch.matcher import Matcher

    matcher = Matcher.from_pretrained(args.model, device="cpu", dtype="float32")
    folder = args.output or _default_folder(matcher.source)
    say(f"exporting {args.model} to {folder}; this takes about a minute")
    report = matcher.export_onnx(folder, half=args.half, batch=args.batch, opset=args.opset)
    if args.json:
        print_json({**dataclasses.asdict(report), "folder": str(report.folder)})
        return 0
    for graph in report.graphs:
        error = max(case.max_error for case in report.parity if case.file == graph.file)
        print(f"{graph.file}\t{graph.size / 1e6:.1f} MB\t{graph.nodes} nodes\tlargest difference {error:.1e}")
    say(f"wrote {report.folder}; load it by Matcher.from_onnx({str(report.folder)!r})")
    return 0
