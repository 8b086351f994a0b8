"""`kglmatch info`: which models there are, and what one is made of."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from kglmatch.commands.common import add_json_option, print_json, say
from kglmatch.options import DEFAULT_MODEL

if TYPE_CHECKING:
    from kglmatch.models.config import KGLNetConfig


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "info",
        help="list the bundled models, or describe one",
        description="Without MODEL, lists the models that come with the package. With one, reads its "
        "files, checks that they fit, and prints what it is. With --benchmark, measures.",
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="a bundled model, a model folder, or owner/name on the Hub"
    )
    parser.add_argument(
        "--benchmark",
        action="store_true",
        help="which of PyTorch, onnxruntime and onnxruntime in int8 describes patches fastest on the CPU of "
        "this machine; takes some minutes",
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    if args.benchmark:
        _benchmark(args.model or DEFAULT_MODEL, args.json)
    elif args.model is None:
        _list(args.json)
    else:
        _describe(args.model, args.json)
    return 0


def _list(as_json: bool) -> None:
    from kglmatch.models.files import list_pretrained
    from kglmatch.models.pretrained import load_config

    models = [{"name": name, "ir_kind": load_config(name).ir_kind} for name in list_pretrained()]
    if as_json:
        print_json({"models": models})
        return
    width = max((len(model["name"]) for model in models), default=0)
    for model in models:
        print(f"{model['name']:{width}}  visible and {model['ir_kind']}")
    if not models:
        say("no models are bundled with this installation; give a model folder instead")


def _describe(name: str, as_json: bool) -> None:
    from kglmatch.models.cost import cost
    from kglmatch.models.pretrained import load_files, resolve

    files = resolve(name)
    state, config = load_files(files)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    parameters = sum(tensor.numel() for key, tensor in state.items() if not key.endswith(buffers))
    macs = cost(config)
    weights = files.weights.read_bytes()
    description: dict[str, Any] = {
        "name": files.name,
        "source": files.source,
        "repo_id": files.repo_id,
        "commit": files.commit,
        "config_file": str(files.config),
        "weights_file": str(files.weights),
        "weights_bytes": len(weights),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "parameters": parameters,
        "multiply_adds": dataclasses.asdict(macs),
        "config": dataclasses.asdict(config),
    }
    if as_json:
        print_json(description)
        return
    rows = [
        ("name", files.name),
        ("source", files.origin),
        ("config", str(files.config)),
        ("weights", str(files.weights)),
        ("size", f"{len(weights) / 1e6:.1f} MB"),
        ("sha256", description["weights_sha256"]),
        ("parameters", f"{parameters:,}"),
        ("metric head", f"reads {_maps(config)}"),
        (
            "multiply-adds",
            f"{_millions(macs.descriptor)} for a patch's descriptor, "
            f"{_millions(macs.descriptor_and_map)} with its metric map; "
            f"{_millions(macs.score)} to score a pair",
        ),
        *((key, str(value)) for key, value in description["config"].items()),
    ]
    width = max(len(key) for key, _ in rows)
    print("\n".join(f"{key:{width}}  {value}" for key, value in rows))


def _benchmark(name: str, as_json: bool) -> None:
    from kglmatch.evaluation.speed import compare_backends, has_vnni

    say("exporting the graphs, then measuring; this takes some minutes")
    speeds = compare_backends(name)
    vnni = has_vnni()
    if as_json:
        print_json({"model": name, "vnni": vnni, "backends": [dataclasses.asdict(each) for each in speeds]})
        return
    for each in speeds:
        print(
            f"{each.backend} {each.dtype:8}{each.patches_per_second:8.1f} patches per second, "
            f"{each.ratio:.2f} times torch float32"
        )
    print(f"fastest on this machine: {speeds[0].backend} {speeds[0].dtype}")
    if vnni is not None:
        print(f"the processor has {'VNNI' if vnni else 'no VNNI'}, which multiplies 8-bit numbers")


def _maps(config: KGLNetConfig) -> str:
    """Which maps the metric head reads."""
    if config.metric_trunk == "descriptor":
        return "the descriptor trunk's maps"
    if config.metric_siamese:
        return "the maps of a metric trunk that both sensors share"
    return "the maps of metric trunks of its own, one for each sensor"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} million"
