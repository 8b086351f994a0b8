"""`kglmatch verify`: the verdict on a transform, or on matches, from anywhere."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kglmatch.commands.common import (
    EXIT_FAILED,
    add_json_option,
    add_model_options,
    check_outputs,
    load_matcher,
    number,
    output_path,
    print_json,
    say,
)
from kglmatch.commands.common_rasters import load_grey, masked
from kglmatch.options import DEFAULT_KIND, KINDS, VERIFY_TOLERANCE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kglmatch.registration.given import Given
    from kglmatch.registration.results import Registration

EPILOG = """exit code: 0 if the verdict is registered (or doubtful, which is said), 1 if it is failed, 2 for a
mistake.

examples:
  kglmatch verify scene_vis.png scene_nir.tif --transform t.json
  kglmatch verify rgb.jpg thermal.tif --transform matches.csv --refine --save refined.json
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "verify",
        help="say whether a transform, or matches, from anywhere hold",
        description="Judges a transform from visible to IR pixels, or the one that most of the given matches "
        f"agree on, as it is: more than {VERIFY_TOLERANCE:g} pixels off, it is not registered.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("vis", metavar="VIS", type=Path, help="the visible image")
    parser.add_argument("ir", metavar="IR", type=Path, help="the image of the other sensor")
    parser.add_argument(
        "--transform",
        metavar="FILE",
        type=Path,
        required=True,
        help="what register writes (--save .json; --yml; --gcp .points, .txt or .gcp), matches (.csv, .npz "
        "or .json of match --save; a table of x_vis, y_vis, x_ir, y_ir), or an array (.npy)",
    )
    parser.add_argument(
        "--band", metavar="NAME", help="which transform, where a .json holds those of several bands"
    )
    outputs = parser.add_argument_group("outputs", "all are written together, or none")
    pictures = (
        ("--overlay", "draw both images in one, red and cyan"),
        ("--checkerboard", "draw both images in alternate squares"),
    )
    for option, text in pictures:
        outputs.add_argument(option, metavar="PICTURE", type=output_path, help=text)
    outputs.add_argument(
        "--yml", metavar="FILE", type=output_path, help="write the transform for cv2.FileStorage: .yml, .yaml"
    )
    outputs.add_argument(
        "--save", metavar="FILE", type=output_path, help="write all that was found, failed or not: .json"
    )
    outputs.add_argument(
        "--nodata",
        metavar="V",
        type=number,
        help="pixel value without data, which does not count (default: what the file says)",
    )
    add_json_option(outputs)
    how = parser.add_argument_group("verification")
    how.add_argument(
        "--refine",
        action="store_true",
        help="refine the transform to a fraction of a pixel first, and judge that",
    )
    how.add_argument(
        "--kind",
        choices=KINDS,
        default=DEFAULT_KIND,
        help="of transform that is fitted to matches, or refined (default: %(default)s)",
    )
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    # Mistakes are reported before the model is loaded.
    _check_names(args)
    from kglmatch.registration.given import check_sizes
    from kglmatch.registration.proposals import read_proposal

    (vis, valid_vis), (ir, valid_ir) = (load_grey(path, nodata=args.nodata) for path in (args.vis, args.ir))
    images = [vis, ir]
    given = _read(args)
    vis_size, ir_size = ((image.shape[1], image.shape[0]) for image in images)
    check_sizes(given, str(args.transform), vis_size, ir_size)
    read_proposal(given.value, str(args.transform))
    outputs = {f"--{name}": getattr(args, name) for name in ("overlay", "checkerboard", "yml", "save")}
    check_outputs(outputs, (args.vis, args.ir, args.transform))
    matcher = load_matcher(args)
    from kglmatch.patch_matcher import check_image_size

    for path, image in zip((args.vis, args.ir), images, strict=True):
        check_image_size(image, matcher.config.patch_size, str(path))
    pair = masked(vis, valid_vis), masked(ir, valid_ir)
    began = time.perf_counter()
    found = matcher.verify(*pair, given.value, kind=args.kind, refine=args.refine)
    seconds = time.perf_counter() - began
    written = _write(args, images, found)
    if args.json:
        facts = {
            "vis": str(args.vis),
            "ir": str(args.ir),
            "given": str(args.transform),
            "refined": args.refine,
            "model": args.model,
            "device": matcher.device,
        }
        timing = {"seconds": round(seconds, 3), "written": [str(path) for path in written]}
        print_json({**facts, **found.to_dict(), **timing})
    else:
        print(f"{_summary(found)} ({seconds:.1f} s on {matcher.device})")
        for path in written:
            print(f"wrote {path}")
    if found.verdict == "failed":
        say(f"{args.transform}: does not register {args.ir} to {args.vis}")
        return EXIT_FAILED
    if found.verdict == "doubtful":
        say(f"{args.transform}: doubtful; look at it before you use it (--overlay, --checkerboard)")
    return 0


