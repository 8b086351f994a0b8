"""The confidence of the models: fitted on pairs that test nothing, kept where it helps on pairs left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from results import RESULTS, RIGHT, Row, read_lines

from kglmatch.errors import KGLMatchError
from kglmatch.evaluation.confidence import brier_score, fit_confidence, held_out
from kglmatch.files import atomic_output
from kglmatch.models.pretrained import load_config
from kglmatch.registration.verdict import confidence, evidence

CONFIDENCE = "confidence.json"
Curve = dict[str, list[float]]


def fit(out: Path) -> dict[str, Curve]:
    """The confidence of each set's model, from what was measured on the pairs for fitting; written to OUT.

    Returns:
        the curves of the sets where the Brier score of pairs left out of the fit is lower with than without.
    """
    curves = {}
    rows = [row for row in read_lines(out / RESULTS) if "support" in row]
    for set_name in dict.fromkeys(row["set"] for row in rows):
        own = [row for row in rows if row["set"] == set_name]
        found = [(row["support"], row["agreement"], row["num_matches"]) for row in own]
        measured = np.array([evidence(*one) for one in found])
        right = np.array([r["error"] is not None and r["error"] <= RIGHT for r in own])
        before = brier_score(np.array([confidence(*one) for one in found]), right)
        try:
            curve = fit_confidence(measured, right)
            after = brier_score(held_out(measured, right, np.array([row["pair"] for row in own])), right)
        except KGLMatchError as error:
            print(f"{set_name}: not fitted: {error}")
            continue
        print(
            f"{set_name}: {len(own)} registrations, {right.sum()} within {RIGHT:g} px; Brier score on pairs "
            f"left out {before:.3f} without, {after:.3f} with: {curve if after < before else 'not kept'}"
        )
        if after < before:
            curves[set_name] = curve
    with atomic_output(out / CONFIDENCE) as temporary:
        temporary.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    return curves


def write_into_models(curves: dict[str, Curve], models: dict[str, str]) -> None:
    """Writes the confidence into the config.json of models that are folders."""
    for set_name, curve in curves.items():
        path = Path(models[set_name]) / "config.json"
        if not path.is_file():
            raise KGLMatchError(
                f"--write needs folders of models: there is no {path}; give --models SET=FOLDER"
            )
        config = json.loads(path.read_text(encoding="utf-8"))
        config["inference"]["confidence"] = curve
        with atomic_output(path) as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {path}")


def recalibrated(rows: list[Row], models: dict[str, str]) -> list[Row]:
    """The rows with the confidence that the models give such evidence now, whatever it was when measured."""
    sets = {row["set"] for row in rows}
    curves = {name: load_config(models[name]).inference.get("confidence") for name in sets}

    def again(row: Row) -> Row:
        if "support" not in row:
            return row
        found = confidence(row["support"], row["agreement"], row["num_matches"], curves[row["set"]])
        return {**row, "confidence": round(found, 5)}

    return [again(row) for row in rows]
