"""Who may import whom, read from the code's own imports: no circles, and data flow one way."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "kglmatch"

# The rooms of the package, each with those that it may import besides itself. `__init__` and the stubs are
# doors, not rooms: they hold names of others.
SHARED = {"errors", "options", "progress", "files"}
DATA = {"features"}
IMAGES = {"images", "keypoints", "patches", "geometry", "resampling", "matching", "fusion", "dense"}
NETWORK = {"models", "backends"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "options": set(),
    "progress": set(),
    "files": {"errors"},
    "features": SHARED,
    **dict.fromkeys(IMAGES, SHARED | DATA | IMAGES),
    "models": SHARED,
    "backends": SHARED | DATA | {"matching", "models"},
    "quantization": set(),
    "export": SHARED | {"models", "quantization"},
    "onnx_cache": SHARED | NETWORK | {"export"},
    "patch_matcher": SHARED | DATA | IMAGES | NETWORK,
    "registration": SHARED | DATA | IMAGES | {"patch_matcher"},
    "streaming": SHARED | DATA | IMAGES | {"patch_matcher", "registration"},
    "matcher": SHARED
    | DATA
    | IMAGES
    | NETWORK
    | {"export", "onnx_cache", "patch_matcher", "registration", "streaming"},
    "batch": SHARED
    | DATA
    | IMAGES
    | NETWORK
    | {"datasets", "matcher", "patch_matcher", "registration", "streaming"},
    "geo": SHARED | DATA | IMAGES | {"matcher", "patch_matcher", "registration"},
    "datasets": SHARED | DATA | IMAGES,
    "evaluation": SHARED | DATA | IMAGES | {"datasets", "matcher", "models"},
    "visualize": SHARED | DATA | IMAGES | {"registration"},
    "proposers": SHARED | DATA,
    "report": SHARED | DATA | IMAGES | {"registration", "visualize"},
    "interop": SHARED | DATA | IMAGES | {"matcher", "registration"},
    "training": SHARED | DATA | IMAGES | NETWORK | {"datasets", "evaluation"},
}
# A command calls the API, whatever it needs of it.
TOP = {"cli", "commands", "__main__"}


def modules() -> dict[str, Path]:
    """Name of each module within the package ("registration.align") and its file."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py"
    }


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports anywhere: at its top, in a function, or for types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import, which this test does not follow"
            # A name may be a module itself, or something in one.
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
        for name in names:
            if name.startswith("kglmatch.") and name.removeprefix("kglmatch.") in known:
                yield name.removeprefix("kglmatch.")


@functools.cache
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imports(path, known)) - {name} for name, path in known.items()}


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """One circle of imports, or nothing."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(arrows[name]):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := visit(name, []))), [])


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_import_runs_in_a_circle():
    arrows = graph()
    assert sum(map(len, arrows.values())) > 100  # they are seen at all
    assert circle(arrows) == []


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_what_its_room_may(name):
    room = name.split(".")[0]
    if room in TOP:
        return
    foreign = {other.split(".")[0] for other in graph()[name]} - {room}
    assert foreign <= MAY_IMPORT[room], f"{name} imports {sorted(foreign - MAY_IMPORT[room])}"


def test_inference_never_imports_training():
    for name, others in graph().items():
        if name.split(".")[0] not in ("training", *TOP):
            assert not any(other.startswith("training") for other in others), name
