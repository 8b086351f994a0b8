"""Shards of patch pairs: every way to store them gives the same scores; resuming, damage, bounded pieces."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import runpy
import sys
import tarfile
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import other_sensor, texture
from thin_network import make_thin, save_thin_model

from kglmatch.cli import main
from kglmatch.errors import DataError, KGLMatchError

pq = pytest.importorskip("pyarrow.parquet", reason="tables need the extra many")
pa = pytest.importorskip("pyarrow")

from kglmatch.batch import Model, Scorer, run_score, score_job  # noqa: E402
from kglmatch.batch.shards import count_pairs, find_shards, read_pieces  # noqa: E402

COUNT, SIZE = 23, 64
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        make_thin(patch)
        yield Model(str(save_thin_model(tmp_path_factory.mktemp("model"))), device="cpu", batch_size=8)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(score_job, "PIECE", 5)


@pytest.fixture(scope="module")
def patches() -> tuple[np.ndarray, np.ndarray]:
    vis = np.stack([texture(SIZE, SIZE, seed) for seed in range(COUNT)])
    ir = np.stack([other_sensor(patch) for patch in vis])
    return tuple(np.rint(side * 255).astype(np.uint8) for side in (vis, ir))


@pytest.fixture(scope="module")
def expected(model, patches) -> np.ndarray:
    return model.load().score(*patches)


def png(patch: np.ndarray) -> bytes:
    return cv2.imencode(".png", patch)[1].tobytes()


def write_parquet(path: Path, patches, kind: str = "bytes", **options) -> Path:
    columns = {"name": [f"pair {i}" for i in range(len(patches[0]))]}
    for name, side in zip(("vis", "ir"), patches, strict=True):
        if kind == "fixed":
            columns[name] = pa.array([patch.tobytes() for patch in side], pa.binary(SIZE * SIZE))
        elif kind == "png":
            columns[name] = [png(patch) for patch in side]
        elif kind == "list":
            columns[name] = pa.array([patch.ravel().tolist() for patch in side], pa.list_(pa.uint8()))
        elif kind == "tensor":
            columns[name] = pa.FixedShapeTensorArray.from_numpy_ndarray(side.astype(np.float32) / 255)
        else:
            columns[name] = [patch.tobytes() for patch in side]
    pq.write_table(pa.table(columns), path, **options)
    return path


def write_tar(path: Path, patches, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for i, pair in enumerate(zip(*patches, strict=True)):
            for side, patch in zip(("vis", "ir"), pair, strict=True):
                data = png(patch)
                member = tarfile.TarInfo(f"set/{i:05}.{side}.png")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def write_npz(path: Path, patches, save=np.savez) -> Path:
    save(path, vis=patches[0], ir=patches[1])
    return path


def rows(out: Path) -> list[dict]:
    return pq.read_table(out / "results.parquet").to_pylist()


@pytest.mark.parametrize("kind", ["bytes", "fixed", "png", "list", "tensor"])
def test_parquet(model, patches, expected, tmp_path, kind):
    shard = write_parquet(tmp_path / "a.parquet", patches, kind, row_group_size=7)
    report = run_score([shard], tmp_path / "out", model=model)
    assert report.complete and report.answered == report.total == COUNT
    found = rows(tmp_path / "out")
    assert [row["name"] for row in found] == [f"pair {i}" for i in range(COUNT)]
    np.testing.assert_allclose([row["score"] for row in found], expected, atol=1e-5)


def test_npz_and_tar(model, patches, expected, tmp_path):
    shards = [
        write_npz(tmp_path / "a.npz", patches),
        write_npz(
            tmp_path / "b.npz", [side.astype(np.float32) / 255 for side in patches], np.savez_compressed
        ),
        write_tar(tmp_path / "c.tar", patches),
        write_tar(tmp_path / "d.tar.gz", patches, "w:gz"),
    ]
    report = run_score(shards, tmp_path / "out", model=model)
    found = rows(tmp_path / "out")
    assert report.complete and report.total == 4 * COUNT == len(found)
    for i, shard in enumerate(shards):
        part = found[i * COUNT : (i + 1) * COUNT]
        assert {row["shard"] for row in part} == {str(shard)}
        np.testing.assert_allclose([row["score"] for row in part], expected, atol=1e-5)
    assert found[0]["name"] == "0" and found[-1]["name"] == f"set/{COUNT - 1:05}"


@pytest.mark.parametrize("write", [write_parquet, write_npz, write_tar])
def test_every_reader_can_skip_pieces(patches, tmp_path, write):
    endings = {write_parquet: "a.parquet", write_npz: "a.npz", write_tar: "a.tar"}
    shard = write(tmp_path / endings[write], patches)
    pieces = list(read_pieces(shard, SIZE, 5))
    assert [len(piece) for piece in pieces] == [5, 5, 5, 5, 3]
    for skip in range(6):
        rest = list(read_pieces(shard, SIZE, 5, skip))
        assert [piece.names for piece in rest] == [piece.names for piece in pieces[skip:]]
        for a, b in zip(rest, pieces[skip:], strict=True):
            assert np.array_equal(a.vis, b.vis) and np.array_equal(a.ir, b.ir)


def test_rows_groups_of_any_size_are_skipped_unread(patches, tmp_path):
    for size in (1, 4, 5, 6, 100):
        shard = write_parquet(tmp_path / f"{size}.parquet", patches, row_group_size=size)
        (piece,) = read_pieces(shard, SIZE, 5, 4)
        assert piece.names == ["pair 20", "pair 21", "pair 22"]


def test_bad_patches_are_rows_with_an_error(model, patches, expected, tmp_path):
    vis, ir = ([patch.tobytes() for patch in side] for side in patches)
    vis[3], ir[4], ir[6], vis[8] = b"no image", png(patches[1][4][:32, :40]), None, b""
    pq.write_table(pa.table({"vis": vis, "ir": ir}), tmp_path / "a.parquet")
    report = run_score([tmp_path / "a.parquet"], tmp_path / "out", model=model)
    assert (report.answered, report.errors, report.complete) == (COUNT - 4, 4, False)
    assert report.first_error.endswith(
        "a.parquet, 3: vis: no image and no pixels, but 8 bytes of something else"
    )
    found = rows(tmp_path / "out")
    bad = {row["name"]: row["error"] for row in found if row["error"]}
    assert list(bad) == ["3", "4", "6", "8"] and "40 x 32 pixels, expected 64 x 64" in bad["4"]
    assert [row["score"] is None for row in found] == [i in (3, 4, 6, 8) for i in range(COUNT)]
    good = [i for i in range(COUNT) if i not in (3, 4, 6, 8)]
    np.testing.assert_allclose([found[i]["score"] for i in good], expected[good], atol=1e-5)


def test_a_damaged_shard_is_a_row_and_is_continued_once_it_is_whole(
    model, patches, expected, tmp_path, capsys
):
    folder, out = tmp_path / "shards", tmp_path / "out"
    folder.mkdir()
    whole = write_tar(folder / "b.tar", patches).read_bytes()
    (folder / "b.tar").write_bytes(whole[: len(whole) // 2])
    write_parquet(folder / "c.parquet", patches)
    (folder / "a.npz").write_bytes(b"PK\3\4")
    command = ["score-many", str(folder), "-o", str(out), "--model", model.name, "--device", "cpu"]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "a.npz" in captured.err and captured.err.count("\n") == 1
    errors = [row for row in rows(out) if row["error"]]
    assert [Path(row["shard"]).name for row in errors] == ["a.npz", "b.tar"]
    done = len(rows(out)) - len(errors) - COUNT
    assert 0 < done < COUNT and done % 5 == 0  # whole pieces

    (folder / "b.tar").write_bytes(whole)
    write_npz(folder / "a.npz", patches)
    assert main([*command, "--dry-run", "--json"]) == 0
    assert main([*command, "--json"]) == 0
    facts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert facts[0]["total"] is None and facts[1]["answered"] == 3 * COUNT
    assert facts[1]["done_before"] == COUNT + done
    np.testing.assert_allclose([row["score"] for row in rows(out)], np.tile(expected, 3), atol=1e-5)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_that_ends_between_two_files_is_truncated(patches, tmp_path, mode):
    """tarfile takes the end of the file for the end of the archive."""
    path = write_tar(tmp_path / "a.tar", patches)
    with tarfile.open(path) as archive:
        # The file of the ir patch of pair 11.
        end = [member.offset for member in archive.getmembers()][2 * 11 + 1]
    content = path.read_bytes()[:end]
    path.write_bytes(gzip.compress(content) if mode == "w:gz" else content)
    names = []
    with pytest.raises(DataError, match=r"a\.tar: the archive is truncated: it lacks the blocks that end it"):
        for piece in read_pieces(path, SIZE, 5):
            names += piece.names
    assert len(names) == 10  # whole pieces: the others are read again once the shard is whole


def test_a_full_disk_is_one_line_and_the_next_run_resumes(model, patches, small_disk, tmp_path, capsys):
    shard = write_parquet(tmp_path / "a.parquet", patches)
    out, ballast = small_disk / "out", small_disk / "ballast"
    command = ["score-many", str(shard), "-o", str(out), "--model", model.name, "--device", "cpu"]
    ballast.write_bytes(bytes(112 << 10))
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "No space left" in captured.err
    ballast.unlink()
    assert not list(out.rglob(".tmp-*"))
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["answered"] == COUNT == len(rows(out)) and facts["done_before"] < COUNT


def test_a_run_that_stops_is_resumed_after_the_last_whole_piece(
    model, patches, expected, tmp_path, monkeypatch
):
    shard, out, scored = write_parquet(tmp_path / "a.parquet", patches), tmp_path / "out", []
    score = Scorer.score

    def count(self, vis, ir, errors):
        scored.append(len(vis))
        if len(scored) == 3:
            raise KeyboardInterrupt
        return score(self, vis, ir, errors)

    monkeypatch.setattr(Scorer, "score", count)
    with pytest.raises(KeyboardInterrupt):
        run_score([shard], out, model=model)
    assert len(rows(out)) == 10
    report = run_score([shard], out, model=model)
    assert scored == [5, 5, 5, 5, 5, 3] and report.done_before == 10 and report.complete
    np.testing.assert_allclose([row["score"] for row in rows(out)], expected, atol=1e-5)
    assert run_score([shard], out, model=model).done_before == COUNT
    # Killed between the last piece and the note that it was the last.
    (out / "parts" / "000000" / "done.json").unlink()
    again = run_score([shard], out, model=model)
    assert again.complete and again.done_before == again.total == COUNT


def test_shards_that_cannot_be_meant(tmp_path, patches):
    with pytest.raises(DataError, match="no shards"):
        find_shards([tmp_path])
    with pytest.raises(DataError, match="is no shard"):
        find_shards([tmp_path / "a.zip"])
    with pytest.raises(DataError, match="given twice"):
        find_shards([tmp_path / "a.tar", tmp_path / "a.tar"])
    assert count_pairs(tmp_path / "none.parquet") is None
    for path, words in (
        ("none.npz", "No such file"),
        ("none.tar", "No such file"),
        ("none.parquet", "none.parquet"),
    ):
        with pytest.raises(DataError, match=words):
            list(read_pieces(tmp_path / path, SIZE, 5))
    np.savez(tmp_path / "a.npz", vis=patches[0])
    with pytest.raises(DataError, match="no column or array 'ir'"):
        list(read_pieces(tmp_path / "a.npz", SIZE, 5))
    np.savez(tmp_path / "b.npz", vis=patches[0], ir=patches[1][:, :32])
    with pytest.raises(DataError, match=r"ir has shape \(23, 32, 64\)"):
        list(read_pieces(tmp_path / "b.npz", SIZE, 5))
    with pytest.raises(KGLMatchError, match="engine"):
        run_score([tmp_path / "a.npz"], tmp_path / "out", engine="spark")


# --- tables ---------------------------------------------------------------------------------------


def test_scorer_takes_and_gives_any_table(model, patches, expected):
    scorer = pickle.loads(pickle.dumps(Scorer(model)))
    raw = [[patch.tobytes() for patch in side] for side in patches]
    arrow = pa.table({"id": list(range(COUNT)), "vis": raw[0], "ir": raw[1]})
    found = scorer(arrow)
    assert found.column_names == ["id", "score", "error"] and found["error"].null_count == COUNT
    np.testing.assert_allclose(found["score"].to_numpy(), expected, atol=1e-5)
    arrays = scorer({"vis": patches[0], "ir": patches[1], "id": np.arange(COUNT)})
    assert list(arrays) == ["id", "score", "error"]
    np.testing.assert_allclose(arrays["score"], expected, atol=1e-5)
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"id": range(COUNT), "vis": raw[0], "ir": [None, *raw[1][1:]]}, index=range(5, 5 + COUNT)
    )
    scored = scorer(frame)
    assert list(scored.columns) == ["id", "score", "error"] and list(scored.index) == list(frame.index)
    assert np.isnan(scored["score"].iloc[0]) and scored["error"].iloc[0] == "ir: the patch is missing"
    np.testing.assert_allclose(scored["score"].iloc[1:], expected[1:], atol=1e-5)
    assert len(scorer(arrow.slice(0, 0))) == 0 and len(scorer(frame.iloc[:0])) == 0
    np.testing.assert_allclose(scorer(arrow.slice(7, 2))["score"].to_numpy(), expected[7:9], atol=1e-5)


def test_scorer_says_what_it_expects(model):
    with pytest.raises(DataError, match="no column 'ir'"):
        Scorer(model)({"vis": np.zeros((1, 64, 64), np.uint8)})
    with pytest.raises(DataError, match="got a list"):
        Scorer(model)([1])
    found = Scorer(model)(
        {"vis": np.full((2, 64, 64), [[[0.5]], [[7]]]), "ir": np.zeros((2, 64, 64), np.uint8)}
    )
    assert found["error"][0] is None and "outside [0, 1]" in found["error"][1]


def test_memory_does_not_grow_with_the_pairs(patches, tmp_path):
    """Of a million pairs in one shard, a piece or two are held."""
    import tracemalloc

    many = np.lib.format.open_memmap(tmp_path / "vis.npy", "w+", np.uint8, (20_000, SIZE, SIZE))
    many[:] = patches[0][0]
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in ("vis", "ir"):
            archive.write(tmp_path / "vis.npy", f"{name}.npy")
    tracemalloc.start()
    assert sum(len(piece) for piece in read_pieces(tmp_path / "a.npz", SIZE, 500)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # of 164 MB


def test_the_example_for_dask(model, patches, expected, tmp_path, monkeypatch):
    dask = pytest.importorskip("dask.dataframe", reason="needs dask[dataframe]")
    (tmp_path / "in").mkdir()
    halves = slice(0, 12), slice(12, None)
    for i, rows in enumerate(halves):
        write_parquet(tmp_path / "in" / f"{i}.parquet", [side[rows] for side in patches], "png")
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--model", model.name]
    monkeypatch.setattr(sys, "argv", ["dask_score.py", *arguments])
    runpy.run_path(str(ROOT / "examples" / "dask_score.py"), run_name="__main__")
    found = dask.read_parquet(tmp_path / "out").compute()
    assert list(found.columns) == ["name", "score", "error"]
    np.testing.assert_allclose(found["score"], expected, atol=1e-5)
