"""`kglmatch convert`: a published checkpoint pair -> a model folder."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from kglmatch.commands.common import output_path
from kglmatch.models.config import IR_KINDS, KGLNetConfig


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "convert",
        help="convert a published checkpoint pair to a model folder",
        description="Converts the two files of a published KGL-Net checkpoint (.pth, or the same names in "
        ".safetensors) to a folder that --model takes. Pickles are read without running code in them.",
    )
    parser.add_argument("net", metavar="NET", type=Path, help="the network's file")
    parser.add_argument("metric", metavar="METRIC", type=Path, help="the metric head's file")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FOLDER",
        type=output_path,
        required=True,
        help="the folder to make; an existing one must be empty",
    )
    parser.add_argument("--name", metavar="NAME", help="title of the model card (default: the folder's name)")
    parser.add_argument(
        "--ir-kind",
        choices=IR_KINDS,
        default=IR_KINDS[0],
        help="what the second sensor was in training (default: %(default)s)",
    )
    parser.add_argument(
        "--float32",
        action="store_true",
        help="keep full precision; else float16 is stored, half the size",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from kglmatch.files import atomic_folder
    from kglmatch.models.card import ModelCard
    from kglmatch.models.convert import convert_published
    from kglmatch.models.pretrained import check_fit, save_card, save_model

    config = KGLNetConfig(ir_kind=args.ir_kind)
    with atomic_folder(args.output) as temporary:
        state = convert_published(args.net, args.metric)
        check_fit(state, config, f"{args.net} with {args.metric}")
        save_model(temporary, state, config, half=not args.float32)
        origin = " and ".join(
            f"`{path.name}` (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()})"
            for path in (args.net, args.metric)
        )
        precision = "float32" if args.float32 else "float16"
        card = ModelCard(
            args.name or args.output.resolve().name,
            load=str(args.output),
            notes=f"Converted by `kglmatch convert` from {origin}; stored as {precision}.",
        )
        save_card(temporary, config, card, load=str(args.output))
    print(f"wrote {args.output} (see: kglmatch info {args.output})")
    return 0
