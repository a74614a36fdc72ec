"""The python blocks of README and docs run as written, and print what stands under them."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

import vtc
from vtc import registry
from vtc.cli import methods

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
# Figures that are another machine's or another day's.
VOLATILE = re.compile(r"\d+\.\d+ ms|\b(vtc|torch|transformers) \d[\w.+]*")


@dataclass
class Block:
    """One python block and the text block right under it, if there is one."""

    line: int
    code: str
    output: str | None = None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for fence in FENCE.finditer(text):
        language, body = fence["language"], fence["body"]
        if language == "python":
            found.append(Block(text[: fence.start()].count("\n") + 2, body))
        elif language == "text" and found and text[end : fence.start()].strip() == "":
            found[-1].output = body
        end = fence.end()
    return found


def comparable(text: str) -> list[str]:
    """Lines without volatile figures and without the spaces that align them."""
    return [" ".join(VOLATILE.sub("#", line).split()) for line in text.strip().splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run_and_print_what_the_page_shows(page, monkeypatch):
    monkeypatch.chdir(ROOT)  # pages name files as seen from the checkout
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up there
    # What a page registers, other tests must not find. The tables are filled first: modules are imported only once.
    for table in (registry._SELECTORS, registry._ADAPTERS):
        monkeypatch.setattr(table, "_classes", table.all())
    for block in blocks(page):
        # Blank lines before the code make a traceback point at the line of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, module.__dict__)
        if block.output is not None:
            assert comparable(printed.getvalue()) == comparable(block.output), f"{page.name}, line {block.line}"


def test_readme_and_method_page_have_code_to_run():
    with_code = {page.name for page in PAGES if blocks(page)}
    assert {"README.md", "add-a-method.md"} <= with_code


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_ci_finds_the_readme_test_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^pip install .*&& pytest.*$", text, re.MULTILINE)
    assert len(commands) == 1
    assert commands[0] in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def _first_column(heading: str, column: int) -> set[str]:
    """Code spans in one column of the table under a heading of README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row[column])}


def test_the_table_of_methods_is_the_commands() -> None:
    """`vtc methods --markdown` between the two marks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = (f"<!-- vtc methods --markdown: {mark} -->\n" for mark in ("begin", "end"))
    table = text.split(begin, 1)[1].split(end, 1)[0]
    own = {name: method for name, method in registry.selectors().items() if method.__module__.startswith("vtc.")}
    assert table == methods.markdown(own)


def test_tables_name_every_family_and_method_and_no_other():
    assert _first_column("Which models", 1) == set(vtc.supported_models())
    own = {name for name, method in registry.selectors().items() if method.__module__.startswith("vtc.")}
    assert _first_column("Which methods", 0) == own
