"""The shape of the house: which file may know what, what is public, and what importing it does (nothing)."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import vtc
from vtc import video
from vtc.selectors import atp

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vtc"

# What a part of the package may not import; "transformers" is met anywhere in the file, type-checking blocks apart.
FORBIDDEN = {
    "selectors": {"transformers", "vtc.adapters", "vtc.api", "vtc.report"},
    "kernels": {"transformers", "vtc.adapters", "vtc.api", "vtc.report", "vtc.selectors"},
    "adapters": {"vtc.api", "vtc.bench", "vtc.cli", "vtc.engine", "vtc.report", "vtc.tuning", "vtc.video"},
    "core/context.py": {"transformers", "vtc.adapters", "vtc.selectors"},
    "core/selection.py": {"transformers", "vtc.adapters", "vtc.selectors"},
    "config.py": {"torch", "transformers", "vtc.adapters", "vtc.selectors"},
    "budget.py": {"torch", "transformers", "vtc.adapters", "vtc.selectors"},
    "errors.py": {"torch", "transformers", "vtc.adapters", "vtc.selectors"},
    "functional.py": {"transformers", "vtc.adapters"},
    "registry.py": {"transformers"},
    "report/report.py": {"transformers", "vtc.adapters"},
    "report/flops.py": {"vtc.adapters", "vtc.engine"},
    "report/views.py": {"transformers", "vtc.adapters", "vtc.engine"},
}


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports when it runs, wherever the import stands."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def files_of(part: str) -> list[Path]:
    path = PACKAGE / part
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("part", FORBIDDEN)
def test_arrows_point_one_way(part):
    files = files_of(part)
    assert files
    for path in files:
        wrong = {
            name
            for name in imported(path)
            if any(name == forbidden or name.startswith(f"{forbidden}.") for forbidden in FORBIDDEN[part])
        }
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("path", files_of("adapters"), ids=lambda path: path.stem)
def test_families_are_listed_without_transformers(path):
    statements = ast.parse(path.read_text(encoding="utf-8")).body
    imports = [ast.unparse(node) for node in statements if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [line for line in imports if "transformers" in line]


def test_imports_are_read_whatever_their_form():
    names = imported(PACKAGE / "selectors" / "divprune.py")
    assert {"vtc.core.context", "vtc.registry", "vtc.core.selection", "torch"} & names >= {
        "vtc.core.context",
        "vtc.registry",
    }
    assert "transformers" not in imported(PACKAGE / "report" / "report.py")
    assert any(name.startswith("transformers") for name in imported(PACKAGE / "engine" / "engine.py"))


def test_eval_uses_public_names_only():
    allowed = {"vtc", "vtc.reference", *(f"vtc.{name}" for name in vtc.__all__)}
    allowed |= {"vtc.report.flops", "vtc.report.flops.DecoderShape"}
    allowed |= {"vtc.video", *(f"vtc.video.{name}" for name in video.__all__)}
    allowed |= {"vtc.selectors.atp", *(f"vtc.selectors.atp.{name}" for name in atp.__all__)}  # what is trained
    for path in sorted((ROOT / "eval").rglob("*.py")):
        names = {name for name in imported(path) if name.split(".")[0] == "vtc"}
        wrong = {name for name in names if name not in allowed and not name.startswith("vtc.reference.")}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_importing_changes_nothing():
    code = """
import torch, transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

tables = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
def state():
    rows = [{name: table[name] for name in table.valid_keys()} for table in tables]
    return rows, torch.random.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads()

before = state()
import vtc, vtc.cli, vtc.reference
assert state() == before
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# A changed line here is a change that users notice: it belongs into the changelog.
PUBLIC = {
    "compress": "(model, method='divprune', *, keep_ratio=None, keep_tokens=None, positions='original',"
    " structural='keep', seed=0, **options)",
    "compressed": "(model, method='divprune', **arguments)",
    "disabled": "(model)",
    "is_compressed": "(model)",
    "list_methods": "(model=None)",
    "register_adapter": "(*model_types)",
    "register_selector": "(cls)",
    "report": "(model)",
    "restore": "(model)",
    "supported_models": "()",
}


def _without_annotations(function) -> str:
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_signatures_are_as_promised(name):
    assert _without_annotations(getattr(vtc, name)) == PUBLIC[name]


def test_public_names_are_sorted_and_there():
    assert vtc.__all__ == sorted(vtc.__all__)
    assert set(PUBLIC) <= set(vtc.__all__)
    assert all(hasattr(vtc, name) for name in vtc.__all__)
    promised = {"CompressionConfig", "Report", "ScoreSelector", "Selection", "Selector", "VisualContext", "select"}
    assert promised <= set(vtc.__all__)


def test_package_is_code_alone():
    others = {path.suffix for path in PACKAGE.rglob("*") if path.is_file()} - {".py", ".typed", ".pyc"}
    assert not others
