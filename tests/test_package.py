"""The package itself: light to import, its public names, its stub."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import kglmatch
from kglmatch.cli import COMMANDS

STUB = Path(kglmatch.__file__).with_suffix(".pyi")
HEAVY = (
    "torch",
    "onnxruntime",
    "onnx",
    "cv2",
    "numpy",
    "PIL",
    "huggingface_hub",
    "safetensors",
    "matplotlib",
)

# Run in a process of its own, with every warning an error.
LOOK = f"""
import json, sys
import kglmatch
seen = {{"at import": sorted(set({HEAVY}) & set(sys.modules)), "dir": dir(kglmatch)}}
kglmatch.__version__, kglmatch.KGLMatchError
seen["errors"] = sorted(set({HEAVY}) & set(sys.modules))
names = {{}}
exec("from kglmatch import *", names)
seen["star"] = sorted(name for name in names if name != "__builtins__")
try:
    kglmatch.nothing
except AttributeError as error:
    seen["nothing"] = str(error)
print(json.dumps(seen))
"""


def test_a_command_loads_its_own_module_alone():
    code = (
        "import sys; from kglmatch.cli import main; main(['match', '--help']);"
        "print([m for m in sys.modules if m.startswith('kglmatch.commands.')], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(done.stderr))
    assert "kglmatch.commands.match" in loaded
    others = [name.replace("-", "_") for name in COMMANDS if name != "match"]
    assert not loaded & {f"kglmatch.commands.{name}" for name in others}


def test_matching_does_not_load_registration():
    code = "import sys, kglmatch.matcher; print([m for m in sys.modules if m.startswith('kglmatch.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(done.stdout)
    assert "kglmatch.matcher" in loaded
    assert not [m for m in loaded if m.startswith(("kglmatch.registration", "kglmatch.streaming"))]


def stub_names() -> dict[str, str]:
    """Public name -> module that it comes from, as type checkers and editors read it."""
    names = {}
    for node in ast.parse(STUB.read_text(encoding="utf-8")).body:
        assert isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names:
            assert alias.asname == alias.name  # else a checker takes it for private
            names[alias.name] = f"kglmatch.{node.module}"
    return names


def test_importing_loads_no_library_and_names_are_loaded_when_used():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOOK], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    seen = json.loads(done.stdout)
    assert seen["at import"] == seen["errors"] == []
    assert seen["dir"] == seen["star"] == sorted(kglmatch.__all__)
    assert "nothing" in seen["nothing"]


def test_the_stub_names_what_there_is():
    names = stub_names()
    assert sorted(names) == sorted(kglmatch.__all__) == dir(kglmatch)
    for name, module in names.items():
        value = getattr(kglmatch, name)
        assert value is getattr(importlib.import_module(module), name)
        # In the place where it is defined, not where it passes through.
        assert getattr(value, "__module__", module) == module
        assert name == "__version__" or value.__doc__
