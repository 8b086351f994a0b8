"""README and guide: every Python block runs, every shell line exists, every link leads somewhere.

The example images are cut smaller here, keypoint detection keeps few keypoints, each model is loaded once,
and the ONNX export is the one that all tests share, so that the pages run in seconds; nothing else of the
package is changed.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import kglmatch.cli
import kglmatch.export
import kglmatch.keypoints
import kglmatch.patch_matcher
from kglmatch.images import read_image_raw, save_image

ROOT = Path(__file__).resolve().parents[1]
GUIDE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDE]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```", re.M | re.S)
# Text and figures that nothing runs.
OTHER_LANGUAGES = {"text", "bibtex", "toml", "json", "cpp", "cmake"}
# Programs other than kglmatch that the pages call.
OTHER_PROGRAMS = {
    "pip",
    "pytest",
    "python",
    "mkdocs",
    "cmake",
    "torchrun",
    "qgis_process",
    "pre-commit",
    "mike",
}
# Commands that take no more than a second or two; of the others the options alone are checked.
QUICK = {"info", "match", "score"}
FEW_KEYPOINTS = 16
SIDE = 320  # pixels of the example images, which are as large as the pages need them


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """The fenced blocks of these languages: line in the page, text."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start("text")), textwrap.dedent(found["text"]))
        for found in FENCE.finditer(text)
        if found["language"].strip() in languages
    ]


def shell_lines(page: Path) -> list[str]:
    """The commands of the shell blocks, without comments, settings of variables and what follows a pipe."""
    joined = "\n".join(text for _, text in blocks(page, "sh")).replace("\\\n", " ")
    commands = [part.strip() for line in joined.splitlines() for part in line.split("&&")]
    return [re.sub(r"^([A-Z_]+=\S+ )+", "", line) for line in commands if line and not line.startswith("#")]


with_python = [page for page in PAGES if blocks(page, "python")]
with_shell = [page for page in PAGES if shell_lines(page)]


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `examples/data`, with the upper left of each image."""
    folder = tmp_path_factory.mktemp("data")
    for path in (ROOT / "examples" / "data").glob("*.tif"):
        save_image(folder / path.name, read_image_raw(path)[:SIDE, :SIDE])
    return folder


@pytest.fixture(scope="module")
def loaded_once() -> Callable[..., kglmatch.Matcher]:
    return functools.cache(kglmatch.Matcher.from_pretrained)


@pytest.fixture
def checkout(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_data: Path, loaded_once, request
) -> Path:
    """A current folder with small example data; few keypoints, and the tests' one export."""
    detect = kglmatch.keypoints.detect_keypoints

    def detect_few(*args, max_keypoints: int = FEW_KEYPOINTS, **options):
        return detect(*args, max_keypoints=min(max_keypoints, FEW_KEYPOINTS), **options)

    for module in (kglmatch, kglmatch.patch_matcher):
        monkeypatch.setattr(module, "detect_keypoints", detect_few)
    if any("export_onnx(" in text for _, text in blocks(page, "python")):
        exported = request.getfixturevalue("exported")

        def export_copy(_state, _config, folder, **_options):
            shutil.copytree(exported.folder, folder)
            return dataclasses.replace(exported, folder=Path(folder))

        monkeypatch.setattr(kglmatch.export, "export_onnx", export_copy)
    monkeypatch.setattr(kglmatch.Matcher, "from_pretrained", loaded_once)
    shutil.copytree(small_data, tmp_path / "examples" / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", with_python, ids=name)
def test_python_blocks_run_in_order(page: Path, checkout: Path):
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, text in blocks(page, "python"):
        # Empty lines before it, so that a traceback names the line of the page.
        exec(compile("\n" * line + text, name(page), "exec"), namespace)


@pytest.mark.parametrize("page", with_shell, ids=name)
def test_shell_commands_exist_and_the_quick_ones_run(page: Path, checkout: Path, capsys):
    for line in shell_lines(page):
        program, *arguments = shlex.split(line, comments=True)
        if program == "python":
            assert arguments[0] == "-m" or (ROOT / arguments[0]).exists(), f"no such script: {line}"
        if program != "kglmatch":
            assert program in OTHER_PROGRAMS, f"unknown program: {line}"
            continue
        options = kglmatch.cli.build_parser().parse_args(arguments)  # exits where an option is unknown
        inputs = [path for key in ("vis", "ir") if (path := getattr(options, key, None)) is not None]
        if arguments[0] in QUICK and "--benchmark" not in arguments and all(path.exists() for path in inputs):
            assert kglmatch.cli.main(arguments) == 0, f"{line}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_names_its_language(page: Path):
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(FENCE.findall(text))
    languages = {found["language"].strip() for found in FENCE.finditer(text)}
    assert languages <= {"python", "sh"} | OTHER_LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_pictures_lead_somewhere(page: Path):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{name(page)} links to {target}, which is not there"


def test_the_picture_is_small():
    assert (ROOT / "docs/images/matches.jpg").stat().st_size < 400_000


def test_every_page_of_the_guide_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in GUIDE:
        assert str(page.relative_to(ROOT / "docs")) in navigation


def test_every_file_named_in_the_pages_exists():
    for page in PAGES:
        for path in re.findall(r"\bexamples/[\w./-]+\.(?:py|toml|tif)\b", page.read_text(encoding="utf-8")):
            assert path.endswith("missing.tif") or (ROOT / path).is_file(), f"{name(page)} names {path}"
