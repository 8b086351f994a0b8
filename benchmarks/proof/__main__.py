"""How good is registration with kglmatch, and with others? One command, for anyone.

    pip install "kglmatch[proof,plot]"
    OMP_NUM_THREADS=2 python benchmarks/proof DATA -o OUT   # ten pairs of each set, then report; resumes
    python benchmarks/proof DATA -o OUT --limit 1000        # every pair
    python benchmarks/proof DATA -o OUT --limit 0 --unrelated 170 --contenders kglmatch  # false accepts
    python benchmarks/proof DATA -o OUT --report            # the report of what has been measured so far
    python benchmarks/proof DATA -o OUT --fit               # fit the confidence, on pairs that test nothing
    python benchmarks/proof DATA -o OUT --patches           # FPR95 of descriptors at the same points

DATA holds the folders named in `pairs.py`; those that are missing are left out. Each pair is warped at
random, by a seed of its own, at three strengths: up to 6 pixels; up to 10 degrees and a factor of 1.1; any
rotation and a factor of 1.5. Pairs of different scenes are registered too: whoever accepts one accepts
falsely. The offset that a set has of its own is removed (`truth.py`).

OUT gets `results.jsonl` (a line for each pair and contender; a killed run resumes with the first that is
missing), `report.json`, `report.md` and the plots. Each baseline is measured alone, and as a proposer:
refined and judged by `Matcher.register`, with our own proposal ("NAME + kglmatch") and without it ("NAME,
judged").
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import contenders
import numpy as np
from calibration import fit, recalibrated, write_into_models
from pairs import FIT, STRENGTHS, TEST, UNRELATED, Task, make_tasks, published, shows_two_scenes, warped
from patch_table import measure_patches
from report import write_report
from results import RESULTS, SCENES, TRUTHS, Results, Row, read_lines
from truth import Truth, own_offset

from kglmatch import Matcher, Registration
from kglmatch.errors import KGLMatchError
from kglmatch.geometry import corner_error
from kglmatch.registration.limits import Limits
from kglmatch.registration.verdict import judge_proposal

JUDGED = ", judged"
MODELS = {"vis-nir": "kglnet-vis-nir", "vis-lwir": "kglnet-vis-lwir", "vis-sar": "kglnet-vis-sar"}

DEFAULTS = {"strengths": list(STRENGTHS), "limit": 10, "unrelated": 4}
FIT_DEFAULTS = {"strengths": ["small", "medium"], "limit": 15, "unrelated": 15}


def peak_memory(function: Callable[[], Any]) -> tuple[Any, float, float | None]:
    """What a function returns, its processor seconds, and the MiB that it needed on top, if that is known.

    Processor time, because a machine that others use too takes longer by the clock. That of processes
    that were started counts as well, their memory does not.
    """
    before = _status("VmRSS") if _reset_peak() else None
    began = sum(os.times()[:4])
    value = function()
    seconds = sum(os.times()[:4]) - began
    peak = _status("VmHWM")
    return value, seconds, None if before is None or peak is None else max(0.0, peak - before)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> float | None:
    """MiB of a line of /proc/self/status."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), None)


