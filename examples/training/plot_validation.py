"""Draws what runs reached on validation over the pairs that they had seen.

    python examples/training/plot_validation.py runs/nir -o nir.svg
    python examples/training/plot_validation.py runs/sar runs/sar-decay      # a run, and one from its state

Reads the `log.jsonl` of each run's folder. Each set of validation images has a colour; dashed is the
descriptor, solid the metric head. A run that was started with `--decay-from` counts on from the run whose
state it took.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kglmatch.errors import DataError

LINES = {"descriptor": "--", "metric": "-"}


def validations(run: Path, batch_size: int | None) -> list[dict[str, Any]]:
    """The lines of a run's log that hold a validation, with the pairs seen until then.

    Raises:
        DataError: no log, none in it, or one of before pairs were written and no batch size.
    """
    try:
        lines = (run / "log.jsonl").read_text("utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{run} holds no log.jsonl: it is not the folder of a run") from error
    found = [record for record in map(json.loads, lines) if "validation" in record]
    if not found:
        raise DataError(f"{run}: nothing has been validated yet")
    for record in found:
        if "pairs" not in record:
            if batch_size is None:
                raise DataError(f"{run}: its log has steps alone: give --batch-size")
            record["pairs"] = record["step"] * batch_size
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--output", type=Path, default=Path("validation.svg"))
    parser.add_argument("--batch-size", type=int, help="of runs whose log has no pairs")
    args = parser.parse_args()
    import matplotlib
    from matplotlib.figure import Figure

    try:
        found = {run: validations(run, args.batch_size) for run in args.runs}
    except DataError as error:
        raise SystemExit(str(error)) from error
    names = list(dict.fromkeys(name for records in found.values() for r in records for name in r["sets"]))
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for marker, records in zip("os^vDP*X" * len(found), found.values(), strict=False):
        for i, name in enumerate(names):
            of_set = [record for record in records if name in record["sets"]]
            for output, line in LINES.items():
                axes.plot(
                    [record["pairs"] / 1000 for record in of_set],
                    [record["sets"][name][f"{output}_fpr95"] for record in of_set],
                    line + marker,
                    color=f"C{i}",
                    markersize=4,
                )
    for i, name in enumerate(names):
        for output, line in LINES.items():
            axes.plot([], [], line, color=f"C{i}", label=f"{name}, {output}")
    axes.set(xlabel="thousand pairs seen", ylabel="FPR95 on validation images, %", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "validation"}):
        figure.savefig(args.output, metadata={"Date": None} if args.output.suffix == ".svg" else None)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
