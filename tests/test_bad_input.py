"""Users' mistakes: exit code 2, one line that helps, nothing written, and no model loaded for nothing."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import texture

from kglmatch.cli import main
from kglmatch.models.files import CONFIG_FILE, WEIGHTS_FILE, weights_root

MODEL = weights_root() / "kglnet-vis-nir"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of good and bad files, which becomes the current one."""
    monkeypatch.chdir(tmp_path)
    image = np.rint(texture(96, 80) * 255).astype(np.uint8)
    cv2.imwrite("vis.png", image)
    cv2.imwrite("ir.png", 255 - image)
    cv2.imwrite("tiny.png", image[:40, :63])
    cv2.imwrite("patch.png", image[:64, :64])
    cv2.imwrite("nan.tif", np.full((80, 96), np.nan, np.float32))
    Path("text.png").write_text("not an image")
    Path("empty.png").write_bytes(b"")
    Path("cut.png").write_bytes(Path("vis.png").read_bytes()[:2000])
    Path("cut.tif").write_bytes(Path("nan.tif").read_bytes()[:200])
    for name, files in (("a", ("x.png", "y.png")), ("b", ("z.png",)), ("c", ("x.png", "x.tif")), ("d", ())):
        Path(name).mkdir()
        for file in files:
            cv2.imwrite(f"{name}/{file}", image[:64, :64])
    return tmp_path


@pytest.fixture
def no_model(monkeypatch):
    """Makes loading a model a failure of the test: the mistake is to be reported before."""

    def load(*args, **kwargs):
        pytest.fail("the model was loaded before the mistake was reported")

    monkeypatch.setattr("kglmatch.models.pretrained._read_safetensors", load)


def listing(folder):
    return sorted((str(p.relative_to(folder)), p.stat().st_size) for p in folder.rglob("*"))


def message(capsys, folder, argv):
    """What a failing command says; it must be one line, and leave the folder as it was."""
    before = listing(folder)
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "", captured
    assert captured.err.startswith("kglmatch: error: ") and captured.err.endswith("\n")
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err, captured.err
    assert listing(folder) == before
    return captured.err


