"""The report of a proof: JSON, tables in Markdown, plots."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from contenders import BASELINES, OURS
from pairs import STRENGTHS, UNRELATED
from results import RIGHT, Row

from kglmatch.evaluation.confidence import reliability
from kglmatch.files import atomic_output

PIXELS = (1, 3, 5, 10)
JUDGED = ", judged"
WITH_OURS = f" + {OURS}"
ALL = "all strengths"
DRAWS = 2000
FIRM = 15  # inliers that a homography needs to be taken for an answer, where there is no verdict
BINS = (0.5, 0.8, 0.9, 0.95, 0.98, 1.0)
COLOURS = ("#00796b", "#c62828", "#1565c0", "#ef6c00", "#6a1b9a", "#558b2f", "#4e342e", "#37474f")


def write_report(out: Path, rows: list[Row], truths: list[Row]) -> str:
    """Writes report.json, report.md and, where matplotlib is, the plots; returns the tables."""
    rows = rows + with_ours(rows)
    report = make_report(rows, truths)
    with atomic_output(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    text = tables(report)
    with atomic_output(out / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    draw_all(out, rows)
    return text


def with_ours(rows: list[Row]) -> list[Row]:
    """What `register(proposers=[NAME])` keeps: the more confident of ours and the judged proposal."""
    by_task: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by_task[row["task"]][row["contender"]] = row
    kept = []
    for found in by_task.values():
        for name in BASELINES:
            ours, judged, alone = (found.get(key) for key in (OURS, f"{name}{JUDGED}", name))
            if ours is None or judged is None or alone is None:
                continue
            best = max((ours, judged), key=lambda row: row["confidence"])
            seconds = round(ours["seconds"] + judged["seconds"], 3)
            memory = [row["mib"] for row in (ours, judged, alone) if row["mib"] is not None]
            own = {"contender": f"{name}{WITH_OURS}", "seconds": seconds, "mib": max(memory, default=None)}
            kept.append({**best, **own})
    return kept


def make_report(rows: list[Row], truths: list[Row]) -> dict[str, Any]:
    """All figures, as plain values."""
    related = [row for row in rows if row["strength"] != UNRELATED]
    unrelated = [row for row in rows if row["strength"] == UNRELATED]
    names = [name for name in order() if any(row["contender"] == name for row in rows)]
    shares: dict[str, Any] = {}
    for set_name in dict.fromkeys(row["set"] for row in related):
        shares[set_name] = {
            strength: {
                name: figures(own)
                for name in names
                if (own := select(related, set=set_name, contender=name, **only))
            }
            for strength, only in [(ALL, {}), *((name, {"strength": name}) for name in STRENGTHS)]
        }
    return {
        "pairs": {
            set_name: {
                "confirmed": sum(t["confirmed"] for t in truths if t["pair"].startswith(f"{set_name}/")),
                "of": sum(t["pair"].startswith(f"{set_name}/") for t in truths),
            }
            for set_name in shares
        },
        "shares": shares,
        "lowered": lowered(shares),
        "false_accepts": {
            name: false_accepts(own) for name in names if (own := select(unrelated, contender=name))
        },
        # Of unrelated pairs there may be many more for some; those take longer.
        "cost": {name: costs(own) for name in names if (own := select(related or rows, contender=name))},
        "reliability": {
            name: [clean(asdict(b)) for b in reliability_of(related, name)] for name in names if judged(name)
        },
    }


def lowered(shares: dict[str, Any]) -> list[list[str]]:
    """[set, baseline] whose share within 5 pixels our judge lowers to below its interval."""
    key = f"within_{RIGHT:g}_px"
    return [
        [set_name, name]
        for set_name, by_strength in shares.items()
        for name, values in by_strength[ALL].items()
        if (after := by_strength[ALL].get(f"{name}{JUDGED}")) and after[key][0] < values[key][1]
    ]


def order() -> list[str]:
    """Ours, then each baseline alone, judged, and with ours."""
    return [OURS, *(f"{name}{how}" for name in BASELINES for how in ("", JUDGED, WITH_OURS))]


def judged(name: str) -> bool:
    """Whether a contender has a verdict."""
    return name == OURS or name.endswith((JUDGED, WITH_OURS))


def select(rows: list[Row], **values: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def errors_of(rows: list[Row]) -> np.ndarray:
    """(N,) pixels, infinite where nothing was found."""
    return np.array([np.inf if row["error"] is None else row["error"] for row in rows])


def figures(rows: list[Row]) -> dict[str, Any]:
    """Shares within some pixels, with intervals over pairs."""
    errors, pairs = errors_of(rows), np.array([row["pair"] for row in rows])
    result: dict[str, Any] = {"pairs": len(np.unique(pairs)), "warps": len(rows)}
    for pixels in PIXELS:
        result[f"within_{pixels}_px"] = share(errors <= pixels, pairs)
    if rows[0]["verdict"] is not None:
        registered = np.array([row["verdict"] == "registered" for row in rows])
        result["registered"] = share(registered, pairs)
        result["registered_wrongly"] = int((registered & (errors > PIXELS[-1])).sum())
    return result


def share(answers: np.ndarray, pairs: np.ndarray) -> list[float]:
    """A share and its 95 % interval, of pairs drawn with replacement, all warps of one together: percent."""
    names, pair = np.unique(pairs, return_inverse=True)
    right, count = np.bincount(pair, answers), np.bincount(pair)
    times = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), DRAWS)
    drawn = (times @ right) / (times @ count)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return [round(100 * float(value), 1) for value in (answers.mean(), low, high)]


def false_accepts(rows: list[Row]) -> dict[str, Any]:
    """How many unrelated pairs were given an answer; without a verdict, any, and one with enough inliers."""
    result = {"pairs": len(rows), "transforms": sum(row["found"] for row in rows)}
    if rows[0]["verdict"] is not None:
        result["accepted"] = sum(row["verdict"] == "registered" for row in rows)
        result["doubtful"] = sum(row["verdict"] == "doubtful" for row in rows)
    elif any(row["inliers"] for row in rows) or not result["transforms"]:
        result["accepted"] = sum(row["inliers"] >= FIRM for row in rows)
    else:
        result["accepted"] = result["transforms"]
    return result


def costs(rows: list[Row]) -> dict[str, float | None]:
    """Median seconds, and the largest memory."""
    memory = [row["mib"] for row in rows if row["mib"] is not None]
    seconds = float(np.median([row["seconds"] for row in rows]))
    return {"median_seconds": round(seconds, 2), "peak_mib": max(memory, default=None)}


def reliability_of(rows: list[Row], name: str) -> list[Any]:
    own = [r for r in select(rows, contender=name) if r["verdict"] == "registered"]
    confidence = np.array([row["confidence"] for row in own])
    return reliability(confidence, errors_of(own) <= RIGHT, BINS)


def clean(values: dict[str, Any]) -> dict[str, Any]:
    """NaN, which JSON lacks, becomes None."""

    def number(value: Any) -> Any:
        if isinstance(value, tuple):
            return [number(part) for part in value]
        return None if isinstance(value, float) and np.isnan(value) else value

    return {key: number(value) for key, value in values.items()}


# --- tables -------------------------------------------------------------------------------------------


def tables(report: dict[str, Any]) -> str:
    """All tables in Markdown."""
    parts = [f"Within {RIGHT:g} px, {ALL}; unrelated pairs accepted\n\n{summary(report)}"]
    for set_name, by_strength in report["shares"].items():
        pairs = report["pairs"][set_name]
        parts.append(f"## {set_name}: {pairs['confirmed']} of {pairs['of']} pairs confirmed")
        parts.append(f"{ALL}; the last columns within {RIGHT:g} px\n\n{overview(by_strength)}")
        for strength in STRENGTHS:
            if by_strength[strength]:
                parts.append(f"### {strength}\n\n{shares_table(by_strength[strength])}")
    names = ", ".join(f"{name} ({set_name})" for set_name, name in report["lowered"])
    parts.append(f"Shares within 5 px that the judge lowers to below their interval: {names or 'none'}.")
    parts.append(f"## Unrelated pairs\n\n{accepts_table(report)}")
    parts.append(f"## Confidence\n\n{reliability_table(report)}")
    return "\n\n".join(parts) + "\n"


def summary(report: dict[str, Any]) -> str:
    """Shares within 5 pixels over all strengths, a column for each set, and the false accepts."""
    key, sets = f"within_{RIGHT:g}_px", list(report["shares"])
    rows = [["", *sets, "false accepts"]]
    for name in report["cost"]:
        found = [report["shares"][set_name][ALL].get(name) for set_name in sets]
        accepts = report["false_accepts"].get(name)
        cells = [interval(values[key]) if values else "" for values in found]
        rows.append([name, *cells, f"{accepts['accepted']} of {accepts['pairs']}" if accepts else ""])
    return markdown(rows)


def overview(by_strength: dict[str, Any]) -> str:
    """Shares over all strengths, then those within 5 pixels at each."""
    strengths = [name for name in STRENGTHS if by_strength[name]]
    head, rule, *lines = shares_table(by_strength[ALL]).splitlines()
    key = f"within_{RIGHT:g}_px"
    names = " | ".join(strengths)

    def share(strength: str, name: str) -> str:
        found = by_strength[strength].get(name)  # None where a run was stopped before it
        return "" if found is None else f"{found[key][0]:.0f}"

    more = [" | ".join(share(strength, name) for strength in strengths) for name in by_strength[ALL]]
    rows = [f"{line} {shares} |" for line, shares in zip(lines, more, strict=True)]
    return "\n".join([f"{head} {names} |", rule + "---|" * len(strengths), *rows])


def shares_table(found: dict[str, Any]) -> str:
    header = ["", *(f"{pixels} px" for pixels in PIXELS), "registered", "of them > 10 px", "pairs"]
    rows = [header]
    for name, values in found.items():
        cells = [interval(values[f"within_{pixels}_px"]) for pixels in PIXELS]
        verdicts = (
            [interval(values["registered"]), str(values["registered_wrongly"])]
            if "registered" in values
            else ["", ""]
        )
        rows.append([name, *cells, *verdicts, str(values["pairs"])])
    return markdown(rows)


def interval(values: list[float]) -> str:
    middle, low, high = values
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def accepts_table(report: dict[str, Any]) -> str:
    rows = [["", "false accepts", "pairs", "median processor s", "MiB"]]
    for name, cost in report["cost"].items():
        found = report["false_accepts"].get(name)
        accepted = ["", ""] if found is None else [str(found["accepted"]), str(found["pairs"])]
        memory = "" if cost["peak_mib"] is None else f"{cost['peak_mib']:.0f}"
        rows.append([name, *accepted, f"{cost['median_seconds']:.1f}", memory])
    return markdown(rows)


def reliability_table(report: dict[str, Any]) -> str:
    rows = [["confidence", "registered", "within 5 px, %", "95 % interval"]]
    for part in report["reliability"].get(OURS, []):
        if part["count"]:
            low, high = (100 * value for value in part["interval"])
            own = f"{part['low']:g} to {part['high']:g}"
            rows.append([own, str(part["count"]), f"{100 * part['share']:.0f}", f"{low:.0f} to {high:.0f}"])
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


# --- plots ----------------------------------------------------------------------------------------------


def draw_all(out: Path, rows: list[Row]) -> None:
    """success.png, accepts.png and reliability.png; nothing where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return
    mpl.use("Agg")
    from matplotlib import pyplot

    for name, draw in (
        ("success", draw_success),
        ("accepts", draw_accepts),
        ("reliability", draw_reliability),
    ):
        figure = draw(pyplot, rows)
        if figure is not None:
            figure.savefig(out / f"{name}.png", dpi=85)
            pyplot.close(figure)


