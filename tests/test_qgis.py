"""The QGIS plugin: how it calls kglmatch and reads what that says; and, where QGIS is, the plugin itself."""

from __future__ import annotations

import ast
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from kglmatch import cli, options
from kglmatch.progress import counter

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "integrations" / "qgis" / "kglmatch_qgis"


def load(name):
    """A module of the plugin that imports nothing of QGIS's."""
    spec = importlib.util.spec_from_file_location(f"kglmatch_qgis_{name}", PLUGIN / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


command = load("command")


@pytest.fixture
def program(tmp_path):
    """Makes an executable of Python code."""

    def make(code, name="kglmatch"):
        path = tmp_path / name
        path.write_text(f"#!{sys.executable}\n{code}", encoding="utf-8")
        path.chmod(0o755)
        return str(path)

    return make


posix = pytest.mark.skipif(os.name == "nt", reason="the programs of these tests are scripts of Unix")


# --- the plugin's files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(PLUGIN.glob("*.py")), ids=lambda path: path.name)
def test_the_plugin_is_python_3_9(path):
    """The Python of QGIS 3.22 on Windows."""
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))


def test_the_command_module_needs_no_qgis():
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse((PLUGIN / "command.py").read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= set(sys.stdlib_module_names)


def test_metadata():
    text = (PLUGIN / "metadata.txt").read_text(encoding="utf-8")
    facts = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    assert facts["version"] == options.__version__
    assert facts["hasProcessingProvider"] == "yes" and facts["qgisMinimumVersion"] == "3.22"
    assert (PLUGIN / facts["icon"]).is_file()
    assert (PLUGIN / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_choices_are_those_of_kglmatch():
    assert command.KINDS == options.KINDS
    bundled = {path.parent.name for path in ROOT.glob("weights/*/config.json")}
    assert set(command.MODELS) == bundled and command.MODELS[0] == options.DEFAULT_MODEL


def test_the_archive_holds_the_plugin_alone(tmp_path, monkeypatch, capsys):
    target = tmp_path / "plugin.zip"
    monkeypatch.setattr(sys, "argv", ["package.py", "-o", str(target)])
    runpy.run_path(str(ROOT / "integrations/qgis/package.py"), run_name="__main__")
    with zipfile.ZipFile(target) as file:
        names = set(file.namelist())
    files = [path for path in PLUGIN.iterdir() if path.is_file()]
    assert names == {f"kglmatch_qgis/{path.name}" for path in files}


# --- the program ------------------------------------------------------------------------------------------


@posix
def test_the_program_is_found(program):
    named, other = program("", "named"), program("", "other")
    folder = str(Path(program("")).parent)
    both = {"KGLMATCH": other, "PATH": folder}
    assert command.find_program(named, both) == named
    assert command.find_program(" ", both) == other
    assert command.find_program("", {"PATH": folder}) == str(Path(folder) / "kglmatch")


@pytest.mark.parametrize(
    ("setting", "environment", "message"),
    [
        ("/nowhere/kglmatch", {}, "/nowhere/kglmatch, which the setting names"),
        ("", {"KGLMATCH": "/nowhere/k"}, "/nowhere/k, which the variable KGLMATCH names"),
        ("", {}, "not on PATH: install it"),
    ],
)
def test_a_program_that_is_not_there(setting, environment, message):
    with pytest.raises(command.CommandError, match=message):
        command.find_program(setting, {"PATH": "/nowhere", **environment})


def test_the_environment_is_not_that_of_qgis():
    kept = command.child_environment(
        {"PATH": "/bin", "PYTHONHOME": "/qgis", "PROJ_LIB": "/qgis", "HOME": "/h"}
    )
    assert kept["PATH"] == "/bin" and kept["HOME"] == "/h" and kept["KGLMATCH_PROGRESS"] == "lines"
    assert not {"PYTHONHOME", "PROJ_LIB"} & set(kept)


# --- its arguments ----------------------------------------------------------------------------------------


def test_files_of_layers(tmp_path):
    path = tmp_path / "a.tif"
    path.touch()
    assert command.local_file("gdal", f"{path}|option:NUM_THREADS=2", "a") == str(path)
    assert command.local_file("gdal", f"/vsizip/{path}.zip/a.tif", "a").startswith("/vsizip/")


@pytest.mark.parametrize(
    ("provider", "source", "message"),
    [
        (
            "wms",
            "type=xyz&url=https://example.org",
            "the layer map has no local file .its provider is wms.: export",
        ),
        ("postgresraster", "dbname='x'", "its provider is postgresraster"),
        ("gdal", "/vsicurl/https://example.org/a.tif", "over the network"),
        ("gdal", "https://example.org/a.tif", "over the network"),
        ("gdal", "/nowhere/a.tif", "no local file ./nowhere/a.tif."),
    ],
)
def test_layers_without_a_local_file_are_refused(provider, source, message):
    with pytest.raises(command.CommandError, match=message):
        command.local_file(provider, source, "map")


def test_arguments():
    given = command.arguments(
        "register",
        "vis.tif",
        "ir.tif",
        {"o": "-out.tif", "vis-band": 3, "ir-band": None, "model": "m", "shift-only": True, "local": False},
    )
    assert given == [
        "register",
        "vis.tif",
        "ir.tif",
        "--json",
        "-o",
        "-out.tif",
        "--vis-band=3",
        "--model=m",
        "--shift-only",
    ]


def test_lengths():
    assert command.length(None, "metres") is None
    assert command.length(60, "metres") == "60m"
    assert command.length(12.5, "pixels") == "12.5"


@pytest.mark.parametrize(
    ("name", "given"),
    [
        (
            "register",
            {
                "o": "out.tif",
                "vis-band": 1,
                "ir-band": 2,
                "model": "kglnet-vis-sar",
                "max-displacement": "60m",
                "kind": "affine",
                "local": True,
                "report": "report.html",
            },
        ),
        ("register", {"o": "out.tif", "shift-only": True, "max-displacement": "7"}),
        ("register", {"tie-points": "points.gpkg", "kind": "auto"}),
        ("check", {"residual-field": "field.tif", "report": "report.html", "max-displacement": "16"}),
    ],
)
def test_kglmatch_takes_these_arguments(name, given):
    parsed = cli.build_parser().parse_args(command.arguments(name, "vis.tif", "ir.tif", given))
    assert parsed.json and str(parsed.vis) == "vis.tif"
    for option, value in given.items():
        attribute = {"o": "output"}.get(option, option.replace("-", "_"))
        assert getattr(parsed, attribute) not in (None, False), option
        if isinstance(value, str) and option != "max-displacement":
            assert str(getattr(parsed, attribute)) == value


# --- a run ------------------------------------------------------------------------------------------------


@posix
def test_a_run(program):
    code = """
import json, sys
print("a.tif: 3 bands", file=sys.stderr)
for done in (16, 64):
    print(f"kglmatch: progress: tiles {done}/64", file=sys.stderr)
print("kglmatch: progress: write 1/2", file=sys.stderr)
print(json.dumps({"verdict": "registered", "arguments": sys.argv[1:]}))
"""
    said, percents = [], []
    finished = command.run([program(code), "register", "a b.tif"], say=said.append, advance=percents.append)
    assert finished.code == 0 and finished.result["arguments"] == ["register", "a b.tif"]
    assert said == finished.messages == ["a.tif: 3 bands"]
    assert percents == [27.5, 80.0, 90.0]
    assert command.problem_of(finished) is None


@posix
def test_more_output_than_a_pipe_holds(program):
    code = """
import sys
for _ in range(10000):
    print("x" * 79)
    print("x" * 79, file=sys.stderr)
"""
    finished = command.run([program(code)])
    assert finished.code == 0 and len(finished.messages) == 10000


@posix
@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import sys; print('kglmatch: error: no such file', file=sys.stderr); sys.exit(2)", "no such file"),
        ('import sys; print(\'{"verdict": "failed"}\'); sys.exit(1)', None),
        ("import sys; print('Traceback', file=sys.stderr); sys.exit(1)", "exit code 1: Traceback"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9"),
        ("print('hello')", "printed no result"),
    ],
)
def test_how_a_program_may_end(program, code, problem):
    found = command.problem_of(command.run([program(code)]))
    assert found is None if problem is None else problem in found


def test_a_program_that_cannot_be_started(tmp_path):
    with pytest.raises(command.CommandError, match="cannot start"):
        command.run([str(tmp_path / "nothing")])


@posix
@pytest.mark.parametrize("stubborn", [False, True])
def test_a_cancelled_program_ends_with_its_children(program, monkeypatch, stubborn):
    monkeypatch.setattr(command, "_PATIENCE", 0.5 if stubborn else 20.0)
    code = f"""
import signal, subprocess, sys, time
if {stubborn}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, file=sys.stderr, flush=True)
time.sleep(60)
"""
    said = []
    with pytest.raises(command.Cancelled):
        command.run([program(code)], say=said.append, cancelled=lambda: bool(said))
    end = time.monotonic() + 20
    while is_alive(int(said[0])) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_alive(int(said[0]))


def is_alive(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_progress_of_kglmatch_is_understood(monkeypatch, capsys):
    monkeypatch.setenv("KGLMATCH_PROGRESS", "lines")
    with counter("write", total=4, done=0, show=True, unit="block") as advance:
        for _ in range(4):
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "kglmatch: progress: write 1/4"
    assert [command.progress_of(line) for line in lines] == [85.0, 90.0, 95.0, 100.0]
    assert command.progress_of("wrote 3/4") is None


def test_lines_of_progress_are_at_most_a_hundred(monkeypatch, capsys):
    monkeypatch.setenv("KGLMATCH_PROGRESS", "lines")
    with counter("tiles", total=5000, done=0, show=True) as advance:
        for _ in range(5000):
            advance(1)
    assert len(capsys.readouterr().err.splitlines()) <= 101


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (
            {"verdict": "registered", "confidence": 0.987, "shift_metres": [-30.69, 0.34]},
            "registered, confidence 0.99, moved by 30.69 m west and 0.34 m north",
        ),
        ({"verdict": "failed", "confidence": 0.1, "shift_metres": None}, "failed, confidence 0.10"),
        ({"verdict": "registered", "median_error": 2.941}, "registered, median displacement 2.94 px"),
    ],
)
def test_results_in_one_line(result, text):
    assert command.summary(result) == text