class Run:
    """Measures tasks with one model a set.

    Args:
        out: the folder of results.
        names: contenders, "kglmatch" among them or not.
        models: set -> model.
        known_truth: takes the published transform of each pair for true, for quick runs.
    """

    def __init__(self, out: Path, names: list[str], models: dict[str, str], known_truth: bool) -> None:
        self.results = Results(out / RESULTS, ("task", "contender"))
        self.truths = Results(out / TRUTHS, ("pair",))
        self.scenes = Results(out / SCENES, ("task",))
        self._known_truth = known_truth
        self._models = models
        self._matchers: dict[str, Matcher] = {}
        self._ours = contenders.OURS in names
        self._baselines = {name: contenders.load(name) for name in names if name != contenders.OURS}

    def is_confirmed(self, task: Task) -> bool:
        """Whether the true transform of a task's pair is known well enough to measure anything by it."""
        return self._known_truth or self._truth(task, *task.images()).confirmed

    def shows_two_scenes(self, task: Task) -> bool:
        """Whether the two pairs of an unrelated task show different scenes; looked for once."""
        if (task.key,) not in self.scenes:
            self.scenes.add([{"task": task.key, "two": shows_two_scenes(task)}])
        return bool(self.scenes[(task.key,)]["two"])

    def missing(self, task: Task) -> list[str]:
        """The contenders that have not been measured on a task."""
        names = ([contenders.OURS] if self._ours else []) + list(self._baselines)
        return [name for name in names if (task.key, name) not in self.results]

    def measure(self, task: Task) -> None:
        """Adds what is missing of a task."""
        vis, ir = task.images()
        truth = None if task.strength == UNRELATED else self._truth(task, vis, ir)
        warp = task.warp((ir.shape[1], ir.shape[0]))
        moved, true = warped(ir, warp), None if truth is None else warp @ truth.transform
        limits = Limits(**dict(STRENGTHS[task.strength].limits)) if task.strength in STRENGTHS else Limits()
        matcher = self._matcher(task.set_name)
        facts: Row = {
            "task": task.key,
            "set": task.set_name,
            "subset": task.subset,
            "pair": task.pair,
            "strength": task.strength,
        }
        for name in self.missing(task):
            self.results.add(self._contend(name, matcher, vis, moved, true, limits, facts))

    def _contend(
        self,
        name: str,
        matcher: Matcher,
        vis: np.ndarray,
        ir: np.ndarray,
        true: np.ndarray | None,
        limits: Limits,
        facts: Row,
    ) -> list[Row]:
        size = vis.shape[1], vis.shape[0]
        if name == contenders.OURS:
            found, seconds, mib = peak_memory(lambda: matcher.register(vis, ir, **asdict(limits)))
            return [{**facts, "contender": name, **judged_row(found, true, size), **cost(seconds, mib)}]
        proposal, seconds, mib = peak_memory(lambda: contenders.propose(name, self._baselines[name], vis, ir))
        transform, inliers = contenders.alone(proposal)
        row = {**facts, "contender": name, "verdict": None, "confidence": None, "inliers": inliers}
        row |= {
            "found": transform is not None,
            "error": error_of(transform, true, size),
            **cost(seconds, mib),
        }
        judged, more, mib = peak_memory(lambda: judge_proposal(matcher, vis, ir, proposal, limits))
        judged_facts = {**facts, "contender": f"{name}{JUDGED}", **judged_row(judged, true, size)}
        return [row, {**judged_facts, **cost(seconds + more, mib)}]

    def _matcher(self, set_name: str) -> Matcher:
        if set_name not in self._matchers:
            self._matchers[set_name] = Matcher.from_pretrained(self._models[set_name], device="cpu")
        return self._matchers[set_name]

    def _truth(self, task: Task, vis: np.ndarray, ir: np.ndarray) -> Truth:
        """The true transform of the pair, looked for once."""
        if (task.pair,) not in self.truths:
            place = published(task.vis)
            found = Truth(place, True, "published") if self._known_truth else own_offset(vis, ir, place)
            self.truths.add(
                [{"pair": task.pair, **asdict(replace(found, transform=found.transform.tolist()))}]
            )
        row = self.truths[(task.pair,)]
        return Truth(np.array(row["transform"]), row["confirmed"], row["by"])


def judged_row(found: Registration | None, true: np.ndarray | None, size: tuple[int, int]) -> Row:
    """The columns of a registration with a verdict; of None, where there was nothing to judge."""
    if found is None:
        return {"verdict": "failed", "confidence": 0.0, "found": False, "error": None, "inliers": 0}
    return {
        "verdict": found.verdict,
        "confidence": round(found.confidence, 5),
        "found": found.transform is not None,
        "error": error_of(found.transform, true, size),
        "inliers": int(found.inliers.sum()),
        "support": round(found.support, 5),
        "agreement": round(found.agreement, 5),
        "num_matches": found.num_matches,
    }


