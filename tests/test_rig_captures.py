"""Captures: found by the names of their files, with the moment at which they were taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from kglmatch.batch.captures import (
    Capture,
    Moment,
    as_captures,
    band_names,
    choose_reference,
    find_captures,
    read_moment,
)
from kglmatch.errors import DataError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("files", "names", "bands"),
    [
        (["IMG_0002_1.tif", "IMG_0002_10.tif", "IMG_0010_1.tif"], ["IMG_0002", "IMG_0010"], ["1", "10"]),
        (["000/IMG_0001_1.tif", "000/IMG_0001_2.tif"], ["000/IMG_0001"], ["1", "2"]),
        (["DJI_0010_MS_G.TIF", "DJI_0010_MS_NIR.TIF"], ["DJI_0010_MS"], ["G", "NIR"]),
        (
            ["red/IMG_0001.tif", "nir/IMG_0001.tif", "nir/IMG_0002.tif"],
            ["IMG_0001", "IMG_0002"],
            ["nir", "red"],
        ),
        (["a/red.png", "a/nir.png", "b/red.png", "c/nir.png"], ["a", "b", "c"], ["nir", "red"]),
    ],
)
def test_captures_are_found_by_their_names(tmp_path, files, names, bands):
    touch(tmp_path, *files, "notes.txt", ".hidden/IMG_0001_3.tif")
    found = find_captures(tmp_path)
    assert [capture.name for capture in found] == names
    assert band_names(found) == bands
    assert sum(len(capture.bands) for capture in found) == len(files)
    assert all(Path(path).is_file() for capture in found for path in capture.bands.values())


def test_a_pattern_names_them_otherwise(tmp_path):
    touch(tmp_path, "flight-1-red.png", "flight-1-nir.png", "flight-1-nir.txt", "other_1.png")
    found = find_captures(tmp_path, "flight-{capture}-{band}.png")
    assert [(c.name, list(c.bands)) for c in found] == [("1", ["nir", "red"])]
    with pytest.raises(DataError, match="named x_"):
        find_captures(tmp_path, "x_{capture}_{band}.png")
    with pytest.raises(DataError, match="a pattern holds"):
        find_captures(tmp_path, "{capture}.png")


def test_a_list_names_them_by_columns(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "list.csv").write_text("capture,red,nir\none,a.png,b.png\ntwo,a.png,\n")
    found = find_captures(tmp_path / "list.csv")
    assert found == [
        Capture("one", {"red": tmp_path / "a.png", "nir": tmp_path / "b.png"}),
        Capture("two", {"red": tmp_path / "a.png"}),
    ]
    for text in ("name,red,nir\n", "capture,red\n", "capture,red,nir\n", ""):
        (tmp_path / "list.csv").write_text(text)
        with pytest.raises(DataError, match=r"list\.csv"):
            find_captures(tmp_path / "list.csv")


@pytest.mark.parametrize("files", [[], ["IMG_0001_1.tif"], ["a_1.tif", "b_2.tif"]])
def test_a_folder_without_captures_is_one_line(tmp_path, files):
    touch(tmp_path, *files)
    with pytest.raises(DataError, match="no captures of two bands"):
        find_captures(tmp_path)
    with pytest.raises(DataError, match="neither a folder nor"):
        find_captures(tmp_path / "missing")


def test_two_files_of_one_band_are_one_line(tmp_path):
    touch(tmp_path, "IMG_0001_1.tif", "IMG_0001_1.jpg", "IMG_0001_2.tif")
    with pytest.raises(DataError, match="are both band 1 of capture IMG_0001"):
        find_captures(tmp_path)
    assert len(find_captures(tmp_path, "{capture}_{band}.tif")) == 1


def test_captures_may_be_mappings_but_names_stay_in_their_folder():
    image = np.zeros((80, 80))
    assert [c.name for c in as_captures([{"r": image}, {"r": image}])] == ["0000", "0001"]
    with pytest.raises(DataError, match="two captures are named a"):
        as_captures([Capture("a", {}), Capture("a", {})])
    for name in ("../a", "/a", ""):
        with pytest.raises(DataError, match="cannot be named"):
            as_captures([Capture(name, {})])


def test_the_reference_is_band_1_or_the_first_or_as_asked_for():
    assert choose_reference(["1", "2"]) == "1"
    assert choose_reference(["green", "red"]) == "green"
    assert choose_reference(["1", "2"], "2") == "2"
    with pytest.raises(DataError, match="no band '3'"):
        choose_reference(["1", "2"], "3")


def test_the_moment_is_read_from_exif_and_xmp(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2024:05:01 12:00:01"
    exif.get_ifd(0x8769)[0x9291] = "25"
    exif.get_ifd(0x8825)[6] = 312.5
    Image.new("L", (8, 8)).save(tmp_path / "gps.jpg", exif=exif)
    found = read_moment(tmp_path / "gps.jpg")
    assert found.height == 312.5 and not found.above_ground
    assert found.time is not None and found.time % 60 == pytest.approx(1.25)
    xmp = b'<rdf:Description drone-dji:RelativeAltitude="+60.10"/>'
    tifffile.imwrite(
        tmp_path / "xmp.tif", np.zeros((8, 8), np.uint16), extratags=[(700, "B", len(xmp), xmp, True)]
    )
    assert read_moment(tmp_path / "xmp.tif") == Moment(None, 60.1, True)
    (tmp_path / "damaged.tif").write_bytes(b"II*\0")
    for nothing in (tmp_path / "damaged.tif", tmp_path / "missing.tif", np.zeros((8, 8))):
        assert read_moment(nothing) == Moment()


def test_the_names_of_the_package_are_there():
    import kglmatch.batch

    assert {"calibrate_rig", "apply_rig", "check_rig", "Rig"} <= set(dir(kglmatch.batch))
    assert all(callable(getattr(kglmatch.batch, name)) for name in dir(kglmatch.batch))