# --- in QGIS ----------------------------------------------------------------------------------------------

# Debian's wrapper of it passes an option that it does not know.
QGIS = shutil.which("qgis_process.bin") or shutil.which("qgis_process")
in_qgis = pytest.mark.skipif(QGIS is None, reason="QGIS (qgis_process) is not installed here")


@pytest.fixture(scope="module")
def qgis(tmp_path_factory):
    """Runs qgis_process with a profile of its own, in which the plugin is enabled."""
    folder = tmp_path_factory.mktemp("qgis")
    plugins = folder / "home/.local/share/QGIS/QGIS3/profiles/default/python/plugins"
    plugins.mkdir(parents=True)
    (plugins / "kglmatch_qgis").symlink_to(PLUGIN)
    (folder / "run").mkdir(mode=0o700)
    program = folder / "kglmatch"
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m kglmatch "$@"\n', "utf-8")
    program.chmod(0o755)
    own = {
        "QT_QPA_PLATFORM": "offscreen",
        "HOME": str(folder / "home"),
        "XDG_RUNTIME_DIR": str(folder / "run"),
    }
    environment = {**os.environ, **own, "KGLMATCH": str(program), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    # QGIS takes the first Python on PATH, which must be the system's, not a virtual environment's.
    folders = environment["PATH"].split(os.pathsep)
    environment["PATH"] = os.pathsep.join(f for f in folders if not (Path(f).parent / "pyvenv.cfg").exists())

    def run(*arguments):
        done = subprocess.run(
            [QGIS, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    code, text, errors = run("plugins", "enable", "kglmatch_qgis")
    assert code == 0, text + errors
    return run


@pytest.fixture(scope="module")
def rasters(tmp_path_factory):
    """256 x 256 pixels of the example pair at 10 m in EPSG:32633; the map of the second is wrong by 30 m."""
    rasterio = pytest.importorskip("rasterio")
    from rasterio.transform import from_origin

    folder = tmp_path_factory.mktemp("rasters")
    for band, east in (("red", 500_000), ("nir", 500_030)):
        with rasterio.open(ROOT / f"examples/data/sentinel2_{band}.tif") as source:
            pixels = source.read(1)[64:320, 64:320]
        with rasterio.open(
            folder / f"{band}.tif",
            "w",
            driver="GTiff",
            width=256,
            height=256,
            count=1,
            dtype=pixels.dtype,
            crs="EPSG:32633",
            transform=from_origin(east, 5_400_000, 10, 10),
        ) as file:
            file.write(pixels, 1)
    return folder


def results(text):
    """The results that qgis_process prints."""
    lines = text.partition("Results")[2].splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


@in_qgis
@pytest.mark.slow
def test_register_in_qgis(qgis, rasters, tmp_path):
    import rasterio

    code, text, errors = qgis(
        "run",
        "kglmatch:register",
        "--",
        f"VIS={rasters / 'red.tif'}",
        f"IR={rasters / 'nir.tif'}",
        "IR_BAND=1",
        "MAX_DISPLACEMENT=60",
        "UNIT=metres",
        f"REPORT={tmp_path / 'report.html'}",
        f"OUTPUT={tmp_path / 'out.tif'}",
    )
    assert code == 0, text + errors
    found = results(text)
    assert found["VERDICT"] == "registered" and abs(float(found["SHIFT_EAST"]) + 30) < 3
    assert "--max-displacement=60m" in text and "100" in text
    with rasterio.open(tmp_path / "out.tif") as out, rasterio.open(rasters / "red.tif") as red:
        assert out.transform == red.transform and out.shape == red.shape
    assert (tmp_path / "report.html").stat().st_size > 1000


@in_qgis
@pytest.mark.slow
def test_check_in_qgis(qgis, rasters, tmp_path):
    code, text, errors = qgis(
        "run",
        "kglmatch:check",
        "--",
        f"VIS={rasters / 'red.tif'}",
        f"IR={rasters / 'nir.tif'}",
        "UNIT=metres",
        "MAX_DISPLACEMENT=100",
        f"RESIDUAL_FIELD={tmp_path / 'field.tif'}",
    )
    assert code == 0, text + errors
    found = results(text)
    assert found["VERDICT"] == "registered" and abs(float(found["SHIFT_X"]) - 3) < 0.5
    assert (tmp_path / "field.tif").is_file() and found["RESIDUAL_FIELD"] == str(tmp_path / "field.tif")


@in_qgis
@pytest.mark.slow
def test_tie_points_in_qgis(qgis, rasters, tmp_path):
    pyogrio = pytest.importorskip("pyogrio")
    target = tmp_path / "points.gpkg"
    code, text, errors = qgis(
        "run",
        "kglmatch:tiepoints",
        "--",
        f"VIS={rasters / 'red.tif'}",
        f"IR={rasters / 'nir.tif'}",
        f"OUTPUT={target}",
    )
    assert code == 0, text + errors
    facts = pyogrio.read_info(target)
    assert facts["features"] > 10 and facts["crs"] == "EPSG:32633"


@in_qgis
@pytest.mark.slow
def test_what_is_wrong_is_said_in_qgis(qgis, rasters, tmp_path):
    pair = (f"VIS={rasters / 'red.tif'}", f"IR={rasters / 'nir.tif'}", f"OUTPUT={tmp_path / 'out.tif'}")
    code, text, errors = qgis("run", "kglmatch:register", "--", *pair, "OTHER_MODEL=no-such-model")
    assert code != 0 and "no-such-model" in text + errors and not (tmp_path / "out.tif").exists()
    code, text, errors = qgis("run", "kglmatch:register", "--", *pair, "SHIFT_ONLY=true", "LOCAL=true")
    assert code != 0 and "choose one of them" in text + errors
