"""Jobs on image pairs: tables of results, resuming, folders of other jobs, bad files, full disks, kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from thin_network import make_thin, save_thin_model, write_folders_of_pairs

from kglmatch import KGLMatchError, Matches, Pair
from kglmatch.cli import main
from kglmatch.errors import DataError, OutputError
from kglmatch.options import __version__

pq = pytest.importorskip("pyarrow.parquet", reason="tables need the extra many")
pa = pytest.importorskip("pyarrow")

from kglmatch.batch import (  # noqa: E402
    Model,
    PairList,
    job_folder,
    pairs_of_folders,
    read_pairs,
    run_match,
    run_register,
)
from kglmatch.batch.job_folder import open_job  # noqa: E402
from kglmatch.batch.journal import JOURNAL_FILE  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {"max_keypoints": 8, "min_score": 0.0}
COUNT = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        make_thin(patch)
        yield Model(str(save_thin_model(tmp_path_factory.mktemp("model"))), device="cpu")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return write_folders_of_pairs(tmp_path / "data", COUNT)


def match(pairs, out, model, **options):
    return run_match(pairs, out, model=model, workers=0, **OPTIONS, **options)


def table(out: Path) -> list[dict]:
    return pq.read_table(out / "results.parquet").to_pylist()


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


# --- results and resuming -------------------------------------------------------------------------


def test_a_row_and_a_file_a_pair_as_match_images_gives_them(model, folders, tmp_path):
    report = match(pairs_of_folders(*folders), tmp_path / "out", model, save=".npz")
    assert report.complete and (report.total, report.answered, report.done_before) == (COUNT, COUNT, 0)
    matcher = model.load()
    rows = table(tmp_path / "out")
    assert [row["name"] for row in rows] == [f"{i:04}" for i in range(COUNT)]
    for row in rows:
        alone = matcher.match_images(row["vis"], row["ir"], **OPTIONS)
        saved = Matches.load(tmp_path / "out" / row["file"])
        assert row["error"] is None and row["matches"] == len(alone) == len(saved)
        assert np.array_equal(saved.indices, alone.indices)
        if alone.homography is not None:
            np.testing.assert_allclose(row["homography"], alone.homography.ravel())
        assert 1 < row["keypoints_vis"] <= 8 and row["seconds"] > 0


def test_bad_files_are_rows_and_are_tried_again(model, folders, tmp_path, capsys):
    vis, ir = folders
    whole = (vis / "0001.png").read_bytes()
    (vis / "0001.png").write_bytes(whole[:200])
    small = cv2.resize(cv2.imread(str(ir / "0003.png")), (30, 30))
    large = (ir / "0003.png").read_bytes()
    cv2.imwrite(str(ir / "0003.png"), small)
    out = tmp_path / "out"
    command = ["match-many", str(vis), str(ir), "-o", str(out), "--model", model.name, "--device", "cpu"]
    command += ["--max-keypoints", "8", "--workers", "0"]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "3 of 5 pairs answered" in captured.out and captured.err.count("\n") == 1
    rows = table(out)
    assert [row["error"] is None for row in rows] == [True, False, True, False, True]
    assert "0001.png" in rows[1]["error"] and "smaller than a patch" in rows[3]["error"]
    assert rows[1]["matches"] is None and rows[1]["homography"] is None

    (vis / "0001.png").write_bytes(whole)
    (ir / "0003.png").write_bytes(large)
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["total"], facts["answered"], facts["done_before"], facts["errors"]) == (5, 5, 3, 0)
    assert [row["error"] for row in table(out)] == [None] * 5


def test_what_is_done_is_not_done_again_and_new_pairs_are_added(model, folders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    match(pairs_of_folders(*folders), out, model)
    first = table(out)
    monkeypatch.setattr(Model, "load", lambda self: pytest.fail("the model was loaded for nothing"))
    again = match(pairs_of_folders(*folders), out, model)
    assert again.complete and again.done_before == COUNT and table(out) == first
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        make_thin(patch)
        write_folders_of_pairs(folders[0].parent, COUNT + 1)
        (folders[0] / "0000a.png").write_bytes((folders[0] / "0000.png").read_bytes())
        (folders[1] / "0000a.png").write_bytes((folders[1] / "0000.png").read_bytes())
        more = match(pairs_of_folders(*folders), out, model)
    assert (more.total, more.done_before, more.answered) == (COUNT + 2, COUNT, COUNT + 2)
    names = [row["name"] for row in table(out)]
    assert names == ["0000", "0000a", "0001", "0002", "0003", "0004", "0005"]


def test_a_torn_and_a_damaged_line_cost_their_pairs_alone(model, folders, tmp_path):
    out, pairs = tmp_path / "out", pairs_of_folders(*folders)
    match(pairs, out, model)
    before = without_seconds(table(out))
    lines = (out / JOURNAL_FILE).read_bytes().splitlines(keepends=True)
    (out / JOURNAL_FILE).write_bytes(lines[0] + b"\0" * 40 + b"\n" + lines[2] + lines[3] + lines[4][:30])
    report = match(pairs, out, model)
    assert report.done_before == 3 and report.complete
    assert without_seconds(table(out)) == before


def test_nothing_to_do(model, tmp_path):
    report = match(PairList([], []), tmp_path / "out", model)
    assert report.complete and report.total == 0 and table(tmp_path / "out") == []


# --- whose folder it is ---------------------------------------------------------------------------


def test_another_job_and_other_files_are_errors_and_nothing_is_overwritten(model, folders, tmp_path):
    out, pairs = tmp_path / "out", pairs_of_folders(*folders)
    match(pairs, out, model)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=r"another job, whose min_score is 0\.0, not 0\.5"):
        run_match(pairs, out, model=model, max_keypoints=8, min_score=0.5)
    with pytest.raises(OutputError, match='another job, whose job is "match", not "register"'):
        run_register(pairs, out, model=model)
    with pytest.raises(OutputError, match="another job, whose model"):
        match(pairs, out, Model())
    moved = [Pair(pair.ir, pair.vis, pair.name) for pair in pairs]
    with pytest.raises(OutputError, match="results of other pairs"):
        match(moved, out, model)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    with pytest.raises(OutputError, match=r"other files \(ir\)"):
        match(pairs, folders[0].parent, model)
    with pytest.raises(OutputError, match="is a file"):
        match(pairs, folders[0] / "0000.png", model)


def test_two_runs_at_once(model, folders, tmp_path):
    pairs, out = pairs_of_folders(*folders), tmp_path / "out"
    match(pairs, out, model)
    identity = json.loads((out / "job.json").read_text())
    del identity["format"], identity["kglmatch_versions"]
    with open_job(out, identity), pytest.raises(OutputError, match=f"another run .process {os.getpid()} on"):
        match(pairs, out, model)
    assert match(pairs, out, model).complete


def test_an_upgrade_resumes_the_job_and_says_so(model, folders, tmp_path, monkeypatch, capsys, caplog):
    out = tmp_path / "out"
    (folders[0] / "0002.png").rename(tmp_path / "0002.png")
    (folders[0] / "0002.png").write_bytes(b"damaged")
    monkeypatch.setattr(job_folder, "__version__", "0.0.1")
    assert match(pairs_of_folders(*folders), out, model).answered == COUNT - 1
    before = without_seconds(table(out))
    monkeypatch.undo()
    (tmp_path / "0002.png").replace(folders[0] / "0002.png")
    with pytest.MonkeyPatch.context() as patch:
        make_thin(patch)
        report = match(pairs_of_folders(*folders), out, model)
        assert report.complete and report.done_before == COUNT - 1
        assert [r.message for r in caplog.records if "begun by kglmatch 0.0.1;" in r.message]
        after = without_seconds(table(out))
        assert [row for row in after if row["name"] != "0002"] == [r for r in before if r["name"] != "0002"]
        assert json.loads((out / "job.json").read_text())["kglmatch_versions"] == ["0.0.1", __version__]
        # A folder whose form changed is refused.
        monkeypatch.setattr(job_folder, "JOB_FORMAT", 2)
        with pytest.raises(OutputError, match="whose format is 1, not 2"):
            match(pairs_of_folders(*folders), out, model)


def test_what_killed_runs_left_half_written_goes(model, folders, tmp_path):
    out = tmp_path / "out"
    match(pairs_of_folders(*folders), out, model, save=".csv")
    (out / "matches" / "deeper").mkdir()
    for place in (out, out / "matches", out / "matches" / "deeper"):
        (place / ".tmp-0123").write_bytes(b"half")
    match(pairs_of_folders(*folders), out, model, save=".csv")
    assert not list(out.rglob(".tmp-*"))


def test_dry_run_writes_nothing(model, folders, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["match-many", *map(str, folders), "-o", str(out), "--model", model.name, "--dry-run"]
    assert main(command) == 0 and not out.exists()
    assert "would work on 5 of 5 pairs" in capsys.readouterr().out
    assert main(["register-many", *command[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pending"] == 5


# --- a full disk ----------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_the_next_run_resumes(model, folders, small_disk, capsys):
    out, ballast = small_disk / "out", small_disk / "ballast"
    command = ["match-many", *map(str, folders), "-o", str(out), "--model", model.name, "--device", "cpu"]
    command += ["--max-keypoints", "40", "--min-score", "0", "--workers", "0", "--save", "csv"]
    ballast.write_bytes(bytes(104 << 10))
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "No space left" in captured.err
    ballast.unlink()
    done = len((out / JOURNAL_FILE).read_bytes().splitlines())
    assert done < COUNT and not list(out.rglob(".tmp-*"))
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done_before"] == done
    assert [row["error"] for row in table(out)] == [None] * COUNT


# --- kills ----------------------------------------------------------------------------------------


def start(command: str, folders, out, model, *more) -> subprocess.Popen:
    return subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "tests" / "thin_network.py"), command, *map(str, folders)),
            *("-o", str(out), "--model", model.name, "--device", "cpu", "--workers", "1", *more),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def lines(out: Path) -> int:
    try:
        return (out / JOURNAL_FILE).read_bytes().count(b"\n")
    except OSError:
        return 0


def wait_for_lines(process: subprocess.Popen, out: Path, count: int) -> None:
    while process.poll() is None and lines(out) < count:
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("match-many", ("--max-keypoints", "8", "--min-score", "0", "--save", "npz")),
        ("register-many", ("--kind", "translation", "--max-displacement", "4", "--save", "png")),
    ],
)
def test_killed_at_random_moments_nothing_is_lost_and_nothing_twice(command, more, model, tmp_path):
    count = 12
    folders = write_folders_of_pairs(tmp_path / "data", count)
    rng, out = random.Random(command), tmp_path / "out"
    for _ in range(2):
        process, at = start(command, folders, out, model, *more), lines(out) + rng.randint(0, 3)
        wait_for_lines(process, out, at)
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.communicate()
    process = start(command, folders, out, model, *more, "--json")
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["answered"] == count
    rows = table(out)
    assert [row["name"] for row in rows] == [f"{i:04}" for i in range(count)]
    assert [row["error"] for row in rows] == [None] * count and not list(out.rglob(".tmp-*"))
    # Every pair was worked on once: a kill costs no line.
    assert lines(out) == count
    clean = tmp_path / "clean"
    process = start(command, folders, clean, model, *more)
    assert process.wait() == 0
    assert without_seconds(table(clean)) == without_seconds(rows)
    for row in rows:
        if row["file"] is not None:
            assert (clean / row["file"]).stat().st_size == (out / row["file"]).stat().st_size


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_with_a_table(model, tmp_path):
    folders = write_folders_of_pairs(tmp_path / "data", 30)
    out = tmp_path / "out"
    process = start("match-many", folders, out, model, "--max-keypoints", "30")
    wait_for_lines(process, out, 2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    if process.returncode != 0:  # else it was done before
        assert process.returncode == 130 and stderr == "kglmatch: interrupted\n"
    assert len(table(out)) == lines(out) >= 2


# --- registration ---------------------------------------------------------------------------------


def test_register_many_writes_verdicts_and_aligned_images(model, tmp_path):
    folders = write_folders_of_pairs(tmp_path / "data", 2, (128, 112))
    (folders[0] / "0002.png").write_bytes(b"")
    (folders[1] / "0002.png").write_bytes(b"")
    out = tmp_path / "out"
    limits = {"kind": "translation", "max_displacement": 4.0}
    report = run_register(pairs_of_folders(*folders), out, model=model, save=".tif", workers=0, **limits)
    assert (report.answered, report.errors) == (2, 1) and "0002.png" in report.first_error
    matcher = model.load()
    for row in table(out)[:2]:
        alone = matcher.register(row["vis"], row["ir"], **limits)
        assert row["verdict"] == alone.verdict and row["inliers"] == int(alone.inliers.sum())
        assert (row["file"] is None) == (alone.transform is None)
        if alone.transform is not None:
            np.testing.assert_allclose(np.reshape(row["transform"], (3, 3)), alone.transform)
            aligned = cv2.imread(str(out / row["file"]), cv2.IMREAD_UNCHANGED)
            expected = alone.warp(cv2.imread(row["ir"], cv2.IMREAD_UNCHANGED))
            assert np.array_equal(aligned, expected)


# --- lists of pairs -------------------------------------------------------------------------------


def test_lists_of_pairs(tmp_path):
    (tmp_path / "list.csv").write_text("name,ir,vis\na,x/1.tif,y/1.png\nb,x/2.tif,y/2.png\n")
    pairs = read_pairs(tmp_path / "list.csv")
    assert len(pairs) == 2 and [pair.name for pair in pairs] == ["a", "b"]
    assert pairs[1].vis == str(tmp_path / "y" / "2.png") and pairs[1].ir == str(tmp_path / "x" / "2.tif")
    pq.write_table(
        pa.table({"vis": ["y/1.png", "z/1.png"], "ir": ["1.tif", "2.tif"]}), tmp_path / "l.parquet"
    )
    assert [pair.name for pair in read_pairs(tmp_path / "l.parquet")] == ["0_1", "1_1"]
    assert len(read_pairs(tmp_path / "l.parquet")[0:1]) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vis,nir\na,b\n", "no column 'ir'"),
        ("vis,ir\na\n", "column 'ir' has no text in row 0"),
        ("vis,ir,name\na,b,c\nd,e,c\n", "two pairs are called 'c'"),
        ("vis,ir,name\na,b,../c\n", "cannot be the name"),
        ("", "no column 'vis'"),
        ("vis,ir\n\xff,b\n", "cannot read"),
    ],
)
def test_a_wrong_list_is_one_line(tmp_path, text, words):
    (tmp_path / "list.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=words):
        read_pairs(tmp_path / "list.csv")


def test_folders_and_files_that_hold_no_pairs(tmp_path, folders):
    with pytest.raises(DataError, match="cannot read"):
        pairs_of_folders(tmp_path / "none", folders[1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file name in common"):
        pairs_of_folders(folders[0], tmp_path / "empty")
    with pytest.raises(DataError, match="must end in"):
        read_pairs(tmp_path / "list.txt")
    (tmp_path / "list.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot read"):
        read_pairs(tmp_path / "list.parquet")
    (folders[0] / "0000.tif").touch()
    with pytest.raises(DataError, match="which one is meant"):
        pairs_of_folders(*folders)
    with pytest.raises(KGLMatchError, match="as many"):
        PairList(["a"], [])


def test_one_folder_alone_is_a_mistake(folders, tmp_path, capsys):
    assert main(["match-many", str(folders[0]), "-o", str(tmp_path / "out")]) == 2
    assert "second folder" in capsys.readouterr().err