def cost(seconds: float, mib: float | None) -> Row:
    """The columns of time and memory."""
    return {"seconds": round(seconds, 3), "mib": None if mib is None else round(mib, 1)}


def error_of(found: np.ndarray | None, true: np.ndarray | None, size: tuple[int, int]) -> float | None:
    """Mean corner error in ir pixels; None where there is none."""
    if found is None or true is None:
        return None
    error = corner_error(found, true, size)
    return round(error, 4) if np.isfinite(error) else None


def chosen_contenders(names: list[str] | None) -> list[str]:
    """Those that were named, or all of the usual ones that can be loaded; what is missing is said."""
    if names is not None:
        return names
    reasons = contenders.available()
    for reason in filter(None, reasons.values()):
        print(reason, file=sys.stderr)
    return [contenders.OURS, *(name for name, reason in reasons.items() if not reason)]


def models_of(texts: list[str]) -> dict[str, str]:
    """Set -> model, from SET=MODEL."""
    models = dict(MODELS)
    for text in texts:
        name, _, model = text.partition("=")
        if name not in MODELS or not model:
            raise KGLMatchError(f"--models takes SET=MODEL with a SET of {', '.join(MODELS)}, got {text!r}")
        models[name] = model
    return models


def progress(tasks: list[Task]) -> Iterator[Task]:
    """The tasks, each announced by a line with the time that is left, as far as the tasks before it tell."""
    began = time.monotonic()
    for number, task in enumerate(tasks):
        left = (time.monotonic() - began) / max(number, 1) * (len(tasks) - number) / 60
        about = f"about {left:.0f} min left, " if number else ""
        print(f"{time.strftime('%H:%M:%S')} {number + 1}/{len(tasks)} {about}{task.key}", flush=True)
        yield task


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/proof",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", required=True)
    parser.add_argument("--sets", nargs="+", choices=TEST, default=list(TEST))
    parser.add_argument(
        "--strengths", nargs="+", choices=STRENGTHS, help="default: all; with --fit small and medium"
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        help=f"of {contenders.OURS}, {', '.join(contenders.BASELINES)}; default: all that are installed, but "
        f"{', '.join(contenders.SLOW)}",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="pairs of each set, at most; default: 10, with --fit 15"
    )
    parser.add_argument(
        "--unrelated", type=int, metavar="N", help="unrelated pairs of each set; default: 4, with --fit 15"
    )
    parser.add_argument("--models", nargs="+", default=[], metavar="SET=MODEL")
    parser.add_argument("--published", action="store_true", help="take the sets' own transforms for true")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--patches", action="store_true", help="measure descriptors on patches instead")
    parser.add_argument(
        "--points", type=int, metavar="N", help="with --patches: of each folder, at most (250 or 500)"
    )
    parser.add_argument("--fit", action="store_true", help="fit the confidence on pairs that test nothing")
    parser.add_argument(
        "--write", action="store_true", help="with --fit: write it into the models' config.json"
    )
    args = parser.parse_args(argv)
    for name, value in (FIT_DEFAULTS if args.fit else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    models = models_of(args.models)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.patches:
        print(measure_patches(args.data, args.output, models, args.sets, args.points))
        return 0
    if not args.report:
        parts = FIT if args.fit else TEST
        names = [contenders.OURS] if args.fit else chosen_contenders(args.contenders)
        run = Run(args.output, names, models, args.published)
        tasks = make_tasks(
            args.data,
            {name: parts[name] for name in args.sets},
            strengths=args.strengths,
            limit=args.limit,
            unrelated=args.unrelated,
            usable=run.is_confirmed,
            unlike=run.shows_two_scenes,
        )
        for task in progress([task for task in tasks if run.missing(task)]):
            run.measure(task)
    if args.fit:
        curves = fit(args.output)
        if args.write:
            write_into_models(curves, models)
        return 0
    rows = recalibrated(read_lines(args.output / RESULTS), models)
    print(write_report(args.output, rows, read_lines(args.output / TRUTHS)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KGLMatchError as error:
        sys.exit(f"error: {error}")
