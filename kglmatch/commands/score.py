"""`kglmatch score`: how likely pairs of patches show the same place."""

from __future__ import annotations

import argparse
import csv
import io
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
    print_json,
    say,
    say_alone,
)
from kglmatch.errors import DataError, OutputError, PatchError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kglmatch.matcher import Matcher

FORMATS = (".csv", ".json", ".npz")
# Pairs whose metric maps (64 KiB a patch) are held at once.
CHUNK = 1024


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "score",
        help="score pairs of patches, from 0 (different) to 1 (the same place)",
        description="Scores pairs of patches by the metric head: two image files, two folders whose files "
        "are paired by name (a.png with a.png or a.tif), or one .npz with arrays vis and ir of shape "
        "(N, 64, 64), uint8 or floats in [0, 1]. Prints NAME<TAB>SCORE, a pair a line.",
    )
    parser.add_argument(
        "vis", metavar="VIS_PATCH", type=Path, help="the visible patch, a folder of them, or one .npz"
    )
    parser.add_argument(
        "ir", metavar="IR_PATCH", type=Path, nargs="?", help="the patch of the other sensor, or a folder"
    )
    parser.add_argument(
        "--save", metavar="FILE", type=output_path, help="write names and scores: .csv, .json or .npz"
    )
    add_json_option(parser)
    add_model_options(parser)
    add_backend_option(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    if args.save is not None and args.save.suffix.lower() not in FORMATS:
        raise OutputError(
            f"cannot write scores to {args.save}: the name must end in one of {', '.join(FORMATS)}"
        )
    from kglmatch.models.pretrained import load_config

    # All patches are read and checked before the model is loaded.
    patch_size = load_config(args.model).patch_size
    names, vis, ir = _read(args.vis, args.ir, patch_size)
    inputs = [path for path in (args.vis, args.ir) if path is not None]
    check_outputs({"--save": args.save}, inputs)
    scores = _score(load_matcher(args), vis, ir)
    if args.save is not None:
        _save(args.save, names, scores)
        say(f"wrote {args.save}")
    if args.json:
        pairs = zip(names, scores, strict=True)
        print_json(
            {"model": args.model, "pairs": [{"name": name, "score": float(score)} for name, score in pairs]}
        )
    else:
        for name, score in zip(names, scores, strict=True):
            print(f"{name}\t{score:.6f}")
        if not names:
            say(f"{args.vis}: no pairs, so no scores")
    return 0


def _score(matcher: Matcher, vis: NDArray[Any], ir: NDArray[Any]) -> NDArray[np.float32]:
    import numpy as np

    from kglmatch.progress import steps

    matcher.backend.progress = False  # one bar over the chunks instead of several within each
    scores = np.empty(len(vis), np.float32)
    size = min(CHUNK, matcher.backend.batch_size)
    for start in steps(range(0, len(vis), size), "score", show=True):
        part = slice(start, start + size)
        scores[part] = matcher.score(vis[part], ir[part])
    return scores


# --- reading --------------------------------------------------------------------------------------


def _read(vis: Path, ir: Path | None, patch_size: int) -> tuple[list[str], NDArray[Any], NDArray[Any]]:
    """Names, visible and ir patches (N, P, P)."""
    if ir is None:
        if vis.suffix.lower() != ".npz":
            raise DataError(
                f"{vis} alone is no pair: expected VIS_PATCH and IR_PATCH, or one .npz with arrays vis and ir"
            )
        return _read_npz(vis, patch_size)
    for path in (vis, ir):
        if path.suffix.lower() == ".npz" and path.is_file():
            raise DataError(f"{path}: an .npz holds both sides (arrays vis and ir) and is given alone")
    if vis.is_dir() != ir.is_dir():
        folder, file = (vis, ir) if vis.is_dir() else (ir, vis)
        raise DataError(f"{folder} is a folder and {file} is not: expected two image files or two folders")
    pairs = _pairs_of_folders(vis, ir) if vis.is_dir() else [(vis, ir)]
    names = [path.name for path, _ in pairs]
    vis_patches = _read_images([path for path, _ in pairs], patch_size)
    return names, vis_patches, _read_images([path for _, path in pairs], patch_size)


def _read_npz(path: Path, patch_size: int) -> tuple[list[str], NDArray[Any], NDArray[Any]]:
    from kglmatch.features import read_npz
    from kglmatch.patches import check_patches

    arrays = read_npz(path, {"vis", "ir"})
    vis, ir = (
        check_patches(arrays[name], patch_size=patch_size, name=f"{path}: {name}") for name in ("vis", "ir")
    )
    if len(vis) != len(ir):
        raise PatchError(f"{path}: {len(vis)} visible and {len(ir)} ir patches; expected as many of each")
    return [str(row) for row in range(len(vis))], vis, ir


def _pairs_of_folders(vis: Path, ir: Path) -> list[tuple[Path, Path]]:
    """Files of one name (without the extension) in both folders, sorted."""
    from kglmatch.batch.pairs import files_of_one_name

    paired, alone = files_of_one_name(vis, ir)
    say_alone(alone)
    return paired


def _read_images(paths: list[Path], patch_size: int) -> NDArray[np.float32]:
    import numpy as np

    from kglmatch.images import load_image
    from kglmatch.progress import steps

    patches = np.empty((len(paths), patch_size, patch_size), np.float32)
    for row, path in enumerate(steps(paths, "read", show=True)):
        image = load_image(path)
        if image.shape != (patch_size, patch_size):
            raise PatchError(
                f"{path} is {image.shape[1]} x {image.shape[0]} pixels, expected a patch of {patch_size} x "
                f"{patch_size}; kglmatch match takes whole images"
            )
        patches[row] = image
    return patches


# --- writing --------------------------------------------------------------------------------------


def _save(path: Path, names: list[str], scores: NDArray[np.float32]) -> None:
    import numpy as np

    from kglmatch.files import atomic_output

    rows = [{"name": name, "score": float(score)} for name, score in zip(names, scores, strict=True)]
    with atomic_output(path) as temporary:
        if path.suffix.lower() == ".npz":
            with temporary.open("wb") as file:
                np.savez(file, names=np.array(names, np.str_), scores=scores)
        elif path.suffix.lower() == ".json":
            temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        else:
            text = io.StringIO()
            writer = csv.DictWriter(text, ("name", "score"), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            temporary.write_text(text.getvalue(), encoding="utf-8", errors="backslashreplace")
