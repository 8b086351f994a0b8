"""`rig apply` and `apply`: pixels, names, metadata; jobs that resume, and folders that are left alone."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from conftest import texture
from PIL import Image

from kglmatch.batch import rig_apply
from kglmatch.batch.captures import Capture, find_captures
from kglmatch.batch.rig_apply import apply_rig, common_area, in_order
from kglmatch.batch.rig_files import write_bands
from kglmatch.batch.rig_results import Rig, RigBand
from kglmatch.batch.transforms import apply_transform, read_saved_transform
from kglmatch.cli import main
from kglmatch.errors import DataError, ImageError, KGLMatchError, OutputError
from kglmatch.registration.files import read_map_frame

SIZE = 96, 80
SHIFTS = {"2": (3, -2), "3": (-5, 4)}


def shift(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])


def band(name: str, transform, verdict="registered", size=SIZE) -> RigBand:
    return RigBand(
        name=name, size=size, verdict=verdict, confidence=0.9, transform=transform, kind="similarity",
        via=None, reason="the reason", num_captures=1, num_judged=1, num_agreeing=1, spread=0.1, support=1.0,
        agreement=1.0, num_matches=0, consistent=1.0,
    )  # fmt: skip


def rig_of(*bands: RigBand) -> Rig:
    return Rig("1", SIZE, bands, 1.0, "a model", 1, {})


RIG = rig_of(*(band(name, shift(*at)) for name, at in SHIFTS.items()))


def pixels(number: int, dtype=np.uint16) -> np.ndarray:
    return (texture(*SIZE, number) * 60_000).astype(dtype)


@pytest.fixture
def flight(tmp_path: Path) -> Path:
    """Six captures of three bands, 16 bits, with metadata in the reference."""
    folder = tmp_path / "flight"
    folder.mkdir()
    for i in range(6):
        for name in "123":
            xmp = b"<x:height>12</x:height>"
            tifffile.imwrite(
                folder / f"IMG_{i:04}_{name}.tif",
                pixels(10 * i + int(name)),
                description=f"capture {i} of band {name}",
                datetime="2024:05:01 12:00:00",
                extratags=[(271, "s", 0, "Maker", True), (700, "B", len(xmp), xmp, True)],
                metadata=None,
            )
    return folder


def test_stacks_hold_all_bands_exactly(flight, tmp_path):
    done = apply_rig(RIG, flight, tmp_path / "out", workers=2, nodata=7)
    assert len(done.written) == 6 and not done.present and not done.problems
    with tifffile.TiffFile(tmp_path / "out" / "IMG_0003.tif") as file:
        stack, tags = file.asarray(), file.pages.first.tags
        assert stack.shape == (3, 80, 96) and stack.dtype == np.uint16
        assert 'sample="2" role="description">3<' in tags[42112].value
        assert tags["Make"].value == "Maker" and tags["ImageDescription"].value == "capture 3 of band 1"
        assert tags["DateTime"].value == "2024:05:01 12:00:00" and b"height" in bytes(tags[700].value)
        assert tags[42113].value == "7"
    assert (stack[0] == pixels(31)).all()
    assert (stack[1][2:, :-3] == pixels(32)[:-2, 3:]).all() and (stack[1][:2] == 7).all()
    assert (stack[2][:-4, 5:] == pixels(33)[4:, :-5]).all() and (stack[2][:, :5] == 7).all()


def test_single_files_keep_their_own_metadata_and_types(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x829A] = 0.002  # exposure time
    exif.get_ifd(0x8825)[1] = "N"
    exif.get_ifd(0x8825)[2] = (47.0, 30.0, 1.5)
    for name in ("A_1.jpg", "A_2.jpg"):
        Image.fromarray((texture(*SIZE, 3) * 255).astype(np.uint8)).save(tmp_path / name, exif=exif)
    rig = rig_of(band("2", np.eye(3)))
    captures = [Capture("flight/A", {"1": tmp_path / "A_1.jpg", "2": tmp_path / "A_2.jpg"})]
    done = apply_rig(rig, captures, tmp_path / "out", stack=False, bands=["2"])
    assert done.written == ("flight/A",)
    for name in "12":
        with Image.open(tmp_path / "out" / "flight" / f"A_{name}.tif") as image:
            assert image.getexif().get_ifd(0x8769)[0x829A] == pytest.approx(0.002)
            assert image.getexif().get_ifd(0x8825)[2] == (47.0, 30.0, 1.5)
            assert (np.asarray(image) == cv2.imread(str(tmp_path / f"A_{name}.jpg"), -1)).all()


# Of EPSG 32633, and its pixels are areas.
KEYS = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633)
PLACED = [
    [(33550, "d", 3, (2.0, 2.0, 0.0), True), (33922, "d", 6, (0.0, 0, 0, 500_000, 5_000_000, 0), True)],
    [(34264, "d", 16, (1.6, 1.2, 0, 500_000, 1.2, -1.6, 0, 5_000_000, *(0.0,) * 7, 1), True)],
]


@pytest.mark.parametrize("placed", PLACED, ids=["scale", "matrix"])
@pytest.mark.parametrize("stack", [True, False])
def test_outputs_are_on_the_map_of_the_reference(tmp_path, placed, stack):
    tags = [*placed, (34735, "H", len(KEYS), KEYS, True)]
    tifffile.imwrite(tmp_path / "A_1.tif", pixels(1), extratags=tags, metadata=None)
    tifffile.imwrite(tmp_path / "A_2.tif", pixels(2), metadata=None)
    captures = [Capture("A", {"1": tmp_path / "A_1.tif", "2": tmp_path / "A_2.tif"})]
    rig = rig_of(band("2", shift(-5, -3)))
    reference = read_map_frame(tmp_path / "A_1.tif")
    for crop in (False, True):
        out = tmp_path / f"out-{crop}"
        done = apply_rig(rig, captures, out, stack=stack, crop=crop)
        assert done.crop[:2] == ((5, 3) if crop else (0, 0))
        for path in out.glob("*.tif"):
            frame = read_map_frame(path)
            assert frame.epsg == reference.epsg == 32633
            first = reference.matrix @ [*done.crop[:2], 1]
            np.testing.assert_allclose(frame.matrix @ [0, 0, 1], first)
            np.testing.assert_allclose(frame.matrix[:, :2], reference.matrix[:, :2])
    assert len(list((tmp_path / "out-True").glob("*.tif"))) == (1 if stack else 2)


def test_a_damaged_georeference_costs_its_capture(tmp_path, flight):
    damaged = [(34735, "H", 3, (1, 1, 0), True)]
    tifffile.imwrite(flight / "IMG_0002_1.tif", pixels(21), extratags=damaged, metadata=None)
    done = apply_rig(RIG, flight, tmp_path / "out")
    assert len(done.written) == 5 and "cannot read the georeference" in done.problems["IMG_0002"]


def test_items_of_gdal_stay_with_their_bands(tmp_path):
    captures = {}
    for name, wavelength in (("1", 475), ("2", 842)):
        items = (
            '<Item name="CAMERA">A &amp; B</Item>'
            f'<Item name="WAVELENGTH">{wavelength}</Item>'
            '<Item name="OFFSET" sample="0" role="offset">0.5</Item>'
            '<Item name="DESCRIPTION" sample="0" role="description">old</Item>'
            '<Item name="STATISTICS_MEAN" sample="0">7</Item>'
        )
        tags = [(42112, "s", 0, f"<GDALMetadata>{items}</GDALMetadata>", True)]
        captures[name] = tmp_path / f"A_{name}.tif"
        tifffile.imwrite(captures[name], pixels(int(name)), extratags=tags, metadata=None)
    rig = rig_of(band("2", np.eye(3)))
    for stack in (True, False):
        apply_rig(rig, [Capture("A", captures)], tmp_path / f"out-{stack}", stack=stack)
    with tifffile.TiffFile(tmp_path / "out-True" / "A.tif") as file:
        assert file.pages.first.tags[42112].value == (
            '<GDALMetadata><Item name="CAMERA">A &amp; B</Item>'
            '<Item name="DESCRIPTION" sample="0" role="description">1</Item>'
            '<Item name="WAVELENGTH" sample="0">475</Item>'
            '<Item name="OFFSET" sample="0" role="offset">0.5</Item>'
            '<Item name="DESCRIPTION" sample="1" role="description">2</Item>'
            '<Item name="WAVELENGTH" sample="1">842</Item>'
            '<Item name="OFFSET" sample="1" role="offset">0.5</Item>'
            "</GDALMetadata>"
        )
    with tifffile.TiffFile(tmp_path / "out-False" / "A_2.tif") as file:
        assert '<Item name="WAVELENGTH">842</Item>' in file.pages.first.tags[42112].value


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int32", "float32", "float64"])
def test_bands_of_any_type_and_number_come_back(tmp_path, dtype):
    rng = np.random.default_rng(0)
    bands = [(rng.random((20, 30)) * 200).astype(dtype) for _ in range(7)]
    write_bands(tmp_path / "stack.tif", bands, list("abcdefg"))
    assert (tifffile.imread(tmp_path / "stack.tif") == np.stack(bands)).all()
    write_bands(tmp_path / "one.tif", bands[:1], ["a"])
    assert (tifffile.imread(tmp_path / "one.tif") == bands[0]).all()


def test_bands_of_different_types_become_pages(tmp_path):
    bands = [
        np.full((9, 8), 300, np.uint16),
        np.full((9, 8), 0.5, np.float32),
        np.full((9, 8, 3), 5, np.uint8),
    ]
    write_bands(tmp_path / "stack.tif", [*bands, np.ones((9, 8), bool)], ["a", "b", "c", "d"])
    with tifffile.TiffFile(tmp_path / "stack.tif") as file:
        assert [page.tags["PageName"].value for page in file.pages] == ["a", "b", "c", "d"]
        for page, wanted in zip(file.pages, [*bands, np.full((9, 8), 255, np.uint8)], strict=True):
            assert page.asarray().dtype == wanted.dtype and (page.asarray() == wanted).all()
    with pytest.raises(ImageError, match="complex64"):
        write_bands(tmp_path / "stack.tif", [np.zeros((3, 3), np.complex64)], ["a"])


def test_crop_leaves_what_all_bands_cover(flight, tmp_path):
    assert common_area(RIG, RIG.bands) == (5, 2, 88, 74)
    done = apply_rig(RIG, flight, tmp_path / "out", crop=True)
    assert done.crop == (5, 2, 88, 74)
    stack = tifffile.imread(tmp_path / "out" / "IMG_0000.tif")
    assert stack.shape == (3, 74, 88)
    assert (stack[0] == pixels(1)[2:76, 5:93]).all() and (stack[2] == pixels(3)[6:80, 0:88]).all()
    with pytest.raises(KGLMatchError, match="in common"):
        common_area(rig_of(band("2", shift(500, 0))), [band("2", shift(500, 0))])


def test_pixels_without_data_stay_apart(tmp_path):
    image = pixels(1)
    image[30:40, 30:40] = 7
    rig = rig_of(band("2", shift(0.5, 0)))
    captures = [Capture("a", {"1": image, "2": image})]
    apply_rig(rig, captures, tmp_path / "out", nodata=7)
    moved = tifffile.imread(tmp_path / "out" / "a.tif")[1]
    assert (moved[30:40, 29:40] == 7).all() and (moved[:, -1] == 7).all()
    whole = pixels(1)
    assert moved[35, 25] in range(int(whole[35, 24:28].min()) - 3000, int(whole[35, 24:28].max()) + 3000)
    assert np.count_nonzero(moved == 7) == 10 * 11 + SIZE[1]
    with pytest.raises(KGLMatchError, match="nodata 70000 is no uint16"):
        apply_rig(rig, captures, tmp_path / "other", nodata=70000)
    assert not (tmp_path / "other").exists()


def test_refine_follows_a_capture_that_moved(tmp_path):
    image = texture(260, 220, 1)

    def seen(x: int) -> np.ndarray:
        return np.rint(image[10:200, 20 - x : 240 - x] * 255).astype(np.uint8)

    rig = Rig("1", (220, 190), (band("2", shift(3, 0), "varies", (220, 190)),), 1.0, "", 1, {})
    captures = [Capture("as", {"1": seen(0), "2": seen(3)}), Capture("moved", {"1": seen(0), "2": seen(5)})]
    with pytest.raises(KGLMatchError, match="refine each capture"):
        apply_rig(rig, captures, tmp_path / "out")
    done = apply_rig(rig, captures, tmp_path / "out", refine=True)
    assert "moved" in done.refined and not done.problems
    stack = tifffile.imread(tmp_path / "out" / "moved.tif").astype(int)
    assert np.abs(stack[0] - stack[1])[20:-20, 20:-20].mean() < 3
    log = [json.loads(line) for line in (tmp_path / "out" / "captures.jsonl").read_text().splitlines()]
    assert [line["capture"] for line in log] == ["as", "moved"]
    assert log[1]["refined"]["2"][0][2] == pytest.approx(5, abs=0.3)


def test_bad_captures_cost_a_line_each_and_the_rest_is_written(flight, tmp_path):
    (flight / "IMG_0001_2.tif").write_bytes((flight / "IMG_0001_2.tif").read_bytes()[:900])
    (flight / "IMG_0002_3.tif").unlink()
    tifffile.imwrite(flight / "IMG_0003_1.tif", np.zeros((40, 40), np.uint16))
    (flight / "IMG_0004_1.tif").write_bytes(b"")
    done = apply_rig(RIG, flight, tmp_path / "out")
    assert set(done.problems) == {f"IMG_000{i}" for i in (1, 2, 3, 4)} and len(done.written) == 2
    assert done.problems["IMG_0002"] == "has no band 3"
    assert "is 40 x 40, the rig's band 1 is 96 x 80" in done.problems["IMG_0003"]
    assert all("\n" not in text for text in done.problems.values())
    tifffile.imwrite(flight / "IMG_0003_1.tif", pixels(31))
    again = apply_rig(RIG, flight, tmp_path / "out")
    assert again.written == ("IMG_0003",) and len(again.present) == 2 and len(again.problems) == 3


def test_a_rig_of_another_camera_is_one_line(flight, tmp_path):
    other = Rig("1", (100, 80), (band("2", np.eye(3)),), 1.0, "", 1, {})
    with pytest.raises(DataError, match="another camera: band 1 is 96 x 80, the rig's is 100 x 80"):
        apply_rig(other, flight, tmp_path / "out")
    with pytest.raises(DataError, match="no capture has band 9"):
        apply_rig(rig_of(band("9", np.eye(3))), flight, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("verdict", "words"),
    [("failed", "leave it out"), ("doubtful", "force it"), ("varies", "refine each capture")],
)
def test_bands_that_do_not_hold_are_refused(flight, tmp_path, verdict, words):
    transform = None if verdict == "failed" else np.eye(3)
    rig = rig_of(band("2", np.eye(3)), band("3", transform, verdict))
    with pytest.raises(KGLMatchError, match=f"band 3 .*the reason.*{words}"):
        apply_rig(rig, flight, tmp_path / "out")
    assert apply_rig(rig, flight, tmp_path / "out", bands=["2"]).written
    if transform is not None:
        assert apply_rig(rig, flight, tmp_path / "forced", force=True).written
    for wrong in ([], ["2", "2"], ["7"]):
        with pytest.raises(KGLMatchError):
            apply_rig(rig, flight, tmp_path / "out", bands=wrong)


def test_the_folder_of_another_job_is_left_alone(flight, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"other files \(mine.txt\)"):
        apply_rig(RIG, flight, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    apply_rig(RIG, flight, tmp_path / "job")
    before = (tmp_path / "job" / "IMG_0000.tif").read_bytes()
    for options in ({"crop": True}, {"bands": ["3"]}, {"nodata": 3}):
        with pytest.raises(OutputError, match="another job"):
            apply_rig(RIG, flight, tmp_path / "job", **options)
    assert (tmp_path / "job" / "IMG_0000.tif").read_bytes() == before
    with pytest.raises(OutputError, match="within the captures"):
        apply_rig(RIG, flight, flight / "out")


def test_a_second_run_on_one_folder_is_refused(flight, tmp_path, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    whole = rig_apply.write_bands

    def slow(*arguments, **options):
        begun.set()
        go_on.wait(60)
        whole(*arguments, **options)

    monkeypatch.setattr(rig_apply, "write_bands", slow)
    first = threading.Thread(target=apply_rig, args=(RIG, flight, tmp_path / "out"))
    first.start()
    assert begun.wait(60)
    with pytest.raises(OutputError, match="in use by another run"):
        apply_rig(RIG, flight, tmp_path / "out")
    go_on.set()
    first.join()
    assert len(apply_rig(RIG, flight, tmp_path / "out").present) == 6


def test_a_full_disk_is_one_line_and_the_job_resumes(flight, tmp_path, monkeypatch):
    import errno

    whole, calls = tifffile.TiffWriter.write, []

    def full(self, *arguments, **options):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, *arguments, **options)

    monkeypatch.setattr(tifffile.TiffWriter, "write", full)
    with pytest.raises(OutputError, match="No space left"):
        apply_rig(RIG, flight, tmp_path / "out", workers=1)
    monkeypatch.undo()
    assert len(list((tmp_path / "out").glob("*.tif"))) == 2 and not list((tmp_path / "out").glob(".tmp-*"))
    again = apply_rig(RIG, flight, tmp_path / "out")
    assert len(again.written) == 4 and len(again.present) == 2


def test_a_full_disk_is_one_line_of_the_command(flight, small_disk, tmp_path, capsys):
    RIG.save(tmp_path / "rig.json")
    out = small_disk / "out"
    (small_disk / "ballast").write_bytes(bytes(64 << 10))
    assert main(["rig", "apply", str(tmp_path / "rig.json"), str(flight), "-o", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "No space left" in captured.err
    assert not list(out.rglob(".tmp-*"))
    whole = [path for path in out.glob("IMG*.tif") if tifffile.imread(path).shape == (3, 80, 96)]
    assert len(whole) == len(list(out.glob("IMG*.tif"))) < 6


def test_what_a_capture_holds_does_not_end_the_job(flight, tmp_path, monkeypatch):
    whole = rig_apply.write_bands

    def odd(path, *arguments, **options):
        if path.stem == "IMG_0002":
            raise OutputError("cannot write it: a value that TIFF does not hold")
        if path.stem == "IMG_0004":
            raise MemoryError
        whole(path, *arguments, **options)

    monkeypatch.setattr(rig_apply, "write_bands", odd)
    done = apply_rig(RIG, flight, tmp_path / "out")
    assert len(done.written) == 4 and done.problems["IMG_0004"] == "out of memory"
    assert "TIFF does not hold" in done.problems["IMG_0002"]


def test_an_upgrade_resumes(flight, tmp_path, monkeypatch, caplog):
    RIG.save(tmp_path / "rig.json")
    captures = find_captures(flight)
    monkeypatch.setattr("kglmatch.batch.job_folder.__version__", "0.0.1")
    monkeypatch.setattr("kglmatch.batch.rig_results.__version__", "0.0.1")
    apply_rig(Rig.load(tmp_path / "rig.json"), captures[:4], tmp_path / "out")
    monkeypatch.undo()
    done = apply_rig(Rig.load(tmp_path / "rig.json"), captures, tmp_path / "out")
    assert len(done.present) == 4 and len(done.written) == 2
    assert "begun by kglmatch 0.0.1" in caplog.text


def test_a_killed_run_resumes_and_loses_nothing(flight, tmp_path):
    RIG.save(tmp_path / "rig.json")
    arguments = ["rig", "apply", str(tmp_path / "rig.json"), str(flight), "-o", str(tmp_path / "out")]
    # Writes half of its third output, and dies in it.
    code = (
        "import os, signal, sys, tifffile\n"
        "from kglmatch.cli import main\n"
        "whole, calls = tifffile.TiffWriter.write, []\n"
        "def write(self, pixels, **options):\n"
        "    calls.append(1)\n"
        "    whole(self, pixels, **options)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "tifffile.TiffWriter.write = write\n"
        "main(sys.argv[1:])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, *arguments, "--workers", "1"], check=False)
    assert ended.returncode == -9
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert sum(name.startswith("IMG") for name in names) == 2 and any(n.startswith(".tmp-") for n in names)
    with (tmp_path / "out" / "captures.jsonl").open("a") as log:
        log.write('{"capture": "IMG_00')  # a line that was cut off
    assert main(arguments) == 0
    whole = apply_rig(RIG, flight, tmp_path / "whole")
    for name in whole.written:
        assert (tmp_path / "out" / f"{name}.tif").read_bytes() == (
            tmp_path / "whole" / f"{name}.tif"
        ).read_bytes()
    assert not list((tmp_path / "out").glob(".tmp-*"))
    log = [json.loads(line) for line in (tmp_path / "out" / "captures.jsonl").read_text().splitlines()]
    assert [line["capture"] for line in log] == list(whole.written)


def test_the_command_reports_and_resumes(flight, tmp_path, capsys):
    RIG.save(tmp_path / "rig.json")
    (flight / "IMG_0005_2.tif").unlink()
    command = ["rig", "apply", str(tmp_path / "rig.json"), str(flight), "-o", str(tmp_path / "out")]
    assert main([*command, "--json"]) == 1
    out = capsys.readouterr()
    assert json.loads(out.out)["num_written"] == 5 and "IMG_0005: has no band 2" in out.err
    assert main(command) == 1
    assert "0 captures written" in capsys.readouterr().out
    assert main([*command, "--crop"]) == 2
    assert "another job" in capsys.readouterr().err
    assert main(["rig", "apply", str(flight / "IMG_0000_1.tif"), str(flight), "-o", str(tmp_path / "o")]) == 2
    assert "no JSON" in capsys.readouterr().err


def test_no_more_than_wanted_are_begun_at_a_time():
    from concurrent.futures import ThreadPoolExecutor

    taken = []

    def items():
        for i in range(50):
            taken.append(i)
            yield i

    with ThreadPoolExecutor(2) as threads:
        for number, (item, result) in enumerate(in_order(threads, lambda i: i * i, items(), 4)):
            assert item == number and result == number**2
            assert len(taken) <= number + 5
            time.sleep(0.001)
    assert len(taken) == 50


# --- apply ---------------------------------------------------------------------------------------


def saved(folder: Path, **change) -> Path:
    value = {"transform": shift(4, -2).tolist(), "vis_size": [96, 80], "ir_size": [96, 80], **change}
    (folder / "transform.json").write_text(json.dumps(value))
    return folder / "transform.json"


def test_apply_warps_what_was_registered(tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "image.tif"), pixels(1))
    command = ["apply", str(saved(tmp_path)), str(tmp_path / "image.tif"), "-o", str(tmp_path / "out.tif")]
    assert main([*command, "--nodata", "9"]) == 0 and "96 x 80" in capsys.readouterr().out
    warped = cv2.imread(str(tmp_path / "out.tif"), cv2.IMREAD_UNCHANGED)
    assert warped.dtype == np.uint16 and (warped[2:, :-4] == pixels(1)[:-2, 4:]).all()
    assert (warped[:2] == 9).all()


def test_apply_takes_care_of_the_resolution(tmp_path):
    image = texture(192, 160, 2)
    small = cv2.resize(image, (96, 80), interpolation=cv2.INTER_AREA)
    found = read_saved_transform(saved(tmp_path))
    full = apply_transform(found, image)
    assert full.shape == (160, 192)
    assert np.abs(full[4:, :-8] - image[:-4, 8:]).max() < 1e-5
    as_vis = apply_transform(found, image, size=(96, 80))
    expected = apply_transform(found, small)
    assert as_vis.shape == (80, 96) and np.abs(as_vis - expected)[4:, :-8].mean() < 0.03
    with pytest.raises(ImageError, match="proportions"):
        apply_transform(found, image[:120])


def test_apply_takes_a_band_of_a_rig(tmp_path):
    RIG.save(tmp_path / "rig.json")
    found = read_saved_transform(tmp_path / "rig.json", "3")
    assert (found.transform == shift(-5, 4)).all() and found.vis_size == SIZE == found.ir_size
    with pytest.raises(DataError, match="bands 2, 3: name the band"):
        read_saved_transform(tmp_path / "rig.json")
    with pytest.raises(DataError, match="no band '7'"):
        read_saved_transform(tmp_path / "rig.json", "7")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transform": None}, "failed"),
        ({"transform": [[1, 0], [0, 1]]}, "3 x 3"),
        ({"vis_size": [0, 5]}, "whole numbers"),
        ({"bands": []}, "none"),
    ],
)
def test_what_holds_no_transform_is_one_line(tmp_path, change, words):
    with pytest.raises(DataError, match=words):
        read_saved_transform(saved(tmp_path, **change))


def test_apply_of_what_register_saved(tmp_path, matcher, monkeypatch):
    monkeypatch.setattr("kglmatch.commands.register.load_matcher", lambda args: matcher)
    image = texture(200, 180, 4)
    for name, part in (("vis", image[10:170, 10:180]), ("ir", image[13:173, 8:178])):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.rint(part * 255).astype(np.uint8))
    paths = [str(tmp_path / name) for name in ("vis.png", "ir.png", "found.json", "one.png", "two.png")]
    limits = ["--max-displacement", "10", "--kind", "translation"]
    assert main(["register", *paths[:2], "--save", paths[2], "-o", paths[3], *limits]) == 0
    assert main(["apply", paths[2], paths[1], "-o", paths[4]]) == 0
    assert (cv2.imread(paths[3]) == cv2.imread(paths[4])).all()