def _check_names(args: argparse.Namespace) -> None:
    from kglmatch.images import check_image_name
    from kglmatch.registration.files import JSON, YML, check_ending

    for picture in (args.overlay, args.checkerboard):
        if picture is not None:
            check_image_name(picture)
    for path, endings, what in ((args.yml, YML, "OpenCV's yml"), (args.save, JSON, "the registration")):
        if path is not None:
            check_ending(path, endings, what)


def _read(args: argparse.Namespace) -> Given:
    """The transform or matches of the file that was given."""
    from kglmatch.errors import DataError
    from kglmatch.registration.files import CONTROL_POINTS, JSON, NO_MAP, read_map_frame
    from kglmatch.registration.given import read_given

    ending = args.transform.suffix.lower()
    if ending in JSON:
        return _read_json(args.transform, args.band)
    if args.band is not None:
        raise DataError(f"{args.transform} holds a single transform, and no band {args.band!r}")
    return read_given(args.transform, read_map_frame(args.vis) if ending in CONTROL_POINTS else NO_MAP)


def _read_json(path: Path, band: str | None) -> Given:
    """A saved registration, or saved matches."""
    import numpy as np

    from kglmatch.batch.rig_results import read_json
    from kglmatch.batch.transforms import read_saved_transform
    from kglmatch.errors import DataError
    from kglmatch.features import Matches
    from kglmatch.registration.given import Given

    value = read_json(str(path))
    if isinstance(value, dict) and "indices" in value:
        matches = Matches.load(path)
        if matches.keypoints_vis is None or matches.keypoints_ir is None:
            raise DataError(f"{path} holds matches without keypoints")
        return Given(np.concatenate([matches.keypoints_vis, matches.keypoints_ir], axis=1).astype(np.float64))
    saved = read_saved_transform(path, band)
    return Given(saved.transform, saved.vis_size, saved.ir_size)


def _write(args: argparse.Namespace, images: list[NDArray[np.float32]], found: Registration) -> list[Path]:
    """Writes what was asked for and can be, all of it or nothing; the files."""
    from kglmatch.files import atomic_outputs
    from kglmatch.images import save_image
    from kglmatch.registration.files import registration_to_dict, save_json, save_yml
    from kglmatch.visualize import draw_checkerboard, draw_overlay

    vis, ir = images
    writers: list[tuple[Path | None, Callable[[Path], None]]] = []
    if found.transform is not None:
        transform = found.transform
        writers = [
            (args.overlay, lambda path: save_image(path, draw_overlay(vis, ir, transform))),
            (args.checkerboard, lambda path: save_image(path, draw_checkerboard(vis, ir, transform))),
            (args.yml, lambda path: save_yml(path, found)),
        ]
    writers.append((args.save, lambda path: save_json(path, registration_to_dict(found))))
    written = []
    with atomic_outputs():
        for path, write in writers:
            if path is not None:
                write(path)
                written.append(path)
    return written


def _summary(found: Registration) -> str:
    import numpy as np

    text = f"{found.verdict}, confidence {found.confidence:.2f}"
    if not len(found.residuals):
        return f"{text}: nothing to compare"
    return f"{text}: median distance to where the places were found {np.median(found.residuals):.2f} px"
