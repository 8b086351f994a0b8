"""A batch job: matches every pair of two folders, and can be stopped and started again.

Images are paired by name: vis/0001.png with ir/0001.tif. Each pair gets a .npz file with its matches;
pairs that already have one are skipped. `summary.csv` has a row for each pair; a bad image affects only
its own row.

python examples/match_folder.py VIS_FOLDER IR_FOLDER OUT_FOLDER [--max-displacement 10]
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from kglmatch import KGLMatchError, Matcher, Matches

COLUMNS = ("name", "matches", "inliers", "problem")


def images_by_name(folder: Path) -> dict[str, Path]:
    """Stem -> file, of the visible files in a folder."""
    return {path.stem: path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."}


def match_pair(matcher: Matcher, vis: Path, ir: Path, target: Path, **options) -> dict[str, object]:
    """One row of the summary; the matches go to `target`, or come from there."""
    try:
        if target.exists():
            matches = Matches.load(target)
        else:
            matches = matcher.match_images(vis, ir, **options)
            matches.save(target)  # written whole or not at all
    except KGLMatchError as error:
        return {"name": target.stem, "problem": error}
    return {"name": target.stem, "matches": len(matches), "inliers": int(matches.inliers.sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("vis", type=Path, help="folder of visible images")
    parser.add_argument("ir", type=Path, help="folder of the other sensor's images")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--model", default="kglnet-vis-nir", help="bundled name, folder or Hub id")
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N"')
    parser.add_argument("--max-displacement", type=float, help="pixels; for registered images")
    parser.add_argument("--max-keypoints", type=int, default=1000, help="of each image")
    args = parser.parse_args()

    of_vis, of_ir = images_by_name(args.vis), images_by_name(args.ir)
    names = sorted(of_vis.keys() & of_ir.keys())
    if not names:
        sys.exit(f"error: {args.vis} and {args.ir} have no file name in common")
    args.out.mkdir(parents=True, exist_ok=True)
    matcher = Matcher.from_pretrained(args.model, device=args.device)  # loaded once, used for every pair
    options = {"max_displacement": args.max_displacement, "max_keypoints": args.max_keypoints}
    problems = 0
    with (args.out / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for name in names:
            row = match_pair(matcher, of_vis[name], of_ir[name], args.out / f"{name}.npz", **options)
            table.writerow(row)
            file.flush()
            problems += "problem" in row
            print(", ".join(f"{key} {value}" for key, value in row.items()))
    if problems:
        sys.exit(f"{problems} of {len(names)} pairs had a problem; see {args.out / 'summary.csv'}")


if __name__ == "__main__":
    main()
