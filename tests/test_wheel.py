"""The distribution: what is in it, and that it works where neither checkout nor network is."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs", "site")
LARGEST_WHEEL = 60_000_000

pytestmark = pytest.mark.slow

# Written into the clean environment: whoever connects to anything fails.
NO_NETWORK = """\
import socket

def refuse(*args):
    raise RuntimeError(f"a connection was tried: {args[1:]}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """An sdist of the checkout, and the wheel that is built from that sdist."""
    for module in ("build", "setuptools"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f'{module} is not installed: pip install "kglmatch[test]"')
    if not (CHECKOUT / "pyproject.toml").is_file():
        pytest.skip("the tests lie outside a checkout")
    folder = tmp_path_factory.mktemp("distribution")
    source = shutil.copytree(CHECKOUT, folder / "source", ignore=NOT_COPIED)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def clean_environment(distributions, tmp_path_factory) -> Path:
    """The scripts' folder of an environment that has the wheel, our dependencies, and no network.

    The dependencies are those that this test runs with, so that nothing is downloaded; the
    environment's own folder comes first on its path.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)}, scheme="venv")
    scripts, packages = Path(paths["scripts"]), Path(paths["purelib"])
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    # A checkout on PYTHONPATH would count as installed already.
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([*install, "--no-deps", "--no-index", distributions[1]], check=True, env=variables)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # By a .pth file: a sitecustomize of the system would come first.
    (packages / "no_network.py").write_text(NO_NETWORK)
    (packages / "no_network.pth").write_text("import no_network\n")
    return scripts


def run(scripts: Path, program: str, *args: str | Path, cwd: Path) -> str:
    """Runs a program of the environment, far from the checkout, and returns what it printed."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    variables = {k: v for k, v in os.environ.items() if k not in dropped}
    found = shutil.which(program, path=str(scripts))
    assert found is not None, f"{program} is not in {scripts}"
    done = subprocess.run(
        [found, *map(str, args)],
        cwd=cwd,
        env=variables | {"OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "hf")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def models() -> list[str]:
    return sorted(path.parent.name for path in CHECKOUT.glob("weights/*/config.json"))


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(file.read(name).decode())


def test_wheel_holds_everything_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions[1]) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    code = {path.relative_to(CHECKOUT).as_posix() for path in CHECKOUT.glob("kglmatch/**/*.py")}
    stubs = {path.relative_to(CHECKOUT).as_posix() for path in CHECKOUT.glob("kglmatch/**/*.pyi")}
    data = stubs | {"kglmatch/py.typed", "kglmatch/weights/SHA256SUMS"}
    for folder in (CHECKOUT / "weights" / model for model in models()):
        data |= {f"kglmatch/weights/{folder.name}/{file}" for file in ("config.json", "model.safetensors")}
        if (folder / "README.md").is_file():
            data.add(f"kglmatch/weights/{folder.name}/README.md")
    assert names == code | data
    assert models()


def test_wheel_is_small_enough(distributions):
    assert distributions[1].stat().st_size < LARGEST_WHEEL


def test_wheel_metadata(distributions):
    about = metadata(distributions[1])
    assert about["License-Expression"] == "Apache-2.0"
    assert about.get_all("License-File") == ["LICENSE"]
    extras = {"train", "many", "ray", "geo", "xarray", "plot", "proof"}
    extras |= {"kornia", "colmap", "demo", "docs", "test", "dev"}
    assert extras == set(about.get_all("Provides-Extra"))
    assert "Typing :: Typed" in about.get_all("Classifier")
    assert about["Description-Content-Type"] == "text/markdown"
    assert len(about.get_payload()) > 500


def test_sdist_holds_what_a_packager_needs(distributions):
    with tarfile.open(distributions[0]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    expected = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"}
    expected |= {"constraints.txt", "mkdocs.yml", "pyproject.toml", "setup.cfg", "benchmarks/inference.py"}
    expected |= {"tests/test_wheel.py", "tests/hub_server.py", "weights/SHA256SUMS"}
    expected |= {f"weights/{model}/model.safetensors" for model in models()}
    assert expected <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(".")]


def test_match_in_a_clean_environment_without_network(clean_environment, image_pair, tmp_path):
    where = run(clean_environment, "python", "-c", "import kglmatch; print(kglmatch.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(clean_environment.parent)
    listed = json.loads(run(clean_environment, "kglmatch", "info", "--json", cwd=tmp_path))
    assert sorted(model["name"] for model in listed["models"]) == models()
    printed = run(
        clean_environment, "kglmatch", "match", *image_pair, "--max-keypoints", "60", "--json", cwd=tmp_path
    )
    assert json.loads(printed)["matches"] > 5


def test_import_is_light(clean_environment, tmp_path):
    heavy = ["torch", "onnxruntime", "onnx", "cv2", "numpy", "huggingface_hub"]
    code = f"import sys, kglmatch; kglmatch.__version__; print([m for m in {heavy} if m in sys.modules])"
    assert run(clean_environment, "python", "-c", code, cwd=tmp_path).strip() == "[]"


def test_network_guard_works(clean_environment, tmp_path):
    code = (
        "import socket\n"
        "try: socket.create_connection(('127.0.0.1', 9))\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert "a connection was tried" in run(clean_environment, "python", "-c", code, cwd=tmp_path)
