"""`kglmatch info`: which models there are, and what one is made of."""

from __future__ import annotations

import argparse
from typing import Any

from kglmatch.commands.common import add_json_option, print_json


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser("info", help="list the bundled models, or describe one")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a bundled model's name or a model folder")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from kglmatch.pretrained import list_pretrained

    if args.json:
        print_json({"models": list_pretrained()})
    else:
        print("\n".join(list_pretrained()))
    return 0
