"""Any image -> grey float32 in [0, 1]; files read and written with their bit depth kept."""

from __future__ import annotations

import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from kglmatch.errors import ImageError, OutputError
from kglmatch.images import load_image, read_image_raw, save_image


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def smooth(rng, shape, top=255, dtype=np.uint8):
    noise = cv2.GaussianBlur(rng.random(shape, dtype=np.float32), (0, 0), 2)
    noise = (noise - noise.min()) / (noise.max() - noise.min())
    return np.rint(noise * top).astype(dtype)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def check(grey, shape):
    assert grey.dtype == np.float32 and grey.shape == shape and grey.flags.c_contiguous
    assert np.isfinite(grey).all() and grey.min() >= 0 and grey.max() <= 1


def one_line_error(call, *parts, kind=ImageError):
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# Arrays


def test_every_dtype_and_channel_count_gives_grey(rng):
    integers = ("uint8", "uint16", "int16", "int32", "int64", "uint32")
    for dtype in ("bool", *integers, "float16", "float32", "float64"):
        for shape in ((5, 7), (5, 7, 1), (5, 7, 2), (5, 7, 3), (5, 7, 4), (1, 1), (1, 7, 3)):
            image = (rng.random(shape) * (1 if dtype[0] in "bf" else 100)).astype(dtype)
            before = image.copy()
            for stretch in ("auto", True, False):
                check(load_image(image, stretch=stretch), shape[:2])
            assert np.array_equal(image, before)


def test_8_bit_is_divided_by_255():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(load_image(image), image.astype(np.float32) / np.float32(255))
    assert np.array_equal(load_image(image > 100), (image > 100).astype(np.float32))


def test_colour_weights_are_opencvs(rng):
    image = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    expected = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    assert np.array_equal(np.rint(load_image(image) * 255).astype(np.uint8), expected)
    colours = np.eye(3, dtype=np.float64)[None]
    np.testing.assert_allclose(load_image(colours), [[0.299, 0.587, 0.114]], atol=1e-6)
    np.testing.assert_allclose(load_image(colours.astype(np.float32)), [[0.299, 0.587, 0.114]], atol=1e-6)


def test_alpha_is_ignored(rng):
    for dtype, top in ((np.uint8, 256), (np.uint16, 65536)):
        rgb = rng.integers(0, top, (9, 8, 3)).astype(dtype)
        for alpha in (0, top - 1):
            plane = np.full((9, 8, 1), alpha, dtype)
            assert np.array_equal(load_image(np.concatenate([rgb, plane], 2)), load_image(rgb))
            grey_alpha = np.concatenate([rgb[:, :, :1], plane], 2)
            assert np.array_equal(load_image(grey_alpha), load_image(rgb[:, :, 0]))


def test_16_bit_is_stretched_by_percentiles():
    image = np.arange(10000, dtype=np.uint16).reshape(100, 100) + 3000
    image[0, 0], image[99, 99] = 0, 65535
    grey = load_image(image)
    low, high = np.percentile(image, (0.1, 99.9))
    np.testing.assert_allclose(grey, np.clip((image - low) / (high - low), 0, 1), atol=1e-6)
    np.testing.assert_allclose(load_image(image, percentiles=(0, 100)), image / 65535, atol=1e-6)
    np.testing.assert_allclose(load_image(image, stretch=False), image / 65535, atol=1e-6)


def test_stretch_undoes_gain_and_offset(rng):
    base = rng.random((40, 50))
    reference = load_image(base, stretch=True)
    for gain, offset in ((0.5, 0.2), (1000, -500), (1e-3, 7), (65000, 0), (1e30, 0)):
        np.testing.assert_allclose(load_image(base * gain + offset, stretch=True), reference, atol=1e-6)
    assert np.allclose(load_image((base * 60000).astype(np.uint16)), reference, atol=1e-4)
    assert np.allclose(load_image((base * 60000).astype(np.int32) - 30000), reference, atol=1e-4)


def test_floats_within_the_range_are_taken_as_they_are(rng):
    image = rng.random((6, 5)).astype(np.float32) * 0.5 + 0.2
    assert np.array_equal(load_image(image), image)
    assert np.array_equal(load_image(np.float32([[1 + 5e-7, -5e-7]])), np.float32([[1, 0]]))


def test_floats_outside_the_range():
    image = np.linspace(0, 255, 100, dtype=np.float32).reshape(10, 10)
    grey = load_image(image)
    assert grey.min() == 0 and grey.max() == 1
    one_line_error(lambda: load_image(image, stretch=False), "255", "[0, 1]")


