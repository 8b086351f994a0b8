"""Jobs of registration with a network that registers: what is written of each pair."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from conftest import other_sensor, texture
from thin_network import write_folders_of_pairs

from kglmatch.cli import main

pq = pytest.importorskip("pyarrow.parquet", reason="tables need the extra many")

from kglmatch.batch import Model  # noqa: E402

LIMITS = ["--kind", "translation", "--max-displacement", "8"]


@pytest.fixture(autouse=True)
def loaded(matcher, monkeypatch):
    """The bundled model, loaded once for all tests."""
    monkeypatch.setattr("kglmatch.commands.register.load_matcher", lambda args: matcher)
    monkeypatch.setattr(Model, "load", lambda self: matcher)


def test_register_many_fills_holes_as_register_does(tmp_path):
    image = texture(200, 176, 3)
    for name, part in (("vis", image[:, :192]), ("ir", other_sensor(image)[:, 4:196])):
        (tmp_path / name).mkdir()
        pixels = np.rint(50 + part * 200).astype(np.uint8)
        if name == "ir":
            pixels[60:90, 40:80] = 7
        cv2.imwrite(str(tmp_path / name / "a.png"), pixels)
    limits = [*LIMITS, "--nodata", "7"]
    one, many = tmp_path / "one.png", tmp_path / "many"
    images = [str(tmp_path / name / "a.png") for name in ("vis", "ir")]
    assert main(["register", *images, "-o", str(one), *limits]) == 0
    folders = [str(tmp_path / name) for name in ("vis", "ir")]
    assert main(["register-many", *folders, "-o", str(many), "--save", "png", "--workers", "0", *limits]) == 0
    alone, aligned = (cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in (one, many / "aligned" / "a.png"))
    assert np.array_equal(alone, aligned)
    hole = aligned == 7
    assert hole[62:88, 46:82].all() and not hole[56, 40:80].any()
    # Next to the hole nothing mixes with its value.
    assert aligned[~hole].min() >= 45


def test_a_full_disk_is_one_line_and_the_next_run_resumes(small_disk, tmp_path, capsys):
    count = 5
    out, ballast = small_disk / "out", small_disk / "ballast"
    folders = write_folders_of_pairs(tmp_path / "data", count)
    command = [
        "register-many",
        *map(str, folders),
        "-o",
        str(out),
        "--workers",
        "0",
        "--save",
        "png",
        *LIMITS,
    ]
    ballast.write_bytes(bytes(104 << 10))
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "No space left" in captured.err
    ballast.unlink()
    done = len((out / "journal.jsonl").read_bytes().splitlines())
    assert done < count and not list(out.rglob(".tmp-*"))
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done_before"] == done
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert [row["error"] for row in rows] == [None] * count
    assert all((out / row["file"]).is_file() for row in rows if row["verdict"] != "failed")
