"""How exactly a rig is calibrated whose transforms are known, and whether one that does not serve is refused.

    python benchmarks/rig.py DATA/training/nir-naip --captures 500
    python benchmarks/rig.py DATA/training/nir-naip --captures 40 --bands 5 --case height
    python benchmarks/rig.py DATA/training/nir-naip --captures 200 --kills 10
    python benchmarks/rig.py DATA/vis-lwir/roadscene --captures 100 --thermal --tolerance 3

Captures of five bands (blue, green, red, red edge and near infrared) are cut from registered pairs of visible
and near-infrared images. Every band has a transform of its own, which wanders from capture to capture by
noise; exposures differ, and one capture in ten shows nothing. With --thermal the captures are of two bands,
a colour image (8 bits) and a thermal one (16 bits). The cases:

    flight      as above: to be calibrated
    height      the last camera is mounted apart, and the height changes: to be refused (parallax)
    relief      things stand out of the scene, and are moved by parallax: to be refused
    loose       the last camera turns away during the flight: to be refused
    unrelated   the images of the last camera are those of other captures: to fail

The pairs must be registered well: those of DATA/vis-nir/country are apart by up to some pixels, scene by
scene, and are refused for that; so are those of DATA/vis-lwir/roadscene within 1 pixel. --repeat calibrates
without the known transforms too, and counts the difference.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import tifffile

from kglmatch import Matcher, load_image
from kglmatch.batch.captures import find_captures
from kglmatch.batch.rig import calibrate_rig
from kglmatch.batch.rig_results import Rig, RigBand
from kglmatch.geometry import corner_error, similarity_about
from kglmatch.options import DEFAULT_RIG_TOLERANCE

SIZE = 320, 256
BANDS = ("1", "2", "3", "4", "5")  # blue, green, red, red edge, near infrared
THERMAL = ("rgb", "thermal")
MARGIN = 28  # pixels that transforms reach beyond a crop
WANDER, TURN = 0.4, 0.03  # standard deviations: pixels, degrees
EMPTY = 10  # one capture in ten
CASES = ("flight", "height", "relief", "loose", "unrelated")


def image_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """The visible and infrared files of a data folder."""
    if (folder / "visible").is_dir():
        names = sorted(path.name for path in (folder / "visible").iterdir())
        return [(folder / "visible" / name, folder / "infrared" / name) for name in names]
    return [(path, Path(str(path).replace("_rgb", "_nir"))) for path in sorted(folder.glob("*_rgb.*"))]


def band_images(vis: Path, ir: Path, names: Sequence[str]) -> list[np.ndarray]:
    """The bands of a scene, (H, W) or for colour (H, W, 3), float32 in [0, 1]."""
    colour = cv2.imread(str(vis)).astype(np.float32) / 255
    infrared = load_image(ir)
    least = max(SIZE[0] / colour.shape[1], SIZE[1] / colour.shape[0]) * 1.3
    if least > 1:
        width, height = (int(np.ceil(side * least)) for side in colour.shape[1::-1])
        colour, infrared = (cv2.resize(image, (width, height)) for image in (colour, infrared))
    if names == THERMAL:
        return [cv2.cvtColor(colour, cv2.COLOR_BGR2RGB), infrared]
    blue, green, red = cv2.split(colour)
    return [blue, green, red, np.clip(0.5 * red**0.8 + 0.5 * infrared, 0, 1), infrared]


def rig_transforms(seed: int, names: Sequence[str]) -> dict[str, np.ndarray]:
    """From reference to band pixels: up to 1.5 degrees, 2 %, 10 pixels."""
    rng = np.random.default_rng(seed)
    centre = (SIZE[0] - 1) / 2, (SIZE[1] - 1) / 2
    found = {}
    for band in names[1:]:
        moved = centre[0] + rng.uniform(-10, 10), centre[1] + rng.uniform(-10, 10)
        found[band] = similarity_about(rng.uniform(-1.5, 1.5), rng.uniform(0.98, 1.02), centre, moved)
    return found


def write_flight(
    folder: Path,
    pairs: list[tuple[Path, Path]],
    count: int,
    case: str,
    truth: dict[str, np.ndarray],
    names: Sequence[str],
) -> None:
    """Writes CAPTURE_BAND.tif of a flight, of the reference and the bands whose transforms are known."""
    rng = np.random.default_rng(1)
    scenes = [band_images(*pair, names) for pair in pairs[: min(len(pairs), count)]]
    centre = (SIZE[0] - 1) / 2, (SIZE[1] - 1) / 2
    for i in range(count):
        scene = scenes[i % len(scenes)]
        height, width = scene[0].shape[:2]
        margin = min(MARGIN, (width - SIZE[0]) // 2, (height - SIZE[1]) // 2)
        x = rng.integers(margin, width - SIZE[0] - margin + 1)
        y = rng.integers(margin, height - SIZE[1] - margin + 1)
        to_scene = np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])
        above = rng.uniform(40, 120)  # metres
        for number, band in enumerate(names):
            image, transform = scene[number], np.eye(3)
            if number:
                if band not in truth:
                    continue
                wander = rng.normal(0, WANDER, 2)
                if case == "height" and band == names[-1]:
                    wander += [480 / above - 6, 0]
                if case == "loose" and band == names[-1]:
                    wander += [0, 8 * i / max(count - 1, 1) - 4]
                moved = centre[0] + wander[0], centre[1] + wander[1]
                transform = similarity_about(rng.normal(0, TURN), 1.0, centre, moved) @ truth[band]
            if case == "unrelated" and band == names[-1]:
                image = scenes[(i + 1) % len(scenes)][number]
            from_band = to_scene @ np.linalg.inv(transform)
            flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
            border = cv2.BORDER_REFLECT
            moved_image = cv2.warpPerspective(image, from_band, SIZE, flags=flags, borderMode=border)
            if case == "relief" and band == names[-1]:
                near = np.array([[1, 0, 7.0], [0, 1, 0], [0, 0, 1]])
                other = cv2.warpPerspective(image, from_band @ near, SIZE, flags=flags, borderMode=border)
                blocks = (np.add.outer(np.arange(SIZE[1]) // 128, np.arange(SIZE[0]) // 107) + i) % 2 > 0
                moved_image = np.where(blocks, other, moved_image)
            if i % EMPTY == EMPTY // 2:
                moved_image = np.full_like(moved_image, 0.5)  # sky
            noisy = moved_image * rng.uniform(0.6, 1) + rng.normal(0, 0.01, moved_image.shape)
            xmp = f'<x drone-dji:RelativeAltitude="{above:+.2f}"/>'.encode()
            white, dtype = (255, np.uint8) if noisy.ndim == 3 else (4000, np.uint16)
            tifffile.imwrite(
                folder / f"IMG_{i:04}_{band}.tif",
                np.rint(np.clip(noisy, 0, 1) * white).astype(dtype),
                extratags=[(700, "B", len(xmp), xmp, True)] if number == 0 else [],
                metadata=None,
            )


def report(rig: Rig, truth: dict[str, np.ndarray], base: Rig | None) -> dict[str, float]:
    """Prints a line a band; the errors in pixels."""
    errors = {}
    for band in rig.bands:
        error = float("nan")
        if band.transform is not None:
            expected = truth[band.name]
            if base is not None and base[band.name].transform is not None:
                expected = expected @ base[band.name].transform
            error = corner_error(band.transform, expected, SIZE)
        errors[band.name] = error
        print(
            f"band {band.name}  {band.verdict:10}  error {error:.3f} px  {band.kind}  via {band.via}  "
            f"support {band.support:.2f}  agreement {band.agreement:.2f}  consistent {band.consistent:.2f}  "
            f"trend {band.trend}  {band.reason}"
        )
    return errors


def kill_apply(rig: Path, captures: Path, out: Path, kills: int) -> None:
    """Kills `rig apply` at random moments, then lets it end; every output must be whole, and as without."""
    command = [sys.executable, "-m", "kglmatch", "rig", "apply", str(rig), str(captures)]
    rng = random.Random(0)
    subprocess.run([*command, "-o", str(out / "whole")], check=True, stdout=subprocess.DEVNULL)
    total = len(list((out / "whole").glob("*.tif")))
    for kill in range(1, kills + 1):
        # After some more outputs, and somewhere within the next ones.
        wanted = total * kill // (kills + 1)
        process = subprocess.Popen(
            [*command, "-o", str(out / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(list((out / "killed").glob("*.tif"))) < wanted:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        ended = process.wait()
        done = len(list((out / "killed").glob("*.tif")))
        print(f"kill {kill}: exit code {ended}, {done} of {total} stacks are there")
    subprocess.run([*command, "-o", str(out / "killed")], check=True, stdout=subprocess.DEVNULL)
    names = sorted(path.name for path in (out / "whole").glob("*.tif"))
    assert names == sorted(path.name for path in (out / "killed").glob("*.tif"))
    for name in names:
        assert (out / "whole" / name).read_bytes() == (out / "killed" / name).read_bytes(), name
    left = [path.name for path in (out / "killed").iterdir() if path.name.startswith(".tmp-")]
    assert not left, left
    print(f"{kills} kills: all {len(names)} stacks are there, byte for byte as without")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--captures", type=int, default=500, metavar="N")
    parser.add_argument("--case", choices=CASES, default="flight")
    parser.add_argument("--bands", nargs="+", choices=BANDS[1:], default=BANDS[1:], help="to calibrate")
    parser.add_argument("--thermal", action="store_true", help="a colour and a thermal camera")
    parser.add_argument("--model", help="default: kglnet-vis-nir, with --thermal kglnet-vis-lwir")
    parser.add_argument("--tolerance", type=float, default=DEFAULT_RIG_TOLERANCE, help="pixels")
    parser.add_argument("--repeat", action="store_true", help="without the error of the set")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="kill `rig apply` N times")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    names = THERMAL if args.thermal else BANDS
    model = args.model or ("kglnet-vis-lwir" if args.thermal else "kglnet-vis-nir")
    pairs = image_pairs(args.data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truth = rig_transforms(0, names)
        if not args.thermal:
            truth = {band: truth[band] for band in args.bands}
        (folder / "flight").mkdir()
        write_flight(folder / "flight", pairs, args.captures, args.case, truth, names)
        if args.kills:
            rig_file = folder / "rig.json"
            write_rig(rig_file, truth, names[0])
            kill_apply(rig_file, folder / "flight", folder, args.kills)
            return
        matcher = Matcher.from_pretrained(model)
        base = None
        if args.repeat:
            (folder / "base").mkdir()
            write_flight(
                folder / "base", pairs, args.captures, args.case, dict.fromkeys(truth, np.eye(3)), names
            )
            base = calibrate(matcher, folder / "base", names[0], args.tolerance)
        began = time.perf_counter()
        rig = calibrate(matcher, folder / "flight", names[0], args.tolerance)
        seconds = time.perf_counter() - began
        errors = report(rig, truth, base)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(
            f"{args.captures} captures of {1 + len(rig.bands)} bands, case {args.case}: {seconds:.0f} s, "
            f"at most {peak} MiB"
        )
        if args.json is not None:
            args.json.write_text(json.dumps({"errors": errors, "seconds": seconds, "rig": rig.to_dict()}))


def calibrate(matcher: Matcher, flight: Path, reference: str, tolerance: float) -> Rig:
    captures = find_captures(flight)
    return calibrate_rig(matcher, captures, reference=reference, tolerance=tolerance, max_captures=None)


def write_rig(path: Path, truth: dict[str, np.ndarray], reference: str) -> None:
    """A rig of the known transforms, where nothing is to be calibrated."""
    bands = tuple(
        RigBand(
            name=band,
            size=SIZE,
            verdict="registered",
            confidence=1.0,
            transform=transform,
            kind="similarity",
            via=None,
            reason="known",
            num_captures=1,
            num_judged=1,
            num_agreeing=1,
            spread=0.0,
            support=1.0,
            agreement=1.0,
            num_matches=0,
            consistent=1.0,
        )
        for band, transform in truth.items()
    )
    Rig(reference, SIZE, bands, 1.0, "", 1, {}).save(path)


if __name__ == "__main__":
    main()