def draw_success(pyplot: Any, rows: list[Row]) -> Any:
    """Share of pairs whose error is below a number of pixels, a panel for each set and strength."""
    related = [row for row in rows if row["strength"] != UNRELATED]
    sets = list(dict.fromkeys(row["set"] for row in related))
    strengths = [name for name in STRENGTHS if any(row["strength"] == name for row in related)]
    if not related:
        return None
    size = (4 * len(strengths), 3.2 * len(sets) + 0.6)
    figure, axes = pyplot.subplots(
        len(sets), len(strengths), figsize=size, squeeze=False, layout="constrained"
    )
    pixels = np.geomspace(0.5, 20, 80)
    for axis, (set_name, strength) in zip(axes.flat, [(a, b) for a in sets for b in strengths], strict=True):
        for name, colour in zip((OURS, *BASELINES), COLOURS, strict=True):
            own = select(related, set=set_name, strength=strength, contender=name)
            if own:
                errors = errors_of(own)
                axis.plot(pixels, [100 * (errors <= p).mean() for p in pixels], color=colour, label=name)
        axis.set(
            xscale="log",
            ylim=(-2, 102),
            title=f"{set_name}, {strength}",
            xlabel="pixels",
            ylabel="% of pairs",
        )
        axis.set_xticks([0.5, 1, 3, 5, 10, 20], labels=["0.5", "1", "3", "5", "10", "20"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_accepts(pyplot: Any, rows: list[Row]) -> Any:
    """Share of unrelated pairs that have at least some confidence, with a verdict of ours."""
    unrelated = [row for row in rows if row["strength"] == UNRELATED]
    if not unrelated:
        return None
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    level = np.linspace(0, 1, 201)
    names = [OURS, *(f"{name}{WITH_OURS}" for name in BASELINES)]
    for name, colour in zip(names, COLOURS, strict=True):
        own = select(unrelated, contender=name)
        if own:
            confidence = np.array([row["confidence"] for row in own])
            axis.plot(level, [100 * (confidence >= c).mean() for c in level], color=colour, label=name)
    axis.axvline(0.5, color="0.6", linestyle=":")
    axis.set(xlabel="confidence", ylabel="% of unrelated pairs that have it", xlim=(0, 1), ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def draw_reliability(pyplot: Any, rows: list[Row]) -> Any:
    """Share within 5 pixels of what is registered at some confidence, with its interval."""
    related = [row for row in rows if row["strength"] != UNRELATED]
    bins = [part for part in reliability_of(related, OURS) if part.count]
    if not bins:
        return None
    figure, axis = pyplot.subplots(figsize=(5, 4.6), layout="constrained")
    axis.plot([0.5, 1], [50, 100], color="0.6", linestyle=":", label="ideal")
    shares = np.array([100 * part.share for part in bins])
    bounds = 100 * np.array([part.interval for part in bins]).T
    x = [part.confidence for part in bins]
    axis.errorbar(x, shares, yerr=np.abs(bounds - shares), fmt="o", color=COLOURS[0], capsize=3, label=OURS)
    for part, y in zip(bins, shares, strict=True):
        axis.annotate(
            str(part.count), (part.confidence, y), xytext=(5, -12), textcoords="offset points", fontsize=8
        )
    axis.set(
        xlabel="confidence of what is registered", ylabel="% within 5 px", xlim=(0.48, 1.02), ylim=(0, 104)
    )
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