def test_extreme_floats_do_not_overflow():
    for dtype in (np.float32, np.float64):
        top = np.finfo(dtype).max / 2
        check(load_image((np.linspace(-1, 1, 64, dtype=dtype) * top).reshape(8, 8)), (8, 8))


def test_negative_integers_need_a_stretch():
    image = np.array([[-5, 0], [5, 10]], np.int16)
    check(load_image(image), (2, 2))
    one_line_error(lambda: load_image(image, stretch=False), "negative", "stretch=True")


def test_constant_images():
    for value, dtype in ((0, "uint16"), (700, "uint16"), (-3, "int32"), (1e9, "float64"), (9, "float32")):
        assert not load_image(np.full((4, 4), value, dtype)).any()
    assert (load_image(np.full((4, 4), 0.25, np.float32)) == 0.25).all()
    assert not load_image(np.full((4, 4), 200, np.uint8), stretch=True).any()


def test_a_few_pixels_that_differ_survive_the_stretch():
    image = np.zeros((100, 100), np.uint16)
    image[3, 4] = 500
    assert load_image(image)[3, 4] == 1


def test_pixels_without_data():
    image = np.linspace(100, 200, 400, dtype=np.float32).reshape(20, 20)
    clean = load_image(image)
    for bad in (np.nan, np.inf, -np.inf):
        holed = image.copy()
        holed[5:9, 5:9] = bad
        grey = load_image(holed)
        assert not grey[5:9, 5:9].any()
        np.testing.assert_allclose(grey[0], clean[0], atol=0.01)
    holed = image.copy()
    holed[5:9, 5:9] = -9999
    grey = load_image(holed, nodata=-9999)
    assert not grey[5:9, 5:9].any()
    np.testing.assert_allclose(grey[0], clean[0], atol=0.01)
    masked = np.ma.masked_equal(holed, -9999)
    assert np.array_equal(load_image(masked), grey)
    assert np.array_equal(load_image(np.ma.dstack([masked] * 3)) > 0, grey > 0)
    colour = np.dstack([holed.astype(np.int32)] * 3)
    assert not load_image(colour, nodata=-9999)[5:9, 5:9].any()
    in_range = np.float32([[0.25, np.nan], [0.5, 0.75]])
    assert np.array_equal(load_image(in_range), np.float32([[0.25, 0], [0.5, 0.75]]))


def test_no_pixel_with_data():
    for value, nodata in ((np.nan, None), (np.inf, None), (1, 1)):
        image = np.full((3, 3), value)
        one_line_error(lambda i=image, n=nodata: load_image(i, nodata=n), "no pixel with data")


def test_memory_order_and_byte_order(rng):
    image = rng.integers(0, 60000, (12, 10)).astype(np.uint16)
    reference = load_image(image)
    strided = np.repeat(image, 2, 1)[:, ::2]
    for other in (np.asfortranarray(image), image.astype(">u2"), image[::-1][::-1], strided):
        grey = load_image(other)
        assert np.array_equal(grey, reference) and grey.dtype == np.float32 and grey.flags.c_contiguous


def test_result_shares_no_memory():
    image = np.full((4, 4), 0.5, np.float32)
    load_image(image)[:] = 0
    assert (image == 0.5).all()


@pytest.mark.parametrize(
    ("image", "part"),
    [
        (np.zeros((0, 5)), "no pixel"),
        (np.zeros((5, 5, 0)), "no pixel"),
        (np.zeros(5), "shape (5,)"),
        (np.zeros((2, 3, 4, 5)), "shape (2, 3, 4, 5)"),
        (np.zeros((5, 5, 5)), "1 to 4 channels"),
        (np.zeros((3, 50, 60)), "channels last"),
        (np.zeros((4, 4), np.complex64), "complex64"),
        (np.zeros((4, 4), object), "object"),
        (np.array([["a", "b"]]), "type"),
        ([[0.0, 1.0]], "list"),
        (None, "NoneType"),
        (b"a.png", "bytes"),
    ],
)
def test_unusable_sources(image, part):
    one_line_error(lambda: load_image(image), part)


def test_bad_options(rng):
    image = rng.random((4, 4))
    for stretch in ("yes", None, 1.5):
        one_line_error(lambda s=stretch: load_image(image, stretch=s), "stretch")
    for percentiles in ((99, 1), (0, 101), (5,), 3, (1, 1), ("a", "b")):
        one_line_error(lambda p=percentiles: load_image(image, percentiles=p), "percentiles")
    for nodata in ("0", [1, 2], True):
        one_line_error(lambda n=nodata: load_image(image, nodata=n), "nodata")


# Tensors