# What is typed after `kglmatch`, and text that the answer must have.
MISTAKES = {
    "": ["COMMAND"],
    "mach vis.png ir.png": ["'mach'", "match"],
    "match vis.png": ["IR"],
    "match vis.png ir.png --bogus": ["--bogus"],
    # images
    "match missing.png ir.png": ["missing.png", "no such file"],
    "match vis.png a": ["cannot read a", "folder"],
    "match text.png ir.png": ["text.png", "not an image"],
    "match vis.png empty.png": ["empty.png", "empty"],
    "match cut.png ir.png": ["cut.png"],
    "match cut.tif ir.png": ["cut.tif"],
    "match nan.tif ir.png": ["nan.tif", "NaN"],
    # parameters
    "match vis.png ir.png --max-keypoints 0": ["--max-keypoints", "at least 1", "'0'"],
    "match vis.png ir.png --max-keypoints -5": ["--max-keypoints", "at least 1"],
    "match vis.png ir.png --max-keypoints many": ["--max-keypoints", "'many'"],
    "match vis.png ir.png --top-k 0": ["--top-k", "at least 1"],
    "match vis.png ir.png --min-score 1.5": ["--min-score", "[0, 1]"],
    "match vis.png ir.png --min-score nan": ["--min-score", "[0, 1]"],
    "match vis.png ir.png --max-displacement=-1": ["--max-displacement", "at least 0"],
    "match vis.png ir.png --max-displacement inf": ["--max-displacement"],
    "match vis.png ir.png --batch-size 0": ["--batch-size", "at least 1"],
    "match vis.png ir.png --detector superpoint": ["superpoint", "sift"],
    "match vis.png ir.png --decide both": ["both", "metric"],
    "match vis.png ir.png --dtype int8": ["int8", "float16"],
    # outputs
    "match vis.png ir.png -o picture.xyz": ["picture.xyz", ".png"],
    "match vis.png ir.png -o picture": ["picture", ".png"],
    "match vis.png ir.png --checkerboard b.gif": ["b.gif", ".png"],
    "match vis.png ir.png --save m.txt": ["m.txt", ".csv"],
    "match vis.png ir.png --save none/m.csv": ["none/m.csv", "does not exist"],
    "match vis.png ir.png -o none/m.png": ["none/m.png", "does not exist"],
    "match vis.png ir.png -o vis.png/m.png": ["vis.png/m.png", "is a file"],
    "match vis.png ir.png -o ./ir.png": ["ir.png", "input"],
    "match vis.png ir.png -o m.png --checkerboard m.png": ["m.png", "-o"],
    "match vis.png ir.png --save=": ["--save", "empty"],
    # models
    "match vis.png ir.png --model kglnet-vis-x": ["kglnet-vis-x", "kglnet-vis-nir"],
    "match vis.png ir.png --model d": ["config.json", "model.safetensors"],
    "match vis.png ir.png --model vis.png": ["vis.png", "kglnet-vis-nir"],
    "info no-such-model": ["no-such-model", "kglnet-vis-nir"],
    # score
    "score patch.png": ["patch.png", ".npz"],
    "score a": ["IR_PATCH"],
    "score vis.png patch.png": ["vis.png", "96 x 80", "64 x 64"],
    "score missing.png patch.png": ["missing.png", "no such file"],
    "score a patch.png": ["folder"],
    "score a b": ["no file name in common"],
    "score a c": ["x.png", "x.tif"],
    "score a d": ["0 files"],
    "score missing.npz": ["missing.npz: No such file"],
    "score patch.png patch.png --save s.txt": ["s.txt", ".csv"],
    "score patch.png patch.png --save patch.png": ["patch.png", ".csv"],
    "score patch.png patch.png --save none/s.csv": ["none", "does not exist"],
    "score patch.png patch.png --model nothing": ["nothing", "kglnet-vis-nir"],
    # convert
    "convert vis.png": ["METRIC", "-o"],
    "convert missing.pth missing.pth -o model": ["missing.pth", "not found"],
    "convert vis.png ir.png -o model": ["vis.png", "checkpoint"],
    "convert text.png text.png -o model": ["text.png", "checkpoint"],
    "convert vis.png ir.png -o a": ["not empty"],
    "convert vis.png ir.png -o patch.png": ["patch.png", "file"],
    "convert vis.png ir.png -o none/model": ["none", "does not exist"],
    "convert vis.png ir.png -o model --ir-kind xray": ["xray", "lwir"],
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_mistakes_are_reported_in_one_line_before_the_model_is_loaded(folder, no_model, capsys, typed):
    said = message(capsys, folder, typed.split())
    for word in MISTAKES[typed]:
        assert word in said


def test_an_image_smaller_than_a_patch(folder, capsys):
    said = message(capsys, folder, ["match", "vis.png", "tiny.png", "-o", "m.png"])
    assert "tiny.png is 63 x 40 pixels, smaller than a patch (64 x 64)" in said


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "tpu", "mps"])
def test_a_device_that_is_not_there_is_not_replaced(folder, capsys, device):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available() and device == "cuda":
        pytest.skip("this machine has CUDA")
    said = message(capsys, folder, ["match", "vis.png", "ir.png", "--device", device, "--save", "m.csv"])
    assert device in said and "device" in said


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_an_unwritable_folder(folder, no_model, capsys):
    closed = folder / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    try:
        (closed / "probe").touch()
    except PermissionError:
        said = message(capsys, folder, ["match", "vis.png", "ir.png", "--save", "closed/m.csv"])
        assert "closed/m.csv" in said and "ermission" in said
    else:
        pytest.skip("this user may write anywhere")
    finally:
        closed.chmod(0o700)


