"""Writes LICENSES-DEPENDENCIES.md: the licence of every package that kglmatch or one of its extras installs.

    python .ci/licences.py               # in an environment with all extras
    python .ci/licences.py --check       # ends with an error where a declared package has no line

Licences are what the packages state, as `pip-licenses` reads it. A package that is not installed keeps
the line that it has.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "LICENSES-DEPENDENCIES.md"
LONGEST = 120  # characters; some packages state the whole text
# Tools for developers, in no installation of a user.
DEVELOPMENT = {"test", "docs", "dev"}
HEADER = """\
# Licences of the dependencies

What `pip install` brings along with kglmatch, and the licence of each package by its own account. Written by
`python .ci/licences.py`, with the versions of `constraints.txt`. "needed by" is kglmatch itself, or an extra:
its packages without those that kglmatch needs anyway; of the extras for developers, the declared ones alone.
PyTorch's CUDA builds also install NVIDIA's libraries (`nvidia-*`), under NVIDIA's own terms.

| package | licence | needed by |
|---|---|---|
"""


def declared() -> dict[str, list[Requirement]]:
    """The requirements of kglmatch ("kglmatch") and of each extra."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    groups = {"kglmatch": project["dependencies"], **project["optional-dependencies"]}
    return {
        group: [Requirement(line) for line in lines if not line.startswith("kglmatch[")]
        for group, lines in groups.items()
    }


def applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    environments = [{**default_environment(), "extra": extra} for extra in (*extras, "")]
    return requirement.marker is None or any(requirement.marker.evaluate(each) for each in environments)


def closure(requirements: list[Requirement]) -> set[str]:
    """The packages that are installed for some requirements, by normalised name."""
    found: dict[str, set[str]] = {}
    waiting = [requirement for requirement in requirements if applies(requirement, ())]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found and requirement.extras <= found[name]:
            continue
        found[name] = found.get(name, set()) | requirement.extras
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [each for each in map(Requirement, lines) if applies(each, found[name])]
    return set(found)


def stated() -> dict[str, str]:
    """Normalised name -> licence, of all that is installed."""
    command = ["pip-licenses", "--from=mixed", "--format=json", "--with-system", f"--python={sys.executable}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    licences = {}
    for row in json.loads(done.stdout):
        first = next((line.strip() for line in row["License"].splitlines() if line.strip()), "not stated")
        licences[canonicalize_name(row["Name"])] = first[:LONGEST].replace("|", "/")
    return licences


def written() -> dict[str, tuple[str, str]]:
    """Normalised name -> licence and "needed by", as the file has them."""
    text = TABLE.read_text(encoding="utf-8") if TABLE.is_file() else ""
    rows = re.findall(r"^\| `([^`]+)` \| (.+?) \| (.+?) \|$", text, re.M)
    return {name: (licence, group) for name, licence, group in rows}


def missing() -> list[str]:
    """Declared packages without a line."""
    names = {canonicalize_name(each.name) for group in declared().values() for each in group}
    return sorted(names - written().keys())


def write() -> None:
    licences, before = stated(), written()
    groups = declared()
    packages = {group: closure(requirements) for group, requirements in groups.items()}
    # Of the other platforms, which the closure leaves out.
    for group, requirements in groups.items():
        packages[group] |= {canonicalize_name(requirement.name) for requirement in requirements}
    needed: dict[str, list[str]] = {}
    for group in DEVELOPMENT:
        packages[group] = {canonicalize_name(requirement.name) for requirement in groups[group]}
    for group, names in packages.items():
        for name in names:
            if group == "kglmatch" or name not in packages["kglmatch"]:
                needed.setdefault(name, []).append(group)
    rows = []
    for name, by in sorted(needed.items(), key=lambda item: (item[1] != ["kglmatch"], item[0])):
        licence = licences.get(name) or before.get(name, ("", ""))[0]
        if not licence and name == "onnxruntime":
            licence = licences.get(
                "onnxruntime-gpu", ""
            )  # the same project; the two cannot be installed together
        if not licence:
            sys.exit(f"{name} is not installed: pip install -c constraints.txt '.[{by[0]}]'")
        rows.append(f"| `{name}` | {licence} | {', '.join(sorted(by))} |\n")
    TABLE.write_text(HEADER + "".join(rows), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        write()
    if names := missing():
        sys.exit(f"{TABLE.name} lacks {', '.join(names)}: run python .ci/licences.py")