def test_tensors(rng):
    torch = pytest.importorskip("torch")
    rgb = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    reference = load_image(rgb)
    chw = torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))
    assert np.array_equal(load_image(chw), reference)
    assert np.array_equal(load_image(torch.from_numpy(rgb)), reference)
    assert np.array_equal(load_image(chw[:1]), load_image(rgb[:, :, 0]))
    assert np.array_equal(load_image(chw[0]), load_image(rgb[:, :, 0]))
    # Channels first wins where both ends could be channels.
    assert load_image(torch.zeros(3, 10, 3)).shape == (10, 3)
    values = torch.rand(6, 5, requires_grad=True)
    assert np.array_equal(load_image(values), values.detach().numpy())
    check(load_image(torch.rand(6, 5).bfloat16()), (6, 5))
    check(load_image(torch.rand(6, 5).half()), (6, 5))
    one_line_error(lambda: load_image(torch.zeros(6, 7, 8)), "channels")


def test_importing_does_not_import_torch():
    code = (
        "import sys, kglmatch.images, kglmatch.keypoints, kglmatch.patches; assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Pillow


def test_pillow_images(rng):
    rgb = smooth(rng, (20, 30, 3))
    image = Image.fromarray(rgb)
    assert np.array_equal(load_image(image), load_image(rgb))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "RGBX"):
        check(load_image(image.convert(mode)), (20, 30))
    for mode, via in (("PA", "P"), ("RGBa", "RGBA"), ("La", "LA")):
        check(load_image(image.convert(via).convert(mode)), (20, 30))
    sixteen = Image.fromarray(smooth(rng, (20, 30), 40000, np.uint16))
    check(load_image(sixteen), (20, 30))


# Files


def test_raw_round_trips(tmp_path, rng):
    for extension, dtypes in (
        (".png", ("uint8", "uint16")),
        (".tif", ("uint8", "uint16", "int16", "int32", "float32", "float64")),
        (".bmp", ("uint8",)),
    ):
        for dtype in dtypes:
            for shape in ((11, 9), (11, 9, 1), (11, 9, 3), (11, 9, 4)):
                if extension == ".bmp" and shape[2:] == (4,):
                    continue
                top = 1 if dtype[0] == "f" else np.iinfo(dtype).max
                image = (rng.random(shape) * top).astype(dtype)
                path = tmp_path / f"image{extension}"
                save_image(path, image)
                back = read_image_raw(path)
                assert back.dtype == image.dtype and np.array_equal(back, image.squeeze())
    assert names(tmp_path) == ["image.bmp", "image.png", "image.tif"]


def test_files_are_rgb_for_other_readers_too(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 0] = 255
    for extension in (".png", ".tif", ".bmp", ".webp", ".jpg", ".JPEG"):
        save_image(tmp_path / f"red{extension}", image)
        r, g, b = np.asarray(Image.open(tmp_path / f"red{extension}").convert("RGB"))[4, 4].astype(int)
        assert r > 240 and g < 15 and b < 15
        np.testing.assert_allclose(load_image(tmp_path / f"red{extension}"), 0.299, atol=0.01)


def test_load_agrees_between_file_array_and_pillow(tmp_path, rng):
    rgb = smooth(rng, (40, 50, 3))
    save_image(tmp_path / "a.png", rgb)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png")):
        assert np.array_equal(load_image(source), load_image(rgb))
    sixteen = smooth(rng, (40, 50), 4000, np.uint16)
    for name in ("b.png", "b.tif"):
        save_image(tmp_path / name, sixteen)
        for source in (tmp_path / name, Image.open(tmp_path / name)):
            assert np.array_equal(load_image(source), load_image(sixteen))


def test_float_tiff_with_holes(tmp_path):
    image = np.linspace(-20, 5, 600, dtype=np.float32).reshape(20, 30)
    image[:3] = np.nan
    save_image(tmp_path / "radar.tif", image)
    assert np.array_equal(load_image(tmp_path / "radar.tif"), load_image(image))


def test_exif_orientation_is_ignored(tmp_path, rng):
    image = Image.fromarray(smooth(rng, (20, 30, 3)))
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image_raw(tmp_path / "turned.jpg").shape == (20, 30, 3)
    assert load_image(tmp_path / "turned.jpg").shape == (20, 30)


def test_first_page_of_several(tmp_path, rng):
    first, second = Image.fromarray(smooth(rng, (20, 30))), Image.fromarray(smooth(rng, (10, 15)))
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[second])
    assert np.array_equal(read_image_raw(tmp_path / "pages.tif"), np.asarray(first))


