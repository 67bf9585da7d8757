"""Every code block of the README and the documentation runs; every name and path in it exists."""

from __future__ import annotations

import contextlib
import doctest
import functools
import importlib
import io
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import l2rw_ext
from l2rw_ext.ops._operator import OPERATORS
from support.paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
CHART = "docs/assets/step.svg"
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """Language, text and first line of each fenced block."""
    text = page.read_text()
    return [
        (match["language"], match["code"], text.count("\n", 0, match.start()) + 2)
        for match in BLOCK.finditer(text)
    ]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def with_language(*languages: str) -> list[Path]:
    return [p for p in PAGES if any(language in languages for language, *_ in blocks(p))]


@pytest.mark.parametrize("page", with_language("python"), ids=named)
def test_python_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The blocks of a page in order; a ``text`` block after one is what it prints."""
    monkeypatch.chdir(tmp_path)
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where the compiler looks for it
    namespace = vars(module)
    printed = ""
    for language, code, line in blocks(page):
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
            printed = out.getvalue()
        elif language == "text":
            assert printed == code, f"{named(page)}:{line}"
    if page.name == "README.md":
        assert float(namespace["accuracy"]) > 0.85


@pytest.mark.parametrize("page", with_language("sh"), ids=named)
def test_commands_exist(page: Path) -> None:
    text = page.read_text()
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"\bmake ([a-z]+)(?=[`\s]|$)", "\n".join(code(text))):
        assert target in targets, target
    from benchmarks.__main__ import COMMANDS

    for command in re.findall(r"-m benchmarks ([a-z]+)", text):
        assert command in COMMANDS, command


def code(text: str) -> list[str]:
    """What stands in ``sh`` blocks and between single backquotes."""
    shell = [match["code"] for match in BLOCK.finditer(text) if match["language"] == "sh"]
    return [*shell, *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)]


def resolve(name: str) -> object:
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for k, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:k]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_names_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"`(l2rw_ext(?:\.\w+)+)`", text):
        resolve(name)
    folders = r"csrc|cmake|l2rw_ext|python_tests|benchmarks|examples|docs"
    found = re.findall(rf"`((?:{folders})/[\w/.]+)`", text)
    for language, body, _ in blocks(page):
        if language == "sh":
            found += re.findall(r"\b(?:csrc|l2rw_ext|python_tests)/[\w/.]+", body)
    for path in found:
        assert (ROOT / path).exists(), path
    included = re.findall(r"^```\{(?:literal)?include\} (\S+)$", text, re.MULTILINE)
    for link in [*re.findall(r"\]\(([^)#:]+)\)", text), *included]:
        recorded = link != CHART or (RESULTS / "step.json").exists()
        assert (page.parent / link).exists() == recorded, link


def test_paths_in_comments_exist() -> None:
    """Those of the sources and of the build; a path that a build makes is none of them."""
    sources = [ROOT / "Makefile", ROOT / "CMakeLists.txt", ROOT / ".ci" / "run"]
    for folder in ("cmake", "csrc"):
        found = (ROOT / folder).rglob("*")
        sources += [p for p in found if p.suffix in (".cmake", ".cpp", ".cu", ".cuh", ".h")]
    for source in sources:
        for path in re.findall(r"python_tests/[\w/.]*\w", source.read_text()):
            assert (ROOT / path).exists(), f"{named(source)}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_recorded_parts_are_those_of_the_recorded_results(page: Path) -> None:
    from benchmarks.pages import filled, read_reports

    text = page.read_text()
    assert filled(text, read_reports(RESULTS)) == text, (
        "type python -m benchmarks report --fill README.md docs/benchmarks.md docs/labels.md"
    )


def modules() -> list[str]:
    package = Path(l2rw_ext.__file__).parent
    paths = [path.relative_to(package.parent) for path in sorted(package.rglob("*.py"))]
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    # Every operator has an example, of several lines.
    assert result.attempted >= 3 * sum(o.__module__ == name for o in OPERATORS.values())
