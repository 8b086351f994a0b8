"""Options and outputs that several commands share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kglmatch.options import BACKENDS, DEFAULT_MODEL, DTYPES

if TYPE_CHECKING:
    from kglmatch.features import Matches
    from kglmatch.matcher import Matcher
    from kglmatch.registration.displacement import LocalCorrection
    from kglmatch.registration.results import Registration

DEVICE_HELP = '"auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N" (default: auto)'

EXIT_FAILED = 1  # a verdict, not a mistake: these images do not fit


def say(text: str) -> None:
    """Prints a message on stderr; results alone go to stdout."""
    print(text, file=sys.stderr)


def say_alone(names: Sequence[str]) -> None:
    """Says which files of two folders were left out, if any."""
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        say(f"left out, without a partner of that name in the other folder: {names[0]}{others}")


def print_json(value: Any) -> None:
    """Prints one JSON object on stdout. NaN and infinity, which JSON lacks, are a `ValueError`."""
    print(json.dumps(value, allow_nan=False))


# --- types for argparse: what they raise becomes one line and exit code 2 -------------------------


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def non_negative_float(text: str) -> float:
    """A finite number of at least 0."""
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def seed(text: str) -> int:
    """What `numpy.random.RandomState` takes."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 4294967295, got {text!r}")
    return int(text)


def fraction(text: str) -> float:
    """A number within [0, 1]."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number within [0, 1], got {text!r}")
    return value


def number(text: str) -> float:
    """A finite number."""
    value = _number(text)
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


# --- options --------------------------------------------------------------------------------------


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --device, --dtype and --batch-size, which `load_matcher` reads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="M",
        default=DEFAULT_MODEL,
        help="a bundled model (kglmatch info lists them), a model folder, or owner/name on the Hub "
        "(default: %(default)s)",
    )
    add_device_options(group)


def add_backend_option(parser: argparse.ArgumentParser) -> None:
    """Adds --backend, which `load_matcher` reads."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help="what runs the network: PyTorch, or onnxruntime with the model's graphs, which are made once "
        "where there are none; --model may name a folder that kglmatch export wrote (default: %(default)s)",
    )


def add_device_options(parser: argparse._ActionsContainer) -> None:
    """Adds --device, --dtype and --batch-size."""
    parser.add_argument("--device", metavar="D", default="auto", help=DEVICE_HELP)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="precision (default: float16 on CUDA, float32 on the CPU)"
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=positive_int,
        help="patches that go through the network at once (default: what suits the device)",
    )


def add_json_option(parser: argparse._ActionsContainer) -> None:
    """Adds --json: one JSON object on stdout, and nothing else there."""
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def output_path(text: str) -> Path:
    """The name of a file to write; an empty one is a mistake."""
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a file, got an empty one")
    return Path(text)


# --- the model ------------------------------------------------------------------------------------


def load_matcher(args: argparse.Namespace) -> Matcher:
    """The `Matcher` that the model options ask for; it draws progress bars on a terminal.

    Raises:
        WeightsError, ConfigError, BackendError: as `Matcher.from_pretrained`.
    """
    from kglmatch.matcher import Matcher

    matcher = Matcher.from_pretrained(
        args.model,
        backend=getattr(args, "backend", BACKENDS[0]),
        device=args.device,
        dtype=args.dtype,
        batch_size=args.batch_size,
    )
    matcher.backend.progress = True
    return matcher


# --- files ----------------------------------------------------------------------------------------


def check_outputs(outputs: Mapping[str, Path | None], inputs: Iterable[Path] = ()) -> None:
    """Checks before the work that every output can be written.

    Args:
        outputs: option -> the file that it names, or None where it was not given.
        inputs: files that are read, which no output may replace.

    Raises:
        OutputError: two outputs of one name, an output that is an input, or one that cannot be written.
    """
    from kglmatch.errors import OutputError
    from kglmatch.files import check_output

    taken = {path.resolve(): "an input" for path in inputs}
    for option, path in outputs.items():
        if path is None:
            continue
        if path.resolve() in taken:
            raise OutputError(f"cannot write {option} {path}: it is also {taken[path.resolve()]}")
        taken[path.resolve()] = f"the file of {option}"
        check_output(path)


# --- registrations --------------------------------------------------------------------------------


def as_matches(found: Registration) -> Matches:
    """The places of a registration as `Matches`, for drawing; they have no descriptor distance."""
    import numpy as np

    from kglmatch.features import Matches

    count = len(found.keypoints_vis)
    rows = np.arange(count, dtype=np.int64)
    return Matches(
        np.stack([rows, rows], axis=1),
        found.scores,
        np.full(count, np.nan, np.float32),
        found.keypoints_vis,
        found.keypoints_ir,
        found.transform,
        found.inliers,
    )


def registration_summary(found: Registration) -> str:
    """What was found, in one line."""
    from kglmatch.registration.results import OURS

    verdict = f"{found.verdict}, confidence {found.confidence:.2f}"
    if found.transform is None:
        return verdict
    inliers = int(found.inliers.sum())
    agreed = f"{inliers} of {len(found.inliers)} places agree"
    residual = f", median residual {found.median_residual:.2f} px" if inliers else ""
    by = "" if found.proposer == OURS else f", proposed by {found.proposer}"
    return f"{verdict}: {found.kind}, {agreed}{residual}{by}"


def local_effect(correction: LocalCorrection) -> str:
    """What became of the local correction, in one line."""
    if correction.field is None:
        return f"local correction refused, the global transform is used: {correction.reason}"
    return (
        f"local correction: up to {correction.field.largest():.2f} px, {len(correction.points)} windows; "
        f"correlation {correction.gain:+.3f} on held-out windows "
        f"({correction.significance:.1f} standard errors)"
    )