def test_palette_and_pillow_only_formats(tmp_path, rng):
    image = Image.fromarray(smooth(rng, (20, 30, 3)))
    for name in ("p.png", "p.gif"):
        image.convert("P").save(tmp_path / name)
        expected = load_image(image.convert("P").convert("RGB"))
        np.testing.assert_allclose(load_image(tmp_path / name), expected, atol=1e-6)
    image.save(tmp_path / "image.pcx")
    assert np.array_equal(load_image(tmp_path / "image.pcx"), load_image(image))


def test_odd_file_names(tmp_path, rng):
    image = smooth(rng, (8, 9))
    for name in ("with space.png", "ümlaut.png", "no-extension"):
        save_image(tmp_path / "a.png", image)
        (tmp_path / "a.png").rename(tmp_path / name)
        assert np.array_equal(read_image_raw(tmp_path / name), image)


def test_missing_folder_empty_and_foreign_files(tmp_path):
    one_line_error(lambda: load_image(tmp_path / "no.png"), "no.png", "no such file")
    one_line_error(lambda: load_image(tmp_path), str(tmp_path), "is a folder")
    (tmp_path / "empty.png").write_bytes(b"")
    one_line_error(lambda: load_image(tmp_path / "empty.png"), "empty.png", "is empty")
    (tmp_path / "text.png").write_text("this is no image\n" * 20)
    one_line_error(lambda: load_image(tmp_path / "text.png"), "text.png", "not an image")
    one_line_error(lambda: load_image("a\0b.png"))


def test_truncated_and_damaged_files(tmp_path, rng, capfd):
    image = smooth(rng, (60, 80, 3))
    for extension in (".png", ".jpg", ".tif", ".bmp", ".webp"):
        save_image(tmp_path / f"a{extension}", image)
        whole = (tmp_path / f"a{extension}").read_bytes()
        for part in (0.01, 0.3, 0.7, 0.97):
            path = tmp_path / f"cut{extension}"
            path.write_bytes(whole[: max(1, int(len(whole) * part))])
            one_line_error(lambda p=path: read_image_raw(p), "cut" + extension)
        assert capfd.readouterr().err == ""
        # Damage within may go unnoticed by the format, but nothing except an ImageError may come of it.
        for _ in range(40):
            damaged = bytearray(whole)
            for position in rng.integers(0, len(whole), 6):
                damaged[position] = rng.integers(0, 256)
            path.write_bytes(bytes(damaged))
            try:
                read_image_raw(path)
            except ImageError as error:
                assert "\n" not in str(error)
        capfd.readouterr()


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.new("L", (200, 200)).save(tmp_path / "big.pcx")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    one_line_error(lambda: read_image_raw(tmp_path / "big.pcx"), "big.pcx", "exceeds limit")


def test_reading_says_nothing_about_tiff_tags_and_keeps_the_log_level(tmp_path, rng, capfd):
    level = cv2.utils.logging.getLogLevel()
    image = Image.fromarray(smooth(rng, (20, 30)))
    image.save(tmp_path / "geo.tif", tiffinfo={33550: (10.0, 10.0, 0.0), 34737: "WGS 84 / UTM zone 18N|"})
    assert np.array_equal(read_image_raw(tmp_path / "geo.tif"), np.asarray(image))
    assert capfd.readouterr().err == ""
    assert cv2.utils.logging.getLogLevel() == level


def test_saving_refuses_what_the_format_cannot_hold(tmp_path):
    grey = np.zeros((4, 4))
    cases = [
        ("a.png", grey.astype(np.float32), ImageError),
        ("a.png", grey.astype(np.int64), ImageError),
        ("a.jpg", grey.astype(np.uint16), ImageError),
        ("a.jpg", np.zeros((4, 4, 4), np.uint8), ImageError),
        ("a.png", np.zeros((4, 4, 2), np.uint8), ImageError),
        ("a.png", np.zeros((4, 0), np.uint8), ImageError),
        ("a.png", np.zeros((2, 2, 2, 2), np.uint8), ImageError),
        ("a.xyz", grey.astype(np.uint8), OutputError),
        ("a", grey.astype(np.uint8), OutputError),
        ("no/a.png", grey.astype(np.uint8), OutputError),
    ]
    for name, image, kind in cases:
        one_line_error(lambda n=name, i=image: save_image(tmp_path / n, i), name, kind=kind)
    wide = np.zeros((1, 20000, 3), np.uint8)
    one_line_error(lambda: save_image(tmp_path / "wide.webp", wide), kind=OutputError)
    assert names(tmp_path) == []


def test_saving_bool(tmp_path):
    mask = np.eye(5, dtype=bool)
    save_image(tmp_path / "mask.png", mask)
    assert np.array_equal(read_image_raw(tmp_path / "mask.png"), mask * np.uint8(255))