def test_an_unreadable_image(folder, no_model, capsys, monkeypatch):
    # By a stand-in, since permissions do not stop every user.
    original = Path.read_bytes

    def read_bytes(self):
        if self.name == "vis.png":
            raise PermissionError(13, "Permission denied", str(self))
        return original(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    said = message(capsys, folder, ["match", "vis.png", "ir.png"])
    assert "vis.png" in said and "Permission denied" in said


def test_a_failure_while_writing_leaves_nothing(folder, capsys, monkeypatch):
    import errno

    from kglmatch.matcher import Matcher

    original = Matcher.match_images

    def match_images(self, vis, ir, **how):
        def write_text(self, *args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device", str(self))

        monkeypatch.setattr(Path, "write_text", write_text)
        return original(self, vis, ir, **how)

    monkeypatch.setattr(Matcher, "match_images", match_images)
    (folder / "m.csv").write_bytes(b"old")
    said = message(capsys, folder, ["match", "vis.png", "ir.png", "--max-keypoints", "2", "--save", "m.csv"])
    assert "m.csv" in said and "No space left" in said
    assert (folder / "m.csv").read_bytes() == b"old"


# --- patches --------------------------------------------------------------------------------------


def good(count=2):
    return np.full((count, 64, 64), 0.5, np.float32)


def with_value(value):
    patches = good()
    patches[1, 3, 4] = value
    return patches


NPZ = {
    "no ir": ({"vis": good()}, ["lacks", "'ir'"]),
    "lengths": ({"vis": good(2), "ir": good(3)}, ["2 visible", "3 ir"]),
    "NaN": ({"vis": good(), "ir": with_value(np.nan)}, ["ir", "NaN"]),
    "infinite": ({"vis": with_value(np.inf), "ir": good()}, ["vis", "infinite"]),
    "range": ({"vis": with_value(17), "ir": good()}, ["vis", "17"]),
    "size": ({"vis": good()[:, :32, :32], "ir": good()}, ["vis", "(2, 32, 32)", "64"]),
    "one patch": ({"vis": good()[0], "ir": good()[0]}, ["(64, 64)"]),
    "colour": ({"vis": np.zeros((2, 64, 64, 3), np.uint8), "ir": good()}, ["(2, 64, 64, 3)", "grey"]),
    "integers": ({"vis": np.ones((2, 64, 64), np.int64), "ir": good()}, ["int64"]),
    "16 bits": ({"vis": good(), "ir": np.ones((2, 64, 64), np.uint16)}, ["ir", "uint16"]),
    "objects": ({"vis": np.array([None, 1], object), "ir": good()}, ["pairs.npz"]),
    "text": ({"vis": np.array(["a", "b"]), "ir": good()}, ["vis"]),
}


@pytest.mark.parametrize("case", NPZ)
def test_patches_that_are_none(folder, no_model, capsys, case):
    arrays, words = NPZ[case]
    np.savez(folder / "pairs.npz", **arrays)
    said = message(capsys, folder, ["score", "pairs.npz", "--save", "scores.csv"])
    for word in ["pairs.npz", *words]:
        assert word in said


def test_a_damaged_npz(folder, no_model, capsys):
    np.savez(folder / "pairs.npz", vis=good(), ir=good())
    whole = (folder / "pairs.npz").read_bytes()
    for content in (whole[:5000], b"", b"PK\x03\x04 nonsense", whole.replace(b"\x93NUMPY", b"\x93NOPEY")):
        (folder / "pairs.npz").write_bytes(content)
        assert "pairs.npz" in message(capsys, folder, ["score", "pairs.npz"])
    said = message(capsys, folder, ["score", "pairs.npz", "pairs.npz"])
    assert "given alone" in said


# --- model folders --------------------------------------------------------------------------------


@pytest.fixture
def model(folder):
    """A copy of the bundled model, to be damaged."""
    copy = folder / "model"
    copy.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(MODEL / name, copy / name)
    return copy


def changed_tensor(path, change):
    from safetensors.torch import load_file, save_file

    state = load_file(path)
    change(state)
    save_file(state, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:1_000_000])


def mangle_header(path):
    data = bytearray(path.read_bytes())
    data[20:24] = b"\xff\xff\xff\xff"
    path.write_bytes(data)


def one_fewer(path):
    changed_tensor(path, lambda state: state.pop("metric_head.fc3.bias"))


def one_more(path):
    changed_tensor(path, lambda state: state.update(extra=state["metric_head.fc3.bias"].clone()))


def other_shape(path):
    changed_tensor(
        path, lambda state: state.update({"metric_head.fc3.bias": state["metric_head.fc2.bias"].clone()})
    )


def not_a_number(path):
    changed_tensor(path, lambda state: state["metric_head.fc3.bias"].fill_(float("nan")))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, ["not a valid safetensors file"]),
        (mangle_header, ["not a valid safetensors file"]),
        (lambda path: path.write_bytes(b""), ["not a valid safetensors file"]),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), ["not a valid safetensors file"]),
        (Path.unlink, ["lacks model.safetensors"]),
        (one_fewer, ["1 tensors missing", "metric_head.fc3.bias"]),
        (one_more, ["1 unexpected", "extra"]),
        (other_shape, ["metric_head.fc3.bias is (256,), expected (1,)"]),
        (not_a_number, ["metric_head.fc3.bias", "NaN"]),
    ],
    ids=["cut", "header", "empty", "pickle", "missing", "one fewer", "one more", "shape", "NaN"],
)
def test_damaged_weights(folder, model, capsys, damage, words):
    damage(model / WEIGHTS_FILE)
    said = message(capsys, folder, ["score", "patch.png", "patch.png", "--model", "model"])
    for word in ["model", *words]:
        assert word in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("{", ["not valid JSON"]),
        ("[]", ["not a KGL-Net configuration"]),
        ({"model_type": "bert"}, ["not a KGL-Net configuration"]),
        ({"colour": 1}, ["unknown keys ['colour']"]),
        ({"patch_size": 63}, ["patch_size", "63"]),
        ({"patch_size": "64"}, ["patch_size", "'64'"]),
        ({"split_after": 5}, ["split_after", "5"]),
        ({"ir_kind": "xray"}, ["ir_kind", "xray"]),
        ({"inference": []}, ["inference"]),
        ({"descriptor_dim": 64}, ["does not fit"]),
        ({"patch_size": 32}, ["does not fit"]),
        ({"metric_trunk": "own"}, ["does not fit", "missing"]),
        (None, ["lacks config.json"]),
        (b"\xff\xfe\x00", ["config.json"]),
    ],
    ids=str,
)
def test_wrong_configuration(folder, model, capsys, change, words):
    path = model / CONFIG_FILE
    if change is None:
        path.unlink()
    elif isinstance(change, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        path.write_bytes(change if isinstance(change, bytes) else change.encode())
    said = message(capsys, folder, ["info", "model"])
    for word in words:
        assert word in said


def test_a_tampered_bundled_model_is_noticed(folder, model, capsys, monkeypatch):
    # One bit of one weight: still a valid file of finite numbers.
    root = folder / "weights"
    (root / "kglnet-vis-nir").mkdir(parents=True)
    shutil.copyfile(weights_root() / "SHA256SUMS", root / "SHA256SUMS")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.move(model / name, root / "kglnet-vis-nir" / name)
    weights = root / "kglnet-vis-nir" / WEIGHTS_FILE
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    monkeypatch.setattr("kglmatch.models.pretrained.weights_root", lambda: root)
    assert "checksum" in message(capsys, folder, ["match", "vis.png", "ir.png", "-o", "m.png"])
    assert "checksum" in message(capsys, folder, ["info", "kglnet-vis-nir"])


# --- checkpoints ----------------------------------------------------------------------------------


class Malicious:
    """Unpickled carelessly, this writes a file."""

    def __reduce__(self):
        return Path.write_text, (Path("pwned"), "pwned")


def test_checkpoints_that_do_not_fit(folder, capsys):
    import torch

    from kglmatch.models.config import KGLNetConfig
    from kglmatch.models.convert import published_names
    from kglmatch.models.network import KGLNet

    state = KGLNet(KGLNetConfig()).state_dict()
    net, metric = ({theirs: state[ours] for ours, theirs in names.items()} for names in published_names())
    torch.save(net, "net.pth")
    torch.save(metric, "metric.pth")
    argv = ["-o", "model"]
    said = message(capsys, folder, ["convert", "metric.pth", "net.pth", *argv])
    assert "metric.pth is not a published KGL-Net checkpoint" in said

    name = "layer1_com1.2.weight"
    tensor = net[name]
    torch.save(net | {name: tensor[:1].clone()}, "shape.pth")
    assert "does not fit" in message(capsys, folder, ["convert", "shape.pth", "metric.pth", *argv])
    torch.save(net | {name: torch.full_like(tensor, torch.nan)}, "nan.pth")
    assert "NaN" in message(capsys, folder, ["convert", "nan.pth", "metric.pth", *argv])
    Path("cut.pth").write_bytes(Path("metric.pth").read_bytes()[:5000])
    assert "cut.pth" in message(capsys, folder, ["convert", "net.pth", "cut.pth", *argv])
    torch.save([1, 2], "list.pth")
    assert "holds no state dict" in message(capsys, folder, ["convert", "list.pth", "metric.pth", *argv])


def test_a_pickle_is_not_executed(folder, capsys):
    import torch

    torch.save({"a": Malicious()}, "zip.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    for name in ("zip.pth", "plain.pth"):
        said = message(capsys, folder, ["convert", name, name, "-o", "model"])
        assert f"checkpoint {name}" in said and "weights_only" not in said
    assert not Path("pwned").exists()
