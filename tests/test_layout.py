"""The layout of the package: which room may import which, what is public, and what importing does (nothing)."""

from __future__ import annotations

import ast
import functools
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vtc
from vtc import chat, console, files, notation, plain, video
from vtc.selectors import adaptive_sparse_vit, learned
from vtc.tuning import tower

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vtc"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom to the top: a part may import the parts of earlier lines, and itself.
LEVELS = (
    ("errors", "_version"),
    ("console", "files", "plain"),
    ("chat",),
    ("budget", "kernels", "limits"),
    ("core", "pictures"),
    ("config", "registry", "reference"),
    ("loading", "notation", "relevance"),
    ("selectors",),
    ("adapters", "functional", "report.flops"),
    ("report.report",),
    ("engine",),
    ("api",),
    ("bench", "report.views"),
    ("report.visualize", "tuning", "video"),
    ("integrations",),
    ("cli",),
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}

# They know tensors and configurations: not even a function of theirs may import transformers.
WITHOUT_TRANSFORMERS = (
    *("errors", "chat", "budget", "limits", "pictures", "kernels"),
    *("core", "config", "registry", "selectors", "functional"),
)
WITHOUT_TORCH = (
    *("errors", "_version", "chat", "console", "files", "plain", "budget", "limits", "pictures", "config"),
    *("core.sites", "core.actions", "core.ranges"),
)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str | None:
    """The line of `LEVELS` that a module belongs to; None for the package itself, which imports lazily."""
    inner = module.removeprefix("vtc").removeprefix(".")
    found = [part for part in LEVEL if inner == part or inner.startswith(f"{part}.")]
    assert found or inner in ("", "report"), f"{module} is in no room"
    return max(found, key=len) if found else None


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports when it runs, wherever the import stands."""
    tree = parsed(path)
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
            names |= {f"{module}.{alias.name}" for alias in node.names}
            if not all(is_module(f"{module}.{alias.name}") for alias in node.names):
                names.add(module)  # a name of its own, not only modules in it
    return names


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def modules_imported(path: Path) -> set[str]:
    """Modules of the package that a file imports."""
    known = {module_of(other) for other in FILES}
    return (imported(path) & known) - {"vtc"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_arrows_point_one_way(path):
    own = part_of(module_of(path))
    if own is None:
        return
    for name in modules_imported(path):
        part = part_of(name)
        assert part is None or part == own or LEVEL[part] < LEVEL[own], f"{module_of(path)} imports {name}"


def test_no_module_imports_itself_in_a_circle():
    # A package is imported with each of its modules, but names from its __init__ only where that is asked for.
    graph = {module_of(path): modules_imported(path) - {module_of(path)} for path in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def private_definitions(path: Path) -> set[str]:
    """Private names that a file defines: functions, classes, variables and attributes."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def private_uses(path: Path) -> Iterator[str]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("vtc")):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store):
            yield node.attr


def test_no_private_name_crosses_a_folder():
    by_folder: dict[Path, set[str]] = {}
    for path in FILES:
        by_folder.setdefault(path.parent, set()).update(private_definitions(path))
    for path in FILES:
        elsewhere = set().union(*(names for folder, names in by_folder.items() if folder != path.parent))
        crossing = {name for name in private_uses(path) if name in elsewhere - by_folder[path.parent]}
        assert crossing <= {"_version"}, f"{path.relative_to(ROOT)} uses {sorted(crossing)}"


@pytest.mark.parametrize("part", WITHOUT_TRANSFORMERS)
def test_what_knows_tensors_knows_no_models(part):
    files = [path for path in FILES if part_of(module_of(path)) == part]
    assert files
    for path in files:
        assert not [name for name in imported(path) if name.split(".")[0] == "transformers"], path


@pytest.mark.parametrize("part", WITHOUT_TORCH)
def test_what_is_read_first_needs_no_torch(part):
    path = PACKAGE / f"{part.replace('.', '/')}.py"
    assert not [name for name in imported(path) if name.split(".")[0] == "torch"]


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "adapters"], ids=lambda path: path.stem)
def test_families_are_listed_without_transformers(path):
    imports = [ast.unparse(node) for node in parsed(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [line for line in imports if "transformers" in line]


def test_imports_are_read_whatever_their_form():
    names = imported(PACKAGE / "selectors" / "divprune.py")
    assert {"vtc.core.context", "vtc.registry", "vtc.core.selection"} <= names
    assert "transformers" not in imported(PACKAGE / "report" / "report.py")
    assert any(name.startswith("transformers") for name in imported(PACKAGE / "engine" / "recorder.py"))
    assert "_memory" in private_definitions(PACKAGE / "video" / "session.py")


@pytest.mark.parametrize("room", ["eval", "demos"])
def test_programs_use_public_names_only(room):
    allowed = {"vtc", "vtc.reference", *(f"vtc.{name}" for name in vtc.__all__)}
    allowed |= {"vtc.report.flops", "vtc.report.flops.DecoderShape", "vtc.bench.memory", "vtc.bench.memory.peak_bytes"}
    allowed |= {"vtc.report.visualize", "vtc.report.visualize.animation", "vtc.report.visualize.save_animation"}
    allowed |= {"vtc.registry", "vtc.registry.get_selector"}  # whose source is part of what is confirmed
    for module in (chat, console, files, notation, plain):
        allowed |= {module.__name__, *(f"{module.__name__}.{name}" for name in module.__all__)}
    allowed |= {"vtc.video", *(f"vtc.video.{name}" for name in video.__all__)}
    for package in (learned, learned.atp, learned.crosslmm, learned.llava_mini, learned.lora, learned.vision_remember):
        allowed |= {package.__name__, *(f"{package.__name__}.{name}" for name in package.__all__)}
    trained = adaptive_sparse_vit.__name__
    allowed |= {trained, *(f"{trained}.{name}" for name in adaptive_sparse_vit.__all__)}
    allowed |= {tower.__name__, *(f"{tower.__name__}.{name}" for name in tower.__all__)}
    for path in sorted((ROOT / room).rglob("*.py")):
        names = {name for name in imported(path) if name.split(".")[0] == "vtc"}
        wrong = {name for name in names if name not in allowed and not name.startswith("vtc.reference.")}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_importing_changes_nothing():
    code = """
import sys
import vtc
assert "torch" not in sys.modules and "transformers" not in sys.modules

import torch, transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

tables = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
def state():
    rows = [{name: table[name] for name in table.valid_keys()} for table in tables]
    return rows, torch.random.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads()

before = state()
import vtc.cli, vtc.reference, vtc.report.flops
assert callable(vtc.report), "the package of that name must not shadow the function"
for name in vtc.__all__:
    getattr(vtc, name)
assert vtc.supported_models() and vtc.list_methods()
assert state() == before
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# A changed line here is a change that users notice: it belongs into the changelog.
PUBLIC = {
    "compress": "(model, method='vtc', *, keep_ratio=None, keep_tokens=None, positions='original',"
    " structural='keep', seed=0, at=None, **options)",
    "compressed": "(model, method='vtc', **arguments)",
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


def test_type_checkers_see_the_lazy_names():
    blocks = [node for node in parsed(PACKAGE / "__init__.py").body if isinstance(node, ast.If)]
    typed = {alias.name for block in blocks for node in block.body for alias in getattr(node, "names", ())}
    assert typed == set(vtc.__all__) - {"__version__"}


def test_package_is_code_alone():
    others = {path.suffix for path in PACKAGE.rglob("*") if path.is_file()} - {".py", ".typed", ".pyc"}
    assert not others
